"""Images: where the pixels of a row are, the pixels themselves, and folders of images as rows."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedpeft.assets import IMAGES_FILE
from fedpeft.config.data import Images
from fedpeft.data.fields import Row, Value, unreadable

ROLE = "image"
"""The role of the column that says where an image is."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
"""What names of image files end in, upper case or lower."""

_PLACE = "data.origin.images"


def pixels(image: Value) -> np.ndarray:
    """The red, green and blue of an image, uint8 `(height, width, 3)`, turned upright as its camera says.

    `image` is the path of a file, or a pair: the path of an array file of uint8 `(images, height, width)` or
    `(images, height, width, 3)`, which is mapped and not read as a whole, and the image's number in it.

    Raises:
        DataError: the image cannot be read; the message names the file.
    """
    if isinstance(image, str):
        return _of_file(Path(image))
    path, number = map(str, image)
    stack = _stack(path)
    if not int(number) < len(stack):
        raise unreadable(path, f"at least {int(number) + 1} images", len(stack), "correct the image's number")
    one = np.asarray(stack[int(number)])
    return one if one.ndim == 3 else np.repeat(one[:, :, None], 3, axis=2)


def identity(image: Value) -> str:
    """What tells an image from another: the SHA-256 of its size and pixels, in hexadecimal.

    Two files of one picture are repeats, whatever their names and kinds of file are.
    """
    found = pixels(image)
    return hashlib.sha256(f"{found.shape}".encode() + found.tobytes()).hexdigest()


def located(rows: Iterable[Row], folder: Path) -> Iterator[Row]:
    """The rows; those with an image know where it is, and are told apart by its pixels.

    A row of a file in `folder` names its image by a path from there, or by a number in the array file beside it.

    Raises:
        DataError: an image cannot be read.
    """
    for row in rows:
        name = row.fields.get(ROLE)
        if name is None:
            yield row
            continue
        image = (str(folder / IMAGES_FILE), str(name)) if str(name).isdecimal() else str(folder / str(name))
        yield replace(row, text=identity(image), fields={**row.fields, ROLE: image})


def read_folders(origin: Images, roles: Sequence[str]) -> list[Row]:
    """A row for each image under `path/LABEL`, or with `groups` under `path/GROUP/LABEL`, in order of name.

    Raises:
        DataError: there is no such folder, one has no images, an image cannot be read, or the task reads no images.
    """
    if ROLE not in roles:
        raise unreadable(_PLACE, f"a source with {' and '.join(roles)}", "images", "choose another source or task")
    root = Path(os.path.expanduser(origin.path))
    if not origin.path or not root.is_dir():
        raise unreadable(f"{_PLACE}.path", "a folder", repr(origin.path), "correct the path")
    groups = _folders(root) if origin.groups else [root]
    rows = [row for group in groups for row in _labelled(group, group.name if origin.groups else "")]
    return list(located(rows, Path()))


def _labelled(folder: Path, group: str) -> Iterator[Row]:
    for labelled in _folders(folder):
        found = sorted(path for path in labelled.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            remedy = f"put images there, remove it, or set {_PLACE}.groups to whether there are groups of labels"
            raise unreadable(str(labelled), f"images ({', '.join(SUFFIXES)})", "none", remedy)
        yield from (Row("", labelled.name, group, {ROLE: str(path.absolute())}) for path in found)


def _folders(root: Path) -> list[Path]:
    found = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise unreadable(str(root), "a folder for each label", "none", "put each image into the folder of its label")
    return found


def _of_file(path: Path) -> np.ndarray:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise unreadable(str(path), "the library Pillow", "it is not installed", "install fedpeft[vision]") from error
    try:
        with Image.open(path) as opened:
            mode, image = opened.mode, ImageOps.exif_transpose(opened)
            image = image.convert("RGBA") if "transparency" in image.info else image
            found = np.array(image.convert("RGB"))
    except Exception as error:  # a decoder of a damaged file raises what it likes
        raise unreadable(str(path), "an image", error, "replace the file or remove the row") from error
    if mode.startswith(("I", "F")):
        raise unreadable(str(path), "an image of 8 bits a colour", f"mode {mode}", "convert it, scaled to 8 bits")
    return found


@functools.lru_cache(maxsize=4)
def _stack(path: str) -> np.ndarray:
    try:
        stack: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(
            path, "an array file of images", error, "name images by their paths, or put it there"
        ) from error
    if stack.dtype != np.uint8 or stack.ndim not in (3, 4) or (stack.ndim == 4 and stack.shape[3] != 3):
        found = f"{stack.dtype} {stack.shape}"
        raise unreadable(path, "uint8 (images, height, width) or (images, height, width, 3)", found, "write it again")
    return stack
