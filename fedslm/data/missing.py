"""Defines missing values, and the text form of present ones: labels, clients, owners, texts."""

from __future__ import annotations

from decimal import Decimal

EXACT = 2**53  # from here on, one float represents several integers


def is_nothing(value: object) -> bool:
    """True for a missing value: None, NaN (also as a Decimal), NaT, NA.

    >>> is_nothing(float("nan")), is_nothing(0), is_nothing(""), is_nothing([])
    (True, False, False, False)
    """
    if value is None or isinstance(value, str | list | tuple | dict):
        return value is None
    try:
        return bool(value != value)  # only NaN and NaT differ from themselves
    except (TypeError, ArithmeticError):  # pandas' NA has no truth value; a signalling NaN raises
        return True
    except ValueError:  # an array
        return False


def is_missing(value: object) -> bool:
    """True for a missing value, and for text that contains only spaces.

    >>> is_missing(" "), is_missing(float("nan")), is_missing("NA"), is_missing(0)
    (True, True, False, False)
    """
    return not name_of(value)


def name_of(value: object) -> str:
    r"""Returns a label, client or owner as text without outer spaces, for comparison; "" if missing.

    >>> name_of(" a\t"), name_of(7), name_of(7.0), name_of(None)
    ('a', '7', '7', '')
    """
    return "" if is_nothing(value) else written(value).strip()


def written(value: object) -> str:
    """Returns a value as text.

    Formal guarantees:
        * Another record with 1.5 turns a column of integers into floats or decimals; the text of this
          record stays the same: a whole number has no fraction, and a decimal has no trailing zero.

    >>> written(7), written(7.0), written(0.5), written(Decimal("7.00")), written("7.0")
    ('7', '7', '0.5', '7', '7.0')
    """
    if isinstance(value, float) and abs(value) < EXACT:
        value = Decimal(str(float(value)))
    if isinstance(value, Decimal) and value.is_finite():
        text = format(value, "f") if value else "0"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value)
