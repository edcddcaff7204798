"""The ledger: paid before released, whole or not at all, and never paid back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft import checkpoint
from fedpeft.errors import CheckpointError
from fedpeft.privacy import ledger
from fedpeft.updates import Privacy, Spent
from tests.toys import state

SPENT = Spent(1, "poisson", 10, 0.5, 1.25, 2)
NEXT = replace(SPENT, round=2)


def test_what_is_paid_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "privacy.jsonl"
    assert ledger.paid(path, ()) == ()
    for spent in (SPENT, NEXT, NEXT):
        ledger.pay(path, spent)
    assert ledger.paid(path, (SPENT,)) == (SPENT, NEXT, NEXT)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_line_that_a_kill_tore_was_not_paid(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    ledger.pay(path, SPENT)
    with path.open("ab") as file:
        file.write(b'{"round":2,')
    assert ledger.paid(path, (SPENT,)) == (SPENT,)
    ledger.pay(path, NEXT)
    assert ledger.paid(path, ()) == (SPENT, NEXT)


def test_a_ledger_that_lacks_what_the_checkpoint_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    with pytest.raises(CheckpointError, match="expected the expense of round 1"):
        ledger.paid(path, (SPENT,))
    ledger.pay(path, SPENT)
    with pytest.raises(CheckpointError, match="expected the expense of round 1"):
        ledger.paid(path, (SPENT, SPENT))
    path.write_bytes(b"{}\n")
    with pytest.raises(CheckpointError, match="expected one expense in each line"):
        ledger.paid(path, ())


def test_a_checkpoint_holds_what_was_spent_and_what_the_mechanism_goes_on_with(tmp_path: Path) -> None:
    privacy = Privacy((SPENT, NEXT), 0.7, {"0/head.weight": state().adapter.tensors["head.weight"].astype("float64")})
    checkpoint.save(tmp_path, state(privacy=privacy))
    found = checkpoint.load(tmp_path).privacy
    assert (found.history, found.clip_norm) == (privacy.history, 0.7)
    assert found.noise["0/head.weight"].dtype == "float64"
    assert found.noise.keys() == privacy.noise.keys()
