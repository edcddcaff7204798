"""A run on packaged parts asks the network for nothing, whatever the environment says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.assets

DEMO = Path(__file__).parent.parent / "simulations" / "demo.toml"
SHORT = ("rounds=1", "training.steps=1", "federation.cohort=1", "data.most_test_rows=10")

WATCHED = """
import socket, sys
from fedpeft.cli import main

asked = []

def refuse(*arguments, **_):
    asked.append(arguments)
    raise OSError(f"this test allows no network, asked for {arguments}")

socket.getaddrinfo = refuse
socket.socket.connect = refuse
socket.socket.connect_ex = refuse
if "--probe" in sys.argv:
    sys.argv.remove("--probe")
    try:
        socket.create_connection(("127.0.0.1", 9))
    except OSError:
        pass
try:
    main()
finally:
    print("ASKED", asked)
"""


def watched(folder: Path, *arguments: str) -> str:
    """What the command printed, and last what it asked the network for."""
    online = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        cwd=folder,
        env=online,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_watch_sees_a_look_up(tmp_path: Path) -> None:
    assert "127.0.0.1" in watched(tmp_path, "--probe", "assets", "list")


def test_a_run_and_its_export_ask_for_nothing(tmp_path: Path) -> None:
    overrides = [text for override in (*SHORT, "out=run") for text in ("--set", override)]
    assert watched(tmp_path, "simulate", str(DEMO), "--no-bounds", *overrides) == "ASKED []"
    assert watched(tmp_path, "export", "run", "--out", "merged", "--merged") == "ASKED []"
