"""How `fedpeft watch` shows a run: a picture for a terminal, plain lines for a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fedpeft.report.metrics import metric
from fedpeft.report.units import NOTHING, human_bytes, human_seconds
from fedpeft.watching import Status
from fedpeft.watching.status import Node, Series, Trouble

_BARS = "▁▂▃▄▅▆▇█"
_WIDE = 100
_STATES = {"running": "bold green", "ended": "bold cyan", "failed": "bold red", "not begun": "bold yellow"}
_PHASES = (("train", "blue"), ("wait", "cyan"), ("merge", "magenta"), ("evaluate", "yellow"))
_MOST_NODES, _MOST_TROUBLES, _MOST_GROUPS = 16, 6, 8
_HEADINGS = 18


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as bars from the least to the greatest, the newest at the right; where there are too many, means."""
    if not values:
        return ""
    shown = [_bucket(values, at, min(width, len(values))) for at in range(min(width, len(values)))]
    least, greatest = min(shown), max(shown)
    span = greatest - least
    level = (len(_BARS) - 1) / span if span > 0 else 0.0
    return "".join(_BARS[round((value - least) * level)] if span > 0 else _BARS[3] for value in shown)


def picture(status: Status, silent_seconds: float, width: int, height: int) -> RenderableType:
    """The whole run for a terminal of `width` columns and `height` lines; the journal is `silent_seconds` old."""
    parts: list[RenderableType] = [_headline(status, silent_seconds), _progress(status, width)]
    if status.state == "failed":
        parts.append(Padding(Text(status.why, style="red", overflow="fold"), (0, 1)))
    figures, sites, failures = _lines_for(status, height)
    if status.figures:
        parts += [_heading("figures"), _figures(_chosen(status)[:figures], width)]
        parts += [_heading("pace of the last rounds"), _pace(status, width)]
    if status.nodes:
        told = f"{len(status.nodes)} of {status.clients} sites heard of"
        parts += [_heading(f"sites ({told})"), _nodes(status, sites, width)]
    if status.troubles:
        count = sum(trouble.count for trouble in status.troubles)
        parts += [_heading(f"failures ({count})"), _troubles(status.troubles, failures)]
    return Group(*parts)


def plain_lines(status: Status, silent_seconds: float) -> Iterator[str]:
    """The same in plain lines, each a `key: value`."""
    yield f"run: {status.name or NOTHING}, {_state_text(status, silent_seconds)}"
    if status.state == "not begun":
        return
    yield f"rounds: {status.round} of {status.rounds}, {_left(status)}"
    yield f"method: {status.family} on the {status.engine} engine"
    for series in _chosen(status):
        first, last, best = _first_last_best(series)
        yield f"{_title(series.name)}: {last} (first {first}, best {best})"
    yield f"pace: {'; '.join(f'{name} {value}' for name, value in _pace_pairs(status))}"
    for node in _by_trouble(status.nodes)[:_MOST_NODES]:
        yield f"site {node.partition}: {_node_text(node, status)}"
    if len(status.nodes) > _MOST_NODES:
        yield f"sites: {len(status.nodes) - _MOST_NODES} more"
    for trouble in status.troubles:
        times = f"{trouble.count} times, last in round {trouble.last_round}"
        yield f"failed: site {trouble.partition}, {times}: {trouble.words}"


def round_line(status: Status) -> str:
    """One line for the newest round, as a log that follows a run gets it."""
    figures = [f"{_title(series.name)} {_first_last_best(series)[1]}" for series in _chosen(status)[:2]]
    failed = sum(trouble.count for trouble in status.troubles)
    parts = [f"round {status.round} of {status.rounds}", *figures, f"{failed} failures so far", _left(status)]
    return "  ".join(part for part in parts if part)


def _headline(status: Status, silent_seconds: float) -> RenderableType:
    left = Text.assemble((status.name or "a run", "bold"), "  ", (status.state, _STATES[status.state]))
    if status.state == "ended" and status.why != "completed":
        left.append(f" ({status.why})")
    if _is_silent(status, silent_seconds):
        left.append(f"  no news for {human_seconds(silent_seconds)}: it may have stopped", style="bold yellow")
    method = " · ".join(part for part in (status.family, f"{status.engine} engine" if status.engine else "") if part)
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1)
    grid.add_column(justify="right")
    again = f" · resumed {status.resumed} ×" if status.resumed else ""
    grid.add_row(left, Text(method + again, style="dim"))
    return Padding(grid, (0, 1))


def _progress(status: Status, width: int) -> RenderableType:
    total = max(status.rounds, 1)
    grid = Table.grid(padding=(0, 2))
    bar = ProgressBar(
        total=total,
        completed=status.round,
        width=max(10, min(50, width - 58)),
        complete_style="green",
        finished_style="cyan",
    )
    grid.add_row(bar, Text(f"round {status.round} of {status.rounds or NOTHING}", style="bold"), Text(_left(status)))
    return Padding(grid, (0, 1))


def _lines_for(status: Status, height: int) -> tuple[int, int, int]:
    """How many lines figures, sites and failures get of a terminal of `height` lines."""
    room = height - _HEADINGS
    failures = min(len(status.troubles), _MOST_TROUBLES, max(1, room // 5))
    figures = min(len(_chosen(status)), max(2, room // 3))
    return figures, max(2, min(_MOST_NODES, room - figures - failures - 1)), failures


def _figures(chosen: Sequence[Series], width: int) -> RenderableType:
    table = _table()
    table.add_column("", style="bold", no_wrap=True, max_width=34)
    for name in ("now", "best", "first"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("by round", no_wrap=True, style="cyan", ratio=1)
    bars = max(8, min(48, width - 74))
    for series in chosen:
        first, last, best = _first_last_best(series)
        group = "groups/" in series.name
        title = f"  {series.name.split('/')[-2]}" if group else _title(series.name)
        style = "dim" if group else ""
        table.add_row(Text(title, style=style), Text(last, style="bold"), best, first, sparkline(series.values, bars))
    return table


def _pace(status: Status, width: int) -> RenderableType:
    cells = [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in _pace_pairs(status)]
    columns = len(cells) if width >= _WIDE else (len(cells) + 1) // 2
    grid = Table.grid(padding=(0, 3))
    for first in range(0, len(cells), columns):
        grid.add_row(*cells[first : first + columns])
    phases, total = _phases(status), sum(_phases(status).values())
    bar, legend = Text(), Text()
    longest = max(20, min(60, width - 6))
    for name, colour in _PHASES:
        if total > 0 and phases[name] > 0:
            bar.append("█" * max(1, round(longest * phases[name] / total)), style=colour)
        legend.append("■ ", style=colour)
        legend.append(f"{name} {human_seconds(phases[name])}   ")
    return Padding(Group(grid, bar, legend), (0, 1))


def _nodes(status: Status, room: int, width: int) -> RenderableType:
    table = _table()
    wide = ("rank", "examples", "seconds") if width >= _WIDE else ()
    for name in ("site", "last round", "updates", "loss", "failures", *wide):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    shown = _by_trouble(status.nodes)[:room]
    for node in shown:
        table.add_row(*_node_cells(node, status.round, wide=bool(wide)))
    if len(status.nodes) > len(shown):
        more = Text(f"… and {len(status.nodes) - len(shown)} more, with no more failures", style="dim")
        return Group(table, Padding(more, (0, 2)))
    return table


def _node_cells(node: Node, round_: int, *, wide: bool) -> list[RenderableType]:
    seen = "green" if node.last_round == round_ else "yellow" if node.failures else ""
    loss = NOTHING if node.loss is None else f"{node.loss:.3f}"
    more = [str(node.rank or NOTHING), f"{node.examples:,}", human_seconds(node.seconds)] if wide else []
    return [
        str(node.partition),
        Text(str(node.last_round or NOTHING), style=seen),
        str(node.updates),
        loss,
        Text(str(node.failures), style="red" if node.failures else "dim"),
        *more,
        Text(f"quarantined: {node.quarantined}" if node.quarantined else "", style="bold red"),
    ]


def _troubles(troubles: Sequence[Trouble], room: int) -> RenderableType:
    table = _table()
    table.add_column("site", justify="right", no_wrap=True)
    table.add_column("times", justify="right", no_wrap=True)
    table.add_column("last round", justify="right", no_wrap=True)
    table.add_column("what", no_wrap=True, style="red")
    table.add_column("in its words", no_wrap=True, overflow="ellipsis", ratio=1, style="dim")
    for trouble in troubles[:room]:
        last = str(trouble.last_round)
        table.add_row(str(trouble.partition), str(trouble.count), last, trouble.kind, Text(trouble.words))
    if len(troubles) > room:
        table.add_row("…", "", "", f"{len(troubles) - room} more", "")
    return table


def _table() -> Table:
    return Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 1), header_style="dim")


def _heading(text: str) -> RenderableType:
    return Padding(Rule(Text(text, style="bold"), align="left", style="dim"), (1, 0, 0, 0))


def _chosen(status: Status) -> list[Series]:
    """The figures that are shown: loss, the run's own figure and its groups, others held out, then the merge's."""
    own = f"held_out/{status.metric}"
    groups = [series for series in status.figures if _is_group_of(series.name, status.metric)][:_MOST_GROUPS]
    others = [series for series in status.figures if series.name != own and series.name.count("/") == 1]
    rest = [series for series in status.figures if "/" not in series.name and series.name != "loss"]
    first = [series for name in ("loss", own) if (series := status.series(name))]
    return [*first, *groups, *others[:3], *rest]


def _is_group_of(name: str, figure: str) -> bool:
    return name.startswith("held_out/groups/") and name.endswith(f"/{figure}")


def _title(name: str) -> str:
    if name == "loss":
        return "training loss"
    where, _, rest = name.partition("/")
    if not rest:
        return name.replace("_", " ")
    title = metric(name.split("/")[-1]).title
    group = f" of {name.split('/')[-2]}" if rest.startswith("groups/") else ""
    return f"{'held-out' if where == 'held_out' else 'on sites:'} {title}{group}"


def _first_last_best(series: Series) -> tuple[str, str, str]:
    name = series.name.split("/")[-1]
    told = metric(name if "/" in series.name else "")
    write = told.text if "/" in series.name else "{:.4g}".format
    rising = name != "loss" and told.share and "/" in series.name
    best = max(series.values) if rising else min(series.values)
    return write(series.values[0]), write(series.values[-1]), write(best)


def _phases(status: Status) -> dict[str, float]:
    """Seconds of a round that add up: what the slowest node trains, the rest of the exchange, merge and evaluation."""
    found = status.phases
    train = min(found.get("train", 0.0), found.get("exchange", 0.0))
    wait = found.get("exchange", 0.0) - train
    return {"train": train, "wait": wait, "merge": found.get("merge", 0.0), "evaluate": found.get("evaluate", 0.0)}


def _pace_pairs(status: Status) -> list[tuple[str, str]]:
    mean = status.round_seconds
    speed = status.examples_a_second
    moved = status.bytes_up + status.bytes_down
    return [
        ("a round", human_seconds(mean)),
        ("rounds/min", f"{60 / mean:.3g}" if mean else NOTHING),
        ("examples/s", f"{speed:.3g}" if speed else NOTHING),
        ("up", human_bytes(status.bytes_up)),
        ("down", human_bytes(status.bytes_down)),
        ("bytes a round", human_bytes(moved / status.round) if status.round else NOTHING),
    ]


def _left(status: Status) -> str:
    if status.seconds_left is None:
        return f"{human_seconds(status.seconds)} in all" if status.round else ""
    at = time.localtime(time.time() + status.seconds_left)
    clock = time.strftime("%H:%M" if status.seconds_left < 43200 else "%d %b %H:%M", at)
    return f"{human_seconds(status.seconds_left)} left, until about {clock}"


def _state_text(status: Status, silent_seconds: float) -> str:
    why = f" ({status.why})" if status.why else ""
    stale = f", no news for {human_seconds(silent_seconds)}" if _is_silent(status, silent_seconds) else ""
    return f"{status.state}{why}{stale}"


def _is_silent(status: Status, seconds: float) -> bool:
    """Whether a run that should go on has been silent for far longer than its rounds take."""
    return status.state == "running" and seconds > max(60.0, 5 * (status.round_seconds or 60.0))


def _by_trouble(nodes: Sequence[Node]) -> list[Node]:
    return sorted(nodes, key=lambda node: (not node.quarantined, -node.failures, node.partition))


def _node_text(node: Node, status: Status) -> str:
    seen = f"last in round {node.last_round} of {status.round}" if node.last_round else "never heard"
    parts = [seen, f"{node.updates} updates", f"{node.failures} failures"]
    return ", ".join([*parts, *([f"quarantined: {node.quarantined}"] if node.quarantined else [])])


def _bucket(values: Sequence[float], at: int, count: int) -> float:
    first, last = at * len(values) // count, (at + 1) * len(values) // count
    part = values[first:last]
    return sum(part) / len(part)
