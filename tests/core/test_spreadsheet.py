"""A table as CSV is read back as it was, and a spreadsheet finds no formula in it."""

import csv
import io

import numpy as np
import pandas as pd
import pytest

from clip_lens.core.spreadsheet import to_csv, write_csv

FORMULAS = ["=1+1", "+1", "-2+3", "@SUM(A1)", "\tx", "\r=1", "\n=1", '=HYPERLINK("http://x","y")', "=a,b"]


@pytest.mark.parametrize("dtype", [object, "str", "category"])
def test_no_text_begins_as_a_formula_and_each_can_be_read(dtype):
    frame = pd.DataFrame({"caption": pd.Series([*FORMULAS, "a = b", "there's"], dtype=dtype)})
    rows = list(csv.reader(io.StringIO(to_csv(frame), newline="")))
    assert [row[0] for row in rows[1:]] == [*(f"'{text}" for text in FORMULAS), "a = b", "there's"]


def test_numbers_stay_numbers():
    frame = pd.DataFrame(
        {
            "d": [-1.5, np.inf, np.nan],
            "n": [-1, 0, 3],
            "layer": pd.array([-1, None, 2], dtype="Int64"),
            "mixed": pd.Series([-1, "-1", None], dtype=object),
            "kept": [True, False, True],
        }
    )
    found = list(csv.reader(io.StringIO(to_csv(frame))))
    assert found[1:] == [
        ["-1.5", "-1", "-1", "-1", "True"],
        ["inf", "0", "", "'-1", "False"],
        ["", "3", "2", "", "True"],
    ]
    back = pd.read_csv(io.StringIO(to_csv(frame)))
    pd.testing.assert_frame_equal(back[["d", "n", "kept"]], frame[["d", "n", "kept"]])


def test_heads_of_columns_are_texts_too():
    assert to_csv(pd.DataFrame({"=cmd": [1], 3: [2]})).startswith("'=cmd,3\n")
    assert to_csv(pd.DataFrame({"x": []})) == "x\n"
    twice = pd.DataFrame([["=1", "=2"]], columns=["a", "a"])
    assert to_csv(twice) == "a,a\n'=1,'=2\n"


def test_the_table_itself_stays(tmp_path):
    frame = pd.DataFrame({"caption": ["=1"], "d": [1 / 3]})
    write_csv(frame, tmp_path / "a.csv")
    assert frame["caption"].tolist() == ["=1"]
    assert (tmp_path / "a.csv").read_bytes() == b"caption,d\n'=1,0.3333333333333333\n"
    assert to_csv(frame, float_format="%.3g").endswith("0.333\n")
