from __future__ import annotations

import pytest

from fedpeft.engines.flower_node import MOST_POLL_SECONDS, POLL_SECONDS, pause_after


@pytest.mark.parametrize(("waited", "pause"), [(0.0, POLL_SECONDS), (10.0, 1.0), (3600.0, MOST_POLL_SECONDS)])
def test_a_node_asks_less_often_the_longer_it_has_waited(waited: float, pause: float) -> None:
    assert pause_after(waited) == pause
