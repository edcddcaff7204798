"""A whole run: from settings to a run folder with an adapter, a journal and a report."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedpeft import checkpoint, events, journal, rounds
from fedpeft.adapters import fixed, inexact
from fedpeft.bounds import Bound, measure_bounds
from fedpeft.config import RunConfig, to_flat
from fedpeft.errors import CheckpointError, FedPeftError, QuorumError, RunFolderError, sentence
from fedpeft.experiment import (
    adapted_model,
    check_plan,
    deal_rows,
    evaluator_of,
    plan_of,
    samples_of,
    spent_of,
    start_of,
    strategy_of,
    task_of,
)
from fedpeft.locks import held
from fedpeft.logs import one_line
from fedpeft.models import AdaptedModel, save_adapter
from fedpeft.privacy import ledger
from fedpeft.report.history import history
from fedpeft.report.page import write_report
from fedpeft.report.traffic import summary
from fedpeft.runs import RunFolder, create, write_folder, writing
from fedpeft.sinks import Sinks, opened
from fedpeft.training import use_threads
from fedpeft.updates import ServerState, Spent
from fedpeft.version import VERSION
from fedpeft.wire import Transport


@dataclass(frozen=True)
class Watcher:
    """Who is told how a run goes: `start` once, `reply` for each client, `round` for each round, `bound` for each."""

    start: Callable[[dict[str, Any], int], None]
    reply: Callable[[int, int, bool], None]
    round: Callable[[dict[str, Any]], None]
    bound: Callable[[str], None]


Refused = Callable[[], Mapping[int, str]]
"""Which partitions are missing because their nodes were turned away, and why."""


def silent() -> Watcher:
    """A watcher that tells nobody."""
    return Watcher(*(lambda *_: None for _ in range(4)))


def federate(
    config: RunConfig,
    folder: RunFolder,
    transport: Transport,
    *,
    engine: str,
    resume: bool = False,
    bounds: tuple[Bound, ...] = (),
    watcher: Watcher | None = None,
    refused: Refused = dict,
    page: bool = True,
) -> list[dict[str, Any]]:
    """The journal of the run, finished; `folder` holds adapter, journal, checkpoint, settings and, with `page`, report.

    `config` must be resolved. Nothing is written before settings, data and model have been found usable.

    Raises:
        FedPeftError: the plan is forbidden, another process writes the folder, a quorum was missed, the disk is full;
            what was recorded stays.
    """
    use_threads(config.compute.threads)
    told = watcher or silent()
    adapted = adapted_model(config)
    check_plan(config, adapted)
    strategy, evaluate = strategy_of(config), evaluator_of(config)
    ready = None
    if not (resume and _has_begun(folder)):
        fresh = strategy.init(secrets.token_hex(8), config.seed, start_of(config))
        ready = (fresh, _start_record(config, adapted, engine))
    with held(folder.root):
        state = _resumed(folder, adapted) if ready is None else _begin(folder, config, *ready)
        with _observed(config, folder, state) as sinks:
            told.start(journal.read(folder.journal)[0], state.round)
            observer = _observer(config, folder, told, sinks, refused)
            plan = plan_of(config, state.run, adapted.spec.digest)
            state, stopped = rounds.run(strategy, plan, state, transport, evaluate, observer)
            final = strategy.finalize(state)
            write_folder(folder.adapter, lambda scratch: save_adapter(adapted, final, scratch))
            final_evaluation = _last_evaluation(folder.journal, state.round) or evaluate(final)
            if bounds:
                _note(folder, {"event": "bounds", "rows": measure_bounds(config, bounds, told.bound)})
            samples = [sample._asdict() for sample in samples_of(config, final, config.evaluation.samples)]
            end = {**_end_record(folder.journal, adapted, stopped, final_evaluation), "samples": samples}
            _note(folder, end)
            events.run_ended(state.run, end)
            sinks.end(stopped)
            if page:
                with writing(folder.root):
                    write_report(folder.root)
            return journal.read(folder.journal)


def _observer(config: RunConfig, folder: RunFolder, told: Watcher, sinks: Sinks, refused: Refused) -> rounds.Observer:
    """Who hears of replies, of what is spent and of rounds: the folder first of all."""

    def settle(record: rounds.Record, after: ServerState) -> None:
        spent, turned_away = spent_of(config, after.privacy.history), refused()
        beside: dict[str, Any] = {} if spent is None else {"epsilon": spent}
        beside |= {"refused": dict(turned_away)} if turned_away else {}
        _note(folder, {**record, "time": _now(), **beside})
        checkpoint.save(folder.checkpoint, after)
        told.round(record)
        events.round_settled(after.run, record, config.rounds, config.evaluation.metric)
        sinks.round(record)

    def spend(spent: Spent) -> None:
        with writing(folder.ledger):
            ledger.pay(folder.ledger, spent)

    return rounds.Observer(told.reply, settle, spend)


@contextlib.contextmanager
def _observed(config: RunConfig, folder: RunFolder, state: ServerState) -> Iterator[Sinks]:
    """Inside, the run's sinks are open; its start and a failure that ends it are logged, the failure noted."""
    records = journal.read(folder.journal)
    with opened(config.observation, folder.root, config.name, state.run) as sinks:
        sinks.begin(records, state.round)
        events.run_started(state.run, records[0], state.round)
        try:
            yield sinks
        except BaseException as error:
            events.run_failed(state.run, error)
            if isinstance(error, FedPeftError | KeyboardInterrupt):
                _note_failure(folder, error)
            raise


def _note_failure(folder: RunFolder, error: BaseException) -> None:
    """The journal ends with the round that missed its quorum, if one did, and why the run did.

    Where the disk takes no more it does not.
    """
    reason = one_line(str(error)) if isinstance(error, FedPeftError) else "interrupted"
    with contextlib.suppress(RunFolderError):
        if isinstance(error, QuorumError):
            _note(folder, {"event": "missed", "time": _now(), **error.missed})
        _note(folder, {"event": "failed", "time": _now(), "error": type(error).__name__, "reason": reason})


def _note(folder: RunFolder, record: Mapping[str, Any]) -> None:
    with writing(folder.journal):
        journal.append(folder.journal, record)


def _begin(folder: RunFolder, config: RunConfig, state: ServerState, record: Mapping[str, Any]) -> ServerState:
    """`state`, with which the run begins; the folder holds it, the settings and a journal of the start alone.

    Raises:
        RunFolderError: another process has begun a run there since this one looked.
    """
    if _has_begun(folder):
        remedy = "continue it with --resume, or choose another folder"
        found = "one that another process has begun meanwhile"
        raise RunFolderError(sentence(str(folder.root), expected="no run yet", found=found, remedy=remedy))
    create(folder, config)
    with writing(folder.journal):
        folder.journal.unlink(missing_ok=True)
    _note(folder, record)
    checkpoint.save(folder.checkpoint, state)
    return state


def _has_begun(folder: RunFolder) -> bool:
    """Whether there is something to go on from, or something to lose: a kill may come before the first checkpoint."""
    if checkpoint.exists(folder.checkpoint):
        return True
    return folder.journal.exists() and any(record["event"] != "start" for record in journal.read(folder.journal))


def _resumed(folder: RunFolder, adapted: AdaptedModel) -> ServerState:
    state = checkpoint.load(folder.checkpoint)
    if state.adapter.spec.digest != adapted.spec.digest:
        raise CheckpointError(
            sentence(
                str(folder.checkpoint),
                expected=f"an adapter of specification {adapted.spec.digest[:12]}",
                found=state.adapter.spec.digest[:12],
                remedy="restore the base model that the run was started with",
            )
        )
    privacy = replace(state.privacy, history=ledger.paid(folder.ledger, state.privacy.history))
    state = replace(state, adapter=replace(state.adapter, spec=adapted.spec), privacy=privacy)
    with writing(folder.journal):
        journal.truncate(folder.journal, state.round)
    _note(folder, {"event": "resume", "round": state.round, "time": _now()})
    return state


def _start_record(config: RunConfig, adapted: AdaptedModel, engine: str) -> dict[str, Any]:
    dealt = deal_rows(config)
    trained = strategy_of(config).stage.trained(adapted.spec).parameters
    return {
        "event": "start",
        "fedpeft": VERSION,
        "time": _now(),
        "engine": engine,
        "config": to_flat(config),
        "labels": list(task_of(config).labels),
        "adapter": {
            "family": adapted.spec.family,
            "trainable_parameters": trained,
            "bytes": 4 * trained,
            "dense_bytes": 4 * (adapted.spec.parameters - adapted.spec.only(fixed(adapted.spec)).parameters),
            "base_parameters": adapted.base_parameters,
            "base_bytes": 4 * adapted.base_parameters,
            "inexact": inexact(adapted.spec),
        },
        "data": asdict(dealt.report),
        "partitions": list(dealt.histograms),
    }


def _end_record(path: Path, adapted: AdaptedModel, stopped: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    told = journal.read(path)
    records = [record for record in told if record["event"] == "round"]
    trips = sum(len(record["cohort"]) + len(record["clients"]) for record in records)
    return {
        "event": "end",
        "rounds": len(records),
        "seconds": sum(record["seconds"]["total"] for record in records),
        "stopped": stopped,
        "evaluation": evaluation,
        "bytes_up": sum(record["bytes_up"] for record in records),
        "bytes_down": sum(record["bytes_down"] for record in records),
        "full_model_bytes": 4 * adapted.base_parameters * trips,
        "traffic": summary(history(told)),
    }


def _last_evaluation(path: Path, round_: int) -> dict[str, Any] | None:
    for record in journal.read(path):
        if record["event"] == "round" and record["round"] == round_:
            found: dict[str, Any] | None = record["evaluation"]
            return found
    return None


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
