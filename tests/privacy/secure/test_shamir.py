from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import FederationError
from fedpeft.privacy.secure.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, evaluate, interpolate, join, split

SMALL = 7


@given(st.binary(min_size=32, max_size=32), st.data())
@settings(max_examples=30)
def test_any_holders_as_many_as_the_threshold_rebuild_the_secret(secret: bytes, data: st.DataObject) -> None:
    holders = data.draw(st.lists(st.integers(0, 2**32 - 2), min_size=2, max_size=9, unique=True))
    threshold = data.draw(st.integers(2, len(holders)))
    shares = split(secret, threshold, holders, data.draw(st.randoms(use_true_random=False)).randbytes)
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    some = data.draw(st.permutations(holders))[:threshold]
    assert join({holder: shares[holder] for holder in some}, threshold) == secret
    assert join(shares, threshold) == secret


def shares_seen(secret: int, seen: tuple[int, int]) -> Counter[tuple[int, ...]]:
    """How often two of four holders see which shares, over every polynomial of degree 2 modulo 7."""

    def entropy_of(coefficients: tuple[int, int]):  # type: ignore[no-untyped-def]
        left = list(coefficients)
        return lambda count: bytes([left.pop(0) << 5])

    found: Counter[tuple[int, ...]] = Counter()
    for coefficients in product(range(SMALL), repeat=2):
        shares = evaluate(secret, 3, (1, 2, 3, 4), entropy_of(coefficients), SMALL)
        found[shares[seen[0]], shares[seen[1]]] += 1
    return found


def test_fewer_shares_than_the_threshold_are_the_same_in_law_whatever_the_secret() -> None:
    # Exhaustive over a small field: every pair of shares comes once for each secret, so it says nothing of it.
    for seen in combinations(range(4), 2):
        for secret in range(SMALL):
            assert shares_seen(secret, seen) == Counter(dict.fromkeys(product(range(SMALL), repeat=2), 1))


def test_shares_as_many_as_the_threshold_determine_the_secret() -> None:
    # 3 + 2 x + x² modulo 7 at 1, 2, 3 is 6, 4, 4.
    assert interpolate((1, 2, 3), (6, 4, 4), SMALL) == 3


def test_coefficients_come_from_the_entropy_alone_and_cover_the_field() -> None:
    drawn = iter([b"\xff" * 33, b"\x00" * 33, (5 << 7).to_bytes(33, "little")])
    # 257 bits are drawn; 2^257 − 1 is no element of the field, so it is drawn again.
    assert evaluate(1, 3, [1, 2], lambda count: next(drawn)) == [1 + 5, 1 + 4 * 5]


def test_too_few_shares_are_refused() -> None:
    shares = split(bytes(32), 3, range(5), lambda count: b"\x01" * count)
    with pytest.raises(FederationError, match=r"expected 3 shares, .* found 2"):
        join({0: shares[0], 4: shares[4]}, 3)


def test_a_share_that_is_no_element_of_the_field_is_refused() -> None:
    shares = split(bytes(32), 2, range(2), lambda count: b"\x01" * count)
    with pytest.raises(FederationError, match="below the field's prime"):
        join({**shares, 0: PRIME.to_bytes(SHARE_BYTES, "big")}, 2)


def test_shares_whose_secret_is_too_great_do_not_fit_together() -> None:
    element = (PRIME - 1).to_bytes(SHARE_BYTES, "big")
    with pytest.raises(FederationError, match="do not fit together"):
        join({0: element, 1: element}, 2)


def test_the_prime_is_the_least_above_every_secret() -> None:
    def probably_prime(number: int) -> bool:
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
            power = pow(base, odd, number)
            if power not in (1, number - 1) and all(
                (power := power * power % number) != number - 1 for _ in range(twos - 1)
            ):
                return False
        return True

    top = 1 << (8 * SECRET_BYTES)
    assert probably_prime(PRIME)
    assert not any(probably_prime(number) for number in range(top + 1, PRIME, 2))
