from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import corrections
from fedpeft.adapters import AdapterState
from fedpeft.batches import batches_from
from fedpeft.client import FitJob, Fitted
from fedpeft.config.adapters import Lora
from fedpeft.config.tasks import SequenceClassification
from fedpeft.config.training import TrainingConfig
from fedpeft.errors import DataError, FederationError, PlanError
from fedpeft.evaluation import evaluate
from fedpeft.merges import Pruning
from fedpeft.models import AdaptedModel, extract, install
from fedpeft.privacy.examples import ExamplePrivacy
from fedpeft.pruning import pruned_spec, tail
from fedpeft.randomness import rng
from fedpeft.tasks import Example, build_task
from fedpeft.training import TorchLearner, fit_memory_bytes, learning_rate_factor, use_threads
from tests import tiny
from tests.tiny import FAMILIES, LABELS, WORDS, moved

pytestmark = pytest.mark.usefixtures("one_thread")
families = pytest.mark.parametrize("family", sorted(FAMILIES))
SETTINGS = TrainingConfig(steps=3, batch_size=4, learning_rate=0.05)
JOB = FitJob(round=1, partition=0, frozen=(), position=0)
TASK = build_task(SequenceClassification(labels=LABELS, max_tokens=16))


def some(count: int, length: int = 0, seed: int = 0) -> tuple[Example, ...]:
    """Examples of the same `length`, or of lengths from 3 to 9."""
    random = rng(seed, "examples")
    lengths = [(length or int(random.integers(3, 10))) - 2 for _ in range(count)]
    words = [random.integers(5, 5 + len(WORDS), inner) for inner in lengths]
    return tuple(Example((2, *words[at], 3), at % 3, ("a", "b")[at % 2]) for at in range(count))


def learner(adapted: AdaptedModel, examples: tuple[Example, ...] = (), **settings: Any) -> TorchLearner:
    return TorchLearner(adapted, TASK, examples or some(10), replace(SETTINGS, **settings), 0, 4, 8)


def bits(tensors: Any) -> dict[str, bytes]:
    return {key: np.asarray(value.detach() if hasattr(value, "detach") else value).tobytes() for key, value in tensors}


def delta(fitted: Fitted) -> dict[str, np.ndarray]:
    return {key: fitted.after[key] - fitted.before[key] for key in fitted.after}


def size(fitted: Fitted) -> float:
    return float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in delta(fitted).values())))


@families
def test_training_moves_the_adapter_and_nothing_else(tiny_model: Path, family: str) -> None:
    adapted = tiny.load(tiny_model, family)
    trained = {id(binding.parameter) for binding in adapted.bindings.values()}
    frozen = [(name, p) for name, p in adapted.model.named_parameters() if id(p) not in trained]
    before = bits(frozen)
    fitted = learner(adapted).fit(adapted.initial, JOB)
    assert bits(frozen) == before
    assert all(np.abs(value).max() > 0 for value in delta(fitted).values())
    assert {value.dtype for value in fitted.after.values()} == {np.dtype(np.float32)}
    assert bits(extract(adapted).tensors.items()) == bits(fitted.after.items())
    assert all(p.grad is None for _, p in frozen)


@families
def test_training_again_gives_the_same_bits(tiny_model: Path, family: str) -> None:
    one, other = tiny.load(tiny_model, family, seed=1), tiny.load(tiny_model, family, seed=2)
    first = learner(one).fit(one.initial, JOB)
    assert bits(learner(one).fit(one.initial, JOB).after.items()) == bits(first.after.items())
    install(other, moved(other.initial))
    assert bits(learner(other).fit(one.initial, JOB).after.items()) == bits(first.after.items())


def test_dropout_is_drawn_from_the_jobs_own_seed(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, Lora(rank=3, alpha=5.0, dropout=0.5), dropout=0.2)
    torch.manual_seed(0)
    first = learner(adapted).fit(adapted.initial, JOB)
    expected = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(99)
    again = learner(adapted).fit(adapted.initial, JOB)
    assert bits(again.after.items()) == bits(first.after.items())
    for other in (replace(JOB, round=2), replace(JOB, partition=1)):
        # The same batches; only the draws differ.
        found = learner(adapted, some(4), batch_size=4).fit(adapted.initial, other)
        plain = learner(adapted, some(4), batch_size=4).fit(adapted.initial, JOB)
        assert bits(found.after.items()) != bits(plain.after.items())
    install(adapted, adapted.initial)
    figures = [evaluate(adapted, TASK, some(5), 8)["loss"] for _ in range(2)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("alpha", [5.0, 6.0, 7.3])
@pytest.mark.parametrize("family", ["lora", "other"])
def test_training_that_moves_nothing_has_a_delta_of_exactly_zero(tiny_model: Path, alpha: float, family: str) -> None:
    settings = Lora(rank=3, alpha=alpha, rank_stabilised=family == "other")
    adapted = tiny.load(tiny_model, settings)
    fitted = learner(adapted, learning_rate=1e-30).fit(moved(adapted.initial), JOB)
    assert all((value == 0).all() for value in delta(fitted).values())


@families
def test_frozen_tensors_stay_to_the_bit_and_learn_again_after(tiny_model: Path, family: str) -> None:
    adapted = tiny.load(tiny_model, family)
    patterns = {"lora": ["*.A"], "ia3": ["*.key.l"], "prompt_tuning": ["classifier.*"], "head_only": ["*.bias"]}
    frozen = adapted.spec.matching(patterns[family])
    state = moved(adapted.initial)
    plain = learner(adapted).fit(state, JOB)
    fitted = learner(adapted, weight_decay=0.1).fit(state, replace(JOB, frozen=frozen))
    for key, value in delta(fitted).items():
        assert (np.abs(value).max() == 0) == (key in frozen), key
    assert bits(learner(adapted).fit(state, JOB).after.items()) == bits(plain.after.items())


def test_frozen_tensors_learn_again_after_a_fit_that_failed(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    state = moved(adapted.initial)
    plain = learner(adapted).fit(state, JOB)
    frozen = adapted.spec.matching(["*.A"])
    with pytest.raises(FederationError, match=r"training, round 1, partition 0: expected a finite loss, found"):
        learner(adapted, learning_rate=1e30, max_gradient_norm=0).fit(state, replace(JOB, frozen=frozen))
    assert bits(learner(adapted).fit(state, JOB).after.items()) == bits(plain.after.items())


def test_a_step_of_adamw_by_hand(tiny_model: Path) -> None:
    """The first step of Adam is the learning rate times the gradient's sign; the head has a rate of its own."""
    adapted = tiny.load(tiny_model, "lora")
    settings = {"steps": 1, "learning_rate": 1e-3, "head_learning_rate": 1e-2, "warmup_fraction": 0.0}
    fitted = learner(adapted, max_gradient_norm=0.0, **settings).fit(moved(adapted.initial), JOB)
    for key, value in delta(fitted).items():
        scale = 5 / 3 if key.endswith(".B") else 1.0
        expected = scale * (1e-2 if key.startswith("classifier") else 1e-3)
        assert np.median(np.abs(value)) == pytest.approx(expected, rel=1e-2), key
    assert fitted.metrics["learning_rate"] == 1e-3


def test_counts_loss_and_position(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    examples = some(10, length=6)
    fitted = learner(adapted, examples, steps=3, batch_size=4, accumulation=2).fit(
        adapted.initial, replace(JOB, position=7)
    )
    # Six batches from number 7 on: an epoch is of 4, 4 and 2, in an order of its own.
    sizes = [len(batch) for batch in islice(batches_from(examples, 4, 0, 0, 7), 6)]
    assert fitted.examples == sum(sizes) == 20
    assert fitted.tokens == 6 * 20
    assert fitted.position == 13
    assert math.isfinite(fitted.metrics["loss"])


def test_the_loss_that_is_reported_is_the_mean_over_batches(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    examples = some(4, length=6)
    fitted = learner(adapted, examples, steps=1, batch_size=4, learning_rate=1e-30).fit(adapted.initial, JOB)
    install(adapted, adapted.initial)
    assert fitted.metrics["loss"] == pytest.approx(evaluate(adapted, TASK, examples, 8)["loss"], rel=1e-5)


def test_training_lowers_the_loss(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    examples = some(12)
    one = learner(adapted, examples, steps=30, batch_size=12)
    before = one.evaluate(adapted.initial)
    fitted = one.fit(adapted.initial, JOB)
    after = one.evaluate(AdapterState(adapted.spec, fitted.after))
    assert after["loss"] < 0.7 * before["loss"]
    assert after["rows"] == 12
    assert "groups" not in after


def test_two_halves_of_a_batch_are_the_batch(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    examples = some(16, length=6)
    whole = learner(adapted, examples, batch_size=16, accumulation=1).fit(moved(adapted.initial), JOB)
    halves = learner(adapted, examples, batch_size=8, accumulation=2).fit(moved(adapted.initial), JOB)
    assert (whole.examples, halves.examples) == (48, 48)
    for key, value in whole.after.items():
        np.testing.assert_allclose(halves.after[key], value, atol=2e-4)
    assert halves.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)


def test_proximal_pulls_towards_the_start(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    state = moved(adapted.initial)
    sizes = [
        size(learner(adapted, steps=20, proximal=mu, max_gradient_norm=0.0).fit(state, JOB)) for mu in (0.0, 1.0, 100.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    # At the start there is nothing to pull: the first step is the same.
    one = [learner(adapted, steps=1, proximal=mu).fit(state, JOB) for mu in (0.0, 100.0)]
    assert bits(one[0].after.items()) == bits(one[1].after.items())


def test_gradient_clipping_bounds_what_adam_sees(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    plain = learner(adapted, max_gradient_norm=0.0).fit(adapted.initial, JOB)
    loose = learner(adapted, max_gradient_norm=1e9).fit(adapted.initial, JOB)
    tight = learner(adapted, max_gradient_norm=1e-9).fit(adapted.initial, JOB)
    assert bits(plain.after.items()) == bits(loose.after.items())
    # Adam divides by the gradient's size, but for its epsilon of 1e-8, which now is the larger of the two.
    assert size(tight) < 0.2 * size(plain)


def test_weight_decay_shrinks(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    state = moved(adapted.initial)
    norms = []
    for decay in (0.0, 1.0):
        after = learner(adapted, steps=20, weight_decay=decay).fit(state, JOB).after
        norms.append(sum(float((value**2).sum()) for value in after.values()))
    assert norms[1] < norms[0]


FACTORS = [
    # steps, warm-up fraction, final fraction, expected by hand
    (10, 0.2, 0.1, {0: 0.5, 1: 1.0, 2: 1.0, 9: 0.1}),
    (5, 0.0, 0.0, {0: 1.0, 2: 0.5, 4: 0.0, 1: 0.5 + math.sqrt(2) / 4}),
    (5, 0.0, 1.0, {0: 1.0, 2: 1.0, 4: 1.0}),
    (4, 1.0, 0.1, {0: 0.25, 1: 0.5, 3: 1.0}),
    (1, 0.0, 0.1, {0: 1.0}),
    (2, 0.5, 0.1, {0: 1.0, 1: 1.0}),
]


@pytest.mark.parametrize(("steps", "warmup", "final", "expected"), FACTORS)
def test_learning_rates_by_hand(steps: int, warmup: float, final: float, expected: dict[int, float]) -> None:
    settings = TrainingConfig(warmup_fraction=warmup, final_fraction=final)
    for step, factor in expected.items():
        assert learning_rate_factor(settings, step, steps) == pytest.approx(factor, abs=1e-12)


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_learning_rates_rise_then_fall_within_their_bounds(steps: int, warmup: float, final: float) -> None:
    settings = TrainingConfig(warmup_fraction=warmup, final_fraction=final)
    factors = [learning_rate_factor(settings, step, steps) for step in range(steps)]
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(factors) <= 1.0
    assert min(factors) >= min(final, 1 / steps) - 1e-12


def test_the_schedule_goes_on_over_rounds(tiny_model: Path) -> None:
    """The rate reported by round r is that of the run's step r × steps - 1, wherever the client stands."""
    adapted = tiny.load(tiny_model)
    one = learner(adapted, some(4), steps=3, warmup_fraction=0.25, final_fraction=0.2)
    for round_ in (1, 2, 3, 4):
        found = one.fit(adapted.initial, replace(JOB, round=round_, position=3 * round_)).metrics["learning_rate"]
        expected = 0.05 * learning_rate_factor(one.settings, 3 * round_ - 1, 12)
        assert found == pytest.approx(expected, rel=1e-12)
    assert found == pytest.approx(0.05 * 0.2)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 3), st.integers(0, 40))
def test_batches_cover_every_example_once_an_epoch_and_go_on_anywhere(
    count: int, batch_size: int, partition: int, position: int
) -> None:
    examples = tuple(Example((7,) * (1 + at % 5), at, "") for at in range(count))
    per_epoch = math.ceil(count / batch_size)
    run = list(islice(batches_from(examples, batch_size, 3, partition, 0), position + 2 * per_epoch))
    for epoch in range(2):
        of_epoch = run[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(example for batch in of_epoch for example in batch) == Counter(examples)
        assert sorted(len(batch) for batch in of_epoch)[1:] == [batch_size] * (per_epoch - 1)
    assert list(islice(batches_from(examples, batch_size, 3, partition, position), 2 * per_epoch)) == run[position:]


def test_epochs_and_sites_have_orders_of_their_own() -> None:
    examples = tuple(Example((7,), at, "") for at in range(24))
    epochs = [list(islice(batches_from(examples, 4, 0, 0, 6 * epoch), 6)) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(islice(batches_from(examples, 4, 0, 1, 0), 6)) != epochs[0]
    assert list(islice(batches_from(examples, 4, 1, 0, 0), 6)) != epochs[0]


def test_a_batch_holds_texts_of_like_length() -> None:
    examples = some(64)
    spread = [
        max(len(example.tokens) for example in batch) - min(len(example.tokens) for example in batch)
        for batch in islice(batches_from(examples, 8, 0, 0, 0), 8)
    ]
    assert np.mean(spread) < 2


def test_evaluation_is_over_all_and_over_each_group(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    examples = some(11)
    found = evaluate(adapted, TASK, examples, 3)
    assert found["rows"] == 11
    assert {name: group["rows"] for name, group in found["groups"].items()} == {"a": 6, "b": 5}
    assert found["loss"] == pytest.approx((6 * found["groups"]["a"]["loss"] + 5 * found["groups"]["b"]["loss"]) / 11)
    whole = evaluate(adapted, TASK, examples, 64)
    assert whole["accuracy"] == found["accuracy"]
    assert whole["loss"] == pytest.approx(found["loss"], rel=1e-5)
    turned = evaluate(adapted, TASK, examples[::-1], 3)
    assert turned["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert evaluate(adapted, TASK, [replace(example, group="") for example in examples], 3)["groups"] == {}


def test_no_rows_to_evaluate_is_one_sentence(tiny_model: Path) -> None:
    with pytest.raises(DataError, match="evaluation: expected at least one row, found none"):
        evaluate(tiny.load(tiny_model), TASK, (), 3)


def test_threads() -> None:
    use_threads(2)
    assert torch.get_num_threads() == 2
    use_threads(0)
    assert torch.get_num_threads() == 2
    use_threads(1)
    assert torch.get_num_threads() == 1


def test_the_control_variate_is_the_mean_gradient_before_correction(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, "lora")
    examples = some(4, length=6)
    zeros = {key: np.zeros(shape, np.float32) for key, shape in adapted.spec.shapes.items()}
    still = learner(adapted, examples, steps=1).fit(adapted.initial, replace(JOB, correction=zeros))
    install(adapted, adapted.initial)
    batch = TASK.collate(next(batches_from(examples, 4, 0, 0, 0)), 0, adapted.device)
    parameters = [adapted.bindings[key].parameter for key in adapted.spec.shapes]
    adapted.model.train()
    expected = torch.autograd.grad(TASK.loss(adapted.model, batch), parameters)
    for key, gradient in zip(adapted.spec.shapes, expected, strict=True):
        np.testing.assert_allclose(still.gradients[key], gradient.numpy(), atol=1e-6)
    strong = {key: np.full(shape, 1e6, np.float32) for key, shape in adapted.spec.shapes.items()}
    pushed = learner(adapted, examples, steps=1, max_gradient_norm=0.0).fit(
        adapted.initial, replace(JOB, correction=strong)
    )
    assert bits(pushed.gradients.items()) == bits(still.gradients.items())
    assert all((value < 0).all() for value in delta(pushed).values()), "a correction is added to the gradient"


def test_a_zero_correction_changes_no_bit(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model, "lora")
    zeros = {key: np.zeros(shape, np.float32) for key, shape in adapted.spec.shapes.items()}
    plain = learner(adapted).fit(adapted.initial, JOB)
    corrected = learner(adapted).fit(adapted.initial, replace(JOB, correction=zeros))
    assert bits(plain.after.items()) == bits(corrected.after.items())


def test_the_pruning_penalty_is_its_own_gradient(tiny_model: Path) -> None:
    pruning = Pruning(keep=0.5, penalty=0.3)
    a = torch.nn.Parameter(torch.tensor(rng(1, "a").standard_normal((4, 5)), dtype=torch.float32))
    b = torch.nn.Parameter(torch.tensor(rng(2, "b").standard_normal((6, 4)), dtype=torch.float32))
    expected = torch.autograd.grad(pruning.penalty * a[2:].norm() * b[:, 2:].norm(), [a, b])
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    corrections.shrink_tails({"layer.A": a, "layer.B": b}, pruning)
    torch.testing.assert_close(a.grad, expected[0])
    torch.testing.assert_close(b.grad, expected[1])
    adapted = tiny.load(tiny_model, "lora")
    start = moved(adapted.initial)
    weak, strong = (
        learner(adapted).fit(start, replace(JOB, pruning=Pruning(0.5, penalty))).after for penalty in (0.0, 1e3)
    )
    assert tail(adapted.spec, strong, pruning) < tail(adapted.spec, weak, pruning)
    assert pruned_spec(adapted.spec, start.tensors, strong, pruning).modules[0].rank <= adapted.spec.modules[0].rank


def private(adapted: AdaptedModel, examples: tuple[Example, ...] = (), **fields: Any) -> TorchLearner:
    settings = {key: fields.pop(key) for key in list(fields) if hasattr(SETTINGS, key)}
    protection = ExamplePrivacy(**{"clip_norm": 1.0, "noise_multiplier": 1.0, "entropy": "seed", **fields})
    return replace(learner(adapted, examples, **settings), private=protection)


@families
def test_private_training_moves_the_adapter_and_leaves_plain_training_as_it_was(tiny_model: Path, family: str) -> None:
    adapted = tiny.load(tiny_model, family)
    plain = learner(adapted).fit(adapted.initial, JOB)
    held = {id(binding.parameter) for binding in adapted.bindings.values()}
    frozen = [(name, p) for name, p in adapted.model.named_parameters() if id(p) not in held]
    before = bits(frozen)
    fitted = private(adapted, entropy="os").fit(adapted.initial, JOB)
    assert bits(frozen) == before
    assert all(np.abs(value).max() > 0 for value in delta(fitted).values())
    again = learner(adapted).fit(adapted.initial, JOB)
    assert bits(again.after.items()) == bits(plain.after.items())
    assert again.metrics == plain.metrics


def test_private_training_with_a_wide_clip_and_no_noise_is_plain_training(tiny_model: Path) -> None:
    """Where all texts are of one batch; the optimiser, the schedule and the proximal term are those of plain steps."""
    adapted = tiny.load(tiny_model)
    more = {"steps": 4, "batch_size": 2, "accumulation": 4, "proximal": 0.3, "weight_decay": 0.1}
    examples = some(8, length=6)
    plain = learner(adapted, examples, **more).fit(moved(adapted.initial), JOB)
    for sampler in ("shuffled", "poisson"):
        wide = private(adapted, examples, clip_norm=1e6, noise_multiplier=0.0, sampler=sampler, **more)
        fitted = wide.fit(moved(adapted.initial), JOB)
        for key, value in plain.after.items():
            np.testing.assert_allclose(fitted.after[key], value, atol=2e-4)
        assert fitted.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-3)
        assert fitted.metrics["clipped_examples"] == 0
        assert (fitted.examples, fitted.position) == (plain.examples, plain.position) == (32, 16)


def test_private_training_repeats_by_its_seed_and_never_by_the_systems_entropy(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    first, again = (private(adapted).fit(adapted.initial, JOB) for _ in range(2))
    assert bits(first.after.items()) == bits(again.after.items())
    others = [
        private(adapted, entropy="os").fit(adapted.initial, JOB),
        private(adapted, entropy="os").fit(adapted.initial, JOB),
        private(adapted).fit(adapted.initial, replace(JOB, partition=1)),
        private(adapted).fit(adapted.initial, replace(JOB, round=2)),
        replace(private(adapted), seed=1).fit(adapted.initial, JOB),
    ]
    assert len({str(bits(one.after.items())) for one in (first, *others)}) == 6


def test_a_private_client_tells_the_expected_number_of_examples_and_not_the_one_drawn(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    examples = some(20)
    fits = [replace(private(adapted, examples), seed=seed).fit(adapted.initial, JOB) for seed in range(4)]
    assert {one.examples for one in fits} == {12}
    assert len({one.tokens for one in fits}) > 1
    few = private(adapted, some(3), batch_size=4).fit(adapted.initial, JOB)
    assert few.examples == 9


def test_a_round_in_which_nothing_was_drawn_is_noise(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    examples = some(400)
    rare = private(adapted, examples, steps=1, batch_size=1)
    found = [replace(rare, seed=seed).fit(adapted.initial, JOB) for seed in range(12)]
    empty = [one for one in found if "loss" not in one.metrics]
    assert 0 < len(empty) < 12
    for one in empty:
        assert one.tokens == 0
        assert one.metrics.keys() == {"learning_rate"}
        assert size(one) > 0


def test_a_loss_that_is_not_finite_ends_no_private_round(tiny_model: Path) -> None:
    """To fail would tell of the example, so the client goes on; what it cannot tell it leaves out."""
    adapted = tiny.load(tiny_model)
    broken = TASK._replace(losses=lambda model, batch: TASK.losses(model, batch) * _BROKEN[0])  # type: ignore[misc]
    one = replace(private(adapted, sampler="shuffled"), task=broken)
    one.fit(adapted.initial, JOB)
    _BROKEN[0] = math.nan
    try:
        fitted = one.fit(adapted.initial, JOB)
    finally:
        _BROKEN[0] = 1.0
    assert fitted.metrics["clipped_examples"] == 1
    assert "loss" not in fitted.metrics
    assert all(np.isfinite(value).all() for value in fitted.after.values())


_BROKEN = [1.0]
"""What the losses of the task above are multiplied by."""


def test_frozen_tensors_stay_in_private_training(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    frozen = adapted.spec.matching(["*.A"])
    fitted = private(adapted).fit(moved(adapted.initial), replace(JOB, frozen=frozen))
    for key, value in delta(fitted).items():
        assert (np.abs(value).max() == 0) == (key in frozen), key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"correction": {"classifier.bias": np.zeros(3, np.float32)}}, r"training\.scaffold"),
        ({"pruning": Pruning(0.5, 0.1)}, "a rule that prunes ranks"),
    ],
)
def test_private_training_is_refused_where_more_would_be_told(
    tiny_model: Path, change: dict[str, Any], words: str
) -> None:
    adapted = tiny.load(tiny_model)
    with pytest.raises(PlanError, match=words):
        private(adapted).fit(adapted.initial, replace(JOB, **change))


def test_private_training_learns(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    examples = some(60)
    one = private(adapted, examples, steps=40, batch_size=30, noise_multiplier=0.3)
    before = one.evaluate(adapted.initial)
    after = one.evaluate(AdapterState(adapted.spec, one.fit(adapted.initial, JOB).after))
    assert after["loss"] < 0.9 * before["loss"]


def test_the_way_is_said_once_in_the_log(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapted = tiny.load(tiny_model)
    with caplog.at_level("INFO", logger="fedpeft"):
        for _ in range(2):
            private(adapted).fit(adapted.initial, JOB)
    assert [one.message for one in caplog.records] == [
        "the gradients of single examples are taken for all rows at once in the adapter's layers"
    ]


def test_memory_of_private_training_counts_a_gradient_for_each_example(tiny_model: Path) -> None:
    adapted = tiny.load(tiny_model)
    plain, protected = (fit_memory_bytes(one) for one in (learner(adapted), private(adapted)))
    assert protected - plain == 4 * 4 * adapted.spec.parameters
