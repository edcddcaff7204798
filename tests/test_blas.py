"""What NumPy's BLAS is told about its threads, it is told before it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SEEN = """
import os, sys

class Seen:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            print(os.environ.get("OPENBLAS_THREAD_TIMEOUT"))

sys.meta_path.insert(0, Seen())
import fedpeft
"""


@pytest.mark.parametrize(("said", "found"), [({}, "20"), ({"OPENBLAS_THREAD_TIMEOUT": "26"}, "26")])
def test_threads_are_let_go_before_numpy_is_there(said: dict[str, str], found: str) -> None:
    env = {key: value for key, value in os.environ.items() if key != "OPENBLAS_THREAD_TIMEOUT"}
    done = subprocess.run([sys.executable, "-c", SEEN], env={**env, **said}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found]
