"""`fedpeft methods`: what can be federated, how exactly, and at what cost on a model of yours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from fedpeft.commands.check import messages
from fedpeft.config import RunConfig, choose, load
from fedpeft.config.adapters import ADAPTERS
from fedpeft.config.adapters.methods import Method, methods
from fedpeft.errors import AdapterError, ModelError
from fedpeft.experiment import adapted_model, learner_of, resolve, strategy_of, test_examples
from fedpeft.report.units import human_bytes, human_count
from fedpeft.training import fit_memory_bytes


def run_methods(path: Path | None, overrides: list[str], *, as_json: bool) -> None:
    """Prints every method with its tier; with settings, those that fit the model, with numbers, bytes and memory.

    Raises:
        FedPeftError: settings, data or model cannot be used.
    """
    if path is None:
        found: list[dict[str, Any]] = [_fields(method) for method in methods()]
    else:
        config = resolve(load(path, overrides))
        found = list(_on_model(config))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for line in _lines(found):
        typer.echo(line)


def _lines(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The methods in columns, of which those with figures are flush right; the reason, which is long, stands last."""
    columns = [key for key in dict.fromkeys(key for fields in found for key in fields) if key != "reason"]
    cells = [[_UNITS.get(key, str)(fields[key]) if key in fields else "–" for key in columns] for fields in found]
    heads = [key.replace("_", " ") for key in columns]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    aligned = [str.rjust if key in _UNITS else str.ljust for key in columns]
    for row, reason in zip([heads, *cells], ["reason", *(fields["reason"] for fields in found)], strict=True):
        told = (align(cell, width) for cell, width, align in zip(row, widths, aligned, strict=True))
        yield "  ".join((*told, reason))


def _fields(method: Method) -> dict[str, Any]:
    return {"name": method.name, "family": method.group, "tier": method.tier, "reason": method.reason}


def _on_model(config: RunConfig) -> Iterator[dict[str, Any]]:
    """The methods on the model of the settings, each with the settings that it has there, or why it does not fit."""
    examples = test_examples(config)
    for method in methods():
        if method.name not in ADAPTERS.members:
            continue
        members = config.adapter.members
        one = replace(config, adapter=choose(ADAPTERS, method.name, **members))
        try:
            adapted = adapted_model(one)
        except (ModelError, AdapterError) as error:
            yield {**_fields(method), "tier": "refused", "reason": str(error)}
            continue
        strategy = strategy_of(replace(one, aggregation=replace(one.aggregation, merge=type(one.aggregation)().merge)))
        sizes = messages(strategy, adapted.spec)
        yield {
            **_fields(method),
            "trained": strategy.stage.trained(adapted.spec).parameters,
            "bytes_a_round": sizes.down + sizes.up[0],
            "memory_bytes": 4 * adapted.base_parameters + fit_memory_bytes(learner_of(one, examples)),
        }


_UNITS: Mapping[str, Callable[[Any], str]] = {
    "trained": human_count,
    "bytes_a_round": human_bytes,
    "memory_bytes": human_bytes,
}
