"""Tests of the commands for a privacy officer: budget, policy, audit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from support.commands import DEMO, assert_clear, run
from support.tiny import PRIVATE
from typer.testing import CliRunner

from fedslm import simulation
from fedslm.cli import app
from fedslm.config import Config
from fedslm.privacy import accounting
from fedslm.privacy.keys import public_hex, signing_key
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import Charge
from fedslm.privacy.policy import EXAMPLE
from fedslm.progress import Bar
from fedslm.records import Event

KNOWN = ("--delta", "1e-5", "--sample-rate", "0.032")


def plan(*arguments: str) -> dict[str, object]:
    """``fedslm budget plan --json``."""
    result = run("budget", "plan", *KNOWN, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    values: dict[str, object] = json.loads(result.stdout)
    return values


def test_the_noise_for_an_epsilon() -> None:
    """The published calibration: 0.946 for epsilon 3 at N=2000, B=64, T=150."""
    found = plan("--epsilon", "3", "--steps", "150")
    assert found["noise_multiplier"] == pytest.approx(0.946, abs=0.01)
    assert found["affordable_steps"] == 150


def test_the_epsilon_for_a_noise() -> None:
    """And back again."""
    found = plan("--noise-multiplier", "0.946", "--steps", "150")
    assert found["epsilon"] == pytest.approx(3.0, abs=0.05)
    accounts = found["accounts"]
    assert isinstance(accounts, dict)
    assert accounts["rdp"] >= accounts["pld"]


def test_the_steps_that_a_budget_allows() -> None:
    """Epsilon and noise give the steps: one more would not fit."""
    steps = plan("--epsilon", "3", "--noise-multiplier", "0.946")["steps"]
    assert isinstance(steps, int)
    assert accounting.epsilon([Event(0.032, 0.946, steps)], 1e-5) <= 3.0
    assert accounting.epsilon([Event(0.032, 0.946, steps + 1)], 1e-5) > 3.0


def test_rounds_in_place_of_steps() -> None:
    """Rounds and local steps multiply, and the curve counts rounds."""
    found = plan("--epsilon", "3", "--rounds", "15", "--local-steps", "10")
    assert (found["steps"], found["rounds"]) == (150, 15)
    curve = found["curve"]
    assert isinstance(curve, list)
    assert curve[-1]["round"] == 15
    assert curve[-1]["epsilons"][0] == found["epsilon"]
    assert curve[-1]["epsilons"] == sorted(curve[-1]["epsilons"])


def test_a_drowned_signal_is_warned_of_with_the_remedy() -> None:
    """Five million parameters and few clients: fewer parameters, larger batches, more clients."""
    signal = ("--batch-size", "64", "--clients", "5")
    few = plan("--epsilon", "3", "--steps", "150", "--parameters", "2000", *signal)
    many = plan("--epsilon", "3", "--steps", "150", "--parameters", "5000000", *signal)
    assert few["warnings"] == []
    (warning,) = many["warnings"]  # type: ignore[misc]
    for remedy in ("fewer parameters", "sample rate", "more clients"):
        assert remedy in warning


def test_a_config_gives_what_is_not_given(tmp_path: Path) -> None:
    """The plan of a config is the plan that a run of it would have; a plot is written."""
    picture = tmp_path / "budget.png"
    result = run("budget", "plan", DEMO, "--plot", str(picture), "--json")
    found = json.loads(result.stdout)
    assert (found["steps"], found["rounds"], found["unit"]) == (100, 10, "record")
    assert 7.8 < found["epsilon"] <= 8.0
    assert picture.read_bytes().startswith(b"\x89PNG")
    other = json.loads(run("budget", "plan", DEMO, "--epsilon", "2", "--json").stdout)
    assert other["noise_multiplier"] > found["noise_multiplier"]


def test_the_table_for_people() -> None:
    """Without --json: the noise, three accountants, several deltas."""
    result = run("budget", "plan", *KNOWN, "--epsilon", "3", "--steps", "150", "--unit", "patient")
    assert result.exit_code == 0
    for part in ("0.947", "one user", "PLD", "PRV", "RDP", "δ = 1e-06", "over the rounds"):
        assert part in result.stdout


def test_a_client_is_planned_for_the_rounds_that_it_joins(tmp_path: Path) -> None:
    """With the client as the unit no sample rate counts, a config's neither, and a round is one release."""
    asked = ("--unit", "client", "--noise-multiplier", "5")
    found = json.loads(
        run("budget", "plan", *asked, "--delta", "1e-5", "--rounds", "10", "--json").stdout
    )
    assert found["epsilon"] == pytest.approx(accounting.epsilon([Event(1.0, 5.0, 10)], 1e-5), rel=1e-9)
    assert (found["sample_rate"], found["steps"], found["rounds"]) == (1.0, 10, 10)
    of_config = json.loads(run("budget", "plan", DEMO, *asked, "--json").stdout)
    assert (of_config["sample_rate"], of_config["steps"], of_config["rounds"]) == (1.0, 10, 10)
    assert of_config["epsilon"] == pytest.approx(found["epsilon"], rel=1e-9)
    assert "sampling protects no client" in run("budget", "plan", DEMO, *asked).stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--epsilon", "3"), "give steps"),
        (("--steps", "10"), "give epsilon"),
        (("--epsilon", "-1", "--steps", "10"), "epsilon=-1"),
        (("--epsilon", "nan", "--steps", "10"), "epsilon=nan"),
        (("--epsilon", "3", "--steps", "0"), "steps=0"),
        (("--epsilon", "3", "--rounds", "0"), "rounds=0"),
        (("--epsilon", "3", "--rounds", "-1", "--local-steps", "-3"), "rounds=-1"),
        (("--epsilon", "3", "--steps", "10", "--local-steps", "0"), "local_steps=0"),
        (("--epsilon", "3", "--steps", "10", "--unit", "hospital"), "unit='hospital'"),
        (("--epsilon", "3", "--steps", "10", "--sample-rate", "0"), "sample_rate=0"),
        (("--epsilon", "3", "--steps", "10", "--unit", "client"), "sampling protects no client"),
        (("--epsilon", "3", "--steps", "10", "--delta", "2"), "delta=2"),
        (("--epsilon", "3", "--steps", "10", "--delta", "0.9"), "delta=0.9 is too large"),
        (("--epsilon", "3", "--steps", "10", "--batch-size", "0"), "batch_size=0"),
        (("--epsilon", "3", "--steps", "10", "--parameters", "-1"), "parameters=-1"),
        (("--epsilon", "3", "--steps", "10", "--clients", "0"), "clients=0"),
    ],
)
def test_bad_questions_are_clear_errors(arguments: tuple[str, ...], part: str) -> None:
    """What is asked wrongly is named, and ends as wrong usage does."""
    assert_clear(run("budget", "plan", *KNOWN, *arguments), "OutOfRange", part)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--epsilon", "0.01", "--noise-multiplier", "0.5"), "raise it"),
        (("--noise-multiplier", "0.01", "--steps", "10"), "promises nothing"),
        (("--noise-multiplier", "1", "--steps", "10", "--sample-rate", "1e-320"), "cannot be computed"),
    ],
)
def test_what_no_guarantee_can_be_given_for_is_refused(arguments: tuple[str, ...], part: str) -> None:
    """A question that is well asked, and has no answer that promises anything, ends with 3."""
    assert_clear(run("budget", "plan", *KNOWN, *arguments), "PrivacyError", part)


def test_one_step_is_not_many() -> None:
    """The plan's counts and their nouns agree."""
    result = run("budget", "plan", *KNOWN, "--noise-multiplier", "1", "--steps", "1")
    assert "1 step in 1 round at" in " ".join(result.stdout.split())


def test_what_is_missing_is_named() -> None:
    """No sample rate, no delta: both options are named."""
    result = run("budget", "plan", "--epsilon", "3", "--steps", "10")
    assert_clear(result, "OutOfRange", "--sample-rate", "--delta")


def test_the_example_policy_can_be_used(tmp_path: Path) -> None:
    """What is printed is accepted; an invalid one names its keys."""
    path = tmp_path / "policy.toml"
    path.write_text(run("policy", "example").stdout)
    result = run("policy", "check", str(path))
    assert result.exit_code == 0
    assert "ε = 8" in result.stdout


def test_an_audit_ends_well_on_every_console(finished: Path) -> None:
    """A console that cannot show ε gets it escaped, and the exit code of the audit."""
    arguments = ["audit", "run", str(finished), "--no-empirical", "--records-per-person", "1"]
    result = CliRunner(charset="ascii").invoke(app, arguments, env={"TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("\\u03b5 = ")


def test_a_wrong_policy_is_explained(tmp_path: Path) -> None:
    """Every problem, with file, dotted key, value, bound, what the key says, and what was meant."""
    path = tmp_path / "policy.toml"
    lines = [each for each in EXAMPLE.splitlines() if not each.startswith(("delta", "epsilon"))]
    path.write_text("\n".join([*lines, "epsilon = -1.0", "max_round = 5"]))
    result = run("policy", "check", str(path))
    assert_clear(result, "ConfigError", "3 problems")
    said = [line.strip() for line in result.stderr.splitlines()]
    assert any(
        line.startswith("policy.toml: epsilon: value -1.0: should be greater than 0; meaning: Budget")
        for line in said
    )
    assert any(line.startswith("policy.toml: delta: is missing") for line in said)
    assert "policy.toml: max_round: is not known; did you mean 'max_rounds'?" in said
    assert_clear(run("policy", "check", str(tmp_path / "no.toml")), "ConfigError", "no such file")


@pytest.fixture(scope="module")
def finished(config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run of one round."""
    directory = tmp_path_factory.mktemp("cli") / "run"
    federation = {"num_clients": 3, "rounds": 1}
    simulation.simulate(config_in(directory, privacy=PRIVATE, federation=federation), [Bar()])
    return directory


def audit_ledger(node: Path, *more: str) -> Result:
    """``fedslm audit ledger`` with the key beside the ledger."""
    key = str(node / "ledger-key.pub.pem")
    return run("audit", "ledger", str(node / "ledger.jsonl"), "--public-key", key, *more)


def test_a_ledger_commands_no_terminal(tmp_path: Path) -> None:
    """What a node wrote into its ledger is shown as text: no markup, no escapes."""
    key = signing_key(tmp_path)
    ledger = Ledger(tmp_path / "ledger.jsonl", key, unit="user")
    values = dict.fromkeys(("plan_sha256", "base_sha256", "config_sha256", "dataset_commitment"), "x")
    charge = Charge(
        *(Event(0.05, 3.0, 10), "adapter", 1.0, 1e-5, "run", 1),
        **{**values, "request_sha256": "r", "code_version": "0"},
        unit="user",
        unit_column="[/red]\x1b[2J",
    )
    ledger.reserve([charge], Limits(run=(100.0, 1e-5)))
    found = run("audit", "ledger", str(ledger.path), "--public-key", public_hex(key.public_key()))
    assert found.exit_code == 0, found.output
    assert r"by the column '[/red]\x1b[2J'" in found.stdout
    assert "\x1b" not in found.stdout


def test_auditing_a_ledger(finished: Path, tmp_path: Path) -> None:
    """0 and figures on a sound node, 1 and a finding on a tampered one."""
    node = finished / "nodes" / "client-00000"
    statements = str(finished / "statements.jsonl")
    policy = tmp_path / "policy.toml"
    policy.write_text(run("policy", "example").stdout.replace("1e-6 ", "1e-5 "))
    sound = audit_ledger(node, "--statements", statements, "--policy", str(policy), "--json")
    assert sound.exit_code == 0, sound.output
    values = json.loads(sound.stdout)
    assert values["sound"] is True
    assert values["spent"][0]["budget"] == 8.0
    people = audit_ledger(node)
    assert people.exit_code == 0
    for part in ("sound", "PLD", "record", values["head"], "open: a rollback cannot be excluded"):
        assert part in people.stdout
    assert values["open_questions"] == []
    assert json.loads(audit_ledger(node, "--json").stdout)["open_questions"]
    content = (node / "ledger.jsonl").read_bytes()
    try:
        (node / "ledger.jsonl").write_bytes(content.replace(b'"round": 1', b'"round": 2'))
        tampered = audit_ledger(node, "--json")
        assert tampered.exit_code == 1
        assert json.loads(tampered.stdout)["findings"]
        assert "finding:" in audit_ledger(node).stderr
    finally:
        (node / "ledger.jsonl").write_bytes(content)


def test_auditing_with_no_key(finished: Path, tmp_path: Path) -> None:
    """A file that is no key is an error of its own."""
    path = tmp_path / "key.pem"
    path.write_text("not a key")
    ledger = str(finished / "nodes" / "client-00000")
    assert_clear(run("audit", "ledger", ledger, "--public-key", str(path)), "LedgerError", "key.pem")


def test_a_slip_of_the_auditor_is_no_finding(finished: Path) -> None:
    """A delta or a head that cannot be one ends with 2, and says nothing of the ledger or the run."""
    node = finished / "nodes" / "client-00000"
    assert_clear(audit_ledger(node, "--delta", "2"), "OutOfRange", "delta=2")
    assert_clear(audit_ledger(node, "--head", "abc"), "LedgerError", "head='abc'")
    head = json.loads(audit_ledger(node, "--json").stdout)["head"]
    assert audit_ledger(node, "--head", f" {head.upper()} ").exit_code == 0
    result = run("audit", "run", str(finished), "--records-per-person", "0", "--no-empirical")
    assert_clear(result, "OutOfRange", "group_size=0")


def test_auditing_a_run(finished: Path) -> None:
    """Figures and three files; JSON for programs; an error for what is no run."""
    result = run("audit", "run", str(finished), "--records-per-person", "2")
    assert result.exit_code == 0, result.output
    assert "one record" in result.stdout
    assert "ledgers and statements of clients: " in result.stderr
    assert "epsilon of a person with several records: 1/1" in result.stderr
    steps = json.loads((finished / "audit.json").read_text())["empirical"]["steps"]
    assert f"attack with canaries, steps: {steps}/{steps}" in result.stderr
    for name in ("audit.md", "audit.html", "audit.json"):
        assert (finished / name).exists()
        assert name in result.stdout
    quick = ("--no-empirical", "--records-per-person", "1")
    as_json = run("audit", "run", str(finished), *quick, "--json")
    assert json.loads(as_json.stdout)["findings"] == []
    assert_clear(run("audit", "run", str(finished / "data")), "Unusable", "not a run directory")


def test_the_self_test_command() -> None:
    """All promises hold here, in a form for programs."""
    result = run("audit", "self-test", "--json")
    assert result.exit_code == 0, result.stdout
    values = json.loads(result.stdout)
    assert values["passed"] is True
    assert values["seconds"] > 0
    assert len(values["checks"]) >= 8


def test_a_broken_promise_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """With too little noise the self-test says which promise is broken."""
    from fedslm.privacy.gaussian import GaussianNoise

    real = GaussianNoise.draw
    monkeypatch.setattr(
        GaussianNoise, "draw", lambda self, shape, stddev: real(self, shape, stddev / 2)
    )
    result = run("audit", "self-test")
    assert result.exit_code == 1
    assert "BROKEN" in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("budget", "plan"),
        ("audit", "ledger"),
        ("audit", "run"),
        ("audit", "self-test"),
        ("policy", "check"),
    ],
)
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    """Every command shows how it is used."""
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: fedslm {' '.join(command)}" in " ".join(result.stdout.replace("`", "").split())
