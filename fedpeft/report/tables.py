"""The tables of a report: pure functions from journal records to rows, and rows to text, Markdown or HTML."""

from __future__ import annotations

import html
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.report.history import History, Record, history
from fedpeft.report.metrics import UNNAMED, metric
from fedpeft.report.units import NOTHING, between, human_bytes, human_seconds, times

_NARROWEST = 9
_WIDEST_NAME = 26


@dataclass(frozen=True)
class Table:
    """Text in rows under `columns`; the first column names the row, the others align right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class SummaryRow:
    """One line of the table a run ends with; None where a thing was not measured. `score` is the run's metric."""

    name: str
    score: float | None
    spread: float | None
    groups: Mapping[str, float | None]
    bytes_up: int | None
    bytes_down: int | None
    ratio: float | None
    seconds: float | None


def summary_rows(records: Sequence[Record]) -> tuple[SummaryRow, ...]:
    """The federation, then each bound.

    Raises:
        RunFolderError: the journal does not begin with a start line.
    """
    run = history(records)
    return (_federation(run, run.metric), *(_bound(row, run.metric) for row in run.bounds))


def summary_table(records: Sequence[Record]) -> Table:
    """The table a run ends with: metric overall and per group, bytes, how many times less than the full model, time.

    Raises:
        RunFolderError: the journal does not begin with a start line.
    """
    run = history(records)
    groups, told = run.groups, metric(run.metric)
    rows = tuple(
        (
            row.name,
            told.text(row.score, row.spread),
            *(told.text(row.groups.get(group)) for group in groups),
            *_cost(row),
        )
        for row in summary_rows(records)
    )
    return Table(("", told.title, *groups, "bytes up", "bytes down", "× less than full model", "time"), rows)


def comparison_table(runs: Mapping[str, Sequence[Record]]) -> Table:
    """One row a run (its name to its journal's records): what it reached and what it cost.

    Raises:
        RunFolderError: a journal does not begin with a start line.
    """
    told = {name: history(records) for name, records in runs.items()}
    groups = sorted({group for run in told.values() for group in run.groups})
    key = common_metric(told)
    shown = metric(key)
    rows = []
    for name, run in told.items():
        row = _federation(run, key)
        scores = [shown.text(row.score), *(shown.text(row.groups.get(group)) for group in groups)]
        rows.append((name, _family(run), str(len(run.rounds)), *scores, *_cost(row)))
    cost = ("bytes up", "bytes down", "× less than full model", "time")
    return Table(("", "adapter", "rounds", shown.title, *groups, *cost), tuple(rows))


def common_metric(runs: Mapping[str, History]) -> str:
    """The figure by which several runs are told together: the first one's; a run that lacks it has none."""
    return next((run.metric for run in runs.values()), UNNAMED)


def difference_table(runs: Mapping[str, Sequence[Record]]) -> Table:
    """One row a run, one column for each setting in which the runs differ (`name` and `out` aside).

    Raises:
        RunFolderError: a journal does not begin with a start line.
    """
    configs = {name: history(records).config for name, records in runs.items()}
    keys = sorted({key for config in configs.values() for key in config} - {"name", "out"})
    told = {key: [_setting(config, key) for config in configs.values()] for key in keys}
    unlike = [key for key in keys if len(set(told[key])) > 1]
    rows = tuple((name, *(told[key][index] for key in unlike)) for index, name in enumerate(configs))
    return Table(("", *unlike), rows)


def failure_table(records: Sequence[Record]) -> Table:
    """Every client failure: round, site, reason.

    Raises:
        RunFolderError: the journal does not begin with a start line.
    """
    rows = [
        (str(number), _text(item, "partition"), _text(item, "reason")) for number, item in history(records).failures
    ]
    return Table(("round", "site", "reason"), tuple(rows))


def settings_table(records: Sequence[Record]) -> Table:
    """Every setting of the run by its dotted key, in the order of the config.

    Raises:
        RunFolderError: the journal does not begin with a start line.
    """
    config = history(records).config
    return Table(("setting", "value"), tuple((str(key), _setting(config, key)) for key in config))


def render_plain(table: Table) -> str:
    """Columns padded with spaces under a rule, long headings and names broken over lines.

    No colour, no tabs, no last newline.
    """
    body = [line for row in table.rows for line in _broken(_line(row))]
    cells = [[row[index] for row in body] for index in range(len(table.columns))]
    headings = [
        textwrap.wrap(heading, max([_NARROWEST, *map(_width, column)]), break_long_words=False) or [""]
        for heading, column in zip(table.columns, cells, strict=True)
    ]
    widths = [max(map(_width, [*top, *column])) for top, column in zip(headings, cells, strict=True)]
    tallest = max(map(len, headings))
    header = zip(*([""] * (tallest - len(lines)) + lines for lines in headings), strict=True)
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([*(_padded(row, widths) for row in header), rule, *(_padded(row, widths) for row in body)])


def render_markdown(table: Table) -> str:
    """A GitHub-flavoured Markdown table; the columns after the first align right."""
    rule = ("---", *("---:" for _ in table.columns[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (_escaped(table.columns), rule, *map(_escaped, table.rows)))


def render_html(table: Table, css_class: str = "numbers") -> str:
    """A `<table>` whose every text is escaped; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in table.columns)
    body = "".join(f"<tr>{_html_cells(row)}</tr>\n" for row in table.rows)
    return f'<table class="{html.escape(css_class)}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n'


def _federation(run: History, key: str) -> SummaryRow:
    evaluation = run.evaluation or {}
    going = "" if run.end else f", so far ({_rounds_done(run)})"
    return SummaryRow(
        name=f"federation{_merging(run)}{going}",
        score=evaluation.get(key),
        spread=None,
        groups=_group_scores(evaluation, key),
        bytes_up=run.bytes_up,
        bytes_down=run.bytes_down,
        ratio=run.ratio,
        seconds=run.seconds,
    )


def _merging(run: History) -> str:
    """By which rule, and at which ranks where the sites' differ."""
    ranks = f"ranks {between(run.unlike_ranks, '–')}" if run.unlike_ranks else ""
    told = ", ".join(part for part in (run.rule, ranks) if part)
    return f" ({told})" if told else ""


def _bound(row: Record, key: str) -> SummaryRow:
    evaluation = row.get("evaluation") or {}
    return SummaryRow(
        name=_text(row, "name"),
        score=evaluation.get(key),
        spread=row.get("spread"),
        groups=_group_scores(evaluation, key),
        bytes_up=None,
        bytes_down=None,
        ratio=None,
        seconds=row.get("seconds"),
    )


def _rounds_done(run: History) -> str:
    done, planned = len(run.rounds), run.config.get("rounds")
    return f"round {done} of {planned}" if planned else f"round {done}"


def _group_scores(evaluation: Record, key: str) -> dict[str, float | None]:
    return {name: group.get(key) for name, group in (evaluation.get("groups") or {}).items()}


def _cost(row: SummaryRow) -> tuple[str, str, str, str]:
    return human_bytes(row.bytes_up), human_bytes(row.bytes_down), times(row.ratio), human_seconds(row.seconds)


def _family(run: History) -> str:
    return _text(run.start.get("adapter") or {}, "family")


def _text(record: Record, key: str) -> str:
    value: Any = record.get(key)
    return NOTHING if value is None else str(value)


def _setting(config: Record, key: str) -> str:
    value = config.get(key)
    if isinstance(value, bool):
        return str(value).lower()
    return NOTHING if value is None or value == "" else str(value)


def _line(row: Sequence[str]) -> list[str]:
    return [" ".join(cell.split()) for cell in row]


def _broken(row: Sequence[str]) -> list[list[str]]:
    """The row as lines, the first cell of which is not too long where it can be broken."""
    name, *cells = row
    wrapper = textwrap.TextWrapper(_WIDEST_NAME, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    first, *others = wrapper.wrap(name) or [""]
    return [[first, *cells], *([other, *("" for _ in cells)] for other in others)]


def _escaped(row: Sequence[str]) -> list[str]:
    return [html.escape(cell, quote=False).replace("\\", "\\\\").replace("|", "\\|") for cell in _line(row)]


def _width(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        (" " * (width - _width(cell)) + cell) if index else cell + " " * (width - _width(cell))
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def _html_cells(row: Sequence[str]) -> str:
    first, *rest = map(html.escape, row)
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest)
