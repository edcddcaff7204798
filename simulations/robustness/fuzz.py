"""Feeds altered messages to what reads them, and counts what comes out: `python -m simulations.robustness.fuzz`.

Only a FedPeftError may come out. With `--atheris`, where that package is installed, the changes are led by coverage.
"""

from __future__ import annotations

import argparse
import importlib
import random
import resource
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from fedpeft import adapters, requests, wire
from fedpeft.engines import flower_messages
from fedpeft.errors import FedPeftError
from simulations.robustness.mutations import mutated, receive

HEADROOM_BYTES = 2**30
"""What the process may allocate beyond what it has when it begins; more is a MemoryError."""

MEASURED_EVERY = 100
"""One input in so many is read with its allocations measured, which makes it several times slower."""


@dataclass
class Tally:
    """Inputs by what came out of them, the seed of the first of each unexpected kind, and the greatest allocation."""

    outcomes: Counter[str] = field(default_factory=Counter)
    unexpected: dict[str, str] = field(default_factory=dict)
    greatest_bytes: int = 0

    @property
    def inputs(self) -> int:
        """How many inputs were read."""
        return sum(self.outcomes.values())


def outcome(which: int, records: Any) -> tuple[str, str]:
    """`used`, or the name of what was raised and its text, empty for a FedPeftError."""
    try:
        receive(which, records)
    except FedPeftError as error:
        text = str(error)
        fit = len(text) < 1000 and "\n" not in text
        return (type(error).__name__, "") if fit else ("a text that is not one short line", text[:200])
    except Exception as error:  # what comes out is what is being measured
        return type(error).__name__, str(error)[:200] or "no text"
    return "used", ""


def fuzz(inputs: int, seed: int = 0) -> Tally:
    """The tally of `inputs` messages; each follows from `seed` and its number alone."""
    tally = Tally()
    for number in range(inputs):
        which, records = mutated(random.Random(f"{seed}/{number}").randrange)
        measured = number % MEASURED_EVERY == 0
        if measured:
            tracemalloc.start()
        kind, text = outcome(which, records)
        if measured:
            tally.greatest_bytes = max(tally.greatest_bytes, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        tally.outcomes[kind] += 1
        if text:
            tally.unexpected.setdefault(kind, f"seed {seed}, input {number}: {text}")
    return tally


def guided(inputs: int) -> None:
    """Runs `inputs` messages whose changes atheris chooses by the lines they reach; ends the process."""
    atheris: Any = importlib.import_module("atheris")
    for module in (wire, requests, flower_messages, adapters):
        for value in vars(module).values():
            if isinstance(value, FunctionType) and value.__module__.startswith("fedpeft."):
                atheris.instrument_func(value)
    tally, started = Tally(), time.perf_counter()

    def one(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        which, records = mutated(lambda most: int(provider.ConsumeIntInRange(0, most - 1)))
        kind, text = outcome(which, records)
        tally.outcomes[kind] += 1
        if text:
            raise RuntimeError(f"{kind}: {text}")
        if tally.inputs == inputs:
            report(tally, time.perf_counter() - started)

    atheris.Setup([sys.argv[0], f"-atheris_runs={inputs}", "-max_len=256", "-print_final_stats=1"], one)
    atheris.Fuzz()


def report(tally: Tally, seconds: float) -> None:
    """Prints what was found."""
    print(f"{tally.inputs} inputs in {seconds:.0f} seconds")
    for kind, count in tally.outcomes.most_common():
        print(f"{count:>10}  {kind}")
    if tally.greatest_bytes:
        print(f"greatest allocation of one input: {tally.greatest_bytes} bytes (of one in {MEASURED_EVERY})")
    print(f"greatest memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB")
    for kind, text in tally.unexpected.items():
        print(f"UNEXPECTED {kind}: {text}")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where anything but a FedPeftError came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.atheris:
        guided(asked.inputs)
        return 0
    started = time.perf_counter()
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + HEADROOM_BYTES,) * 2)
    tally = fuzz(asked.inputs, asked.seed)
    report(tally, time.perf_counter() - started)
    return 1 if tally.unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
