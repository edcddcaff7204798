"""The contract that every adapter method keeps on every architecture: one check after another, a figure each.

A check takes a `Subject` and gives a figure, or raises AssertionError with what is wrong.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from fedpeft import checkpoint, models, requests, wire
from fedpeft.adapters import KINDS as MODULES
from fedpeft.adapters import AdapterState, Tensors, factors, fixed, low_rank_modules, solved
from fedpeft.codecs import dense
from fedpeft.config.averages import SOLVED
from fedpeft.config.merges import MERGES
from fedpeft.errors import AdapterError, ModelError
from fedpeft.merges import exactness, products
from fedpeft.optimizers import sgd
from fedpeft.own_layers import disabled
from fedpeft.stages import identity
from fedpeft.strategy import Parts, Strategy, build
from fedpeft.updates import Memory, ServerState, Update
from fedpeft.wire import Session
from tests.methods import oracles
from tests.methods.cells import HEADS, Cell, Subject, bare, family, fitted, frozen_numbers, kinds_of, logits, made
from tests.methods.oracles import Effect, effect, kind_of

SHARES = (5, 2, 1)
"""How many examples the three clients had."""

ROUNDS_AT_START: Mapping[str, float] = {"frod": 1e-5, "hra": 1e-5}
"""Methods that begin as nothing but for rounding, and by how much logits may move."""

ADDS_TOKENS = ("prompt", "encoded")
"""Kinds that put tokens before the input, so that the model computes something else from the start."""

EXACT_TO, INEXACT_FROM = 1e-5, 1e-4
"""Relative errors of a mean: up to the first it is exact (float32), from the second on it is not."""


def begins_as_nothing(subject: Subject) -> float:
    """The fresh adapter changes no logit."""
    models.install(subject.one, subject.start)
    found, expected = logits(subject.one.model, subject.cell.kind), logits(subject.base, subject.cell.kind)
    if subject.kinds & set(ADDS_TOKENS):
        assert found.shape != expected.shape or not torch.equal(found, expected), "adds tokens that nothing reads"
        return 0.0
    moved = float((found - expected).abs().max())
    assert moved <= ROUNDS_AT_START.get(subject.cell.method, 0.0), f"logits moved by {moved:.1e}"
    return moved


def leaves_the_base(subject: Subject) -> float:
    """No bit of what nobody trains has moved in twelve steps, and something else has."""
    now = frozen_numbers(subject.one)
    assert now.keys() == subject.frozen.keys()
    moved = [name for name, value in subject.frozen.items() if not torch.equal(value, now[name])]
    assert not moved, f"{moved[0]} moved"
    still = [
        key
        for key in subject.start.tensors
        if key not in fixed(subject.one.spec)
        and all(np.array_equal(subject.start.tensors[key], client.tensors[key]) for client in subject.clients)
    ]
    assert not still, f"{still[0]} was not trained"
    return 0.0


def trains_the_head(subject: Subject) -> float:
    """Where the task has labels, the base's last layer is among what is trained."""
    heads = [module for module in subject.one.spec.modules if module.path == "classifier"]
    assert len(heads) == bool(HEADS[subject.cell.kind].labels), f"{len(heads)} heads"
    assert all(module.kind == "full" for module in heads)
    found = {module.kind for module in subject.one.spec.modules}
    assert found | {"full"} == subject.kinds | {"full"}
    return 0.0


def travels(subject: Subject) -> float:
    """Through a packet onto a model drawn under another seed: the same digest, bits and logits."""
    assert subject.one.spec.digest == subject.other.spec.digest
    plan, sent = strategy("fedavg"), subject.clients[0]
    session, state = Session("run", "config", subject.one.spec.digest), ServerState("run", 3, 0, sent)
    packet = requests.fit_request(plan, state, session, 0)
    received = requests.read_request(packet, plan, subject.other.spec, Memory(), lambda: subject.other.initial).adapter
    assert same(received.tensors, sent.tensors)
    models.install(subject.one, sent)
    models.install(subject.other, received)
    assert torch.equal(*(logits(each.model, subject.cell.kind) for each in (subject.one, subject.other)))
    assert same(models.extract(subject.one).tensors, models.extract(subject.other).tensors)
    manifest = {**session.manifest(4), "partition": 0}
    update, rank = updates(plan, subject)[1], packet.manifest["rank"]
    assert isinstance(rank, int)
    reply = wire.fit_reply(plan, update, manifest, rank)
    assert same(wire.read_update(reply, plan, received.spec, manifest).delta, update.delta)
    assert len(reply.body) == 4 * update.spec.parameters
    return float(len(packet.body))


def refuses_strangers(subject: Subject) -> float:
    """An adapter with a tensor that is unknown, missing, misshaped, not finite or not float32 is refused in words."""
    good = dict(subject.start.tensors)
    key = next(iter(good))
    bad: Mapping[str, tuple[Tensors, str]] = {
        "unknown": ({**good, "stranger.weight": np.zeros(3, np.float32)}, "missing or unknown"),
        "missing": ({k: v for k, v in good.items() if k != key}, "missing or unknown"),
        "misshaped": ({**good, key: np.zeros((*good[key].shape, 1), np.float32)}, "expected float32 of shape"),
        "not finite": ({**good, key: np.full_like(good[key], np.nan)}, "expected finite numbers"),
        "float64": ({**good, key: good[key].astype(np.float64)}, "found float64"),
    }
    models.install(subject.other, subject.clients[1])
    before = models.extract(subject.other).tensors
    for name, (tensors, reason) in bad.items():
        said = refusal(AdapterError, lambda given=tensors: _install(subject, given))
        assert reason in said, f"a tensor that is {name}: {said or 'taken'}"
    assert same(models.extract(subject.other).tensors, before), "a refused adapter left something behind"
    return float(len(bad))


def mean_keeps_its_word(subject: Subject) -> float:
    """The mean of the numbers does the mean of what they do, or not, as the kind says; the greatest relative error."""
    errors = mean_errors(subject)
    for name, error in errors.items():
        kind = kind_of(subject, name)
        tier = MODULES[kind].mean
        if tier == "exact":
            assert error <= EXACT_TO, f"{name} is of kind {kind}, called exact, and errs by {error:.1e}"
    for kind in subject.kinds:
        worst = max((error for name, error in errors.items() if kind_of(subject, name) == kind), default=None)
        assert worst is not None, f"nothing is known of kind {kind}"
        if MODULES[kind].mean != "exact":
            assert worst >= INEXACT_FROM, f"kind {kind}, called {MODULES[kind].mean}, errs by no more than {worst:.1e}"
    return max(errors.values())


def products_are_exact(subject: Subject) -> float:
    """Factors multiply out to the change of the weight; stacked they are the mean; solved they come back."""
    modules, worst = low_rank_modules(subject.one.spec), 0.0
    every = [effect(subject, client) for client in subject.clients] if modules else []
    shares = np.array(SHARES) / sum(SHARES)
    for module in modules:
        target = exactness.begin()
        for client, share, known in zip(subject.clients, shares, every, strict=True):
            nothing = {key: np.zeros_like(value) for key, value in client.tensors.items()}
            target = exactness.add(target, (module,), client.tensors, nothing, float(share))
            product = factors(module, client.tensors)
            does = oracles.lifted(subject, module, product.b @ product.a, client.tensors)
            error = relative(does, known[f"{module.path}.weight"])
            assert error <= EXACT_TO, f"factors of {module.path} err by {error:.1e}"
            worst = max(worst, error, _solved(module, client.tensors))
        mean = exactness.means(target, "zero")[module.path]
        average = {
            k: sum(p * c.tensors[k] for p, c in zip(shares, subject.clients, strict=True))
            for k in subject.start.tensors
        }
        does = oracles.lifted(subject, module, mean.b @ mean.a, average)
        wanted = sum(p * known[f"{module.path}.weight"] for p, known in zip(shares, every, strict=True))
        error = relative(does, wanted)
        assert error <= EXACT_TO, f"the exact mean of {module.path} errs by {error:.1e}"
        worst = max(worst, error)
    return worst


def truncation_keeps_its_word(subject: Subject) -> float:
    """By flexlora the merge errs by the tail, no more, and no more than the mean of the numbers; its tail."""
    solvable = subject.kinds & set(SOLVED)
    if not solvable:
        return 0.0
    after, measures = aggregated(subject, "flexlora")
    error, tail = measures["merge_error"], measures["tail"]
    plain = aggregated(subject, "fedavg")[1]["merge_error"]
    assert error <= plain * (1 + EXACT_TO), f"errs by {error:.3g}, the mean of the numbers by {plain:.3g}"
    low_rank_w2 = any("w2_a" in dict(module.shapes) for module in subject.one.spec.modules)
    assert error >= tail - EXACT_TO if low_rank_w2 else abs(error - tail) <= EXACT_TO, f"{error:.6g} and {tail:.6g}"
    if solvable & {"lora", "adalora", "lokr"}:
        weighed = _weight_error(subject, after.adapter)
        assert abs(weighed - error) <= 1e-4, f"the weights err by {weighed:.3g}, the journal says {error:.3g}"
    return tail


def stays_orthogonal(subject: Subject) -> float:
    """The mean of what makes rotations makes a rotation; how far R Rᵀ is from the identity, over its size."""
    if not subject.kinds & {"oft", "boft", "hra"}:
        return 0.0
    state, _ = aggregated(subject, "fedavg")
    own = max(_skewness(subject, client) for client in subject.clients)
    found = _skewness(subject, state.adapter)
    assert found <= max(1e-5, 1.05 * own), f"R Rᵀ is {found:.1e} from the identity, of clients {own:.1e}"
    return found


def is_saved(subject: Subject) -> float:
    """What an export holds gives the same logits: by stock peft where there is a layout for it, else by our own."""
    state = subject.clients[0]
    models.install(subject.one, state)
    expected = logits(subject.one.model, subject.cell.kind)
    with tempfile.TemporaryDirectory() as folder:
        models.save_adapter(subject.one, state, Path(folder))
        found = logits(READERS[layout(subject.cell)](subject, Path(folder)), subject.cell.kind)
    moved = float((found - expected).abs().max())
    assert moved <= 1e-6 * max(1.0, float(expected.abs().max())), f"logits moved by {moved:.1e}"
    return moved


def is_merged(subject: Subject) -> float:
    """A merged export gives the same logits as a stock model, or is refused in a sentence."""
    state = subject.clients[0]
    with tempfile.TemporaryDirectory() as folder:
        said = refusal(ModelError, lambda: models.save_merged(subject.one, state, Path(folder)))
        assert bool(said) != mergeable(subject.cell), said or "merged"
        if said:
            assert "export the adapter instead" in said
            return 0.0
        kind: Any = getattr(transformers, HEADS[subject.cell.kind].auto)
        again = kind.from_pretrained(folder)
    models.install(subject.one, state)
    expected = logits(subject.one.model, subject.cell.kind)
    moved = float((logits(again, subject.cell.kind) - expected).abs().max())
    assert moved <= 1e-4 * max(1.0, float(expected.abs().max())), f"logits moved by {moved:.1e}"
    return moved


def resumes(subject: Subject) -> float:
    """A checkpoint holds every bit, and two steps and two on another model are two and two on the first."""
    state = ServerState("run", 3, 0, subject.clients[1])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), state)
        again = checkpoint.load(Path(folder))
    assert again.adapter.spec == state.adapter.spec
    assert same(again.adapter.tensors, state.adapter.tensors)
    halfway = fitted(subject.one, subject.cell.kind, subject.start, 5, steps=2)
    whole = fitted(subject.one, subject.cell.kind, halfway, 6, steps=2)
    fresh = made(subject.cell, 1)
    assert same(fitted(fresh, subject.cell.kind, halfway, 6, steps=2).tensors, whole.tensors)
    return 0.0


def sends_what_is_trained(subject: Subject) -> float:
    """As many numbers travel as are trained or, for an encoder, as it makes; how many."""
    spec = subject.one.spec
    seen: dict[int, int] = {}
    for key, parameter in models.trained(subject.one).items():
        module = next(m for m in spec.modules if key.startswith(f"{m.path}."))
        if module.kind != "encoded":
            seen[id(parameter)] = parameter.numel()
    encoded = sum(int(np.prod(shape)) for m in spec.modules if m.kind == "encoded" for _, shape in m.shapes)
    assert spec.parameters == sum(seen.values()) + encoded
    wanted = {id(p) for p in subject.one.model.parameters() if p.requires_grad}
    bound = {id(p) for binding in subject.one.bindings.values() for p in binding.parameters}
    assert wanted == bound, "something is trained that no tensor stands for"
    return float(spec.parameters)


def is_switched_off(subject: Subject) -> float:
    """Disabled, a trained model gives the base's logits, to the bit; a head that is trained in place stays."""
    state = subject.clients[0]
    models.install(subject.one, state)
    before = logits(subject.one.model, subject.cell.kind)
    with disabled(subject.one.model):
        found = logits(subject.one.model, subject.cell.kind)
    assert torch.equal(logits(subject.one.model, subject.cell.kind), before), "switching off and on moved something"
    base = bare(subject.cell.kind)
    if head_in_place(subject):
        with torch.no_grad():
            for name in ("weight", "bias"):
                base.get_parameter(f"classifier.{name}").copy_(torch.from_numpy(state.tensors[f"classifier.{name}"]))
    assert torch.equal(found, logits(base, subject.cell.kind))
    return 0.0


CHECKS: Mapping[str, Callable[[Subject], float]] = {
    check.__name__: check
    for check in (
        begins_as_nothing,
        leaves_the_base,
        trains_the_head,
        travels,
        refuses_strangers,
        mean_keeps_its_word,
        products_are_exact,
        truncation_keeps_its_word,
        stays_orthogonal,
        is_saved,
        is_merged,
        resumes,
        sends_what_is_trained,
        is_switched_off,
    )
}
"""The contract."""


def refusal(kind: type[Exception], what: Callable[[], None]) -> str:
    """The sentence with which something is refused; empty where it is not."""
    try:
        what()
    except kind as error:
        said = str(error)
    else:
        return ""
    assert "\n" not in said
    assert said.endswith(".")
    return said


def _install(subject: Subject, tensors: Tensors) -> None:
    models.install(subject.other, AdapterState(subject.start.spec, tensors))


def head_in_place(subject: Subject) -> bool:
    """Whether the task's last layer is trained without a copy that the base keeps."""
    return bool(HEADS[subject.cell.kind].labels) and (
        not subject.one.family.peft or bool(subject.kinds & set(ADDS_TOKENS))
    )


def mergeable(cell: Cell) -> bool:
    """Whether the base's weights can take the method up."""
    if kinds_of(cell) & {"prompt", "encoded", "llama_adapter", "bottleneck"}:
        return False
    return (cell.method, cell.kind) != ("ssf", "t5")


def layout(cell: Cell) -> str:
    """How an export is laid out: for stock peft, as files of our own (beside peft's or not), or as a whole model."""
    chosen = family(cell)
    if chosen.own:
        return "peft and own files" if chosen.peft else "own files"
    return "peft" if chosen.peft else "whole model"


def _by_peft(subject: Subject, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(bare(subject.cell.kind), str(folder))


def _by_us(subject: Subject, folder: Path) -> Any:
    return models.load_adapter(bare(subject.cell.kind), folder)


def _whole(subject: Subject, folder: Path) -> Any:
    return getattr(transformers, HEADS[subject.cell.kind].auto).from_pretrained(str(folder))


READERS: Mapping[str, Callable[[Subject, Path], Any]] = {
    "peft": _by_peft,
    "peft and own files": _by_us,
    "own files": _by_us,
    "whole model": _whole,
}
"""How each layout is read."""


def strategy(rule: str) -> Strategy:
    """A rule with a server that takes what it says."""
    return build(Parts(identity(), dense(), MERGES.members[rule]().build(), sgd(1.0)))


def updates(plan: Strategy, subject: Subject) -> list[Update]:
    """What the three clients send."""
    shared, start = plan.stage.shared(subject.one.spec, 1), subject.start.tensors
    return [
        Update(shared, {key: client.tensors[key] - start[key] for key in shared.shapes}, examples, 1)
        for client, examples in zip(subject.clients, SHARES, strict=True)
    ]


def aggregated(subject: Subject, rule: str) -> tuple[ServerState, Mapping[str, Any]]:
    """The server's state after a round of the three clients, and its figures."""
    plan = strategy(rule)
    return plan.aggregate(plan.init("run", 0, subject.start), iter(updates(plan, subject)))


def mean_errors(subject: Subject) -> dict[str, float]:
    """By name, how far what the mean of the numbers does is from the mean of what they do, relative to that."""
    found = effect(subject, aggregated(subject, "fedavg")[0].adapter)
    wanted = mean_effect(subject)
    return {name: relative(value, wanted[name]) for name, value in found.items() if np.linalg.norm(wanted[name])}


def mean_effect(subject: Subject) -> Effect:
    """The weighted mean of what the three clients' adapters do."""
    every = [effect(subject, client) for client in subject.clients]
    total = sum(SHARES)
    return {n: sum(s / total * one[n] for s, one in zip(SHARES, every, strict=True)) for n in every[0]}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def same(one: Tensors, other: Tensors) -> bool:
    """Whether the same tensors have the same bits."""
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)


def _solved(module: Any, tensors: Tensors) -> float:
    """How far a module's product is from that of the tensors that are solved from it, as they travel."""
    if MODULES[module.kind].solve is None:
        return 0.0
    wanted = factors(module, tensors)
    named = solved(module, tensors, products.truncate(wanted, module.rank).factors)
    found = factors(module, {**tensors, **{f"{module.path}.{name}": value for name, value in named.items()}})
    error = relative(found.b @ found.a, wanted.b @ wanted.a)
    assert error <= 1e-9, f"what is solved from the product of {module.path} errs by {error:.1e}"
    return error


def _weight_error(subject: Subject, state: AdapterState) -> float:
    """The relative error of the changes of all weights that have factors, together."""
    found, wanted = effect(subject, state), mean_effect(subject)
    names = [f"{module.path}.weight" for module in low_rank_modules(subject.one.spec)]
    return relative(*(np.concatenate([each[name].ravel() for name in names]) for each in (found, wanted)))


def _skewness(subject: Subject, state: AdapterState) -> float:
    """How far (W0 R)(W0 R)ᵀ is from W0 W0ᵀ, or (R W0)ᵀ(R W0) from W0ᵀ W0, scaled: 0 for an orthogonal R."""
    found, worst = effect(subject, state), 0.0
    base = oracles.weights(bare(subject.cell.kind))
    for module in subject.one.spec.modules:
        if module.kind not in ("oft", "boft", "hra"):
            continue
        name = f"{module.path}.weight"
        after, before = base[name] + found[name], base[name]
        if "scale" in dict(module.shapes):
            after = after / np.asarray(state.tensors[f"{module.path}.scale"], np.float64).reshape(-1, 1)
        grams = [(after @ after.T, before @ before.T), (after.T @ after, before.T @ before)]
        worst = max(worst, min(relative(one, other) for one, other in grams))
    return worst


if __name__ == "__main__":
    from tests.methods.table import write

    write()
