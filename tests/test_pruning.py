from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSpec, at_rank, resized
from fedpeft.merges import Pruning
from fedpeft.pruning import kept_rank, pruned_spec, tail
from tests.toys import WIDE, counted

keeps = st.floats(0.01, 0.99)


@pytest.mark.parametrize(
    ("rank", "keep", "expected"),
    [(8, 0.5, 4), (8, 0.99, 7), (5, 0.5, 2), (4, 0.9, 3), (2, 0.99, 1), (2, 0.01, 1), (1, 0.5, 1), (100, 0.99, 99)],
)
def test_the_rank_that_is_kept(rank: int, keep: float, expected: int) -> None:
    assert kept_rank(rank, Pruning(keep, 0.0)) == expected


@given(st.integers(2, 300), keeps)
def test_a_node_goes_down_by_one_at_least_and_to_one_at_most(rank: int, keep: float) -> None:
    assert 1 <= kept_rank(rank, Pruning(keep, 0.0)) < rank


def test_the_tail_by_hand() -> None:
    # The last two ranks of `left`: ‖(3, 4)‖ = 5 in A and ‖(6, 8)‖ = 10 in B; of `right`, at first only A has any.
    tensors = {key: np.zeros(shape, np.float32) for key, shape in WIDE.shapes.items()}
    tensors["left.A"][2:, 0], tensors["left.B"][0, 2:] = (3, 4), (6, 8)
    tensors["left.A"][0], tensors["right.A"][3] = 99, 7
    assert tail(WIDE, tensors, Pruning(0.5, 0.0)) == pytest.approx(50.0)
    tensors["right.B"][1, 3] = 2
    assert tail(WIDE, tensors, Pruning(0.5, 0.0)) == pytest.approx(50.0 + 21 * 2)


def scaled(by: float) -> dict[str, np.ndarray]:
    """The adapter with its tail on the last two ranks scaled."""
    tensors = {key: value.copy() for key, value in counted().items()}
    tensors["left.A"][2:] *= by
    return tensors


@pytest.mark.parametrize(("by", "expected"), [(0.9, 2), (1.0, 4), (1.1, 4)])
def test_a_tail_that_has_shrunk_goes(by: float, expected: int) -> None:
    found = pruned_spec(WIDE, scaled(1.0), scaled(by), Pruning(0.5, 0.0))
    assert found == at_rank(WIDE, expected)


def test_what_is_above_the_tail_plays_no_part() -> None:
    grown = {key: value.copy() for key, value in scaled(0.9).items()}
    grown["left.A"][:2] *= 100
    assert pruned_spec(WIDE, scaled(1.0), grown, Pruning(0.5, 0.0)) == at_rank(WIDE, 2)


def test_who_does_not_prune_or_has_rank_one_keeps_its_rank() -> None:
    small = at_rank(WIDE, 1)
    tensors = resized(counted(), small)
    nothing = {key: 0 * value for key, value in tensors.items()}
    assert pruned_spec(WIDE, scaled(1.0), scaled(0.5), None) == WIDE
    assert pruned_spec(small, tensors, nothing, Pruning(0.5, 0.0)) == small
    head = AdapterSpec("base", "head_only", WIDE.modules[:1])
    assert pruned_spec(head, {}, {}, Pruning(0.5, 0.0)) == head
