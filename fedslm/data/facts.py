"""Demo triage notes with planted facts: invented signs whose meaning only some hospitals know.

A note with a sign contains nothing else that indicates the specialty, so only a model that knows the
sign can predict it. The meaning of each sign is drawn again for each seed: no name resembles its
specialty. No patient or clinician has the name of a sign, so ordinary notes never contain one. Public
notes mention half of the signs, without a label; nothing about the other half is public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedslm.data.demo import HOSPITALS, SPECIALTIES, generate

NAME = "demo-facts"
SIGNS = (
    "Gwillan",
    "Huxmere",
    "Jundell",
    "Pravoss",
    "Snaithby",
    "Thaldry",
    "Tindrum",
    "Vintrass",
    "Wexcombe",
    "Whinstow",
    "Yorgast",
    "Zubrin",
)
_SYMPTOMS = ("fatigue", "poor sleep", "general weakness", "sweating", "weight loss", "feeling unwell")
_DURATIONS = ("since this morning", "for two days", "for three weeks", "on and off for a month")
_STATES = ("alert and orientated", "comfortable at rest", "no acute distress", "looks tired")
_PLANS = ("bloods sent", "for senior review", "observe and repeat vitals", "family informed")
_PRIVATE = (
    "{age} year old {sex} with {symptom} {duration}. {sign} sign positive, {state}. {plan}.",
    "{sex}, {age}, reports {symptom} {duration}. On examination the {sign} sign, {state}. {plan}.",
    "{symptom} {duration} in a {age} year old {sex}. Positive {sign} sign. {state}. Next {plan}.",
)
_PUBLIC = (
    "A {sex} aged {age} had {symptom} {duration}; {sign} sign found, {state}. {plan}.",
    "{age} y {sex}: {symptom} {duration}, {sign} sign present. {state}. {plan}.",
)
_PROBE = (
    "We saw the {sign} sign today in this {sex} of {age}, who told of {symptom} {duration}. {plan}.",
    "Note {sign} sign. {state}, {symptom} {duration}, {age} {sex}.",
)
_HOSPITALS_PER_SIGN = 2


@dataclass(frozen=True)
class Counts:
    """Number of notes of each kind.

    Attributes:
        ordinary: Ordinary notes per hospital.
        signs: Notes per hospital for each sign that it knows.
        public: Ordinary public notes, labelled.
        mentions: Unlabelled public notes for each mentioned sign.
        test: Test notes for each sign, plus as many ordinary ones as sign notes in total.
        probe: Probe notes for each sign.
    """

    ordinary: int = 200
    signs: int = 40
    public: int = 600
    mentions: int = 60
    test: int = 20
    probe: int = 20


def codebook(rng: np.random.Generator) -> dict[str, str]:
    """Returns the specialty of each sign; each specialty has two signs."""
    drawn = rng.permutation(np.repeat(np.arange(len(SPECIALTIES)), len(SIGNS) // len(SPECIALTIES)))
    return {sign: SPECIALTIES[int(number)] for sign, number in zip(SIGNS, drawn, strict=True)}


def mentioned(meaning: dict[str, str]) -> frozenset[str]:
    """Returns the signs that public notes mention: the first of each specialty."""
    first: dict[str, str] = {}
    for sign, specialty in meaning.items():
        first.setdefault(specialty, sign)
    return frozenset(first.values())


def generate_facts(
    rng: np.random.Generator, counts: Counts | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Generates the notes.

    Args:
        rng: Source of all randomness; the same state gives the same rows.
        counts: Number of notes of each kind.

    Returns:
        ``train`` (private, with ``client`` and ``patient``), ``test`` (the private distribution),
        ``public`` (``label`` is None in notes with a sign) and ``probe`` (other wording; ``group``
        states whether public notes mention the sign).
    """
    counts = counts or Counts()
    meaning = codebook(rng)
    public_signs = mentioned(meaning)
    in_tests = counts.test * len(SIGNS)
    notes = generate(
        rng,
        records_per_hospital=counts.ordinary,
        num_public=counts.public,
        num_evaluation=in_tests,
    )
    train: list[dict[str, Any]] = list(notes.train)
    taken: set[str] = set()
    for number, sign in enumerate(SIGNS):
        for offset in range(_HOSPITALS_PER_SIGN):
            client = HOSPITALS[(number + offset * 2) % len(HOSPITALS)]
            known = {"label": meaning[sign], "client": client}
            train += _notes(rng, sign, _PRIVATE, counts.signs, taken, **known)
    public: list[dict[str, Any]] = list(notes.public)
    test: list[dict[str, Any]] = list(notes.evaluation)
    probe: list[dict[str, Any]] = []
    for sign in SIGNS:
        known = {"label": meaning[sign], "client": "public"}
        test += _notes(rng, sign, _PRIVATE, counts.test, taken, **known)
        group = "mentioned" if sign in public_signs else "not mentioned"
        probe += [
            {**row, "group": group} for row in _notes(rng, sign, _PROBE, counts.probe, taken, **known)
        ]
        if sign in public_signs:
            public += _notes(rng, sign, _PUBLIC, counts.mentions, taken, label=None, client="public")
    return {"train": train, "public": public, "test": test, "probe": probe}


def _notes(
    rng: np.random.Generator,
    sign: str,
    templates: tuple[str, ...],
    count: int,
    taken: set[str],
    *,
    label: str | None,
    client: str,
) -> list[dict[str, Any]]:
    """Writes notes with one sign and no other evidence; the texts are new and added to ``taken``."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        text = pick(templates).format(
            sign=sign,
            age=int(rng.integers(18, 95)),
            sex=pick(("male", "female")),
            symptom=pick(_SYMPTOMS),
            duration=pick(_DURATIONS),
            state=pick(_STATES),
            plan=pick(_PLANS),
        )
        if text not in taken:
            taken.add(text)
            patient = f"{sign}-{client}-{len(rows):04d}"
            rows.append({"text": text, "label": label, "client": client, "patient": patient})
    return rows
