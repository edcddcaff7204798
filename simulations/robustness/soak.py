"""A short run killed again and again at moments drawn by chance, and each time gone on with.

    python -m simulations.robustness.soak --kills 200

Every life of the run is a process of its own, split off from one that has loaded the libraries and the base, and
killed (SIGKILL: no farewell) after a time that is drawn uniformly over what an undisturbed run takes once it works. A
run that comes to its end is compared with one that was never killed: the adapter must be the same to the bit, and no
round that was on record may be lost or done otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fedpeft import cli, journal
from fedpeft.cli import script
from fedpeft.config import load
from fedpeft.errors import FederationError, sentence
from fedpeft.experiment import adapted_model, check_plan, resolve
from fedpeft.randomness import rng
from fedpeft.training import use_threads

SETTINGS = Path(__file__).parent.parent / "demo.toml"
SHORT = (
    "rounds=6",
    "federation.clients=4",
    "federation.cohort=2",
    "training.steps=2",
    "data.partition.most_rows=40",
    "data.most_test_rows=20",
    "evaluation.every=2",
    "compute.threads=1",
)
"""The demo, short enough to be killed often."""

_LIFE_SECONDS = 600.0
_LOOK_SECONDS = 0.02
_UNSEEN = ("seconds", "time")


@dataclass
class Tally:
    """What the lives came to."""

    kills: int = 0
    before_work: int = 0
    runs: int = 0
    rounds: int = 0
    seconds: float = 0.0


def main(
    out: Annotated[Path, typer.Option(help="Where the runs are.")] = Path("runs/soak"),
    kills: Annotated[int, typer.Option(min=1, help="How many lives are cut short.")] = 200,
    seed: Annotated[int, typer.Option(help="What the moments are drawn from.")] = 7,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Kill runs until there are as many kills as asked for; the first run that ends otherwise ends this."""
    overrides = (*SHORT, *(set_ or ()))
    calm = out / "calm"
    out.mkdir(parents=True, exist_ok=True)
    _warm(overrides)
    began = time.monotonic()
    if not (calm / "adapter").exists():
        _life(calm, overrides, None)
    records = journal.read(calm / "journal.jsonl")
    work = sum(record["seconds"]["total"] for record in records if record["event"] == "round")
    draws, tally = rng(seed, "kills"), Tally()
    while tally.kills < kills:
        folder = out / f"run-{tally.runs:03d}"
        while tally.kills < kills and not _life(folder, overrides, float(draws.uniform(0, 1.1 * work))):
            tally.kills += 1
            tally.before_work += not (folder / "journal.jsonl").exists()
            typer.echo(f"{tally.kills} kills, {tally.runs} runs complete", err=True)
        if _ended(folder) or _life(folder, overrides, None):
            _require_same(calm, folder)
            tally.runs += 1
            tally.rounds += sum(record["event"] == "round" for record in journal.read(folder / "journal.jsonl"))
    tally.seconds = round(time.monotonic() - began, 1)
    text = json.dumps(vars(tally))
    (out / "soak.json").write_text(f"{text}\n", encoding="utf-8")
    typer.echo(text)


def _warm(overrides: Sequence[str]) -> None:
    """Every life is split off from this process, so what is loaded here is loaded once."""
    config = resolve(load(SETTINGS, overrides))
    use_threads(config.compute.threads)
    check_plan(config, adapted_model(config))


def _life(folder: Path, overrides: Sequence[str], seconds: float | None) -> bool:
    """Whether one life of the run in `folder` came to its end, and not to the `seconds` of work that it was given.

    Raises:
        FederationError: it ended by itself, and not well.
    """
    command = ["simulate", "--quiet", "--no-bounds"]
    if (folder / "config.toml").exists():
        command += ["--resume", str(folder)]
    else:
        command += [str(SETTINGS), *(word for item in (f"out={folder}", *overrides) for word in ("--set", item))]
    written, words = _size(folder), folder.with_suffix(".log")
    child = os.fork()
    if child == 0:
        _simulate(command, words)
    deadline, works, status = time.monotonic() + _LIFE_SECONDS, None, None
    while status is None and time.monotonic() < deadline:
        if works is None and _size(folder) != written:
            works = time.monotonic()
        if seconds is not None and works is not None and time.monotonic() - works >= seconds:
            break
        time.sleep(_LOOK_SECONDS)
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False
    if status:
        raise _unlike(folder, "a run that goes on", words.read_text(errors="replace").strip()[-300:])
    return True


def _simulate(command: Sequence[str], words: Path) -> NoReturn:
    """The life of a process that was just split off: what libraries and the base take to load is there already."""
    status = 1
    try:
        with words.open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                cli.app(list(command), standalone_mode=False)
                status = 0
            except BaseException as error:
                log.write(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def _size(folder: Path) -> int:
    path = folder / "journal.jsonl"
    return path.stat().st_size if path.exists() else -1


def _ended(folder: Path) -> bool:
    return journal.ended(folder / "journal.jsonl")


def _require_same(calm: Path, folder: Path) -> None:
    """Raises FederationError unless a run that was killed has the adapter and the rounds of the calm one."""
    files = sorted(path.name for path in (calm / "adapter").iterdir())
    odd = [name for name in files if (calm / "adapter" / name).read_bytes() != (folder / "adapter" / name).read_bytes()]
    one, other = (_rounds(each / "journal.jsonl") for each in (calm, folder))
    odd += [f"round {number}" for number in sorted(one.keys() | other.keys()) if one.get(number) != other.get(number)]
    if odd:
        raise _unlike(folder, "what the calm run has, to the bit", f"unlike {odd}")


def _unlike(folder: Path, expected: str, found: str) -> FederationError:
    remedy = "keep its folder and look into it"
    return FederationError(sentence(str(folder), expected=expected, found=found, remedy=remedy))


def _rounds(path: Path) -> dict[int, Any]:
    """The rounds on record, less what clocks say."""
    return {record["round"]: _timeless(record) for record in journal.read(path) if record["event"] == "round"}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _UNSEEN}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    script(main)
