"""What a check of `fedpeft doctor` finds."""

from __future__ import annotations

from typing import NamedTuple

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "FAILED", "skipped"


class Check(NamedTuple):
    """One thing that was looked at: how it is, what was found, and what mends it where it is not well."""

    name: str
    outcome: str
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """A thing that is well."""
    return Check(name, OK, found)


def warning(name: str, found: str, remedy: str) -> Check:
    """A thing that works now and should be mended all the same."""
    return Check(name, WARNING, found, remedy)


def failed(name: str, found: str, remedy: str) -> Check:
    """A thing without which the node cannot take part."""
    return Check(name, FAILED, found, remedy)


def skipped(name: str, why: str) -> Check:
    """A thing that cannot be looked at."""
    return Check(name, SKIPPED, why)
