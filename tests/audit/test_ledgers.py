"""Tests of the offline audit of one ledger: sound ones pass, and every way to cheat is a finding."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audited import AMPLE, CHARGE, DELTA, EVENT, audit, spend

from fedslm.audit.ledgers import (
    NO_WITNESS,
    Evidence,
    as_json,
    audit_ledger,
)
from fedslm.errors import LedgerError, OutOfRange
from fedslm.privacy import accounting, keys
from fedslm.privacy.chain import GENESIS, line_hash
from fedslm.privacy.ledger import Ledger


def test_a_sound_ledger(node: Path) -> None:
    """Counts, identity and epsilon by three accountants; the private key is not needed."""
    (node / keys.PRIVATE_KEY).unlink()
    found = audit(node)
    assert found.sound
    assert (found.entries, found.charges, found.open_reservations) == (6, 3, 1)
    assert (found.unit, found.adjacency) == ("record", "add-or-remove-one")
    (spent,) = found.spent
    assert spent.delta == DELTA
    assert spent.accounts == accounting.cross_check([EVENT] * 3, DELTA)


def test_more_deltas(node: Path) -> None:
    """Every delta of the ledger, the policy and the auditor is reported."""
    found = audit(node, Evidence(deltas=(1e-7,), budget=(5.0, 1e-6)))
    assert [spent.delta for spent in found.spent] == [1e-7, 1e-6, 1e-5]


def test_deltas_without_end_cost_the_auditor_nothing(node: Path) -> None:
    """Each delta takes time to account for: a ledger with more than a node needs is a finding."""
    ledger = Ledger(node / "ledger.jsonl", keys.signing_key(node))
    charges = [replace(CHARGE, round=4, delta=n * 1e-7) for n in range(1, 20)]
    ledger.reserve(charges, AMPLE)
    assert audit(node).sound
    ledger.reserve([replace(CHARGE, round=5, delta=1e-4)], AMPLE)
    (finding,) = audit(node).findings
    assert "21 values of delta, and 20 is the most" in finding
    assert len(audit(node, Evidence(deltas=(1e-3,))).spent) == 21


def test_what_the_budget_leaves(node: Path) -> None:
    """The releases that still fit do fit, and one more does not."""
    budget = (accounting.epsilon([EVENT] * 7, DELTA), DELTA)
    (spent,) = audit(node, Evidence(budget=budget)).spent
    assert (spent.budget, spent.remaining_releases, spent.adaptive) == (budget[0], 4, None)


def test_an_exceeded_budget_is_a_finding(node: Path) -> None:
    """A node that charged more than its policy allows is found out."""
    budget = (accounting.epsilon([EVENT] * 2, DELTA), DELTA)
    assert "is exceeded" in audit(node, Evidence(budget=budget)).findings[0]


def test_several_plans_are_held_by_the_filter(node: Path) -> None:
    """What fits only if nobody looked at earlier releases is a finding."""
    spend(Ledger(node / "ledger.jsonl", keys.signing_key(node)), 4, plan="another")
    events = [EVENT] * 4
    pld = accounting.epsilon(events, DELTA)
    found = audit(node, Evidence(budget=(pld * 1.001, DELTA)))
    (spent,) = found.spent
    assert spent.adaptive is not None
    assert spent.adaptive > pld
    assert not found.sound


def test_saved_heads(node: Path) -> None:
    """A head that was saved before more was charged is still in the ledger; a foreign one is not."""
    before = audit(node).head
    spend(Ledger(node / "ledger.jsonl", keys.signing_key(node)), 4)
    assert audit(node, Evidence(heads=(before,))).sound
    assert "rolled back" in audit(node, Evidence(heads=("f" * 64,))).findings[0]


def test_a_rollback_of_ledger_and_head_is_seen_by_a_saved_head(node: Path) -> None:
    """Whoever restores an old copy of both files cannot hide it from an auditor with a head."""
    old = {name: (node / name).read_bytes() for name in ("ledger.jsonl", "ledger.jsonl.head")}
    spend(Ledger(node / "ledger.jsonl", keys.signing_key(node)), 4)
    head = audit(node).head
    for name, content in old.items():
        (node / name).write_bytes(content)
    assert audit(node).sound
    assert not audit(node, Evidence(heads=(head,))).sound


def test_another_key_is_a_finding(node: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A ledger proves something only to the holder of the right key."""
    other = keys.signing_key(tmp_path_factory.mktemp("other")).public_key()
    assert not audit_ledger(node, other, Evidence()).sound


def test_a_missing_ledger_is_a_finding(tmp_path: Path, node: Path) -> None:
    """No ledger is not a sound one."""
    key = keys.read_public_key(node / keys.PUBLIC_KEY)
    assert not audit_ledger(tmp_path / "nowhere", key, Evidence()).sound


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_tampering_is_a_finding(data: st.DataObject) -> None:
    """A flipped bit, or a dropped, swapped or duplicated line, anywhere: the auditor sees it."""
    with tempfile.TemporaryDirectory() as directory:
        node = Path(directory)
        ledger = Ledger(node / "ledger.jsonl", keys.signing_key(node))
        for number in (1, 2, 3):
            spend(ledger, number)
        content = ledger.path.read_bytes()
        lines = content.splitlines(keepends=True)
        line = data.draw(st.integers(0, len(lines) - 1))
        match data.draw(st.sampled_from(["flip", "drop", "swap", "duplicate"])):
            case "flip":
                position = data.draw(st.integers(0, len(content) - 1))
                flipped = content[position] ^ (1 << data.draw(st.integers(0, 7)))
                changed = content[:position] + bytes([flipped]) + content[position + 1 :]
            case "drop":
                changed = b"".join(lines[:line] + lines[line + 1 :])
            case "swap":
                other = (line + data.draw(st.integers(1, len(lines) - 1))) % len(lines)
                lines[line], lines[other] = lines[other], lines[line]
                changed = b"".join(lines)
            case _:
                changed = b"".join([*lines[: line + 1], *lines[line:]])
        ledger.path.write_bytes(changed)
        assert not audit(node).sound


def test_a_public_key_is_read_up_to_a_limit() -> None:
    """A path that gives zeros for ever is no key."""
    with pytest.raises(LedgerError, match="more than 65536 bytes"):
        keys.read_public_key("/dev/zero")


def rewritten(node: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what the lines say, and signs and links them anew, as whoever has the key can."""
    path, key = node / "ledger.jsonl", keys.signing_key(node)
    previous, lines = "0" * 64, []
    for line in path.read_bytes().splitlines():
        values = {**json.loads(line), "previous": previous}
        del values["signature"]
        change(values)
        lines.append(json.dumps({**values, "signature": keys.signature_of(key, values)}).encode())
        previous = line_hash(lines[-1])
    path.write_bytes(b"\n".join([*lines, b""]))
    head = {"index": len(lines) - 1, "sha256": previous}
    (node / "ledger.jsonl.head").write_text(json.dumps(head))


def of_charges(**changes: object) -> Callable[[dict[str, Any]], None]:
    """Changes the charges."""

    def change(values: dict[str, Any]) -> None:
        if "charge" in values:
            values["charge"].update(changes)

    return change


def of_round_2(**changes: object) -> Callable[[dict[str, Any]], None]:
    """Changes one charge of a run with several."""

    def change(values: dict[str, Any]) -> None:
        if values.get("charge", {}).get("round") == 2:
            values["charge"].update(changes)

    return change


def test_the_helper_changes_nothing_by_itself(node: Path) -> None:
    """A ledger that is signed anew without a change is sound: what the next tests find is what they changed."""
    rewritten(node, lambda values: None)
    assert audit(node).sound


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (of_charges(purpose="\u0430dapter"), "purpose"),
        (of_charges(round=True), "round"),
        (
            lambda values: values.update(index=bool(values["index"])) if values["index"] < 2 else None,
            "index",
        ),
        (lambda values: values.update(time=0), "before 2025"),
        (lambda values: values.update(time=values["time"] - 400 * values["index"]), "400 s earlier"),
        (of_charges(unit="patient", unit_column="visit"), "count by 'user' too"),
        (lambda values: values.update(time=True), "time"),
        (of_round_2(plan_sha256="another"), "run 'run-plan' was charged under several plans"),
        (of_round_2(dataset_commitment="others"), "'run-plan' was charged for records that changed"),
    ],
    ids=["purpose", "round", "index", "time 0", "back", "unit", "time", "plan", "records"],
)
def test_well_signed_lines_that_say_what_cannot_be(
    node: Path, change: Callable[[dict[str, Any]], None], part: str
) -> None:
    """A foreign letter, a boolean, a time that cannot be or a run of two plans is a finding, whoever signed it."""
    rewritten(node, change)
    assert any(part in finding for finding in audit(node).findings), audit(node).findings


def test_a_head_that_is_a_boolean_is_a_finding(node: Path) -> None:
    """``true`` is no line, though it compares like 1."""
    head = node / "ledger.jsonl.head"
    head.write_text(json.dumps({"index": True, "sha256": line_hash(lines_of_ledger(node)[1])}))
    assert "names no line" in audit(node).findings[0]


def lines_of_ledger(node: Path) -> list[bytes]:
    """The ledger's lines without their ends."""
    return (node / "ledger.jsonl").read_bytes().splitlines()


def test_the_head_of_an_empty_ledger_rules_nothing_out(node: Path) -> None:
    """Whoever saved it saw no line: it is no fault of the ledger, and the question stays open."""
    found = audit(node, Evidence(heads=(GENESIS,)))
    assert (found.sound, found.open_questions) == (True, (NO_WITNESS,))
    assert audit(node, Evidence(heads=(GENESIS, found.head))).open_questions == ()


def test_a_head_of_no_line_beside_many_is_noted(node: Path) -> None:
    """It is that of a ledger before its first line: put back, it would hide any cut."""
    (node / "ledger.jsonl.head").write_text(json.dumps({"index": -1, "sha256": GENESIS}))
    assert any("head next to the ledger belongs to no line" in note for note in audit(node).notes)


@pytest.mark.parametrize("head", ["abc", "", "F" * 64, "f" * 63 + "\n", "\u0660" * 64])
def test_a_head_that_is_no_hash_accuses_nobody(head: str) -> None:
    """A slip of the auditor's is an error, not a ledger that was rolled back."""
    with pytest.raises(LedgerError, match="must be 64 hexadecimal digits"):
        Evidence(heads=(head,))


@pytest.mark.parametrize("delta", [0.0, 2.0, 0.5, float("nan")])
def test_a_delta_that_promises_nothing_accuses_nobody(delta: float) -> None:
    """Neither does a delta at which nothing can be computed."""
    with pytest.raises(OutOfRange, match="delta="):
        Evidence(deltas=(delta,))


def test_a_correction_that_hides_more_than_it_says_is_a_finding(node: Path) -> None:
    """A line that corrects the clock by a second and goes back by a day lets a day of charges go."""
    correction = {"ahead": 1, "reason": "why"}

    def change(values: dict[str, Any]) -> None:
        if values["index"] == 5:
            del values["charge"]
            values.update(correction=correction, time=values["time"] - 86_400)

    rewritten(node, change)
    assert any("corrects the clock by 1 s, and goes back by 86400 s" in f for f in audit(node).findings)


@pytest.mark.parametrize(
    "event",
    [{"sample_rate": 5e-324}, {"steps": 10**12}, {"noise_multiplier": 1e-300}],
    ids=repr,
)
def test_events_that_stop_an_accountant_are_a_finding(node: Path, event: dict[str, object]) -> None:
    """Whatever an accountant raises, the audit ends with a finding."""
    rewritten(
        node, of_charges(event={"sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 1, **event})
    )
    assert not audit(node).sound


def test_whole_numbers_are_numbers(node: Path) -> None:
    """A multiplier that JSON holds as a whole number, however large, is computed with."""
    event = {"sample_rate": 1, "noise_multiplier": 10**99, "steps": 1}
    rewritten(node, of_charges(event=event, clip_norm=1))
    assert audit(node).spent[0].epsilon == 0.0


def test_a_rollback_that_nothing_rules_out_is_said(node: Path) -> None:
    """Without a saved head or a statement of this key it is an open question; with one of them it is none."""
    ledger = Ledger(node / "ledger.jsonl", keys.signing_key(node))
    statement = ledger.statement("run-plan", 2, "release-2")
    found = audit(node)
    assert found.sound
    assert found.open_questions == (NO_WITNESS,)
    assert as_json(found)["open_questions"] == (NO_WITNESS,)
    assert audit(node, Evidence(heads=(found.head,))).open_questions == ()
    assert audit(node, Evidence(statements=(statement,))).open_questions == ()


def test_several_plans_hold_at_twice_the_delta(node: Path) -> None:
    """The filter's figure is beside the delta at which it holds, and the finding names the figure that is too large."""
    spend(Ledger(node / "ledger.jsonl", keys.signing_key(node)), 4, plan="another")
    budget = accounting.epsilon([EVENT] * 4, DELTA) * 1.001
    found = audit(node, Evidence(budget=(budget, DELTA)))
    (spent,) = found.spent
    assert spent.adaptive_delta == 2 * DELTA
    assert f"ε = {spent.adaptive:.3f}" in found.findings[0]
    assert any("2δ" in note for note in found.notes)
    assert any("2δ" in note for note in audit(node).notes)


def test_a_correction_of_the_clock_is_noted(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its seconds and its reason: no fault, and not hidden; a ledger that is ahead is noted as well."""
    ledger, now = Ledger(node / "ledger.jsonl", keys.signing_key(node)), time.time()
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now + 5000)
        spend(ledger, 4)
    assert any("s ahead of this machine's clock" in note for note in audit(node).notes)
    ledger.correct_clock("the battery was flat")
    found = audit(node)
    assert found.sound
    (note,) = (each for each in found.notes if "corrected the clock" in each)
    assert "'the battery was flat'" in note


def test_a_ledger_of_patients_names_its_column(tmp_path: Path) -> None:
    """And the audit says how many charges of an older version name none."""
    ledger = Ledger(tmp_path / "ledger.jsonl", keys.signing_key(tmp_path), unit="user")
    ledger.reserve([CHARGE], AMPLE)
    ledger.reserve([replace(CHARGE, unit="user", unit_column="who", run="new")], AMPLE)
    found = audit(tmp_path)
    assert found.sound
    assert (found.unit, found.unit_column) == ("user", "who")
    assert any(note.startswith("1 charges of an older version") for note in found.notes)
