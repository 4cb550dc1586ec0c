"""The phone-class profile: its files, its limit on memory, and a private round of 135 M parameters in 1 GiB."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import smollm2
from support.places import admitted_node
from support.tiny import make_rows, write_rows

from fedslm import config, validation
from fedslm.deployment.settings import read_node
from fedslm.errors import FederationError
from fedslm.privacy.calibration import calibrated
from fedslm.privacy.plan import PrivatePlan
from fedslm.privacy.policy import PlanRequest, read_policy
from fedslm.protocol.lifetime import deadline_with
from fedslm.protocol.messages import TRAIN, Reply
from fedslm.workers import WorkerPool

PHONE = Path(__file__).parents[2] / "clients" / "phone"
MEMORY = Path("/sys/fs/cgroup/memory")
GIB = 1 << 30
SECONDS = 500.0


def test_the_files_are_accepted_and_fit_together(tmp_path: Path) -> None:
    """Our readers take every file, and the policy allows the run, as often as a node is asked."""
    node = read_node(PHONE)
    assert (node.profile, node.memory_mb, node.poll_seconds) == ("phone", 1024, 15.0)
    assert node.conditions is not None
    assert os.access(PHONE / node.conditions.command[0], os.X_OK)
    run = config.from_toml(PHONE / "run.toml").resolved()
    validation.check(run)
    plan = calibrated(run.privacy, run.training, run.federation.rounds)
    assert isinstance(plan, PrivatePlan)
    policy = read_policy(PHONE / "policy.toml")
    policy.check(PlanRequest(plan, "0" * 64, run.task.name, run.model.base))
    assert policy.max_rounds is not None
    assert policy.max_rounds >= run.federation.rounds
    assert policy.answer_after_seconds is not None
    assert run.federation.round_deadline_seconds >= deadline_with(policy.answer_after_seconds)
    assert run.model.quantization == "int8"
    assert run.aggregation.method == "ffa"


BATTERY = {"type": "Battery", "status": "Charging"}
TERMUX = {"termux-battery-status": '"plugged": "PLUGGED_AC"'}
WIFI = {"termux-wifi-connectioninfo": '"supplicant_state": "COMPLETED"'}


@pytest.mark.parametrize(
    ("supplies", "programs", "reason"),
    [
        ([], {}, None),
        ([{"type": "Mains"}], {}, None),
        ([BATTERY], {}, None),
        ([{**BATTERY, "status": "Full"}], {}, None),
        ([{**BATTERY, "status": "Discharging"}], {}, "not charging"),
        ([BATTERY, {**BATTERY, "status": "Discharging"}], {}, "not charging"),
        ([{**BATTERY, "status": "Unknown"}], {}, "the battery does not tell its state"),
        ([{**BATTERY, "scope": "Device", "status": "Discharging"}], {}, None),
        ([], {"nmcli": "GENERAL.METERED:no (guessed)"}, None),
        ([], {"nmcli": "GENERAL.METERED:yes (guessed)"}, "the network is metered"),
        ([], {**TERMUX, **WIFI}, None),
        ([], {"termux-battery-status": '"plugged": "UNPLUGGED"', **WIFI}, "not charging"),
        ([], {"termux-battery-status": "", **WIFI}, "the battery does not tell its state"),
        ([], TERMUX, "the network does not tell its state"),
        ([], {**TERMUX, "termux-wifi-connectioninfo": "{}"}, "not on Wi-Fi"),
    ],
)
def test_may_train(
    tmp_path: Path, supplies: list[dict[str, str]], programs: dict[str, str], reason: str | None
) -> None:
    """Charging and not metered is 0; anything else is 1 with the reason."""
    for number, supply in enumerate(supplies):
        (tmp_path / "power" / str(number)).mkdir(parents=True)
        for name, value in supply.items():
            (tmp_path / "power" / str(number) / name).write_text(f"{value}\n")
    (tmp_path / "bin").mkdir()
    for name, says in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\necho '{says}'\n")
        path.chmod(0o755)
    (tmp_path / "bin" / "cat").symlink_to("/bin/cat")
    places = {"PATH": str(tmp_path / "bin"), "POWER_SUPPLY": str(tmp_path / "power")}
    command = ["/bin/sh", str(PHONE / "may-train")]
    done = subprocess.run(command, env=places, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == ((0, "") if reason is None else (1, reason))


def allocate(size: int) -> int:
    """A job that needs memory."""
    return len(bytearray(size))


def test_a_worker_is_refused_what_is_beyond_its_memory() -> None:
    """The job fails and says so, the worker lives on, and what is within the limit works."""
    pool = WorkerPool(1, memory_mb=700, is_forked=False)
    try:
        process = pool.call(os.getpid)
        assert pool.call(allocate, 100 << 20) == 100 << 20
        with pytest.raises(FederationError, match="MemoryError"):
            pool.call(allocate, 800 << 20)
        assert pool.call(allocate, 100 << 20) == 100 << 20
        assert pool.call(os.getpid) == process
    finally:
        pool.close()


def test_libraries_reserve_little_in_a_limited_worker() -> None:
    """The limit counts what is reserved too, so libraries are told before they are imported."""
    pool = WorkerPool(1, threads=3, memory_mb=700, is_forked=False)
    try:
        assert pool.call(os.getenv, "OPENBLAS_NUM_THREADS") == "3"
        assert int(pool.call(os.getenv, "ONEDNN_PRIMITIVE_CACHE_CAPACITY")) < 1024
    finally:
        pool.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M's architecture, to the last parameter, with random weights and the embedded tokenizer."""
    import torch
    import transformers

    from fedslm.models.base import DEMO_DIRECTORY

    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    network = transformers.AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in network.parameters()) == 134_515_008
    network.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(DEMO_DIRECTORY).save_pretrained(directory)
    return directory


def prepared(root: Path, base: Path, task: str, memory_mb: int) -> Path:
    """A phone's directory with its records, and beside it the message of a first round."""
    from flwr.app import Message
    from support.served import first_request

    rows = [{**row, "text": row["text"] * 6} for row in make_rows(300, 0)]  # as long as they may be
    for name, part in (("train", rows[:290]), ("test", rows[290:])):
        write_rows(root / f"{name}.jsonl", part)
    changes = [
        *(f"model.base={base}", f"data.source={root}", f"run.directory={root / 'run'}"),
        *(f"task.name={task}", "data.partition=iid", "federation.num_clients=1"),
        *("federation.clients_per_round=1", "federation.min_clients=1"),
        *([] if task == "classification" else ["data.label_column="]),
    ]
    request = first_request(config.from_toml(PHONE / "run.toml", changes))
    message = Message(request.to_records(), 5, TRAIN)
    message.metadata.__dict__["_message_id"] = "1"
    (root / "message").write_bytes(pickle.dumps(message))
    toml = (PHONE / "node.toml").read_text().replace("notes.jsonl", str(root / "train.jsonl"))
    node = admitted_node(root / "place", f"memory_mb = {memory_mb}\n{toml}")
    policy = (PHONE / "policy.toml").read_text().replace("classification", task)
    (node / "policy.toml").write_text(policy.replace("HuggingFaceTB/SmolLM2-135M", str(base)))
    return node


@contextmanager
def limited_group(limit: int) -> Iterator[Path | None]:
    """A cgroup that may use so much memory, swap left out; None where none can be made."""
    group = MEMORY / f"fedslm-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "memory.memsw.limit_in_bytes").write_text(str(limit))
    except OSError:
        if not (group / "memory.limit_in_bytes").exists():
            yield None
            return
    try:
        yield group
    finally:
        deadline = time.monotonic() + 20
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()


def tree_of(process: int) -> list[int]:
    """A process and all that it started."""
    found = [process]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def held_by(process: int) -> dict[str, int]:
    """What a process and all that it started hold, in bytes: shared pages by their share."""
    held = {"Pss": 0, "Pss_Anon": 0}
    for each in tree_of(process):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines[1:]:
            name, value = line.split(":")
            if name in held:
                held[name] += int(value.split()[0]) << 10
    return held


def answered(node: Path, limit: int) -> tuple[list[Reply], dict[str, float]]:
    """A phone's replies under a limit on memory, and the most that it held, in MiB."""
    root = node.parents[1]
    peak = {"Pss": 0, "Pss_Anon": 0}
    with limited_group(limit) as group:
        command = [
            sys.executable,
            Path(__file__).parents[1] / "support" / "phone_round.py",
            node,
            root / "message",
        ]
        places = [root / "replies", *([] if group is None else [group])]
        with (root / "log").open("wb") as log:
            process = subprocess.Popen([*command, *places], stdout=log, stderr=log)
            deadline = time.monotonic() + SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                peak = {name: max(peak[name], value) for name, value in held_by(process.pid).items()}
                time.sleep(0.1)
            process.kill()
        assert process.wait() == 0, (root / "log").read_text()
        figures: dict[str, float] = {name: value / 2**20 for name, value in peak.items()}
        if group is not None:
            figures["cgroup"] = int((group / "memory.max_usage_in_bytes").read_text()) / 2**20
            figures["reclaims"] = int((group / "memory.failcnt").read_text())
            assert "oom_kill 0" in (group / "memory.oom_control").read_text()
    messages = pickle.loads((root / "replies").read_bytes())  # noqa: S301  (our own)
    return [Reply.from_records(each.content, *_read_as(root)) for each in messages], figures


def _read_as(root: Path) -> tuple[Any, Any]:
    """How a server reads the reply: packing and shapes."""
    from fedslm.aggregation.methods import sent_keys
    from fedslm.protocol.messages import Request

    message = pickle.loads((root / "message").read_bytes())  # noqa: S301  (our own)
    request = Request.from_records(message.content)
    shapes = request.adapter.shapes
    sent = sent_keys(request.setup.method, request.adapter, request.turn)
    return request.packing, {key: shapes[key] for key in sent}


def assert_fits(node: Path) -> None:
    """Two replies within 1 GiB: trained, charged, small to send; the second one is the first again."""
    replies, figures = answered(node, GIB)
    print(json.dumps({name: round(value) for name, value in figures.items()}))
    first, again = replies
    assert (first.status, again.status) == ("ok", "ok"), (first.reason, again.reason)
    assert first.delta is not None
    assert first.delta.is_finite()
    assert again.delta_sha256 == first.delta_sha256
    assert 0 < first.num_bytes < first.delta.num_bytes / 3.5
    assert figures["Pss"] < 1024
    assert (node / "ledger.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_a_private_round_of_135_million_parameters_fits_in_1_gib(
    task: str, base: Path, tmp_path: Path
) -> None:
    """The whole node, with its first self-test, in a cgroup of 1 GiB: trained, charged, small to send."""
    node = prepared(tmp_path, base, task, 1024)
    for path in base.glob(
        "*.safetensors"
    ):  # so that reading it counts here, and not where it was written
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    assert_fits(node)


@pytest.mark.slow
@pytest.mark.real
def test_a_private_round_of_real_weights_fits_in_1_gib(tmp_path: Path) -> None:
    """SmolLM2 itself, with its own tokenizer."""
    (tmp_path / "base").mkdir()
    assert_fits(prepared(tmp_path, smollm2.weights(tmp_path / "base"), "causal-lm", 1024))


@pytest.mark.slow
def test_a_round_that_needs_more_is_answered(base: Path, tmp_path: Path) -> None:
    """With too little memory the reply says "failed"; the phone and its worker live on."""
    replies, _ = answered(prepared(tmp_path, base, "classification", 480), GIB)
    assert [reply.status for reply in replies] == ["failed", "failed"]
