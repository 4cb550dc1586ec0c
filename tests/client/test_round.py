"""A client's round: admitted first, charged next, and only then are records read."""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.served import ask, context_of, first_request, write_policy
from support.tiny import PRIVATE

import fedslm
from fedslm.client import records
from fedslm.client.round import _warn_of_emulation
from fedslm.config import Config, ModelConfig
from fedslm.models import precision
from fedslm.protocol.messages import Request

CLIENT = Path(fedslm.__file__).parent / "client"


def never(*_: object, **__: object) -> Any:
    """Stands where records are read."""
    raise AssertionError("a record was read")


@pytest.fixture(scope="module")
def private(config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Request:
    """The first request of a private run."""
    return first_request(config_in(tmp_path_factory.mktemp("server") / "run", privacy=PRIVATE))


@pytest.mark.parametrize(
    ("policy", "change", "reason"),
    [
        ({"unit": "user", "unit_column": "who"}, {}, "is weaker than 'user'"),
        ({"tasks": ["seq2seq"]}, {}, "task"),
        ({}, {"base_sha256": "0" * 64}, "the base model here differs"),
        ({}, {"version": "9.9.9"}, "server runs 9.9.9"),
        ({}, {"model": ModelConfig(base="demo", dtype="float16")}, 'model.dtype: value "float16"'),
        ({"epsilon": 0.01}, {}, "epsilon"),
        ({"max_epsilon_per_run": 0.001}, {}, "epsilon"),
    ],
    ids=["unit", "task", "base", "version", "precision", "lifetime budget", "run budget"],
)
def test_a_refusal_reads_no_record(
    private: Request,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: dict[str, Any],
    change: dict[str, Any],
    reason: str,
) -> None:
    """Policy, base, version and budget refuse before a record is read; an admitted request reads them."""
    monkeypatch.setattr(records.store, "read_client", never)
    request = replace(private, setup=replace(private.setup, **change))
    reply = ask(request, context_of(0, write_policy(tmp_path / "node", **policy)))
    assert (reply.status, reason in reply.reason) == ("refused", True), reply.reason
    again = ask(private, context_of(0, write_policy(tmp_path / "other")))
    assert again.status == "failed"  # it got as far as the records


def test_shared_passes_in_bfloat16_are_refused(
    config_in: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a server asks for, units that share a pass are computed in float32; no record is read."""
    monkeypatch.setattr(records.store, "read_client", never)
    private = first_request(config_in(tmp_path / "run", privacy={**PRIVATE, "passes": "shared"}))
    assert private.setup.model.dtype == "float32"
    node = write_policy(tmp_path / "node", weakest_passes="shared")
    model = private.setup.model.model_copy(update={"dtype": "bfloat16"})
    reply = ask(replace(private, setup=replace(private.setup, model=model)), context_of(0, node))
    assert (reply.status, "need a base in float32" in reply.reason) == ("refused", True)
    assert ask(private, context_of(0, node)).status == "failed"  # it got as far as the records


@pytest.mark.parametrize("native", [True, False])
def test_a_node_warns_of_emulated_bfloat16(
    private: Request,
    tmp_path: Path,
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its log says once, in a process, that what the run asks for is slow here."""
    monkeypatch.setattr(precision, "is_native", lambda device: native)
    _warn_of_emulation.cache_clear()
    model = private.setup.model.model_copy(update={"dtype": "bfloat16"})
    request = replace(private, setup=replace(private.setup, model=model))
    context = context_of(0, write_policy(tmp_path / "node"))
    logger = logging.getLogger("fedslm.client.round")
    logger.addHandler(caplog.handler)  # whatever an earlier test made of the loggers above
    for _ in range(2):
        assert ask(request, context).status == "ok"
    logger.removeHandler(caplog.handler)
    said = {id(record) for record in caplog.records if "is emulated on this cpu" in record.message}
    assert len(said) == (0 if native else 1)


def test_records_are_read_through_the_round_alone() -> None:
    """In client/ only the round calls what reads records, and only admission makes a round."""
    calls: dict[str, set[str]] = {}
    for path in CLIENT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).split(".")[-1]
                calls.setdefault(name, set()).add(path.stem)
    assert calls["ClientRound"] == {"round"}
    assert calls["records_of"] == {"round"}
    assert calls["read_client"] == {"records"}
