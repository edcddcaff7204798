"""One HTML page that holds a whole run: no script, no file beside it, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedpeft import journal
from fedpeft.errors import RunFolderError, sentence
from fedpeft.files import write_atomically
from fedpeft.report.drawing import Plot, inline_svg
from fedpeft.report.exactness import merge_words, module_table, modules_title
from fedpeft.report.findings import FOUND_WORDS, finding_table
from fedpeft.report.history import History, Record, history
from fedpeft.report.merge_plots import merge_plots
from fedpeft.report.metrics import metric
from fedpeft.report.plots import comparison_plots, round_plots
from fedpeft.report.protection import protection_words
from fedpeft.report.stylesheet import STYLESHEET
from fedpeft.report.tables import (
    Table,
    comparison_table,
    difference_table,
    failure_table,
    render_html,
    settings_table,
    summary_table,
)
from fedpeft.report.traffic import LINK_WORDS, rounds_table, traffic_table, traffic_words
from fedpeft.report.units import human_bytes, human_count, human_seconds, percent, times

_Figure = tuple[str, str, str]
_MOST_OPEN_ROWS = 20
_NO_BREAK_PERCENT = "\u00a0%"


_STOPPED = {"early": "stopped early", "budget": "stopped before its privacy budget was exceeded"}
"""How a run ended that did not go to its last round."""


def write_report(run_folder: Path) -> Path:
    """`run_folder/report.html` shows what the folder's journal says; the same journal gives the same bytes.

    Raises:
        RunFolderError: there is no journal, or it is corrupt or empty.
        OSError: the disk is full or not writable; a report that was there is as it was.
    """
    records = journal.read(run_folder / "journal.jsonl")
    path = run_folder / "report.html"
    write_atomically(path, _encoded(render_page(records)))
    return path


def write_comparison(run_folders: Sequence[Path], out: Path) -> Path:
    """`out` is one page that shows several runs together: their curves, a table, and the settings that differ.

    Raises:
        RunFolderError: no run is named, or a journal is missing, corrupt or empty.
    """
    if not run_folders:
        raise RunFolderError(
            sentence("comparison", expected="at least one run folder", found="none", remedy="name the runs to compare")
        )
    runs = dict(
        zip(_names(run_folders), (journal.read(folder / "journal.jsonl") for folder in run_folders), strict=True)
    )
    write_atomically(out, _encoded(render_comparison(runs)))
    return out


def render_page(records: Sequence[Record]) -> str:
    """The page of one run.

    Raises:
        RunFolderError: the journal does not begin with a start line.
    """
    run = history(records)
    parts = [
        _kicker(run),
        f"<h1>{html.escape(run.name)}</h1>",
        f'<p class="lede">{html.escape(_lede(run))}</p>',
        _figures(_key_figures(run)),
        _section("Result", _scroll(render_html(summary_table(records), "numbers summary"))),
        _section("Round by round and site by site", _plots(round_plots(run))),
    ]
    if run.rounds:
        parts.append(_section("What was sent", _traffic(run)))
    if samples := _samples(run):
        parts.append(_section("What it answers", samples))
    if merges := _merges(run):
        parts.append(_section("How exact the merges were", merges))
    parts.append(_section("What was protected, and what was not", _paragraphs(protection_words(run))))
    if run.findings:
        told = _paragraphs((FOUND_WORDS,)) + _scroll(render_html(finding_table(run), "words"))
        parts.append(_section("What attacks found", told))
    failures = failure_table(records)
    if failures.rows:
        parts.append(_folded(f"Failures ({len(failures.rows)})", failures, "words"))
    settings = settings_table(records)
    if settings.rows:
        parts.append(_folded("Settings", settings, "words settings"))
    parts.append(_footer(run))
    return _document(run.name, parts)


def render_comparison(runs: Mapping[str, Sequence[Record]]) -> str:
    """The page of several runs, each by its name.

    Raises:
        RunFolderError: a journal does not begin with a start line.
    """
    title = f"{_plural(len(runs), 'run')} compared"
    unlike = difference_table(runs)
    parts = [
        '<p class="kicker">Federated fine-tuning · comparison</p>',
        f"<h1>{title}</h1>",
        _section("Result", _scroll(render_html(comparison_table(runs), "numbers"))),
        _section("Over rounds and over bytes", _plots(comparison_plots(runs))),
    ]
    if len(unlike.columns) > 1:
        parts.append(_section("Settings that differ", _scroll(render_html(unlike, "numbers"))))
    return _document(title, parts)


def _kicker(run: History) -> str:
    told = ["Federated fine-tuning", _state(run), _moment(str(run.start.get("time") or ""))]
    return f'<p class="kicker">{html.escape(" · ".join(str(part) for part in told if part))}</p>'


def _moment(time: str) -> str:
    try:
        return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return time


def _state(run: History) -> str:
    if run.end is None:
        return "still going when this page was written"
    return _STOPPED.get(str(run.end.get("stopped")), "completed")


def _lede(run: History) -> str:
    score = (run.evaluation or {}).get(run.metric)
    sites, done = _plural(len(run.partitions), "site"), _plural(len(run.rounds), "round")
    if not run.rounds:
        return f"The run has started over {sites}; no round has ended yet."
    if score is None:
        return f"{done} over {sites} ended; nothing has been evaluated."
    rows = (run.evaluation or {}).get("rows")
    held_out = f"{rows:,} held-out rows" if rows else "the held-out rows"
    saved = f", sending {times(run.ratio)} less than the full model would have taken" if run.ratio else ""
    told = metric(run.metric)
    reached = f"After {done} over {sites} the model {told.reached.format(told.text(score), held_out)}"
    return f"{reached}{saved}.{_gains(run, score)}"


def _gains(run: History, score: float) -> str:
    others = {str(bound.get("name")): (bound.get("evaluation") or {}).get(run.metric) for bound in run.bounds}
    shown = metric(run.metric)
    told = [f"{shown.difference(score - other)} “{name}”" for name, other in others.items() if other is not None]
    return f" That is {', '.join(told[:-1])}{' and ' if told[1:] else ''}{told[-1]}." if told else ""


def _key_figures(run: History) -> list[_Figure]:
    adapter, evaluation = run.start.get("adapter") or {}, run.evaluation or {}
    figures: list[_Figure] = []
    if evaluation.get(run.metric) is not None:
        told, score = metric(run.metric), evaluation.get("macro_f1")
        figures.append(
            (told.heading, told.text(evaluation[run.metric]), "" if score is None else f"macro F1 {score:.3f}")
        )
    figures.append(("Sites", str(len(run.partitions)), _cohort(run)))
    figures.append(("Rounds", str(len(run.rounds)), _planned(run)))
    if adapter.get("trainable_parameters"):
        figures.append(("Trained parameters", human_count(adapter["trainable_parameters"]), _share(adapter)))
    if run.rounds:
        less = f"{times(run.ratio)} less than the full model" if run.ratio else ""
        figures.append(("Sent", human_bytes(run.bytes_up + run.bytes_down), less))
        figures.append(("Time", human_seconds(run.seconds), f"engine: {run.start.get('engine', 'not told')}"))
    return figures


def _cohort(run: History) -> str:
    cohort = run.config.get("federation.cohort")
    return f"{cohort} drawn a round" if cohort is not None else ""


def _planned(run: History) -> str:
    planned = run.config.get("rounds")
    return f"of {planned} planned" if planned is not None else ""


def _share(adapter: Record) -> str:
    family, base = adapter.get("family", "adapter"), adapter.get("base_parameters")
    if not base:
        return str(family)
    return f"{family}, {100 * adapter['trainable_parameters'] / base:.2g} % of {human_count(base)}"


def _figures(figures: Sequence[_Figure]) -> str:
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}<small>{html.escape(note)}</small></dd></div>"
        for name, value, note in figures
    )
    return f'<dl class="figures">{cells}</dl>'


def _plots(shown: Sequence[Plot]) -> str:
    if not shown:
        return "<p>Nothing to draw yet.</p>"
    return f'<div class="plots">{"".join(map(_plot, shown))}</div>'


def _plot(plot: Plot) -> str:
    return (
        f'<figure id="plot-{plot.name}"><h3>{html.escape(plot.title)}</h3><div class="plot">{inline_svg(plot)}</div>'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>\n"
    )


def _merges(run: History) -> str:
    """What is known of the merges, in words, in plots and by module; empty where nothing is."""
    said, drawn, modules = merge_words(run), merge_plots(run), module_table(run)
    told = f'<p class="words">{html.escape(said.replace(" %", _NO_BREAK_PERCENT))}</p>' if said else ""
    shown = _plots(drawn) if drawn else ""
    return told + shown + (_folded(modules_title(run, modules), modules, "numbers modules") if modules.rows else "")


def _paragraphs(sentences: Sequence[str]) -> str:
    return "".join(f'<p class="words">{html.escape(said)}</p>' for said in sentences)


def _traffic(run: History) -> str:
    """The bytes against those of others, in words and in a table, and round by round."""
    told = _paragraphs((*traffic_words(run), LINK_WORDS)) + _scroll(render_html(traffic_table(run)))
    return told + _folded("Bytes round by round", rounds_table(run), "numbers settings")


def _samples(run: History) -> str:
    """What the final adapter answered to some held-out rows; empty where a task has no answers in words."""
    samples = (run.end or {}).get("samples") or []
    rows = tuple((sample["given"], sample["expected"], sample["answered"]) for sample in samples)
    return _scroll(render_html(Table(("given", "expected", "answered"), rows), "words")) if rows else ""


def _folded(title: str, table: Table, css_class: str) -> str:
    """Rows that most readers skip: shut, unless there are few and they tell of trouble."""
    is_open = " open" if "settings" not in css_class and len(table.rows) <= _MOST_OPEN_ROWS else ""
    return (
        f"<details{is_open}><summary>{html.escape(title)}</summary>{_scroll(render_html(table, css_class))}</details>"
    )


def _footer(run: History) -> str:
    data = run.start.get("data") or {}
    told = [f"fedpeft {run.start.get('fedpeft', '')}".strip()]
    if data.get("train_rows") is not None:
        told.append(f"{data['train_rows']:,} training rows and {data.get('test_rows') or 0:,} held out")
    if data.get("repeats_removed"):
        told.append(f"{data['repeats_removed']:,} repeats removed before the split")
    if data.get("test_overlap") is not None:
        told.append(f"{percent(data['test_overlap'])} of held-out rows also stand in training")
    return f"<footer>{html.escape(' · '.join(told))}</footer>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>"


def _scroll(table: str) -> str:
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _document(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)} · fedpeft</title>\n"
        f'<link rel="icon" href="data:,">\n<style>{STYLESHEET}</style>\n'
        f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _encoded(text: str) -> bytes:
    return text.encode(errors="replace")


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's own name, or its whole path where two share a name."""
    short = [folder.resolve().name for folder in folders]
    if len(set(short)) == len(short):
        return short
    return [f"{folder} ({number})" for number, folder in enumerate(folders, start=1)]


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
