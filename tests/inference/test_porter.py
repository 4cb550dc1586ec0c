"""Tests of the stemmer against recorded stems."""

from __future__ import annotations

from fedslm.inference.porter import stem

# Every rule and exception, and words to which none applies; stems of NLTK 3.10.4's PorterStemmer.
WORDS = """
    caresses ponies flies dies ties caress cats feed agreed plastered bled motoring sing conflated
    troubled sized hopping tanned falling hissing fizzed failing filing died spied dying skies happy
    sky enjoy by spy relational conditional rational valenci hesitanci digitizer conformably
    radically differently vilely analogously vietnamization predication operator feudalism
    decisiveness hopefulness callousness formality sensitivity sensibility carefully archaeology
    geology theology triplicate formative formalize electricity electrical hopeful goodness revival
    allowance inference airliner gyroscopic adjustable defensible irritant replacement adjustment
    dependent adoption opinion communism homologou activate angularity homologous effective
    bowdlerize probate rate cease controlling rolling innings news proceed yyyyy toy syzygy b12
    covid19 metastases radiating fractures
"""
STEMS = """
    caress poni fli die tie caress cat feed agre plaster bled motor sing conflat troubl size hop tan
    fall hiss fizz fail file die spi die sky happi sky enjoy by spi relat condit ration valenc hesit
    digit conform radic differ vile analog vietnam predic oper feudal decis hope callous formal
    sensit sensibl care archaeolog geolog theolog triplic form formal electr electr hope good reviv
    allow infer airlin gyroscop adjust defens irrit replac adjust depend adopt opinion commun
    homolog activ angular homolog effect bowdler probat rate ceas control roll inning news proceed
    yyyyy toy syzygi b12 covid19 metastas radiat fractur
"""


def test_stems_are_those_that_rouge_is_reported_with() -> None:
    """Each word has the stem that NLTK gave it."""
    assert [stem(word) for word in WORDS.split()] == STEMS.split()


def test_odd_words_have_stems() -> None:
    """Short and vowelless words, digits, and runs of a letter as long as a text, are no trouble."""
    for word in ("", "a", "by", "2024", "hmm", "y" * 5001):
        assert stem(word) == word
