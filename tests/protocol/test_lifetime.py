"""How long a message lives and is worked on, whatever number the server sends."""

from __future__ import annotations

import math

from fedslm.protocol.lifetime import work_seconds


def test_how_long_a_message_is_worked_on() -> None:
    """A worker is waited for as long as the server says, but a day at most, whatever number that is."""
    for ttl in (math.nan, math.inf, 1e300, 10**300):
        assert work_seconds(ttl) == 86_400.0
    assert (work_seconds(-1.0), work_seconds(-math.inf), work_seconds(60.0)) == (
        0.0,
        86_400.0,
        60.0,
    )
