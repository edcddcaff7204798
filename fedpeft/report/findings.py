"""What attacks on a run found, as the run's journal tells it."""

from __future__ import annotations

from fedpeft.report.history import History, Record
from fedpeft.report.protection import protected_by
from fedpeft.report.tables import Table
from fedpeft.report.units import NOTHING

FOUND_WORDS = (
    "Attacks on runs of these settings, each from what one adversary sees, and what they came to. A value counted over "
    "cases lies in its interval with 95 % confidence. That an attack found little is no promise: a better one may "
    "find more."
)


def finding_table(run: History) -> Table:
    """One row a finding: the attack, what its adversary saw, the figure with its interval, and what protected."""
    columns = ("attack", "the adversary saw", "metric", "value", "95 % interval", "cases", "protected by")
    return Table(columns, tuple(_row(record, protected_by(run.config)) for record in run.findings))


def _row(record: Record, protection: str) -> tuple[str, ...]:
    low, high = record.get("low"), record.get("high")
    between = NOTHING if low is None or high is None or low == high else f"{_number(low)} to {_number(high)}"
    told = (str(record.get(key, "")) for key in ("attack", "adversary", "metric"))
    return (*told, _number(record.get("value")), between, f"{record.get('n', 0):,}", protection)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
