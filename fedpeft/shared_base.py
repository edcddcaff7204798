"""The numbers of a frozen base, in memory that several processes of one machine have between them.

They are in one file without a name, which every process maps: one descriptor, whatever the base has of tensors, and no
part of `/dev/shm`, which containers keep small. Each process may write to what it maps, and then has a copy of that
page alone, so nobody can disturb the others.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass

import torch

from fedpeft.models import AdaptedModel

_LEAST_BYTES = 4096
"""Smaller tensors stay each process's own: a page is not worth dividing."""

_ALIGNED = 64
"""Bytes at whose multiples tensors begin, as torch itself has them."""


@dataclass(frozen=True)
class Place:
    """Where one tensor of the base begins in the file, in bytes, and what it is like."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class SharedBase:
    """A file that holds a base, open as `descriptor`, and the places of the tensors in it: none of a base on a GPU."""

    descriptor: int
    places: tuple[Place, ...]
    size_bytes: int


def share(adapted: AdaptedModel) -> SharedBase:
    """A file with the base's frozen tensors, to which those of `adapted` have been moved."""
    places, offset = [], 0
    for name, tensor in _frozen(adapted).items():
        places.append(Place(name, offset, tuple(tensor.shape), tensor.dtype))
        offset += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    descriptor = _unnamed_file()
    found = _frozen(adapted)
    for place in places:
        content = memoryview(found[place.name].reshape(-1).view(torch.uint8).numpy().data)
        while content:
            content = content[os.pwrite(descriptor, content, place.offset + found[place.name].nbytes - len(content)) :]
    shared = SharedBase(descriptor, tuple(places), offset)
    adopt(adapted, shared)
    return shared


def adopt(adapted: AdaptedModel, shared: SharedBase) -> int:
    """The bytes of `adapted` that are those of the file from now on; it was loaded as the base in the file was."""
    if not shared.places:
        return 0
    os.ftruncate(shared.descriptor, shared.size_bytes)  # the last tensor need not fill its place
    mapped = mmap.mmap(
        shared.descriptor, shared.size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
    )
    own, moved = _frozen(adapted), 0
    for place in shared.places:
        tensor = own.get(place.name)
        if tensor is not None and (tuple(tensor.shape), tensor.dtype) == (place.shape, place.dtype):
            flat = torch.frombuffer(mapped, dtype=place.dtype, count=tensor.numel(), offset=place.offset)
            tensor.data = flat.view(place.shape)
            moved += tensor.nbytes
    return moved


def device_for(asked: str, worker: int) -> str:
    """The device of a worker: each has a GPU of its own as far as there are any, where the run is on a GPU at all."""
    there = torch.cuda.device_count() if asked in ("auto", "cuda") else 0
    return f"cuda:{worker % there}" if there else asked


def _frozen(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """The tensors of the base that can be shared, by name: plain, whole, in this machine's memory, never trained."""
    trained = {id(one) for binding in adapted.bindings.values() for one in binding.parameters}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in (*adapted.model.named_parameters(), *adapted.model.named_buffers()):
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if (
            plain
            and id(tensor) not in trained
            and not tensor.requires_grad
            and tensor.device.type == "cpu"
            and tensor.is_contiguous()
            and tensor.nbytes >= _LEAST_BYTES
        ):
            found[name] = tensor
    return found


def _unnamed_file() -> int:
    """A file that is gone once nobody has it open: in memory where the system can, else on the disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedpeft-base")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
