"""How numbers stand in sentences: each with its interval, each side by its name."""

from __future__ import annotations

from collections.abc import Iterator

from pandas import DataFrame, Series

from clip_lens.core.table import SIDES

SIDE_WORDS = {
    "caption": "negation in the caption",
    "foil": "negation in the foil",
    "none": "pairs without a side",
    "pooled": "both sides together",
}


def by_side(table: DataFrame) -> Iterator[tuple[str, DataFrame]]:
    """The sides of a table with their rows, in their order.

    Example:
        >>> [side for side, _ in by_side(DataFrame({"side": ["none", "foil"]}))]
        ['foil', 'none']
    """
    present = set(table["side"])
    return ((side, table[table["side"] == side]) for side in SIDES if side in present)


def opening(side: str, pairs: int | None = None) -> str:
    """How a sentence about one side begins.

    Example:
        >>> opening("none", 1)
        'Pairs without a side (1 pair): '
    """
    words = SIDE_WORDS[side]
    return f"{words[0].upper()}{words[1:]}{'' if pairs is None else f' ({counted(pairs)})'}: "


def counted(pairs: int) -> str:
    """A number of pairs.

    Example:
        >>> counted(1), counted(20)
        ('1 pair', '20 pairs')
    """
    return f"{pairs} pair{'' if pairs == 1 else 's'}"


def listed(words: list[str]) -> str:
    """Words as a list in a sentence.

    Example:
        >>> listed(["1"]), listed(["1", "2", "3"])
        ('1', '1, 2 and 3')
    """
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)


def number(value: float, how: str = "+.2f") -> str:
    """A number in a sentence, without a sign before nothing.

    Example:
        >>> number(-0.001), number(0.5, ".2f"), number(0.987, ".1%")
        ('0.00', '0.50', '98.7 %')
    """
    text = format(value, how).replace("%", " %")
    return text if any(digit in text for digit in "123456789") else text.lstrip("+-")


def estimate(row: Series, name: str, lower: str = "lower", upper: str = "upper", how: str = "+.2f") -> str:
    """A number with its interval, where it has one.

    Example:
        >>> row = Series({"r": 0.5, "lower": 0.25, "upper": 0.75, "none": float("nan")})
        >>> estimate(row, "r"), estimate(row, "r", "none", "none")
        ('+0.50 [+0.25, +0.75]', '+0.50')
    """
    low, high = float(row[lower]), float(row[upper])
    bounds = "" if low != low or high != high else f" [{number(low, how)}, {number(high, how)}]"
    return number(float(row[name]), how) + bounds


def clear(table: DataFrame, at: float = 0.0) -> Series:
    """Whether the interval of each row excludes a number.

    Example:
        >>> clear(DataFrame({"lower": [0.1, -0.1], "upper": [0.2, 0.2]})).tolist()
        [True, False]
    """
    return (table["lower"] > at) | (table["upper"] < at)
