import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedpeft.files import encode_tensors, read_tensors, write_atomically

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=4)
fields = st.dictionaries(st.text(max_size=4), plain | st.lists(plain, max_size=2), max_size=3)
tensors = st.dictionaries(
    st.text("ab./", min_size=1, max_size=5),
    arrays.arrays(
        st.sampled_from([np.float32, np.float64, np.int64]), arrays.array_shapes(min_dims=0, max_dims=3, max_side=3)
    ),
    max_size=3,
)


@given(tensors, fields)
def test_tensors_and_fields_come_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, np.ndarray], fields: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "law.safetensors"
    write_atomically(path, encode_tensors(tensors, fields))
    found, back = read_tensors(path)
    assert back == fields
    assert {key: (v.dtype, v.shape, v.tobytes()) for key, v in found.items()} == {
        key: (v.dtype, v.shape, v.tobytes()) for key, v in tensors.items()
    }


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    data = encode_tensors({"a": np.arange(3, dtype=np.float32)}, {"position": 7, "name": "x"})
    path = tmp_path / "file"
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"."):
            read_tensors(path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"."):
            read_tensors(path)


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_is_replaced_whole_with_the_permissions_asked_for(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"long before")
    write_atomically(path, b"after", mode)
    with path.open("rb") as reader:
        write_atomically(path, b"last", mode)
        assert reader.read() == b"after"
    assert path.read_bytes() == b"last"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "inside").touch()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", b"x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(OSError, match="inside"):
        write_atomically(tmp_path / "taken" / "inside" / "file", b"x")
