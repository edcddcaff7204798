import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedpeft import assets
from fedpeft.config.data import SOURCES, Bundled, Columns, Csv, DataConfig, Images, JsonLines
from fedpeft.config.fields import choose
from fedpeft.data.fields import Row
from fedpeft.data.images import identity, pixels
from fedpeft.data.rows import prepare
from fedpeft.data.sources import read
from fedpeft.errors import DataError

ROLES = ("image", "label")
STACK = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)


def save(path: Path, values: np.ndarray, **how: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **how)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of two labels, and what is none."""
    save(tmp_path / "cat" / "b.PNG", STACK[0])
    save(tmp_path / "cat" / "a.bmp", STACK[1])
    save(tmp_path / "dog" / "a.webp", STACK[2])
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_a_folder_of_folders_is_read_in_order_of_name(folder: Path) -> None:
    rows = read(Images(str(folder)), ROLES)
    files = [str(folder / name) for name in ("cat/a.bmp", "cat/b.PNG", "dog/a.webp")]
    assert rows == [
        Row(identity(file), label, fields={"image": file})
        for file, label in zip(files, ("cat", "cat", "dog"), strict=True)
    ]
    assert len({row.text for row in rows}) == 3


def test_groups_are_folders_above_the_labels(folder: Path) -> None:
    save(folder / "home" / "cat" / "a.jpg", STACK[0])
    for name in ("cat", "dog"):
        (folder / name).rename(folder / "home" / f"old-{name}")
    rows = read(Images(str(folder), groups=True), ROLES)
    assert [(row.group, row.label) for row in rows] == [
        ("home", "cat"), ("home", "old-cat"), ("home", "old-cat"), ("home", "old-dog")
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_of_rows_names_images_from_where_it_stands(kind: str, folder: Path) -> None:
    lines = {
        "jsonl": '{"picture": "cat/b.PNG", "label": "x", "shop": "s"}\n{"picture": 3, "label": "y", "shop": "t"}\n',
        "csv": "picture,label,shop\ncat/b.PNG,x,s\n3,y,t\n",
    }
    (folder / f"rows.{kind}").write_text(lines[kind])
    np.save(folder / "images.npy", STACK)
    source = {"jsonl": JsonLines, "csv": Csv}[kind](str(folder), Columns(image="picture", group="shop"))
    first, second = read(source, ROLES)
    assert first == Row(identity(str(folder / "cat/b.PNG")), "x", "s", {"image": str(folder / "cat/b.PNG")})
    assert second.fields == {"image": (str(folder / "images.npy"), "3")}
    assert np.array_equal(pixels(second.fields["image"]), np.stack([STACK[3]] * 3, -1))


def test_pixels_are_red_green_and_blue_whatever_the_file_holds(tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8)
    assert np.array_equal(pixels(save(tmp_path / "a.png", colours)), colours)
    see_through = np.dstack([colours, np.full((4, 6), 9, np.uint8)])
    assert np.array_equal(pixels(save(tmp_path / "b.png", see_through)), colours)
    assert np.array_equal(pixels(save(tmp_path / "c.png", colours[..., 0])), np.stack([colours[..., 0]] * 3, -1))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera stood on its side
    assert np.array_equal(pixels(save(tmp_path / "d.png", colours, exif=turned)), np.rot90(colours, -1))
    palette = Image.fromarray(colours).quantize(8)
    palette.save(tmp_path / "e.png", transparency=bytes([0, 255]))
    assert np.array_equal(pixels(str(tmp_path / "e.png")), np.array(palette.convert("RGB")))


def test_a_picture_is_one_picture_in_every_kind_of_file(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", STACK)
    one = identity((str(tmp_path / "images.npy"), "2"))
    assert one == identity(save(tmp_path / "a.png", STACK[2])) == identity(save(tmp_path / "b.bmp", STACK[2]))
    assert one != identity(save(tmp_path / "c.png", STACK[2].reshape(4, 6)))
    assert one != identity(save(tmp_path / "d.png", STACK[1]))


def test_no_picture_is_both_learned_and_held_out(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    for at in range(40):
        image = random.integers(0, 256, (4, 4, 3), np.uint8)
        save(tmp_path / "ab"[at % 2] / f"{at}.png", image)
        if at % 4 < 2:
            save(tmp_path / "ba"[at % 2] / f"again-{at}.bmp", image)
    config = DataConfig(origin=choose(SOURCES, "images", images=Images(str(tmp_path))), test_fraction=0.3)
    split = prepare(config, 0, ROLES)
    assert (split.report.rows, split.report.repeats_removed, split.report.test_overlap) == (60, 20, 0.0)
    train, test = ({pixels(row.fields["image"]).tobytes() for row in rows} for rows in (split.train, split.test))
    assert len(train) + len(test) == 40
    assert len(test) == split.report.test_rows == 12


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda root: (root / "cat/a.bmp").write_text("so"), r"cat/a\.bmp: expected an image, found cannot identify"),
        (lambda root: damaged(root / "cat/b.PNG"), r"cat/b\.PNG: expected an image, found .*; replace"),
        (lambda root: (root / "bird").mkdir(), r"bird: expected images \(\.png, .*\), found none; .*groups"),
        (
            lambda root: Image.fromarray(np.full((2, 2), 999, np.uint16)).save(root / "cat/c.png"),
            r"c\.png: expected an image of 8 bits a colour, found mode I;16",
        ),
    ],
)
def test_an_image_that_cannot_be_read_is_named(harm: Any, said: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(DataError, match=said):
        read(Images(str(folder)), ROLES)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Images(), "data.origin.images.path: expected a folder, found ''"),
        (Images("HERE/none"), "data.origin.images.path: expected a folder"),
        (Images("HERE/cat"), "cat: expected a folder for each label, found none"),
        (Images("HERE", groups=True), "cat: expected a folder for each label, found none"),
    ],
)
def test_folders_that_are_not_there_are_one_sentence(settings: Images, said: str, folder: Path) -> None:
    with pytest.raises(DataError, match=said):
        read(Images(settings.path.replace("HERE", str(folder)), settings.groups), ROLES)


def test_images_are_no_texts(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.origin\.images: expected a source with text and label, found images"):
        read(Images(str(folder)))


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        (STACK, r"images\.npy: expected at least 6 images, found 5"),
        (STACK.astype(float), r"images\.npy: expected uint8 .*, found float64 \(5, 6, 4\)"),
        (STACK[..., None], r"found uint8 \(5, 6, 4, 1\)"),
        (None, r"images\.npy: expected an array file of images, found .*No such file"),
    ],
)
def test_an_array_that_does_not_hold_the_image_is_named(stack: Any, said: str, tmp_path: Path) -> None:
    if stack is not None:
        np.save(tmp_path / "images.npy", stack)
    (tmp_path / "a.jsonl").write_text('{"image": 5, "label": "x"}\n')
    with pytest.raises(DataError, match=said):
        read(JsonLines(str(tmp_path / "a.jsonl")), ROLES)


def test_a_missing_pillow_is_one_sentence(folder: Path) -> None:
    program = f"""
import sys
sys.modules["PIL"] = None
from fedpeft.config.data import Images
from fedpeft.data.sources import read
read(Images({str(folder)!r}), ("image", "label"))
"""
    paths = ":".join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert "a.bmp: expected the library Pillow, found it is not installed; install fedpeft[vision]" in done.stderr


def test_images_of_an_asset_stand_beside_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path))
    asset = assets.ASSETS["fashion"]
    folder = tmp_path / f"fashion-{asset.digest[:12]}"
    folder.mkdir()
    np.save(folder / assets.IMAGES_FILE, STACK)
    records = [{"image": at, "label": f"kind {at % 2}", "group": "tops", "split": "train"} for at in (4, 0, 2)]
    (folder / asset.rows).write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = read(Bundled("fashion"), ROLES)
    assert [(row.label, row.group) for row in rows] == [("kind 0", "tops")] * 3
    assert len({row.text for row in rows}) == 3
    images = [pixels(row.fields["image"]) for row in rows]
    assert all(
        np.array_equal(image, np.repeat(STACK[at][:, :, None], 3, 2))
        for image, at in zip(images, (4, 0, 2), strict=True)
    )
