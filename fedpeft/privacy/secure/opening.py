"""How the server takes off the masks that are left in a sum, from the shares that clients opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedpeft.errors import FederationError, QuorumError, sentence
from fedpeft.privacy.secure import keys, masks, shamir, statements
from fedpeft.privacy.secure.messages import Entry
from fedpeft.privacy.secure.terms import Terms

Shares = Mapping[int, Mapping[int, bytes]]
"""Something for each holder, by owner and then by holder."""


class Parties(NamedTuple):
    """Who took part in a sum: the roster, who chose whom to hold shares, who survived and who dropped."""

    terms: Terms
    roster: bytes
    entries: Mapping[int, Entry]
    chosen: Shares
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]


def masks_left(parties: Parties, seeds: Shares, masking: Shares) -> np.ndarray:
    """What the survivors' masks sum to: each one's own, and those that it shares with a neighbour that dropped.

    Time is linear in the survivors and in the pairs of a survivor and one that dropped.

    Raises:
        QuorumError: of some client fewer shares than the threshold.
        FederationError: shares that do not fit together, or give a key that is not the client's.
    """
    terms, context = parties.terms, statements.context(parties.terms, parties.roster)
    added = [keys.self_mask_key(_rebuilt(terms, owner, seeds, "seed"), context, owner) for owner in parties.survivors]
    taken: list[bytes] = []
    for gone in parties.dropped:
        neighbours = [one for one in parties.survivors if one in parties.chosen[gone] or gone in parties.chosen[one]]
        secret = _rebuilt(terms, gone, masking, "mask key") if neighbours else b""
        if secret and keys.public_of(secret) != parties.entries[gone].masking:
            raise _wrong(terms, f"shares of partition {gone}'s mask key", "shares that give another key")
        for one in neighbours:
            key = keys.mask_key(secret, parties.entries[one].masking, context, one, gone)
            (added if one < gone else taken).append(key)
    return masks.summed(terms.words, terms.width, added, taken)


def counted(terms: Terms, residues: np.ndarray, inputs: int) -> np.ndarray:
    """The sums that residues modulo 2^width stand for, int64, once their tally has said that there are `inputs`.

    Raises:
        FederationError: it says something else, so a mask is left in the sum.
    """
    if not (residues[terms.length :] == inputs % 2**terms.width).all():
        raise _wrong(terms, f"a tally of {inputs} inputs", "another: some share was wrong, or a client masked wrongly")
    half, whole = np.int64(1 << (terms.width - 1)), np.int64(1 << terms.width)
    found = residues[: terms.length].astype(np.int64)
    found[found >= half] -= whole
    return found


def _rebuilt(terms: Terms, owner: int, shares: Shares, what: str) -> bytes:
    held = shares.get(owner, {})
    if len(held) < terms.threshold:
        place, expected = (
            f"secure sum of round {terms.round}",
            f"{terms.threshold} shares of partition {owner}'s {what}",
        )
        remedy = "run the round again with more clients, or with terms that let more of them fall silent"
        raise QuorumError(sentence(place, expected=expected, found=len(held), remedy=remedy))
    return shamir.join(held, terms.threshold)


def _wrong(terms: Terms, expected: str, found: str) -> FederationError:
    place, remedy = f"secure sum of round {terms.round}", "run the round again, without clients that send wrong shares"
    return FederationError(sentence(place, expected=expected, found=found, remedy=remedy))
