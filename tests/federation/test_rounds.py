"""The round loop: resume, failures, hostile updates; test_private_rounds.py has the budgets."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from safetensors.numpy import save_file
from support.served import StopAfter, StopDuring, changed, failing, records_of, run_with
from support.tiny import PRIVATE, write_base

from fedslm import simulation
from fedslm.config import Config
from fedslm.engines.local import LocalGrid
from fedslm.errors import ConfigError, FederationError, ModelError, RunError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.observers import Observer
from fedslm.federation.population import choose_cohort, join
from fedslm.models import precision
from fedslm.protocol.messages import TRAIN, Reply
from fedslm.records import AdapterState
from fedslm.storage import load_tensors
from fedslm.workers import InlinePool

MakeConfig = Callable[..., Config]


def with_nan(state: AdapterState) -> AdapterState:
    """One NaN in the first tensor."""
    key = next(iter(state))
    tensor = state[key].copy()
    tensor.flat[0] = np.nan
    return AdapterState({**state.tensors, key: tensor})


def test_run_learns_and_writes_everything(make_config: MakeConfig) -> None:
    """A plain run beats the start and leaves every file that the README names."""
    config = make_config(federation={"rounds": 6})
    report = simulation.simulate(config)
    before, after = (report[f"metrics_{when}"]["accuracy"] for when in ("before", "after"))
    assert after > max(0.9, before)  # 1.0, from at most 0.8: three seeds, two kernels
    for name in [
        "config.toml",
        "config.json",
        "rounds.jsonl",
        "checkpoint/state.json",
        "frozen.safetensors",
        "report.json",
        "report.md",
        "report.png",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
    ]:
        assert (Path(report["directory"]) / name).stat().st_size > 0, name
    assert report["epsilon"] == "infinite"
    assert not (Path(report["directory"]) / "nodes").exists()


@pytest.mark.parametrize("stop", [StopAfter(2), StopDuring(2)], ids=["between", "within"])
@pytest.mark.parametrize("method", ["fedit", "ffa"])
def test_resumed_run_equals_uninterrupted(
    make_config: MakeConfig, tmp_path: Path, stop: Observer, method: str
) -> None:
    """Without noise, a run that was stopped and resumed gives the same bits."""
    sections = {"aggregation": {"method": method}, "federation": {"clients_per_round": 2}}
    whole = simulation.simulate(make_config(**sections))
    config = make_config(**sections, run={"directory": str(tmp_path / "stopped")})
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(config, [stop])
    resumed = simulation.resume(tmp_path / "stopped", (), config)
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert [r["round"] for r in records_of(config)] == [1, 2, 3]


def test_resume_with_another_config_is_refused(make_config: MakeConfig) -> None:
    """--resume with a config that asks for something else is an error, and nothing changes."""
    config = make_config(federation={"rounds": 1})
    report = simulation.simulate(config)
    other = make_config(federation={"rounds": 1}, training={"learning_rate": 0.5})
    with pytest.raises(RunError, match="another config"):
        simulation.resume(Path(report["directory"]), (), other)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (changed(with_nan), "NaN or infinity"),
        (changed(lambda s: AdapterState({k: s[k][:1] for k in s})), "differ from the request"),
        (changed(lambda s: AdapterState({"other": s[next(iter(s))]})), "differ from the request"),
        (changed(lambda s: s, base_sha256="0" * 64), "another base model"),
        (changed(lambda s: s, round=7), "for round 7"),
        (changed(lambda s: AdapterState({k: s[k] + 1e30 for k in s})), "values beyond 10000"),
        (changed(lambda s: s, weight=1e9), "weight=1000000000.0 is not allowed"),
        (changed(lambda s: s, weight=float("nan")), "weight must be a number"),
        (changed(lambda s: s, statement="{}"), "the spend statement cannot be used"),
        (changed(lambda s: s, metric=(1.0, 2.0)), "another metric than the plan"),
        (failing, "error 2: boom"),
    ],
    ids=[
        "nan",
        "shape",
        "keys",
        "base",
        "round",
        "large",
        "weight",
        "nan-weight",
        "charges",
        "metric",
        "raised",
    ],
)
def test_bad_update_is_counted_and_left_out(
    make_config: MakeConfig, tmp_path: Path, answer: Callable[[Message], Message], reason: str
) -> None:
    """An unusable update counts as failed; the aggregate is the mean of the others."""
    config = make_config(federation={"rounds": 1})
    report = run_with(config, {1: answer})
    line = records_of(config)[0]
    assert (line["completed"], line["failed"], line["kept"]) == (2, 1, False)
    assert reason in line["reasons"][0]
    dropped = make_config(run={"directory": str(tmp_path / "b")}, federation={"rounds": 1})
    assert run_with(dropped, {1: failing})["adapter_sha256"] == report["adapter_sha256"]


def test_overflowing_sum_keeps_the_adapter(make_config: MakeConfig) -> None:
    """Updates far beyond any training never reach the adapter: the round is recorded as kept."""

    def huge(state: AdapterState) -> AdapterState:
        return AdapterState({key: np.full_like(state[key], 3e38) for key in state})

    config = make_config(federation={"rounds": 1})
    report = run_with(config, dict.fromkeys(range(3), changed(huge)))
    assert records_of(config)[0]["kept"]
    assert report["metrics_after"] == report["metrics_before"]


def test_two_nodes_with_one_name_stop_the_run() -> None:
    """A node that says it is another client, or one too many, ends the run before it starts."""

    class Remote(LocalGrid):
        """A grid whose clients have to be asked, two of which say the same."""

        clients = None  # type: ignore[assignment]

        def _context(self, client: int) -> Context:
            return super()._context(0 if client == 1 else client)

    grid = Remote(3, InlinePool())
    with pytest.raises(FederationError, match=r"more than federation\.num_clients=2"):
        join(grid, 2, 5.0)
    with pytest.raises(FederationError, match="both claim"):
        join(grid, 3, 5.0)


def test_model_card_runs_as_it_stands(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of adapter/README.md runs in the run directory and gives logits for a batch."""
    report = simulation.simulate(make_config(federation={"rounds": 1}, privacy=PRIVATE))
    directory = Path(report["directory"])
    monkeypatch.chdir(directory)
    card = (directory / "adapter" / "README.md").read_text()
    assert f"ε = {report['epsilon']:.3f} at δ = 1e-05" in card
    code = card.split("```python\n")[1].split("```")[0].replace('["…"]', '["chest pain", "a fall"]')
    namespace: dict[str, Any] = {}
    exec(compile(code, "model card", "exec"), namespace)  # noqa: S102
    assert namespace["logits"].shape == (2, 2)


def test_run_directory_is_locked(make_config: MakeConfig) -> None:
    """A second process, or a second resume, in the same run directory is refused."""
    config = make_config(federation={"rounds": 2})
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(config, [StopAfter(1)])
    directory, _ = RunDirectory.open(Path(str(config.run.directory)))
    with directory.locked(), pytest.raises(RunError, match="in use"):
        simulation.resume(directory.path)


def contents(directory: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file of a directory, and when it was written."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_finished_run_is_left_as_it_is(make_config: MakeConfig) -> None:
    """Resuming it gives the report that is there, starts nothing and writes no file; a lock is no matter."""
    config = make_config(federation={"rounds": 1})
    report = simulation.simulate(config)
    directory, _ = RunDirectory.open(Path(report["directory"]))
    before = contents(directory.path)
    with directory.locked():
        again = simulation.resume(directory.path, (), config)
    assert again == json.loads(json.dumps(report))
    assert contents(directory.path) == before
    moved = directory.path.rename(directory.path.with_name("moved"))
    assert simulation.resume(moved)["directory"] == str(moved)


@pytest.mark.parametrize("missing", ["report.json", "a round"])
def test_a_run_with_something_left_to_do_is_not_finished(make_config: MakeConfig, missing: str) -> None:
    """Without its report, or with a round to come (it stopped early), a run is continued."""
    config = make_config(federation={"rounds": 3, "max_failed_rounds": 1})
    if missing == "a round":
        run_with(config, dict.fromkeys(range(3), failing))
    else:
        simulation.simulate(config)
        (Path(str(config.run.directory)) / missing).unlink()
    assert simulation.finished(Path(str(config.run.directory))) is None
    report = simulation.resume(Path(str(config.run.directory)))
    assert (report["rounds"], report["stopped"]) == (3, "")
    assert simulation.finished(Path(str(config.run.directory))) is not None


def test_a_run_says_and_repeats_its_precision(make_config: MakeConfig, tmp_path: Path) -> None:
    """Bits are equal in this process and in workers, and others than with "auto": float32, as it is tiny.

    The report and the model card name the precision.
    """
    found = {}
    for name, dtype, workers in (
        ("here", "bfloat16", 0),
        ("there", "bfloat16", 2),
        ("auto", "auto", 0),
    ):
        sections = {"run": {"directory": str(tmp_path / name)}, "engine": {"workers": workers}}
        model, rounds = {"base": "demo", "device": "cpu", "dtype": dtype}, {"rounds": 1}
        found[name] = simulation.simulate(make_config(model=model, federation=rounds, **sections))
        expected = "float32" if dtype == "auto" else dtype
        assert found[name]["base_dtype"] == expected
        assert f"computed in {expected}, sha256" in (tmp_path / name / "report.md").read_text()
        card = (tmp_path / name / "adapter" / "README.md").read_text()
        assert f"dtype=torch.{expected})" in card
    hashes = [found[name]["adapter_sha256"] for name in ("here", "there", "auto")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_run_in_float16_is_read_and_not_continued(make_config: MakeConfig, tmp_path: Path) -> None:
    """An earlier version trained in it: an audit needs its config, and no round may be added."""
    config = make_config().resolved()
    model = config.model.model_copy(update={"dtype": "float16"})
    config = config.model_copy(update={"model": model})
    directory = RunDirectory.create(tmp_path / "run", config)
    assert RunDirectory.open(directory.path)[1] == config
    with pytest.raises(ModelError, match=r'model.dtype: value "float16" would turn small gradients'):
        simulation.resume(directory.path)
    with pytest.raises(ConfigError, match=r'model.dtype: value "float16" would turn small gradients'):
        simulation.simulate(config)


@pytest.mark.parametrize("native", [True, False])
def test_a_run_warns_of_emulated_bfloat16(
    make_config: MakeConfig,
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once at its start, and only where the device emulates it."""
    monkeypatch.setattr(precision, "is_native", lambda device: native)
    model = {"base": "demo", "device": "cpu", "dtype": "bfloat16"}
    config = make_config(model=model, federation={"rounds": 1, "num_clients": 2})
    logger = logging.getLogger("fedslm.federation.rounds")
    logger.addHandler(caplog.handler)  # whatever an earlier test made of the loggers above
    simulation.simulate(config)
    logger.removeHandler(caplog.handler)
    said = {id(record) for record in caplog.records if "is emulated on this cpu" in record.message}
    assert len(said) == (0 if native else 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_base_without_a_finite_loss_is_refused(
    make_config: MakeConfig, tmp_path: Path, value: float
) -> None:
    """One bad weight in the base: an error before round 1, no client is asked, and nothing is left."""
    base = write_base(tmp_path / "base", "bert", "classification")
    weights = load_tensors(base / "model.safetensors")
    first = next(key for key in sorted(weights) if key.endswith("query.weight"))
    weights[first][0, 0] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = make_config(model={"base": str(base)}, lora={"target_modules": ["value"]}, privacy=PRIVATE)
    with pytest.raises(ModelError, match=r"loss=nan on the public split before the first round"):
        simulation.simulate(config)
    assert not Path(str(config.run.directory)).exists()


def test_tampered_update_is_left_out(make_config: MakeConfig) -> None:
    """Tensors that do not match the hash that the client computed are left out."""

    def tamper(message: Message) -> Message:
        reply = Reply.from_records(message.content)
        assert reply.delta is not None
        bent = AdapterState({key: reply.delta[key] + 1 for key in reply.delta})
        message.content = Reply(**{**vars(reply), "delta": bent}).to_records()
        return message

    config = make_config(federation={"rounds": 1})
    run_with(config, {0: tamper})
    assert "does not match its hash" in records_of(config)[0]["reasons"][0]


def test_rounds_without_replies_keep_the_adapter_and_stop(make_config: MakeConfig) -> None:
    """All clients fail: each round is recorded, the adapter kept, and the run stops with what it has."""
    config = make_config(federation={"rounds": 9, "max_failed_rounds": 2})
    report = run_with(config, dict.fromkeys(range(3), failing))
    assert "2 rounds in a row" in report["stopped"]
    lines = records_of(config)
    assert [line["kept"] for line in lines] == [True, True]
    assert report["metrics_after"] == report["metrics_before"]
    assert (Path(report["directory"]) / "adapter" / "adapter_model.safetensors").exists()


def test_late_clients_are_counted(make_config: MakeConfig) -> None:
    """A deadline that has passed counts the rest of the cohort as late, and the run goes on."""
    config = make_config(federation={"rounds": 1, "round_deadline_seconds": 1e-9})

    class Slow(LocalGrid):
        """Nothing is ready when it is asked for."""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            messages = [self._jobs[i][1] for i in message_ids if i in self._jobs]
            if messages and messages[0].metadata.message_type == TRAIN:
                return []
            return super().pull_messages(message_ids)

    config = config.resolved()
    directory = RunDirectory.create(Path(str(config.run.directory)), config)
    pool = InlinePool()
    run = simulation.Run(config, directory)
    run.serve(lambda plan, names: run.rounds_on(Slow(3, pool), pool, plan, names))
    assert records_of(config)[0]["late"] == 3


def test_cohorts_are_a_function_of_seed_and_round(make_config: MakeConfig) -> None:
    """The same seed and round choose the same clients; over rounds all are chosen."""
    config = make_config(federation={"num_clients": 3, "clients_per_round": 1})
    chosen = [choose_cohort(config.federation, config.run.seed, number) for number in range(1, 30)]
    assert chosen == [
        choose_cohort(config.federation, config.run.seed, number) for number in range(1, 30)
    ]
    assert {client for cohort in chosen for client in cohort} == {0, 1, 2}
