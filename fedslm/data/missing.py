"""What a missing value is, and how one that is there is written: labels, clients, owners, texts."""

from __future__ import annotations

from decimal import Decimal

EXACT = 2**53  # from here on a float stands for several whole numbers


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

    >>> name_of(" a\t"), name_of(7), name_of(7.0), name_of(None)
    ('a', '7', '7', '')
    """
    return "" if is_nothing(value) else written(value).strip()


def written(value: object) -> str:
    """A value as text.

    Formal guarantees:
        * One other record with 1.5 makes a column of integers one of floats or decimals; what this one
          says stays the same: a whole number has no fraction, and a decimal ends with no zero.

    >>> written(7), written(7.0), written(0.5), written(Decimal("7.00")), written("7.0")
    ('7', '7', '0.5', '7', '7.0')
    """
    if isinstance(value, float) and abs(value) < EXACT:
        value = Decimal(str(float(value)))
    if isinstance(value, Decimal) and value.is_finite():
        text = format(value, "f") if value else "0"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value)
