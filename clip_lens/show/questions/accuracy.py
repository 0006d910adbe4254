"""Does the model tell the texts apart? How often the caption beats the foil."""

from __future__ import annotations

import numpy as np
from pandas import DataFrame

from clip_lens.methods.scores import tally
from clip_lens.show.figures.figure import Figure, carrying
from clip_lens.show.figures.style import template
from clip_lens.show.questions.case import Case, Question
from clip_lens.show.questions.sentences import SIDE_WORDS, by_side, percentage
from clip_lens.show.report.section import Picture, Section, Table
from clip_lens.show.report.words import D
from clip_lens.words import counted

DIFFERENCES = (
    "Bars count pairs by their logit difference d = S(caption) - S(foil). To the right of 0 the model prefers the "
    "true text. d below -1 is called incorrect, from -1 to 1 ambiguous, from 1 on correct."
)
SCORES = "The share of pairs with d > 0, with Wilson's 95 % interval; a tie counts as wrong."


def accuracy(case: Case) -> Section:
    """How often the caption beats the foil, over all pairs and per side."""
    pairs = case.data.frame
    table = case.table("scores", lambda: tally(pairs).drop(columns="tied"))
    shown = table.rename(columns={"mean_d": "mean d", "n": "pairs"})
    formats = dict.fromkeys(("accuracy", "lower", "upper"), ".1%") | {"mean d": ".2f"}
    return Section(
        "Does the model tell the texts apart?",
        findings=[scored(table)],
        pictures=[Picture(_histogram(pairs), "The logit difference of every pair", DIFFERENCES, wide=True)],
        tables=[Table(shown, "Pairwise accuracy, as VALSE reports it", SCORES, formats)],
        pairs=pairs,
        data={"pairs.csv": pairs},
    )


ACCURACY = Question("Accuracy", accuracy, (D,))


def scored(table: DataFrame) -> str:
    """The rows of `scores` as a sentence.

    Example:
        >>> scored(DataFrame({"side": ["overall"], "accuracy": [0.5], "lower": [0.15], "upper": [0.85], "n": [4]}))
        'The caption beats the foil in 50.0 % [15.0, 85.0] of all 4 pairs.'
    """
    questions = table[table["by"] == "question"] if "by" in table else table[:0]
    shares = {
        row["side"]: (percentage(row, "accuracy", digits=1), row["n"])
        for _, row in table.drop(index=questions.index).iterrows()
    }
    share, n = shares.pop("overall")
    of = {side: "without a side" if side == "none" else f"with {SIDE_WORDS[side]}" for side in shares}
    parts = ", ".join(f"{own} of {count} {of[side]}" for side, (own, count) in shares.items())
    asked = "".join(
        f" All foils of a question are beaten in {percentage(row, 'accuracy', digits=1)} of "
        f"{counted(row['n'], 'question')}."
        for _, row in questions.iterrows()
    )
    return f"The caption beats the foil in {share} of all {counted(n, 'pair')}{': ' if parts else ''}{parts}.{asked}"


def _histogram(pairs: DataFrame) -> Figure:
    edges = np.histogram_bin_edges(pairs["d"], bins=min(30, max(5, len(pairs) // 6)))
    bins = {"from": edges[:-1], "to": edges[1:]}
    counts = {side: np.histogram(part["d"], edges)[0] for side, part in by_side(pairs)}
    figure = carrying(Figure(), DataFrame({**bins, **{SIDE_WORDS[side]: counts[side] for side in counts}}))
    for side in counts:
        figure.add_bar(x=(edges[1:] + edges[:-1]) / 2, y=counts[side], name=SIDE_WORDS[side])
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(template=template(), barmode="group", bargap=0.15, height=340, legend=legend, showlegend=True)
    figure.update_xaxes(title_text="d, logits")
    figure.update_yaxes(title_text="pairs")
    return figure
