"""The settings of one node: what its operator decides, and no server can change.

They stand in a TOML file on the node. A profile may lie below them: what the node's own file says wins.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedpeft.config.data import SOURCES
from fedpeft.config.fields import Choice, choice, require, require_range
from fedpeft.config.parse import build, overlay, read_tree
from fedpeft.config.training import NODE_SETTINGS, ModelConfig
from fedpeft.errors import ConfigError, sentence

PROFILES = Path(__file__).resolve().parents[1] / "nodes" / "profiles"
"""Where the profiles are that come with fedpeft."""

OWN_PROFILES = "profiles"
"""The folder beside a node's file in which its operator may have others; they win over those that come with fedpeft."""


@dataclass(frozen=True)
class ServerConfig:
    """How the node reaches its server, and how each knows that the other is who it says.

    `address` is `host:port`. `root_certificates` is the file of the authority that signed the server's certificate,
    `private_key` that of the node's own key (ECDSA P-384). Without TLS only where `insecure` says so. With
    `trusted_entities` (a YAML file of Ed25519 keys by their id) the node runs no app that none of them has signed.
    The node says every `heartbeat_seconds` that it is alive; of one that is silent for twice as long the server
    believes that it has gone.
    """

    address: str = "127.0.0.1:9092"
    root_certificates: str = ""
    private_key: str = ""
    insecure: bool = False
    trusted_entities: str = ""
    heartbeat_seconds: int = 30

    def __post_init__(self) -> None:
        require_range(self, "heartbeat_seconds", 10, 1800)
        host, port = self.host, self.address.rpartition(":")[2]
        valid = bool(host) and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536
        plain = re.search(r"[\s/@?#]", self.address) is None
        require(
            valid and plain,
            "address",
            expected="host:port",
            found=self.address,
            remedy="write for example fed.example.org:9092, without https://",
        )
        require(
            not (self.insecure and self.root_certificates),
            "insecure",
            expected="false where root_certificates are given",
            found=self.insecure,
            remedy="remove one of the two",
        )

    @property
    def host(self) -> str:
        """The server's name or address alone."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The server's port."""
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True)
class HeldModel:
    """How this node holds and computes the base; an empty text is what the run says.

    `folder` is the base in a folder of this node's, for runs that name a folder of the server's. The others are as in
    a run's `model`; `gradient_checkpointing` can be turned on here, not off. A base that a run names on the Hugging
    Face Hub is taken only with `from_hub`.
    """

    folder: str = ""
    from_hub: bool = False
    device: str = ""
    precision: str = ""
    weights: str = ""
    gradient_checkpointing: bool = False
    device_map: str = ""

    def __post_init__(self) -> None:
        ModelConfig(**self.own)

    @property
    def own(self) -> dict[str, Any]:
        """The settings of a run's `model` that this node sets for itself."""
        return {key: getattr(self, key) for key in NODE_SETTINGS if getattr(self, key)}


@dataclass(frozen=True)
class LimitsConfig:
    """What a run may take of this node; 0 is no bound.

    `batch_size` is the most examples that are computed at once: a larger batch is computed in parts and accumulated.
    `threads` of torch. A run that would take more than `memory_gigabytes` (10⁹ bytes) is refused before it trains,
    and bases of other runs that stay in memory leave it when they would be in the way. A round that has taken
    `round_minutes` ends in a refusal. `tokens` bounds how long the rows are that a run may ask for. What the node keeps
    on its disk between rounds is that of the last `kept_runs`, of `kept_gigabytes` in all, the run at work apart.
    """

    batch_size: int = 0
    threads: int = 0
    memory_gigabytes: float = 0.0
    round_minutes: float = 0.0
    tokens: int = 0
    kept_runs: int = 20
    kept_gigabytes: float = 0.0

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            require_range(self, item.name, 0)


@dataclass(frozen=True)
class RequiredConfig:
    """The protections without which this node takes no part; 0 or false asks for none.

    `clip_norm` is the greatest norm of an update that the node sends, `noise_multiplier` the least noise that the node
    itself adds to its updates, in units of that norm, `promised_noise_multiplier` the least that the node or the server
    adds, which for the server's the node has only its word, `epsilon` the greatest ε, at δ = 10⁻⁵, that all rounds of a
    run come to by the noise that the node itself adds if it trains in each, `secure_aggregation` that the server sees
    no update alone, and `least_cohort` the fewest clients in a sum that the server sees.
    """

    clip_norm: float = 0.0
    noise_multiplier: float = 0.0
    promised_noise_multiplier: float = 0.0
    epsilon: float = 0.0
    secure_aggregation: bool = False
    least_cohort: int = 0

    def __post_init__(self) -> None:
        require_range(self, "clip_norm", 0.0)
        require_range(self, "noise_multiplier", 0.0)
        require_range(self, "promised_noise_multiplier", 0.0)
        require_range(self, "epsilon", 0.0)
        require_range(self, "least_cohort", 0)


@dataclass(frozen=True)
class NodeConfig:
    """Everything that a node's operator decides.

    `partition` is the node's number in the federation, from 0. `rank` is the greatest rank that it trains at (0: what
    the run gives it). `port`, on 127.0.0.1, has a page that says whether the node is well (0: none). `profile` names a
    profile whose values stand below this file's (empty: none): one that comes with fedpeft, or `profiles/NAME.toml`
    beside this file. `data` is where its rows are; `bundled` is its share of the bundled data that the run names.
    `peers` is a folder with the public keys of all nodes, `node-PARTITION.pub`: in secure sums this node then deals
    with those alone.
    """

    partition: int = 0
    profile: str = ""
    rank: int = 0
    port: int = 9094
    peers: str = ""
    server: ServerConfig = field(default_factory=ServerConfig)
    model: HeldModel = field(default_factory=HeldModel)
    data: Choice = choice(SOURCES, "bundled")
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    required: RequiredConfig = field(default_factory=RequiredConfig)

    def __post_init__(self) -> None:
        require_range(self, "partition", 0, 2**31 - 1)
        require_range(self, "rank", 0)
        require_range(self, "port", 0, 65535)
        signs = not self.peers or bool(self.server.private_key)
        remedy = "name server.private_key, or no peers"
        require(signs, "peers", expected="a private key beside them, to sign with", found="none", remedy=remedy)
        require(
            re.fullmatch(r"[a-z0-9_-]{0,64}", self.profile) is not None,
            "profile",
            expected=f"one of {', '.join(profiles())}",
            found=self.profile,
            remedy="name one of them, or a file of the folder profiles beside this file without its .toml",
        )


def load_node(path: Path, overrides: Iterable[str] = ()) -> NodeConfig:
    """The settings in a node's TOML file over those of its profile, `key=value` overrides on top; paths are absolute.

    A relative path in the file is meant from the file's own folder.

    Raises:
        ConfigError: no such file or profile, not TOML, or a key or value that is not valid.
    """
    own = overlay(NodeConfig, read_tree(path), overrides)
    node = build(NodeConfig, own)
    if node.profile:
        below = _profile(node.profile, path.absolute().parent / OWN_PROFILES)
        node = build(NodeConfig, overlay(NodeConfig, own, (), below=below))
    return _placed(node, path.absolute().parent)


def profiles(own: Path | None = None) -> dict[str, Path]:
    """The file of each profile, by its name: those that come with fedpeft, and over them those of the folder `own`."""
    found = {path.stem: path for folder in (PROFILES, own) if folder for path in folder.glob("*.toml")}
    return dict(sorted(found.items()))


def _profile(name: str, own: Path) -> dict[str, Any]:
    known = profiles(own)
    if name not in known:
        expected, remedy = f"one of {', '.join(known) or 'none'}", f"name one of them, or none, or write it into {own}"
        raise ConfigError(sentence("profile", expected=expected, found=repr(name), remedy=remedy))
    return read_tree(known[name])


def _placed(node: NodeConfig, folder: Path) -> NodeConfig:
    """`node` with every path that is not empty made absolute, from `folder`."""

    def placed(text: str) -> str:
        return str(folder / Path(text).expanduser()) if text else ""

    members = {
        name: replace(member, path=placed(member.path)) if hasattr(member, "path") else member
        for name, member in node.data.members.items()
    }
    return replace(
        node,
        peers=placed(node.peers),
        server=replace(
            node.server,
            root_certificates=placed(node.server.root_certificates),
            private_key=placed(node.server.private_key),
            trusted_entities=placed(node.server.trusted_entities),
        ),
        model=replace(node.model, folder=placed(node.model.folder)),
        data=replace(node.data, members=members),
    )
