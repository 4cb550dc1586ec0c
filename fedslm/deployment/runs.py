"""A run on real nodes: started, followed, stopped, continued, by the server's operator."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedslm.config import Config
from fedslm.deployment.control import COMPLETED, Control
from fedslm.deployment.enrolment import NODES
from fedslm.errors import RunError
from fedslm.federation.checkpoint import ERROR
from fedslm.federation.population import registered
from fedslm.storage import write_text

_POLL_SECONDS = 0.5
_FINISHED = "finished"
_PATHS = (
    *("data.source", "data.evaluation_source", "data.public_source"),
    *("task.labels_file", "model.base"),
    *("distill.student", "distill.source", "distill.general_source"),
)

OnRound = Callable[[dict[str, Any]], None]


def directory_of(server: Path, config: Config) -> Path:
    """Where a run lies: what ``run.directory`` says, or runs/NAME below the server's directory."""
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
    """Whether a value is a path as seen from here: the run itself lives elsewhere."""
    return text not in ("", "demo") and not text.startswith(("/", "~", "$")) and Path(text).exists()


def start(control: Control, server: Path, config: Config, *, resume: bool) -> tuple[int, Path]:
    """Starts a run, or continues one whose server was lost.

    Returns:
        The SuperLink's number of the run, and the run's directory.

    Raises:
        RunError: There is such a run already, or none to continue.
        FederationError: The SuperLink refuses, or is not there.
    """
    directory = directory_of(server, config)
    if (directory / ERROR).exists() and not (directory / "checkpoint" / "state.json").exists():
        shutil.rmtree(directory)  # it failed before it began: nothing of it is worth keeping
    exists = (directory / "config.json").exists()
    if exists and not resume:
        raise RunError(f"{directory} exists; continue it with --resume, or set another run.name")
    if resume and not exists:
        raise RunError(f"{directory} holds no run to continue")
    if (directory / "report.json").exists():
        raise RunError(f"{directory} is finished: see {directory / 'report.md'}")
    registered(server / NODES, config.federation.num_clients)
    run_id = control.start(overrides_of(server, config))
    write_text(_started(directory), str(run_id))
    return run_id, directory


def stop(control: Control, directory: Path) -> None:
    """Stops a run; it can be continued.

    Raises:
        RunError: Nobody started it here.
        FederationError: The SuperLink refuses, or is not there.
    """
    try:
        run_id = int(_started(directory).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{directory} is no run that was started here") from error
    control.stop(run_id)


def follow(
    control: Control, run_id: int, directory: Path, on_round: OnRound, stop: threading.Event
) -> str:
    """Tells of each round until the run is over.

    Args:
        control: The SuperLink.
        run_id: Its number of the run.
        directory: The run's directory.
        on_round: Is given each round's line.
        stop: Set to leave; the run goes on.

    Returns:
        The last status.

    Raises:
        FederationError: The SuperLink is gone.
    """
    shown = 0
    while True:
        status = control.status(run_id)
        rounds = _rounds(directory)
        for record in rounds[shown:]:
            on_round(record)
        shown = len(rounds)
        if status.startswith(_FINISHED) or stop.wait(_POLL_SECONDS):
            return status


def failure_of(directory: Path) -> str:
    """What the server's side of a run said before it ended; empty if it said nothing."""
    try:
        return (directory / ERROR).read_text(encoding="utf-8")
    except OSError:
        return ""


def is_good(status: str, directory: Path) -> bool:
    """True if a run came to its end and wrote its report."""
    return status == COMPLETED and (directory / "report.json").exists()


def _started(directory: Path) -> Path:
    """Where a run's number is kept: beside its directory, which the run itself makes."""
    return directory.with_name(f"{directory.name}.run")


def _rounds(directory: Path) -> list[dict[str, Any]]:
    """Lines of the rounds so far."""
    try:
        lines = (directory / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # it is being written
    return found
