"""Words that all floors say alike: lists cut short, near misses, counts, and numbers as people write them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from math import isnan
from typing import Any

UNITS = "%|logits?|pairs?|edges?|heads?|tokens?|layers?|blocks?|images?|nodes?|texts?|rows|kB|MB"
"""What stands behind a number and belongs to it."""
NUMBERED = "layers?|blocks?|heads?|positions?|figures?|tables?|n|r|f|d"
"""What stands before a number and belongs to it."""
_GLUED = tuple(
    (re.compile(spot, re.IGNORECASE), put)
    for spot, put in (
        (rf"(?<=\d) (?=(?:{UNITS})(?!\w))", "\N{NO-BREAK SPACE}"),
        (rf"(?<!\w)({NUMBERED}) (?=\d)", "\\1\N{NO-BREAK SPACE}"),
        (r" ([=<>\u2265]) (?=[\d.+\u2212-])", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}"),
        (r"(?<=[\d%]) (?=\[[\d+\u2212-])", "\N{NO-BREAK SPACE}"),
        (r"(?<=\d), (?=[+\u2212-]?[\d.]+\])", ",\N{NO-BREAK SPACE}"),
    )
)
TINY = 0.001
"""Probabilities below it are said to be below it: their digits say more than resampling or a normal tail can."""


def some(values: Iterable[Any], most: int = 5, *, quote: bool = False) -> str:
    """The first few values, and how many more there are.

    Example:
        >>> some(["a", "b", "c"], 2), some(["a", 3], quote=True)
        ('a, b and 1 more', "'a', 3")
    """
    every = [value.item() if hasattr(value, "item") else value for value in values]
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(repr(value) if quote else str(value) for value in every[:most]) + rest


def close(name: str, names: Iterable[Any], most: int = 20) -> str:
    """What a name may have been meant to be, as the end of an error: the one that is spelt alike, else those there are.

    Example:
        >>> close("fractoin", ["fraction", "effect"]), close("x", ["fraction", "effect"])
        ("; did you mean 'fraction'?", '; there are fraction, effect')
    """
    every = [str(each) for each in names]
    alike = difflib.get_close_matches(name, every, n=1)
    return f"; did you mean {alike[0]!r}?" if alike else f"; there are {some(every, most) or 'none'}"


def unknown(what: str, name: str, names: Iterable[Any]) -> str:
    """What is wrong with a name that there isn't: the nearest one, and all there are.

    Example:
        >>> unknown("kind of site", "heads", ["head", "mlp"])
        "no kind of site 'heads' (did you mean 'head'?); there are head, mlp"
    """
    every = [str(each) for each in names]
    return f"no {what} {name!r}{nearest(name, every)}; there are {some(every, 20) or 'none'}"


def nearest(name: str, names: Iterable[Any]) -> str:
    """The name that is spelt alike, in brackets, if there is one.

    Example:
        >>> nearest("heads", ["head", "mlp"]), nearest("x", ["head"])
        (" (did you mean 'head'?)", '')
    """
    alike = difflib.get_close_matches(name, [str(each) for each in names], n=1)
    return f" (did you mean {alike[0]!r}?)" if alike else ""


def counted(count: int, noun: str, nouns: str = "") -> str:
    """A number of things.

    Example:
        >>> counted(1, "pair"), counted(2, "pair"), counted(2, "axis", "axes")
        ('1 pair', '2 pairs', '2 axes')
    """
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


def decimals(number: float, digits: int = 2, *, sign: bool = False) -> str:
    """A number with so many decimals, with no sign before nothing; empty where there is none.

    Example:
        >>> decimals(-0.001), decimals(0.5, sign=True), decimals(float("nan")), decimals(-1.25, 1)
        ('0.00', '+0.50', '', '-1.2')
    """
    return formatted(number, f"{'+' if sign else ''}.{digits}f")


def formatted(number: Any, how: str) -> str:
    """A number as a format specification has it, with no sign before nothing; empty where there is none.

    Example:
        >>> formatted(-0.001, ".1%"), formatted(-0.001, ".0e"), formatted(float("nan"), ".2f")
        ('-0.1%', '-1e-03', '')
    """
    text = "" if isnan(number) else format(number, how)
    return text if re.search("[1-9]", text) else text.lstrip("+-")


def interval(lower: float, upper: float, digits: int = 2, *, sign: bool = False) -> str:
    """The bounds in brackets; empty where there are none, as below five pairs.

    Example:
        >>> interval(-0.001, 0.5), interval(float("nan"), float("nan"))
        ('[0.00, 0.50]', '')
    """
    if isnan(lower) or isnan(upper):
        return ""
    return f"[{decimals(lower, digits, sign=sign)}, {decimals(upper, digits, sign=sign)}]"


def minus(numbers: str) -> str:
    r"""Numbers with a minus sign instead of a hyphen, as pages show them.

    Example:
        >>> ascii(minus("[-0.50, 0.50]"))
        "'[\\u22120.50, 0.50]'"
    """
    return numbers.replace("-", "\N{MINUS SIGN}")


def unbroken(text: str) -> str:
    r"""The text with no-break spaces inside of what is one number: before its unit, within its interval, around "=".

    Example:
        >>> ascii(unbroken("50 % [40, 60] of 4 pairs in layer 2"))
        "'50\\xa0%\\xa0[40,\\xa060] of 4\\xa0pairs in layer\\xa02'"
    """
    for spot, put in _GLUED:
        text = spot.sub(put, text)
    return text


def probability(p: float) -> str:
    """A p value with three decimals; what they would round to nothing is said to be smaller.

    Example:
        >>> probability(0.0123), probability(1e-9), probability(float("nan"))
        ('0.012', '< .001', '')
    """
    return "< .001" if p < TINY else decimals(p, 3)


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence.

    Example:
        >>> listed(["1"]), listed(["1", "2", "3"])
        ('1', '1, 2 and 3')
    """
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def capital(words: str) -> str:
    """The words with a capital letter first, the others as they are.

    Example:
        >>> capital("the MLP's output")
        "The MLP's output"
    """
    return words[:1].upper() + words[1:]
