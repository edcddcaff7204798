"""Ways to merge adapters of unlike rank on one module, each as a fold, and the adapters that they are given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from fedpeft.adapters import AdapterSpec, AdapterState, Factors, ModuleSpec, Tensors, factors
from fedpeft.merges import exactness, padded, truncated
from fedpeft.merges.projections import Gathered
from fedpeft.randomness import rng
from fedpeft.updates import ServerState

RANKS = (4, 8, 16, 32, 64)
SERVER_RANK = 64
MOST_PEFT_ADAPTERS = 100
NOISE = 0.5
"""A client's own part of a factor, over the part that all share."""
NOTHING = {"layer.A": np.zeros(1, np.float32), "layer.B": np.zeros(1, np.float32)}
"""What clients received: an adapter of zeros, so that what they send is the adapter itself."""


class Cell(NamedTuple):
    """One problem: a module of shape (`size`, `size`), and how many clients send adapters of which `SPECTRA`."""

    size: int
    clients: int
    spectrum: str = "decaying"


class Sent(NamedTuple):
    """One client's adapter, float32, and its share of the mean; shares add up to 1."""

    share: float
    tensors: Tensors


class Outcome(NamedTuple):
    """The adapter of the server's rank, and what gives the mean before it was cut, dense; None where there is none."""

    cut: Factors | None
    mean: Callable[[], np.ndarray] | None


class Way(NamedTuple):
    """A way to merge, as a fold, and the words in which it declines a cell.

    With `loads`, all adapters lie in a model before it can begin; neither time nor memory of that is its own.
    """

    begin: Callable[[Cell], Any]
    add: Callable[[Any, Sent], Any]
    finish: Callable[[Any], Outcome]
    loads: bool = False
    declines: Callable[[Cell], str] = lambda _: ""


def arriving(cell: Cell) -> Iterator[Sent]:
    """The clients' adapters, drawn when they are asked for; the same on every call."""
    draw = SPECTRA[cell.spectrum](cell.size)
    examples = rng(0, "examples").integers(100, 1000, cell.clients)
    for at, count in enumerate(examples):
        b, a = draw(rng(0, "client", at), RANKS[at % len(RANKS)])
        yield Sent(float(count / examples.sum()), {"layer.B": b, "layer.A": a})


def _normal(random: np.random.Generator, size: int, rank: int) -> Factors:
    b, a = (random.standard_normal(shape, dtype=np.float32) for shape in ((size, rank), (rank, size)))
    return Factors(b, a)


def _decaying(size: int) -> Callable[[np.random.Generator, int], Factors]:
    """The leading part of a signal that all share, and noise; the i-th singular value is about 1/i of the first."""
    shared = _normal(rng(0, "shared"), size, max(RANKS))

    def draw(random: np.random.Generator, rank: int) -> Factors:
        own, root = _normal(random, size, rank), 1 / np.sqrt(np.arange(1, rank + 1, dtype=np.float32))
        b = (shared.b[:, :rank] + np.float32(NOISE) * own.b) * root
        return Factors(b, root[:, None] * (shared.a[:rank] + np.float32(NOISE) * own.a))

    return draw


def _flat(size: int) -> Callable[[np.random.Generator, int], Factors]:
    """Noise alone: no direction stands out, so the cut falls between singular values that are nearly equal."""
    return lambda random, rank: _normal(random, size, rank)


SPECTRA: Mapping[str, Callable[[int], Callable[[np.random.Generator, int], Factors]]] = {
    "decaying": _decaying,
    "flat": _flat,
}


def _server(cell: Cell) -> ServerState:
    """A server that holds zeros at its rank."""
    shapes = (("A", (SERVER_RANK, cell.size)), ("B", (cell.size, SERVER_RANK)))
    spec = AdapterSpec("benchmark", "lora", (ModuleSpec("layer", "lora", SERVER_RANK, 1.0, shapes),))
    zeros = {key: np.zeros(shape, np.float32) for key, shape in spec.shapes.items()}
    return ServerState("benchmark", 0, 0, AdapterState(spec, zeros))


class _Fold(NamedTuple):
    state: ServerState
    sums: Any

    @property
    def modules(self) -> tuple[ModuleSpec, ...]:
        return self.state.adapter.spec.modules

    def outcome(self, delta: Tensors, exact: Factors | None = None) -> Outcome:
        cut = factors(self.modules[0], NOTHING, delta)
        mean = exact or cut
        return Outcome(cut, lambda: mean.b @ mean.a)


def _exact_add(fold: _Fold, sent: Sent) -> _Fold:
    return fold._replace(sums=exactness.add(fold.sums, fold.modules, NOTHING, sent.tensors, sent.share))


def _exact_finish(fold: _Fold) -> Outcome:
    exact = exactness.means(fold.sums)
    return fold.outcome(truncated(Gathered(fold.state, fold.modules, {}, exact)).delta, exact["layer"])


def _plain_begin(cell: Cell) -> _Fold:
    state = _server(cell)
    return _Fold(state, padded.begin(state.adapter.spec.shapes))


def _plain_finish(fold: _Fold) -> Outcome:
    return fold.outcome(padded.mean(fold.sums, fold.state.adapter.tensors, 1.0, "zero"))


def _pair(sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(sent.tensors["layer.B"]), torch.from_numpy(sent.tensors["layer.A"])


def _dense_add(total: torch.Tensor, sent: Sent) -> torch.Tensor:
    b, a = (factor.to(total.device) for factor in _pair(sent))
    return total.addmm_(b, a, alpha=sent.share)


def _dense_finish(total: torch.Tensor) -> Outcome:
    u, values, vt = torch.linalg.svd(total, full_matrices=False)
    b, a = u[:, :SERVER_RANK] * values[:SERVER_RANK], vt[:SERVER_RANK]
    return Outcome(Factors(b.cpu().numpy(), a.cpu().numpy()), lambda: total.cpu().numpy())


class _Loaded(NamedTuple):
    """A peft model of one layer, once it holds an adapter, and the share of each adapter by name."""

    base: torch.nn.Module
    model: Any
    shares: Mapping[str, float]


def _peft_begin(cell: Cell) -> _Loaded:
    layer = torch.nn.Linear(cell.size, cell.size, bias=False)
    return _Loaded(torch.nn.Sequential(OrderedDict(layer=layer)), None, {})


def _peft_add(loaded: _Loaded, sent: Sent) -> _Loaded:
    (b, a), name = _pair(sent), f"client {len(loaded.shares)}"
    config = LoraConfig(r=len(a), lora_alpha=len(a), target_modules=["layer"], init_lora_weights=False)
    model: Any = loaded.model or get_peft_model(loaded.base, config, adapter_name=name)
    if loaded.model:
        model.add_adapter(name, config)
    model.base_model.model.layer.lora_B[name].weight.data.copy_(b)
    model.base_model.model.layer.lora_A[name].weight.data.copy_(a)
    return loaded._replace(model=model, shares={**loaded.shares, name: sent.share})


def _combined(loaded: _Loaded, combination: str, rank: int | None = None) -> Factors:
    names, shares = list(loaded.shares), list(loaded.shares.values())
    loaded.model.add_weighted_adapter(names, shares, "merged", combination_type=combination, svd_rank=rank)
    layer = loaded.model.base_model.model.layer
    return Factors(*(side["merged"].weight.data.numpy() for side in (layer.lora_B, layer.lora_A)))


def _peft_svd(loaded: _Loaded) -> Outcome:
    return Outcome(_combined(loaded, "svd", SERVER_RANK), None)


def _peft_cat(loaded: _Loaded) -> Outcome:
    whole = _combined(loaded, "cat")
    return Outcome(None, lambda: whole.b.astype(np.float64) @ whole.a)


def _too_many(cell: Cell) -> str:
    return f"more than {MOST_PEFT_ADAPTERS} adapters in one model" if cell.clients > MOST_PEFT_ADAPTERS else ""


def _too_great(cell: Cell) -> str:
    """Three copies of every client's dense product: a list, a stack, and the stack times the weights."""
    needed, had = 12 * cell.clients * cell.size**2, memory_bytes(Path("/proc/meminfo"), "MemAvailable")
    short = needed > had / 2
    return _too_many(cell) or (f"takes about {needed / 1e9:.0f} GB for dense products" if short else "")


def memory_bytes(path: Path, field: str) -> float:
    """A field of a table of Linux's process file system; NaN where there is none."""
    if not path.exists():
        return float("nan")
    found = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return 1024.0 * int(found[field].split()[0])


DENSE, EXACT = "dense SVD", "exact merge"
WAYS: Mapping[str, Way] = {
    DENSE: Way(
        lambda cell: torch.zeros(cell.size, cell.size, device="cuda" if torch.cuda.is_available() else "cpu"),
        _dense_add,
        _dense_finish,
    ),
    "peft svd": Way(_peft_begin, _peft_add, _peft_svd, True, _too_great),
    "peft cat": Way(_peft_begin, _peft_add, _peft_cat, True, _too_many),
    "factor mean": Way(
        _plain_begin,
        lambda fold, sent: fold._replace(sums=padded.add(fold.sums, sent.tensors, sent.share)),
        _plain_finish,
    ),
    EXACT: Way(lambda cell: _Fold(_server(cell), exactness.begin()), _exact_add, _exact_finish),
}
