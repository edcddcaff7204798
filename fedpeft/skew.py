"""Whether a node has what the server has: the same fedpeft and libraries, the same base, the same adapter on it.

The rule, and why:

- fedpeft must be of the same version, because nothing else is promised of what two versions say to each other.
- flwr, peft, torch and transformers must be of the same release (*major.minor*). Another release may compute another
  update with the same names and shapes, which no digest would show.
- Another patch release of them is only told in the log: patches mend, and what one changes of the adapter's tensors
  shows in its digest. The build (`+cpu`, `+cu128`) is the node's own affair, as its device is.
- Base and adapter must have the server's digests. They do not depend on how a node holds the base.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedpeft.errors import sentence
from fedpeft.version import VERSION

LIBRARIES = ("flwr", "peft", "torch", "transformers")
"""The libraries that decide the bytes of an update."""

_LIBRARY = "library."
_VERSION, _DIGEST = re.compile(r"[0-9][0-9A-Za-z.+!-]{0,31}", re.ASCII), re.compile(r"[0-9a-f]{1,64}")
_SHOWN_CHARACTERS = 12

Level = Callable[[str], str]
"""How much of a version counts."""


@functools.cache
def installed() -> Mapping[str, str]:
    """The version of each of `LIBRARIES` that this process has; one that is not installed is not named."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Installation:
    """What one side has: fedpeft's version, those of libraries, the digests of the base and of the adapter on it.

    What is empty is not known, and is not compared. Without arguments it is what this process has.
    """

    fedpeft: str = VERSION
    libraries: Mapping[str, str] = field(default_factory=installed)
    base: str = ""
    adapter: str = ""

    @property
    def fields(self) -> dict[str, str]:
        """It as the fields of a packet's manifest."""
        libraries = {f"{_LIBRARY}{name}": version for name, version in self.libraries.items()}
        return {"version": self.fedpeft, **libraries, "base": self.base, "adapter": self.adapter}


def said_in(manifest: Mapping[str, object]) -> Installation:
    """The installation that a peer tells of; what does not look like a version or a digest is not known.

    So it may stand in a log, as nothing else may that a peer says.
    """

    def word(key: str, form: re.Pattern[str]) -> str:
        value = manifest.get(key)
        return value if isinstance(value, str) and form.fullmatch(value) else ""

    libraries = {name: word(f"{_LIBRARY}{name}", _VERSION) for name in LIBRARIES}
    known = {name: version for name, version in libraries.items() if version}
    return Installation(word("version", _VERSION), known, word("base", _DIGEST), word("adapter", _DIGEST))


def refusal(server: Installation, node: Installation, model: str) -> str:
    """Why `node` cannot take part, with what to install or set there; empty where it can.

    `model` is what the run calls its base.
    """
    if node.fedpeft != server.fedpeft:
        remedy = f"install the same version on the node: pip install 'fedpeft=={server.fedpeft}'"
        return sentence("fedpeft", expected=server.fedpeft, found=node.fedpeft or "no version", remedy=remedy)
    if others := _unlike(server, node, _release):
        return _of_libraries(server, node, others, _release)
    if _differ(server.base, node.base):
        expected, found = _short(server.base), _short(node.base)
        return sentence(
            "base model of the node",
            expected=f"that of {model}, digest {expected}",
            found=f"digest {found}",
            remedy=_model_remedy(model),
        )
    if _differ(server.adapter, node.adapter):
        others = _unlike(server, node, _patch)
        remedy = (
            f"run there: {_pip(server, others)}"
            if others
            else "install fedpeft there from where the server has it, and copy the server's base with its config.json"
        )
        expected, found = _short(server.adapter), _short(node.adapter)
        return sentence(
            "adapter on the node's base", expected=f"digest {expected}", found=f"digest {found}", remedy=remedy
        )
    return ""


def remark(server: Installation, node: Installation) -> str:
    """That `node` has other patch releases than the server; empty where it has the same."""
    others = _unlike(server, node, _patch)
    return _of_libraries(server, node, others, _patch) if others else ""


def _unlike(server: Installation, node: Installation, level: Level) -> list[str]:
    """The libraries that both tell of and that differ at `level`."""
    both = [name for name in LIBRARIES if name in server.libraries and name in node.libraries]
    return [name for name in both if level(server.libraries[name]) != level(node.libraries[name])]


def _of_libraries(server: Installation, node: Installation, names: list[str], level: Level) -> str:
    return sentence(
        "libraries of the node",
        expected=", ".join(f"{name} {level(server.libraries[name])}" for name in names),
        found=", ".join(f"{name} {_patch(node.libraries[name])}" for name in names),
        remedy=f"run there: {_pip(server, names)}",
    )


def _pip(server: Installation, names: list[str]) -> str:
    return " ".join(["pip install", *(f"'{name}=={_patch(server.libraries[name])}'" for name in names)])


def _model_remedy(model: str) -> str:
    if model.startswith("asset:"):
        name = model.removeprefix("asset:")
        return f"take its own out of the cache there (FEDPEFT_HOME) and run: fedpeft assets fetch {name}"
    own = "as model.folder in the node's file"
    return f"copy the server's folder of it to the node and name that {own}, or fetch that revision"


def _release(version: str) -> str:
    return ".".join(_patch(version).split(".")[:2])


def _patch(version: str) -> str:
    return version.partition("+")[0]


def _differ(one: str, other: str) -> bool:
    return bool(one and other and one != other)


def _short(digest: str) -> str:
    return digest[:_SHOWN_CHARACTERS]
