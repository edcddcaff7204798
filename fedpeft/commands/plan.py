"""`fedpeft plan`: whether a node's memory will hold the training, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import typer

from fedpeft.base_weights import held_bytes
from fedpeft.config import RunConfig, load
from fedpeft.errors import ModelError
from fedpeft.experiment import adapted_model, check_plan, learner_of, release_models, resolve, test_examples
from fedpeft.report.tables import Table, render_plain
from fedpeft.report.units import human_bytes
from fedpeft.training import LIBRARY_BYTES, fit_memory_bytes, training_memory_bytes


class Need(NamedTuple):
    """What one way to hold the base takes, in bytes; `refused` says why it cannot be had here."""

    weights: str
    checkpointing: bool
    base: int = 0
    training: int = 0
    refused: str = ""

    @property
    def total(self) -> int:
        """All that a training process holds at its peak, a layer that is computed again aside."""
        return LIBRARY_BYTES + self.base + self.training


def run_plan(path: Path, overrides: list[str], gigabytes: float) -> None:
    """Prints what each way to hold the base needs, and which of them fit into `gigabytes` (0: this machine's memory).

    Raises:
        FedPeftError: settings, data or model cannot be used.
    """
    config = resolve(load(path, overrides))
    check_plan(config, adapted_model(config))
    room = int(gigabytes * 1e9) or training_memory_bytes(learner_of(config, test_examples(config)))
    found = list(needs(config))
    rows = tuple((_name(need, config), *_cells(need, room)) for need in found)
    typer.echo(render_plain(Table(("base held as", "base", "training", "in all", f"in {human_bytes(room)}"), rows)))
    typer.echo(_advice(found, config, room))


def needs(config: RunConfig) -> Iterator[Need]:
    """What each format and each way to train needs here, measured on a batch of the longest held-out rows."""
    examples = test_examples(config)
    for weights in ("float32", "bfloat16", "int8", "nf4"):
        for checkpointing in (False, True):
            model = replace(config.model, weights=weights, gradient_checkpointing=checkpointing)
            held = replace(config, model=model)
            release_models()  # one base at a time: the question is what fits
            try:
                learner = learner_of(held, examples)
                base, training = held_bytes(learner.adapted.model), fit_memory_bytes(learner)
                del learner
                yield Need(weights, checkpointing, base, training)
            except (ModelError, ValueError) as error:
                yield Need(weights, checkpointing, refused=(str(error).splitlines() or [""])[0])


def _name(need: Need, config: RunConfig) -> str:
    own = (need.weights, need.checkpointing) == (config.model.weights, config.model.gradient_checkpointing)
    return f"{need.weights}{', checkpointing' if need.checkpointing else ''}{' (as set)' if own else ''}"


def _cells(need: Need, room: int) -> tuple[str, ...]:
    if need.refused:
        return ("–", "–", "–", "not here")
    fits = "fits" if need.total <= room else "does not fit"
    return (human_bytes(need.base), human_bytes(need.training), human_bytes(need.total), fits)


def _advice(found: list[Need], config: RunConfig, room: int) -> str:
    """What to set, in a sentence, if the settings do not fit as they are."""
    model = config.model
    own = next(n for n in found if (n.weights, n.checkpointing) == (model.weights, model.gradient_checkpointing))
    if own.refused:
        return f"As set it cannot run here: {own.refused}"
    if own.total <= room:
        return f"As set it fits: {human_bytes(own.total)} of {human_bytes(room)}, libraries counted."
    fitting = [need for need in found if not need.refused and need.total <= room]
    if not fitting:
        return "Nothing here fits: lower training.batch_size or the task's max_tokens, or take a smaller base."
    best = fitting[0]
    setting = f"model.weights={best.weights} model.gradient_checkpointing={str(best.checkpointing).lower()}"
    return f"As set it does not fit; on such a node set {setting}, in the settings or in its --node-config."
