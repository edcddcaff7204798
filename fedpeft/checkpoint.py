"""The server's state on disk, whole or not at all.

`checkpoint/round-R.safetensors` holds the state after round R, `round-R.sha256` its digest, written after it:
a state without its digest was never finished and is passed over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fedpeft import quarantine
from fedpeft.adapters import AdapterState, spec_from_fields, spec_to_fields
from fedpeft.errors import CheckpointError, sentence
from fedpeft.files import encode_tensors, read_tensors, write_atomically
from fedpeft.privacy.ledger import expense_from_fields
from fedpeft.updates import Drift, Holding, Privacy, Sent, ServerState

KEPT_CHECKPOINTS = 2


def save(folder: Path, state: ServerState) -> None:
    """`folder` holds `state` as its newest checkpoint; all but the last two are removed.

    Raises:
        CheckpointError: the disk is full or not writable; the checkpoint before stays the newest.
    """
    tensors = {f"adapter/{key}": value for key, value in state.adapter.tensors.items()}
    tensors |= {f"residual/{key}": value for key, value in state.adapter.residual.items()}
    tensors |= {f"optimizer/{key}": value for key, value in state.optimizer.items()}
    tensors |= {f"control/{key}": value for key, value in state.control.items()}
    tensors |= {f"noise/{key}": value for key, value in state.privacy.noise.items()}
    tensors |= {f"sent/{key}": value for key, value in state.sent.tensors.items()}
    tensors |= {"sent-delta": np.frombuffer(state.sent.delta, np.uint8)} if state.sent.delta else {}
    fields = {
        "run": state.run,
        "round": state.round,
        "seed": state.seed,
        "progress": dict(state.progress),
        "spec": spec_to_fields(state.adapter.spec),
        "drift": {"epoch": state.drift.epoch, "ranks": [[r, list(ranks)] for r, ranks in state.drift.ranks.items()]},
        "conduct": quarantine.to_fields(state.conduct),
        "awaited": [list(item) for item in state.awaited.items()],
        "spent": [asdict(spent) for spent in state.privacy.history],
        "clip_norm": state.privacy.clip_norm,
        "holdings": [[partition, have.round, have.rank] for partition, have in state.holdings.items()],
    }
    data = encode_tensors(tensors, fields)
    path = folder / f"round-{state.round:06d}.safetensors"
    try:
        write_atomically(path, data, mode=0o600)
        write_atomically(path.with_suffix(".sha256"), hashlib.sha256(data).hexdigest().encode())
    except OSError as error:
        raise CheckpointError(
            sentence(
                str(path),
                expected=f"room for {len(data)} bytes",
                found=str(error),
                remedy="free disk space, then run again with --resume",
            )
        ) from error
    for old in _finished(folder)[:-KEPT_CHECKPOINTS]:
        old.with_suffix(".sha256").unlink(missing_ok=True)
        old.unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    """Whether `folder` holds a finished checkpoint."""
    return bool(_finished(folder))


def load(folder: Path) -> ServerState:
    """The newest state in `folder`.

    Raises:
        CheckpointError: there is none, or it is not what was written.
    """
    finished = _finished(folder)
    if not finished:
        raise CheckpointError(
            sentence(str(folder), expected="a finished checkpoint", found="none", remedy="start the run anew")
        )
    path = finished[-1]
    expected = path.with_suffix(".sha256").read_bytes().strip()
    found = hashlib.sha256(path.read_bytes()).hexdigest().encode()
    if found != expected:
        shown = expected[:12].decode(errors="backslashreplace")
        remedy = "delete the two files of that round to resume from the round before"
        raise CheckpointError(
            sentence(
                str(path), expected=f"SHA-256 {shown!r}…", found=f"{found[:12].decode()!r}… (corrupt)", remedy=remedy
            )
        )
    try:
        return _decoded(path)
    except (ValueError, KeyError, TypeError) as error:
        remedy = "resume with the version of fedpeft that wrote it"
        raise CheckpointError(
            sentence(str(path), expected="a state of this version", found=str(error), remedy=remedy)
        ) from error


def _decoded(path: Path) -> ServerState:
    tensors, fields = read_tensors(path)
    return ServerState(
        run=fields["run"],
        round=fields["round"],
        seed=fields["seed"],
        adapter=AdapterState(
            spec_from_fields(fields["spec"]), _below(tensors, "adapter/"), _below(tensors, "residual/")
        ),
        optimizer=_below(tensors, "optimizer/"),
        progress=fields["progress"],
        drift=Drift(fields["drift"]["epoch"], {r: tuple(ranks) for r, ranks in fields["drift"]["ranks"]}),
        holdings={partition: Holding(round_, rank) for partition, round_, rank in fields["holdings"]},
        control=_below(tensors, "control/"),
        conduct=quarantine.from_fields(fields.get("conduct", [])),
        awaited=dict(fields.get("awaited", [])),
        privacy=Privacy(
            tuple(expense_from_fields(spent) for spent in fields.get("spent", [])),
            fields.get("clip_norm", 0.0),
            _below(tensors, "noise/"),
        ),
        sent=Sent(_below(tensors, "sent/"), tensors["sent-delta"].tobytes() if "sent-delta" in tensors else b""),
    )


def _finished(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("round-*.safetensors") if path.with_suffix(".sha256").exists())


def _below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
