"""The server of a Flower federation: what `flwr run` starts."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeft.codecs import dense
from fedpeft.config import RunConfig, load
from fedpeft.config.observation import ObservationConfig
from fedpeft.engines.flower_answers import answers_over
from fedpeft.engines.flower_grid import GridTransport
from fedpeft.engines.flower_guard import guard
from fedpeft.errors import ConfigError, FedPeftError, sentence
from fedpeft.experiment import adapted_model, resolve, strategy_of
from fedpeft.federate import federate
from fedpeft.logs import speak_through
from fedpeft.runs import RunFolder, folder_for, reopen
from fedpeft.skew import Installation

_MOST_ADAPTERS = 2
"""An answer is an adapter's change and at most a control variate as large."""

_logger = logging.getLogger(__name__)


def server_app(root: Path) -> ServerApp:
    """A Flower server that federates as the settings file says; `root` is the folder of the app.

    Flower's run-config gives `config` (a file in `root`), `set` (space-separated overrides), `out` (the run
    folder; where relative, from the folder in which the SuperLink was started) and `resume` (a run folder).
    A mistake ends the run as failed, with one sentence in its log.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        speak_through(logging.getLogger("flwr"))
        try:
            _serve(grid, context.run_config, root)
        except FedPeftError as error:
            raise error.with_traceback(None) from None

    return app


def planned(asked: Mapping[str, Any], root: Path) -> tuple[RunFolder, RunConfig, bool]:
    """The run folder, the resolved settings, and whether an earlier run goes on, as the run-config asks.

    Raises:
        FedPeftError: the settings, the data or the run folder cannot be used.
    """
    texts = {key: str(asked.get(key, "")) for key in ("config", "set", "out", "resume")}
    try:
        overrides = shlex.split(texts["set"])
    except ValueError as error:
        raise ConfigError(
            sentence("run-config, set", expected="key=value ...", found=repr(texts["set"]), remedy="close the quotes")
        ) from error
    if texts["resume"]:
        folder, config = reopen(Path(texts["resume"]), overrides)
        return folder, config, True
    out = [f"out={texts['out']}"] if texts["out"] else []
    config = resolve(load(root / texts["config"], [*overrides, *out]))
    folder = folder_for(config)
    return folder, replace(config, out=str(folder.root)), False


def _serve(grid: Grid, asked: Mapping[str, Any], root: Path) -> None:
    folder, config, resume = planned(asked, root)
    speak_through(logging.getLogger("flwr"), config.observation.log_format)
    _logger.info("the run folder is %s", folder.root)
    spec = adapted_model(config).spec
    most_bytes = _MOST_ADAPTERS * max(dense().size(spec), strategy_of(config).codec.size(spec))
    guard(most_bytes)
    server = Installation(base=spec.base_model, adapter=spec.digest)
    sent, answers = replace(config, observation=ObservationConfig()), answers_over(grid, most_bytes)
    transport = GridTransport(grid, sent, server=server, answers=answers)
    transport.wait_for(config.federation.clients, config.federation.deadline_seconds)
    federate(config, folder, transport, engine="flower", resume=resume, refused=transport.refused)
