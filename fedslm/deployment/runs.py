"""Runs on real nodes: the server's operator starts, follows, stops and continues them."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm import layout
from fedslm.config import Config
from fedslm.deployment.admission import NODES
from fedslm.deployment.control import COMPLETED, FINISHED, Control
from fedslm.deployment.rosters import know_authority
from fedslm.errors import FederationError, RunError, Unusable
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.masked import admitted_members
from fedslm.federation.roster import chosen_nodes
from fedslm.federation.spends import SPENDS, read_standings
from fedslm.federation.standings import Standing
from fedslm.storage import locked, write_text

logger = logging.getLogger(__name__)
_POLL_SECONDS, _TURN_SECONDS = 0.5, 10.0
_LOST_SECONDS = 120.0  # the SuperLink takes a minute to notice that a run's process was killed
_ENDING_SECONDS = 60.0  # a run's process notices within half a minute that it was stopped
_OUTAGE_SECONDS = 120.0
_PATHS = (
    *("data.source", "data.evaluation_source", "data.public_source"),
    *("task.labels_file", "model.base"),
    *("distill.student", "distill.source", "distill.general_source"),
)

OnRound = Callable[[dict[str, Any]], None]


def directory_of(server: Path, config: Config) -> Path:
    """A run's directory: ``run.directory`` from the config, or runs/NAME in the server's directory."""
    named = config.run.directory
    return (
        Path(named).expanduser().absolute() if named else server.absolute() / "runs" / config.run.name
    )


def overrides_of(server: Path, config: Config) -> dict[str, str | int | float | bool]:
    """The flat run config with which the same config runs on real nodes."""
    own = {
        "run.directory": str(directory_of(server, config)),
        "engine.name": "deployed",
        "engine.nodes": str(server.absolute() / NODES),
    }
    flat = config.flat()
    paths = {key: str(Path(str(flat[key])).absolute()) for key in _PATHS if _is_here(str(flat[key]))}
    return {**flat, **paths, **own}


def _is_here(text: str) -> bool:
    """Whether a value is a relative path that exists here: the run has another working directory."""
    return text not in ("", "demo") and not text.startswith(("/", "~", "$")) and Path(text).exists()


def start(control: Control, server: Path, config: Config, *, resume: bool) -> tuple[int, Path]:
    """Starts a run, or continues one whose server was lost.

    Formal guarantees:
        * Nothing is started, and nothing of an earlier start is overwritten, while the run is active: a
          process holds its directory, or the SuperLink reports that it has not ended. The SuperLink
          reports this from its start of the run on; two simultaneous starts take turns.

    Returns:
        The SuperLink's number of the run, and the run's directory.

    Raises:
        RunError: The run is active, such a run exists already, or there is none to continue.
        FederationError: The SuperLink refuses, or is not reachable.
    """
    directory = directory_of(server, config)
    exists = (directory / layout.CONFIG_JSON).exists()
    with _turn(directory):
        _refuse_living(control, directory, seconds=_LOST_SECONDS if resume and exists else 0.0)
        if (directory / layout.ERROR).exists() and not (
            directory / layout.CHECKPOINT / layout.CHECKPOINT_STATE
        ).exists():
            shutil.rmtree(directory)  # it failed before it began: there is nothing to keep
        exists = (directory / layout.CONFIG_JSON).exists()
        if exists and not resume:
            raise Unusable(f"{directory} exists; continue it with --resume, or set another run.name")
        if resume and not exists:
            raise Unusable(f"{directory} contains no run to continue")
        if (directory / layout.REPORT).exists():
            raise RunError(f"{directory} is finished: see {directory / 'report.md'}")
        if config.privacy.shares_noise:
            know_authority(server)
        if not exists:
            _check_nodes(server, config)
        (directory / layout.ERROR).unlink(missing_ok=True)  # its content is from an earlier attempt
        run_id = control.start(overrides_of(server, config))
        write_text(_started(directory), str(run_id))
    return run_id, directory


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Allows only one start at a time to touch a run.

    Raises:
        RunError: Another start is in progress.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    problem = f"another `fedslm server run` is starting {directory.name}"
    with locked(directory.with_name(f".{directory.name}.start"), _TURN_SECONDS, problem):
        yield


def _refuse_living(control: Control, directory: Path, *, seconds: float) -> None:
    """Refuses to touch a run that is active.

    A SuperLink takes a minute to notice that the process of a run was killed: if it reports that a run
    is active, but no process holds its directory, this waits for one of the two.

    Raises:
        RunError: A process holds the directory, or the SuperLink reports that the run is active.
    """
    deadline, told = time.monotonic() + seconds, False
    while True:
        found, held = _living(control, directory), _is_held(directory)
        if not found and not held:
            return
        if (found and held) or time.monotonic() > deadline:
            break
        if not told:
            logger.warning("%s may still be active; waiting to find out", directory.name)
        told = True
        time.sleep(_POLL_SECONDS)
    state = " and ".join(f"run {number} is {status}" for number, status in found.items())
    number = _number(directory)
    state = state or f"the process of run {number if number else 'of another start'} has not ended yet"
    raise RunError(
        f"{directory.name} is active: {state}. Check it with `fedslm server status`; stop it with "
        f"`fedslm server stop {directory.name}` before you start or continue it"
    )


def _living(control: Control, directory: Path) -> dict[int, str]:
    """Number to status of a run's starts that have not ended at the SuperLink."""
    found, number = control.living(directory), _number(directory)
    if number is not None and number not in found:
        try:
            status = control.status(number)
        except FederationError:  # it answered a moment ago, so it does not know that number
            return found
        if not status.startswith(FINISHED):
            return {**found, number: status}
    return found


def _is_held(directory: Path) -> bool:
    """Whether a process holds a run's directory."""
    if not (directory / layout.CONFIG_JSON).exists():
        return False
    try:
        with RunDirectory(directory, "").locked():
            return False
    except RunError:
        return True


def stop(control: Control, directory: Path) -> None:
    """Stops a run, and waits until its process has ended; it can be continued.

    Raises:
        RunError: It was not started here, it is not running, or its process does not end.
        FederationError: The SuperLink refuses, or is not reachable.
    """
    name, number = directory.name, _number(directory)
    found = _living(control, directory.absolute())
    if not found and number is None:
        raise Unusable(f"{directory} is not a run that was started here")
    if not found and not _is_held(directory):
        raise RunError(f"{name} is not running; `fedslm server status` says how it ended")
    for each in found:
        control.stop(each)
    deadline = time.monotonic() + _ENDING_SECONDS
    while _is_held(directory):
        if time.monotonic() > deadline:
            raise RunError(
                f"{name} is stopped at the SuperLink, but its process still runs after "
                f"{_ENDING_SECONDS:g} s; look at `fedslm server logs`, and end it"
            )
        time.sleep(_POLL_SECONDS)


def follow(
    control: Control, run_id: int, directory: Path, on_round: OnRound, stop: threading.Event
) -> str:
    """Reports each round until the run is over; waits while the SuperLink is restarted.

    Args:
        control: The SuperLink.
        run_id: Its number of the run.
        directory: The run's directory.
        on_round: Called with each round's line.
        stop: Set to stop following; the run continues.

    Returns:
        The last status.

    Raises:
        FederationError: The SuperLink has not answered for two minutes.
    """
    lines, status, since = _Lines(directory / layout.ROUNDS), "", None
    while True:
        try:
            status, since = control.status(run_id), None
        except FederationError as error:
            if since is None:
                logger.warning("the SuperLink does not answer; waiting")
                since = time.monotonic()
            if time.monotonic() > since + _OUTAGE_SECONDS:
                raise FederationError(
                    f"the SuperLink has not answered for {_OUTAGE_SECONDS:g} s, and run {run_id} may "
                    f"still be active: {error}. Once it answers, `fedslm server status` shows its "
                    f"state; continue it with --resume only if it is failed or interrupted"
                ) from error
        for record in lines.new():
            on_round(record)
        if status.startswith(FINISHED) or stop.wait(_POLL_SECONDS):
            return status


@dataclass
class _Lines:
    """A growing file of JSON lines; each line is read once."""

    path: Path
    _position: int = 0

    def new(self) -> list[dict[str, Any]]:
        """Complete lines that were written since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                content = file.read()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def last_round(directory: Path) -> int:
    """The last round in a run's checkpoint; 0 without one: a resumed run continues after it."""
    try:
        text = (directory / layout.CHECKPOINT / layout.CHECKPOINT_STATE).read_text(encoding="utf-8")
        return int(json.loads(text)["round"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def failure_of(directory: Path) -> str:
    """The error with which the server's side of a run ended; empty if there is none."""
    try:
        return (directory / layout.ERROR).read_text(encoding="utf-8")
    except OSError:
        return ""


def is_good(status: str, directory: Path) -> bool:
    """True if a run was completed and wrote its report."""
    return status == COMPLETED and (directory / layout.REPORT).exists()


def _started(directory: Path) -> Path:
    """File of a run's number: next to its directory, which the run itself creates."""
    return directory.with_name(f"{directory.name}.run")


def _number(directory: Path) -> int | None:
    """The SuperLink's number of the latest start of a run; None if it was not started here."""
    try:
        return int(_started(directory).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_nodes(server: Path, config: Config) -> None:
    """Refuses a new run before it begins if too few of its nodes can take part.

    Raises:
        FederationError: The nodes do not match the config, too many are excluded, or they share noise
            and the authority has signed no roster of them.
    """
    federation = config.federation
    nodes = chosen_nodes(server / NODES, federation.nodes, federation.num_clients)
    if config.privacy.shares_noise:
        admitted_members(server, nodes)
    standings = read_standings(server / SPENDS)
    out = [node.name for node in nodes.values() if standings.get(node.ledger_key, Standing()).out]
    least = federation.min_clients or 1
    if len(nodes) - len(out) < least:
        raise FederationError(
            f"{', '.join(out)} must be readmitted first (fedslm provision readmit): "
            f"{len(nodes) - len(out)} nodes are left, fewer than federation.min_clients={least}"
        )
