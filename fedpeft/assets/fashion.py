"""Photographs of clothes: one array of images, and a row for each."""

from __future__ import annotations

import gzip
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedpeft.assets.archives import debian_files, keep_notice, member
from fedpeft.assets.rows import write_rows

FASHION_ROWS = "fashion.jsonl"
IMAGES_FILE = "images.npy"

_SPLITS = {"train": "train", "test": "t10k"}
# The published classes in their order, and the department of a shop that would sell them.
_CLASSES = (
    ("T-shirt/top", "tops"),
    ("Trouser", "trousers and dresses"),
    ("Pullover", "tops"),
    ("Dress", "trousers and dresses"),
    ("Coat", "tops"),
    ("Sandal", "shoes"),
    ("Shirt", "tops"),
    ("Sneaker", "shoes"),
    ("Bag", "bags"),
    ("Ankle boot", "shoes"),
)


def clothes(archive: Path, folder: Path) -> None:
    """A Debian package's Fashion-MNIST becomes `images.npy` and `fashion.jsonl`.

    The images are uint8 `(images, 28, 28)`, white on black, first those published for training. A row has the
    image's index, its label, a group, which is the department of a shop (so groups share no labels), and the split.

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017 (arXiv:1708.07747).

    Raises:
        KeyError: the package lacks a file.
        ValueError: it is not a Debian package, or a file holds something else.
    """
    with debian_files(archive) as files:
        keep_notice(files, "dataset-fashion-mnist", folder)
        images = {split: _array(files, f"{stem}-images-idx3-ubyte.gz") for split, stem in _SPLITS.items()}
        labels = {split: _array(files, f"{stem}-labels-idx1-ubyte.gz") for split, stem in _SPLITS.items()}
    if any(len(images[split]) != len(labels[split]) for split in _SPLITS):
        raise ValueError("not as many labels as images")
    np.save(folder / IMAGES_FILE, np.concatenate(list(images.values())), allow_pickle=False)
    write_rows(folder / FASHION_ROWS, _rows(labels))


def _rows(labels: dict[str, np.ndarray]) -> Iterator[dict[str, str | int]]:
    image = 0
    for split, numbers in labels.items():
        for number in numbers.tolist():
            label, group = _CLASSES[number]
            yield {"image": image, "label": label, "group": group, "split": split}
            image += 1


def _array(files: tarfile.TarFile, name: str) -> np.ndarray:
    """An array in the IDX format: two zeros, 8 for uint8, the number of dimensions, each dimension, the values."""
    with member(files, f"./usr/share/datasets/fashion-mnist/{name}") as source:
        data = gzip.decompress(source.read())
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{name} is not an IDX file of uint8")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], ">u4").tolist()
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{name} is cut off")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
