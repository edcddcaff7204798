"""Runs whose server sees sums alone, over a transport that notes what it is told and loses answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedpeft.config import RunConfig
from fedpeft.engines.local import LocalTransport
from fedpeft.experiment import site_of
from fedpeft.federate import federate
from fedpeft.memory import FolderMemory
from fedpeft.runs import folder_for
from fedpeft.wire import Failure, Packet

SECURE = (
    "federation.clients=5",
    "federation.cohort=5",
    "federation.channel.kind=secure",
    "aggregation.merge.rule=ffa_lora",
    "aggregation.merge.ffa_lora.weights=uniform",
)


@dataclass
class Watched:
    """A transport that notes what the server is told, and loses the answers of `silent` from their phase on."""

    inner: LocalTransport
    silent: Mapping[int, str] = field(default_factory=dict)
    heard: list[tuple[int, Packet]] = field(default_factory=list)
    altered: Callable[[int, Packet], Packet] = lambda partition, packet: packet
    gone: set[int] = field(default_factory=set)

    def partitions(self) -> tuple[int, ...]:
        return self.inner.partitions()

    def exchange(
        self, requests: Mapping[int, Packet], timeout_seconds: float
    ) -> Iterator[tuple[int, Packet | Failure]]:
        asked = {partition: self.altered(partition, packet) for partition, packet in requests.items()}
        for partition, reply in self.inner.exchange(asked, timeout_seconds):
            phase = asked[partition].manifest.get("phase", "keys")
            if self.silent.get(partition) == phase:
                self.gone.add(partition)
            if partition in self.gone:
                yield partition, Failure("no answer within the deadline")
                continue
            if isinstance(reply, Packet):
                self.heard.append((partition, reply))
            yield partition, reply

    def late(self) -> Iterator[tuple[int, Packet | Failure]]:
        return iter(())


def run(config: RunConfig, **more: Any) -> tuple[list[dict[str, Any]], Watched]:
    folder = folder_for(config)
    clients = config.federation.clients
    inner = LocalTransport(clients, lambda p: site_of(config, p), FolderMemory(folder.root / "memories"))
    watched = Watched(inner, **more)
    return federate(config, folder, watched, engine="local"), watched


def weights(root: Path) -> dict[str, np.ndarray]:
    return load_file(root / "adapter" / "adapter_model.safetensors")


def rounds_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["event"] == "round"]
