from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import PacketError
from fedpeft.privacy.secure import packing
from fedpeft.privacy.secure.packing import pack, size_bytes, unpack, word


def test_integers_lie_side_by_side_the_lowest_bits_first() -> None:
    # 1, 2, 3 in four bits each: 0x21, 0x03. In nine bits: 1 | 2 << 9 | 3 << 18 = 0x0c0401.
    assert pack(np.array([1, 2, 3], np.uint32), 4) == bytes([0x21, 0x03])
    assert pack(np.array([1, 2, 3], np.uint32), 9) == (0x0C0401).to_bytes(4, "little")


@given(st.data(), st.integers(1, 62), st.integers(0, 300))
def test_what_is_packed_is_unpacked(data: st.DataObject, width: int, count: int) -> None:
    found = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=count, max_size=count))
    values = np.array(found, word(width))
    packed = pack(values, width)
    assert len(packed) == size_bytes(count, width) == -(-count * width // 8)
    assert unpack(packed, count, width).tolist() == found
    assert unpack(packed, count, width).dtype == word(width)
    # Independent of the code: the bytes are the integers' digits in base 2^width.
    assert int.from_bytes(packed, "little") == sum(value << (at * width) for at, value in enumerate(found))


@pytest.mark.parametrize("width", [1, 7, 22, 32, 33, 62])
def test_a_long_input_is_packed_in_blocks_that_join(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2**width, 3 * 128 + 5, np.uint64).astype(word(width))
    whole = pack(values, width)
    monkeypatch.setattr(packing, "_BLOCK", 128)
    assert pack(values, width) == whole
    assert (unpack(whole, len(values), width) == values).all()


def test_bits_above_the_width_are_left_out() -> None:
    assert pack(np.array([0x1F, 0x20], np.uint64), 4) == bytes([0x0F])


def test_bytes_of_another_length_are_refused() -> None:
    for data in (b"", bytes(3), bytes(5)):
        with pytest.raises(PacketError, match="expected 4 bytes for 3 integers of 9 bits"):
            unpack(data, 3, 9)


def test_a_bit_after_the_last_integer_is_refused() -> None:
    assert unpack(bytes([0xFF, 0x0F]), 3, 4).tolist() == [15, 15, 15]
    with pytest.raises(PacketError, match="zeros after the last integer"):
        unpack(bytes([0xFF, 0x1F]), 3, 4)
