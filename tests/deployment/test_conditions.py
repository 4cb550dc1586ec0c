"""When a node takes part: hours, the operator's command, and what a phone must write down."""

from __future__ import annotations

import logging
import socket
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from support.pace import patient
from support.places import NODE, admitted_node

from fedslm.deployment import conditions as conditions_module
from fedslm.deployment import node
from fedslm.deployment.conditions import Attendance, is_within, reason_against
from fedslm.deployment.settings import Conditions, read_node
from fedslm.errors import ConfigError

NOON = datetime(2026, 6, 1, 12, 0)


def command(directory: Path, text: str) -> Conditions:
    """Conditions with a script as their command, looked at every time."""
    path = directory / "may-train"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return Conditions(command=["./may-train"], check_seconds=1e-9)


@pytest.mark.parametrize(
    ("hours", "yes", "no"),
    [
        ("22:00-06:00", ("22:00", "23:59", "00:00", "05:59"), ("06:00", "12:00", "21:59")),
        ("09:30-17:00", ("09:30", "16:59"), ("09:29", "17:00", "00:00")),
        ("00:00-23:59", ("00:00", "23:58"), ("23:59",)),
    ],
)
def test_hours(hours: str, yes: tuple[str, ...], no: tuple[str, ...]) -> None:
    """The first minute is within, the last is not; hours may pass midnight."""
    for clock, is_in in [*((each, True) for each in yes), *((each, False) for each in no)]:
        hour, minute = map(int, clock.split(":"))
        assert is_within(hours, NOON.replace(hour=hour, minute=minute)) is is_in, clock


def test_all_conditions_must_hold(tmp_path: Path) -> None:
    """Outside the hours the command is not even asked; within them it decides."""
    asked = command(tmp_path, "touch asked; exit 0")
    night = asked.model_copy(update={"hours": "22:00-06:00"})
    assert reason_against(night, tmp_path, NOON) == "it is 12:00, and its hours are 22:00-06:00"
    assert not (tmp_path / "asked").exists()
    assert reason_against(night, tmp_path, NOON.replace(hour=23)) is None
    assert (tmp_path / "asked").exists()
    assert reason_against(Conditions(), tmp_path, NOON) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("exit 0", None),
        ("echo loaded; exit 0", None),
        ("echo not charging >&2; exit 1", "not charging"),
        ("exit 3", "./may-train ended with 3"),
        ("kill -9 $$", "./may-train ended with -9"),
        ("yes x | head -c 100000 | tr -d '\\n'; exit 1", "x"),
    ],
)
def test_the_command_decides(tmp_path: Path, text: str, reason: str | None) -> None:
    """0 is yes; anything else is no, with the last line that it said."""
    found = reason_against(command(tmp_path, text), tmp_path, NOON)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert (found.strip("x") or "x", len(found) <= 200) == (reason, True)


def test_a_command_that_cannot_answer_says_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is missing, no program, or hangs with a child of its own, which is not left behind."""
    missing = Conditions(command=["./nothing"])
    assert "cannot be run" in str(reason_against(missing, tmp_path, NOON))
    (tmp_path / "text").write_text("x")
    assert "cannot be run" in str(reason_against(Conditions(command=["./text"]), tmp_path, NOON))
    assert "cannot be run" in str(reason_against(Conditions(command=["a\0b"]), tmp_path, NOON))
    monkeypatch.setattr(conditions_module, "_ANSWER_SECONDS", 0.3)
    later = patient(1.5)
    hanging = command(tmp_path, f"(sleep {later}; touch survived) & sleep 600")
    began = time.monotonic()
    assert "did not answer within 0.3 s" in str(reason_against(hanging, tmp_path, NOON))
    assert time.monotonic() - began < later
    time.sleep(later)
    assert not (tmp_path / "survived").exists()


def test_it_is_looked_at_now_and_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Between two looks the last answer stands; a change is one line in the log."""
    caplog.set_level(logging.INFO, logger="fedslm")
    attendance = Attendance(command(tmp_path, "echo unplugged; exit 1"), tmp_path)
    assert [attendance.takes_part() for _ in range(3)] == [False] * 3
    slow = Attendance(command(tmp_path, "exit 0").model_copy(update={"check_seconds": 60.0}), tmp_path)
    assert slow.takes_part()
    command(tmp_path, "exit 1")
    assert slow.takes_part()
    command(tmp_path, "exit 0")
    assert attendance.takes_part()
    assert [record.message for record in caplog.records] == [
        "does not take part: unplugged",
        "takes part",
        "takes part",
    ]


PHONE = f'{NODE}profile = "phone"\n'


def write_node(directory: Path, text: str) -> Path:
    """A node's directory with this node.toml."""
    (directory / "node.toml").write_text(text, encoding="utf-8")
    return directory


def test_a_profile_gives_defaults(tmp_path: Path) -> None:
    """A phone's differ from a hospital's; what is written counts; the command line names another profile."""
    hospital = read_node(write_node(tmp_path, NODE))
    assert (hospital.poll_seconds, hospital.memory_mb, hospital.conditions) == (1.0, None, None)
    text = f'{PHONE}[conditions]\nhours = "22:00-06:00"\n'
    phone = read_node(write_node(tmp_path, text))
    assert (phone.poll_seconds, phone.memory_mb) == (15.0, 1024)
    assert read_node(tmp_path, "hospital").memory_mb is None
    phone = read_node(write_node(tmp_path, f"poll_seconds = 2.0\nmemory_mb = 512\n{text}"))
    assert (phone.poll_seconds, phone.memory_mb) == (2.0, 512)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (PHONE, "conditions"),
        (f"{PHONE}[conditions]\n", "conditions"),
        (f"{PHONE}[conditions]\ncheck_seconds = 5.0\n", "conditions"),
        (f'{NODE}[conditions]\nhours = "22:00"\n', "conditions.hours"),
        (f'{NODE}[conditions]\nhours = "24:00-06:00"\n', "conditions.hours"),
        (f'{NODE}[conditions]\nhours = "06:00-06:00"\n', "conditions.hours"),
        (f'{NODE}[conditions]\ncommand = "./may-train"\n', "conditions.command"),
        (f"{NODE}[conditions]\ncheck_seconds = 0\n", "conditions.check_seconds"),
        (f"{NODE}[conditions]\nnetwork = 1\n", "conditions.network"),
        (f"{NODE}memory_mb = 100\n", "memory_mb"),
        (f'{NODE}profile = "tablet"\n', "profile"),
        (f"{NODE}profile = [1]\n", "profile"),
    ],
)
def test_what_is_written_wrongly_is_named(tmp_path: Path, text: str, key: str) -> None:
    """With the file and the key; a phone without conditions is a mistake too."""
    with pytest.raises(ConfigError) as caught:
        read_node(write_node(tmp_path, text))
    assert [problem.key for problem in caught.value.problems] == [f"node.toml: {key}"]


def test_outside_its_conditions_a_node_does_not_connect(tmp_path: Path) -> None:
    """Not one connection is opened, and it ends at once when it is told to."""
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    toml = f'{NODE}[conditions]\ncommand = ["./may-train"]\ncheck_seconds = 0.05\n'
    directory = admitted_node(tmp_path, toml, server.getsockname()[1])
    command(directory, "echo asked >> asked; exit 1")
    stop = threading.Event()
    served = threading.Thread(target=node.run_node, args=(node.open_node(directory), stop))
    served.start()
    asked, deadline = directory / "asked", time.monotonic() + 600
    while not (asked.exists() and asked.read_text().count("asked") > 5):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stop.set()
    served.join(600)
    assert not served.is_alive()
    with server, pytest.raises(BlockingIOError):
        server.accept()
