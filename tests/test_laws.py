"""What may go with what: each law by a plan that breaks it and by the nearest that keeps it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import ranks
from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, at_rank, greatest_rank
from fedpeft.codecs import bf16, coded, low_rank, steps, top_k
from fedpeft.config.federation import CHANNELS
from fedpeft.config.merges import MERGES
from fedpeft.config.privacy import PRIVACY
from fedpeft.errors import PlanError
from fedpeft.laws import LAWS, check
from fedpeft.merges import Pruning, rule
from fedpeft.optimizers import momentum, sgd
from fedpeft.privacy import ClientNoise, Population
from fedpeft.stages import Stage, alternate, chain, freeze, identity, keep_local, keep_silent, take_turns
from fedpeft.strategy import Parts, build
from fedpeft.updates import Update
from tests.toys import SPEC, WIDE, parts

IA3 = AdapterSpec("base", "ia3", (ModuleSpec("layer", "ia3", 0, 1.0, (("l", (3,)),)),))
SQUARE = AdapterSpec(
    "base",
    "lora_sb",
    (
        ModuleSpec("head", "full", 0, 1.0, (("weight", (1,)),)),
        ModuleSpec("layer", "lora_sb", 2, 1.0, (("A", (2, 3)), ("B", (3, 2)), ("R", (2, 2)))),
    ),
)
DORA = AdapterSpec("base", "lora", (ModuleSpec("layer", "dora", 2, 1.0, (("A", (2, 3)), ("B", (3, 2)), ("g", (3,)))),))
LAYERED, TWO_KINDS = (
    AdapterSpec(
        "base",
        "lora",
        tuple(
            ModuleSpec(f"layer.{number}", kind, 1, 1.0, (("A", (1, 2)), ("B", (2, 1)), *more))
            for number, (kind, more) in enumerate([("lora", ()), ("lora", ()), last])
        ),
    )
    for last in (("lora", ()), ("dora", (("g", (2,)),)))
)
FREE = rule("examples", gauge="free")
CHANNEL = CHANNELS.members["secure"]().build()


def made(stage: Stage | None = None, *, controls: int = 0, rate: float = 1.0, **method: Any) -> Parts:
    return replace(parts(stage, rate, **method), controls=controls)


def preset(name: str, stage: Stage | None = None, *, controls: int = 0, **settings: Any) -> Parts:
    method = MERGES.members[name](**settings).build()
    return replace(parts(stage), method=method, controls=controls)


BROKEN: list[tuple[Parts, dict[str, Any], str, str]] = [
    (preset("flora"), {"spec": IA3}, "the rule is for this kind of adapter", "found one for lora"),
    (preset("fed_sb"), {"spec": WIDE}, "the rule is for this kind of adapter", "set adapter.family=lora_sb"),
    (preset("ffa_lora"), {"spec": SQUARE}, "the rule is for this kind of adapter", "for adapters of family lora_sb"),
    (
        made(chain(freeze(["layer.A"]), keep_local(["layer.*"]))),
        {},
        "a tensor is frozen or local, never both",
        "found layer.A in both",
    ),
    (
        made(chain(alternate(["*.A"], ["*.B"]), keep_local(["layer.B"]))),
        {},
        "a tensor is frozen or local, never both",
        "found layer.B in both",
    ),
    (preset("fedsa_lora", freeze(["*.B"])), {}, "a tensor is frozen or local, never both", "found layer.B in both"),
    *(
        (one, {"spec": LAYERED}, "each group of layers that take turns has one", words)
        for one, words in (
            (made(take_turns(4)), "than the 3 layers .* found 4; lower it to 3"),
            (preset("rolora", take_turns(2)), "expected an odd number .* set turns=3"),
        )
    ),
    (
        made(take_turns(2)),
        {"spec": LAYERED, "ranks": (0, 2)},
        "layers take turns among nodes of one rank",
        "found ranks 2; choose equal ranks",
    ),
    (
        preset("hetlora", take_turns(2)),
        {"spec": LAYERED},
        "layers take turns among nodes of one rank",
        "found a rule by which nodes lower it",
    ),
    (made(take_turns(2)), {}, "each group of layers that take turns has one", "than the 0 layers"),
    (
        preset("flexlora", take_turns(2)),
        {"spec": LAYERED},
        "a rule that makes new factors needs both of them",
        "frozen",
    ),
    *(
        (
            one,
            {"updates": 9},
            "a site may say nothing where a plain mean sees each update",
            f"aggregation.stages.silent_below: .*found {words}",
        )
        for one, words in (
            (preset("median", keep_silent(0.5, 3)), "a rule that makes more of updates than their mean"),
            (preset("flexlora", keep_silent(0.5, 3)), "a rule that makes more of updates than their mean"),
            (made(keep_silent(0.5, 3), controls=3), "control variates"),
            (replace(made(keep_silent(0.5, 3), merge=rule("uniform")), channel=CHANNEL), "secure sums"),
            (
                replace(
                    made(keep_silent(0.5, 3), merge=rule("uniform")),
                    mechanism=PRIVACY.members["local"](noise_multiplier=1.0).build(Population(100, 20)),
                ),
                "a private run",
            ),
        )
    ),
    (made(freeze(["*"])), {}, "something is trained", "found all frozen"),
    (made(alternate(["head.*"], ["*"])), {}, "something is trained", "found all frozen"),
    (preset("ffa_lora", freeze(["head.*", "*.B"])), {}, "something is trained", "found all frozen"),
    (made(chain(freeze(["head.*"]), keep_local(["layer.*"]))), {}, "something is shared", "every one frozen or local"),
    (made(keep_local(["*"])), {}, "something is shared", "every one frozen or local"),
    (preset("fedsa_lora", freeze(["head.*", "*.A"])), {}, "something is shared", "every one frozen or local"),
    (
        made(chain(alternate(["*.A", "head.*"], ["*.B"]), keep_local(["layer.B"]))),
        {},
        "a tensor is frozen or local, never both",
        "layer.B",
    ),
    *(
        (made(stage), {"spec": DORA}, "what moves together is trained and shared together", f"found layer.{name} ")
        for name in ("B", "g")
        for stage in (freeze([f"*.{name}"]), keep_local([f"*.{name}"]))
    ),
    (
        preset("krum"),
        {"spec": SQUARE, "updates": 9},
        "a rule that makes new factors is for modules that take them",
        "found lora_sb; choose fedavg, or judge factors",
    ),
    *(
        (preset(name, stage), {}, "a rule that makes new factors needs both of them", "found layer.A frozen or local")
        for name in ("flora", "fedex", "flexlora", "lora_fair", "krum")
        for stage in (freeze(["*.A"]), keep_local(["*.A"]))
    ),
    *(
        (
            replace(preset(name), optimizer=optimizer),
            {},
            "a rule that makes new factors goes with no optimiser that remembers",
            "aggregation.optimizer: expected sgd with learning_rate 1",
        )
        for name in ("flora", "flexlora")
        for optimizer in (sgd(0.5), momentum(1.0, 0.9, "sum"))
    ),
    (
        made(merge=FREE, controls=3),
        {},
        "control variates go with a rule that keeps coordinates",
        "training.scaffold: expected a rule that keeps",
    ),
    (
        made(controls=3),
        {"spec": WIDE, "ranks": (1, 4)},
        "control variates go with a rule that keeps coordinates",
        "found ranks 1, 4",
    ),
    (
        preset("hetlora", controls=3),
        {"spec": WIDE},
        "control variates go with a rule that keeps coordinates",
        "training.scaffold: expected",
    ),
    (
        preset("median"),
        {"spec": WIDE, "ranks": (2, 4)},
        "a rule that compares numbers goes with equal ranks",
        "found ranks 2, 4",
    ),
    (
        preset("krum", space="factors"),
        {"spec": WIDE, "ranks": (2, 4), "updates": 9},
        "a rule that compares numbers goes with equal ranks",
        r'judge products \(space = "products"\)',
    ),
    (
        preset("median"),
        {"spec": WIDE, "ranks": ranks.declared(4).possible},
        "a rule that compares numbers goes with equal ranks",
        "choose equal ranks",
    ),
    (made(), {"spec": WIDE, "ranks": (2, 5, 9)}, "no node's rank is above the server's", "of at most 4, .* found 9"),
    (made(), {"spec": IA3, "ranks": (2,)}, "no node's rank is above the server's", "expected equal ranks, .* found 2"),
    *(
        (one, {"spec": WIDE, "carries": True}, "late updates go with a plain mean", rf"found carry with {words}")
        for one, words in (
            (preset("fedex"), "a rule that makes more of updates"),
            (preset("hetlora"), "a rule that makes more of updates"),
            (made(alternate(["*.A"], ["*.B"])), "a rule by which tensors take turns"),
            (made(controls=3), "control variates"),
        )
    ),
    (
        preset("krum"),
        {"updates": 4},
        "a robust rule sees enough updates to fire",
        "federation.quorum: expected at least 5 updates in every round, .* found 4",
    ),
    (preset("trimmed_mean", trimmed=2), {"updates": 4}, "a robust rule sees enough updates to fire", "at least 5"),
    *(
        (
            replace(one, mechanism=PRIVACY.members["central"](noise_multiplier=1.0).build(Population(9, 3))),
            more,
            "central privacy goes with plain means of equal weights",
            words,
        )
        for one, more, words in (
            (preset("flora"), {}, "found a rule that makes more of updates than their mean; choose ffa_lora"),
            (preset("krum"), {"updates": 9}, "found a rule that makes more of updates than their mean"),
            (preset("hetlora"), {"spec": WIDE}, "found a rule that makes more of updates than their mean"),
            (preset("ffa_lora"), {}, 'found a rule that weighs clients .*; set weights = "uniform"'),
            (preset("fedavg", weights="uniform", controls=3), {}, "found control variates"),
            (preset("fedavg", weights="uniform"), {"carries": True}, "found federation.late = carry"),
            (preset("fedavg", weights="uniform"), {"spare": True}, "found federation.spare above 0"),
        )
    ),
    *(
        (replace(one, channel=CHANNEL), more, "a secure sum goes with plain means of equal weights", words)
        for one, more, words in (
            (preset("fedex", weights="uniform"), {}, "found a rule that makes more of updates than their mean"),
            (preset("median"), {"updates": 9}, "found a rule that makes more of updates than their mean"),
            (preset("ffa_lora"), {}, "found a rule that weighs clients"),
            (preset("fedavg", weights="uniform", controls=3), {}, "found control variates"),
            (preset("flexlora"), {}, "found a rule that weighs clients"),
            (preset("flexlora", weights="uniform"), {"spec": DORA}, "found products of dora"),
            (
                preset("flexlora", weights="uniform", sketch=3),
                {"spec": WIDE},
                "found a sketch of 3 columns, which cannot hold an adapter of rank 4; set .*sketch=8 or more",
            ),
        )
    ),
    (
        replace(preset("ffa_lora", weights="uniform"), channel=replace(CHANNEL, noise=ClientNoise(1.0, 5))),
        {"spec": WIDE, "ranks": (2, 4)},
        "a secure sum goes with plain means of equal weights",
        "found nodes of unlike rank",
    ),
    (
        replace(preset("flexlora", weights="uniform"), channel=replace(CHANNEL, noise=ClientNoise(1.0, 5))),
        {},
        "a secure sum goes with plain means of equal weights",
        "found noise that clients add, which two sums of one update would need twice",
    ),
    (
        replace(preset("fedavg", weights="uniform"), channel=CHANNEL, codec=coded(rounding=bf16())),
        {},
        "a secure sum goes with a codec whose sums are sums",
        "expected dense, because under masks",
    ),
    *(
        (
            replace(made(), codec=coded(reduction, rounding, remembers=True)),
            {},
            "error feedback goes with a codec that loses less than it is given",
            "found one that may lose more; choose finer steps",
        )
        for reduction, rounding in (
            (None, steps(3, 64, "stochastic")),
            (None, steps(4, 64, "nearest")),
            (top_k(0.5), steps(15, 256, "stochastic")),
            (low_rank(1), steps(255, 64, "stochastic")),
        )
    ),
    *(
        (
            replace(preset(name), codec=coded(top_k(0.5), remembers=True)),
            {},
            "error feedback goes with a rule that keeps coordinates",
            "found error_feedback; drop it, or choose fedavg",
        )
        for name in ("flora", "flexlora")
    ),
    *(
        (
            replace(one, downlink=coded(top_k(0.5), rounding, remembers=remembers)),
            more,
            "what goes down coded goes with means, equal ranks and codecs that contract",
            words,
        )
        for one, rounding, remembers, more, words in (
            (
                preset("fedex"),
                None,
                False,
                {},
                "found a rule that makes more of updates than their mean; choose fedavg",
            ),
            (replace(preset("fedavg", weights="uniform"), channel=CHANNEL), None, False, {}, "found secure sums"),
            (replace(made(), method=replace(made().method, pruning=Pruning(0.5, 0.1))), None, False, {}, "lower their"),
            (made(), None, False, {"spec": WIDE, "ranks": (2, 4)}, "found nodes of unlike rank; choose equal ranks"),
            (made(take_turns(3)), None, False, {"spec": LAYERED}, "found layers that take turns"),
            (made(), None, True, {}, "found error_feedback"),
            (made(), steps(4, 64, "nearest"), False, {}, "found one that may lose more"),
        )
    ),
    (
        replace(
            preset("rolora", weights="uniform"),
            mechanism=PRIVACY.members["central"](noise_multiplier=1.0, bands=3).build(Population(9, 3)),
        ),
        {},
        "noise that is taken back goes with tensors that are always trained",
        "found a rule by which tensors take turns; set bands=1",
    ),
    (
        replace(made(controls=3), mechanism=PRIVACY.members["local"](noise_multiplier=1.0).build(Population(9, 3))),
        {},
        "nothing travels beside an update that carries its own noise",
        "set training.scaffold=false",
    ),
    (
        replace(
            preset("fedavg", weights="tokens"),
            mechanism=PRIVACY.members["example"](noise_multiplier=1.0, rows=50).build(Population(9, 3)),
        ),
        {},
        "nothing travels beside an update that carries its own noise",
        'found tokens; set weights = "examples"',
    ),
    (
        replace(
            preset("hetlora"),
            mechanism=PRIVACY.members["example"](noise_multiplier=1.0, rows=50).build(Population(9, 3)),
        ),
        {"spec": WIDE},
        "nothing travels beside an update that carries its own noise",
        "set aggregation.merge.hetlora.keep=1",
    ),
]


@pytest.mark.parametrize(("plan", "more", "law", "words"), BROKEN)
def test_a_plan_that_breaks_a_law_is_refused(plan: Parts, more: dict[str, Any], law: str, words: str) -> None:
    settings = {"spec": SPEC, "updates": 1, **more}
    with pytest.raises(PlanError, match=words) as caught:
        check(plan, **settings)
    assert re.fullmatch(r"[a-z]+\.[a-z_.]+: expected .*, found .*; .*\.", str(caught.value))
    assert law in {one.name for one in LAWS}


def test_every_law_has_a_plan_that_breaks_it() -> None:
    assert {law for _, _, law, _ in BROKEN} == {law.name for law in LAWS}


@pytest.mark.parametrize(("plan", "more", "law", "words"), BROKEN)
def test_the_law_that_a_plan_breaks_is_the_one_that_says_so(
    plan: Parts, more: dict[str, Any], law: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft.laws.LAWS", tuple(one for one in LAWS if one.name == law))
    with pytest.raises(PlanError, match=words):
        check(plan, **{"spec": SPEC, "updates": 1, **more})


@pytest.mark.parametrize(
    ("plan", "more"),
    [
        (made(chain(freeze(["head.*"]), keep_local(["*.A"]))), {}),
        (made(alternate(["*.A"], ["*.B"])), {}),
        (made(merge=FREE), {}),
        *((made(take_turns(groups)), {"spec": spec}) for groups in (2, 3) for spec in (LAYERED, TWO_KINDS)),
        (preset("rolora", chain(take_turns(3), keep_silent(0.5, 3))), {"spec": LAYERED}),
        (made(keep_silent(0.5, 3)), {"spec": WIDE, "ranks": (1, 4)}),
        (made(controls=3), {"spec": WIDE, "ranks": (2,)}),
        (made(controls=3), {"spec": WIDE, "ranks": (0,)}),
        (replace(preset("fedex"), optimizer=momentum(1.0, 0.9, "sum")), {}),
        (preset("flora", freeze(["head.*"])), {}),
        (preset("fedsa_lora", keep_local(["head.*"])), {}),
        (preset("ffa_lora"), {"spec": WIDE, "ranks": (1, 2, 4)}),
        (preset("fed_sb"), {"spec": SQUARE, "ranks": (1, 2)}),
        (preset("median"), {"spec": WIDE, "ranks": (0, 4, 4)}),
        (preset("krum"), {"spec": WIDE, "ranks": (2, 4), "updates": 5}),
        (preset("trimmed_mean"), {"updates": 3}),
        (made(), {"spec": WIDE, "ranks": (4, 0)}),
        (made(), {"spec": IA3}),
        (preset("median"), {"spec": IA3, "ranks": (0,)}),
        *(
            (replace(preset(name), codec=coded(top_k(0.5), rounding, remembers=True)), {})
            for name in ("fedavg", "fedex", "rolora", "hetlora")
            for rounding in (None, steps(15, 64, "stochastic"), steps(3, 64, "nearest"))
        ),
        (replace(preset("flora"), codec=coded(top_k(0.5), steps(3, 64, "stochastic"))), {}),
        (replace(preset("fedavg", weights="uniform"), channel=CHANNEL), {}),
        (replace(preset("flexlora", weights="uniform"), channel=CHANNEL), {"spec": WIDE, "ranks": (1, 4)}),
        *((replace(preset(name), downlink=coded(top_k(0.5))), {}) for name in ("fedavg", "ffa_lora", "rolora")),
        (replace(made(controls=3), downlink=coded(top_k(0.5))), {"spec": WIDE, "ranks": (0, 4)}),
    ],
)
def test_a_sound_plan_passes(plan: Parts, more: dict[str, Any]) -> None:
    check(plan, **{"spec": SPEC, **more})


@pytest.mark.parametrize("name", sorted(MERGES.members))
def test_every_preset_passes_with_its_defaults(name: str) -> None:
    spec = SQUARE if preset(name).method.kinds == ("lora_sb",) else WIDE
    check(preset(name), spec, (), 7)


def goes(stage: Stage, name: str) -> bool:
    method = preset(name, weights="uniform").method
    kind = (*method.kinds, "lora")[0]
    square = (("R", (1, 1)),) if kind == "lora_sb" else ()
    layers = (ModuleSpec(f"layer.{n}", kind, 1, 1.0, (("A", (1, 2)), ("B", (2, 1)), *square)) for n in range(3))
    try:
        check(preset(name, stage, weights="uniform"), AdapterSpec("base", kind, tuple(layers)), updates=20)
    except PlanError:
        return False
    return True


def test_rules_that_send_less_by_turns_or_by_silence_are_those_that_are_said_to() -> None:
    page = (Path(__file__).parents[1] / "docs/sending-less.md").read_text(encoding="utf-8")
    for setting, stage in (("turns", take_turns(3)), ("silent_below", keep_silent(0.5, 3))):
        row = next(line for line in page.splitlines() if line.startswith(f"| `aggregation.stages.{setting}"))
        told = set(re.findall("`([a-z_]+)`", row.split("|")[3]))
        assert told == {name for name in MERGES.members if goes(stage, name)}


@pytest.mark.parametrize("default", [1, 2, 4])
def test_nodes_may_declare_their_ranks_under_a_server_of_any(default: int) -> None:
    check(made(identity()), at_rank(WIDE, default), ranks.declared(default).possible)


@pytest.mark.parametrize("given", [(0,), (4,), (2,), (1, 2, 4)])
@pytest.mark.parametrize("name", sorted(MERGES.members))
def test_a_plan_that_passes_can_be_carried_out(name: str, given: tuple[int, ...]) -> None:
    """Seven updates at the ranks that nodes may have, drawn at random, over two rounds."""
    plan = preset(name)
    spec = SQUARE if plan.method.kinds == ("lora_sb",) else WIDE
    try:
        check(plan, spec, given, 7)
    except PlanError:
        assert len(given) > 1 or given[0] not in (0, greatest_rank(spec))
        return
    built, random = build(plan), np.random.default_rng(0)
    tensors = {key: random.standard_normal(shape).astype(np.float32) for key, shape in spec.shapes.items()}
    held = built.init("r", 0, AdapterState(spec, tensors))
    for round_ in (1, 2):
        updates = []
        for at in range(7):
            own = built.stage.shared(at_rank(spec, given[at % len(given)]), round_)
            delta = {key: random.standard_normal(shape).astype(np.float32) for key, shape in own.shapes.items()}
            updates.append(Update(own, delta, at + 1, 1))
        held, figures = built.aggregate(held, updates)
        spec.require(held.adapter.tensors, "adapter")
        assert held.round == round_
        assert math.isfinite(figures["update_norm"])  # type: ignore[arg-type]
