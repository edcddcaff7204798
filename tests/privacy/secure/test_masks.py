from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedpeft.privacy.secure import masks
from fedpeft.privacy.secure.masks import summed
from fedpeft.privacy.secure.packing import top, word

ONE, OTHER = b"\x01" * 32, b"\x02" * 32


@pytest.mark.parametrize(("width", "kind"), [(20, "<u4"), (32, "<u4"), (33, "<u8"), (62, "<u8")])
def test_a_mask_is_aes_256_in_counter_mode_read_as_words(width: int, kind: str) -> None:
    count = 2**18 // 4 + 77
    stream = Cipher(algorithms.AES256(ONE), modes.CTR(bytes(16))).encryptor().update(bytes(8 * count))
    expected = np.frombuffer(stream, kind, count) & np.dtype(kind).type(2**width - 1)
    found = summed(count, width, [ONE])
    assert found.dtype == word(width)
    assert (found == expected).all()


@given(st.integers(2, 62), st.integers(1, 200))
def test_what_is_added_by_one_and_taken_by_another_cancels(width: int, count: int) -> None:
    ones, others = summed(count, width, [ONE]), summed(count, width, [OTHER])
    assert not (top(width) & (summed(count, width, [ONE, OTHER]) + summed(count, width, [], [ONE, OTHER]))).any()
    assert (summed(count, width, [ONE, OTHER]) == (ones + others) & top(width)).all()
    assert (summed(count, width, [ONE], [OTHER]) == (ones - others) & top(width)).all()
    assert int(ones.max()) < 2**width


def test_a_stream_goes_on_from_one_chunk_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = summed(1000, 40, [ONE], [OTHER])
    monkeypatch.setattr(masks, "_CHUNK_BYTES", 64)
    assert (summed(1000, 40, [ONE], [OTHER]) == whole).all()


def test_every_bit_of_a_mask_is_a_coin_toss() -> None:
    found = summed(200_000, 31, [ONE])
    for bit in range(31):
        heads = int(((found >> bit) & 1).sum())
        assert stats.binomtest(heads, len(found)).pvalue > 1e-6
    counts = np.bincount(found % 64, minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-6
