"""What a node answers to a server that asks for less protection than the node's own policy allows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from support.served import (
    ask,
    chain_of,
    context_of,
    first_request,
    message_to,
    new_directory,
    records_of,
    run_with,
    with_plan,
    with_raw_plan,
    write_policy,
)
from support.tiny import PATIENT, PRIVATE

from fedslm import simulation
from fedslm.client.personal import measure
from fedslm.config import Config, PersonalizationConfig, TaskConfig
from fedslm.privacy import accounting
from fedslm.privacy.plan import NoPrivacy
from fedslm.protocol.messages import MEASURE, Reply, Request
from fedslm.protocol.tensors import from_arrays

MakeConfig = Callable[..., Config]
OF_PATIENTS = {"unit": "user", "unit_column": "patient", "max_records_per_unit": 3}
NEVER_SENT = ("/", "client-", "train.parquet", "Traceback", "site-")


@pytest.fixture(scope="module")
def honest(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Request]:
    """An honest server's first request, by unit; enough rounds for every test of this file."""
    directory = tmp_path_factory.mktemp("server")
    return {
        unit: first_request(config_in(directory / unit, privacy=privacy))
        for unit, privacy in (("record", PRIVATE), ("patient", PATIENT))
    }


def setup_of(request: Request, **values: Any) -> Request:
    """The request with another setup."""
    return replace(request, setup=replace(request.setup, **values))


def without_privacy(request: Request) -> Request:
    """A request to train without privacy."""
    return setup_of(request, plan=NoPrivacy(4, 2))


def of_records(request: Request) -> Request:
    """A request to protect records alone."""
    values = json.loads(request.setup.plan.to_json())
    for key in ("unit_column", "max_records_per_unit"):
        del values[key]
    return with_raw_plan(request, {**values, "unit": "record"})


def of_a_language_model(request: Request) -> Request:
    """A request to train for another task."""
    return setup_of(request, task=TaskConfig(name="causal-lm"))


def plan(**values: Any) -> Callable[[Request], Request]:
    """A request with some values of the plan changed."""
    return lambda request: with_plan(request, **values)


Weaker = Callable[[Request], Request]
RECORD: list[tuple[str, Weaker, str]] = [
    ("no noise", plan(noise_multiplier=0.0), "noise_multiplier=0.0 is out of range"),
    ("negative noise", plan(noise_multiplier=-1.0), "noise_multiplier=-1.0 is out of range"),
    ("noise that is no number", plan(noise_multiplier=math.nan), "noise_multiplier=nan is out of"),
    ("little noise", plan(noise_multiplier=0.5), "noise_multiplier 0.5 is below 0.6"),
    ("delta", plan(delta=1e-3), "delta 0.001 is above 1e-05"),
    ("clip", plan(clip_norm=50.0), "clip_norm 50 is above 1"),
    ("rate", plan(sample_rate=0.9), "sample_rate 0.9 is above 0.2"),
    ("steps", plan(steps_per_round=10**6), "steps_per_round 1e+06 is above 2"),
    ("epsilon", plan(epsilon=8.5), "epsilon 8.5 is above 8"),
    ("a plan that lies", plan(noise_multiplier=0.61), "more than epsilon=8"),
    ("more rounds than paid", plan(rounds=12), "over 12 rounds, more than epsilon=8"),
    ("no privacy", without_privacy, "unit 'none' is weaker than 'record'"),
    ("unit client", plan(unit="client"), "a plan for whole clients shares the noise"),
    ("unknown unit", plan(unit="hospital"), "unknown unit 'hospital'"),
    ("base", lambda r: setup_of(r, base_sha256="0" * 64), "base model 000000000000 is not allowed"),
    ("task", of_a_language_model, "task 'causal-lm' is not among ['classification']"),
    ("metric", plan(metric_noise_multiplier=100.0), "no metric may leave"),
    ("no plan", lambda r: with_raw_plan(r, {}), "the plan is refused"),
    ("an unknown value", plan(noise="none"), "the plan cannot be read"),
    ("version", lambda r: setup_of(r, version="9.9"), "server runs 9.9"),
]
PATIENTS: list[tuple[str, Weaker, str]] = [
    ("records", of_records, "unit 'record' is weaker than 'user'"),
    ("column", plan(unit_column="text"), "unit_column 'text' is not 'patient'"),
    ("no column", plan(unit_column=""), "unit_column='' must name a column"),
    ("cap", plan(max_records_per_unit=4), "max_records_per_unit 4 is above 3"),
    ("no privacy", without_privacy, "unit 'none' is weaker than 'user'"),
]
CASES = [
    *(("record", *case) for case in RECORD),
    *(("patient", *case) for case in PATIENTS),
]


def policy_for(node: Path, request: Request, unit: str) -> Path:
    """A policy that allows the honest request and little more."""
    values = {"unit": "record"} if unit == "record" else OF_PATIENTS
    return write_policy(node, base_models=[request.setup.base_sha256], **values)


def assert_refused(reply: Reply, reason: str) -> None:
    """Refused for a reason that names the problem and tells nothing of the node."""
    assert (reply.status, reply.delta, reply.statement, reply.metric) == ("refused", None, "", None)
    assert reason in reply.reason
    assert not [text for text in NEVER_SENT if text in reply.reason]
    assert (reply.delta_sha256, reply.base_sha256, reply.weight) == ("", "", 1.0)


def ledger_of(node: Path) -> bytes | None:
    """The ledger's bytes; None if there is none."""
    path = node / "ledger.jsonl"
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize(
    ("unit", "weaker", "reason"),
    [(unit, weaker, reason) for unit, _, weaker, reason in CASES],
    ids=[f"{unit}-{name}" for unit, name, _, _ in CASES],
)
def test_a_weaker_request_is_refused_and_free(
    honest: dict[str, Request], tmp_path: Path, unit: str, weaker: Weaker, reason: str
) -> None:
    """Refused with its reason before and after an honest request; nothing is charged for it."""
    node = policy_for(tmp_path / "node", honest[unit], unit)
    context = context_of(0, node)
    assert_refused(ask(weaker(honest[unit]), context), reason)
    assert ledger_of(node) is None
    assert ask(honest[unit], context).status == "ok"
    charged = ledger_of(node)
    assert_refused(ask(replace(weaker(honest[unit]), round=2), context), reason)
    assert ledger_of(node) == charged
    assert ask(replace(honest[unit], round=2), context).status == "ok"
    assert len(chain_of(node).charges) == 2


@pytest.mark.parametrize(
    "values",
    [
        {"sample_rate": 0.1},
        {"noise_multiplier": 0.9},
        {"clip_norm": 0.5},
        {"steps_per_round": 1},
        {"normaliser": 1},
        {"epsilon": 7.999},
        {"rounds": 2},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_plan_does_not_change_in_mid_run(
    honest: dict[str, Request], tmp_path: Path, values: dict[str, Any]
) -> None:
    """A run goes on with the plan that it began with: a change is refused and free, even a stronger one."""
    node = policy_for(tmp_path / "node", honest["record"], "record")
    context, request = context_of(0, node), honest["record"]
    assert ask(request, context).status == "ok"
    charged = ledger_of(node)
    other = replace(with_plan(request, **values), round=2)
    reply = ask(other, context)
    if "epsilon" in values:  # the calibrated noise costs a little less: either reason is right
        assert reply.status == "refused"
    else:
        assert_refused(reply, "this run was begun with another plan")
    assert ledger_of(node) == charged
    assert ask(replace(request, round=2), context).status == "ok"


def test_all_that_is_wrong_is_named_at_once(honest: dict[str, Request], tmp_path: Path) -> None:
    """A request that is weaker in three ways is refused with three reasons."""
    node = policy_for(tmp_path / "node", honest["record"], "record")
    weaker = with_plan(honest["record"], clip_norm=2.0, sample_rate=0.5, metric_noise_multiplier=1.0)
    reply = ask(weaker, context_of(0, node))
    for reason in ("clip_norm 2 is above 1", "sample_rate 0.5 is above 0.2", "no metric may leave"):
        assert_refused(reply, reason)


def test_the_lifetime_holds_over_all_runs(honest: dict[str, Request], tmp_path: Path) -> None:
    """A second run with a fresh budget of its own is stopped by what the node spent in the first."""
    node = policy_for(tmp_path / "node", honest["record"], "record")
    context, first = context_of(0, node), honest["record"]
    for number in (1, 2, 3):
        assert ask(replace(first, round=number), context).status == "ok"
    charged = ledger_of(node)
    assert_refused(ask(setup_of(first, run_id="another run"), context), "the node's lifetime")
    assert ledger_of(node) == charged


def test_control_variates_are_refused_before_anything_is_charged(
    honest: dict[str, Request], tmp_path: Path
) -> None:
    """SCAFFOLD is not for private plans, whatever a server sends along."""
    node = policy_for(tmp_path / "node", honest["record"], "record")
    request = replace(honest["record"], control=honest["record"].adapter)
    assert_refused(ask(request, context_of(0, node)), "control variates are refused")
    assert ledger_of(node) is None


def test_a_measurement_is_held_against_the_node_too(honest: dict[str, Request], tmp_path: Path) -> None:
    """Another base, another version or a plan without privacy is refused, and no adapter is trained."""
    node = policy_for(tmp_path / "node", honest["record"], "record")
    request = honest["record"]
    plain = NoPrivacy(4, 2)
    for changes, reason in (
        ({"base_sha256": "0" * 64}, "base model"),
        ({"version": "9.9.9"}, "server runs 9.9.9"),
        ({"plan": plain}, "unit"),
    ):
        context = context_of(0, node)
        context.node_config["data-directory"] = str(Path(request.setup.directory) / "data")
        message = Message(setup_of(request, **changes).to_records(), context.node_id, MEASURE)
        message.metadata.__dict__["_message_id"] = "1"
        answer = measure(message, context).content.config_records["measured"]
        assert reason in str(answer["status"])
        assert answer["metrics"] == ""
    assert not (node / "personal").exists()


def test_a_private_measurement_is_one_word(honest: dict[str, Request], tmp_path: Path) -> None:
    """The whole answer is a constant, before any record is read; nothing is charged or trained."""
    request = setup_of(
        honest["record"], personalization=PersonalizationConfig(method="fine-tune", steps=1)
    )
    node = policy_for(tmp_path / "node", request, "record")
    context = context_of(0, node)
    context.node_config["data-directory"] = str(tmp_path / "there are no records here")
    message = Message(request.to_records(), context.node_id, MEASURE)
    message.metadata.__dict__["_message_id"] = "1"
    content = measure(message, context).content
    assert set(content) == {"measured"}
    values = dict(content.config_records["measured"])
    assert len(str(values.pop("salt"))) == 32
    assert values == {"status": "ok", "metrics": ""}
    assert not (node / "personal").exists()
    assert ledger_of(node) is None


def test_a_server_that_repeats_a_round_is_stopped(honest: dict[str, Request], tmp_path: Path) -> None:
    """Asking again and again with other adapters pays every time, and ends at the budget."""
    node = policy_for(tmp_path / "node", honest["record"], "record")
    context, request = context_of(0, node), honest["record"]
    replies = []
    for scale in (1.0, 1.1, 1.2, 1.3, 1.4):
        adapter = type(request.adapter)({k: request.adapter[k] + scale for k in request.adapter})
        replies.append(ask(replace(request, adapter=adapter), context))
    assert [reply.status for reply in replies] == ["ok"] * 3 + ["refused"] * 2
    assert_refused(replies[-1], "budget exhausted")
    assert len(chain_of(node).charges) == 3


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"max_rounds_per_day": 1}, "1 rounds within 24 hours"),
        ({"max_rounds": 1}, "1 of at most 1 rounds"),
        ({"min_seconds_between_rounds": 900.0}, "900 s must pass between two rounds"),
    ],
)
def test_rounds_are_limited(
    honest: dict[str, Request], tmp_path: Path, limit: dict[str, float], reason: str
) -> None:
    """The policy's limits on rounds hold, whatever the budget has left; a repeated request is free."""
    node = write_policy(tmp_path / "node", **limit)
    context, request = context_of(0, node), honest["record"]
    first = ask(request, context)
    assert_refused(ask(replace(request, round=2), context), reason)
    assert ask(request, context).delta_sha256 == first.delta_sha256
    assert len(chain_of(node).charges) == 1


def test_one_run_and_one_day_spend_their_share(honest: dict[str, Request], tmp_path: Path) -> None:
    """Whatever is left of the lifetime: a second round, or another run, waits for a day; a costly run never begins."""
    request = honest["record"]
    once = accounting.epsilon(request.setup.plan.round_events, 1e-5)
    node = write_policy(tmp_path / "node", epsilon=100.0, max_epsilon_per_day=once)
    context = context_of(0, node)
    first = ask(request, context)
    assert first.status == "ok"
    charged = ledger_of(node)
    for more in (replace(request, round=2), setup_of(request, run_id="another run")):
        assert_refused(ask(more, context), "24 hours of this node")
    write_policy(node, epsilon=100.0, max_epsilon_per_run=once)
    assert_refused(ask(replace(request, round=2), context), "epsilon of a run 8 is above")
    write_policy(node, epsilon=100.0, max_epsilon_per_day=once)
    assert ledger_of(node) == charged
    assert ask(request, context).delta_sha256 == first.delta_sha256


def test_another_column_is_not_counted_in_one_ledger(
    honest: dict[str, Request], tmp_path: Path
) -> None:
    """A node whose operator names another column later refuses: half of the spending would not count."""
    node = write_policy(tmp_path / "node", **OF_PATIENTS)
    context = context_of(0, node)
    assert ask(honest["patient"], context).status == "ok"
    (charge,) = chain_of(node).charges
    assert (charge.unit, charge.unit_column, charge.max_records_per_unit) == ("user", "patient", 3)
    assert charge.normaliser == honest["patient"].setup.plan.normaliser
    charged = ledger_of(node)
    write_policy(node, **{**OF_PATIENTS, "unit_column": "traveller"})
    other = with_plan(setup_of(honest["patient"], run_id="another"), unit_column="traveller")
    assert_refused(ask(other, context), "counts by the column 'patient'")
    assert ledger_of(node) == charged


def test_patients_and_records_are_not_counted_in_one_ledger(
    honest: dict[str, Request], tmp_path: Path
) -> None:
    """A node that has spent in records refuses a patient request: half of the spending would not count."""
    node = write_policy(tmp_path / "node", unit="record", unit_column="patient")
    context = context_of(0, node)
    assert ask(honest["record"], context).status == "ok"
    charged = ledger_of(node)
    assert_refused(ask(honest["patient"], context), "counts in units of one record")
    assert ledger_of(node) == charged


def no_policy(node: Path) -> None:
    """No file at all."""
    (node / "policy.toml").unlink()


def a_directory(node: Path) -> None:
    """A directory in the place of the file: it cannot be read."""
    (node / "policy.toml").unlink()
    (node / "policy.toml").mkdir()


def content(data: bytes) -> Callable[[Path], None]:
    """A file with other bytes."""
    return lambda node: (node / "policy.toml").write_bytes(data) and None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_policy, "this node has no policy.toml"),
        (a_directory, "policy.toml cannot be read"),
        (content(b"unit = \n"), "policy.toml cannot be read"),
        (content(b"\xff\xfe\x00"), "policy.toml cannot be read"),
        (content(b"\n"), "policy.toml is invalid"),
        (lambda node: write_policy(node, epsilon=None) and None, "is invalid (epsilon)"),
        (lambda node: write_policy(node, epsilon="8") and None, "is invalid (epsilon)"),
        (lambda node: write_policy(node, epsilon=-1.0) and None, "is invalid (epsilon)"),
        (lambda node: write_policy(node, unit="nobody") and None, "is invalid (unit)"),
        (lambda node: write_policy(node, metric="noisy") and None, "is invalid (metric)"),
    ],
    ids=["missing", "directory", "toml", "text", "empty", "no epsilon", "word", "sign", "unit", "key"],
)
def test_without_a_sound_policy_nothing_is_trained(
    honest: dict[str, Request], tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    """A missing, unreadable or invalid policy allows nothing; a sound one is found at the next request."""
    node = write_policy(tmp_path / "node")
    context = context_of(0, node)
    damage(node)
    assert_refused(ask(honest["record"], context), reason)
    assert_refused(ask(without_privacy(honest["record"]), context), reason)
    assert ledger_of(node) is None
    if (node / "policy.toml").is_dir():
        (node / "policy.toml").rmdir()
    write_policy(node)
    assert ask(honest["record"], context).status == "ok"


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (RecordDict({}), "the message lacks request"),
        (RecordDict({"request": ConfigRecord({"setup": "{"})}), "the request lacks key"),
    ],
    ids=["empty", "cut"],
)
def test_nonsense_is_refused_and_free(
    honest: dict[str, Request], tmp_path: Path, records: RecordDict, reason: str
) -> None:
    """What is no request is answered with what is wrong with it, and charges nothing."""
    node, request = write_policy(tmp_path / "node"), honest["record"]

    class Nonsense(Request):
        """Sends something else."""

        def to_records(self) -> RecordDict:
            """Packs nonsense."""
            return records

    reply = ask(Nonsense(**vars(request)), context_of(0, node))
    assert (reply.status, reply.reason) == ("refused", reason)
    assert ledger_of(node) is None


def test_a_reply_holds_what_is_promised_and_nothing_else(
    honest: dict[str, Request], tmp_path: Path
) -> None:
    """Noised tensors, a signed statement, public hashes and constants: every key is listed here."""
    request = honest["record"]
    message = message_to(request, context_of(0, write_policy(tmp_path / "node")))
    assert set(message.content) == {"reply", "delta"}
    assert set(from_arrays(message.content.array_records["delta"])) == set(request.adapter)
    values = dict(message.content.config_records["reply"])
    statement = json.loads(str(values.pop("statement")))
    hashes = {values.pop("delta_sha256"), values.pop("base_sha256")}
    assert len(str(values.pop("salt"))) == 32
    assert values == {"status": "ok", "round": 1, "reason": "", "weight": 1.0, "extension": "[]"}
    assert all(len(str(each)) == 64 for each in hashes)
    charged = json.loads(request.setup.plan.to_json())
    event = [charged[key] for key in ("sample_rate", "noise_multiplier", "steps_per_round")]
    assert statement.pop("charged") == [[*event, 1]]
    assert 0 < statement.pop("epsilon") <= charged["epsilon"]
    public = {"run": request.setup.run_id, "round": 1, "unit": "record", "index": 2}
    public |= {"charges": 1, "delta": charged["delta"]}
    assert {key: statement.pop(key) for key in public} == public
    assert set(statement) == {
        "release_sha256",
        "ledger_id",
        "head_sha256",
        "root_sha256",
        "public_key",
        "signature",
    }
    assert statement["release_sha256"] in hashes
    assert not message.metadata.__dict__.get("_error")


def size_of(request: Request, node: Path, client: int) -> tuple[int, ...]:
    """Sizes of everything in a node's reply."""
    message = message_to(request, context_of(client, node))
    values = {k: str(v) for k, v in message.content.config_records["reply"].items()}
    assert values["status"] == "ok"
    arrays = message.content.array_records["delta"]
    return (*(len(text) for text in values.values()), *(len(array.data) for array in arrays.values()))


def test_the_size_of_a_reply_tells_nothing_of_the_records(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Nodes with very different numbers of records send replies of the same size."""
    data = {"partition": "dirichlet", "dirichlet_alpha": 0.5}
    config = make_config(privacy=PRIVATE, data=data, federation={"num_clients": 3})
    request = first_request(config)
    index = json.loads((tmp_path / "run" / "data" / "shards.json").read_text())
    assert len(set(index["sizes"])) == 3
    sizes = {size_of(request, write_policy(tmp_path / str(n)), n) for n in range(3)}
    assert len(sizes) == 1


def test_a_run_goes_on_without_a_node_that_refuses(make_config: MakeConfig) -> None:
    """One node's own policy refuses every round: the others' run completes, and the reason is recorded."""
    config = make_config(privacy=PRIVATE)
    directory = new_directory(config.resolved())
    strict = write_policy(directory.nodes / "client-00001", max_clip_norm=0.1)
    report = run_with(config, {}, directory)
    assert (report["rounds"], report["stopped"]) == (3, "")
    for line in records_of(config):
        assert (line["completed"], line["refused"], line["kept"]) == (2, 1, False)
        (reason,) = line["reasons"]
        assert reason == "site-1: refused by the node's policy: clip_norm 1 is above 0.1"
    assert ledger_of(strict) is None
    assert len(chain_of(directory.nodes / "client-00000").charges) == 3
    assert report["privacy"]["site-1"] == {"epsilon": 0.0, "delta": 1e-5, "steps": 0}
    assert 0 < report["epsilon"] <= 8.0


def test_a_policy_for_all_simulated_nodes(make_config: MakeConfig, tmp_path: Path) -> None:
    """engine.policy gives every node a policy: a run that is too weak for it trains nobody."""
    policy = write_policy(tmp_path / "strict", min_noise_multiplier=5.0) / "policy.toml"
    engine = {"workers": 0, "policy": str(policy)}
    config = make_config(privacy=PRIVATE, engine=engine, federation={"max_failed_rounds": 1})
    report = simulation.simulate(config)
    (line,) = records_of(config)
    assert (line["refused"], line["kept"]) == (3, True)
    assert all("is below 5" in reason for reason in line["reasons"])
    assert report["epsilon"] == 0.0
    assert not list(Path(report["directory"]).glob("nodes/*/ledger.jsonl"))
