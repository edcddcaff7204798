"""What goes with what, by kind of adapter: a plan is refused in one sentence before it begins, or it runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fedpeft import models
from fedpeft.adapters import AdapterSpec
from fedpeft.codecs import dense
from fedpeft.config.merges import MERGES
from fedpeft.errors import PlanError
from fedpeft.laws import check
from fedpeft.merges import exactness
from fedpeft.merges.gram import update_gram
from fedpeft.models import AdaptedModel
from fedpeft.optimizers import momentum, sgd
from fedpeft.stages import Stage, freeze, identity, keep_local
from fedpeft.strategy import Parts, Strategy, build
from fedpeft.updates import Update
from tests.methods.cells import WORKING, Cell, made, subject
from tests.methods.contract import aggregated, mean_effect, refusal, relative
from tests.methods.oracles import effect
from tests.methods.test_contract import pytestmark as pytestmark

DECODERS = ("llama_adapter", "trainable_tokens")
"""Methods that are tried on a decoder, and not on BERT."""

CELLS = tuple(cell for cell in WORKING if cell.kind == ("llama" if cell.method in DECODERS else "bert"))
CLIENTS = 9
"""As many as every robust rule needs by its defaults."""

RULES = tuple(name for name in MERGES.members if name != "fedit")


@functools.lru_cache(maxsize=1)
def model(cell: Cell) -> AdaptedModel:
    return made(cell, 1)


def on(method: str) -> AdapterSpec:
    return made(Cell(method, "llama" if method in DECODERS else "bert"), 1).spec


def parts(rule: str = "fedavg", stage: Stage | None = None, **more: Any) -> Parts:
    settings = {key: more.pop(key) for key in list(more) if key not in ("controls", "optimizer")}
    method = MERGES.members[rule](**settings).build()
    return Parts(stage or identity(), dense(), method, more.get("optimizer", sgd(1.0)), more.get("controls", 0))


REFUSALS: tuple[tuple[str, Parts, tuple[int, ...], str], ...] = (
    ("loha", parts("flora"), (), "found one for lora"),
    ("hira", parts("flora"), (), "found one for lora"),
    ("lora (DoRA)", parts("flora"), (), "found one for lora"),
    ("lora (DoRA)", parts("fedex"), (), "found one for lora"),
    ("lora (frozen A)", parts("ffa_lora"), (), "found one for lora, dora, hira"),
    ("lora (DoRA)", parts("rolora"), (), "found one for lora, hira"),
    ("lora (DoRA)", parts("fedsa_lora"), (), "found one for lora, hira"),
    ("lora (DoRA)", parts(stage=freeze(["*.g"])), (), "B and g of dora modules"),
    ("lora (DoRA)", parts(stage=freeze(["*.B"])), (), "B and g of dora modules"),
    ("lora (DoRA)", parts(stage=keep_local(["*.g"])), (), "B and g of dora modules"),
    ("road", parts(stage=freeze(["*.sine"])), (), "cosine and sine of road modules"),
    ("road", parts(stage=freeze(["*.cosine"])), (), "cosine and sine of road modules"),
    ("road", parts(stage=keep_local(["*.sine"])), (), "cosine and sine of road modules"),
    ("vera", parts("flexlora", freeze(["*.d"])), (), "this rule makes new ones"),
    ("lokr", parts("flexlora", optimizer=momentum(1.0, 0.9, "sum")), (), "expected sgd with learning_rate 1"),
    *((name, parts(controls=3), (), "training.scaffold") for name in ("road", "p_tuning", "lora (DoRA)")),
    ("vera", parts("flexlora", controls=3), (), "training.scaffold"),
    *((name, parts(), (2,), "federation.ranks.rule=equal") for name in ("ia3", "adalora", "loha", "oft", "road")),
    ("hira", parts(), (5,), "at most 3"),
    ("lora (DoRA)", parts("median"), (1, 2), "expected one rank for all nodes"),
)


@pytest.mark.parametrize(("method", "plan", "ranks", "words"), REFUSALS, ids=lambda item: str(item)[:30])
def test_a_rule_that_cannot_serve_a_kind_is_refused_in_one_sentence(
    method: str, plan: Parts, ranks: tuple[int, ...], words: str
) -> None:
    with pytest.raises(PlanError) as refused:
        check(plan, on(method), ranks=ranks, updates=CLIENTS)
    said = str(refused.value)
    assert words in said
    assert "\n" not in said
    assert said.endswith(".")
    assert said.count(": expected ") == 1


@pytest.mark.parametrize(
    ("method", "plan", "ranks"),
    [
        ("lora (DoRA)", parts(stage=freeze(["*.A"])), ()),
        ("lora (DoRA)", parts("flexlora"), ()),
        ("lora (DoRA)", parts("hetlora"), (1, 3)),
        ("hira", parts("rolora"), ()),
        ("hira", parts("flexlora"), (1, 2, 3)),
        ("loha", parts("fedavg", controls=3), ()),
        ("vera (frozen d)", parts("median"), ()),
    ],
    ids=lambda item: str(item)[:30],
)
def test_the_nearest_plan_that_can_is_taken(method: str, plan: Parts, ranks: tuple[int, ...]) -> None:
    check(plan, on(method), ranks=ranks, updates=CLIENTS)


def sent(plan: Strategy, spec: AdapterSpec, round_: int) -> list[Update]:
    shared, found = plan.stage.shared(spec, round_), []
    for client in range(CLIENTS):
        random = np.random.default_rng((client, round_))
        delta = {key: (0.1 * random.standard_normal(size)).astype(np.float32) for key, size in shared.shapes.items()}
        found.append(Update(shared, delta, client + 1, 1))
    return found


@pytest.mark.parametrize(("cell", "rule"), [(cell, rule) for cell in CELLS for rule in RULES], ids=str)
def test_a_plan_that_the_laws_pass_runs(cell: Cell, rule: str) -> None:
    """Two rounds of every rule on every method give an adapter that the model takes, or the plan is refused."""
    adapted, chosen = model(cell), parts(rule)
    if refusal(PlanError, lambda: check(chosen, adapted.spec, updates=CLIENTS)):
        return
    plan = build(chosen)
    state = plan.init("run", 0, adapted.initial)
    for round_ in (1, 2):
        before, updates = state.adapter.tensors, sent(plan, adapted.spec, round_)
        state, measures = plan.aggregate(state, iter(updates))
        still = [key for key in plan.stage.frozen(adapted.spec, round_) if key in before]
        assert all(np.array_equal(state.adapter.tensors[key], before[key]) for key in still)
        moved = [key for key in before if not np.array_equal(state.adapter.tensors[key], before[key])]
        assert moved, "nothing moved"
        assert np.isfinite(measures["update_norm"])
    models.install(adapted, plan.finalize(state))


@pytest.mark.parametrize("method", ["lora", "lora (DoRA)", "hira"])
def test_with_one_factor_frozen_the_mean_of_the_numbers_is_exact(method: str) -> None:
    trained = subject(Cell(method, "bert"), "*.A")
    found, wanted = effect(trained, aggregated(trained, "ffa_lora")[0].adapter), mean_effect(trained)
    assert max(relative(found[name], wanted[name]) for name in found if np.linalg.norm(wanted[name])) <= 1e-5


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_judge_of_products_sees_every_tensor_that_a_client_moves(cell: Cell) -> None:
    spec = model(cell).spec
    before = drawn(spec.shapes, 0)
    for key in spec.shapes:
        delta = {**dict.fromkeys(spec.shapes, np.float32(0)), key: drawn(spec.shapes, 1)[key]}
        moved = {name: np.broadcast_to(value, spec.shapes[name]) for name, value in delta.items()}
        gram = update_gram(exactness.measured_modules(spec, ()), [before], [moved])
        assert gram[0, 0] > 0, f"a client that moves {key} alone seems not to move"


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
