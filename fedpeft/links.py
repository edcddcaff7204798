"""How long bytes take over a link, and what energy: figures of a model, none of them measured in a run.

A transfer takes its bits over the bandwidth of their direction, and a round trip for each exchange; nothing is lost,
nothing is sent twice, and sites do not share a link. Energy is that of the bytes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_BITS = 8
_MEGA, _MILLI, _MICRO = 1e6, 1e-3, 1e-6
_FIELDS = 5


class Link(NamedTuple):
    """A site's line to the server: bandwidths in bits a second, a round trip in seconds, energies in joules a byte."""

    down_bits_per_second: float
    up_bits_per_second: float
    round_trip_seconds: float
    down_joules_per_byte: float
    up_joules_per_byte: float


class Transfer(NamedTuple):
    """Bytes to one site and back."""

    down_bytes: float
    up_bytes: float


def transfer_seconds(link: Link, transfer: Transfer, exchanges: int) -> float:
    """How long one site's bytes are under way in `exchanges` requests with their answers."""
    down = _BITS * transfer.down_bytes / link.down_bits_per_second
    up = _BITS * transfer.up_bytes / link.up_bits_per_second
    return down + up + exchanges * link.round_trip_seconds


def round_seconds(link: Link, transfers: Iterable[Transfer], exchanges: int) -> float:
    """How long a round's bytes are under way: as long as those of its slowest site; 0 where there is none."""
    return max((transfer_seconds(link, transfer, exchanges) for transfer in transfers), default=0.0)


def joules(link: Link, transfer: Transfer) -> float:
    """The energy that these bytes take, of one site or of many."""
    return transfer.down_bytes * link.down_joules_per_byte + transfer.up_bytes * link.up_joules_per_byte


def radio(down_bits_per_second: float, up_bits_per_second: float, round_trip_seconds: float) -> Link:
    """A phone's LTE line, whose modem draws α watts for each bit a second beside a base of β while it is on.

    A byte thus takes 8 (α + β / throughput): the energy of the phone alone, without base station and network.

    Source: Huang et al. 2012, "A Close Examination of Performance and Power Characteristics of 4G LTE Networks"
    (MobiSys), table 4: α is 51.97 mW per Mbit/s down and 438.39 up, β is 1288.04 mW.
    """
    base = 1.28804
    down = _BITS * (51.97e-9 + base / down_bits_per_second)
    up = _BITS * (438.39e-9 + base / up_bits_per_second)
    return Link(down_bits_per_second, up_bits_per_second, round_trip_seconds, down, up)


LINKS: Mapping[str, Link] = {
    "LTE": radio(13e6, 6e6, 0.07),
    "home": Link(100e6, 20e6, 0.02, 2.16e-4, 2.16e-4),
    "data centre": Link(10e9, 10e9, 5e-4, 3.68e-6, 3.68e-6),
}
"""The links that every report knows, by name.

LTE: medians of 13 Mbit/s down, 6 Mbit/s up and a round trip of 70 ms, and the phone's own energy: see `radio`.

home: 100 Mbit/s down and 20 up, the benchmark of fixed broadband in the FCC's 2024 Section 706 Report (FCC 24-27); a
round trip of 20 ms, of the order that its Measuring Broadband America reports find for cable; 0.06 kWh/GB = 2.16e-4 J a
byte for access and core networks in 2015, by Aslan et al. 2018, "Electricity Intensity of Internet Data Transmission:
Untangling the Estimates", which finds that it halves every two years, so that this is an upper bound now.

data centre: 10 Gbit/s (IEEE 802.3ae); a round trip of 0.5 ms (Dean 2009, "Designs, Lessons and Advice from Building
Large Distributed Systems", slide "Numbers everyone should know"); 0.46 µJ a bit for transport in a private cloud
(Baliga et al. 2011, "Green Cloud Computing: Balancing Energy in Processing, Storage, and Transport").

Energies are of unlike things (a phone's modem, public networks, switches), so compare them down a column of runs and
not across links.
"""


def parsed(text: str) -> tuple[str, Link] | None:
    """The name and the link in `NAME = DOWN UP ROUND_TRIP DOWN_ENERGY UP_ENERGY`; None where it is none.

    Bandwidths are in Mbit/s and above 0, the round trip in ms, energies in µJ a byte.
    """
    name, _, rest = text.partition("=")
    try:
        numbers = [float(item) for item in rest.split()]
    except ValueError:
        return None
    if not name.strip() or len(numbers) != _FIELDS or not all(math.isfinite(n) and n >= 0 for n in numbers):
        return None
    down, up, trip, down_energy, up_energy = numbers
    if not down or not up:
        return None
    return name.strip(), Link(_MEGA * down, _MEGA * up, _MILLI * trip, _MICRO * down_energy, _MICRO * up_energy)


def known(texts: Iterable[str]) -> dict[str, Link]:
    """`LINKS`, and those that are written in `texts`, of which one of the same name takes its place."""
    return {**LINKS, **dict(found for found in map(parsed, texts) if found)}
