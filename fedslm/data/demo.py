"""Fictional triage notes of five invented hospitals, generated offline.

Nothing here describes a real person: patients, clinicians, identifiers and hospitals are assembled from
syllables and random digits. Private notes contain such invented identities, so that leakage can be
demonstrated; public and evaluation notes contain ``[NAME]`` and ``[ID]``.

The task is to predict the specialty a note should be referred to. It is learnable but not trivial:
specialties share symptoms, notes mention what the patient *denies* and a history of other
specialties, and about one note in twenty-five is drawn half from a second specialty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def _split(text: str) -> tuple[str, ...]:
    """Split a ``|``-separated table row into fragments."""
    return tuple(" ".join(part.split()) for part in text.split("|"))


@dataclass(frozen=True)
class _Vocabulary:
    """Fragments typical of one specialty."""

    symptoms: tuple[str, ...]
    findings: tuple[str, ...]
    histories: tuple[str, ...]
    plans: tuple[str, ...]


def _parse(table: str) -> _Vocabulary:
    """Read a vocabulary from ``kind: fragment | fragment`` entries."""
    _, *entries = re.split(r"(\w+):", table)
    kinds = dict(zip(entries[::2], map(_split, entries[1::2]), strict=True))
    return _Vocabulary(**kinds)


_VOCABULARY = {
    "cardiology": _parse("""
        symptoms: central chest pain | chest tightness on exertion | palpitations |
        shortness of breath | pain spreading to the left arm | swelling of both ankles |
        dizziness on standing | a blackout while walking | breathlessness lying flat |
        a racing heartbeat | a fluttering heartbeat | jaw ache when climbing stairs |
        waking at night gasping
        findings: irregular pulse | raised jugular pressure | systolic murmur at the apex |
        pitting oedema to the knees | displaced apex beat | a third heart sound |
        st depression in the lateral leads | bibasal crackles | a slow regular pulse |
        cool peripheries | widespread t wave inversion
        histories: a previous heart attack | atrial fibrillation | high blood pressure |
        a coronary stent | heart failure | a leaking mitral valve | a pacemaker
        plans: repeat troponin | cardiac monitor | echocardiogram | glyceryl trinitrate given |
        diuretic started
    """),
    "gastroenterology": _parse("""
        symptoms: upper abdominal pain | vomiting after meals | loose stools | blood in the stool |
        heartburn at night | burning behind the breastbone | bloating | difficulty swallowing |
        yellowing of the eyes | black tarry stools | cramps below the navel | constipation |
        central chest pain | loss of appetite
        findings: epigastric tenderness | distended abdomen | guarding in the right lower quadrant |
        palpable liver edge | high pitched bowel sounds | icteric sclerae | shifting dullness |
        tender gallbladder | melaena on the glove | scaphoid abdomen
        histories: stomach ulcers | gallstones | acid reflux | ulcerative colitis | fatty liver |
        a bowel polyp removed | coeliac disease
        plans: liver panel sent | endoscopy requested | nil by mouth | abdominal ultrasound |
        antacid given
    """),
    "infectious disease": _parse("""
        symptoms: shaking chills | drenching night sweats | a spreading rash | a sore throat |
        swollen neck glands | muscle aches all over | a productive cough | loose stools |
        a hot red calf | headache with neck stiffness | burning on passing urine | a weeping wound |
        fever after travel
        findings: tender cervical nodes | pus at the wound edge | non blanching spots |
        warm spreading erythema | exudate on the tonsils | flushed and sweating |
        enlarged spleen tip | coarse crackles at one base | vesicles along one rib |
        tick bite with a ring
        histories: travel to the tropics | contact with a feverish child | shingles | malaria |
        repeated urine infections | a tick bite last month | cellulitis
        plans: blood cultures taken | isolation room | broad antibiotics started | viral swab sent |
        lumbar puncture planned
    """),
    "neurology": _parse("""
        symptoms: slurred speech | weakness of one arm | a throbbing headache | double vision |
        tingling in both hands | a blackout while walking | a witnessed seizure | unsteady walking |
        memory lapses | facial droop | headache with neck stiffness | numbness down one leg |
        dizziness on standing | a hand tremor at rest
        findings: left sided facial weakness | brisk reflexes | upgoing plantar |
        nystagmus on left gaze | reduced sensation in a glove pattern | pronator drift |
        broad based gait | neglect of one side | cogwheel rigidity | unequal pupils
        histories: epilepsy | migraine | a previous stroke | multiple sclerosis |
        a transient ischaemic attack | parkinsonism | a head injury years ago
        plans: head scan requested | stroke team called | nerve conduction tests |
        levetiracetam loaded | hourly coma scores
    """),
    "orthopaedics": _parse("""
        symptoms: knee pain after a fall | a twisted ankle | lower back pain | a stiff shoulder |
        hip pain on walking | a swollen wrist | pain on bearing weight | numbness down one leg |
        a locked knee | tingling in both hands | a painful heel | a hot swollen joint |
        neck pain after a collision
        findings: bony ankle tenderness | shortened and rotated leg | effusion of the knee |
        reduced shoulder abduction | positive straight leg raise | deformed distal radius |
        painful arc | tender scaphoid | laxity of the ligament | spasm beside the spine
        histories: a hip replacement | osteoporosis | a fractured wrist | knee arthritis |
        a slipped disc | gout | a rotator cuff repair
        plans: plain films requested | plaster cast applied | sling fitted | crutches issued |
        splint and elevation
    """),
    "pulmonology": _parse("""
        symptoms: shortness of breath | wheezing at night | a productive cough | coughing up blood |
        sharp pain on breathing in | a dry cough for weeks | breathlessness on one flight |
        noisy breathing | green sputum | a tight chest in cold air | morning cough |
        breathlessness lying flat | chest tightness on exertion
        findings: polyphonic wheeze | dull percussion at the right base | reduced air entry |
        bibasal crackles | coarse crackles at one base | pursed lip breathing | barrel chest |
        clubbed fingers | use of accessory muscles | absent breath sounds on one side
        histories: asthma | emphysema | a clot on the lung | home oxygen | sleep apnoea |
        bronchiectasis | a collapsed lung
        plans: nebuliser given | arterial gas taken | peak flow chart | chest drain set prepared |
        inhaler technique checked
    """),
}

SPECIALTIES: tuple[str, ...] = tuple(sorted(_VOCABULARY))
"""The labels, sorted."""

_SHARED = _parse("""
    symptoms: fatigue | fever | nausea | general weakness | poor sleep | weight loss | sweating |
    back pain | light headedness | feeling unwell | anxiety | aching all over | headache |
    chest pain | cough
    findings: looks tired | alert and orientated | no acute distress | mildly dehydrated | pale |
    comfortable at rest | in some discomfort | chest clear | abdomen soft | heart sounds normal |
    no focal deficit
    histories: diabetes | high cholesterol | no major illness | smoking | thyroid disease |
    anaemia | kidney stones | hay fever | depression
    plans: bloods sent | analgesia given | for senior review | observe and repeat vitals |
    fluids started | chest film requested | ecg done | family informed
""")
_DURATIONS = _split(
    "since this morning|for two days|for three weeks|since last night|on and off for a month"
    "|for a few hours|after work|getting worse since Monday|for five days"
)

_FIRST_STARTS = _split("Bre|Cal|Dov|Fenn|Ior|Jast|Kelv|Lorr|Mav|Nyl|Ost|Pell|Quin|Rosk|Tavv|Ulv")
_FIRST_ENDS = _split("awen|eda|ira|oric|undra|yth|elo|issa|anth|umar")
_LAST_STARTS = _split("Ambr|Brocc|Crant|Dunv|Elsk|Farn|Grend|Holv|Ivel|Kesp|Lorm|Mornt|Osk|Quarr")
_LAST_ENDS = _split("abeck|ibourne|ocroft|edale|agate|oham|iley|emore|aridge|ostead|ithorpe|wick")

_OWN_SYMPTOM_RATES = (0.92, 0.62)
_OWN_FINDING_RATE = 0.74
_OWN_HISTORY_RATE = 0.45
_OWN_PLAN_RATE = 0.30
_AMBIGUOUS_RATE = 0.04
_SAME_SPECIALTY_RATE = 0.8
_MAX_NOTES_PER_PATIENT = 4
_ELSEWHERE_RATE = 0.6
_OPTIONAL_RATE = 0.65
_OPTIONAL = re.compile(r"{(history|temperature)}")
_NUM_WORDS = (20, 45)


@dataclass(frozen=True)
class _House:
    """One hospital: its case mix (in the order of `SPECIALTIES`) and its writing style."""

    name: str
    mix: tuple[float, ...]
    template: str
    """Sections separated by ``~``; history or vital signs may be missing."""


_HOUSES = (
    _House(
        "Aldermoor Heart Centre",
        (0.46, 0.10, 0.06, 0.10, 0.06, 0.22),
        "Pt {name} ({mrn}), {age} yo {sex}, c/o {first} and {second} {duration}."
        "~Hx of {history}.~Denies {denied}. O/E {finding}, {other}."
        "~HR {pulse} BP {pressure} T {temperature} SpO2 {oxygen}%.~Plan {plan}. Dr {clinician}.",
    ),
    _House(
        "Brackwater General Hospital",
        (0.14, 0.36, 0.26, 0.06, 0.10, 0.08),
        "{mrn} {name} {age}/{initial}. PC: {first}, {second}, {duration}.~PMH: {history}."
        "~Neg for {denied}.~Temp {temperature}, bp {pressure}, sats {oxygen}."
        "~Exam: {finding}; {other}. {plan}. Sgd Dr {clinician}.",
    ),
    _House(
        "Cinderhill Infirmary",
        (0.08, 0.06, 0.12, 0.44, 0.24, 0.06),
        "{name}, {mrn}, {sex} aged {age}, triaged by Dr {clinician}."
        "~Past history includes {history}.~Presents with {first} {duration}; also {second}."
        " No {denied}.~Pulse {pulse}, temperature {temperature}, saturation {oxygen}."
        "~On examination {finding} and {other}. Next {plan}.",
    ),
    _House(
        "Dunmere Coast Clinic",
        (0.06, 0.14, 0.08, 0.10, 0.52, 0.10),
        "VS {pulse}, {pressure}, {temperature}C, {oxygen}%RA."
        "~{name} {mrn} {age}{initial} w/ {first} + {second} {duration}; w/o {denied}."
        "~h/o {history}.~Ex: {finding}, {other}. Rx: {plan}. Dr {clinician}",
    ),
    _House(
        "Eastfell Valley Hospital",
        (0.10, 0.08, 0.34, 0.06, 0.06, 0.36),
        "The patient {name}, record {mrn}, is a {age} year old {sex} who reports {first}"
        " {duration}. There is also {second} but not {denied}.~Known for {history}."
        "~Found {finding}, {other}.~Temp {temperature}, sats {oxygen}.~{plan}. Dr {clinician}.",
    ),
)

HOSPITALS: tuple[str, ...] = tuple(house.name for house in _HOUSES)
"""The invented hospitals; each is one client."""


@dataclass(frozen=True)
class DemoData:
    """Rows with the keys ``text``, ``label``, ``client`` and ``patient``."""

    train: list[dict[str, str]]
    """Private notes, hospital by hospital; they name invented patients."""
    public: list[dict[str, str]]
    """De-identified notes for public pretraining; ``client`` is ``"public"``."""
    evaluation: list[dict[str, str]]
    """De-identified notes for evaluation; ``client`` is ``"public"``."""


@dataclass(frozen=True)
class _Identity:
    """The identities of patient and clinician in a note."""

    name: str = "[NAME]"
    mrn: str = "[ID]"
    clinician: str = "[NAME]"


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Pick one of the options uniformly."""
    return options[int(rng.integers(len(options)))]


def _draw_specialty(rng: np.random.Generator, mix: Sequence[float] | None = None) -> str:
    """Draw a specialty by the case mix, or uniformly."""
    return SPECIALTIES[int(rng.choice(len(SPECIALTIES), p=mix))]


def _draw_findings(rng: np.random.Generator, sources: Sequence[str]) -> dict[str, str]:
    """Draw the findings, which may or may not identify the specialty."""
    elsewhere = _VOCABULARY[_draw_specialty(rng)]

    def draw(kind: str, own_rate: float, *, other: _Vocabulary = _SHARED) -> str:
        own = _VOCABULARY[_pick(rng, sources)]
        return _pick(rng, getattr(own if rng.random() < own_rate else other, kind))

    stranger = elsewhere if rng.random() < _ELSEWHERE_RATE else _SHARED
    symptoms = [draw("symptoms", rate) for rate in _OWN_SYMPTOM_RATES]
    if rng.random() < 0.3:
        symptoms.reverse()
    return {
        "first": symptoms[0],
        "second": symptoms[1],
        "duration": _pick(rng, _DURATIONS),
        "finding": draw("findings", _OWN_FINDING_RATE),
        "other": _pick(rng, _SHARED.findings),
        "history": draw("histories", _OWN_HISTORY_RATE, other=stranger),
        "denied": _pick(rng, stranger.symptoms).removeprefix("a "),
        "plan": draw("plans", _OWN_PLAN_RATE),
    }


def _draw_vitals(rng: np.random.Generator, specialty: str) -> dict[str, str]:
    """Draw age, sex and vital signs; fever and low oxygen hint at two of the specialties."""
    feverish = rng.random() < (0.5 if specialty == "infectious disease" else 0.12)
    starved = rng.random() < (0.5 if specialty == "pulmonology" else 0.1)
    sex = _pick(rng, ("male", "female"))
    return {
        "age": str(rng.integers(18, 95)),
        "sex": sex,
        "initial": sex[0].upper(),
        "pulse": str(rng.integers(58, 124)),
        "pressure": f"{rng.integers(98, 176)}/{rng.integers(56, 102)}",
        "temperature": f"{(38.1 if feverish else 36.2) + rng.integers(14) / 10:.1f}",
        "oxygen": str(rng.integers(86, 93) if starved else rng.integers(94, 100)),
    }


def _write_note(rng: np.random.Generator, house: _House, *, label: str, identity: _Identity) -> str:
    """Write a note in the hospital's style, within the length bounds."""
    while True:
        sources = [label]
        if rng.random() < _AMBIGUOUS_RATE:
            sources.append(_draw_specialty(rng))
        fields = _draw_findings(rng, sources) | _draw_vitals(rng, _pick(rng, sources))
        sections = [
            section
            for section in house.template.split("~")
            if not _OPTIONAL.search(section) or rng.random() < _OPTIONAL_RATE
        ]
        text = " ".join(sections).format(**vars(identity), **fields)
        named = {fields[key] for key in ("first", "second", "denied", "finding", "other")}
        if len(named) == 5 and _NUM_WORDS[0] <= len(text.split()) <= _NUM_WORDS[1]:
            return text


def _draw_surname(rng: np.random.Generator) -> str:
    """Invent a surname."""
    return _pick(rng, _LAST_STARTS) + _pick(rng, _LAST_ENDS)


def _admit(
    rng: np.random.Generator, house: _House, *, num_records: int, mrns: Sequence[int]
) -> list[dict[str, str]]:
    """Write the private notes of one hospital, patient by patient."""
    clinicians = [_draw_surname(rng) for _ in range(8)]
    rows: list[dict[str, str]] = []
    for number in mrns:
        patient = f"MRN-{number}"
        name = f"{_pick(rng, _FIRST_STARTS)}{_pick(rng, _FIRST_ENDS)} {_draw_surname(rng)}"
        usual = _draw_specialty(rng, house.mix)
        for _ in range(int(rng.integers(1, _MAX_NOTES_PER_PATIENT + 1))):
            if len(rows) == num_records:
                return rows
            same = rng.random() < _SAME_SPECIALTY_RATE
            label = usual if same else _draw_specialty(rng, house.mix)
            identity = _Identity(name, patient, _pick(rng, clinicians))
            text = _write_note(rng, house, label=label, identity=identity)
            rows.append({"text": text, "label": label, "client": house.name, "patient": patient})
    return rows


def _publish(
    rng: np.random.Generator, prefix: str, *, num_records: int, taken: set[str]
) -> list[dict[str, str]]:
    """Write de-identified notes in all styles with an even case mix; adds their texts to `taken`."""
    rows: list[dict[str, str]] = []
    while len(rows) < num_records:
        house = _HOUSES[int(rng.integers(len(_HOUSES)))]
        label = _draw_specialty(rng)
        text = _write_note(rng, house, label=label, identity=_Identity())
        if text not in taken:
            taken.add(text)
            patient = f"{prefix}-{len(rows):05d}"
            rows.append({"text": text, "label": label, "client": "public", "patient": patient})
    return rows


def generate(
    rng: np.random.Generator,
    *,
    records_per_hospital: int = 600,
    num_public: int = 3000,
    num_evaluation: int = 600,
) -> DemoData:
    """Generate the fictional triage notes.

    Args:
        rng: Source of all randomness; the same state gives the same rows. The private and the
            evaluation rows do not depend on `num_public`.
        records_per_hospital: Number of private notes per hospital, 0 to 18,000.
        num_public: Number of de-identified notes for pretraining, at least 0.
        num_evaluation: Number of de-identified notes for evaluation, at least 0.

    Returns:
        The three sets of rows. A patient has one to four private notes, all at the same hospital.

    Raises:
        ValueError: If a count is negative or there are too few identifiers.

    Examples:
        >>> data = generate(np.random.default_rng(0), records_per_hospital=2, num_public=1)
        >>> len(data.train), len(data.public), len(data.evaluation)
        (10, 1, 600)
        >>> data.train[0]["client"], sorted(data.train[0])
        ('Aldermoor Heart Centre', ['client', 'label', 'patient', 'text'])
        >>> "[NAME]" in data.public[0]["text"]
        True
    """
    counts = (records_per_hospital, num_public, num_evaluation)
    if min(counts) < 0:
        raise ValueError(f"counts={counts} must be at least 0; use 0 to leave a part out")
    numbers = np.arange(10_000, 100_000)
    most = numbers.size // len(_HOUSES)
    if records_per_hospital > most:
        raise ValueError(
            f"{records_per_hospital=} must be at most {most}, the identifiers of one hospital"
        )
    seeds = rng.integers(2**63, size=3)
    private_rng, public_rng, evaluation_rng = (np.random.default_rng(int(s)) for s in seeds)
    shares = np.split(private_rng.permutation(numbers), len(_HOUSES))
    train = [
        row
        for house, share in zip(_HOUSES, shares, strict=True)
        for row in _admit(private_rng, house, num_records=records_per_hospital, mrns=share.tolist())
    ]
    taken: set[str] = set()
    evaluation = _publish(evaluation_rng, "EVAL", num_records=num_evaluation, taken=taken)
    public = _publish(public_rng, "PUBLIC", num_records=num_public, taken=taken)
    return DemoData(train=train, public=public, evaluation=evaluation)
