"""What projections do at the edges, which no law of all rules says."""

from __future__ import annotations

import numpy as np

from fedpeft.adapters import AdapterSpec, AdapterState, ModuleSpec, norm
from fedpeft.config.merges import MERGES
from fedpeft.merges import Contribution
from fedpeft.randomness import rng
from fedpeft.updates import ServerState, Update

SPEC = AdapterSpec("base", "lora", (ModuleSpec("q", "lora", 2, 1.0, (("A", (2, 5)), ("B", (4, 2)))),))


def state(seed: int = 0) -> ServerState:
    random = rng(seed, "state")
    tensors = {"q.A": random.standard_normal((2, 5)), "q.B": random.standard_normal((4, 2))}
    return ServerState("run", 0, 0, AdapterState(SPEC, {key: v.astype(np.float32) for key, v in tensors.items()}))


def merged(rule: str, before: ServerState, deltas: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The adapter after one round of `rule` with these deltas, of equal weight."""
    merge = MERGES.members[rule]().build().merge
    fold = merge.init(before, tuple(SPEC.shapes), ())
    for delta in deltas:
        fold = merge.add(fold, Contribution(Update(SPEC, delta, 1, 1), before.adapter, 1.0))
    found = merge.finish(fold).delta
    return {key: before.adapter.tensors[key] + found[key] for key in SPEC.shapes}


def test_lora_fair_keeps_b_in_bounds_where_the_clients_a_cancel() -> None:
    before = state()
    a = before.adapter.tensors["q.A"]
    still = np.zeros((4, 2), np.float32)
    turned = [{"q.A": sign * a * np.float32(1 + 1e-7) - a, "q.B": still} for sign in (1.0, -1.0)]
    after = merged("lora_fair", before, turned)
    assert norm({"B": after["q.B"]}) < 10 * norm({"B": before.adapter.tensors["q.B"]})


def test_the_signs_of_singular_vectors_do_not_depend_on_who_came_first() -> None:
    for seed in range(12):
        random, before = rng(seed, "order"), state(seed)
        deltas = [
            {key: random.standard_normal(shape).astype(np.float32) for key, shape in SPEC.shapes.items()}
            for _ in range(4)
        ]
        one, other = merged("flexlora", before, deltas), merged("flexlora", before, deltas[::-1])
        for key in SPEC.shapes:
            np.testing.assert_allclose(one[key], other[key], atol=1e-4)
        b = one["q.B"]
        assert (b[np.argmax(np.abs(b), axis=0), np.arange(b.shape[1])] > 0).all()
