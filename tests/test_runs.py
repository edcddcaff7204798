import os
from pathlib import Path

import pytest

from fedpeft.config import RunConfig, load
from fedpeft.errors import ConfigError, RunFolderError
from fedpeft.runs import RunFolder, create, folder_for, reopen, write_folder


def test_paths_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = [path.name for path in (folder.config, folder.journal, folder.checkpoint, folder.memories, folder.adapter)]
    assert names == ["config.toml", "journal.jsonl", "checkpoint", "memories", "adapter"]


def test_a_folder_is_where_out_says_or_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_for(RunConfig(name="one")).root == tmp_path / "runs" / "one"
    assert folder_for(RunConfig(name="one", out="there/x")).root == tmp_path / "there" / "x"
    (tmp_path / "empty").mkdir()
    assert folder_for(RunConfig(out="empty")).root == tmp_path / "empty"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_that_holds_something_is_refused(tmp_path: Path, kind: str) -> None:
    taken = tmp_path / "taken"
    if kind == "folder":
        taken.mkdir()
    (taken / "x" if kind == "folder" else taken).write_text("mine")
    with pytest.raises(RunFolderError, match=r"taken: expected no such folder yet.*--resume .*taken, or remove it"):
        folder_for(RunConfig(out=str(taken)))


def test_what_a_kill_left_of_an_atomic_write_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.toml.x1.part").write_text("seed =")
    assert folder_for(RunConfig(out=str(tmp_path / "run"))).root == tmp_path / "run"


def test_settings_are_written_as_resolved_and_found_again(tmp_path: Path) -> None:
    config = RunConfig(name="one", out=str(tmp_path / "run"), seed=5)
    folder = folder_for(config)
    create(folder, config)
    assert load(folder.config) == config
    assert reopen(folder.root, []) == (folder, config)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    config = RunConfig(out=str(tmp_path / "file" / "run"))
    with pytest.raises(RunFolderError, match="expected a folder that can be written"):
        create(folder_for(config), config)


def test_what_cannot_change_the_result_may_be_overridden(tmp_path: Path) -> None:
    config = RunConfig(out=str(tmp_path / "run"))
    create(RunFolder(tmp_path / "run"), config)
    _, again = reopen(tmp_path / "run", ["evaluation.batch_size=3", "compute.threads=1", "model.device=cpu"])
    assert (again.evaluation.batch_size, again.compute.threads, again.model.device) == (3, 1, "cpu")


@pytest.mark.parametrize(
    "change",
    ["seed=9", "rounds=99", "training.steps=3", "federation.clients=50", "evaluation.patience=1", "evaluation.every=3"],
)
def test_what_would_make_it_another_run_is_refused(tmp_path: Path, change: str) -> None:
    create(RunFolder(tmp_path / "run"), RunConfig(out=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="--set with --resume: expected only"):
        reopen(tmp_path / "run", [change])


def test_a_folder_that_was_moved_is_resumed_where_it_is(tmp_path: Path) -> None:
    create(RunFolder(tmp_path / "run"), RunConfig(out=str(tmp_path / "run")))
    os.rename(tmp_path / "run", tmp_path / "moved")
    folder, config = reopen(tmp_path / "moved", [])
    assert (folder.root, config.out) == (tmp_path / "moved", str(tmp_path / "moved"))


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"expected a run folder with config\.toml, found none"):
        reopen(tmp_path, [])


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    def fill(name: str):  # type: ignore[no-untyped-def]
        return lambda scratch: (scratch / name).write_text(name)

    write_folder(tmp_path / "adapter", fill("one"))
    write_folder(tmp_path / "adapter", fill("two"))
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.faults
@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bug"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_filled_leaves_the_one_before(tmp_path: Path, error: BaseException) -> None:
    write_folder(tmp_path / "adapter", lambda scratch: (scratch / "one").touch())

    def fails(scratch: Path) -> None:
        (scratch / "half").touch()
        raise error

    with pytest.raises(RunFolderError if isinstance(error, OSError) else type(error)):
        write_folder(tmp_path / "adapter", fails)
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "one"]
