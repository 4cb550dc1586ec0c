"""Tests of the fictional triage notes."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from fedslm.data import demo

_NAME = re.compile(r"([A-Z]\w+ [A-Z]\w+),?(?: record)? \(?MRN-\d{5}|MRN-\d{5} ([A-Z]\w+ [A-Z]\w+)")
_CLINICIAN = re.compile(r"Dr ([A-Z]\w+)")
_MRN = re.compile(r"MRN-\d{5}")


@pytest.fixture(scope="module")
def data() -> demo.DemoData:
    """The demo data of one seed at its usual size."""
    return demo.generate(np.random.default_rng(7))


def _shared_texts(data: demo.DemoData) -> list[str]:
    """Texts that leave the hospitals."""
    return [row["text"] for row in data.public + data.evaluation]


def test_same_seed_gives_same_rows(data: demo.DemoData) -> None:
    """The rows are a function of the generator's state."""
    assert demo.generate(np.random.default_rng(7)) == data


def test_other_seed_gives_other_rows(data: demo.DemoData) -> None:
    """Another seed gives other texts."""
    assert demo.generate(np.random.default_rng(8)).train != data.train


def test_private_and_evaluation_rows_ignore_size_of_public_part(data: demo.DemoData) -> None:
    """Asking for more public notes changes neither the private nor the evaluation rows."""
    other = demo.generate(np.random.default_rng(7), num_public=10)
    assert (other.train, other.evaluation) == (data.train, data.evaluation)


def test_counts_are_as_asked() -> None:
    """Every hospital gives exactly the records asked for, and so do the shared parts."""
    data = demo.generate(
        np.random.default_rng(0), records_per_hospital=31, num_public=17, num_evaluation=5
    )
    assert Counter(row["client"] for row in data.train) == dict.fromkeys(demo.HOSPITALS, 31)
    assert (len(data.public), len(data.evaluation)) == (17, 5)


@pytest.mark.parametrize("count", ["records_per_hospital", "num_public", "num_evaluation"])
def test_negative_counts_are_refused(count: str) -> None:
    """A negative count is an error, not an empty part."""
    with pytest.raises(ValueError, match="at least 0"):
        demo.generate(np.random.default_rng(0), **{count: -1})


def test_more_records_than_identifiers_are_refused() -> None:
    """A hospital cannot have more records than it has identifiers."""
    with pytest.raises(ValueError, match="at most 18000"):
        demo.generate(np.random.default_rng(0), records_per_hospital=18_001)


def test_labels_are_the_specialties(data: demo.DemoData) -> None:
    """Every part has every specialty and no other label; the label set is sorted."""
    assert list(demo.SPECIALTIES) == sorted(set(demo.SPECIALTIES))
    for rows in (data.train, data.public, data.evaluation):
        assert {row["label"] for row in rows} == set(demo.SPECIALTIES)


def test_rows_have_the_documented_keys(data: demo.DemoData) -> None:
    """A row has a text, a label, a client and a patient; shared rows have no hospital."""
    for row in data.train + data.public + data.evaluation:
        assert set(row) == {"text", "label", "client", "patient"}
    assert {row["client"] for row in data.public + data.evaluation} == {"public"}


def test_notes_are_20_to_45_words_long(data: demo.DemoData) -> None:
    """Notes stay within the documented length."""
    lengths = [len(row["text"].split()) for row in data.train + data.public + data.evaluation]
    assert min(lengths) >= 20
    assert max(lengths) <= 45


def test_case_mixes_differ(data: demo.DemoData) -> None:
    """Any two hospitals are at a total-variation distance above one fifth."""
    mixes = []
    for hospital in demo.HOSPITALS:
        counts = Counter(row["label"] for row in data.train if row["client"] == hospital)
        mixes.append(np.array([counts[label] for label in demo.SPECIALTIES]) / 600)
    distances = [
        np.abs(left - right).sum() / 2
        for index, left in enumerate(mixes)
        for right in mixes[index + 1 :]
    ]
    assert len(distances) == 10
    assert min(distances) > 0.2


def test_house_styles_differ(data: demo.DemoData) -> None:
    """Each hospital has a turn of phrase that no other hospital uses."""
    marks = ("c/o", "PC:", "Presents with", "w/o", "who reports")
    for mark in marks:
        assert len({row["client"] for row in data.train if mark in row["text"]}) == 1


def test_private_notes_name_their_patient(data: demo.DemoData) -> None:
    """A private note carries the patient's identifier, name and clinician."""
    for row in data.train:
        assert _MRN.findall(row["text"]) == [row["patient"]]
        assert _NAME.search(row["text"])
        assert _CLINICIAN.search(row["text"])


def test_identities_do_not_leave_the_hospitals(data: demo.DemoData) -> None:
    """No private name or identifier occurs in a public or evaluation text."""
    words = {word for text in _shared_texts(data) for word in re.findall(r"\w+", text)}
    private = " ".join(row["text"] for row in data.train)
    names = {"".join(groups) for groups in _NAME.findall(private)}
    surnames = set(_CLINICIAN.findall(private)) | {part for name in names for part in name.split()}
    assert len(names) > 500
    assert not surnames & words
    assert not any("MRN" in text for text in _shared_texts(data))


def test_shared_notes_have_placeholders(data: demo.DemoData) -> None:
    """De-identified notes say where a name and an identifier stood."""
    assert all("[NAME]" in text and "[ID]" in text for text in _shared_texts(data))


def test_patients_stay_at_one_hospital(data: demo.DemoData) -> None:
    """A patient has one to four notes and one hospital."""
    notes = Counter(row["patient"] for row in data.train)
    homes = {(row["patient"], row["client"]) for row in data.train}
    assert len(homes) == len(notes)
    assert set(notes.values()) == {1, 2, 3, 4}


def test_no_text_is_in_two_parts(data: demo.DemoData) -> None:
    """Evaluation notes occur neither in the private nor in the public part."""
    evaluation = {row["text"] for row in data.evaluation}
    assert len(evaluation) == len(data.evaluation)
    assert evaluation.isdisjoint(row["text"] for row in data.train + data.public)
