"""`fedpeft export`."""

from __future__ import annotations

from pathlib import Path

import typer

from fedpeft import checkpoint
from fedpeft.errors import RunFolderError, sentence
from fedpeft.experiment import adapted_model, strategy_of
from fedpeft.models import save_adapter, save_merged
from fedpeft.runs import reopen, write_folder


def run_export(run: Path, out: Path, *, merged: bool) -> None:
    """`out` holds the newest adapter of the run, or the base with it merged in.

    Raises:
        RunFolderError: there is no such run, or `out` is in the way.
        ModelError: the adapter cannot be merged.
    """
    folder, config = reopen(run, [])
    if out.exists():
        raise RunFolderError(sentence(str(out), expected="no such folder yet", found="one", remedy="choose another"))
    state = checkpoint.load(folder.checkpoint)
    adapter = strategy_of(config).finalize(state)
    adapted = adapted_model(config)
    save = save_merged if merged else save_adapter
    write_folder(out.absolute(), lambda scratch: save(adapted, adapter, scratch))
    typer.echo(f"written: {out} ({'merged model' if merged else 'adapter'} after round {state.round})")
