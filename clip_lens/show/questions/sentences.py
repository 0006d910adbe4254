"""How numbers stand in sentences: each with its interval, each side by its name."""

from __future__ import annotations

from collections.abc import Iterator

from pandas import DataFrame, Series

from clip_lens.core.table import SIDES
from clip_lens.words import capital, counted, decimals, interval, minus

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
        >>> opening("none", 1), opening("foil")
        ('Pairs without a side (1 pair): ', 'Negation in the foil: ')
    """
    count = "" if pairs is None else f" ({counted(pairs, 'pair')})"
    return f"{capital(SIDE_WORDS[side])}{count}: "


def estimate(row: Series, name: str, lower: str = "lower", upper: str = "upper", *, sign: bool = True) -> str:
    """A number with its interval, where it has one.

    Example:
        >>> row = Series({"r": 0.5, "lower": 0.25, "upper": 0.75, "none": float("nan")})
        >>> estimate(row, "r"), estimate(row, "r", "none", "none", sign=False)
        ('+0.50 [+0.25, +0.75]', '0.50')
    """
    number, bounds = decimals(row[name], sign=sign), interval(row[lower], row[upper], sign=sign)
    return minus(f"{number} {bounds}".rstrip())


def percentage(row: Series, name: str, lower: str = "lower", upper: str = "upper", digits: int = 0) -> str:
    """A share in per cent with its interval, where it has one.

    Example:
        >>> percentage(Series({"accuracy": 0.5, "lower": 0.25, "upper": 0.75}), "accuracy")
        '50 % [25, 75]'
    """
    number, low, high = (100 * row[end] for end in (name, lower, upper))
    return f"{decimals(number, digits)} % {interval(low, high, digits)}".rstrip()


def clear(table: DataFrame, at: float = 0.0) -> Series:
    """Whether the interval of each row excludes a number.

    Example:
        >>> clear(DataFrame({"lower": [0.1, -0.1], "upper": [0.2, 0.2]})).tolist()
        [True, False]
    """
    return (table["lower"] > at) | (table["upper"] < at)
