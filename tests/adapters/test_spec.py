import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSpec, ModuleSpec, norm, spec_from_fields, spec_to_fields
from fedpeft.errors import AdapterError
from tests.toys import SPEC, numbers

names = st.text("abz.-_0", min_size=1, max_size=6)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
modules = st.builds(
    ModuleSpec,
    path=names,
    kind=st.sampled_from(["lora", "ia3", "prompt", "full"]),
    rank=st.integers(0, 64),
    scale=st.floats(1e-6, 1e6),
    shapes=st.dictionaries(names, shapes, min_size=1, max_size=3).map(lambda found: tuple(sorted(found.items()))),
)
specs = st.builds(
    AdapterSpec,
    base_model=names,
    family=names,
    modules=st.lists(modules, min_size=1, max_size=3, unique_by=lambda module: module.path).map(tuple),
)


@given(specs)
def test_fields_carry_a_specification_through_json(spec: AdapterSpec) -> None:
    back = spec_from_fields(json.loads(json.dumps(spec_to_fields(spec))))
    assert back == spec
    assert back.digest == spec.digest
    assert back.shapes == spec.shapes


@given(specs, specs)
def test_digest_tells_specifications_apart(one: AdapterSpec, other: AdapterSpec) -> None:
    assert (one.digest == other.digest) == (one == other)


@given(specs)
def test_zeros_follow_their_specification(spec: AdapterSpec) -> None:
    tensors = {key: np.zeros(shape, np.float32) for key, shape in spec.shapes.items()}
    spec.require(tensors, "zeros")
    assert norm(tensors) == 0
    assert sum(value.size for value in tensors.values()) == spec.parameters


def test_tensors_travel_in_order_of_key_whatever_the_order_of_modules() -> None:
    turned = AdapterSpec(SPEC.base_model, SPEC.family, SPEC.modules[::-1])
    assert list(SPEC.shapes) == list(turned.shapes) == ["head.weight", "layer.A", "layer.B"]


def test_without_drops_tensors_and_empty_modules_and_keeps_the_rest() -> None:
    assert list(SPEC.without(["head.*"]).shapes) == ["layer.A", "layer.B"]
    assert list(SPEC.without(["*.A", "head.*"]).shapes) == ["layer.B"]
    left = SPEC.without(["*.A"]).modules[1]
    assert (left.path, left.rank, left.scale, left.shapes) == ("layer", 1, 2.0, (("B", (1, 1)),))
    assert SPEC.without([]) == SPEC
    assert SPEC.without(["*"]).shapes == {}


def test_matching_is_in_order_and_without_repeats() -> None:
    assert SPEC.matching(["layer.B", "*.A", "layer.*"]) == ("layer.A", "layer.B")
    with pytest.raises(AdapterError, match=r"pattern 'classifier\.\*': .*such as head\.weight"):
        SPEC.matching(["layer.*", "classifier.*"])


def bad(**changes: Any) -> dict[str, np.ndarray]:
    return {**numbers(1, 2, 3), **changes}


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({}, "3 missing or unknown, such as 'head.weight'"),
        (bad(extra=np.zeros(1, np.float32)), "1 missing or unknown, such as 'extra'"),
        (bad(**{"layer.A": np.zeros((1, 1))}), "tensor layer.A: .* found float64"),
        (bad(**{"layer.A": np.zeros((1,), np.float32)}), r"tensor layer.A: .* of shape \(1,\)"),
        (bad(**{"layer.A": np.full((1, 1), np.nan, np.float32)}), "tensor layer.A: .* found NaN or infinity"),
        (bad(**{"layer.B": np.full((1, 1), -np.inf, np.float32)}), "tensor layer.B: .* found NaN or infinity"),
    ],
)
def test_require_names_the_place_and_the_tensor(tensors: dict[str, np.ndarray], found: str) -> None:
    with pytest.raises(AdapterError, match=f"here.*{found}"):
        SPEC.require(tensors, "here")


def test_norm_is_over_all_tensors_in_float64() -> None:
    assert norm(numbers(2, 3, 6)) == 7.0
    assert norm(numbers(3e38, 0, 0)) == pytest.approx(3e38)
    assert norm({}) == 0.0
