"""What in the data goes along with the score, whatever the model does with negation?"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from pandas import DataFrame, Series

from clip_lens.methods.confounds import ALL, Confounds
from clip_lens.show.figures.bars import bars
from clip_lens.show.figures.curves import curve
from clip_lens.show.questions.case import Case, Question
from clip_lens.show.questions.sentences import by_side, clear, estimate, opening
from clip_lens.show.report.section import PROBABILITY, Picture, Section, Table
from clip_lens.words import decimals, minus

CORRELATION = (
    "Pearson's r between a feature of the pairs and d, with its 95 % interval (Fisher). A confound is a feature of "
    "the data that goes along with the score, whatever the model does with negation."
)
BY_SIZE = (
    "Pairwise accuracy of the pairs whose subject covers more than this share of the image, with Wilson's 95 % "
    "interval. Pairs without a size are left out; where the negation is in the caption the subject is mostly not in "
    "the picture."
)
REGRESSION = (
    "Ordinary least squares of d on all features at once, over all sides, the side being one of the features. The "
    "coefficient is in logits per unit of the feature, with HC3 standard errors; standardised is the same slope in "
    "standard deviations of d for one of the feature, by which features of different units compare. The note says why "
    "a feature has no coefficient."
)
P = {"p": PROBABILITY}


def what_confounds(case: Case) -> Section:
    """What in the data goes along with the score."""
    found = case.data
    tables = {
        "correlations": found.correlations(), "regression": found.regression(), "sizes": found.by_size(),
        "accuracy": found.accuracy().drop(columns="tied"),
    }  # fmt: skip
    case.table("confounds", lambda: found.frame)
    for name, table in tables.items():
        case.table(f"confounds-{name}", lambda table=table: table)  # type: ignore[misc]
    along, model = tables["correlations"], tables["regression"]
    of = {"pairs": "of", "n": "pairs"}
    accuracy = "Accuracy with and without the most frequent caption" if found.most_frequent else "Accuracy"
    return Section(
        "What confounds the score?",
        findings=[*confounded(along), regressed(model)],
        pictures=[*_correlations(along, found), *_sizes(tables["sizes"])],
        tables=[
            Table(model.rename(columns=of), "Regression of d on all features", REGRESSION, P, rows=40),
            Table(along.rename(columns=of), "Correlations with d", CORRELATION, P, rows=16),
            Table(tables["accuracy"].rename(columns=of), accuracy, rows=8),
        ],
        notes=[f"{name}: {why}." for name, why in found.missing.items()],
    )


CONFOUNDS = Question("Confounds", what_confounds)


def confounded(correlations: DataFrame) -> list[str]:
    """Which features go along with d, per side, from the rows of `Confounds.correlations`."""
    said = []
    for side, part in by_side(correlations[(correlations["pairs"] == ALL) & (correlations["side"] != "pooled")]):
        known = part.dropna(subset="r")
        sure = known[clear(known)].sort_values("r", key=lambda r: -r.abs())
        names = ", ".join(f"{row['feature']} (r = {estimate(row, 'r')})" for _, row in sure.iterrows())
        words = f"d goes along with {names}" if names else "no feature's correlation with d excludes 0"
        said.append(f"{opening(side)}{words}.")
    return said


def regressed(table: DataFrame) -> str:
    """Which terms of the regression of all pairs stand out, in logits per unit, and in standard deviations."""
    terms = table[(table["pairs"] == ALL) & (table["term"] != "intercept")]
    names = ", ".join(_slope(row) for _, row in terms[clear(terms)].iterrows())
    fit = f"the 95 % intervals of these slopes exclude 0: {names}" if names else "no slope's 95 % interval excludes 0"
    return f"With all features and the side in one regression over all pairs, {fit}."


def _slope(row: Series) -> str:
    raw = f"{row['term']} ({estimate(row, 'coefficient')} logits per unit"
    standardised = row.get("standardised", float("nan"))
    return (
        f"{raw})"
        if pd.isna(standardised)
        else f"{raw}, {minus(decimals(standardised, sign=True))} in standard deviations)"
    )


def _correlations(along: DataFrame, found: Confounds) -> Iterator[Picture]:
    for pairs in dict.fromkeys(along["pairs"]):
        part = along[(along["pairs"] == pairs) & (along["side"] != "pooled")].dropna(subset="r")
        if len(part) and (pairs == ALL or found.most_frequent):
            figure = bars(part, value="r", name="feature")
            figure.update_xaxes(range=[-1, 1])
            words = "all pairs" if pairs == ALL else f'without "{found.most_frequent}"'
            yield Picture(figure, f"Correlation with d, {words}", CORRELATION, numbers=part)


def _sizes(sizes: DataFrame) -> Iterator[Picture]:
    shown = sizes[(sizes["pairs"] == ALL) & (sizes["side"] != "overall") & (sizes["n"] > 0)]
    if len(shown):
        figure = curve(shown, "threshold", "accuracy", lower="lower", upper="upper", by="side")
        figure.update_xaxes(title_text="smallest subject, share of the image")
        yield Picture(figure, "Accuracy by the size of the subject", BY_SIZE, numbers=sizes)
