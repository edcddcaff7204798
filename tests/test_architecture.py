"""Who may import whom: the design's table as data, held against the source of every module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("fedpeft", "clients", "server", "simulations")
MOST_LINES = 400

GROUND = {"errors", "version", "randomness", "files"}
ADAPTERS = GROUND | {"adapters"}
UPDATES = ADAPTERS | {"quarantine", "updates"}
MECHANISMS = {"stages", "codecs", "merges", "privacy", "optimizers"}
CONFIG = UPDATES | MECHANISMS | {"config"}
STRATEGY = CONFIG | {"strategy"}
WIRE = STRATEGY | {"wire"}
RECORDS = {"memory", "checkpoint", "journal"}
COHORT = {"cohort", "cohort_choice", "cohort_layers", "cohort_pass", "cohort_products"}
STEPS = {"batches", "corrections", "example_gradients", "gradient_checks", "private_steps"}
BASES = {"adaptation", "base_weights", "bases", "models"}
TORCH = BASES | {
    "evaluation",
    "fisher",
    "frozen_products",
    "compiling",
    "replacing",
    "shared_base",
    "tasks",
    "training",
    "trunk",
    *STEPS,
    *COHORT,
}
FEDERATION = (
    WIRE
    | RECORDS
    | {
        "laws",
        "plans",
        "ranks",
        "requests",
        "feedback",
        "client",
        "gathering",
        "rounds",
        "secure_client",
        "secure_rounds",
        "seen",
    }
)
EDGES = FEDERATION | TORCH | {"assets", "data"}
COMPOSED = EDGES | {"compatibility", "experiment", "bounds", "events", "locks", "logs", "runs", "report", "sinks"}

# Each room of fedpeft, and the other rooms that it may import.
LAYERS = {"coordinates", "own_layers", "peft_layers", "penalties", "residual_layers", "sb_layers"}

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "randomness": set(),
    "files": {"errors"},
    "quarantine": {"errors"},
    "kept": set(),
    "links": set(),
    "locks": {"errors"},
    "node_key": {"errors"},
    "pulse": set(),
    "skew": {"errors", "version"},
    "supervision": {"errors"},
    "adapters": GROUND,
    "updates": ADAPTERS | {"quarantine"},
    **dict.fromkeys(sorted(MECHANISMS), UPDATES),
    "privacy": UPDATES | {"merges", "stages"},
    "config": UPDATES | MECHANISMS | {"links"},
    "residuals": UPDATES | {"merges"},
    "pruning": UPDATES | {"merges"},
    "strategy": CONFIG | {"residuals"},
    "plans": STRATEGY,
    "codec_laws": STRATEGY | {"plans"},
    "privacy_laws": STRATEGY | {"plans"},
    "laws": STRATEGY | {"codec_laws", "plans", "privacy_laws"},
    "compatibility": STRATEGY | {"laws"},
    "wire": STRATEGY,
    "ranks": WIRE,
    "request_fields": WIRE | {"residuals"},
    "first_adapters": WIRE,
    "requests": WIRE | {"first_adapters", "request_fields", "residuals"},
    "memory": UPDATES,
    "checkpoint": UPDATES | {"privacy"},
    "journal": UPDATES,
    "secure_client": WIRE,
    "secure_rounds": WIRE | {"gathering", "secure_client"},
    "feedback": WIRE,
    "client": WIRE | {"feedback", "memory", "pruning", "requests", "secure_client"},
    "seen": WIRE,
    "gathering": WIRE | {"ranks", "requests", "seen"},
    "rounds": WIRE | RECORDS | {"gathering", "ranks", "requests", "residuals", "secure_rounds", "seen"},
    "assets": GROUND,
    "data": GROUND | {"config", "assets"},
    "residual_layers": ADAPTERS,
    "sb_layers": ADAPTERS,
    "coordinates": ADAPTERS,
    "peft_layers": ADAPTERS,
    "penalties": ADAPTERS,
    "own_layers": ADAPTERS,
    "base_weights": GROUND | {"config"},
    "bases": GROUND | {"config", "assets", "base_weights"},
    "adaptation": ADAPTERS | {"config", "base_weights", *LAYERS},
    "models": ADAPTERS | {"config", "base_weights", "bases", "adaptation", *LAYERS},
    "tasks": ADAPTERS | {"config", "data", "own_layers"},
    "replacing": set(),
    "compiling": {"errors", "replacing"},
    "frozen_products": {"replacing"},
    "evaluation": ADAPTERS | {"first_positions", "frozen_products", "models", "own_layers", "tasks"},
    "fisher": ADAPTERS | {"evaluation", "models", "own_layers", "tasks"},
    "batches": UPDATES | {"privacy", "tasks"},
    "corrections": UPDATES | {"client", "merges", "pruning"},
    "example_gradients": ADAPTERS | {"evaluation", "models", "replacing", "tasks"},
    "gradient_checks": ADAPTERS | {"evaluation", "example_gradients", "models", "tasks"},
    "private_steps": UPDATES | {"example_gradients", "models", "privacy", "tasks"},
    "training": WIRE | STEPS | {"client", "compiling", "data", "evaluation", "models", "pruning", "tasks"},
    "trunk": ADAPTERS | {"evaluation", "frozen_products", "models", "tasks"},
    "shared_base": {"models"},
    "cohort_layers": {"cohort_products", "example_gradients", "replacing"},
    "cohort_products": set(),
    "first_positions": {"replacing"},
    "cohort_pass": {"cohort_layers", "evaluation", "first_positions", "frozen_products", "models", "tasks"},
    "cohort": WIRE
    | STEPS
    | {"client", "cohort_layers", "cohort_pass", "coordinates", "evaluation", "models", "tasks", "training"},
    "cohort_choice": {"cohort", "cohort_layers", "errors", "example_gradients", "gradient_checks", "training"},
    "loaded": EDGES | {"kept"},
    "experiment": EDGES | {"loaded"},
    "bounds": EDGES | {"experiment"},
    "nodes": EDGES | {"experiment", "loaded"},
    "runs": GROUND | {"config", "locks"},
    "logs": {"errors"},
    "events": {"logs"},
    "sinks": GROUND | {"config", "logs"},
    "watching": GROUND | {"journal", "logs", "quarantine"},
    "adapter_folders": ADAPTERS | {"runs"},
    "merging": CONFIG | {"adapter_folders"},
    "report": GROUND | {"config", "journal", "links"},
    "federate": COMPOSED,
    "blas": set(),
    "imports": set(),
    "engines": COMPOSED | {"federate", "imports", "kept", "loaded", "node_key", "nodes", "pulse", "skew"},
    "progress": GROUND | {"federate", "report"},
    "sweeps": COMPOSED | {"federate", "engines"},
    "commands": COMPOSED | {"federate", "engines", "merging", "node_key", "nodes", "progress", "sweeps", "watching"},
    "cli": GROUND | {"assets", "commands", "engines", "imports"},
    "__main__": {"cli"},
}

# Where each library lives: a room, or a pattern over a module's path inside fedpeft; "*" is everywhere.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "numpy": ("*",),
    "scipy": ("adapters", "merges"),
    "torch": (
        "adaptation",
        "base_weights",
        "bases",
        "models",
        *sorted(COHORT),
        *sorted(LAYERS),
        "compiling",
        "corrections",
        "evaluation",
        "example_gradients",
        "first_positions",
        "frozen_products",
        "replacing",
        "fisher",
        "gradient_checks",
        "private_steps",
        "shared_base",
        "sinks/tensorboard",
        "tasks",
        "training",
        "trunk",
    ),
    "transformers": ("base_weights", "bases", "models", "tasks"),
    "peft": ("adaptation", "models", "cohort_products", *sorted(LAYERS - {"own_layers"}), "own_layers/switch"),
    "yaml": ("assets",),
    "safetensors": ("adapter_folders", "base_weights", "bases", "files", "models"),
    "huggingface_hub": ("bases", "data"),
    "datasets": ("data",),
    "pyarrow": ("data",),
    "PIL": ("data",),
    "flwr": ("engines/flower*", "engines/ray*"),
    "starlette": ("engines/flower*",),
    "zstandard": ("codecs/entropy",),
    "ray": ("engines/ray*",),
    "matplotlib": ("report",),
    "dp_accounting": ("privacy/accountant",),
    "cryptography": ("privacy/secure/*", "commands/doctor_server", "node_key"),
    "typer": ("cli", "commands"),
    "rich": ("commands", "progress"),
    "tomli_w": ("config",),
    "prometheus_client": ("sinks/prometheus",),
    "mlflow": ("sinks/mlflow",),
    "wandb": ("sinks/wandb",),
}

COMMANDS = {"fedpeft.engines", "fedpeft.cli", "fedpeft.errors", "fedpeft.supervision", "typer"}
# What the folders beside fedpeft may import of this project; `simulations` may also import any library.
APPS: dict[str, set[str]] = {
    "clients": {"clients", *COMMANDS, "fedpeft.assets", "fedpeft.config"},
    "server": {
        "server",
        *COMMANDS,
        "cryptography",
        "tomli_w",
        *(f"fedpeft.{room}" for room in ("checkpoint", "files", "journal", "locks", "runs")),
    },
    "simulations": {"simulations", "clients", "server", "fedpeft"},
}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def violations(path: str, source: str) -> list[str]:
    """Every rule that the module at `path` (from the project's root) breaks, one sentence each."""
    tree = ast.parse(source)
    found = [f"{path}:{line} {what}" for line, what in (*bad_imports(path, tree), *bad_statements(path, tree))]
    lines = len(source.splitlines())
    if lines > MOST_LINES:
        found.append(f"{path} has {lines} lines; a module stops at {MOST_LINES}, so split it")
    public = not PurePosixPath(path).stem.startswith("_") or path.endswith("__init__.py")
    if public and not ast.get_docstring(tree):
        found.append(f"{path}:1 has no docstring; say in one sentence what the module holds")
    return found


def bad_imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    folder, room, place = locate(path)
    for line, module in imported(tree):
        top, *rest = module.split(".")
        if not top:
            yield line, "has a relative import; write the whole name, from fedpeft down"
        elif top in PICKLES:
            yield line, f"imports {top}; what a peer sends is never unpickled, so use safetensors or JSON"
        elif folder != "fedpeft":
            yield from bad_app_import(line, folder, module)
        elif top == "fedpeft":
            yield from bad_room_import(line, room, rest[0] if rest else "")
        elif top in FOLDERS:
            yield line, f"imports {top}; fedpeft knows nothing of the folders beside it"
        elif top not in sys.stdlib_module_names and room:
            yield from bad_library_import(line, room, place, top)


def bad_app_import(line: int, folder: str, module: str) -> Iterator[tuple[int, str]]:
    allowed = APPS[folder]
    inside = any(module == name or module.startswith(f"{name}.") for name in allowed)
    ours = module.split(".")[0] in FOLDERS
    foreign = module.split(".")[0] not in sys.stdlib_module_names
    if not inside and (ours or (foreign and folder != "simulations")):
        yield line, f"imports {module}; {folder}/ may import {', '.join(sorted(allowed))} and the standard library"


def bad_room_import(line: int, room: str, other: str) -> Iterator[tuple[int, str]]:
    if room in ("", other):
        return
    if room not in ROOMS:
        yield line, f"is in the room {room!r}, which is not in the table ROOMS; add a row that says what it may import"
    elif other not in ROOMS:
        yield line, f"imports {other or 'fedpeft'!r} of fedpeft; import from the room that defines the name"
    elif other not in ROOMS[room]:
        yield line, f"imports fedpeft.{other}; {room} may import {', '.join(sorted(ROOMS[room])) or 'no other room'}"


def bad_library_import(line: int, room: str, place: str, library: str) -> Iterator[tuple[int, str]]:
    homes = LIBRARIES.get(library)
    if homes is None:
        yield line, f"imports {library}, which is not in the table LIBRARIES; add a row that says where it lives"
    elif not any(room == home or fnmatch(place, home) for home in homes):
        yield line, f"imports {library}; {library} lives in {', '.join(f'fedpeft/{home}' for home in homes)}"


def bad_statements(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    folder, room, _ = locate(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "has an assert; raise one of fedpeft.errors"
        call = node.func if isinstance(node, ast.Call) else None
        if isinstance(call, ast.Name) and call.id == "print" and folder != "simulations" and room != "cli":
            yield call.lineno, "prints; only the command line speaks to a user"


def locate(path: str) -> tuple[str, str, str]:
    """The top folder, the room in it (empty for the package's own `__init__`), and the path inside the folder."""
    folder, *rest = PurePosixPath(path).with_suffix("").parts
    room = "" if rest == ["__init__"] else rest[0]
    return folder, room, "/".join(rest)


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of each import; a relative import has a name that begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, f".{node.module or ''}"
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


MODULES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_module_keeps_the_rules(path: str) -> None:
    found = violations(path, (ROOT / path).read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_every_room_named_in_the_table_has_a_row() -> None:
    named = set().union(*ROOMS.values())
    assert named <= set(ROOMS)


def test_no_two_rooms_import_each_other() -> None:
    both = [(room, other) for room, allowed in ROOMS.items() for other in allowed if room in ROOMS[other]]
    assert not both


def test_public_names_are_sorted() -> None:
    tree = ast.parse((ROOT / "fedpeft/__init__.py").read_text(encoding="utf-8"))
    lists = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    assert len(lists) == 1
    # The linter's order: CONSTANTS, then Classes, then functions.
    assert lists[0] == sorted(lists[0], key=lambda name: (not name.isupper(), not name[:1].isupper(), name))


CLEAN = '"""What is here."""\n'
PLANTED = [
    ("fedpeft/codecs/dense.py", "import torch", "imports torch; torch lives in fedpeft/adaptation"),
    ("fedpeft/codecs/dense.py", "from torch import nn", "imports torch"),
    ("fedpeft/codecs/dense.py", "def f():\n    import torch.nn", ":3 imports torch"),
    (
        "fedpeft/training.py",
        "import transformers",
        "transformers lives in fedpeft/base_weights, fedpeft/bases, fedpeft/models, fedpeft/tasks",
    ),
    ("fedpeft/training.py", "from peft import LoraConfig", "peft lives in fedpeft/adaptation, fedpeft/models"),
    ("fedpeft/engines/local.py", "import flwr", "flwr lives in fedpeft/engines/flower*"),
    ("fedpeft/engines/flower.py", "import ray", "ray lives in fedpeft/engines/ray*"),
    ("fedpeft/cli.py", "import matplotlib.pyplot", "matplotlib lives in fedpeft/report"),
    ("fedpeft/rounds.py", "from rich.table import Table", "imports rich"),
    ("fedpeft/config/data.py", "import pyarrow", "imports pyarrow"),
    ("fedpeft/wire.py", "import safetensors", "imports safetensors"),
    ("fedpeft/wire.py", "import scipy.linalg", "scipy lives in fedpeft/adapters, fedpeft/merges"),
    ("fedpeft/residuals.py", "import scipy", "imports scipy"),
    ("fedpeft/wire.py", "import sklearn", "not in the table LIBRARIES"),
    ("fedpeft/requests.py", "import peft", "peft lives in fedpeft/adaptation, fedpeft/models"),
    ("fedpeft/errors.py", "from fedpeft.adapters import AdapterSpec", "errors may import no other room"),
    ("fedpeft/adapters/lora.py", "from fedpeft.updates import Update", "imports fedpeft.updates"),
    ("fedpeft/codecs/dense.py", "from fedpeft.merges import Merge", "imports fedpeft.merges"),
    ("fedpeft/merges/rule.py", "from fedpeft.residuals import grow", "imports fedpeft.residuals"),
    ("fedpeft/strategy.py", "from fedpeft.wire import Packet", "imports fedpeft.wire"),
    ("fedpeft/wire.py", "from fedpeft.requests import fit_request", "imports fedpeft.requests"),
    ("fedpeft/residual_layers.py", "from fedpeft.models import install", "imports fedpeft.models"),
    ("fedpeft/config/run.py", "from fedpeft import models", "imports fedpeft.models"),
    ("fedpeft/report/page.py", "import fedpeft.rounds", "imports fedpeft.rounds"),
    ("fedpeft/wire.py", "from fedpeft import RunConfig", "import from the room that defines the name"),
    ("fedpeft/helpers.py", "from fedpeft.errors import ConfigError", "not in the table ROOMS"),
    ("fedpeft/engines/flower.py", "import clients.app", "knows nothing of the folders beside it"),
    ("fedpeft/codecs/topk.py", "from .codec import Codec", "relative import"),
    ("fedpeft/checkpoint.py", "import pickle", "never unpickled"),
    ("simulations/compare.py", "from dill import loads", "never unpickled"),
    ("clients/app.py", "from server.app import app", "imports server.app"),
    ("server/app.py", "import clients", "imports clients"),
    ("clients/app.py", "from fedpeft.training import fit", "clients/ may import clients, fedpeft.assets"),
    ("server/app.py", "import torch", "imports torch"),
    ("fedpeft/rounds.py", "assert True", "has an assert"),
    ("simulations/compare.py", "assert True", "has an assert"),
    ("fedpeft/rounds.py", "print(1)", "prints"),
    ("server/app.py", "print(1)", "prints"),
    ("fedpeft/rounds.py", "x = 1\n" * MOST_LINES, "has 401 lines"),
]


@pytest.mark.parametrize(("path", "source", "expected"), PLANTED)
def test_planted_violation_is_found(path: str, source: str, expected: str) -> None:
    found = violations(path, CLEAN + source)
    assert len(found) == 1
    assert expected in found[0]


def test_missing_docstring_is_found() -> None:
    assert violations("fedpeft/rounds.py", "import json\n") == [
        "fedpeft/rounds.py:1 has no docstring; say in one sentence what the module holds"
    ]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fedpeft/__init__.py", "from fedpeft.config import RunConfig"),
        ("fedpeft/models.py", "import peft, torch, transformers, numpy, json"),
        ("fedpeft/tasks/labels.py", "import torch\nfrom fedpeft.config import RunConfig"),
        ("fedpeft/engines/flower_app.py", "from flwr.app import Message\nfrom fedpeft.rounds import run"),
        ("fedpeft/cli.py", "import typer\nprint(1)"),
        ("clients/app.py", "from fedpeft.engines.flower import client_app"),
        ("simulations/compare.py", "import sklearn, clients.app, server.app, fedpeft.rounds\nprint(1)"),
    ],
)
def test_clean_module_passes(path: str, source: str) -> None:
    assert violations(path, CLEAN + source) == []
