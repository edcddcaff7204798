import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import CheckpointError
from fedpeft.memory import KEPT_FILES, FolderMemory
from fedpeft.updates import Memory
from tests.toys import flat, numbers

values = st.floats(width=32, allow_nan=False)


@given(st.tuples(values, values, values), st.integers(0, 2**40), st.integers(1, 10**6))
def test_a_memory_comes_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, found: tuple[float, float, float], position: int, round_: int
) -> None:
    store = FolderMemory(tmp_path_factory.mktemp("law"))
    store.save("run", 0, round_, Memory(numbers(*found), {"position": position}))
    back = store.load("run", 0, round_ + 1)
    assert flat(back.tensors) == flat(numbers(*found))
    assert back.fields == {"position": position}


def at(store: FolderMemory, round_: int, run: str = "run", partition: int = 0) -> object:
    return store.load(run, partition, round_).fields.get("at")


def test_a_round_starts_from_the_newest_memory_before_it(tmp_path: Path) -> None:
    store = FolderMemory(tmp_path)
    assert store.load("run", 0, 5) == Memory()
    for round_ in (2, 9, 10):
        store.save("run", 0, round_, Memory({}, {"at": round_}))
    assert [at(store, round_) for round_ in (1, 2, 3, 9, 10, 11, 99)] == [None, None, 2, 2, 9, 10, 10]


def test_a_round_done_again_starts_from_what_its_first_try_started_from(tmp_path: Path) -> None:
    store = FolderMemory(tmp_path)
    for round_ in (1, 2, 3):
        store.save("run", 0, round_, Memory({}, {"at": round_}))
    assert at(store, 2) == 1
    store.save("run", 0, 2, Memory({}, {"at": 20}))
    assert at(store, 3) == 20
    assert at(store, 4) == 3


def test_only_the_last_files_are_kept(tmp_path: Path) -> None:
    store = FolderMemory(tmp_path)
    for round_ in range(1, 9):
        store.save("run", 0, round_, Memory({}, {"at": round_}))
    names = sorted(path.name for path in (tmp_path / "run" / "partition-0").iterdir())
    assert names == [f"round-{round_:06d}.safetensors" for round_ in (6, 7, 8)]
    assert KEPT_FILES == 3
    assert at(store, 7) == 6


def test_runs_and_partitions_have_memories_of_their_own(tmp_path: Path) -> None:
    store = FolderMemory(tmp_path)
    store.save("run", 1, 1, Memory({}, {"at": 1}))
    store.save("run", 11, 1, Memory({}, {"at": 11}))
    assert at(store, 2, partition=1) == 1
    assert at(store, 2, partition=11) == 11
    assert at(store, 2, run="other", partition=1) is None


def test_only_the_owner_may_read_a_memory(tmp_path: Path) -> None:
    store = FolderMemory(tmp_path)
    store.save("run", 0, 1, Memory(numbers(1, 2, 3)))
    path = next((tmp_path / "run" / "partition-0").iterdir())
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("run", ["", "../up", "a/b", "A", "run\n", "x" * 65, ".", "r r", "é"])
def test_a_run_name_that_could_leave_the_folder_is_refused(tmp_path: Path, run: str) -> None:
    store = FolderMemory(tmp_path / "in")
    with pytest.raises(CheckpointError, match="run name: expected 1 to 64"):
        store.load(run, 0, 1)
    with pytest.raises(CheckpointError, match="run name: expected 1 to 64"):
        store.save(run, 0, 1, Memory())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
@pytest.mark.parametrize("where", ["first", "middle", "last", "cut", "empty"])
def test_a_corrupt_memory_is_one_sentence(tmp_path: Path, where: str) -> None:
    store = FolderMemory(tmp_path)
    store.save("run", 0, 1, Memory(numbers(1, 2, 3), {"position": 3}))
    path = next((tmp_path / "run" / "partition-0").iterdir())
    data = bytearray(path.read_bytes())
    spot = {"first": 0, "middle": len(data) // 2}.get(where, len(data) - 1)
    data[spot] ^= 1
    path.write_bytes({"cut": bytes(data[:-5]), "empty": b""}.get(where, bytes(data)))
    with pytest.raises(CheckpointError, match=r"expected a client's memory, found .*; delete the file\.") as caught:
        store.load("run", 0, 2)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def kept(root: Path, partition: int = 0) -> list[str]:
    """The runs whose memories of a partition are there, by their names."""
    return sorted(path.parent.name for path in root.glob(f"*/partition-{partition}"))


def test_the_memories_of_the_oldest_runs_are_removed(tmp_path: Path) -> None:
    store, unbounded = FolderMemory(tmp_path, most_runs=3), FolderMemory(tmp_path)
    unbounded.save("e", 1, 1, Memory())
    for age, run in enumerate("ebdc"):
        unbounded.save(run, 0, 1, Memory())
        for path in (tmp_path / run / "partition-0").iterdir():
            os.utime(path, ns=(age, age))
    assert kept(tmp_path) == ["b", "c", "d", "e"]
    store.save("a", 0, 1, Memory())
    assert kept(tmp_path) == ["a", "c", "d"]
    assert kept(tmp_path, 1) == ["e"]
    assert not (tmp_path / "b").exists()
    store.save("a", 0, 2, Memory())
    assert kept(tmp_path) == ["a", "c", "d"]


def test_memories_are_removed_until_the_rest_has_room_and_never_those_of_the_run_at_work(tmp_path: Path) -> None:
    big = Memory({"a": np.zeros(1000, np.float32)}, {})
    for age, run in enumerate("bcd"):
        FolderMemory(tmp_path).save(run, 0, 1, big)
        for path in (tmp_path / run / "partition-0").iterdir():
            os.utime(path, ns=(age, age))
    FolderMemory(tmp_path, most_bytes=14_000).save("a", 0, 1, big)
    assert kept(tmp_path) == ["a", "c", "d"]
    store = FolderMemory(tmp_path, most_bytes=1)
    for round_ in range(1, 4):
        store.save("a", 0, round_, big)
    assert kept(tmp_path) == ["a"]
    assert [round_ for round_ in (1, 2, 3) if store.load("a", 0, round_ + 1).tensors] == [1, 2, 3]


@pytest.mark.faults
def test_a_memory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(CheckpointError, match="free disk space"):
        FolderMemory(tmp_path).save("run", 0, 1, Memory())


@pytest.mark.faults
def test_a_file_that_a_kill_left_half_written_is_passed_over(tmp_path: Path) -> None:
    store = FolderMemory(tmp_path)
    store.save("run", 0, 1, Memory({}, {"at": 1}))
    folder = tmp_path / "run" / "partition-0"
    (folder / ".round-000002.safetensors.abc.part").write_bytes(b"half")
    assert at(store, 5) == 1
    assert os.listdir(tmp_path) == ["run"]
