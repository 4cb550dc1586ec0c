"""How servers and nodes hear that they should stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from fedslm.cli.server import until_stopped


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Leaves the handlers of this process as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_wait_stops(number: signal.Signals) -> None:
    """A node hung at its second SIGTERM, which came while the first one held the event's lock."""
    stop = until_stopped()
    with stop._cond:  # type: ignore[attr-defined]  # as Event.wait and Event.set hold it
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert not stop.is_set()
    assert stop.wait(30)


@pytest.mark.timeout(120)
def test_any_number_of_signals_is_heard() -> None:
    """Also more than a pipe holds."""
    stop = until_stopped()
    for _ in range(70_000):
        signal.raise_signal(signal.SIGTERM)
    assert stop.wait(30)
