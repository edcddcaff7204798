import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.codecs import bf16, steps
from fedpeft.codecs.packing import pack, pack_places, packed_bytes, per_byte, places_bytes, unpack, unpack_places
from fedpeft.errors import PacketError

RADIXES = [2, 3, 4, 16, 256]


@pytest.mark.parametrize("radix", RADIXES)
@given(st.data())
def test_digits_come_back(radix: int, data: st.DataObject) -> None:
    digits = np.array(data.draw(st.lists(st.integers(0, radix - 1), max_size=40)), np.uint8)
    packed = pack(digits, radix)
    assert len(packed) == packed_bytes(len(digits), radix)
    assert np.array_equal(unpack(packed, len(digits), radix), digits)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=60))))
def test_places_come_back_in_the_shorter_of_two_forms(drawn: tuple[int, set[int]]) -> None:
    count, chosen = drawn
    places = np.array(sorted(chosen), np.int64)
    packed = pack_places(places, count)
    assert len(packed) == places_bytes(len(places), count) <= -(-count // 8)
    assert np.array_equal(unpack_places(packed, len(places), count), places)


def test_digits_fill_a_byte_from_its_lowest_place() -> None:
    assert [per_byte(radix) for radix in RADIXES] == [8, 5, 4, 2, 1]
    assert pack(np.array([1, 2, 3], np.uint8), 16) == bytes([0x21, 0x03])
    assert pack(np.array([2, 1, 0, 0, 2], np.uint8), 3) == bytes([2 + 3 + 2 * 81])


@pytest.mark.parametrize(
    ("data", "count", "radix"), [(b"\xf3", 5, 3), (b"\x10", 1, 16), (b"\x04", 2, 2), (bytes([81]), 4, 3)]
)
def test_bytes_that_no_digits_make_are_refused(data: bytes, count: int, radix: int) -> None:
    with pytest.raises(PacketError, match=f"expected {count} digits of radix {radix} and zeros after them"):
        unpack(data, count, radix)


@pytest.mark.parametrize(
    ("data", "kept", "count"),
    [
        (b"\x07", 2, 8),  # a bit for each of eight: three are set
        (b"\x00", 2, 8),
        (bytes([5, 5]), 2, 256),  # one place twice
        (bytes([6, 5]), 2, 256),
        (bytes([200]), 1, 150),
    ],
)
def test_places_that_are_too_many_or_out_of_order_or_range_are_refused(data: bytes, kept: int, count: int) -> None:
    with pytest.raises(PacketError, match=f"expected {kept} places below {count} in ascending order"):
        unpack_places(data, kept, count)


def test_a_block_is_a_step_and_its_digits() -> None:
    # The greatest is 7 and half of 14 is 7, so the step is 1 (0x3f80) and the digits are 7 + x, 3.5 being tied up.
    rounding = steps(15, 4, "nearest")
    data = rounding.encode(np.array([-7, 0, 3.5, 7, 0.25], np.float32), None)
    # Of the second block the step is 0.25 / 7 = 0x3d124925, which is rounded up.
    assert data.hex() == "803f" + "133d" + "70" + "eb" + "0e"
    assert rounding.decode(data, 5).tolist() == [-7, 0, 4, 7, pytest.approx(0.25, rel=2**-7)]


def test_four_steps_have_no_zero_and_three_have() -> None:
    values = np.array([3, 0.9, -0.9, -3], np.float32)
    four, three = steps(4, 4, "nearest"), steps(3, 4, "nearest")
    assert four.decode(four.encode(values, None), 4).tolist() == [3, 1, -1, -3]
    assert three.decode(three.encode(values, None), 4).tolist() == [3, 0, 0, -3]


@pytest.mark.parametrize("bits", [b"\x80\x7f", b"\xc0\x7f", b"\x80\xbf"])
def test_a_step_that_is_infinite_or_no_number_or_negative_is_refused(bits: bytes) -> None:
    with pytest.raises(PacketError, match="expected finite steps of at least 0 and digits below 15"):
        steps(15, 4, "nearest").decode(bits + b"\x77\x77", 4)


@pytest.mark.parametrize(("levels", "digit"), [(15, 15), (255, 255)])
def test_a_digit_above_the_levels_is_refused(levels: int, digit: int) -> None:
    with pytest.raises(PacketError, match=f"digits below {levels}"):
        steps(levels, 4, "nearest").decode(b"\x80\x3f" + bytes([digit]), 1)


@given(st.floats(-(2.0**120), 2.0**120, width=32))
def test_a_bfloat16_is_the_nearest_one(value: float) -> None:
    rounding = bf16()
    found = float(rounding.decode(rounding.encode(np.array([value], np.float32), None), 1)[0])
    near = np.array([value], np.float32).view(np.uint32) >> 16 << 16
    around = [float((near + (step << 16)).astype(np.uint32).view(np.float32)[0]) for step in (0, 1)]
    assert found in around
    assert abs(found - value) == min(abs(one - value) for one in around)


def test_of_two_bfloat16_equally_near_it_is_the_even_one() -> None:
    values = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)
    assert bf16().encode(values, None).hex() == "803f" + "823f"
