from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft import journal
from fedpeft.runs import RunFolder
from server.make_certificates import make_certificates
from tests.engines import processes
from tests.engines.conftest import adapter
from tests.engines.lab import Lab, lab_in

pytestmark = [pytest.mark.engines, pytest.mark.assets]
TWO = ("federation.clients=2", "federation.cohort=2")


@pytest.fixture
def lab(short_folder: Path) -> Lab:
    return lab_in(short_folder)


def superlink(lab: Lab, keys: Path, port: int) -> list[str]:
    return processes.command(
        "flower-superlink",
        *("--ssl-ca-certfile", keys / "ca.crt", "--ssl-certfile", keys / "server.pem"),
        *("--ssl-keyfile", keys / "server.key", "--enable-supernode-auth"),
        *("--host", "127.0.0.1", "--port", port, "--database", lab.root / "state.db"),
    )


def supernode(keys: Path, port: int, number: int, own_port: int) -> list[str]:
    return processes.command(
        "flower-supernode",
        *("--root-certificates", keys / "ca.crt", "--superlink", f"127.0.0.1:{port}"),
        *("--auth-supernode-private-key", keys / f"node-{number}"),
        *("--host", "127.0.0.1", "--port", own_port, "--node-config", f"partition-id={number}"),
    )


def test_superlink_with_supernodes_gives_the_bytes_of_the_in_process_engine(
    lab: Lab, in_process: Callable[..., bytes]
) -> None:
    expected = in_process(*TWO)
    keys, out = lab.root / "keys", lab.root / "out"
    make_certificates(keys, ["localhost", "127.0.0.1"], nodes=2, days=1)
    port, *own_ports = processes.free_ports(3)
    (lab.root / "flwr").mkdir()
    connection = f'address = "127.0.0.1:{port}"\nroot-certificates = "{keys / "ca.crt"}"\n'
    (lab.root / "flwr" / "config.toml").write_text(f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\n{connection}')
    logs = [lab.root / f"{name}.log" for name in ("superlink", "node-0", "node-1")]
    with processes.started(superlink(lab, keys, port), lab.env, lab.root, logs[0]):
        processes.until(lambda: processes.listening(port), 60, "SuperLink", logs[0])
        for number in range(2):
            lab.flwr("supernode", "register", keys / f"node-{number}.pub", "lab")
        lines = [supernode(keys, port, number, own) for number, own in enumerate(own_ports)]
        with (
            processes.started(lines[0], lab.env, lab.root, logs[1]),
            processes.started(lines[1], lab.env, lab.root, logs[2]),
        ):
            run_id = lab.start("lab", out, *TWO, "aggregation.first=built")
            assert lab.finished("lab", run_id, *logs) == "finished:completed"
            assert adapter(out) == expected
            rounds = [record for record in journal.read(RunFolder(out).journal) if record["event"] == "round"]
            assert rounds[0]["bytes_down"] < rounds[1]["bytes_down"] / 50
            assert journal.read(RunFolder(out).journal)[0]["engine"] == "flower"
            assert {path.parent.name for path in (lab.root / "cache" / "nodes").rglob("round-*")} == {
                "partition-0",
                "partition-1",
            }

            run_id = lab.start("lab", out, *TWO)
            assert lab.finished("lab", run_id, *logs) == "finished:failed"
            said = lab.flwr("log", run_id, "lab", "--show")
            assert "expected no such folder yet, or an empty one" in said
            assert "Traceback" not in said


def test_flwr_run_on_the_simulation_runtime_gives_the_same_bytes(lab: Lab, in_process: Callable[..., bytes]) -> None:
    expected = in_process(*TWO)
    out = lab.root / "out"
    http, control = map(str, processes.free_ports(2))
    ports = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http, "FLWR_LOCAL_CONTROL_API_PORT": control}
    local = Lab(lab.root, {**lab.env, **ports})
    log = lab.root / "flwr" / "local-superlink" / "superlink.log"
    try:
        run_id = local.start("local", out, *TWO, more=("--federation-config", "num-supernodes=2"))
        assert local.finished("local", run_id, log) == "finished:completed"
        assert adapter(out) == expected
    finally:
        for pid in processes.mentioning(str(log)):
            processes.end(pid)
