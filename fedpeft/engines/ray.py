"""A simulation on Flower's Ray engine: clients train in Ray actors, on this machine or on a running cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError, FederationError, sentence
from fedpeft.experiment import adapted_model
from fedpeft.skew import Installation
from fedpeft.wire import Transport

if TYPE_CHECKING:
    from fedpeft.engines.flower_grid import GridTransport

T = TypeVar("T")

_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_OBJECT_STORE_BYTES = 512 * 2**20
_POLL_SECONDS = 0.2
_PROBE_SECONDS = 10.0


def simulate_on_ray(config: RunConfig, run_server: Callable[[Transport], T]) -> T:
    """What `run_server` returns; it runs in the calling thread, over a transport to clients in Ray actors.

    `config` must be resolved. Each actor loads the base model once. `compute.cpus_per_client` and
    `compute.gpus_per_client` bound how many clients train at once; `compute.ray_address` names a running
    cluster, on whose machines fedpeft is installed and the run folder is at the same path.

    Raises:
        ConfigError: Ray is not installed, or no machine can hold one client.
        FederationError: Ray cannot be started or reached, or it ended before `run_server`.
        FedPeftError: whatever `run_server` raises.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            sentence("--engine ray", expected="Ray", found="none", remedy="pip install 'fedpeft[simulation]'")
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    absolute = replace(config, out=str(Path(config.out or Path("runs") / config.name).absolute()))
    # Flower reads its telemetry switch when it is imported, and takes a second that other engines need not wait.
    from fedpeft.engines.flower_grid import GridTransport

    with _quiet(), _ray(config):
        return _serve(absolute, run_server, GridTransport)


def _serve(config: RunConfig, run_server: Callable[[Transport], T], over: Callable[..., GridTransport]) -> T:
    grids: queue.Queue[Any] = queue.Queue()
    failures: list[BaseException] = []
    done = threading.Event()

    def simulate() -> None:
        try:
            _run_simulation(config, grids, done)
        except BaseException as error:  # whatever it is, the thread that waits must hear of it
            failures.append(error)

    def check() -> None:
        if failures:
            raise FederationError(_ended(failures[0]))

    spec = adapted_model(config).spec
    server = Installation(base=spec.base_model, adapter=spec.digest)
    thread = threading.Thread(target=simulate, name="flower-simulation", daemon=True)
    thread.start()
    try:
        transport = over(_first(grids, check), config, check, server)
        transport.wait_for(config.federation.clients, config.federation.deadline_seconds)
        return run_server(transport)
    finally:
        done.set()
        thread.join()


def _run_simulation(config: RunConfig, grids: queue.Queue[Any], done: threading.Event) -> None:
    """Flower's simulation runs until `done`; its grid has been put into `grids`."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from fedpeft.engines.flower_client import client_app

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001
        grids.put(grid)
        done.wait()

    compute = config.compute
    resources: dict[str, Any] = {"num_cpus": compute.cpus_per_client, "num_gpus": compute.gpus_per_client}
    run_simulation(server, client_app(), config.federation.clients, backend_config={"client_resources": resources})


def _first(grids: queue.Queue[Any], check: Callable[[], None]) -> Any:
    while True:
        check()
        with contextlib.suppress(queue.Empty):
            return grids.get(timeout=_POLL_SECONDS)


@contextlib.contextmanager
def _ray(config: RunConfig) -> Iterator[None]:
    """Ray is up inside, with room for one client or more, and shut down after."""
    import ray

    try:
        _require_room(config, _start(config))
        yield
    finally:
        ray.shutdown()


def _start(config: RunConfig) -> list[dict[str, Any]]:
    """The machines of the cluster that the settings name, or of one started here."""
    import ray

    address = config.compute.ray_address or os.environ.get("RAY_ADDRESS", "")
    here = {
        "address": "local",
        "num_cpus": os.cpu_count() or 1,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    where: dict[str, Any] = {"address": address} if address else here
    try:
        _require_listener(address)
        if not ray.is_initialized():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **where)
        machines: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise FederationError(
            sentence(
                f"Ray at {address or 'this machine'}",
                expected="a cluster that can be used",
                found=" ".join(str(error).split())[:300],
                remedy="run `ray status` there, and correct compute.ray_address",
            )
        ) from error
    return machines


def _require_listener(address: str) -> None:
    """Raises OSError or ValueError unless somebody listens at a `host:port`: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "://" not in address:
        socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS).close()


def _require_room(config: RunConfig, nodes: list[dict[str, Any]]) -> None:
    """Raises ConfigError unless one of Ray's nodes can hold a client."""
    asked = {"CPU": config.compute.cpus_per_client, "GPU": config.compute.gpus_per_client}
    held = [node.get("Resources", {}) for node in nodes]
    if not any(all(have.get(kind, 0) >= number for kind, number in asked.items()) for have in held):
        most = {kind: max((have.get(kind, 0) for have in held), default=0) for kind in asked}
        raise ConfigError(
            sentence(
                "compute.cpus_per_client, compute.gpus_per_client",
                expected=f"at most {most['CPU']:g} CPUs and {most['GPU']:g} GPUs, which a machine here has",
                found=f"{asked['CPU']:g} and {asked['GPU']:g}",
                remedy="ask for less, or give Ray more machines",
            )
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Flower logs only errors inside."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _ended(error: BaseException) -> str:
    return sentence(
        "Ray simulation",
        expected="clients until the run is over",
        found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        remedy="see what Ray's logs say and run again with --resume",
    )
