from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import norm
from fedpeft.errors import AdapterError
from fedpeft.stages import Stage, alternate, chain, clip, freeze, identity, keep_local
from fedpeft.updates import Memory
from tests.toys import SPEC, flat, numbers, update

values = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
deltas = st.tuples(values, values, values)


@given(deltas, st.floats(1e-3, 1e3))
def test_clip_never_lets_more_than_its_norm_through(delta: tuple[float, float, float], most: float) -> None:
    before = update(delta)
    after, _ = clip(most).client(before, Memory())
    assert norm(after.delta) <= most
    assert flat(before.delta) == list(map(float, delta))
    again, _ = clip(most).client(after, Memory())
    assert flat(again.delta) == flat(after.delta)


def test_clip_scales_what_is_too_long_and_leaves_the_rest() -> None:
    long, _ = clip(3.5).client(update((2, 3, 6), loss=1.0), Memory())
    assert flat(long.delta) == pytest.approx([1.0, 1.5, 3.0], rel=1e-6)
    assert long.metrics == {"loss": 1.0, "clipped": 1.0}
    assert {value.dtype for value in long.delta.values()} == {np.dtype(np.float32)}
    short, _ = clip(7.0).client(update((2, 3, 6)), Memory())
    assert flat(short.delta) == [2, 3, 6]
    assert short.metrics == {}
    zero, _ = clip(1.0).client(update((0, 0, 0)), Memory())
    assert flat(zero.delta) == [0, 0, 0]


@pytest.mark.parametrize("make", [freeze, keep_local])
def test_frozen_and_local_tensors_do_not_travel(make: Callable[..., Stage]) -> None:
    stage = make(["layer.A"])
    for round_ in (1, 2, 7):
        assert stage.shared(SPEC, round_) == SPEC.without(["layer.A"])
        assert (stage.frozen(SPEC, round_) or stage.local(SPEC, round_)) == ("layer.A",)
        assert () in (stage.frozen(SPEC, round_), stage.local(SPEC, round_))
    memory, one = Memory({}, {"position": 3}), update((1, 2, 3))
    assert stage.client(one, memory) == (one, memory)


def test_freeze_is_not_keep_local() -> None:
    assert freeze(["*.A"]).frozen(SPEC, 1) == keep_local(["*.A"]).local(SPEC, 1) == ("layer.A",)
    assert freeze(["*.A"]).local(SPEC, 1) == keep_local(["*.A"]).frozen(SPEC, 1) == ()


def test_alternating_tensors_are_trained_in_every_other_round() -> None:
    stage = alternate(["*.A"], ["*.B"])
    assert [stage.frozen(SPEC, round_) for round_ in (1, 2, 3, 4)] == [("layer.A",), ("layer.B",)] * 2
    assert [list(stage.shared(SPEC, round_).shapes) for round_ in (1, 2)] == [
        ["head.weight", "layer.B"],
        ["head.weight", "layer.A"],
    ]
    assert all(stage.local(SPEC, round_) == () for round_ in (1, 2))
    assert alternate([], ["*.B"]).frozen(SPEC, 1) == ()


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (identity(), ()),
        (freeze(["*.A"]), ("layer.A",)),
        (keep_local(["*.A"]), ()),
        (alternate(["*.A"], ["*.B"]), ()),
        (alternate(["layer.*"], ["*.B"]), ("layer.B",)),
        (chain(alternate(["*.A"], ["*.B"]), freeze(["*.B", "head.*"])), ("head.weight", "layer.B")),
        (chain(freeze(["head.*"]), keep_local(["*.A"]), clip(1.0)), ("head.weight",)),
    ],
)
def test_only_what_no_round_trains_is_constant(stage: Stage, expected: tuple[str, ...]) -> None:
    assert sorted(set(stage.constant(SPEC))) == sorted(expected)


def test_chain_runs_client_halves_in_order_and_server_halves_reversed() -> None:
    told: list[str] = []

    def telling(name: str) -> object:
        def client(update, memory):  # type: ignore[no-untyped-def]
            told.append(f"client {name}")
            return update, Memory({}, {**memory.fields, name: len(told)})

        def server(delta):  # type: ignore[no-untyped-def]
            told.append(f"server {name}")
            return delta

        return identity()._replace(client=client, server=server)

    both = chain(telling("one"), telling("two"))  # type: ignore[arg-type]
    _, memory = both.client(update((0, 0, 0)), Memory())
    both.server(numbers(0, 0, 0))
    assert told == ["client one", "client two", "server two", "server one"]
    assert memory.fields == {"one": 1, "two": 2}


def test_chain_shares_what_no_stage_keeps() -> None:
    stage = chain(freeze(["head.*"]), keep_local(["*.A"]), clip(3.0))
    assert list(stage.shared(SPEC, 1).shapes) == ["layer.B"]
    assert (stage.frozen(SPEC, 1), stage.local(SPEC, 1)) == (("head.weight",), ("layer.A",))
    turning = chain(alternate(["*.A"], ["*.B"]), freeze(["head.*"]))
    assert [list(turning.shared(SPEC, round_).shapes) for round_ in (1, 2)] == [["layer.B"], ["layer.A"]]


def test_an_empty_chain_changes_nothing() -> None:
    stage, one = chain(), update((1, 2, 3))
    assert stage.client(one, Memory()) == (one, Memory())
    assert stage.shared(SPEC, 1) == SPEC
    assert stage.server(one.delta) is one.delta


@pytest.mark.parametrize("round_", [1, 2])
@pytest.mark.parametrize("make", [freeze, keep_local, lambda patterns: alternate(patterns, patterns)])
def test_a_pattern_that_matches_nothing_is_an_error(make: Callable[..., Stage], round_: int) -> None:
    with pytest.raises(AdapterError, match="pattern 'nothing'"):
        make(["nothing"]).shared(SPEC, round_)
