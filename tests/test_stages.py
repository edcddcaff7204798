from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSpec, ModuleSpec, norm
from fedpeft.errors import AdapterError
from fedpeft.stages import (
    UNSAID,
    Stage,
    alternate,
    chain,
    clip,
    freeze,
    identity,
    keep_local,
    keep_silent,
    layers_of,
    take_turns,
)
from fedpeft.updates import Memory, Update
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


LAYERED = AdapterSpec(
    "base",
    "lora",
    (
        ModuleSpec("head", "full", 0, 1.0, (("weight", (1,)),)),
        *(
            ModuleSpec(f"{stack}.{number}.attention", "lora", 1, 1.0, (("A", (1, 2)), ("B", (2, 1))))
            for stack, number in (("decoder.block", 0), ("encoder.block", 2), ("encoder.block", 10))
        ),
    ),
)


def trained_layers(stage: Stage, round_: int) -> set[str]:
    return {key.rpartition(".attention")[0] for key in stage.shared(LAYERED, round_).shapes}


def test_layers_are_counted_stack_by_stack_in_order_of_number() -> None:
    assert layers_of(LAYERED) == ("decoder.block.0", "encoder.block.2", "encoder.block.10")
    assert layers_of(SPEC) == ()


def test_layers_take_turns_round_after_round_and_a_head_is_always_there() -> None:
    stage = take_turns(2)
    odd, even = {"", "decoder.block.0", "encoder.block.10"}, {"", "encoder.block.2"}
    assert [trained_layers(stage, round_) for round_ in (1, 2, 3, 4)] == [odd, even, odd, even]
    assert "head.weight" in stage.shared(LAYERED, 2).shapes
    assert not stage.constant(LAYERED)
    assert (stage.period, stage.turns) == (2, 2)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_every_layer_has_its_turn_once_in_as_many_rounds_as_there_are_groups(groups: int) -> None:
    stage = take_turns(groups)
    had = [layer for round_ in range(1, groups + 1) for layer in trained_layers(stage, round_) if layer]
    assert sorted(had) == sorted(layers_of(LAYERED))


def test_turns_of_layers_and_of_factors_meet_in_every_combination_where_one_is_odd() -> None:
    stage = chain(alternate(["*.A"], ["*.B"]), take_turns(3), freeze(["head.*"]))
    assert stage.period == 6
    assert set(stage.constant(LAYERED)) == {"head.weight"}
    two = chain(alternate(["*.A"], ["*.B"]), take_turns(2))
    assert "encoder.block.2.attention.B" in two.constant(LAYERED)


def said_in_turn(stage: Stage, *deltas: tuple[float, float, float]) -> tuple[list[list[float]], list[bool], Memory]:
    """What is sent of one update after another, which of them are silent, and the memory after the last."""
    memory, sent, silent = Memory({"other": np.ones(1, np.float32)}, {"position": 7}), [], []
    for delta in deltas:
        found, memory = stage.client(update(delta), memory)
        sent.append(flat(found.delta))
        silent.append(found.silent)
    return sent, silent, memory


def test_a_short_update_is_not_said_and_comes_with_the_next() -> None:
    # The usual length is 5, then (5 + 1) / 2 = 3, then 2: 1 < 0.5 * 5 is kept, 1 + 1 is not below 0.5 * 3.
    sent, silent, memory = said_in_turn(keep_silent(0.5, 3), (0, 3, 4), (0, 0, 1), (0, 0, 1))
    assert (sent, silent) == ([[0, 3, 4], [0, 0, 0], [0, 0, 2]], [False, True, False])
    assert memory.fields == {"position": 7, "usual_norm": 2.0, "silent": 0}
    assert list(memory.tensors) == ["other"]


def test_nobody_is_silent_in_the_first_round_nor_more_often_in_a_row_than_allowed() -> None:
    _, silent, memory = said_in_turn(keep_silent(1e9, 2), *[(1, 0, 0)] * 7)
    assert silent == [False, True, True, False, True, True, False]
    assert memory.fields["silent"] == 0


def test_silence_is_told_of_and_a_word_is_not() -> None:
    stage = keep_silent(2.0, 1)
    spoken, memory = stage.client(update((3, 0, 0), loss=1.0), Memory())
    kept, _ = stage.client(update((3, 0, 0), loss=1.0), memory)
    assert (spoken.metrics, kept.metrics) == ({"loss": 1.0}, {"loss": 1.0, "silent": 1.0})


wholes = st.tuples(*[st.integers(-1000, 1000).map(float)] * 3)


@given(st.lists(wholes, min_size=1, max_size=9), st.floats(0.1, 3), st.integers(1, 4))
def test_what_was_said_and_what_is_kept_back_are_all_that_was_learned(
    learned: list[tuple[float, float, float]], below: float, most: int
) -> None:
    sent, _, memory = said_in_turn(keep_silent(below, most), *learned)
    kept = [
        float(x) for key in sorted(numbers(0, 0, 0)) for x in memory.tensors.get(f"{UNSAID}{key}", np.zeros(1)).ravel()
    ]
    assert list(map(sum, zip(*sent, kept, strict=True))) == list(map(sum, zip(*learned, strict=True)))


def test_what_is_kept_of_a_layer_waits_for_its_turn() -> None:
    stage, spec = keep_silent(10.0, 3), LAYERED
    ones = {key: np.ones(shape, np.float32) for key, shape in spec.shapes.items()}
    first, memory = stage.client(Update(spec, ones, 1, 1), Memory())
    quiet, memory = stage.client(Update(spec, ones, 1, 1), memory)
    part = spec.only(["head.weight"])
    third, memory = stage.client(Update(part, {"head.weight": ones["head.weight"] * 99}, 1, 1), memory)
    assert (first.silent, quiet.silent, third.silent) == (False, True, False)
    assert third.delta["head.weight"].tolist() == [100]
    assert set(memory.tensors) == {f"{UNSAID}{key}" for key in spec.shapes if key != "head.weight"}
