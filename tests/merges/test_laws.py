"""The laws that hold for every rule, over every preset."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters import AdapterState, Factors, Tensors
from fedpeft.config.merges import MERGES
from fedpeft.merges import Contribution, exactness, products
from fedpeft.randomness import rng
from tests.merges import harness
from tests.merges.harness import (
    EXACT,
    HEAD,
    PRESETS,
    REFERENCES,
    Dense,
    Layer,
    Round,
    assert_near,
    bits,
    corner,
    cut,
    does,
    factor_mean,
    federation,
    low_rank,
    method_of,
    nearest,
    product,
    round_of,
    rounds_of,
    spec_of,
)

every_preset = pytest.mark.parametrize("name", PRESETS)
exact_presets = pytest.mark.parametrize("name", EXACT)
drifting_presets = pytest.mark.parametrize("name", ["flora", "fedex"])
few = settings(max_examples=8)

FACTOR_MEANS = ("fedavg", "fedit", "zero_pad", "ffa_lora", "rolora", "fedsa_lora", "fed_sb")
"""Presets whose next factors are the mean of the factors, weighed alike."""

AVERAGES = tuple(name for name in PRESETS if REFERENCES[name].used is harness.everyone and not REFERENCES[name].combine)
"""Presets in which every client has a say by its weight."""

HEADS = dict.fromkeys(HEAD, 1.0)
LAYERS = [Layer(6, 5, 3), Layer(3, 4, 3), Layer(5, 2, 2)]
MIXED = (3, 1, 2)


def tensors_after(found: Round) -> Tensors:
    return found.aggregated()[0].adapter.tensors


def heads_after(found: Round) -> Dense:
    return {key: tensors_after(found)[key].astype(np.float64) for key in HEAD}


def figure_of(found: Round, name: str) -> float:
    figure = found.aggregated()[1][name]
    assert isinstance(figure, float)
    return figure


def equal_rounds(name: str, clients: int) -> Round:
    """A round of clients at the server's rank, after one that the server has done."""
    count = max(clients, method_of(name).merge.least)
    return round_of(name, LAYERS, [3] * count, seed=clients, done=2)


# Every preset against dense arithmetic.


def test_every_preset_has_a_dense_reference() -> None:
    assert REFERENCES.keys() == MERGES.members.keys()


@every_preset
@settings(max_examples=15)
@given(data=st.data())
def test_a_round_does_what_dense_arithmetic_says(name: str, data: st.DataObject) -> None:
    found = data.draw(rounds_of(name))
    assert_near(found.applied(), REFERENCES[name].applied(found), found.scale())
    assert_near(heads_after(found), REFERENCES[name].heads(found), HEADS)


# The order of clients.


@every_preset
@few
@given(data=st.data())
def test_the_order_of_clients_does_not_matter(name: str, data: st.DataObject) -> None:
    found = data.draw(rounds_of(name))
    order = data.draw(st.permutations(range(len(found.updates))))
    turned = found.with_updates([found.updates[client] for client in order])
    assert_near(turned.applied(), found.applied(), found.scale(), 1e-6)
    assert_near(heads_after(turned), heads_after(found), HEADS, 1e-6)
    first, second = found.aggregated()[1], turned.aggregated()[1]
    assert first.keys() == second.keys()
    # How far the numbers of an adapter moved says nothing where the rule chooses new ones.
    compared = ("drift", "merge_error", "tail") + (("update_norm",) if found.method.merge.gauge == "kept" else ())
    for figure in compared:
        if figure in first:
            assert second[figure] == pytest.approx(first[figure], rel=1e-4, abs=1e-6, nan_ok=True)


# One client, and clients that agree.


@pytest.mark.parametrize("name", [name for name in PRESETS if method_of(name).merge.least == 1])
@few
@given(data=st.data())
def test_one_client_in_is_the_same_out(name: str, data: st.DataObject) -> None:
    found = data.draw(rounds_of(name, equal=True, clients=1, still=()))
    assert_near(found.applied(), found.exact(), found.scale())
    assert_near(heads_after(found), {key: found.after(0)[key] for key in HEAD}, HEADS)


@pytest.mark.parametrize("name", [*FACTOR_MEANS, "hetlora", "lora_fair", "fedex", "median", "trimmed_mean"])
@few
@given(data=st.data())
def test_one_client_in_is_the_same_out_factor_by_factor(name: str, data: st.DataObject) -> None:
    count = method_of(name).merge.least
    found = data.draw(rounds_of(name, equal=True, clients=count, still=(), fresh=False))
    alone = found.with_updates([found.updates[0]] * count)
    after = {key: value.astype(np.float64) for key, value in tensors_after(alone).items()}
    sizes = {key: 1e-3 + float(np.linalg.norm(value)) for key, value in found.after(0).items()}
    assert_near(after, found.after(0), sizes)


@pytest.mark.parametrize("name", [name for name in FACTOR_MEANS if name not in ("fedavg", "fedit", "fedsa_lora")])
@pytest.mark.parametrize("rank", [1, 2])
def test_one_client_of_lower_rank_is_all_that_there_is(name: str, rank: int) -> None:
    found = round_of(name, LAYERS, [rank], seed=rank)
    assert_near(found.applied(), found.exact(), found.scale())


@pytest.mark.parametrize("name", ["fedavg", "fedit", "fedsa_lora"])
def test_rows_that_nobody_holds_stay_where_they_are_if_only_covered_ones_count(name: str) -> None:
    found = round_of(name, LAYERS, [1, 2])
    before, after = found.state.adapter.tensors, tensors_after(found)
    for path in found.paths:
        assert bits({path: after[f"{path}.A"][2:]}) == bits({path: before[f"{path}.A"][2:]})
        assert bits({path: after[f"{path}.B"][:, 2:]}) == bits({path: before[f"{path}.B"][:, 2:]})
        assert not np.array_equal(after[f"{path}.A"][:2], before[f"{path}.A"][:2])


@every_preset
@few
@given(data=st.data())
def test_identical_clients_are_a_fixed_point(name: str, data: st.DataObject) -> None:
    found = data.draw(rounds_of(name, equal=True, still=(), fresh=False))
    one = found.updates[0]
    counted = [replace(one, examples=update.examples, tokens=update.tokens) for update in found.updates]
    agreed = found.with_updates(counted)
    assert_near(agreed.applied(), agreed.exact(), agreed.scale())
    assert_near(heads_after(agreed), {key: agreed.after(0)[key] for key in HEAD}, HEADS)
    assert name == "fedsa_lora" or figure_of(agreed, "merge_error") < 1e-5


# What goes in stays as it is.


@every_preset
@few
@given(data=st.data())
def test_inputs_are_not_mutated(name: str, data: st.DataObject) -> None:
    found = data.draw(rounds_of(name))
    given_ones = [found.state.adapter.tensors, found.state.adapter.residual, *(one.delta for one in found.updates)]
    before = [bits(tensors) for tensors in given_ones]
    for tensors in given_ones:
        for value in tensors.values():
            value.setflags(write=False)
    found.aggregated()
    assert [bits(tensors) for tensors in given_ones] == before
    after = found.aggregated()[0].adapter
    assert not any(
        np.shares_memory(value, own)
        for update in found.updates
        for value in update.delta.values()
        for own in (*after.tensors.values(), *after.residual.values())
    )


# Mixed alphas and ranks.


def trained_from(found: Round, alphas: Sequence[float], stabilised: Sequence[bool]) -> tuple[Round, Dense]:
    """The round whose clients have trained plain factors under scales of their own, and Σ p_k s_k B_k A_k."""
    random, updates, exact = rng(found.state.seed, "raw"), [], dict.fromkeys(found.paths, np.zeros(()))
    for client, update in enumerate(found.updates):
        raw = {**found.received(client)}
        raw |= {key: random.standard_normal(value.shape) for key, value in update.delta.items()}
        folded = dict(raw)
        for module in low_rank(found.spec):
            path, rank = module.path, len(raw[f"{module.path}.A"])
            scale = alphas[client] / (math.sqrt(rank) if stabilised[client] else rank)
            trained = {f"{path}.{n}" for n in ("B", "R")} & update.delta.keys()
            for key in trained:
                folded[key] = scale * raw[key]
            share = found.shares[client] * (scale if trained else 1.0)
            exact[path] = exact[path] + share * product(raw, path)
        delta = {k: (folded[k] - found.received(client)[k]).astype(np.float32) for k in update.delta}
        updates.append(replace(update, delta=delta))
    return found.with_updates(updates), exact


@exact_presets
@settings(max_examples=15)
@given(data=st.data())
def test_unlike_alphas_and_ranks_give_the_exact_mean(name: str, data: st.DataObject) -> None:
    plain = data.draw(rounds_of(name))
    count = len(plain.updates)
    alphas = data.draw(st.lists(st.floats(0.5, 32), min_size=count, max_size=count))
    stabilised = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    found, exact = trained_from(plain, alphas, stabilised)
    assert_near(found.applied(), exact, found.scale())


@exact_presets
@pytest.mark.parametrize("done", [0, 1])
def test_exact_presets_say_that_they_are(name: str, done: int) -> None:
    assert figure_of(round_of(name, LAYERS, MIXED, done=done), "merge_error") < 1e-6


def test_the_mean_of_factors_is_far_from_exact() -> None:
    for name in ("fedavg", "zero_pad", "hetlora"):
        found = round_of(name, LAYERS, MIXED)
        with pytest.raises(AssertionError):
            assert_near(found.applied(), found.exact(), found.scale(), 1e-2)
        assert figure_of(found, "merge_error") > 0.1


@pytest.mark.parametrize(
    ("name", "share", "error"),
    [("flora", 1 / 4, 0.0), ("fedex", 1 / 4, 0.0), ("fedavg", 1.0, 0.0), ("zero_pad", 1 / 4 * 1 / 4, 3 / 4)],
)
def test_a_module_that_only_one_client_has_is_its_share_or_its_own(name: str, share: float, error: float) -> None:
    found = round_of(name, LAYERS, [3, 3], weights="uniform")
    merge, (first, second), last = found.method.merge, found.updates, found.paths[-1]
    fold = merge.init(found.state, tuple(found.spec.shapes), ())
    for update, weight in ((first, 1.0), (second, 3.0)):
        kept = [key for key in update.spec.shapes if update is first or not key.startswith(last)]
        spec = update.spec.only(kept)
        received = AdapterState(spec, {key: found.state.adapter.tensors[key] for key in kept})
        own = replace(update, spec=spec, delta={key: update.delta[key] for key in kept})
        fold = merge.add(fold, Contribution(own, received, weight))
    merged = merge.finish(fold)
    before = found.state.adapter.tensors
    after = {key: before[key].astype(np.float64) + merged.delta[key] for key in before}
    residual = merged.residual.get(last)
    applied = product(after, last) + (residual.b @ residual.a if residual else 0.0)
    assert_near({last: applied}, {last: share * product(found.after(0), last)}, found.scale())
    errors = merged.measures["merge_errors"]
    assert isinstance(errors, Mapping)
    assert errors[last] == pytest.approx(error, abs=1e-5)


# Stacking, and cutting by singular values.


@st.composite
def stacks(draw: st.DrawFn) -> list[Factors]:
    out, inputs, random = draw(st.integers(1, 7)), draw(st.integers(1, 7)), rng(draw(st.integers(0, 999)), "stack")
    found = draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    return [Factors(random.standard_normal((out, rank)), random.standard_normal((rank, inputs))) for rank in found]


@given(stacks())
def test_a_stack_cut_at_the_sum_of_its_ranks_is_the_sum(parts: list[Factors]) -> None:
    dense = np.sum([part.b @ part.a for part in parts], axis=0)
    whole = products.stack(parts)
    cut_at_sum = products.truncate(whole, sum(part.rank for part in parts)).factors
    size = sum(float(np.linalg.norm(part.b @ part.a)) for part in parts)
    for found in (whole, cut_at_sum):
        assert np.linalg.norm(found.b @ found.a - dense) <= 1e-12 * size


@given(stacks(), st.integers(0, 99))
def test_the_target_is_the_dense_mean_in_float64(parts: list[Factors], seed: int) -> None:
    rank = max(part.rank for part in parts)
    out, inputs = parts[0].shape
    (module,) = low_rank(spec_of([Layer(out, inputs, rank)]))
    key = module.path
    weights, target = rng(seed, "weights").integers(1, 99, len(parts)), exactness.begin()
    for part, weight in zip(parts, weights, strict=True):
        tensors = {f"{key}.A": part.a, f"{key}.B": part.b}
        still = {name: np.zeros_like(value) for name, value in tensors.items()}
        target = exactness.add(target, (module,), tensors, still, float(weight))
    found = exactness.means(target)[key]
    dense = np.sum([w * part.b @ part.a for part, w in zip(parts, weights, strict=True)], axis=0) / weights.sum()
    size = max(float(np.linalg.norm(part.b @ part.a)) for part in parts)
    assert np.linalg.norm(found.b @ found.a - dense) <= 1e-12 * size
    assert found.rank <= max(out, inputs, rank)


@settings(max_examples=15)
@given(rounds_of("flexlora"))
def test_flexloras_error_is_the_tail_of_the_singular_values(found: Round) -> None:
    measures, scale = found.aggregated()[1], found.scale()
    for module in low_rank(found.spec):
        exact = found.exact()[module.path]
        size, values = float(np.linalg.norm(exact)), np.linalg.svd(exact, compute_uv=False)
        tail = math.sqrt(np.sum(values[module.rank :] ** 2))
        error = np.linalg.norm(found.applied()[module.path] - exact)
        assert error == pytest.approx(tail, rel=1e-5, abs=1e-5 * scale[module.path])
        if size:
            expected = pytest.approx(tail / size, rel=1e-5, abs=1e-5 * scale[module.path] / size)
            assert measures["merge_errors"][module.path] == expected  # type: ignore[index]


@settings(max_examples=15)
@given(rounds_of("fedex", rank=1))
def test_fedex_at_a_lower_rank_misses_the_tail_of_what_the_mean_misses(found: Round) -> None:
    exact, applied, scale = found.exact(), found.applied(), found.scale()
    tensors = factor_mean(found, harness.everyone(found), "zero")
    for path in found.paths:
        values = np.linalg.svd(exact[path] - product(tensors, path), compute_uv=False)
        tail = math.sqrt(np.sum(values[1:] ** 2))
        error = np.linalg.norm(applied[path] - exact[path])
        assert error == pytest.approx(tail, rel=1e-5, abs=1e-5 * scale[path])


# A client that did not move.


@pytest.mark.parametrize("name", FACTOR_MEANS)
def test_a_client_that_did_not_move_only_shortens_the_step_of_the_factors(name: str) -> None:
    found = equal_rounds(name, 3)
    still = replace(found.updates[0], delta={k: 0 * v for k, v in found.updates[0].delta.items()}, examples=17)
    share = sum(update.examples for update in found.updates) / (17 + sum(update.examples for update in found.updates))
    before, after = found.state.adapter.tensors, tensors_after(found)
    with_it = tensors_after(found.with_updates([*found.updates, still]))
    expected = {key: before[key] + share * (after[key].astype(np.float64) - before[key]) for key in before}
    assert_near({k: v.astype(np.float64) for k, v in with_it.items()}, expected, dict.fromkeys(before, 5.0), 1e-6)
    assert any(np.abs(with_it[key] - after[key]).max() > 0.01 for key in after)


@exact_presets
@few
@given(data=st.data())
def test_a_client_that_did_not_move_counts_as_what_it_received(name: str, data: st.DataObject) -> None:
    found = data.draw(rounds_of(name, still=(), weights="uniform"))
    first, count = found.updates[0], len(found.updates)
    alone = found.with_updates([replace(first, delta={k: 0 * v for k, v in first.delta.items()})])
    joined = found.with_updates([*found.updates, *alone.updates])
    held = {path: product(found.received(0), path) for path in found.paths}
    applied = found.applied()
    expected = {path: (count * applied[path] + held[path]) / (count + 1) for path in held}
    assert_near(joined.applied(), expected, found.scale())
    assert_near(alone.applied(), held, found.scale())


@every_preset
@few
@given(data=st.data())
def test_nothing_moves_if_nobody_did(name: str, data: st.DataObject) -> None:
    found = data.draw(rounds_of(name, equal=True))
    still = found.with_updates([replace(u, delta={k: 0 * v for k, v in u.delta.items()}) for u in found.updates])
    before = {path: product(found.state.adapter.tensors, path) for path in found.paths}
    assert_near(still.applied(), before, found.scale())
    assert bits(heads_after(still)) == bits({k: found.state.adapter.tensors[k].astype(np.float64) for k in HEAD})


# Heads and weights.


@pytest.mark.parametrize("weights", ["examples", "tokens", "uniform"])
@pytest.mark.parametrize("name", AVERAGES)
def test_heads_are_the_weighted_mean(name: str, weights: str) -> None:
    found = round_of(name, LAYERS, MIXED, weights=weights, seed=3)
    shares = {
        "examples": [update.examples for update in found.updates],
        "tokens": [update.tokens for update in found.updates],
        "uniform": [1, 1, 1],
    }[weights]
    before = found.state.adapter.tensors
    for key in HEAD:
        mean = np.average([update.delta[key].astype(np.float64) for update in found.updates], axis=0, weights=shares)
        np.testing.assert_allclose(heads_after(found)[key], before[key] + mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # B_1 A_1 = 2 × 3 and B_2 A_2 = 4 × 5 of 3 and 1 examples, of 2 and 6 tokens.
        ("examples", (3 * 6 + 1 * 20) / 4),
        ("tokens", (2 * 6 + 6 * 20) / 8),
        ("uniform", (6 + 20) / 2),
    ],
)
@drifting_presets
def test_weights_by_hand(name: str, weights: str, expected: float) -> None:
    found = by_hand(name, {1: (2.0, 3.0), 3: (4.0, 5.0)}, weights=weights)
    first, second = (
        replace(one, examples=n, tokens=t) for one, n, t in zip(found.updates, (3, 1), (2, 6), strict=True)
    )
    (applied,) = found.with_updates([first, second]).applied().values()
    np.testing.assert_allclose(applied, [[expected]], rtol=1e-6)


def by_hand(name: str, factors: Mapping[int, tuple[float, float]], **settings: object) -> Round:
    """Clients whose B and A of one number are `factors`, on a server whose B is 0 and whose A is 1."""
    found = round_of(name, [Layer(1, 1, 1)], [1] * len(factors), fresh=True, **settings)  # type: ignore[arg-type]
    (path,) = found.paths
    tensors = {**found.state.adapter.tensors, f"{path}.A": np.ones((1, 1), np.float32)}
    state = replace(found.state, adapter=replace(found.state.adapter, tensors=tensors))
    updates = [
        replace(update, delta={**update.delta, f"{path}.B": one(b), f"{path}.A": one(a - 1)})
        for update, (b, a) in zip(found.updates, factors.values(), strict=True)
    ]
    return replace(found, state=state, updates=tuple(updates))


def one(value: float) -> np.ndarray:
    return np.full((1, 1), value, np.float32)


def test_hetlora_weighs_by_the_norms_by_hand() -> None:
    # |B A| is 2 and 6, so B = (2 × 1 + 6 × 3) / 8 = 2.5 and A = (2 × 2 + 6 × 2) / 8 = 2; examples play no part.
    found = by_hand("hetlora", {0: (1.0, 2.0), 1: (3.0, 2.0)})
    tensors, (path,) = tensors_after(found), found.paths
    np.testing.assert_allclose([tensors[f"{path}.B"], tensors[f"{path}.A"]], [[[2.5]], [[2.0]]], rtol=1e-6)


def test_hetlora_takes_one_norm_over_all_modules() -> None:
    # Norms over both modules are √(3² + 4²) = 5 and √(12² + 9²) = 15: weights 1/4 and 3/4 on each of them.
    found = round_of("hetlora", [Layer(1, 1, 1), Layer(1, 1, 1)], [1, 1], fresh=True)
    ones = {f"{path}.A": one(1.0) for path in found.paths}
    adapter = replace(found.state.adapter, tensors={**found.state.adapter.tensors, **ones})
    values = ((3.0, 4.0), (12.0, 9.0))
    still = {f"{path}.A": one(0.0) for path in found.paths}
    updates = [
        replace(
            update, delta={**update.delta, **still, **{f"{p}.B": one(b) for p, b in zip(found.paths, bs, strict=True)}}
        )
        for update, bs in zip(found.updates, values, strict=True)
    ]
    found = replace(found, state=replace(found.state, adapter=adapter), updates=tuple(updates))
    applied = [float(found.applied()[path][0, 0]) for path in found.paths]
    assert applied == pytest.approx([(3 + 3 * 12) / 4, (4 + 3 * 9) / 4])


# LoRA-FAIR.


def distance(found: Round, applied: Dense) -> dict[str, float]:
    exact = found.exact()
    return {path: float(np.linalg.norm(applied[path] - exact[path])) for path in found.paths}


@settings(max_examples=15)
@given(rounds_of("lora_fair"), st.floats(1e-3, 10))
def test_lora_fair_is_never_farther_than_the_plain_mean(found: Round, strength: float) -> None:
    held = replace(found, method=method_of("lora_fair", strength=strength, weights=found.weights))
    plain = distance(found, harness.factors_of("zero")(found))
    for path, gap in distance(held, held.applied()).items():
        assert gap <= plain[path] + 1e-5 * found.scale()[path]


@pytest.mark.parametrize("seed", range(4))
def test_lora_fair_goes_to_the_least_squares_optimum(seed: int) -> None:
    found = round_of("lora_fair", LAYERS, MIXED, seed=seed)
    tensors, exact = factor_mean(found, harness.everyone(found), "zero"), found.exact()
    best = {path: exact[path] @ np.linalg.pinv(tensors[f"{path}.A"]) @ tensors[f"{path}.A"] for path in found.paths}
    gaps = []
    for strength in (1.0, 1e-2, 1e-4, 1e-8):
        held = replace(found, method=method_of("lora_fair", strength=strength))
        applied = held.applied()
        gaps.append(max(float(np.linalg.norm(applied[path] - best[path])) for path in best))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert gaps[-1] < 1e-5 * max(found.scale().values())


# What the journal says.


def dense_figures(applied: np.ndarray, exact: np.ndarray, rank: int) -> dict[str, float]:
    """Norms of what is missed, of what `rank` cannot hold and of T, and the participation ratio of its spectrum.

    A T whose squares vanish in float64 is no T.
    """
    values = np.linalg.svd(exact, compute_uv=False)
    values[values < 1e-150] = 0.0
    return {
        "gap": float(np.linalg.norm(applied - exact)),
        "tail": math.sqrt(np.sum(values[rank:] ** 2)),
        "size": math.sqrt(np.sum(values**2)),
        "effective_rank": float(np.sum(values**2) ** 2 / np.sum(values**4)) if values.any() else math.nan,
    }


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "fedsa_lora"])
@settings(max_examples=15)
@given(data=st.data())
def test_reported_figures_are_the_dense_ones(name: str, data: st.DataObject) -> None:
    found = data.draw(rounds_of(name))
    measures: Mapping[str, Any] = found.aggregated()[1]
    exact, applied, scale = harness.mixture(found, REFERENCES[name].used(found)), found.applied(), found.scale()
    dense = {m.path: dense_figures(applied[m.path], exact[m.path], m.rank) for m in low_rank(found.spec)}
    assert (
        measures["merge_errors"].keys() == measures["tails"].keys() == measures["effective_ranks"].keys() == set(dense)
    )
    for path, one in dense.items():
        for figure, value in (("merge_errors", one["gap"]), ("tails", one["tail"])):
            assert_ratio(measures[figure][path], value, one["size"], scale[path])
        assert measures["effective_ranks"][path] == pytest.approx(one["effective_rank"], rel=1e-5, nan_ok=True)
    whole = {key: math.sqrt(sum(one[key] ** 2 for one in dense.values())) for key in ("gap", "tail", "size")}
    for figure, value in (("merge_error", whole["gap"]), ("tail", whole["tail"])):
        assert_ratio(measures[figure], value, whole["size"], sum(scale.values()))


def assert_ratio(found: float, part: float, size: float, scale: float) -> None:
    """Raises AssertionError unless `found` is part / size (NaN over 0), where numbers of `scale` were rounded."""
    expected = part / size if size else math.nan
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5 * scale / size if size else 0.0, nan_ok=True)


def test_nothing_is_reported_of_products_that_the_server_does_not_see() -> None:
    assert round_of("fedsa_lora", LAYERS, MIXED).aggregated()[1].keys() == {"update_norm", "drift"}


# Runs of several rounds, through the client.


def test_fedsas_clients_keep_their_own_b_to_the_bit() -> None:
    run = federation("fedsa_lora", LAYERS, node_ranks=MIXED)
    paths = [module.path for module in low_rank(run.state.adapter.spec)]
    started = bits({f"{path}.B": run.state.adapter.tensors[f"{path}.B"] for path in paths})
    for round_ in range(1, 5):
        if round_ == 3:  # A server that has forgotten who has what sends all of it, its own B too.
            run.state = replace(run.state, holdings={})
        run.step()
        assert bits({f"{path}.B": run.state.adapter.tensors[f"{path}.B"] for path in paths}) == started
        for partition, learner in run.learners.items():
            own = {f"{path}.B": learner.made[round_][f"{path}.B"] for path in paths}
            assert bits({key: run.memories[partition].tensors[key] for key in own}) == bits(own)
            if round_ > 1:
                last = {key: learner.made[round_ - 1][key] for key in own}
                assert bits({key: learner.seen[round_].tensors[key] for key in own}) == bits(last)
    everyones = [bits({k: v for k, v in run.memories[p].tensors.items() if k in own}) for p in run.learners]
    assert len({str(found) for found in everyones}) == len(run.learners)


def test_fedsas_b_never_travels() -> None:
    run = federation("fedsa_lora", LAYERS)
    run.step()
    size = 4 * sum(value.size for key, value in run.state.adapter.tensors.items() if not key.endswith(".B"))
    assert {len(reply.body) for reply in run.replies} == {size}


def test_roloras_odd_rounds_train_b_and_its_even_ones_a() -> None:
    run = federation("rolora", LAYERS, node_ranks=MIXED)
    paths = [module.path for module in low_rank(run.state.adapter.spec)]
    for round_ in range(1, 6):
        before = run.state.adapter.tensors
        run.step()
        after, (moves, stays) = run.state.adapter.tensors, ("BA" if round_ % 2 else "AB")
        for path in paths:
            assert bits({"": after[f"{path}.{stays}"]}) == bits({"": before[f"{path}.{stays}"]})
            assert np.abs(after[f"{path}.{moves}"] - before[f"{path}.{moves}"]).max() > 1e-3
            for learner in run.learners.values():
                key = f"{path}.{stays}"
                assert bits({"": learner.made[round_][key]}) == bits({"": learner.seen[round_].tensors[key]})


@pytest.mark.parametrize(("name", "fixed"), [("ffa_lora", "A"), ("fed_sb", "AB")])
def test_what_is_frozen_has_one_hash_over_a_run(name: str, fixed: str) -> None:
    run = federation(name, LAYERS, node_ranks=MIXED)
    keys = [key for key in run.state.adapter.tensors if key not in HEAD and key[-1] in fixed]

    def digest(tensors: Tensors, like: Tensors) -> str:
        found = (np.ascontiguousarray(corner(tensors[key], like[key].shape)) for key in keys)
        return hashlib.sha256(b"".join(value.tobytes() for value in found)).hexdigest()

    start = run.state.adapter.tensors
    for round_ in range(1, 5):
        before = run.state.adapter.tensors
        run.step()
        assert digest(run.state.adapter.tensors, start) == digest(start, start)
        moved = [key for key in start if key not in keys and key not in HEAD]
        assert all(np.abs(run.state.adapter.tensors[key] - before[key]).max() > 0 for key in moved)
        for learner in run.learners.values():
            for tensors in (learner.seen[round_].tensors, learner.made[round_]):
                assert digest(tensors, tensors) == digest(start, tensors)


COHORTS = ((0, 1), (2,), (0, 1, 2, 3), (1, 3), (0, 4))
"""Who takes part in each round; partitions 3 and 4 are late."""


WIDE = [Layer(40, 35, 3), Layer(36, 44, 2)]
"""Weights whose residual does not become as great as they are within these rounds, so that its columns are kept."""

some_layers = pytest.mark.parametrize("layers", [LAYERS, WIDE], ids=["narrow", "wide"])


@drifting_presets
@some_layers
def test_whoever_takes_part_the_round_is_the_exact_mean(name: str, layers: list[Layer]) -> None:
    run = federation(name, layers, clients=5, node_ranks=(3, 1, 2))
    for round_, cohort in enumerate(COHORTS, 1):
        before = run.state.adapter
        record = run.step(*cohort)
        assert [client["partition"] for client in record["clients"]] == list(cohort)
        learners = [run.learners[partition] for partition in cohort]
        below = does(replace(before, tensors={k: 0 * v for k, v in before.tensors.items()}))
        total = sum(learner.examples for learner in learners)
        made = [(learner.examples / total, learner.made[round_]) for learner in learners]
        expected = {p: below[p] + np.sum([share * product(own, p) for share, own in made], axis=0) for p in below}
        assert_near(does(run.state.adapter), expected, {p: 1 + float(np.linalg.norm(v)) for p, v in expected.items()})
        assert record["merge_error"] < 1e-5


@drifting_presets
@some_layers
def test_a_late_joiner_stands_on_the_same_base(name: str, layers: list[Layer]) -> None:
    run = federation(name, layers, clients=5, node_ranks=(3, 1, 2, 3, 3))
    for round_, cohort in enumerate(COHORTS, 1):
        before = run.state.adapter
        run.step(*cohort)
        for partition in cohort:
            learner = run.learners[partition]
            seen = learner.seen[round_]
            assert bits(seen.residual) == bits(before.residual)
            spec = cut(before.spec, (3, 1, 2, 3, 3)[partition])
            held = {k: corner(before.tensors[k], s).astype(np.float32) for k, s in spec.shapes.items()}
            assert bits(seen.tensors) == bits(held)
    assert round_ == 5
    assert before.residual


@pytest.mark.parametrize(("drawn", "zero"), ["AB", "BA"], ids=["linear", "embedding"])
def test_flora_begins_every_round_with_an_adapter_that_does_nothing(drawn: str, zero: str) -> None:
    run, starts = federation("flora", LAYERS), []
    paths = [module.path for module in low_rank(run.state.adapter.spec)]
    # peft begins with B at zero, and on an embedding with A at zero.
    first = {f"{path}.{name}": one(float(name == drawn)) for path in paths for name in "AB"}
    tensors = {
        key: value * first.get(key, 1.0) + first.get(key, 0.0) for key, value in run.state.adapter.tensors.items()
    }
    run.state = replace(run.state, adapter=replace(run.state.adapter, tensors=tensors))
    for _ in range(3):
        run.step()
        after = run.state.adapter.tensors
        assert not any(after[f"{path}.{zero}"].any() for path in paths)
        starts += [after[f"{path}.{drawn}"].tobytes() for path in paths]
    assert len(set(starts)) == 3 * len(paths)


@given(st.integers(0, 999), st.integers(1, 3))
@few
def test_a_budget_keeps_the_nearest_and_says_what_it_left_out(seed: int, budget: int) -> None:
    found = round_of("flora", [Layer(6, 5, 3)], MIXED, seed=seed, residual=2, budget=budget)
    after, measures = found.aggregated()
    old = product(found.state.adapter.residual, found.paths[0])
    whole = old + found.exact()[found.paths[0]]
    assert_near(does(after.adapter), {found.paths[0]: nearest(whole, budget)}, found.scale())
    values = np.linalg.svd(whole, compute_uv=False)
    dropped = math.sqrt(np.sum(values[budget:] ** 2))
    assert measures["residual_dropped"] == pytest.approx(dropped, rel=1e-5, abs=1e-5)
    assert measures["residual_rank"] == budget
