"""Calls to a grid with a time limit: a failed call is retried for a while, and never for longer."""

from __future__ import annotations

import copy
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from flwr.serverapp import Grid

from fedslm.errors import Unanswered

logger = logging.getLogger(__name__)
_SHORTEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.25, 5.0
_SHORTEST_CALL_SECONDS, _LONGEST_CALL_SECONDS = 1.0, 30.0
_SERVER_ERROR, _UNAUTHORIZED, _FORBIDDEN = 500, 401, 403
T = TypeVar("T")


class Steady:
    """A grid whose calls survive a restart of the SuperLink.

    Flower's own grid retries a call for ever if the connection fails, and ends the run at any other
    error of the SuperLink. Here both are retried until a time that the caller gives. Any other grid is
    called once: its failures are not network failures.

    Args:
        grid: The grid that connects the nodes.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._once = _without_retries(grid)
        self._is_down = False

    @property
    def is_remote(self) -> bool:
        """True if the grid is a SuperLink reached over HTTP."""
        return self._once is not None

    def call(self, what: Callable[[Any], T], until: float) -> T:
        """Calls a grid, repeatedly while the SuperLink is away or answers with a 5xx.

        A SuperLink that ends the run (401, 403) is handled as in Flower: the first 401 interrupts the
        process.

        Args:
            what: Called with the grid; may be repeated.
            until: When to give up, by ``time.monotonic``; at least one call is made.

        Returns:
            The return value of ``what``.

        Raises:
            Unanswered: There was no answer until then.
            RunNotRunningException: The run is over; it was stopped.
        """
        if self._once is None:
            return what(self.grid)
        wait_seconds = _SHORTEST_WAIT_SECONDS
        while True:
            _limit(self._once, until - time.monotonic())
            try:
                result = what(self._once)
            except Exception as error:  # _is_passing decides: other errors are raised
                if _ends_the_run(error):
                    return self._obeyed(what)
                if not _is_passing(error):
                    raise
                if time.monotonic() >= until:
                    raise Unanswered(f"the SuperLink does not answer: {error}") from error
                self._note(error)
            else:
                self._is_down = False
                return result
            time.sleep(max(0.0, min(wait_seconds, until - time.monotonic())))
            wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)

    def _obeyed(self, what: Callable[[Any], T]) -> T:
        """Calls Flower's own grid, which ends a run; the same error in other threads is raised too."""
        from flwr.supercore.run import RunNotRunningException

        try:
            return what(self.grid)
        except Exception as error:
            if _ends_the_run(error):  # another thread got the error first, and interrupts the process
                raise RunNotRunningException from error
            raise

    def _note(self, error: Exception) -> None:
        """Logs the first failure of an outage."""
        if not self._is_down:
            logger.warning("the SuperLink does not answer; a call is tried again: %s", error)
        self._is_down = True


def _without_retries(grid: Grid) -> Any:
    """A second connection of Flower's own grid, without retries; None for other grids.

    If Flower's module was never imported, no such grid exists: a simulation need not import Flower's
    database.
    """
    remote = sys.modules.get("flwr.superlink.grid")
    if remote is None or not isinstance(grid, remote.HttpGrid):
        return None
    once = copy.copy(grid)
    once._client, once._retry_invoker = None, None
    return once


def _limit(once: Any, seconds: float) -> None:
    """Sets a time limit for calls: there is no use in waiting longer."""
    seconds = min(_LONGEST_CALL_SECONDS, max(_SHORTEST_CALL_SECONDS, seconds))
    once._runtime_client._client.timeout = seconds


def _is_passing(error: Exception) -> bool:
    """True if the same call may succeed a little later."""
    import httpx
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= _SERVER_ERROR
    return isinstance(error, httpx.TransportError | ObjectPushError)


def _ends_the_run(error: Exception) -> bool:
    """True if the SuperLink answers that this run is over."""
    import httpx

    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (
        _UNAUTHORIZED,
        _FORBIDDEN,
    )
