import numpy as np
import pytest

from fedpeft.adapters import AdapterSpec, ModuleSpec, norm
from fedpeft.codecs import coded, low_rank, top_k

SPEC = AdapterSpec("base", "lora", (ModuleSpec("layer", "lora", 4, 1.0, (("A", (4, 10)), ("B", (6, 4)))),))


def test_the_greatest_of_all_tensors_are_kept_and_of_equal_ones_the_first() -> None:
    a, b = np.full((4, 10), 2, np.float32), np.ones((6, 4), np.float32)
    a[3, 9], b[5, 3] = -9, 5
    codec = coded(top_k(5 / 64))
    found = codec.decode(codec.encode({"layer.A": a, "layer.B": b}, SPEC), SPEC)
    assert found["layer.A"].ravel()[:4].tolist() == [2, 2, 2, 0]
    assert (found["layer.A"][3, 9], found["layer.B"][5, 3]) == (-9, 5)
    assert sum(int(np.count_nonzero(value)) for value in found.values()) == 5


@pytest.mark.parametrize(("share", "kept"), [(1e-9, 1), (0.01, 1), (0.02, 2), (0.5, 32), (1.0, 64)])
def test_a_share_is_rounded_up_and_is_never_nothing(share: float, kept: int) -> None:
    assert top_k(share).sizes(SPEC.shapes)[1] == kept


def test_places_take_a_bit_each_or_a_number_for_each_that_is_kept() -> None:
    assert top_k(1 / 64).sizes(SPEC.shapes) == (1, 1)  # six bits
    assert top_k(0.5).sizes(SPEC.shapes) == (8, 32)  # 64 bits against 32 × 6


def test_a_matrix_of_the_rank_comes_back_and_of_others_the_nearest() -> None:
    random = np.random.default_rng(0)
    thin = (random.standard_normal((4, 2)) @ random.standard_normal((2, 10))).astype(np.float32)
    b = random.standard_normal((6, 4)).astype(np.float32)
    codec = coded(low_rank(2))
    found = codec.decode(codec.encode({"layer.A": thin, "layer.B": b}, SPEC), SPEC)
    assert np.allclose(found["layer.A"], thin, atol=1e-5)
    tail = np.linalg.svd(b.astype(np.float64), compute_uv=False)[2:]
    assert norm({"B": b - found["layer.B"]}) == pytest.approx(float(np.linalg.norm(tail)), rel=1e-4)


def test_what_gains_nothing_by_factors_stays_whole() -> None:
    # Of (4, 10) and (6, 4) two columns and rows are 28 and 20 numbers, three 42 and 30: more than 40 and 24.
    assert low_rank(2).sizes(SPEC.shapes) == (0, 28 + 20)
    assert low_rank(3).sizes(SPEC.shapes) == (0, 40 + 24)
    vectors = {"l": (9,), "kernel": (2, 3, 4)}
    assert low_rank(1).sizes(vectors) == (0, 9 + 24)
