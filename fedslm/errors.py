"""Every error that fedslm raises on purpose.

FedslmError
├── ConfigError          the configuration cannot be used; lists every problem at once
├── DataError            a source, a column, a label or a client's shard is not usable
├── ModelError           a base model, an adapter or a LoRA target is not usable
├── TrainingError        a self-check of local training failed; nothing was released
├── PrivacyError         a privacy guarantee cannot be given; nothing was released
│   ├── OutOfRange       a value that was given, or is missing, says nothing of privacy: delta=2
│   ├── BudgetExceeded   the release would exceed the client's budget
│   ├── PolicyRefused    the node's own policy does not allow what the server asks
│   └── LedgerError      the ledger is unreadable, inconsistent or cannot be written
│       └── RolledBack   the ledger lacks lines that a server has seen
├── FederationError      the run cannot go on (no clients, too many failed rounds)
│   ├── FrozenMissing    a client lacks the frozen tensors that the server names; it asks for them
│   └── Unanswered       the SuperLink did not answer a call within its time; the round can go on
└── RunError             a run directory cannot be created, resumed or written
    ├── Refused          a key, a fingerprint or a signature is not the one that is expected
    └── Unusable         a directory, a file or a name that was given is not what the command needs
"""

from __future__ import annotations

from dataclasses import dataclass


def printable(text: str, longest: int | None = None) -> str:
    r"""What is shown of a text from outside: one line, which no terminal obeys.

    Args:
        text: The text.
        longest: How much of it is shown; None: all.

    >>> printable("a\nb\x1b[2J"), printable("abc", 2)
    ('a b [2J', 'ab')
    """
    return "".join(each if each.isprintable() else " " for each in text[:longest])


class FedslmError(Exception):
    """The base of all errors below; the command line prints it without a traceback."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

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
        problems: Everything that is wrong, not only the first.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        lines = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(f"{plural(len(problems), 'problem')} in the configuration\n{lines}")


class DataError(FedslmError):
    """A source, a column, a label or a client's shard is not usable."""


class ModelError(FedslmError):
    """A base model, an adapter or a LoRA target is not usable."""


class TrainingError(FedslmError):
    """A self-check of local training failed; nothing was released."""


class PrivacyError(FedslmError):
    """A privacy guarantee cannot be given; nothing was released."""


class OutOfRange(PrivacyError):
    """A value is missing, or is not one that epsilon can be computed for; nothing was refused."""


class BudgetExceeded(PrivacyError):
    """The release would exceed the client's budget."""


class PolicyRefused(PrivacyError):
    """The node's own policy does not allow what the server asks; the text holds public values alone."""


class LedgerError(PrivacyError):
    """The ledger is unreadable, inconsistent or cannot be written."""


class RolledBack(LedgerError):
    """The ledger lacks lines that a server has seen; the text holds public values alone."""


class FederationError(FedslmError):
    """The run cannot go on."""


class FrozenMissing(FederationError):
    """A client lacks the frozen tensors that the server names; its reply asks for them."""


class Unanswered(FederationError):
    """The SuperLink did not answer a call within its time; the round can go on without the answer."""


class RunError(FedslmError):
    """A run directory cannot be created, resumed or written."""


class Refused(RunError):
    """A key, a fingerprint or a signature is not the one that is expected."""


class Unusable(RunError):
    """A directory, a file or a name that was given is not what the command needs."""


def plural(number: int, noun: str) -> str:
    """A number with its noun.

    >>> plural(1, "record"), plural(3000, "record")
    ('1 record', '3000 records')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def have(number: int, noun: str) -> str:
    """A number with its noun and the verb.

    >>> have(1, "record"), have(2, "record")
    ('1 record has', '2 records have')
    """
    return f"{plural(number, noun)} {'has' if number == 1 else 'have'}"
