"""What stands in the container and systemd files is there, and is understood."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import clients.health
import clients.start
import server.health
import server.start
from fedpeft.config.node import load_node
from tests.engines.conftest import ROOT

COMMANDS: dict[str, Callable[..., None]] = {
    "clients.health": clients.health.health,
    "clients.start": clients.start.start,
    "server.health": server.health.health,
    "server.start": server.start.start,
}
CONTAINERS = ("server/Containerfile", "clients/Containerfile")
UNITS = ("server/fedpeft-server.service", "clients/fedpeft-node.service")


def understood(line: list[str]) -> dict[str, Any]:
    """What `python -m MODULE ...` is asked, as its command line parser reads it."""
    assert Path(line[0]).name == "python"
    assert line[1] == "-m"
    program = typer.Typer(add_completion=False)
    program.command()(COMMANDS[line[2]])
    return typer.main.get_command(program).make_context(line[2], line[3:]).params


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "server" / "compose.yaml").read_text())
    return found


def test_the_composition_is_one_server_and_three_nodes_with_nothing_to_write_but_their_state(
    compose: dict[str, Any],
) -> None:
    services = compose["services"]
    assert services.keys() == {"server", "node-0", "node-1", "node-2"}
    for name, service in services.items():
        *mounts, state = service["volumes"]
        assert state == f"{name}-state:/var/lib/fedpeft"
        assert all(mount.endswith(":ro") for mount in mounts)
        assert f"{name}-state" in compose["volumes"]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert (ROOT / "server" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    keys = [mount for service in services.values() for mount in service["volumes"]]
    assert not any("ca.key" in mount for mount in keys)


def test_each_node_of_the_composition_has_its_own_key_and_partition(compose: dict[str, Any]) -> None:
    for number in range(3):
        service = compose["services"][f"node-{number}"]
        mounted = dict(reversed(mount.removesuffix(":ro").split(":")) for mount in service["volumes"])
        assert mounted["/node/node.key"] == f"../keys/node-{number}"
        node = load_node(ROOT / "server" / mounted["/node/node.toml"])
        assert node.partition == number
        assert node.server.address == f"server:{compose['services']['server']['ports'][0].split(':')[0]}"
        assert not node.server.insecure
        assert {f"/node/{Path(path).name}" for path in (node.server.root_certificates, node.server.private_key)} == {
            "/node/ca.crt",
            "/node/node.key",
        }


@pytest.mark.parametrize("path", CONTAINERS)
def test_a_container_runs_what_is_there_as_nobody_special(path: str) -> None:
    text = (ROOT / path).read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    by_name = {step[0]: step[1] for step in steps}
    for name, rest in steps:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
    assert by_name["USER"] == "fedpeft"
    asked = understood(json.loads(by_name["ENTRYPOINT"]) + json.loads(by_name["CMD"]))
    probe = understood(json.loads(by_name["HEALTHCHECK"][by_name["HEALTHCHECK"].index("[") :]))
    shared = asked.keys() & probe.keys() - {"host"}
    assert shared
    assert all(asked[key] == probe[key] for key in shared)
    assert re.search(r"torch==([\d.]+)", text)[1] in (ROOT / "Makefile").read_text()  # type: ignore[index]


@pytest.mark.parametrize("path", UNITS)
def test_a_unit_is_hardened_and_runs_what_is_there(path: str, tmp_path: Path) -> None:
    class Unit(configparser.ConfigParser):
        def optionxform(self, optionstr: str) -> str:
            return optionstr

    unit = Unit(strict=False, interpolation=None)
    unit.read_string((ROOT / path).read_text())
    service = unit["Service"]
    line = shlex.split(service["ExecStart"])
    understood(line)
    assert service["User"] != "root"
    assert service["Restart"] == "on-failure"
    assert {service[key] for key in ("NoNewPrivileges", "ProtectHome", "PrivateTmp")} == {"true"}
    assert service["ProtectSystem"] == "strict"
    assert service["ReadWritePaths"] == "/var/lib/fedpeft"
    if shutil.which("systemd-analyze"):
        copy = tmp_path / Path(path).name
        copy.write_text((ROOT / path).read_text().replace(line[0], sys.executable))
        done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
