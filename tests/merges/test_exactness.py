"""The factored error against the dense one, and against rules whose error is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSpec, Factors, ModuleSpec, Tensors, factors
from fedpeft.merges import exactness, products
from fedpeft.randomness import rng


def spec_of(outputs: int, inputs: int, rank: int) -> AdapterSpec:
    shapes = (("A", (rank, inputs)), ("B", (outputs, rank)))
    head = ModuleSpec("head", "full", 0, 1.0, (("weight", (2, inputs)),))
    return AdapterSpec("base", "lora", (ModuleSpec("q", "lora", rank, 1.0, shapes), head))


def adapters(outputs: int, inputs: int, rank: int, clients: int, seed: int = 0) -> list[Tensors]:
    random, shapes = rng(seed, "adapters"), spec_of(outputs, inputs, rank).shapes
    return [
        {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()} for _ in range(clients)
    ]


NOTHING = {key: np.zeros(1, np.float32) for key in ("q.A", "q.B", "v.A", "v.B")}
"""What all received, in most tests: zeros of any shape."""
Q = spec_of(1, 1, 1).modules[:1]
"""The low-rank module; nothing here looks at its shapes."""


def target_of(clients: Sequence[Tensors], weights: Sequence[float]) -> exactness.Target:
    target = exactness.begin()
    for client, weight in zip(clients, weights, strict=True):
        target = exactness.add(target, Q, NOTHING, client, weight)
    return target


def judged(target: exactness.Target, applied: Tensors, rank: int = 1) -> exactness.Report:
    """The report on `applied`, as the adapter after the round."""
    exact = exactness.means(target)
    spectra = {path: products.spectrum(mean, rank) for path, mean in exact.items()}
    return exactness.report(exact, {"q": factors(Q[0], NOTHING, applied)}, spectra)


def dense(clients: Sequence[Tensors], weights: Sequence[float]) -> np.ndarray:
    found = [
        w * c["q.B"].astype(np.float64) @ c["q.A"].astype(np.float64) for c, w in zip(clients, weights, strict=True)
    ]
    total: np.ndarray = np.sum(found, axis=0) / sum(weights)
    return total


def mean_of(clients: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    return {
        key: np.sum([w * c[key].astype(np.float64) for c, w in zip(clients, weights, strict=True)], axis=0)
        / sum(weights)
        for key in clients[0]
    }


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_it_is_the_dense_error_for_any_shape_rank_and_number_of_clients(
    outputs: int, inputs: int, rank: int, clients: int, seed: int
) -> None:
    found = adapters(outputs, inputs, rank, clients, seed)
    weights = [float(at + 1) for at in range(clients)]
    merged = mean_of(found, weights)
    exact = dense(found, weights)
    expected = np.linalg.norm(merged["q.B"] @ merged["q.A"] - exact) / np.linalg.norm(exact)
    assert judged(target_of(found, weights), merged).errors["q"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_effective_rank_and_tail_are_those_of_the_dense_mean(
    outputs: int, inputs: int, rank: int, clients: int, seed: int
) -> None:
    found = adapters(outputs, inputs, rank, clients, seed)
    weights = [float(at + 1) for at in range(clients)]
    squares = np.linalg.svd(dense(found, weights), compute_uv=False) ** 2
    report = judged(target_of(found, weights), mean_of(found, weights), rank)
    assert report.effective_ranks["q"] == pytest.approx(squares.sum() ** 2 / (squares**2).sum(), rel=1e-8)
    tail = math.sqrt(squares[rank:].sum() / squares.sum())
    assert report.tails["q"] == pytest.approx(tail, rel=1e-6, abs=1e-7)
    assert report.tail == pytest.approx(report.tails["q"])


def test_a_golden_by_hand() -> None:
    # B_1 A_1 = 1 x 1 and B_2 A_2 = 3 x 3: their mean is 5, the mean of factors gives 2 x 2 = 4.
    one, two = ({key: np.full((1, 1), value, np.float32) for key in ("q.A", "q.B")} for value in (1.0, 3.0))
    report = judged(target_of([one, two], [1, 1]), mean_of([one, two], [1, 1]))
    assert report.errors["q"] == report.error == pytest.approx(1 / 5)


def test_tails_and_effective_ranks_by_hand() -> None:
    # Singular values 4, 2 and 1: what rank 1 leaves out is √5 of √21; (16 + 4 + 1)² / (256 + 16 + 1).
    one = {"q.A": np.eye(3, dtype=np.float32), "q.B": np.diag([4, 2, 1]).astype(np.float32)}
    report = judged(target_of([one], [1.0]), one, rank=1)
    assert report.tails == {"q": pytest.approx(math.sqrt(5 / 21))}
    assert report.effective_ranks == {"q": pytest.approx(441 / 273)}
    assert judged(target_of([one], [1.0]), one, rank=3).tail == 0.0


def test_one_client_and_a_shared_factor_are_exact() -> None:
    found = adapters(7, 5, 2, 3)
    assert judged(target_of(found[:1], [3.0]), found[0]).error < 1e-15
    frozen = [{**client, "q.A": found[0]["q.A"]} for client in found]
    weights = [0.5, 0.3, 0.2]
    assert judged(target_of(frozen, weights), mean_of(frozen, weights)).error < 1e-14


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
def test_a_small_error_keeps_its_digits(size: float) -> None:
    found = adapters(9, 8, 2, 1)
    near = {"q.A": found[0]["q.A"].astype(np.float64), "q.B": found[0]["q.B"].astype(np.float64) * (1 + size)}
    assert judged(target_of(found, [1.0]), near).error == pytest.approx(size, rel=1e-2)


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (5, 7), (6, 6)])
def test_memory_does_not_grow_with_the_number_of_clients(outputs: int, inputs: int) -> None:
    found = adapters(outputs, inputs, 2, 40)
    sizes = []
    for count in range(1, 41):
        total = target_of(found[:count], [1.0] * count).sums["q"]
        parts = sum(part.b.size + part.a.size for part in total.parts)
        sizes.append(parts + (0 if total.whole is None else total.whole.size))
    assert max(sizes[20:]) <= 512 * (outputs + inputs) + outputs * inputs
    product = target_of(found, [1.0] * 40).sums["q"].product()
    assert product.rank <= max(outputs, inputs)
    np.testing.assert_allclose(product.b @ product.a / 40, dense(found, [1.0] * 40), atol=1e-6)


def test_past_the_rank_of_a_matrix_the_sum_is_one_and_waits_for_some_columns() -> None:
    random, total, expected = rng(1, "sum"), exactness.Sum(), np.zeros((30, 20))
    for count in range(1, 60):
        part = Factors(random.standard_normal((30, 9)), random.standard_normal((9, 20)))
        before = total
        total, expected = total.plus(part), expected + part.b @ part.a
        assert before is not total
        waiting = sum(one.rank for one in total.parts)
        assert waiting == total.rank <= 512
        assert (total.whole is None) == (9 * count <= 20)
        np.testing.assert_allclose(total.product().b @ total.product().a, expected, atol=1e-10)


def test_sums_are_not_changed_by_what_is_added() -> None:
    random = rng(2, "sum")
    parts = [Factors(random.standard_normal((4, 3)), random.standard_normal((3, 4))) for _ in range(200)]
    first = exactness.Sum()
    for part in parts[:100]:
        first = first.plus(part)
    product = first.product()
    held = product.b @ product.a
    later = first
    for part in parts[100:]:
        later = later.plus(part)
    again = first.product()
    assert np.array_equal(again.b @ again.a, held)
    assert not np.allclose(later.product().b @ later.product().a, held)


def test_a_gauge_changes_no_verdict() -> None:
    found = adapters(7, 5, 2, 3)
    turned = [{**client, "q.A": client["q.A"] * 4, "q.B": client["q.B"] / 4} for client in found]
    merged = mean_of(found, [1, 1, 1])
    first, second = (judged(target_of(clients, [1, 1, 1]), merged) for clients in (found, turned))
    assert first.error == pytest.approx(second.error, rel=1e-12)
    assert first.tail == pytest.approx(second.tail, rel=1e-9)


def test_the_whole_weighs_modules_by_their_size() -> None:
    one = Factors(np.ones((1, 1)), np.ones((1, 1)))
    exact = {"q": one, "v": products.scaled(one, 3.0)}
    applied = {"q": one, "v": products.scaled(one, 0.0)}
    spectra = {"q": products.Spectrum(1.0, 0.0, 1.0), "v": products.Spectrum(3.0, 1.5, 2.0)}
    report = exactness.report(exact, applied, spectra)
    assert tuple(report) == (
        pytest.approx(math.sqrt(9 / 10)),
        {"q": 0.0, "v": 1.0},
        {"q": 1.0, "v": 2.0},
        pytest.approx(math.sqrt(2.25 / 10)),
        {"q": 0.0, "v": 0.5},
        0.0,
    )


def test_what_is_known_to_be_missing_counts_as_missed() -> None:
    one = Factors(np.ones((1, 1)), np.ones((1, 1)))
    spectra = {"q": products.Spectrum(1.0, 0.0, 1.0)}
    report = exactness.report({"q": one}, {"q": one}, spectra, {"q": 0.75})
    assert (report.error, report.tail, report.lacks) == (pytest.approx(0.6), pytest.approx(0.6), pytest.approx(0.6))
    assert math.isnan(exactness.report({"q": one}, {"q": one}, spectra, {"q": math.nan}).error)


def test_nothing_at_all_has_no_error() -> None:
    zero = {"q.A": np.ones((1, 3), np.float32), "q.B": np.zeros((2, 1), np.float32)}
    report = judged(target_of([zero], [1.0]), zero)
    assert all(map(math.isnan, (report.error, report.errors["q"], report.tail, report.effective_ranks["q"])))


def test_modules_with_a_factor_that_stays_at_its_client_are_left_out() -> None:
    spec = spec_of(3, 3, 1)
    assert exactness.measured_modules(spec, ()) == spec.modules[:1]
    assert exactness.measured_modules(spec, ("q.B",)) == ()
    assert exactness.measured_modules(spec, ("q.A",)) == ()
    assert exactness.measured_modules(spec, ("head.weight",)) == spec.modules[:1]


def test_a_factor_that_does_not_travel_counts_as_it_was_received() -> None:
    found = adapters(7, 5, 2, 3)
    received = {**NOTHING, "q.A": found[0]["q.A"]}
    target = exactness.begin()
    for client in found:
        target = exactness.add(target, Q, received, {"q.B": client["q.B"]}, 1.0)
    after = {"q.A": found[0]["q.A"], "q.B": mean_of(found, [1, 1, 1])["q.B"]}
    assert judged(target, after).error < 1e-14


# Modules that some clients do not have.


def test_the_mean_is_over_all_clients_or_over_those_that_have_the_module() -> None:
    one = {key: np.ones((1, 1), np.float32) for key in ("q.A", "q.B")}
    target = exactness.add(exactness.begin(), Q, NOTHING, one, 1.0)
    target = exactness.add(target, (), NOTHING, {}, 3.0)
    zero, covered = (exactness.means(target, missing)["q"] for missing in ("zero", "covered"))
    assert (zero.b @ zero.a).tolist() == [[0.25]]
    assert (covered.b @ covered.a).tolist() == [[1.0]]


def test_a_square_between_two_bases_is_one_product() -> None:
    # B R A with R = 1 and 3 between fixed factors 2 and 5: the mean is 2 × 2 × 5.
    shapes = (("A", (1, 1)), ("B", (1, 1)), ("R", (1, 1)))
    module = ModuleSpec("q", "lora_sb", 1, 1.0, shapes)
    received = {f"q.{name}": np.full((1, 1), value, np.float32) for name, value in (("A", 5), ("B", 2), ("R", 0))}
    target = exactness.begin()
    for value in (1, 3):
        target = exactness.add(target, (module,), received, {"q.R": np.full((1, 1), value, np.float32)}, 1.0)
    found = exactness.means(target)["q"]
    assert (found.b @ found.a).tolist() == [[20.0]]
    assert exactness.measured_modules(AdapterSpec("base", "lora_sb", (module,)), ("q.R",)) == ()
