"""Every rule through a whole run: at unlike ranks, stopped after each round and gone on with, exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import checkpoint
from fedpeft.config.merges import MERGES
from fedpeft.errors import PlanError
from fedpeft.federate import Watcher, federate, silent
from fedpeft.runs import RunFolder, folder_for
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 3
EQUAL = {"median", "trimmed_mean", "bulyan"}
"""Rules that compare updates number by number, and so refuse a mix of ranks."""

LEAST = {"krum": 5, "multi_krum": 5, "bulyan": 7, "trimmed_mean": 3}
"""How many updates a rule needs where that is more than one."""

FAMILY = {"fed_sb": {"family": "lora_sb", "lora_sb": {"rank": 3, "alpha": 5.0}}}
"""The adapter of a rule that is for one of its own."""


class Stopped(Exception):
    """What a power cut looks like from inside."""


def settings(model: Path, rows: Path, out: Path, rule: str, **federation: Any) -> Any:
    cohort = LEAST.get(rule, 2)
    ranks = {"rule": "equal"} if rule in EQUAL else {"rule": "listed", "listed": {"ranks": [1, 2, 3]}}
    return tiny.run_config(
        model,
        rows,
        out,
        rounds=ROUNDS,
        adapter=FAMILY.get(rule, {}),
        aggregation={"merge": {"rule": rule}},
        federation={"clients": max(3, cohort), "cohort": cohort, "quorum": cohort, "ranks": ranks, **federation},
        training={"steps": 1, "batch_size": 4, "learning_rate": 0.01},
        evaluation={"every": 0},
    )


def stopping() -> Watcher:
    """A watcher that stops the run after each round."""

    def stop(record: dict[str, Any]) -> None:
        if record["round"] < ROUNDS:
            raise Stopped

    return replace(silent(), round=stop)


def weights(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("rule", MERGES.members)
def test_a_run_that_is_stopped_after_each_round_ends_with_the_same_bytes(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, rule: str
) -> None:
    whole = settings(tiny_model, tiny_rows, tmp_path / "whole", rule)
    folder = folder_for(whole)
    records = federate(whole, folder, tiny.transport(whole, folder), engine="local")
    assert [record["round"] for record in records if record["event"] == "round"] == [1, 2, 3]
    assert not any(record["failures"] for record in records if record["event"] == "round")
    pieces = settings(tiny_model, tiny_rows, tmp_path / "pieces", rule)
    parts = folder_for(pieces)
    for resume in (False, True):
        with pytest.raises(Stopped):
            federate(pieces, parts, tiny.transport(pieces, parts), engine="local", resume=resume, watcher=stopping())
    federate(pieces, parts, tiny.transport(pieces, parts), engine="local", resume=True)
    assert weights(parts) == weights(folder)
    one, other = (checkpoint.load(found.checkpoint) for found in (folder, parts))
    assert (one.drift, one.holdings, one.round) == (other.drift, other.holdings, other.round)
    for found, expected in ((one.adapter.residual, other.adapter.residual), (one.optimizer, other.optimizer)):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in found)


STATEFUL: dict[str, dict[str, Any]] = {
    **{kind: {"aggregation": {"optimizer": {"kind": kind}}} for kind in ("momentum", "adagrad", "adam", "yogi")},
    "scaffold": {"training": {"steps": 1, "batch_size": 4, "scaffold": True}},
    "flora under a budget": {"aggregation": {"merge": {"rule": "flora", "flora": {"budget": 4}}}},
    "fedex under a budget": {"aggregation": {"merge": {"rule": "fedex", "fedex": {"budget": 4, "rank": 2}}}},
}


@pytest.mark.parametrize("name", STATEFUL)
def test_what_a_server_remembers_goes_on_to_the_bit(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, name: str
) -> None:
    found = []
    for out, stops in (("whole", 0), ("pieces", 2)):
        config = tiny.run_config(
            tiny_model,
            tiny_rows,
            tmp_path / out,
            **{"rounds": ROUNDS, "evaluation": {"every": 0}, **STATEFUL[name]},
        )
        folder = folder_for(config)
        for stop in range(stops):
            with pytest.raises(Stopped):
                federate(
                    config, folder, tiny.transport(config, folder), engine="local", resume=stop > 0, watcher=stopping()
                )
        federate(config, folder, tiny.transport(config, folder), engine="local", resume=stops > 0)
        found.append(weights(folder))
    assert found[0] == found[1]


@pytest.mark.parametrize("rule", sorted(EQUAL))
def test_a_rule_that_cannot_serve_a_mix_says_so_before_the_first_round(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path, rule: str
) -> None:
    mixed = {"rule": "listed", "listed": {"ranks": [1, 3]}}
    config = settings(tiny_model, tiny_rows, tmp_path / "run", rule, ranks=mixed)
    folder = folder_for(config)
    with pytest.raises(PlanError, match=r"expected one rank for all nodes.*found ranks 1, 3"):
        federate(config, folder, tiny.transport(config, folder), engine="local")
    assert not folder.root.exists()
