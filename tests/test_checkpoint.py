import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import checkpoint, residuals
from fedpeft.errors import CheckpointError
from fedpeft.updates import Drift, Holding, ServerState
from tests.toys import WIDE, counted, flat, numbers, state, wide_state

values = st.floats(width=32, allow_nan=False)
triples = st.tuples(values, values, values)


def fill(folder: Path, rounds: int) -> list[ServerState]:
    states = [state(float(round_), 0, 0, round_=round_) for round_ in range(rounds)]
    for one in states:
        checkpoint.save(folder, one)
    return states


@given(
    triples,
    st.dictionaries(st.sampled_from(["m/layer.A", "v/layer.A", "steps"]), triples, max_size=2),
    st.dictionaries(st.sampled_from(["best", "since"]), st.floats(allow_nan=False)),
    st.integers(0, 10**6),
    st.integers(0, 2**63 - 1),
)
def test_a_state_comes_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory,
    adapter: tuple[float, float, float],
    moments: dict[str, tuple[float, float, float]],
    progress: dict[str, float],
    round_: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("law")
    optimizer = {key: np.array(value, np.float64) for key, value in moments.items()}
    one = state(*adapter, round_=round_, optimizer=optimizer, progress=progress)
    one = ServerState(one.run, one.round, seed, one.adapter, one.optimizer, one.progress)
    checkpoint.save(folder, one)
    back = checkpoint.load(folder)
    assert (back.run, back.round, back.seed, back.progress) == (one.run, one.round, seed, progress)
    assert back.adapter.spec == one.adapter.spec
    assert back.adapter.spec.digest == one.adapter.spec.digest
    assert flat(back.adapter.tensors) == flat(numbers(*adapter))
    assert {key: (v.dtype, v.tolist()) for key, v in back.optimizer.items()} == {
        key: (v.dtype, v.tolist()) for key, v in optimizer.items()
    }


ranks = st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(
    ranks,
    st.integers(0, 9),
    st.dictionaries(st.integers(0, 10**6), ranks, max_size=3),
    st.dictionaries(st.integers(0, 99), st.builds(Holding, st.integers(0, 9), st.integers(0, 64)), max_size=4),
    st.booleans(),
)
def test_the_residual_and_who_has_it_come_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory,
    own: tuple[int, int],
    epoch: int,
    after: dict[int, tuple[int, ...]],
    holdings: dict[int, Holding],
    controls: bool,
) -> None:
    folder = tmp_path_factory.mktemp("law")
    random = np.random.default_rng(epoch)
    spec = residuals.specification(WIDE, own)
    residual = {key: random.standard_normal(shape).astype(np.float32) for key, shape in spec.shapes.items()}
    control = {key: value + 1 for key, value in counted().items()} if controls else {}
    one = wide_state(3, residual=residual, drift=Drift(epoch, after), holdings=holdings, control=control)
    checkpoint.save(folder, one)
    back = checkpoint.load(folder)
    assert (back.drift, back.holdings) == (one.drift, one.holdings)
    for found, expected in ((back.adapter.residual, residual), (back.control, control), (back.optimizer, {})):
        assert {key: (v.dtype, v.shape, v.tobytes()) for key, v in found.items()} == {
            key: (v.dtype, v.shape, v.tobytes()) for key, v in expected.items()
        }
    assert flat(back.adapter.tensors) == flat(counted())
    assert type(next(iter(back.drift.ranks.values()), ())) is tuple


def test_tensors_of_one_name_are_told_apart() -> None:
    """What the adapter, its residual, the optimiser and the control variates call alike are four tensors."""
    one = {"layer.A": np.full((1, 1), 1, np.float32)}
    two, three, four = ({key: value + by for key, value in one.items()} for by in (1, 2, 3))
    held = state(1, 1, 1, optimizer=three, control=four)
    held = replace(held, adapter=replace(held.adapter, residual=two))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), held)
        back = checkpoint.load(Path(folder))
    found = [back.adapter.tensors, back.adapter.residual, back.optimizer, back.control]
    assert [float(tensors["layer.A"][0, 0]) for tensors in found] == [1, 2, 3, 4]


def test_the_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, 12)
    assert checkpoint.load(tmp_path).round == 11
    names = [f"round-{round_:06d}.{kind}" for round_ in (10, 11) for kind in ("safetensors", "sha256")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("make", [False, True])
def test_no_checkpoint_is_one_sentence(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "checkpoint"
    if make:
        folder.mkdir()
    with pytest.raises(CheckpointError, match="expected a finished checkpoint, found none; start the run anew"):
        checkpoint.load(folder)


@pytest.mark.faults
def test_an_unfinished_checkpoint_is_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    (tmp_path / "round-000002.sha256").unlink()
    (tmp_path / ".round-000003.safetensors.x.part").write_bytes(b"half")
    (tmp_path / "round-000004.sha256").write_bytes(b"left over")
    assert checkpoint.load(tmp_path).round == 1
    checkpoint.save(tmp_path, state(5, 0, 0, round_=2))
    assert flat(checkpoint.load(tmp_path).adapter.tensors) == [5, 0, 0]


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["safetensors", "sha256"])
@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_any_flipped_byte_is_one_sentence(tmp_path: Path, kind: str, bit: int) -> None:
    fill(tmp_path, 2)
    path = tmp_path / f"round-000001.{kind}"
    data = path.read_bytes()
    for at in {0, 7, 8, 40, len(data) // 2, len(data) - 1}:
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match=r"corrupt.*resume from the round before") as caught:
            checkpoint.load(tmp_path)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    for cut in (b"", data[:-1]):
        path.write_bytes(cut)
        with pytest.raises(CheckpointError, match="corrupt"):
            checkpoint.load(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("both", [True, False])
def test_the_remedy_for_a_corrupt_checkpoint_works(tmp_path: Path, both: bool) -> None:
    fill(tmp_path, 3)
    (tmp_path / "round-000002.safetensors").write_bytes(b"corrupt")
    for kind in ("sha256", "safetensors") if both else ("sha256",):
        (tmp_path / f"round-000002.{kind}").unlink()
    assert checkpoint.load(tmp_path).round == 1


@pytest.mark.faults
def test_a_file_of_another_make_is_one_sentence(tmp_path: Path) -> None:
    import hashlib

    from fedpeft.files import encode_tensors

    for data in (b"not safetensors", encode_tensors({}, {"round": 1})):
        (tmp_path / "round-000001.safetensors").write_bytes(data)
        (tmp_path / "round-000001.sha256").write_text(hashlib.sha256(data).hexdigest())
        with pytest.raises(CheckpointError, match="expected a state of this version"):
            checkpoint.load(tmp_path)


FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
from fedpeft import checkpoint
from fedpeft.errors import CheckpointError
from fedpeft.memory import FolderMemory
from fedpeft.updates import Memory
from tests.toys import numbers, state

root, limit = Path(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
told = []
for write in (
    lambda: checkpoint.save(root / "checkpoint", state(9, 9, 9, round_=2)),
    lambda: FolderMemory(root / "memories").save("run", 0, 2, Memory(numbers(9, 9, 9))),
):
    try:
        write()
    except CheckpointError as error:
        told.append([str(error), error.exit_code])
print(json.dumps(told))
"""


@pytest.mark.faults
@pytest.mark.parametrize("limit", [0, 30, 200])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path: Path, limit: int) -> None:
    fill(tmp_path / "checkpoint", 2)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    made = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    told = json.loads(made.stdout)
    assert len(told) == 2
    for text, code in told:
        assert "File too large; free disk space" in text
        assert code == 2
    assert checkpoint.load(tmp_path / "checkpoint").round == 1
    left = {path.name for path in tmp_path.rglob("*")} - set(before)
    assert left <= {"memories", "run", "partition-0"}
