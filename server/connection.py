"""A SuperLink's name in Flower's `config.toml`, by which `flwr run . NAME` and `flwr ls NAME` find it."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedpeft.errors import ConfigError, sentence
from fedpeft.files import write_atomically

HOME = Path.home() / "federation"
"""Where a server keeps everything unless it is told otherwise."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RESERVED = {"default", "local", "supergrid"}


@dataclass(frozen=True)
class Connection:
    """Where a SuperLink is, `host:port`, and the authority that signed its certificate; None: no TLS at all."""

    name: str
    address: str
    root_certificates: Path | None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in _RESERVED:
            expected = f"letters, digits, - and _, and none of {', '.join(sorted(_RESERVED))}"
            raise ConfigError(
                sentence("name", expected=expected, found=repr(self.name), remedy="name the federation otherwise")
            )


def write_connection(connection: Connection, home: Path) -> Path:
    """`config.toml` in `home` names the connection, and as the default where none is; what stood there stays.

    Raises:
        ConfigError: the file is there and is not TOML, or cannot be written.
    """
    path = home / "config.toml"
    tree = _read(path)
    known = tree.get("superlink", {})
    entry: dict[str, Any] = {"address": connection.address}
    if connection.root_certificates is None:
        entry["insecure"] = True
    else:
        entry["root-certificates"] = str(connection.root_certificates.absolute())
    tree["superlink"] = {"default": connection.name, **known, connection.name: entry}
    try:
        write_atomically(path, tomli_w.dumps(tree).encode(), 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> ConfigError:
    remedy = "correct it, or name another folder with --home"
    return ConfigError(sentence(str(path), expected="a TOML file that can be written", found=str(error), remedy=remedy))
