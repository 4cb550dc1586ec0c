"""What a missing value is: whoever reads a label, a client or an owner asks here."""

from __future__ import annotations


def is_nothing(value: object) -> bool:
    """True for a value that stands for none: None, NaN (a Decimal's too), NaT, NA.

    >>> is_nothing(float("nan")), is_nothing(0), is_nothing(""), is_nothing([])
    (True, False, False, False)
    """
    if value is None or isinstance(value, str | list | tuple | dict):
        return value is None
    try:
        return bool(value != value)  # only such a value differs from itself
    except (TypeError, ArithmeticError):  # the truth of pandas' NA, or a NaN that signals
        return True
    except ValueError:  # an array
        return False


def is_missing(value: object) -> bool:
    """True for nothing, and for a text of spaces only.

    >>> is_missing(" "), is_missing(float("nan")), is_missing("NA"), is_missing(0)
    (True, True, False, False)
    """
    return not name_of(value)


def name_of(value: object) -> str:
    r"""A label, a client or an owner as it is compared: a text without spaces around it; "" if missing.

    >>> name_of(" a\t"), name_of(7), name_of(None)
    ('a', '7', '')
    """
    return "" if is_nothing(value) else str(value).strip()
