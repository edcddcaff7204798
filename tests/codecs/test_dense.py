import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters import AdapterSpec
from fedpeft.codecs import dense
from fedpeft.errors import PacketError
from tests.adapters.test_spec import specs
from tests.toys import SPEC, numbers


@given(specs, st.data())
def test_decode_undoes_encode_to_the_bit(spec: AdapterSpec, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=4 * spec.parameters, max_size=4 * spec.parameters))
    codec = dense()
    tensors = codec.decode(raw, spec)
    assert {key: value.shape for key, value in tensors.items()} == spec.shapes
    assert codec.encode(tensors, spec) == raw
    assert len(raw) == codec.size(spec)


def test_bytes_are_little_endian_in_order_of_key() -> None:
    raw = dense().encode(dict(reversed(numbers(1.0, -2.0, 0.5).items())), SPEC)
    assert raw.hex() == "0000803f" + "000000c0" + "0000003f"


def test_what_is_decoded_may_be_written_to() -> None:
    raw = dense().encode(numbers(1, 2, 3), SPEC)
    tensors = dense().decode(raw, SPEC)
    tensors["layer.A"] += 1
    assert dense().encode(numbers(1, 2, 3), SPEC) == raw
    assert dense().decode(raw, SPEC)["layer.A"] == [[2.0]]


def test_big_endian_and_strided_arrays_are_encoded_by_value() -> None:
    odd = {key: np.repeat(value, 2, axis=0)[::2].astype(">f4") for key, value in numbers(1, 2, 3).items()}
    assert dense().encode(odd, SPEC) == dense().encode(numbers(1, 2, 3), SPEC)


@pytest.mark.parametrize("size", [0, 1, 11, 13, 24])
def test_payload_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(PacketError, match=f"expected 12 bytes for 3 parameters, found {size} bytes"):
        dense().decode(bytes(size), SPEC)
