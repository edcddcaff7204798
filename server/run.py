"""Starts a run and sees it to its end: `python -m server.run simulations/demo.toml --out runs/demo`.

A run of Flower's ends for good when its server, the SuperLink or the machine goes down. What was recorded is in the
run folder, so this starts a new one that goes on from there, again and again, until the run has come to its end or
no round is gained any more. The SuperLink must run, or come back: `server.start` keeps it running. Flower itself takes
a minute to see that the process of a run's server is gone; here nobody at work in the run folder shows it at once.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedpeft import checkpoint, journal
from fedpeft.cli import script
from fedpeft.engines.flower_environment import HOME_VARIABLE, flower_environment
from fedpeft.errors import ConfigError, FederationError, sentence
from fedpeft.locks import taken
from fedpeft.runs import RunFolder
from server.flwr_calls import Flwr

ROOT = Path(__file__).resolve().parent.parent
"""The folder of the app."""

_RAISED = "ServerApp raised an exception: "
"""What Flower writes before the sentence of an error that ended the app's server."""

_STOPPED = "finished:stopped"
"""Flower's word for an attempt that somebody ended with `flwr stop`."""

_GONE = "the process of the run's server is gone"

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_MOST_CHARACTERS = 500
_CALL_SECONDS = 120.0
_LOOK_SECONDS, _POLL_SECONDS, _SELDOM_SECONDS = 1.0, 3.0, 30.0
"""How often the run folder is looked at, and Flower asked: often where nobody is at work in the folder, else seldom."""

_SILENT_SECONDS = 300.0
"""How long a SuperLink may be away, or not know a run, before the run is taken up anew."""


@dataclass(frozen=True)
class Attempts:
    """How often a run is taken up again without a round gained, and the seconds before each time."""

    most: int = 10
    pause_seconds: float = 5.0


@dataclass(frozen=True)
class Run:
    """A run of the app on the federation that `flwr` calls `connection`; its folder and what it is started with."""

    connection: str
    folder: Path
    config: str
    overrides: tuple[str, ...]
    env: Mapping[str, str]

    def start(self) -> str:
        """Flower's number of a new attempt, which goes on from the last recorded round if there is one.

        Raises:
            FederationError: Flower does not take it.
        """
        fields = {"resume": str(self.folder)} if self.recorded() is not None else {"out": str(self.folder)}
        fields |= {"config": self.config, "set": shlex.join(self.overrides)} if "out" in fields else {}
        asked = " ".join(f"{key}={json.dumps(value)}" for key, value in fields.items())
        answer = self._flwr.answer("run", ".", self.connection, "-c", asked)
        if "run-id" not in answer:
            found = " ".join(str(answer.get("error-message", "no number of a run")).split())
            raise FederationError(
                sentence("flwr run", expected="a new run", found=found[-300:], remedy="see that the SuperLink runs")
            )
        return str(answer["run-id"])

    def status(self, number: str) -> str:
        """Flower's word for how an attempt stands; empty where the SuperLink does not answer or does not know it."""
        listed = self._flwr.answer("ls", self.connection).get("runs", ())
        return next((str(run["status"]) for run in listed if str(run["run-id"]) == number), "")

    def recorded(self) -> int | None:
        """The rounds on record; None where the run has not begun."""
        folder = RunFolder(self.folder)
        if not checkpoint.exists(folder.checkpoint):
            return None
        return [record["event"] for record in journal.read(folder.journal)].count("round")

    def ended(self) -> bool:
        """Whether the run has come to its end."""
        return journal.ended(RunFolder(self.folder).journal)

    def reason(self, number: str) -> str:
        """Why an attempt failed, by its log; empty where that says nothing."""
        return last_words(self._log(number))

    def raised(self, number: str) -> str:
        """The exception that ended the app's server, by its log; empty where there was none."""
        return exception_in(self._log(number))

    def stop(self, number: str) -> None:
        """Flower holds an attempt for ended."""
        self._flwr.printed("stop", number, self.connection)

    def _log(self, number: str) -> str:
        return self._flwr.printed("log", number, self.connection, "--show")

    @property
    def _flwr(self) -> Flwr:
        return Flwr(self.env, _CALL_SECONDS, ROOT)


def last_words(log: str) -> str:
    """What the log of an attempt says of its end: the exception of the app's server, or else the last error, if any."""
    errors = [line for line in _lines(log) if "error" in line.lower() and "Exit Code" not in line]
    return exception_in(log) or next(iter(errors[-1:]), "")[:_MOST_CHARACTERS]


def exception_in(log: str) -> str:
    """The sentence of the exception that ended the app's server; empty where none did."""
    raised = [line.partition(_RAISED)[2] for line in _lines(log) if _RAISED in line]
    return next(iter(raised[-1:]), "")[:_MOST_CHARACTERS]


def _lines(log: str) -> list[str]:
    return [" ".join(_COLOURS.sub("", line).split()) for line in log.splitlines()]


def see_through(run: Run, attempts: Attempts, say: Callable[[str], None]) -> None:
    """The run has come to its end, taken up again however often it was cut off.

    Raises:
        FederationError: no round was gained in as many attempts as are allowed, or somebody stopped the run.
    """
    fruitless, rounds = 0, run.recorded()
    while not run.ended():
        why = _attempt(run, say)
        if run.ended():
            break
        now, place = run.recorded(), f"run {run.folder}"
        if why.startswith(_STOPPED):
            found = f"that it was stopped after {now or 0} rounds"
            raise FederationError(sentence(place, expected="its end", found=found, remedy="call this again to go on"))
        fruitless = 0 if now != rounds else fruitless + 1
        rounds = now
        if fruitless >= attempts.most:
            remedy = "mend that, then call this again: the run goes on"
            raise FederationError(
                sentence(place, expected=f"a round gained in {attempts.most} attempts", found=why, remedy=remedy)
            )
        say(f"cut off after {rounds or 0} rounds ({why}); goes on in {attempts.pause_seconds:g} s")
        time.sleep(attempts.pause_seconds)
    say(f"the run in {run.folder} is complete")


def _attempt(run: Run, say: Callable[[str], None]) -> str:
    """Why one attempt is over."""
    try:
        number = run.start()
    except FederationError as error:
        return str(error)
    say(f"run {number} of Flower's")
    heard = asked = time.monotonic()
    begun, deserted = False, 0
    while True:
        time.sleep(_LOOK_SECONDS)
        at_work = taken(run.folder)
        begun = begun or at_work
        if not at_work and run.ended():
            return "ended"
        if time.monotonic() - asked < (_SELDOM_SECONDS if at_work else _POLL_SECONDS):
            continue
        asked, status = time.monotonic(), run.status(number)
        heard = asked if status else heard
        deserted = 0 if at_work else deserted + bool(status)
        if asked - heard > _SILENT_SECONDS:
            return f"nothing heard of it for {_SILENT_SECONDS:g} seconds"
        if status.startswith("finished"):
            why = run.reason(number) or (_GONE if begun else "nothing in its log")
            return status if status.endswith("completed") else f"{status}: {why}"
        if begun and deserted > 1:
            said = run.raised(number)  # a process that raised may be gone before Flower says that it has failed
            run.stop(number)
            return said or _GONE


def main(
    config: Annotated[str, typer.Argument(help="Settings, a file of this folder.")],
    out: Annotated[Path, typer.Option(help="The run folder; a run that is there goes on.", show_default=False)],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides.")] = None,
    name: Annotated[str, typer.Option(help="What `server.start` calls the federation.")] = "lab",
    home: Annotated[Path, typer.Option(envvar=HOME_VARIABLE, help="The server's folder.")] = Path("federation"),
    attempts: Annotated[int, typer.Option(min=1, help="Attempts without a round gained, before giving up.")] = 10,
) -> None:
    """Start the run, or go on with it, and see it to its end whatever is cut off on the way."""
    if not (ROOT / config).is_file():
        remedy = f"name a file below {ROOT}, because Flower takes it along with the app"
        raise ConfigError(sentence("CONFIG", expected="a settings file", found=repr(config), remedy=remedy))
    for item in set_ or ():
        if '"' in item:
            remedy = "write a list as a,b, or put the setting into the settings file"
            expected = "no double quotes, which Flower does not pass on"
            raise ConfigError(sentence("--set", expected=expected, found=item[:100], remedy=remedy))
    run = Run(name, out.absolute(), config, tuple(set_ or ()), flower_environment(home, os.environ))
    see_through(run, Attempts(attempts), lambda text: typer.echo(f"fedpeft: {text}"))


if __name__ == "__main__":
    script(main)
