"""Words that are planted in gradients are found where they can be, and not where there are too many of them."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.privacy import spans
from simulations.privacy.inputs import Inputs

WORDS, WIDTH = 300, 48
RANDOM = np.random.default_rng(0)
# Inputs of unlike size in unlike directions, with a direction that all have: what a real vocabulary looks like.
INPUTS = (RANDOM.standard_normal((WORDS, WIDTH)) * np.linspace(0.2, 3, WIDTH) + 1.5).astype(np.float32)
WHITENING = Inputs((), WORDS, 1, lambda _: INPUTS).whitening()


def gradients(words: list[int], rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """∇A, ∇B and A of a layer W + B A through which these words went, with what came back drawn by chance."""
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((rank, WIDTH)), random.standard_normal((32, rank))
    back, went = random.standard_normal((len(words), 32)), INPUTS[words]
    return (back @ b).T @ went, back.T @ (went @ a.T), a


def found(evidence: list[spans.Evidence], count: int) -> tuple[set[int], np.ndarray]:
    (scores,) = spans.search([evidence], lambda _: INPUTS @ WHITENING, 1, [count])
    return set(np.flatnonzero(scores > 1).tolist()), scores


def test_words_fewer_than_ranks_are_found_exactly_in_the_gradient_of_a() -> None:
    planted = [3, 50, 77, 120, 299]
    of_a, _, _ = gradients(planted, rank=8)
    picked, scores = found([spans.of_a([of_a.astype(np.float32)], WHITENING)], 20)
    assert picked == set(planted)
    span = spans.span_scores(
        [spans.of_a([of_a.astype(np.float32)], WHITENING).seen(INPUTS @ WHITENING)],
        [np.linalg.svd(of_a @ WHITENING, full_matrices=False)[2][:5]],
    )
    assert span[planted].min() > 0.999
    assert np.delete(span, planted).max() < 0.9
    assert scores.argmax() in planted


def test_words_more_than_ranks_are_found_in_the_gradient_of_a_by_pursuit() -> None:
    planted = list(range(0, 280, 20))  # 14 words, 8 rows
    of_a, _, _ = gradients(planted, rank=8)
    picked, _ = found([spans.of_a([of_a.astype(np.float32)], WHITENING)], len(planted))
    assert picked == set(planted)


def test_modules_that_read_the_same_input_give_their_rows_together() -> None:
    planted = list(range(5, 300, 11))  # 27 words: too many for one row, not for 8
    parts = [gradients(planted, rank=1, seed=seed)[0].astype(np.float32) for seed in range(8)]
    alone, _ = found([spans.of_a(parts[:1], WHITENING)], len(planted))
    together, _ = found([spans.of_a(parts, WHITENING)], len(planted))
    assert len(together & set(planted)) > 24
    assert len(alone & set(planted)) < 18


def test_words_fewer_than_ranks_are_found_exactly_in_the_gradient_of_b() -> None:
    planted = [3, 50, 77, 120, 299]
    _, of_b, a = gradients(planted, rank=12)
    picked, _ = found([spans.of_b(of_b, a, WHITENING)], 20)
    assert picked == set(planted)


def test_the_gradient_of_b_says_nothing_of_words_more_than_ranks() -> None:
    planted = list(range(0, 280, 14))  # 20 words, 12 ranks
    _, of_b, a = gradients(planted, rank=12)
    evidence = [spans.of_b(of_b, a, WHITENING)]
    picked, scores = found(evidence, 20)
    assert len(picked & set(planted)) < 6
    assert np.delete(scores, list(picked)).max() == 0.0


def test_noise_hides_the_words() -> None:
    planted = [3, 50, 77, 120, 299]
    of_a, _, _ = gradients(planted, rank=8)
    noise = 20 * np.linalg.norm(of_a) / np.sqrt(of_a.size) * np.random.default_rng(1).standard_normal(of_a.shape)
    picked, _ = found([spans.of_a([(of_a + noise).astype(np.float32)], WHITENING)], 5)
    assert not picked & set(planted)


@pytest.mark.parametrize("rows", [np.zeros((4, WIDTH), np.float32), np.eye(WIDTH, dtype=np.float32)])
def test_an_update_of_nothing_or_of_everything_points_to_no_word(rows: np.ndarray) -> None:
    picked, scores = found([spans.Evidence(rows)], 0)
    assert not picked
    assert not scores.any()


def test_whitened_inputs_have_second_moments_near_the_identity() -> None:
    white = INPUTS @ WHITENING
    moments = white.T @ white / len(white)
    assert np.linalg.cond(INPUTS.T @ INPUTS) > 50 * np.linalg.cond(moments)
    assert 0.7 < np.trace(moments) / WIDTH <= 1.0
