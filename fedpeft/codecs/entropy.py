"""The end of a coded payload: a checksum, and fewer bytes where they repeat themselves."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import zstandard

from fedpeft.errors import PacketError, sentence

CHECK_BYTES = 4
"""The length of the checksum: a rounded number shows no sign of a bit that was flipped on its way."""

_STORED, _SQUEEZED = b"\x00", b"\x01"


class Entropy(NamedTuple):
    """`pack(bytes) -> bytes` and `unpack(bytes, length) -> bytes`, where `length` is that of the bytes packed.

    `size(length)` bounds the packed length.
    """

    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes, int], bytes]
    size: Callable[[int], int]


def stored() -> Entropy:
    """The bytes as they are."""

    def unpack(data: bytes, length: int) -> bytes:
        if len(data) != length:
            raise _refused(f"{length} bytes", f"{len(data)} bytes")
        return data

    return Entropy(lambda data: data, unpack, lambda length: length)


def zstd(level: int) -> Entropy:
    """The bytes as a frame of Zstandard, or as they are where that is no shorter; one byte more says which."""

    def pack(data: bytes) -> bytes:
        squeezed = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(data)
        return _SQUEEZED + squeezed if len(squeezed) < len(data) else _STORED + data

    def unpack(data: bytes, length: int) -> bytes:
        mark, rest = data[:1], data[1:]
        if mark == _STORED and len(rest) == length:
            return rest
        if mark != _SQUEEZED:
            raise _refused(f"{length} bytes, stored or squeezed", f"{len(data)} bytes that begin with {mark.hex()!r}")
        return _unsqueezed(rest, length)

    return Entropy(pack, unpack, lambda length: 1 + length)


def sealed(data: bytes) -> bytes:
    """The bytes and their CRC-32."""
    return data + zlib.crc32(data).to_bytes(CHECK_BYTES, "little")


def opened(data: bytes) -> bytes:
    """The bytes without their CRC-32.

    Raises:
        PacketError: it is that of other bytes.
    """
    body, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
    if zlib.crc32(body).to_bytes(CHECK_BYTES, "little") != check:
        raise _refused("bytes that agree with their checksum", "others")
    return body


def _unsqueezed(data: bytes, length: int) -> bytes:
    """The `length` bytes in a frame; what the frame says of itself is read before anything is made room for."""
    try:
        found = zstandard.get_frame_parameters(data)
        if found.content_size != length or found.dict_id:
            raise _refused(f"a frame of {length} bytes", f"one of {found.content_size}")
        reader = zstandard.ZstdDecompressor(max_window_size=max(length, 1 << zstandard.WINDOWLOG_MIN))
        raw = reader.decompress(data, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _refused(f"a frame of {length} bytes", f"one that cannot be read ({error})") from error
    if len(raw) != length:
        raise _refused(f"a frame of {length} bytes", f"one of {len(raw)}")
    return raw


def _refused(expected: str, found: str) -> PacketError:
    remedy = "send it again, or use the same codec settings on both sides"
    return PacketError(sentence("coded payload", expected=expected, found=found, remedy=remedy))
