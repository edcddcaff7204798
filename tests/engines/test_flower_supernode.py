from __future__ import annotations

import subprocess
import sys

import pytest
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from fedpeft.engines.flower_supernode import LOST

HANGING = """
import threading, time
from fedpeft.engines import flower_supernode

def lost():
    threading.Thread(target=time.sleep, args=(300,)).start()
    {ends}

flower_supernode.flower_supernode = lost
flower_supernode.main()
"""


@pytest.mark.parametrize("ends", ["return", "raise RuntimeError('the server does not know this node')"])
def test_a_supernode_that_has_left_its_server_ends_though_a_thread_of_it_still_runs(ends: str) -> None:
    line = [sys.executable, "-c", HANGING.format(ends=ends)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert LOST in done.stdout + done.stderr


def test_nodes_of_this_version_of_flower_know_no_other_transport_than_http() -> None:
    options = {name for action in _parse_args_run_supernode()._actions for name in action.option_strings}
    assert "--superlink" in options
    assert not [name for name in options if "grpc" in name or "transport" in name or "rest" in name]
