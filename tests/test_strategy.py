import numpy as np
import pytest

from fedpeft.codecs import dense
from fedpeft.errors import FedPeftError, PlanError
from fedpeft.merges import mean
from fedpeft.stages import chain, freeze, identity, keep_local
from fedpeft.strategy import LAWS, check
from tests.toys import RUN, SPEC, flat, state, strategy, update


def test_aggregate_by_hand() -> None:
    # Deltas (2, 0, 4) and (6, 4, 0) at weights 1 and 3: mean (5, 3, 1); half of it is added to (1, 1, 1).
    before = state(1, 1, 1, progress={"best": 0.5})
    after, measures = strategy(rate=0.5).aggregate(before, iter([update((2, 0, 4), 1), update((6, 4, 0), 3)]))
    assert flat(after.adapter.tensors) == [3.5, 2.5, 1.5]
    assert (after.round, after.run, after.progress) == (1, RUN, {"best": 0.5})
    assert measures["update_norm"] == pytest.approx(np.sqrt(35))
    assert flat(before.adapter.tensors) == [1, 1, 1]
    assert before.round == 0


def test_the_servers_half_of_a_stage_comes_before_the_optimiser() -> None:
    doubled = identity()._replace(server=lambda delta: {key: 2 * value for key, value in delta.items()})
    after, measures = strategy(doubled, rate=0.5).aggregate(state(1, 1, 1), [update((2, 0, 4))])
    assert flat(after.adapter.tensors) == [3, 1, 5]
    assert measures["update_norm"] == pytest.approx(np.sqrt(80))


def test_init_and_finalize_hold_the_adapter_as_it_is() -> None:
    first = strategy().init("r", 3, state(1, 2, 3).adapter)
    assert (first.run, first.round, first.seed, first.progress) == ("r", 0, 3, {})
    assert strategy().finalize(first) is first.adapter


def test_what_is_not_shared_does_not_move() -> None:
    plan = strategy(chain(freeze(["head.*"]), keep_local(["*.A"])))
    spec = plan.stage.shared(SPEC)
    sent, _ = plan.stage.client(update((9, 9, 9)), None)  # type: ignore[arg-type]
    assert sent.spec == spec
    after, _ = plan.aggregate(state(1, 2, 3), [sent])
    assert flat(after.adapter.tensors) == [1, 2, 12]


def test_an_adapter_that_overflows_is_refused_before_it_reaches_the_state() -> None:
    huge = float(np.finfo(np.float32).max)
    with pytest.raises(FedPeftError, match=r"head\.weight: expected finite numbers, found NaN or infinity"):
        strategy().aggregate(state(huge, 0, 0), [update((huge, 0, 0))])


@pytest.mark.parametrize(
    ("frozen", "local", "law", "words"),
    [
        (["layer.A"], ["layer.*"], "a tensor is frozen or local, never both", "found layer.A in both"),
        (["*"], [], "something is trained", "found all frozen"),
        (["head.*"], ["layer.*"], "something is shared", "every one frozen or local"),
        ([], ["*"], "something is shared", "every one frozen or local"),
    ],
)
def test_a_plan_that_breaks_a_law_is_refused(frozen: list[str], local: list[str], law: str, words: str) -> None:
    stage = chain(*([freeze(frozen)] if frozen else []), *([keep_local(local)] if local else []))
    parts = (stage, dense(), mean("examples"), SPEC)
    with pytest.raises(PlanError, match=words):
        check(*parts)
    broken = {found.name: found.broken(*parts) for found in LAWS if found.name == law}
    assert broken[law]


def test_a_sound_plan_passes() -> None:
    check(chain(freeze(["head.*"]), keep_local(["*.A"])), dense(), mean("examples"), SPEC)
