"""Tests of the audit of a run: it is computed from ledgers and statements, not from the run's report."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.core_install import in_core
from support.tiny import PRIVATE

from fedslm import simulation
from fedslm.audit import runs
from fedslm.config import Config
from fedslm.errors import PrivacyError, RunError, Unusable
from fedslm.federation.spends import STANDING
from fedslm.federation.standings import Readmission, Standing, as_values
from fedslm.privacy import accounting
from fedslm.privacy.keys import signing_key
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import Unprotected
from fedslm.progress import Bar
from fedslm.records import Event

ROUNDS = {"federation": {"num_clients": 3, "rounds": 2, "min_replies": 1}}


@pytest.fixture(scope="module")
def finished(config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run over two rounds."""
    directory = tmp_path_factory.mktemp("audited") / "run"
    simulation.simulate(config_in(directory, privacy=PRIVATE, **ROUNDS), [Bar()])
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def audited(run: Path, **options: Any) -> dict[str, Any]:
    """Audits without the figures for people with several records, which take their time."""
    return runs.audit_run(run, group_sizes=(), empirical=False, **options)


def events_of(run: Path, client: int) -> list[Event]:
    """What a ledger's lines say was charged, read without any of the library's readers."""
    lines = (run / "nodes" / f"client-{client:05d}" / "ledger.jsonl").read_text().splitlines()
    charges = [json.loads(line)["charge"] for line in lines if "charge" in json.loads(line)]
    return [Event(**charge["event"]) for charge in charges]


def test_a_sound_run(run: Path) -> None:
    """No findings; epsilon is that of the ledgers by three accountants; three files are written."""
    audit = audited(run)
    assert audit["findings"] == []
    expected = accounting.cross_check(events_of(run, 0), 1e-5)
    accounts = audit["guarantee"]["accounts"]
    assert tuple(accounts.values()) == astuple(expected)
    assert [client["charges"] for client in audit["clients"]] == [2, 2, 2]
    assert json.loads((run / "audit.json").read_text())["guarantee"]["epsilon"] == expected.pld
    markdown, page = (run / "audit.md").read_text(), (run / "audit.html").read_text()
    assert f"**{expected.pld:.3f}**" in markdown
    for part in ("What is not protected", "Every charge", "Self-test", "The mechanism", "Identity"):
        assert f"## {part}" in markdown
        assert f"<h2>{part}" in page
    assert "@media print" in page


def test_a_core_installation_audits_with_two_accountants(run: Path) -> None:
    """The figures of record are the same; the page says which accountants agreed and what was not compared."""
    whole = runs.audit_run(run, group_sizes=(1,), empirical=False)
    command = ["audit", "run", str(run), "--no-empirical", "--records-per-person", "1"]
    ((code, _, error),) = in_core([command])
    assert code == 0, error
    core, page = json.loads((run / "audit.json").read_text()), (run / "audit.md").read_text()
    for part in ("### Two accountants", "only two accountants", "cannot compare the code"):
        assert part in page
    theirs, ours = core["guarantee"]["accounts"], whole["guarantee"]["accounts"]
    assert theirs["prv"] is None
    assert theirs["pld"] == ours["pld"] <= theirs["rdp"] == pytest.approx(ours["rdp"], rel=0.01)
    assert core["guarantee"]["epsilon"] == whole["guarantee"]["epsilon"]
    assert core["findings"] == whole["findings"] == []


def test_the_page_names_clients_as_the_report_does_and_has_a_date(run: Path) -> None:
    """Clients have their names, in the report and in the audit; by number where the data are gone."""
    report = json.loads((run / "report.json").read_text())
    named = [client["name"] for client in audited(run)["clients"]]
    assert named == report["clients"] == ["site-0", "site-1", "site-2"]
    today = str(datetime.now(UTC).year)
    page = (run / "report.md").read_text()
    assert f"finished {today}-" in page
    assert [
        page.count(f"\n- {line}") for line in ("Non-default settings: ", "Parameters that rounds")
    ] == [
        1,
        1,
    ]
    assert f"audited {today}-" in (run / "audit.md").read_text()
    shutil.rmtree(run / "data")
    assert [client["name"] for client in audited(run)["clients"]] == [
        "client 0",
        "client 1",
        "client 2",
    ]


def test_the_self_test_stands_whole_in_the_page(run: Path) -> None:
    """Every figure of the self-test is in its row, though some are between bars."""
    found = audited(run)["self_test"]["checks"]
    assert any("|" in detail for detail in found.values())
    page = html.unescape((run / "audit.html").read_text())
    for name, detail in found.items():
        assert f"<td>{name}</td>\n<td>{detail}</td>" in page


def test_the_report_is_not_believed(run: Path) -> None:
    """A run that states another epsilon of itself does not change the audit."""
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**report, "epsilon": 0.1, "privacy": {}}))
    assert audited(run)["guarantee"]["epsilon"] > 1


def test_a_changed_ledger_is_a_finding(run: Path) -> None:
    """A charge made cheaper is found, and the page says so first."""
    path = run / "nodes" / "client-00001" / "ledger.jsonl"
    path.write_text(
        re.sub(r'"noise_multiplier": [0-9.]+', '"noise_multiplier": 99.0', path.read_text())
    )
    (finding,) = audited(run)["findings"]
    assert finding.startswith("site-1: ")
    assert "has problems" in (run / "audit.md").read_text()


def statements_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's statements."""
    return [json.loads(line) for line in (run / "statements.jsonl").read_text().splitlines()]


def state(run: Path, lines: list[dict[str, Any]]) -> None:
    """Replaces the lines of a run's statements."""
    (run / "statements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_more_statements_of_one_client_do_not_stand_for_another(run: Path) -> None:
    """Updates that nobody signed for are counted by round and client, whatever else is there."""
    shutil.rmtree(run / "nodes" / "client-00001")
    others = [line for line in statements_of(run) if line["client"] != 1]
    state(run, [*others, *others[-2:]])
    assert [each for each in audited(run)["findings"] if "updates were used" in each] == [
        f"3 updates were used in round {number}, but 2 statements are here" for number in (1, 2)
    ]


def test_statements_of_no_client_are_a_finding(run: Path) -> None:
    """An index beyond the run's clients is nobody's, and stands for nobody."""
    changed = [
        {**line, "client": 9 if line["client"] == 1 else line["client"]} for line in statements_of(run)
    ]
    state(run, changed)
    findings = audited(run)["findings"]
    assert "statements of client 9 are here, and the run has 3 clients" in findings
    assert "3 updates were used in round 1, but 2 statements are here" in findings


@pytest.mark.parametrize("client", ["true", "1.7", "-1", "1e400", '"1"', '"\u0661"', "null"])
def test_a_client_is_a_whole_number(run: Path, client: str) -> None:
    """Nothing else is taken for one."""
    path = run / "statements.jsonl"
    path.write_text(path.read_text().replace('"client": 1', f'"client": {client}', 1))
    with pytest.raises(RunError, match=r"statements\.jsonl is damaged"):
        audited(run)


@pytest.mark.parametrize("count", ["-5", "NaN", "true", "3.0", "1e400"])
def test_a_count_of_a_round_is_a_whole_number(run: Path, count: str) -> None:
    """A round of minus five updates would hide five that nobody signed for."""
    path = run / "rounds.jsonl"
    path.write_text(path.read_text().replace('"completed": 3', f'"completed": {count}', 1))
    with pytest.raises(RunError, match=r"rounds\.jsonl is damaged: completed="):
        audited(run)


def test_a_run_of_which_nothing_is_left_is_a_finding(run: Path) -> None:
    """Without rounds and statements an epsilon of 0 is not a guarantee; a missing round is seen."""
    (run / "rounds.jsonl").unlink()
    assert "a statement is of round 2, and rounds.jsonl holds 0" in audited(run)["findings"]
    (run / "statements.jsonl").unlink()
    shutil.rmtree(run / "nodes")
    (finding,) = audited(run)["findings"]
    assert finding.startswith("neither a round nor a statement is here")


def test_without_ledgers_the_order_of_statements_hides_nothing(run: Path) -> None:
    """An earlier statement at the end is a finding, and the one of the most charges counts."""
    before = audited(run)["guarantee"]["epsilon"]
    state(run, statements_of(run)[::-1])
    for node in (run / "nodes").glob("client-*"):
        shutil.rmtree(node)
    audit = audited(run)
    assert audit["guarantee"]["epsilon"] == before
    assert (
        "site-0: the statement of round 1 does not continue the one before it, of round 2"
        in audit["findings"]
    )


def test_one_ledger_for_two_clients_is_a_finding(run: Path) -> None:
    """Each of two clients that share a ledger would see the other's charges as its own."""
    nodes = run / "nodes"
    shutil.rmtree(nodes / "client-00001")
    shutil.copytree(nodes / "client-00000", nodes / "client-00001")
    lines = [line for line in statements_of(run) if line["client"] != 1]
    state(run, [*lines, *({**line, "client": 1} for line in lines if line["client"] == 0)])
    assert any(
        each.startswith("2 clients stated the same ledger, ") for each in audited(run)["findings"]
    )


def test_a_statement_of_another_run_is_a_finding(run: Path) -> None:
    """A ledger is of a node; a run's statements are of the run."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "run_id": "0123456789abcdef"}))
    assert any("a statement is of another run" in each for each in audited(run)["findings"])


def test_a_node_directory_of_no_client_is_a_finding(run: Path) -> None:
    """What was charged there would count nowhere."""
    shutil.copytree(run / "nodes" / "client-00001", run / "nodes" / "client-00007")
    assert audited(run)["findings"] == ["nodes/client-00007 is of no client of this run"]


def test_after_a_release_without_privacy_no_page_says_a_number(run: Path, tmp_path: Path) -> None:
    """Epsilon is infinite for the client and the network, in JSON the word; also through another run."""
    other = shutil.copytree(run, tmp_path / "other")
    node = run / "nodes" / "client-00000"
    ledger = Ledger(node / "ledger.jsonl", signing_key(node))
    ledger.release_unprotected(Unprotected("elsewhere", 1, "adapter", "x"), Limits((100.0, 1e-5)))
    runs.audit_run(run, group_sizes=(2,), empirical=False)
    kept = json.loads((run / "audit.json").read_text())
    assert kept["guarantee"]["epsilon"] == "infinite"
    assert {epsilon for _, epsilon in kept["guarantee"]["curve"]} == {"infinite"}
    assert [bound for _, bound in kept["guarantee"]["attack"]] == [1.0] * 3
    assert [each["epsilon"] == "infinite" for each in kept["clients"]] == [True, False, False]
    assert kept["groups"] == []
    assert "ε = **∞** at" in (run / "audit.md").read_text()
    assert audited(other, others=(run,))["guarantee"]["epsilon"] == "infinite"


def test_a_replaced_ledger_is_a_finding(run: Path) -> None:
    """A whole node directory that is swapped for another does not hold what the server was told."""
    shutil.rmtree(run / "nodes" / "client-00001")
    shutil.copytree(run / "nodes" / "client-00000", run / "nodes" / "client-00001")
    assert audited(run)["findings"]


def test_without_ledgers_the_statements_count(run: Path) -> None:
    """At a server the ledgers are elsewhere: the signed statements give the same epsilon."""
    before = audited(run)["guarantee"]["epsilon"]
    for node in (run / "nodes").glob("client-*"):
        shutil.rmtree(node)
    audit = audited(run)
    assert audit["guarantee"]["epsilon"] == before
    assert all(client["ledger"] is None for client in audit["clients"])


def test_other_runs_count(run: Path, finished: Path) -> None:
    """Tuning on the same data is composed."""
    audit = audited(run, others=(finished,))
    expected = accounting.epsilon(events_of(run, 0) * 2, 1e-5)
    assert audit["guarantee"]["epsilon"] == expected
    with pytest.raises(RunError):
        audited(run, others=(run / "data",))


def test_a_client_that_was_never_chosen_is_not_a_finding(
    run: Path, config_in: Callable[..., Config], tmp_path: Path
) -> None:
    """A simulation of one round with two of three clients has no ledger of the third."""
    sampled = {"num_clients": 3, "clients_per_round": 2, "rounds": 1, "min_replies": 1}
    config = config_in(tmp_path / "other", privacy=PRIVATE, federation=sampled)
    report = simulation.simulate(config, [Bar()])
    assert len(list((tmp_path / "other" / "nodes").glob("client-*/ledger.jsonl"))) == 2
    assert len(report["clients"]) == 3
    assert len(report["privacy"]) == 2
    page = (tmp_path / "other" / "report.md").read_text()
    assert "1 of 3 clients are not listed: no ledger or statement of theirs is here" in page
    audit = audited(run, others=(tmp_path / "other",))
    assert audit["findings"] == []
    assert sorted(client["charges"] for client in audit["clients"]) == [2, 3, 3]


def test_another_run_counts_by_its_statements_where_ledgers_are_elsewhere(
    run: Path, finished: Path, tmp_path: Path
) -> None:
    """A run whose ledgers are elsewhere can be given; a client of which nothing is here is a finding."""
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    expected = accounting.epsilon(events_of(run, 0) * 2, 1e-5)
    for client in (0, 1, 2):
        shutil.rmtree(other / "nodes" / f"client-{client:05d}")
        audit = audited(run, others=(other,))
        assert audit["guarantee"]["epsilon"] == expected
        assert audit["findings"] == []
    kept = statements_of(other)
    state(other, [each for each in kept if each["client"] != 2])
    audit = audited(run, others=(other,))
    assert [client["charges"] for client in audit["clients"]] == [4, 4, 2]
    assert any(f"{other}, 3 updates were used in round 1" in each for each in audit["findings"])
    (silent,) = [each for each in audit["findings"] if "nothing shows what it spent" in each]
    assert silent.startswith(f"{other}, site-2: ")
    (other / "statements.jsonl").unlink()
    with pytest.raises(Unusable, match="neither a ledger nor a statement"):
        audited(run, others=(other,))


@pytest.mark.slow
def test_people_with_several_records(run: Path) -> None:
    """A record-level run is reported for people, by mixture accounting and beyond k times epsilon."""
    audit = runs.audit_run(run, group_sizes=(2,), empirical=False)
    ((size, pair),) = audit["groups"]
    assert (size, pair) == (2, accounting.group_epsilon(events_of(run, 0), 1e-5, 2))
    assert pair > 2 * audit["guarantee"]["epsilon"]


def test_what_an_attacker_gains(run: Path) -> None:
    """The plain figures are at most what epsilon and delta alone give, and above no knowledge."""
    guarantee: dict[str, Any] = audited(run)["guarantee"]
    for rate, bound in guarantee["attack"]:
        assert rate < bound <= 1
    curve = [epsilon for _, epsilon in guarantee["curve"]]
    assert curve == sorted(curve, reverse=True)


def test_a_run_without_privacy_has_nothing_to_audit(
    config_in: Callable[..., Config], tmp_path: Path
) -> None:
    """Infinite epsilon is an error, not a page that looks like a promise."""
    simulation.simulate(config_in(tmp_path / "plain", **ROUNDS), [Bar()])
    with pytest.raises(PrivacyError, match="without privacy"):
        audited(tmp_path / "plain")


def test_overlapping_clients_are_composed(config_in: Callable[..., Config], tmp_path: Path) -> None:
    """If a unit may lie in several clients, all of them count."""
    privacy = {**PRIVATE, "overlapping": True}
    simulation.simulate(config_in(tmp_path / "run", privacy=privacy, **ROUNDS), [Bar()])
    audit = audited(tmp_path / "run")
    everything = [event for client in range(3) for event in events_of(tmp_path / "run", client)]
    assert audit["guarantee"]["epsilon"] == accounting.epsilon(everything, 1e-5)
    assert audit["guarantee"]["epsilon"] > max(client["epsilon"] for client in audit["clients"])


def test_a_readmitted_node_is_shown_and_is_not_a_finding(run: Path) -> None:
    """A node that is out is a finding; once its operator gave a reason, the page shows the reason."""
    out = Standing(charges=2, epsilon=1.5, delta=1e-5, out="it was rolled back", since="2026-05-02")
    again = Readmission("2026-05-03", "the backup of May 2", out.out, "id", 2, 1.5, 1e-5)
    for standing, expected in ((out, 1), (Standing(readmissions=(again,)), 0)):
        content = {"north": {"standing": as_values(standing)}}
        (run / STANDING).write_text(json.dumps(content))
        found = [each for each in audited(run)["findings"] if "north is excluded" in each]
        assert len(found) == expected
        assert not found or "it was rolled back" in found[0]
    assert audited(run)["findings"] == []
    page = (run / "audit.md").read_text()
    assert "the backup of May 2" in page
    assert "it was rolled back" in page
