"""Rounds of any shape for any preset, and what each preset should make of them, by dense float64 arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fedpeft import ranks, rounds
from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, Tensors, absorbed
from fedpeft.client import FitJob, Fitted, Site, handle
from fedpeft.codecs import dense
from fedpeft.config.merges import MERGES
from fedpeft.gathering import Asking
from fedpeft.merges import WEIGHTS, Method
from fedpeft.merges.robust import geometric_median
from fedpeft.optimizers import sgd
from fedpeft.randomness import rng
from fedpeft.stages import identity
from fedpeft.strategy import Measures, Parts, Strategy, build
from fedpeft.updates import Drift, Memory, ServerState, Update
from fedpeft.wire import Packet, Session

PRESETS = tuple(MERGES.members)
RUN, CONFIG = "run-1", "c0ffee"
PATHS = ("layers.0.query", "layers.0.value", "layers.1.dense")
HEAD = {"head.bias": (3,), "head.weight": (3, 2)}

Dense = dict[str, np.ndarray]
"""Float64 by key, or by path of a module."""


def method_of(name: str, **settings: Any) -> Method:
    made: Method = MERGES.members[name](**settings).build()
    return made


def strategy_of(method: Method) -> Strategy:
    return build(Parts(identity(), dense(), method, sgd(1.0)))


# What an adapter looks like.


@dataclass(frozen=True)
class Layer:
    """A weight `(out, in)` and the server's rank on it."""

    out: int
    inputs: int
    rank: int


def spec_of(layers: Sequence[Layer], kind: str = "lora") -> AdapterSpec:
    modules = [ModuleSpec("head", "full", 0, 1.0, tuple((k.partition(".")[2], v) for k, v in HEAD.items()))]
    for path, layer in zip(PATHS, layers, strict=False):
        shapes = [("A", (layer.rank, layer.inputs)), ("B", (layer.out, layer.rank))]
        shapes += [("R", (layer.rank, layer.rank))] if kind == "lora_sb" else []
        modules.append(ModuleSpec(path, kind, layer.rank, 2.0, tuple(shapes)))
    return AdapterSpec("base", kind, tuple(modules))


def low_rank(spec: AdapterSpec) -> list[ModuleSpec]:
    return [module for module in spec.modules if module.rank]


def drawn(spec: AdapterSpec, random: np.random.Generator, fresh: bool = False) -> Tensors:
    """Numbers for an adapter; a fresh one does nothing yet."""
    started = {"lora": "B", "lora_sb": "R"}[spec.family]
    return {
        key: np.zeros(shape, np.float32)
        if fresh and key.endswith(f".{started}")
        else random.standard_normal(shape).astype(np.float32)
        for key, shape in spec.shapes.items()
    }


def cut(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """The specification of a node of rank `rank`, spelt out tensor by tensor."""
    modules = []
    for module in spec.modules:
        if not module.rank:
            modules.append(module)
            continue
        own = min(rank, module.rank)
        shapes = dict(module.shapes)
        shapes["A"], shapes["B"] = (own, shapes["A"][1]), (shapes["B"][0], own)
        if "R" in shapes:
            shapes["R"] = (own, own)
        modules.append(replace(module, rank=own, shapes=tuple(shapes.items())))
    return replace(spec, modules=tuple(modules))


def corner(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The leading corner of a larger array, as float64."""
    found: np.ndarray = value[tuple(slice(size) for size in shape)].astype(np.float64)
    return found


def grown(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A smaller array in the leading corner of zeros."""
    found = np.zeros(shape)
    found[tuple(slice(size) for size in value.shape)] = value
    return found


def product(tensors: Tensors, path: str) -> np.ndarray:
    """What an adapter adds to the weight at `path`, `(out, in)`."""
    a, b = (tensors[f"{path}.{name}"].astype(np.float64) for name in "AB")
    middle = tensors.get(f"{path}.R")
    found: np.ndarray = b @ a if middle is None else b @ middle.astype(np.float64) @ a
    return found


def does(adapter: AdapterState) -> Dense:
    """What an adapter adds to each weight, with the residual that it stands on."""
    return {module.path: product(absorbed(adapter).tensors, module.path) for module in low_rank(adapter.spec)}


# A round.


@dataclass(frozen=True, repr=False)
class Round:
    """A preset, the server's state before a round, and what its clients send; weights by the rule `weights`."""

    name: str
    method: Method
    state: ServerState
    updates: tuple[Update, ...]
    weights: str = "examples"
    made_by: str = ""

    def __repr__(self) -> str:
        return self.made_by

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.made_by)

    @property
    def spec(self) -> AdapterSpec:
        return self.state.adapter.spec

    @property
    def paths(self) -> list[str]:
        return [module.path for module in low_rank(self.spec)]

    @property
    def shares(self) -> np.ndarray:
        """p_k, which sum to 1."""
        found = np.array([WEIGHTS_BY_HAND[self.weights](update) for update in self.updates], np.float64)
        shares: np.ndarray = found / found.sum()
        return shares

    def received(self, client: int) -> Dense:
        """Every tensor that a client was sent, at its rank."""
        rank = {module.path: module.rank for module in self.updates[client].spec.modules}
        spec = cut(self.spec, max(rank[path] for path in self.paths if path in rank))
        return {key: corner(self.state.adapter.tensors[key], shape) for key, shape in spec.shapes.items()}

    def after(self, client: int) -> Dense:
        """Every tensor that a client has after training."""
        delta = self.updates[client].delta
        return {key: value + delta.get(key, 0.0) for key, value in self.received(client).items()}

    def exact(self) -> Dense:
        """T = Σ p_k B_k A_k by path."""
        return mixture(self, [(client, share, 1.0) for client, share in enumerate(self.shares)])

    def aggregated(self) -> tuple[ServerState, Measures]:
        return strategy_of(self.method).aggregate(self.state, iter(self.updates))

    def applied(self) -> Dense:
        """What the clients' next adapter adds to each weight beyond the residual that was there before."""
        before = replace(self.state.adapter, tensors={k: 0 * v for k, v in self.state.adapter.tensors.items()})
        old, new = does(before), does(self.aggregated()[0].adapter)
        return {path: new[path] - old[path] for path in new}

    def scale(self) -> dict[str, float]:
        """The size of the numbers that meet in each module, against which rounding is judged."""
        found = {}
        for path in self.paths:
            every = [self.state.adapter.tensors, *(self.after(client) for client in range(len(self.updates)))]
            longest = max(float(np.linalg.norm(tensors[f"{path}.{name}"])) for tensors in every for name in "AB")
            residual = self.state.adapter.residual
            old = float(np.linalg.norm(product(residual, path))) if residual else 0.0
            found[path] = max(1e-3, longest**2, old)
        return found

    def with_updates(self, updates: Sequence[Update]) -> Round:
        return replace(self, updates=tuple(updates))


WEIGHTS_BY_HAND: Mapping[str, Callable[[Update], float]] = {
    "examples": lambda update: update.examples,
    "tokens": lambda update: update.tokens,
    "uniform": lambda update: 1,
}


def round_of(
    name: str,
    layers: Sequence[Layer],
    node_ranks: Sequence[int],
    *,
    seed: int = 0,
    weights: str = "examples",
    done: int = 0,
    fresh: bool = False,
    residual: int = 0,
    still: Sequence[int] = (),
    **settings: Any,
) -> Round:
    """A round of clients of ranks `node_ranks`, after `done` rounds; those in `still` return a delta of zero.

    `residual` is the rank of what the base has taken up already, where the preset has a base that drifts.
    """
    said = dict(seed=seed, weights=weights, done=done, fresh=fresh, residual=residual, still=still, **settings)
    made_by = f"round_of({name!r}, {layers}, {node_ranks}, {', '.join(f'{k}={v!r}' for k, v in said.items())})"
    method, random = method_of(name, weights=weights, **settings), rng(seed, "round")
    spec = spec_of(layers, method.kinds[0] if method.kinds else "lora")
    below, drift = {}, Drift()
    if residual and method.merge.drifts:
        width = [replace(layer, rank=residual) for layer in layers]
        below = {k: v for k, v in drawn(spec_of(width), random).items() if k not in HEAD}
        drift = Drift(0, {done: (residual,) * len(layers)})
    adapter = AdapterState(spec, drawn(spec, random, fresh), below)
    stage, updates = strategy_of(method).stage, []
    for client, rank in enumerate(node_ranks):
        shared = stage.shared(cut(spec, rank), done + 1)
        size = np.float32(0.0 if client in still else 0.7)
        delta = {k: size * random.standard_normal(shape).astype(np.float32) for k, shape in shared.shapes.items()}
        updates.append(Update(shared, delta, int(random.integers(1, 50)), int(random.integers(1, 500))))
    state = ServerState(RUN, done, seed, adapter, drift=drift)
    return Round(name, method, state, tuple(updates), weights, made_by)


@st.composite
def layer_lists(draw: st.DrawFn) -> list[Layer]:
    """One to three weights: square and not, with a side as long as the rank, and shorter."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        rank = draw(st.integers(1, 4))
        sides = st.one_of(st.just(rank), st.integers(1, 7))
        found.append(Layer(draw(sides), draw(sides), rank))
    return found


@st.composite
def rounds_of(draw: st.DrawFn, /, name: str, *, equal: bool = False, clients: int = 0, **fixed: Any) -> Round:
    """Rounds of a preset; with `equal` all nodes are at the server's rank, `clients` fixes their number."""
    layers = draw(layer_lists())
    merge, most = method_of(name).merge, max(layer.rank for layer in layers)
    least = max(merge.least, REFERENCES[name].fewest)
    count = clients or draw(st.integers(least, least + 3))
    one = st.just(most) if equal or not merge.mixed else st.integers(1, most)
    drawn_here = {
        "seed": st.integers(0, 10**6),
        "weights": st.sampled_from(sorted(WEIGHTS)),
        "done": st.integers(0, 1),
        "fresh": st.booleans(),
        "residual": st.integers(0, 2),
        "still": st.sets(st.integers(0, count), max_size=1),
    }
    chosen: dict[str, Any] = {key: draw(found) for key, found in drawn_here.items() if key not in fixed}
    return round_of(name, layers, [draw(one) for _ in range(count)], **chosen, **fixed)


# What should come of it.

Used = list[tuple[int, float, float]]
"""(client, weight, scale): how much of whose update is used; what a scale takes away stays as it was received."""


def mixture(found: Round, used: Used) -> Dense:
    """The mean of products, by path."""
    total = {}
    for path in found.paths:
        parts = [
            weight * (scale * product(found.after(k), path) + (1 - scale) * product(found.received(k), path))
            for k, weight, scale in used
        ]
        total[path] = np.sum(parts, axis=0)
    return total


def everyone(found: Round) -> Used:
    return [(client, share, 1.0) for client, share in enumerate(found.shares)]


def by_norm(found: Round) -> Used:
    """Weights in proportion to what an adapter does; nobody's where none does anything."""
    sizes = [
        np.sqrt(sum(np.sum(product(found.after(client), path) ** 2) for path in found.paths))
        for client in range(len(found.updates))
    ]
    return [(client, size / sum(sizes), 1.0) for client, size in enumerate(sizes)] if any(sizes) else []


def factor_mean(found: Round, used: Used, missing: str) -> Dense:
    """Every tensor after averaging; a row that a client lacks counts as zero, or is left to those that hold it."""
    tensors = {key: value.astype(np.float64) for key, value in found.state.adapter.tensors.items()}
    for key in {key for update in found.updates for key in update.delta if used}:
        shape = tensors[key].shape
        values = [(grown(found.after(k)[key], shape), w) for k, w, _ in used]
        if missing == "zero":
            tensors[key] = np.sum([w * value for value, w in values], axis=0)
        else:
            held = np.sum([w * grown(np.ones_like(found.after(k)[key]), shape) for k, w, _ in used], axis=0)
            total = np.sum([w * value for value, w in values], axis=0)
            tensors[key] = np.divide(total, held, out=tensors[key], where=held > 0)
    return tensors


def factors_of(missing: str, used_by: Callable[[Round], Used] = everyone) -> Callable[[Round], Dense]:
    def expected(found: Round) -> Dense:
        tensors = factor_mean(found, used_by(found), missing)
        return {path: product(tensors, path) for path in found.paths}

    return expected


def nearest(value: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation at some rank, from a dense singular value decomposition."""
    u, s, vt = np.linalg.svd(value, full_matrices=False)
    found: np.ndarray = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return found


def truncated_mixture(used_by: Callable[[Round], Used]) -> Callable[[Round], Dense]:
    def expected(found: Round) -> Dense:
        rank = {module.path: module.rank for module in low_rank(found.spec)}
        return {path: nearest(value, rank[path]) for path, value in mixture(found, used_by(found)).items()}

    return expected


def fair(found: Round) -> Dense:
    """min over Δ of ‖T − (B̄ + Δ) Ā‖² + λ‖Δ‖², as a least-squares problem with rows of its own for λ."""
    tensors, exact, result = factor_mean(found, everyone(found), "zero"), found.exact(), {}
    for path in found.paths:
        a, b = tensors[f"{path}.A"], tensors[f"{path}.B"]
        before = found.state.adapter.tensors[f"{path}.A"].astype(np.float64)
        ridge = 0.01 * max(np.sum(a**2), np.sum(before**2)) / len(a)
        left = np.vstack([a.T, np.sqrt(ridge) * np.eye(len(a))])
        right = np.vstack([(exact[path] - b @ a).T, np.zeros((len(a), len(b)))])
        result[path] = (b + np.linalg.lstsq(left, right, rcond=None)[0].T) @ a
    return result


def vectors(found: Round, *, products: bool) -> np.ndarray:
    """The updates as long vectors `(K, n)`: of what they do, or of their numbers."""
    rows = []
    for client, update in enumerate(found.updates):
        keys = sorted(HEAD) if products else sorted(update.delta)
        parts = [update.delta[key].astype(np.float64).ravel() for key in keys]
        if products:
            pairs = [(found.after(client), found.received(client))]
            parts += [(product(new, path) - product(old, path)).ravel() for new, old in pairs for path in found.paths]
        rows.append(np.concatenate(parts))
    return np.array(rows)


def krum_order(points: np.ndarray, neighbours: int) -> list[int]:
    """Clients from the one with the nearest neighbours on."""
    scores = [np.sort(np.sum((points - point) ** 2, axis=1))[1 : 1 + neighbours].sum() for point in points]
    return list(np.argsort(scores, kind="stable"))


def best_of(kept: int | None) -> Callable[[Round], Used]:
    """Krum against one attacker: the best alone, or (None) the weighted mean of all but one."""

    def used(found: Round) -> Used:
        points = vectors(found, products=True)
        chosen = krum_order(points, len(points) - 3)[: kept or len(points) - 1]
        total = sum(found.shares[client] for client in chosen)
        return [(int(client), found.shares[client] / total, 1.0) for client in chosen]

    return used


def again_and_again(found: Round) -> Used:
    """Bulyan's selection against one attacker, on the numbers; weighed as they came."""
    points, left, chosen = vectors(found, products=False), list(range(len(found.updates))), []
    for _ in range(len(points) - 2):
        chosen.append(left.pop(krum_order(points[left], max(len(left) - 3, 2))[0]))
    total = sum(found.shares[client] for client in chosen)
    return [(client, found.shares[client] / total, 1.0) for client in sorted(chosen)]


def least_distance(found: Round) -> Used:
    """The geometric median, by a verdict whose optimality has tests of its own, on a dense Gram matrix."""
    points = vectors(found, products=True)
    judge = geometric_median(MERGES.members["geometric_median"]().iterations)
    weights = judge.judge(points @ points.T, found.shares).weights
    return [(client, float(weight), 1.0) for client, weight in enumerate(weights)]


def within_the_median(found: Round) -> Used:
    sizes = np.linalg.norm(vectors(found, products=True), axis=1)
    scales = np.minimum(1.0, np.median(sizes) / np.maximum(sizes, 1e-300))
    return [(client, share, float(scales[client])) for client, share in enumerate(found.shares)]


def middle(values: np.ndarray) -> np.ndarray:
    """The mean of those that are neither the greatest nor the least."""
    found: np.ndarray = np.sort(values, axis=0)[1:-1].mean(axis=0)
    return found


def near_the_median(values: np.ndarray) -> np.ndarray:
    """Bulyan's mean against one attacker."""
    order = np.argsort(np.abs(values - np.median(values, axis=0)), axis=0, kind="stable")[: len(values) - 2]
    found: np.ndarray = np.take_along_axis(values, order, axis=0).mean(axis=0)
    return found


Combine = Callable[[np.ndarray], np.ndarray]


def combined(found: Round, used: Used, combine: Combine) -> Dense:
    """Every tensor after its numbers have been combined one by one."""
    tensors = {key: value.astype(np.float64) for key, value in found.state.adapter.tensors.items()}
    for key in found.updates[0].delta:
        tensors[key] += combine(np.stack([found.updates[k].delta[key].astype(np.float64) for k, _, _ in used]))
    return tensors


def numbers_of(combine: Combine, used_by: Callable[[Round], Used] = everyone) -> Callable[[Round], Dense]:
    def expected(found: Round) -> Dense:
        tensors = combined(found, used_by(found), combine)
        return {path: product(tensors, path) for path in found.paths}

    return expected


@dataclass(frozen=True)
class Reference:
    """What a preset applies, by path; whose updates it uses; how it combines each number of a head (None: mean).

    `fewest` are the clients from which on what it does is told by their updates alone.
    """

    applied: Callable[[Round], Dense]
    used: Callable[[Round], Used] = everyone
    combine: Combine | None = None
    fewest: int = 1

    def heads(self, found: Round) -> Dense:
        used, before = self.used(found), found.state.adapter.tensors
        if self.combine:
            return {key: value for key, value in combined(found, used, self.combine).items() if key in HEAD}
        return {
            key: before[key] + np.sum([weight * scale * found.updates[k].delta[key] for k, weight, scale in used], 0)
            for key in HEAD
        }


EXACT = ("flora", "fedex", "ffa_lora", "rolora", "fed_sb")
"""Presets that apply T whatever the ranks."""

REFERENCES: Mapping[str, Reference] = {
    "fedavg": Reference(factors_of("covered")),
    "fedit": Reference(factors_of("covered")),
    "zero_pad": Reference(factors_of("zero")),
    "hetlora": Reference(factors_of("zero", by_norm)),
    **dict.fromkeys(EXACT, Reference(Round.exact)),
    "flexlora": Reference(truncated_mixture(everyone)),
    "fedsa_lora": Reference(factors_of("covered")),
    "lora_fair": Reference(fair),
    "median": Reference(numbers_of(lambda values: np.median(values, axis=0)), combine=lambda v: np.median(v, axis=0)),
    "trimmed_mean": Reference(numbers_of(middle), combine=middle),
    "krum": Reference(truncated_mixture(best_of(1)), best_of(1)),
    "multi_krum": Reference(truncated_mixture(best_of(None)), best_of(None)),
    "bulyan": Reference(numbers_of(near_the_median, again_and_again), again_and_again, near_the_median),
    # Every point between two clients of equal weight is a median of theirs.
    "geometric_median": Reference(truncated_mixture(least_distance), least_distance, fewest=3),
    "norm_bound": Reference(truncated_mixture(within_the_median), within_the_median),
}


# A federation whose clients descend a gradient.


@dataclass(frozen=True)
class Descent:
    """A client that goes down the gradient of ½‖W − target‖² of each weight, and walks its head towards a target.

    `seen` are the adapters that it was sent, `made` its tensors after training, by round.
    """

    partition: int
    spec: AdapterSpec
    examples: int = 2
    steps: int = 3
    rate: float = 0.05
    seen: dict[int, AdapterState] = field(default_factory=dict)
    made: dict[int, Tensors] = field(default_factory=dict)

    def fit(self, adapter: AdapterState, job: FitJob) -> Fitted:
        random = rng(self.partition, "target")
        after = {key: value.astype(np.float64) for key, value in adapter.tensors.items()}
        for key in sorted(after.keys() & HEAD.keys()):
            after[key] += 0.5 * (random.standard_normal(after[key].shape) - after[key])
        for module in low_rank(adapter.spec):
            self._descend(after, adapter, module.path, random, job)
        self.seen[job.round] = adapter
        self.made[job.round] = {key: value.astype(np.float32) for key, value in after.items()}
        counts = {"loss": 0.0, "learning_rate": self.rate}
        made = self.made[job.round]
        return Fitted(adapter.tensors, made, self.examples, 10 * self.examples, job.position + 1, counts)

    def evaluate(self, adapter: AdapterState) -> Mapping[str, float]:
        return {"rows": self.examples}

    def _descend(
        self, after: Dense, adapter: AdapterState, path: str, random: np.random.Generator, job: FitJob
    ) -> None:
        below = product(adapter.residual, path) if adapter.residual else 0.0
        target = random.standard_normal(product(after, path).shape)
        names = [name for name in ("A", "B", "R") if f"{path}.{name}" in after and f"{path}.{name}" not in job.frozen]
        for _ in range(self.steps):
            a, b = after[f"{path}.A"], after[f"{path}.B"]
            r = after.get(f"{path}.R", np.eye(len(a)))
            slope = below + b @ r @ a - target
            steps = {"A": (b @ r).T @ slope, "B": slope @ (r @ a).T, "R": b.T @ slope @ a.T}
            for name in names:
                after[f"{path}.{name}"] = after[f"{path}.{name}"] - self.rate * steps[name]


@dataclass
class Federation:
    """Clients in this process that keep their memories; `present` are the partitions that can be reached now."""

    strategy: Strategy
    learners: Mapping[int, Any]
    state: ServerState
    node_ranks: tuple[int, ...] = (0,)
    present: tuple[int, ...] = ()
    memories: dict[int, Memory] = field(default_factory=dict)
    replies: list[Packet] = field(default_factory=list)

    def partitions(self) -> tuple[int, ...]:
        return self.present or tuple(self.learners)

    def exchange(self, requests: Mapping[int, Packet], timeout_seconds: float) -> Iterator[tuple[int, Packet]]:
        for partition, packet in requests.items():
            site = Site(partition, CONFIG, self.strategy, self.learners[partition])
            reply, self.memories[partition] = handle(packet, self.memories.get(partition, Memory()), site)
            self.replies.append(reply)
            yield partition, reply

    def step(self, *present: int) -> rounds.Record:
        """One more round, with the partitions named (none: with all)."""
        self.present = present
        session = Session(RUN, CONFIG, self.state.adapter.spec.digest)
        many = len(self.learners)
        rule = ranks.listed(self.node_ranks)
        asking = Asking(many, len(self.partitions()), 60.0, rule)
        plan = rounds.Plan(session, 99, asking, 0, False, "accuracy", 1, 0)
        observer = rounds.Observer(lambda *_: None, lambda *_: None)
        self.state, record = rounds.step(self.strategy, plan, self.state, self, observer)
        return record


def federation(
    name: str, layers: Sequence[Layer], clients: int = 3, node_ranks: tuple[int, ...] = (0,), **settings: Any
) -> Federation:
    """Clients of a preset and a server whose adapter is fresh: it does nothing yet."""
    method = method_of(name, **settings)
    spec = spec_of(layers, method.kinds[0] if method.kinds else "lora")
    learners = {partition: Descent(partition, spec, examples=partition + 2) for partition in range(clients)}
    adapter = AdapterState(spec, drawn(spec, rng(0, "server"), fresh=True))
    strategy = strategy_of(method)
    return Federation(strategy, learners, strategy.init(RUN, 0, adapter), node_ranks)


# How near is near.


def assert_near(found: Dense, expected: Dense, scale: Mapping[str, float], tolerance: float = 1e-5) -> None:
    """Raises AssertionError unless each entry is within `tolerance` of its scale, in the Frobenius norm."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        gap = float(np.linalg.norm(found[key] - value))
        assert gap <= tolerance * scale[key], f"{key} is {gap:.3g} off, at a scale of {scale[key]:.3g}"


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {key: np.ascontiguousarray(value).tobytes() for key, value in sorted(tensors.items())}
