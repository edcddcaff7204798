"""The newest figures of a run for Prometheus: a text file, and a page on the loopback interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prometheus_client

from fedpeft.config.observation import Prometheus
from fedpeft.logs import failure_kind
from fedpeft.sinks.figures import figures_of
from fedpeft.sinks.sink import About, Record, Sink

_LOOPBACK = "127.0.0.1"


def open_prometheus(settings: Prometheus, about: About) -> Sink:
    """A sink whose totals are those of the whole run, also where it is resumed: it begins with no round at all.

    Raises:
        OSError: the port is taken, or the file cannot be written.
    """
    registry = prometheus_client.CollectorRegistry()
    path = Path(settings.file) if settings.file else about.root / "metrics.prom"
    metrics = _Metrics(registry, about.name)
    metrics.planned(about.start)
    prometheus_client.write_to_textfile(str(path), registry)
    server = prometheus_client.start_http_server(settings.port, _LOOPBACK, registry) if settings.port else None

    def settled(record: Record) -> None:
        metrics.settled(record)
        if record["round"] >= about.done:
            prometheus_client.write_to_textfile(str(path), registry)

    def end(how: str) -> None:
        metrics.ended(how)
        prometheus_client.write_to_textfile(str(path), registry)
        if server is not None:
            server[0].shutdown()
            server[0].server_close()

    return Sink(0, settled, end)


class _Metrics:
    """Every metric, labelled by the run's name. Labels are few: a failure has one of the kinds that the log has."""

    def __init__(self, registry: prometheus_client.CollectorRegistry, name: str) -> None:
        self._run = name
        self._gauges = {
            key: prometheus_client.Gauge(f"fedpeft_{key}", text, ["run", *labels], registry=registry)
            for key, (text, labels) in _GAUGES.items()
        }
        self._counters = {
            key: prometheus_client.Counter(f"fedpeft_{key}", text, ["run", *labels], registry=registry)
            for key, (text, labels) in _COUNTERS.items()
        }

    def planned(self, start: Record) -> None:
        """The number of rounds is known; the run goes on."""
        self._set("rounds_planned", start["config"].get("rounds", 0))
        self._set("running", 1)
        for key in ("bytes", "rounds", "updates"):
            self._counters[key].labels(self._run, *(["up"] if key == "bytes" else [])).inc(0)

    def settled(self, record: Record) -> None:
        """One more round is in the figures."""
        self._set("round", record["round"])
        for direction in ("up", "down"):
            self._counters["bytes"].labels(self._run, direction).inc(record[f"bytes_{direction}"])
        self._counters["rounds"].labels(self._run).inc()
        self._counters["updates"].labels(self._run).inc(len(record["clients"]))
        for failure in record["failures"]:
            labels = (str(failure["partition"]), failure_kind(str(failure["reason"])))
            self._counters["failures"].labels(self._run, *labels).inc()
        for phase, seconds in record["seconds"].items():
            if phase != "nodes":
                self._counters["seconds"].labels(self._run, phase).inc(max(0.0, seconds or 0.0))
        for name, value in figures_of(record).items():
            self._figure(name.split("/"), value)

    def ended(self, how: str) -> None:
        """The run is over."""
        self._set("running", 0)
        self._set("failed", float(how == "failed"))

    def _set(self, key: str, value: Any, *labels: str) -> None:
        self._gauges[key].labels(self._run, *labels).set(value)

    def _figure(self, parts: list[str], value: float) -> None:
        if parts[0] in {"held_out", "on_clients"}:
            group = parts[2] if parts[1] == "groups" else ""
            self._set("score", value, parts[0], group, parts[-1])
        elif len(parts) == 1:
            self._set("figure", value, parts[0])


_GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "round": ("The last round that is settled", ()),
    "rounds_planned": ("How many rounds the settings ask for", ()),
    "running": ("1 while the run goes on", ()),
    "failed": ("1 where the run ended by a failure", ()),
    "score": ("Figures of the last evaluation, whole (group empty) and by group", ("where", "group", "figure")),
    "figure": ("Other figures of the last round, such as loss, drift and merge_error", ("figure",)),
}
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bytes": ("Bytes of packets, up to the server and down to nodes", ("direction",)),
    "rounds": ("Rounds that are settled", ()),
    "updates": ("Updates that were merged", ()),
    "failures": ("Replies that could not be used", ("partition", "kind")),
    "seconds": ("Seconds of the server by phase; total holds them all", ("phase",)),
}
