"""Every error that fedslm raises deliberately.

FedslmError
├── ConfigError          the configuration cannot be used; lists every problem at once
├── DataError            a source, a column, a label or a client's shard is not usable
├── ModelError           a base model, an adapter or a LoRA target is not usable
├── TrainingError        a self-check of local training failed; nothing was released
│   └── NotRepeated      a repeated pass of a private step gave other bits
├── PrivacyError         a privacy guarantee cannot be given; nothing was released
│   ├── OutOfRange       a value is missing, or epsilon cannot be computed for it: delta=2
│   ├── BudgetExceeded   the release would exceed the client's budget
│   ├── PolicyRefused    the node's own policy does not allow what the server asks
│   └── LedgerError      the ledger is unreadable, inconsistent or cannot be written
│       └── RolledBack   the ledger lacks lines that a server has seen
├── MissingPackage       an optional package is not installed; names the extra that installs it
├── FederationError      the run cannot continue (no clients, too many failed rounds)
│   ├── FrozenMissing    a client lacks the frozen tensors that the server names; it asks for them
│   ├── NeedsTime        a request leaves less time than the node's policy takes; it asks for more
│   └── Unanswered       the SuperLink did not answer a call in time; the round can continue
└── RunError             a run directory cannot be created, resumed or written
        ├── Refused          a key, a fingerprint or a signature is not the expected one
        └── Unusable         a given directory, file or name is not what the command needs
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


def printable(text: str, longest: int | None = None) -> str:
    r"""Returns text from an untrusted source as one line without terminal control sequences.

    Args:
        text: The text.
        longest: Maximum number of characters to show; None: all.

    >>> printable("a\nb\x1b[2J"), printable("abc", 2)
    ('a b [2J', 'ab')
    """
    return "".join(each if each.isprintable() else " " for each in text[:longest])


class FedslmError(Exception):
    """The base class of all errors below; the command line prints it without a traceback."""


@dataclass(frozen=True)
class Problem:
    """One problem in a configuration.

    Attributes:
        key: Dotted key, such as ``privacy.delta``.
        message: What is wrong: value, bound and remedy.
    """

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class ConfigError(FedslmError):
    """The configuration cannot be used.

    Args:
        problems: All problems, not only the first.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        lines = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(f"{plural(len(problems), 'problem')} in the configuration\n{lines}")


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Returns a text with other names for config keys and arguments, such as the options of a command.

    A name without a dot counts only before "=", since it may be a word of a sentence.

    >>> renamed("data.source='a'; set the unit with unit=b", {"data.source": "FILE", "unit": "--unit"})
    "FILE='a'; set the unit with --unit=b"
    >>> renamed("data.source='a'", {})
    "data.source='a'"
    """
    if not names:
        return text
    keys = "|".join(re.escape(each) + ("" if "." in each else "(?==)") for each in names)
    return re.sub(rf"(?<![\w.'\"/-])({keys})(?!\w|\.\w)", lambda found: names[found[1]], text)


@contextmanager
def told_as(names: Mapping[str, str]) -> Iterator[None]:
    """Renames config keys and arguments in the errors of a block, as :func:`renamed` does."""
    try:
        yield
    except ConfigError as error:
        problems = [(names.get(each.key, each.key), each.message) for each in error.problems]
        raise ConfigError([Problem(key, renamed(text, names)) for key, text in problems]) from error
    except FedslmError as error:
        error.args = (renamed(str(error), names), *error.args[1:])
        raise


class DataError(FedslmError):
    """A source, a column, a label or a client's shard is not usable."""


class ModelError(FedslmError):
    """A base model, an adapter or a LoRA target is not usable."""


class TrainingError(FedslmError):
    """A self-check of local training failed; nothing was released."""


class NotRepeated(TrainingError):
    """A repeated pass of a private step gave other bits; nothing was released."""


class PrivacyError(FedslmError):
    """A privacy guarantee cannot be given; nothing was released."""


class OutOfRange(PrivacyError):
    """A value is missing, or epsilon cannot be computed for it; nothing was refused."""


class BudgetExceeded(PrivacyError):
    """The release would exceed the client's budget."""


class PolicyRefused(PrivacyError):
    """The node's own policy does not allow what the server asks; the text holds only public values."""


class LedgerError(PrivacyError):
    """The ledger is unreadable, inconsistent or cannot be written."""


class RolledBack(LedgerError):
    """The ledger lacks lines that a server has seen; the text holds only public values."""


class MissingPackage(FedslmError):
    """An optional package is not installed; the text names the extra that installs it."""


class FederationError(FedslmError):
    """The run cannot continue."""


class FrozenMissing(FederationError):
    """A client lacks the frozen tensors that the server names; its reply asks for them."""


class NeedsTime(FederationError):
    """A request leaves less time than a node's policy takes; its reply asks for more.

    Args:
        text: The reason; it holds only public values.
        seconds: The time after which the node answers.
    """

    def __init__(self, text: str, seconds: float) -> None:
        super().__init__(text)
        self.seconds = seconds


class Unanswered(FederationError):
    """The SuperLink did not answer a call in time; the round can continue without the answer."""


class RunError(FedslmError):
    """A run directory cannot be created, resumed or written."""


class Refused(RunError):
    """A key, a fingerprint or a signature is not the expected one."""


class Unusable(RunError):
    """A given directory, file or name is not what the command needs."""


def plural(number: int, noun: str) -> str:
    """Returns a number with its noun.

    >>> plural(1, "record"), plural(3000, "record")
    ('1 record', '3000 records')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def have(number: int, noun: str) -> str:
    """Returns a number with its noun and verb.

    >>> have(1, "record"), have(2, "record")
    ('1 record has', '2 records have')
    """
    return f"{plural(number, noun)} {'has' if number == 1 else 'have'}"
