"""How exact the merges were, in words and by module."""

from __future__ import annotations

from fedpeft.report.history import History, Record
from fedpeft.report.tables import Table
from fedpeft.report.units import NOTHING, ROUNDING, between, relative

_MOST_MODULES = 100
_COLUMNS = {"error": "merge_errors", "effective rank": "effective_ranks", "tail": "tails"}
_LEAST_DROPPED = 1e-6
"""A norm below this that a budget left out is rounding."""


def merge_words(run: History) -> str:
    """What the journal's figures of the merges mean and what they come to; empty where there are none."""
    said = (_verdict(run), _tail(run), _lacks(run), _residual(run), _used(run), _flag(run))
    told = [sentence for sentence in said if sentence]
    return " ".join([_meaning(run), *told]) if told else ""


def module_table(run: History) -> Table:
    """The modules in the last round that was measured, greatest error first; no more than a hundred rows."""
    measured = _measured(run)
    if not measured:
        return Table(("module", *_COLUMNS), ())
    errors, ranks, tails = (measured[-1].get(key) or {} for key in _COLUMNS.values())
    order = sorted({*errors, *ranks, *tails}, key=lambda name: (-_size(errors.get(name)), name))
    rows = ((name, relative(errors.get(name)), _rank(ranks.get(name)), relative(tails.get(name))) for name in order)
    return Table(("module", *_COLUMNS), tuple(rows)[:_MOST_MODULES])


def modules_title(run: History, table: Table) -> str:
    """What stands above the table of modules."""
    measured = _measured(run)
    known = len({name for key in _COLUMNS.values() for name in measured[-1].get(key) or {}})
    shown = f"{len(table.rows)} of {known:,}, greatest error first" if known > len(table.rows) else f"{known}"
    return f"Modules in round {measured[-1]['round']} ({shown})"


def _meaning(run: History) -> str:
    optimizer = run.config.get("aggregation.optimizer.kind")
    moved = f", and {optimizer} moved the adapter by what came out" if optimizer else ""
    merged = f"The rule {run.rule} merged what the sites sent{moved}" if run.rule else "The server merged what it got"
    if not _errors(run):
        return f"{merged}."
    kept = "the updates that it used" if _judged(run) else "what the sites' adapters do"
    return (
        f"{merged}; the error is how far the merged adapter lies from the exact mean of {kept}, over that mean's norm."
    )


def _verdict(run: History) -> str:
    errors = _errors(run)
    if not errors:
        return ""
    (greatest, at), (last, now) = max(errors), errors[-1]
    by_module = [error for record in run.rounds for error in (record.get("merge_errors") or {}).values()]
    if max([greatest, *(error for error in by_module if error is not None)]) < ROUNDING:
        exact = (
            ", before the residual was cut to its budget" if _dropped(run) else ": the rule is exact, rounding aside"
        )
        return f"Every error is below {100 * ROUNDING:g} %{exact}."
    most = f"; the greatest was {relative(greatest)}, in round {at}" if at != now else ""
    return f"In round {now} the error was {relative(last)}{most}."


def _lacks(run: History) -> str:
    """Of means of which the server has seen a projection alone: how much lies outside it, and where they were lost."""
    found = [record["merge_lacks"] for record in run.rounds if "merge_lacks" in record]
    if not found:
        return ""
    known = [share for share in found if share is not None]
    lost = len(found) - len(known)
    most = f", {relative(max(known))} of a mean at most as far as a few columns tell," if known else ","
    stayed = (
        f" In {lost} of {len(found)} rounds a site fell silent between the two, and products stayed." if lost else ""
    )
    return f"Products were summed by way of a sketch; what lay outside it{most} counts as missed.{stayed}"


def _flag(run: History) -> str:
    """What was averaged although it is not linear in its numbers; the journal says so from the start."""
    flagged = (run.start.get("adapter") or {}).get("inexact") or {}
    told = "; ".join(f"{kind}, because {why}" for kind, why in flagged.items())
    return f"Averaged, though the mean of the numbers is not the mean of what they do: {told}." if told else ""


def _tail(run: History) -> str:
    tails = [record["tail"] for record in run.rounds if record.get("tail") is not None]
    if not tails or tails[-1] < ROUNDING:
        return ""
    rank = f" of rank {run.server_rank}" if run.server_rank else ""
    return f"A tail of {relative(tails[-1])} of the last mean's norm fits into no adapter{rank}."


def _residual(run: History) -> str:
    ranks = [record["residual_rank"] for record in run.rounds if record.get("residual_rank") is not None]
    if not ranks:
        return ""
    dropped = _dropped(run)
    lost = f"; its budget of rank {run.budget} left out parts whose norms add up to {dropped:.2g}" if dropped else ""
    return (
        f"The base has taken up a residual of rank {ranks[-1]:.0f}, which an exported adapter holds on top of its own "
        f"rank{lost}."
    )


def _used(run: History) -> str:
    judged = _judged(run)
    if not judged:
        return ""
    used, sent = zip(*((record["updates_used"], len(record.get("clients") or ())) for record in judged), strict=True)
    return f"The rule used {between(used)} of {between(sent)} updates a round."


def _errors(run: History) -> list[tuple[float, int]]:
    return [(record["merge_error"], record["round"]) for record in run.rounds if record.get("merge_error") is not None]


def _judged(run: History) -> list[Record]:
    return [record for record in run.rounds if record.get("updates_used") is not None]


def _dropped(run: History) -> float:
    """What a budget left out of the residual, which no error counts; 0 where that is rounding."""
    total = sum(record.get("residual_dropped") or 0.0 for record in run.rounds)
    return total if run.budget and total > _LEAST_DROPPED else 0.0


def _measured(run: History) -> list[Record]:
    """The rounds that say something of single modules."""
    return [record for record in run.rounds if any(record.get(key) for key in _COLUMNS.values())]


def _rank(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def _size(error: float | None) -> float:
    """The error for sorting: what is rounding is alike, and what is not known comes after it."""
    return -1.0 if error is None else error if error >= ROUNDING else 0.0
