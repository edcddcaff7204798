from __future__ import annotations

import sys
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from clients.start import NODE_VARIABLE, PAUSES, command, explain
from fedpeft.config.node import load_node
from fedpeft.engines import flower_client
from fedpeft.errors import ConfigError

SECURE = '[server]\naddress = "lab.example:46000"\nroot_certificates = "ca.crt"\nprivate_key = "node-1"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ca.crt", "node-1"):
        (tmp_path / name).write_text("a key")
    return tmp_path


def line(folder: Path, text: str) -> tuple[str, ...]:
    (folder / "node.toml").write_text(text)
    return command(load_node(folder / "node.toml"))


def test_flower_understands_the_command_line_of_a_nodes_file(folder: Path) -> None:
    found = line(folder, f"partition = 3\nrank = 4\nport = 46101\n{SECURE}")
    asked = _parse_args_run_supernode().parse_args(found[3:])
    assert found[:3] == (sys.executable, "-m", "fedpeft.engines.flower_supernode")
    assert (asked.superlink, asked.host, asked.port) == ("lab.example:46000", "127.0.0.1", 46101)
    assert not asked.insecure
    assert asked.root_certificates == str(folder / "ca.crt")
    assert asked.auth_supernode_private_key == str(folder / "node-1")
    assert parse_config_args([asked.node_config]) == {"partition-id": 3, "rank": 4}


def test_a_node_without_a_rank_says_none_and_without_a_port_takes_a_free_one(folder: Path) -> None:
    found = line(folder, f"port = 0\n{SECURE}")
    assert found[found.index("--node-config") + 1] == "partition-id=0"
    assert int(found[found.index("--port") + 1]) > 1023


def test_without_tls_only_where_the_file_says_so(folder: Path) -> None:
    assert "--insecure" in line(folder, "[server]\ninsecure = true\n")
    with pytest.raises(ConfigError, match=r"server.root_certificates: expected a file, found none named"):
        line(folder, '[server]\nprivate_key = "node-1"\n')
    with pytest.raises(ConfigError, match=r"server.private_key: expected a file, found none to read at .*gone"):
        line(folder, SECURE.replace("node-1", "gone"))


def test_a_key_that_is_refused_for_a_minute_is_tried_again_within_it_and_after() -> None:
    assert sum(PAUSES.after(ends) for ends in range(1, 8)) > 60
    assert max(PAUSES.after(ends) for ends in range(1, 50)) <= 15


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[code: 2004] Failed to activate SuperNode.", "the server does not take this key now"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "not from the authority"),
        ("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred", "something answers at server.address, but no server"),
        ("ERROR: [Errno 98] error while attempting to bind: address already in use", "the node's own port"),
        ("INFO : SuperNode ID: 7", ""),
    ],
)
def test_what_ends_a_node_is_explained(said: str, told: str) -> None:
    assert told in explain(said)
    assert bool(told) == bool(explain(said))


def test_the_app_on_the_node_reads_the_file_from_the_variable_that_is_set() -> None:
    assert NODE_VARIABLE == flower_client.NODE_VARIABLE
