from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.federation import Federation
from tests.engines import processes
from tests.engines.lab import lab_in


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    """A folder with a short path that holds the app and keys of three nodes; nothing runs yet."""
    folder = Path(tempfile.mkdtemp(prefix="fp"))
    (port,) = processes.free_ports(1)
    found = Federation(lab_in(folder), port)
    found.script("server.make_certificates", found.keys, "--nodes", 3)
    yield found
    shutil.rmtree(folder, ignore_errors=True)
