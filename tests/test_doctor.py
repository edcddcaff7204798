"""`fedpeft doctor` on a loopback server with real certificates, each check failed by a real cause."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedpeft.cli import app
from fedpeft.commands import doctor
from fedpeft.commands.checks import FAILED, OK, SKIPPED, WARNING, Check
from fedpeft.commands.doctor_server import server_checks
from fedpeft.config import RunConfig, to_toml
from fedpeft.config.node import NodeConfig, ServerConfig, load_node
from fedpeft.experiment import resolve
from server.make_certificates import make_certificates
from tests import tiny
from tests.engines.processes import free_ports

HOST = "127.0.0.1"


@contextlib.contextmanager
def serving(keys: Path | None, host: str = HOST, ahead: timedelta = timedelta()) -> Iterator[str]:
    """The address of a server with the certificate of `keys`, or without TLS, whose clock is `ahead`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return format_datetime(datetime.now(UTC) + ahead, usegmt=True)

        def log_message(self, format: str, *args: object) -> None: ...

    class Server(HTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that goes away in the middle is no error here."""

    server = Server((host, 0), Handler)
    if keys:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(keys / "server.pem", keys / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "own"
    make_certificates(folder, ["lab.example"], nodes=1, days=90)
    return folder


def of(keys: Path, address: str) -> ServerConfig:
    return ServerConfig(address, root_certificates=str(keys / "ca.crt"), private_key=str(keys / "node-0"))


def checked(server: ServerConfig, now: datetime | None = None) -> dict[str, Check]:
    return {check.name: check for check in server_checks(server, now)}


def test_a_server_that_is_as_it_should_be_passes_every_check(keys: Path) -> None:
    with serving(keys) as address:
        found = checked(of(keys, address))
    assert {name: check.outcome for name, check in found.items()} == dict.fromkeys(
        ["server", "root certificates", "certificate", "clock", "private key"], OK
    ), found


def test_a_server_that_is_away(keys: Path) -> None:
    found = checked(of(keys, f"{HOST}:{free_ports(1)[0]}"))
    assert found["server"].outcome == FAILED
    assert "no answer at" in found["server"].found
    assert found["certificate"].outcome == found["clock"].outcome == SKIPPED
    assert found["private key"].outcome == OK


def test_a_name_that_there_is_not(keys: Path) -> None:
    found = checked(of(keys, "no-such-host.invalid:1"))
    assert found["server"].outcome == FAILED
    assert "no address for no-such-host.invalid" in found["server"].found


@pytest.mark.parametrize(
    ("days", "outcome", "told"), [(0, FAILED, "expired"), (3, WARNING, "3 days"), (90, OK, "valid")]
)
def test_a_certificate_ends(tmp_path: Path, days: int, outcome: str, told: str) -> None:
    make_certificates(tmp_path / "keys", ["lab.example"], nodes=1, days=days)
    with serving(tmp_path / "keys") as address:
        found = checked(of(tmp_path / "keys", address))["certificate"]
    assert found.outcome == outcome
    assert told in found.found


def test_a_certificate_of_another_authority(keys: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "other", ["lab.example"], nodes=0, days=90)
    with serving(tmp_path / "other") as address:
        found = checked(of(keys, address))
    assert found["certificate"].outcome == FAILED
    assert "server.root_certificates" in found["certificate"].remedy
    assert found["clock"].outcome == OK


def test_a_certificate_for_another_host(keys: Path) -> None:
    with serving(keys, "127.0.0.2") as address:
        found = checked(of(keys, address))["certificate"]
    assert found.outcome == FAILED
    assert "correct server.address" in found.remedy


def test_a_server_without_tls(keys: Path) -> None:
    with serving(None) as address:
        found = checked(of(keys, address))["certificate"]
        assert found.outcome == FAILED
        assert found.found.startswith("no TLS")
        plain = checked(ServerConfig(address, insecure=True))
    assert plain["certificate"].outcome == WARNING
    assert plain["clock"].outcome == OK


@pytest.mark.parametrize("name", ["absent.crt", "node-0"])
def test_root_certificates_that_are_none(keys: Path, name: str) -> None:
    with serving(keys) as address:
        found = checked(replace(of(keys, address), root_certificates=str(keys / name)))
    assert found["root certificates"].outcome == found["certificate"].outcome == FAILED


def test_an_authority_that_has_ended(keys: Path) -> None:
    later = datetime.now(UTC) + timedelta(days=4000)
    found = checked(of(keys, f"{HOST}:{free_ports(1)[0]}"), later)["root certificates"]
    assert found.outcome == FAILED
    assert found.found.startswith("not valid since")


@pytest.mark.parametrize(
    ("ahead", "outcome", "told"), [(3600, FAILED, "behind"), (-3600, FAILED, "ahead of"), (20, OK, "seconds")]
)
def test_clocks_that_differ(keys: Path, ahead: int, outcome: str, told: str) -> None:
    with serving(keys, ahead=timedelta(seconds=ahead)) as address:
        found = checked(of(keys, address))["clock"]
    assert found.outcome == outcome
    assert told in found.found


def openssh(key: Any, password: bytes = b"") -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.OpenSSH
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))


@pytest.mark.parametrize(
    ("data", "mode", "told"),
    [
        (None, 0o600, "No such file"),
        (openssh(ec.generate_private_key(ec.SECP384R1())), 0o644, "can be read by others (0644)"),
        (openssh(ec.generate_private_key(ec.SECP256R1())), 0o600, "found ECDSA secp256r1"),
        (openssh(ed25519.Ed25519PrivateKey.generate()), 0o600, "found Ed25519PrivateKey"),
        (b"-----BEGIN NOTHING-----\n", 0o600, "found no private key"),
    ],
)
def test_a_private_key_that_will_not_do(tmp_path: Path, data: bytes | None, mode: int, told: str) -> None:
    path = tmp_path / "node-0"
    if data is not None:
        path.write_bytes(data)
        path.chmod(mode)
    server = ServerConfig(f"{HOST}:{free_ports(1)[0]}", private_key=str(path))
    found = checked(server)["private key"]
    assert found.outcome == FAILED
    assert told in found.found
    assert found.remedy


def test_no_private_key_and_no_authority_are_warned_of() -> None:
    found = checked(ServerConfig(f"{HOST}:{free_ports(1)[0]}"))
    assert found["private key"].outcome == found["root certificates"].outcome == WARNING


@pytest.fixture
def run_file(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> Path:
    config: RunConfig = resolve(tiny.run_config(tiny_model, tiny_rows, tmp_path / "run"))
    path = tmp_path / "run.toml"
    path.write_text(to_toml(replace(config, out="")))
    return path


@pytest.fixture
def examined(
    run_file: Path, tiny_rows: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Check]]:
    """What is found of a node that is well, but for what its file says over it."""
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path / "home"))
    (tmp_path / "node.toml").write_text(
        f'port = {free_ports(1)[0]}\nserver = {{ address = "{HOST}:{free_ports(1)[0]}" }}\n'
        f'model = {{ folder = "{tiny_model}" }}\ndata = {{ source = "jsonl", jsonl = {{ path = "{tiny_rows}" }} }}\n'
    )

    def examine(*overrides: str, run: tuple[str, ...] | None = ()) -> dict[str, Check]:
        node = load_node(tmp_path / "node.toml", overrides)
        config = doctor.load(run_file, run) if run is not None else None
        return {check.name: check for check in doctor.all_checks(node, config)}

    return examine


def test_a_node_that_is_well(examined: Callable[..., dict[str, Check]]) -> None:
    found = examined()
    for name in ("python", "libraries", "device", "cache", "port", "run", "data", "memory"):
        assert found[name].outcome == OK, found[name]
    assert "90 rows (no 30, maybe 30, yes 30)" in found["data"].found
    assert examined(run=None)["data"].outcome == SKIPPED


def test_a_run_that_leaves_its_labels_to_the_data(examined: Callable[..., dict[str, Check]]) -> None:
    found = examined(run=("task.sequence_classification.labels=",))
    assert found["memory"].outcome == OK, found["memory"]
    assert "the run names no labels to compare them with" in found["data"].found


@pytest.mark.parametrize(
    ("overrides", "run", "name", "told"),
    [
        (["data.jsonl.path=absent.jsonl"], (), "data", "no such file"),
        (["data.jsonl.path=absent.jsonl"], None, "data", "cannot be read"),
        (["data.jsonl.columns.text=review"], (), "data", "review"),
        ([], ("task.sequence_classification.labels=no,maybe",), "data", "yes"),
        (["limits.memory_gigabytes=0.1"], (), "memory", "of 100"),
        (["model.folder=absent"], (), "memory", "absent"),
        (["model.folder=absent"], None, "model", "no config.json"),
        (["model.device=cuda"], (), "device", "a CUDA device"),
        (["required.secure_aggregation=true"], (), "run", "secure aggregation"),
        (["limits.tokens=8"], (), "run", "limits.tokens"),
        ([], ("adapter.lora.rank=100000",), "run", "at most 8192"),
    ],
)
def test_a_node_that_cannot_take_part(
    examined: Callable[..., dict[str, Check]],
    overrides: list[str],
    run: tuple[str, ...] | None,
    name: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = examined(*overrides, run=run)[name]
    assert found.outcome == FAILED
    assert told in found.found
    assert found.remedy


def test_a_port_that_is_taken(examined: Callable[..., dict[str, Check]]) -> None:
    with serving(None) as address:
        assert examined(f"port={address.rpartition(':')[2]}", run=None)["port"].outcome == WARNING


def test_a_cache_that_cannot_be_written(
    examined: Callable[..., dict[str, Check]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDPEFT_HOME", str(tmp_path / "file" / "home"))
    found = examined(run=None)["cache"]
    assert found.outcome == FAILED
    assert "FEDPEFT_HOME" in found.remedy


def test_a_disk_that_is_full(examined: Callable[..., dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE", 2**62)
    assert examined(run=None)["cache"].outcome == FAILED


@pytest.mark.parametrize(
    ("asked", "outcome"),
    [
        ((">=3.11", ["numpy>=2,<3", "flwr[simulation]>=1.41", "typer"]), (OK, OK)),
        ((">=3.99", ["numpy>=99"]), (FAILED, FAILED)),
        (("<3.11.1", ["no-such-library>=1"]), (FAILED, FAILED)),
    ],
)
def test_versions_are_held_against_what_the_project_asks_for(
    asked: tuple[str, list[str]], outcome: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pyproject.toml"
    python, libraries = asked
    path.write_text(
        f'[project]\nname = "fedpeft"\nrequires-python = "{python}"\ndependencies = {json.dumps(libraries)}\n'
    )
    monkeypatch.setattr(doctor, "_PROJECT", path)
    found = {check.name: check.outcome for check in doctor.library_checks(NodeConfig())}
    assert (found["python"], found["libraries"]) == outcome


def test_a_library_that_the_nodes_settings_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._EXTRAS, "nf4", "no_such_library")
    node = NodeConfig(model=replace(NodeConfig().model, weights="nf4"))
    found = {check.name: check for check in doctor.library_checks(node)}["further libraries"]
    assert found.outcome == FAILED
    assert "no_such_library (for nf4) not installed" in found.found


def test_the_command_tells_each_check_in_a_line_and_ends_with_1_where_one_fails(
    examined: Callable[..., dict[str, Check]],
    run_file: Path,
    tmp_path: Path,
    keys: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    node = tmp_path / "node.toml"
    with pytest.raises(SystemExit) as ended:
        app(["doctor", str(node), "--config", str(run_file)])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1
    assert [line for line in lines if line.startswith("FAILED")] == [line for line in lines if "no answer at" in line]
    assert len(lines) == len(examined())
    with serving(keys) as address:
        text = node.read_text()
        server = f'server = {{ address = "{address}", root_certificates = "{keys / "ca.crt"}" }}'
        node.write_text("\n".join(server if line.startswith("server") else line for line in text.splitlines()))
        with pytest.raises(SystemExit) as ended:
            app(["doctor", str(node), "--config", str(run_file), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not ended.value.code, found
    assert {"name": "server", "outcome": "ok", "found": f"{address} answers", "remedy": ""} in found
