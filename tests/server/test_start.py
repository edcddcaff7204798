from __future__ import annotations

import stat
import sys
import tomllib
from pathlib import Path

import pytest
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

from fedpeft.engines import flower_superlink
from fedpeft.engines.flower_environment import flower_environment
from fedpeft.errors import ConfigError
from server import start
from server.connection import Connection, write_connection
from server.make_certificates import make_certificates
from server.start import Isolation, Keys, SuperLink, explain, prepare


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    make_certificates(tmp_path / "keys", ["localhost"], nodes=0, days=1)
    return Keys(tmp_path / "keys")


def test_flower_understands_the_command_line_and_finds_tls_and_node_keys_on(tmp_path: Path, keys: Keys) -> None:
    (child,) = SuperLink(tmp_path / "home", "0.0.0.0", 46000, keys).children()
    assert child.line[:3] == (sys.executable, "-m", "fedpeft.engines.flower_superlink")
    asked = _parse_args_run_superlink().parse_args(list(child.line[3:]))
    assert (asked.host, asked.port, asked.isolation) == ("0.0.0.0", 46000, "subprocess")
    assert asked.enable_supernode_auth
    assert not asked.insecure
    assert [Path(asked.ssl_ca_certfile).name, Path(asked.ssl_certfile).name] == ["ca.crt", "server.pem"]
    assert asked.database == str(tmp_path / "home" / "state.db")


def test_without_tls_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (child,) = SuperLink(tmp_path, "127.0.0.1", 46000, None).children()
    asked = _parse_args_run_superlink().parse_args(list(child.line[3:]))
    assert asked.insecure
    assert not asked.enable_supernode_auth
    with pytest.raises(ConfigError, match="expected a file, found none to read; make them with"):
        start.start(home=tmp_path / "home", keys=tmp_path / "none")
    assert not (tmp_path / "home").exists()


def test_in_isolation_the_executor_is_a_process_of_its_own_that_trusts_the_authority(
    tmp_path: Path, keys: Keys
) -> None:
    superlink, executor = SuperLink(tmp_path, "::", 46000, keys, Isolation.process).children()
    assert superlink.line[superlink.line.index("--isolation") :][:2] == ("--isolation", "process")
    assert executor.line == (
        *("flower-superexec", "--runtime-api-address", "[::1]:46000"),
        *("--root-certificates", str(keys.authority)),
    )


def test_the_home_folder_is_closed_to_others_and_names_the_connection(tmp_path: Path, keys: Keys) -> None:
    told: list[str] = []
    superlink = SuperLink(tmp_path / "a" / "home", "0.0.0.0", 46000, keys)
    prepare(superlink, "lab", told.append)
    assert stat.S_IMODE(superlink.home.stat().st_mode) == 0o700
    config = tomllib.loads((superlink.home / "config.toml").read_text())
    assert config["superlink"]["lab"] == {"address": "127.0.0.1:46000", "root-certificates": str(keys.authority)}
    assert any(f"export FLWR_HOME={superlink.home}" in line for line in told)


def test_a_home_folder_in_a_project_is_refused_because_runs_send_the_project_to_nodes(
    tmp_path: Path, keys: Keys
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "pyproject.toml").write_text("")
    superlink = SuperLink(tmp_path / "project" / "a" / "home", "127.0.0.1", 46000, keys)
    with pytest.raises(ConfigError, match="expected a folder outside any project"):
        prepare(superlink, "lab", lambda text: None)
    assert not superlink.home.exists()


def test_a_connection_leaves_others_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[superlink]\ndefault = "old"\n\n[superlink.old]\naddress = "10.0.0.1:1"\n')
    write_connection(Connection("new", "127.0.0.1:2", None), tmp_path)
    config = tomllib.loads((tmp_path / "config.toml").read_text())["superlink"]
    assert config["default"] == "old"
    assert config["old"] == {"address": "10.0.0.1:1"}
    assert config["new"] == {"address": "127.0.0.1:2", "insecure": True}


def test_a_config_file_that_is_not_toml_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("no toml")
    with pytest.raises(ConfigError, match=r"config.toml: expected a TOML file"):
        write_connection(Connection("lab", "127.0.0.1:2", None), tmp_path)
    assert (tmp_path / "config.toml").read_text() == "no toml"


@pytest.mark.parametrize("name", ["local", "default", "", "a b", "a.b"])
def test_a_name_that_flower_keeps_for_itself_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name the federation otherwise"):
        Connection(name, "127.0.0.1:2", None)


def test_the_environment_is_quiet_and_finds_flowers_programs(tmp_path: Path) -> None:
    env = flower_environment(tmp_path, {"PATH": "/bin", "KEEP": "1"})
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["FLWR_HOME"] == str(tmp_path)
    assert env["KEEP"] == "1"
    assert (Path(env["PATH"].split(":")[0]) / "flower-superexec").exists()


def test_what_ends_a_superlink_is_explained() -> None:
    assert explain("[Errno 98] error while attempting to bind on address: address already in use") == (
        "another program uses the port"
    )
    assert explain("INFO: all is well") == ""


def test_both_sides_call_the_variable_the_same() -> None:
    assert start.CONTROL_VARIABLE == flower_superlink.CONTROL_VARIABLE
