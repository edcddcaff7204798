"""A disk that fills up under a real run: it says so, goes on once there is room, and loses no round."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import processes
from tests.engines.conftest import adapter
from tests.faults.world import ROUNDS, RUN_SECONDS, World, rounds, timeless

pytestmark = [
    pytest.mark.engines,
    pytest.mark.assets,
    pytest.mark.faults,
    pytest.mark.skipif(os.environ.get("FEDPEFT_FAULTS") != "all", reason="in the long form: FEDPEFT_FAULTS=all"),
]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 64 MB at `folder`.

    Skips the test where this process may not mount one.
    """
    folder.mkdir()
    asked = ("mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder))
    if not shutil.which("mount") or subprocess.run(asked, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a disk; tests/test_crash.py fills one in the process")
    try:
        yield folder
    finally:
        subprocess.run(("umount", "--lazy", str(folder)), check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room that is left."""
    path = disk / "filling"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return path


def test_a_run_whose_disk_is_full_says_so_and_goes_on_once_there_is_room(world: World, calm: Path) -> None:
    with small_disk(world.federation.lab.root / "disk") as disk:
        out = disk / "full"
        log, before = world.federation.log(out.name), list[dict[str, object]]()

        def strike(world: World) -> None:
            filling = fill(disk)
            processes.until(lambda: "cut off after" in log.read_text() or None, RUN_SECONDS, "end of the attempt", log)
            (said,) = [line for line in log.read_text().splitlines() if "cut off after" in line]
            assert "free disk space, then run again with --resume" in said
            before[:] = [timeless(record) for record in rounds(out)]
            assert f"cut off after {len(before)} rounds" in said
            filling.unlink()

        world.run(out, strike=strike)
        assert before
        assert [timeless(record) for record in rounds(out)][: len(before)] == before
        assert [record["round"] for record in rounds(out)] == list(range(1, ROUNDS + 1))
        assert adapter(out) == adapter(calm)
