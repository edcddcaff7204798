from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config import choose, to_tree
from fedpeft.config.data import SOURCES, Csv
from fedpeft.config.node import (
    PROFILES,
    HeldModel,
    LimitsConfig,
    NodeConfig,
    RequiredConfig,
    ServerConfig,
    load_node,
    profiles,
)
from fedpeft.config.parse import build
from fedpeft.errors import ConfigError
from tests.config.strategies import PLAIN, TEXTS, settings_of

ROOT = Path(__file__).parents[2]
SERVERS = st.builds(
    ServerConfig,
    address=st.sampled_from(["127.0.0.1:9092", "fed.example.org:1", "[::1]:65535"]),
    root_certificates=TEXTS,
    private_key=TEXTS,
    trusted_entities=TEXTS,
)
HELD = st.builds(
    HeldModel,
    folder=TEXTS,
    from_hub=st.booleans(),
    device=st.sampled_from(["", "cpu", "cuda:1"]),
    precision=st.sampled_from(["", "bfloat16"]),
    weights=st.sampled_from(["", "nf4", "float32"]),
    gradient_checkpointing=st.booleans(),
    device_map=st.sampled_from(["", "auto"]),
)
SOURCES_GIVEN = st.one_of(
    st.just(choose(SOURCES, "bundled")),
    st.builds(lambda csv: choose(SOURCES, "csv", csv=csv), settings_of(Csv)),
)
NODES = st.builds(
    NodeConfig,
    partition=st.integers(0, 40),
    profile=st.just(""),
    rank=st.integers(0, 40),
    port=st.integers(0, 65535),
    server=SERVERS,
    model=HELD,
    data=SOURCES_GIVEN,
    limits=st.builds(
        LimitsConfig,
        batch_size=PLAIN[int],
        threads=PLAIN[int],
        memory_gigabytes=PLAIN[float],
        round_minutes=PLAIN[float],
        tokens=PLAIN[int],
    ),
    required=st.builds(
        RequiredConfig, clip_norm=PLAIN[float], noise_multiplier=PLAIN[float], secure_aggregation=st.booleans()
    ),
)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_text(text: str) -> Path:
        path = tmp_path / "node.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


@settings(max_examples=30)
@given(NODES)
def test_toml_is_inverse(node: NodeConfig) -> None:
    text = tomli_w.dumps(to_tree(node))
    assert build(NodeConfig, tomllib.loads(text)) == node
    assert hash(build(NodeConfig, tomllib.loads(text))) == hash(node)


def test_an_empty_file_is_a_node_without_wishes(write: Any) -> None:
    assert load_node(write("")) == NodeConfig()


def test_paths_are_meant_from_the_files_own_folder(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/somebody")
    node = load_node(
        write(
            """
            [server]
            root_certificates = "ca.crt"
            private_key = "~/keys/node-0"
            trusted_entities = "/etc/trusted.yaml"
            [model]
            folder = "../model"
            [data]
            source = "csv"
            csv = { path = "rows/*.csv", columns = { text = "review" } }
            """
        )
    )
    assert node.server.root_certificates == str(tmp_path / "ca.crt")
    assert node.server.private_key == "/home/somebody/keys/node-0"
    assert node.server.trusted_entities == "/etc/trusted.yaml"
    assert node.model.folder == str(tmp_path / "../model")
    assert node.data.chosen.path == str(tmp_path / "rows" / "*.csv")
    assert node.data.chosen.columns.text == "review"
    assert node.data.members["jsonl"].path == ""


def test_overrides_are_over_the_file(write: Any, tmp_path: Path) -> None:
    node = load_node(write("rank = 4\n[data.csv]\ndelimiter = ';'\n"), ["rank=8", "data=csv", "data.csv.path=a.csv"])
    assert node.rank == 8
    assert node.data.chosen == Csv(path=str(tmp_path / "a.csv"), delimiter=";")


def test_a_profile_lies_below_the_file(write: Any) -> None:
    profile = load_node(write('profile = "edge-cpu"\n'))
    own = load_node(write('profile = "edge-cpu"\nrank = 2\n[limits]\nthreads = 1\n'))
    assert profile.model.weights == "bfloat16"
    assert own == replace(profile, rank=2, limits=replace(profile.limits, threads=1))
    assert own != profile


def test_a_profile_of_the_nodes_own_wins_over_one_that_comes_with_fedpeft(write: Any, tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    for name in ("laptop", "attic"):
        (tmp_path / "profiles" / f"{name}.toml").write_text("rank = 3\n")
        node = load_node(write(f'profile = "{name}"\n'))
        assert node == replace(NodeConfig(profile=name), rank=3)
    with pytest.raises(ConfigError, match="expected one of attic, big-gpu, edge-cpu, laptop, one-gpu, found 'cellar'"):
        load_node(write('profile = "cellar"\n'))


def test_the_wheel_has_every_profile() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fedpeft"]
    found = {path.stem for pattern in stated for path in (ROOT / "fedpeft").glob(pattern) if path.parent == PROFILES}
    assert found == set(profiles()) == {"edge-cpu", "laptop", "one-gpu", "big-gpu"}


@pytest.mark.parametrize("name", ["edge-cpu", "laptop", "one-gpu", "big-gpu"])
def test_each_profile_bounds_what_a_run_may_take(write: Any, name: str) -> None:
    assert name in profiles()
    node = load_node(write(f'profile = "{name}"\n'))
    assert min(node.rank, node.limits.batch_size, node.limits.threads, node.limits.tokens) > 0
    assert min(node.limits.memory_gigabytes, node.limits.round_minutes) > 0
    plain = NodeConfig(profile=name)
    kept = replace(node, rank=0, model=HeldModel(), limits=LimitsConfig())
    assert kept == plain, "a profile says nothing of a server, of data or of a partition"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("partion = 1", "did you mean partition"),
        ("[server]\nadress = 'a:1'", "server.adress: expected one of the keys address"),
        ("threads = 2", "did you mean limits.threads"),
        ("[server]\naddress = 'https://fed.example.org:9092'", "server.address: expected host:port"),
        ("[server]\naddress = 'fed.example.org'", "server.address: expected host:port"),
        ("[server]\naddress = 'fed.example.org:99999'", "server.address: expected host:port"),
        ("[server]\naddress = 'fed.example.org:x'", "server.address: expected host:port"),
        ("[server]\ninsecure = true\nroot_certificates = 'ca.crt'", "server.insecure: expected false where"),
        ("[model]\nweights = 'int3'", "model.weights: expected one of float32"),
        ("[model]\ndevice = 'tpu'", "model.device: expected auto, cpu"),
        ("[limits]\nmemory_gigabytes = -1", "limits.memory_gigabytes: expected a number at least 0"),
        ("[required]\nclip_norm = -1", "required.clip_norm: expected a number at least 0"),
        ("partition = -1", "partition: expected a number between 0"),
        ("port = 65536", "port: expected a number between 0 and 65535"),
        ("profile = 'laptp'", "profile: expected one of big-gpu, edge-cpu, laptop, one-gpu, found 'laptp'"),
        ("profile = '../../etc/x'", "profile: expected one of big-gpu"),
        ("data = 'cvs'", "did you mean 'csv'"),
    ],
)
def test_a_mistake_is_one_sentence(write: Any, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_node(write(text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: expected a TOML file, found no such file"):
        load_node(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("fed.example.org:9092", "fed.example.org", 9092), ("10.0.0.7:1", "10.0.0.7", 1), ("[::1]:9", "::1", 9)],
)
def test_an_address_is_a_host_and_a_port(address: str, host: str, port: int) -> None:
    server = ServerConfig(address=address)
    assert (server.host, server.port) == (host, port)
