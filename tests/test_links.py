"""What bytes take on a link, against figures by hand."""

from __future__ import annotations

import pytest

from fedpeft.links import LINKS, Link, Transfer, joules, known, parsed, radio, round_seconds, transfer_seconds

# 8 Mbit/s down is 1 MB/s, 1.6 Mbit/s up is 0.2 MB/s.
LINE = Link(8e6, 1.6e6, 0.5, 1e-6, 3e-6)


def test_a_transfer_takes_its_bits_each_way_and_a_round_trip_for_each_exchange() -> None:
    assert transfer_seconds(LINE, Transfer(2e6, 1e6), 1) == pytest.approx(2 + 5 + 0.5)
    assert transfer_seconds(LINE, Transfer(2e6, 1e6), 5) == pytest.approx(2 + 5 + 2.5)


def test_a_round_takes_as_long_as_its_slowest_site() -> None:
    assert round_seconds(LINE, [Transfer(2e6, 0), Transfer(0, 1e6)], 2) == pytest.approx(5 + 1)
    assert round_seconds(LINE, [], 2) == 0


def test_energy_is_that_of_all_bytes_each_way() -> None:
    assert joules(LINE, Transfer(2e6, 1e6)) == pytest.approx(2 + 3)


def test_a_radio_takes_more_energy_for_a_byte_the_slower_it_is() -> None:
    # At 10 Mbit/s down: 51.97 + 128.804 nJ a bit, eight times that a byte; at 5 Mbit/s up: 438.39 + 257.608.
    line = radio(10e6, 5e6, 0.07)
    assert line.down_joules_per_byte == pytest.approx(8 * 180.774e-9)
    assert line.up_joules_per_byte == pytest.approx(8 * 695.998e-9)


def test_the_home_link_takes_six_hundredths_of_a_kilowatt_hour_for_a_gigabyte() -> None:
    assert joules(LINKS["home"], Transfer(5e8, 5e8)) == pytest.approx(0.06 * 3.6e6)


def test_a_link_is_read_in_the_units_that_people_use() -> None:
    name, link = parsed(" ship = 4 1 600 50 80") or ("", LINE)
    assert name == "ship"
    assert link == pytest.approx((4e6, 1e6, 0.6, 5e-5, 8e-5))


@pytest.mark.parametrize(
    "text", ["", "ship", "= 1 1 1 1 1", "a = 1 1 1 1", "a = 0 1 1 1 1", "a = 1 1 1 nan 1", "a = x"]
)
def test_what_is_no_link_is_none(text: str) -> None:
    assert parsed(text) is None


def test_a_link_of_ones_own_stands_beside_the_others_or_takes_the_place_of_its_name() -> None:
    found = known(["ship = 4 1 600 50 80", "LTE = 1 1 0 0 0"])
    assert list(found) == [*LINKS, "ship"]
    assert found["LTE"] == (1e6, 1e6, 0, 0, 0)
