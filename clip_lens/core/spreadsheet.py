"""Tables as CSV that a spreadsheet opens as what they are: a text in a cell is never run as a formula."""

from __future__ import annotations

import os
from typing import Any

import pandas as pd
from pandas import DataFrame

from clip_lens.files import written_whole

FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a spreadsheet takes a cell for a formula by, when the cell begins with it."""


def to_csv(frame: DataFrame, *, float_format: str | None = None) -> str:
    """A table as CSV, without its index.

    Texts that a spreadsheet would run as a formula, in cells and in the heads of columns, get an apostrophe before
    them, by which it shows them as they are. Numbers stay numbers, negative ones too.

    Example:
        >>> to_csv(DataFrame({"caption": ["=1+1", "a dog"], "d": [-1.5, 2.0]}))
        "caption,d\\n'=1+1,-1.5\\na dog,2.0\\n"
    """
    columns = [column.astype(object).map(_plain) if _may_hold_texts(column) else column for _, column in frame.items()]
    safe = pd.concat(columns, axis=1) if columns else frame.copy()
    safe.columns = [_plain(name) for name in frame.columns]
    texts = (cell for column in columns if _may_hold_texts(column) for cell in column if isinstance(cell, str))
    # a carriage return is quoted only where it ends rows, and would else end one
    end = "\r\n" if any("\r" in text for text in texts) else "\n"
    return str(safe.to_csv(index=False, lineterminator=end, float_format=float_format))


def write_csv(frame: DataFrame, path: str | os.PathLike[str]) -> None:
    """Writes `to_csv`, whole or not at all.

    Example:
        >>> path = getfixture("tmp_path") / "table.csv"
        >>> write_csv(DataFrame({"d": [0.5]}), path)
        >>> path.read_text()
        'd\\n0.5\\n'
    """
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(to_csv(frame))


def _may_hold_texts(column: Any) -> bool:
    return column.dtype.kind not in "biufcmM"


def _plain(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULAS) else cell
