import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import norm
from fedpeft.errors import AdapterError
from fedpeft.stages import chain, clip, freeze, identity, keep_local
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
def test_frozen_and_local_tensors_do_not_travel(make: object) -> None:
    stage = make(["layer.A"])  # type: ignore[operator]
    memory = Memory({}, {"position": 3})
    after, kept = stage.client(update((1, 2, 3)), memory)
    assert sorted(after.delta) == ["head.weight", "layer.B"]
    assert after.spec == stage.shared(SPEC) == SPEC.without(["layer.A"])
    assert kept == memory
    assert (stage.frozen(SPEC) or stage.local(SPEC)) == ("layer.A",)
    assert () in (stage.frozen(SPEC), stage.local(SPEC))


def test_freeze_is_not_keep_local() -> None:
    assert freeze(["*.A"]).frozen(SPEC) == keep_local(["*.A"]).local(SPEC) == ("layer.A",)
    assert freeze(["*.A"]).local(SPEC) == keep_local(["*.A"]).frozen(SPEC) == ()


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


def test_chain_clips_only_what_is_left_to_share() -> None:
    stage = chain(freeze(["head.*"]), keep_local(["*.A"]), clip(3.0))
    after, _ = stage.client(update((100, 100, 2)), Memory())
    assert (list(after.delta), flat(after.delta)) == (["layer.B"], [2.0])
    assert stage.shared(SPEC) == after.spec
    assert (stage.frozen(SPEC), stage.local(SPEC)) == (("head.weight",), ("layer.A",))


def test_an_empty_chain_changes_nothing() -> None:
    stage, one = chain(), update((1, 2, 3))
    assert stage.client(one, Memory()) == (one, Memory())
    assert stage.shared(SPEC) == SPEC
    assert stage.server(one.delta) is one.delta


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(AdapterError, match="pattern 'nothing'"):
        freeze(["nothing"]).frozen(SPEC)
