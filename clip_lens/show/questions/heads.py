"""Which heads? Those that look at the negator, and those that move the score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pandas import DataFrame, Series

from clip_lens.core.effects import Effects
from clip_lens.methods import registry
from clip_lens.methods.attention import attention_effects, attention_record
from clip_lens.methods.statistics import correlations
from clip_lens.model.site import Site
from clip_lens.show.figures.curves import curve
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.figures.words import SIDE_NAMES
from clip_lens.show.questions.case import Case, Question
from clip_lens.show.questions.sentences import SIDE_WORDS, by_side, clear, estimate, opening
from clip_lens.show.report.effects_section import section_of
from clip_lens.show.report.section import Picture, Section, Table
from clip_lens.words import listed

SELECTIVE = 0.6
"""A head counts as selective when its mean selectivity is at least this."""
MOST = 10
"""Heads that the table shows on each side."""

SELECTIVITY = (
    "How much more a head attends to the negator, in the text with the negation, than to the word in its place in "
    "the text without: the largest difference over the later positions (Quantmeyer et al. 2024), averaged over the "
    "pairs of a side. 0 means no more, 1 means with all of its attention."
)
BY_QUERY = (
    "The same difference for each slot that looks back (rows) and each head of the block (columns): it shows which "
    "words attend to the negator. Of a slot with several tokens, the largest counts."
)
BLOCKS = "The mean over the heads of a block of the numbers above, with 95 % bootstrap intervals over pairs."
CORRELATED = (
    "Pearson's r over pairs between a head's selectivity and d. Blue: the more a head looks at the negator, the "
    "better the model tells the texts apart; red: the worse."
)
TOP = "Mean over the pairs of each side, with 95 % bootstrap intervals."
MOVED = (
    "Here each head's output, at every position, is taken from the text with the negation, and everything after it is "
    "computed from there. Where heads share the work, each shows less than its part: effects of single heads need not "
    "add up."
)


def heads_that_look(case: Case) -> Section:
    """Which heads attend to the negator, and whether that goes along with the score; over all pairs of a side."""
    encoder, batch, record = case.encoder, case.batch, attention_record(case.reading)
    later = batch.slots[batch.slots.index("negator") + 1 :]
    queries = [slot for slot in later if slot in batch.occurring]
    whole = case.read("selectivity", record, encoder.sites("pattern"), lambda: attention_effects(encoder, batch))
    at = case.read(
        "selectivity-by-slot", record, encoder.sites("pattern", slots=queries),
        lambda: attention_effects(encoder, batch, queries=queries),
    )  # fmt: skip
    table, blocks = whole.table(), of_blocks(whole).table()
    along = case.table("selectivity-correlations", lambda: correlations(whole))
    return Section(
        "Which heads look at the negator?",
        findings=[*selective(table), of_each_block(blocks), *along_with_d(along)],
        pictures=[*_selectivity(whole, blocks), *_by_query(at, blocks), *_correlated(along)],
        tables=[Table(_top(table), "The most selective heads", TOP)],
        headline=headline(table),
        meta=whole.meta,
        data={
            "selectivity.csv": table, "selectivity-by-block.csv": blocks, "selectivity-by-slot.csv": at.table(),
            "correlations.csv": along,
        },
    )  # fmt: skip


def heads_that_move(case: Case) -> Section:
    """Which heads move the score when their output comes from the other text, through everything behind them."""
    section = section_of("heads", case.chosen(case.patched("heads", case.encoder.sites("head"))))
    pictures = [
        replace(picture, title=f"Heads patched: {picture.title[:1].lower()}{picture.title[1:]}")
        for picture in section.pictures
    ]
    return replace(section, title="Which heads move it?", text=MOVED, pictures=pictures, pairs=None)


LOOK = Question("Heads that look", heads_that_look, (registry.SELECTIVITY.definition,))
MOVE = Question("Heads that move", heads_that_move)


def of_blocks(effects: Effects) -> Effects:
    """The mean over the heads of each block, from a result of `attention_effects` by head."""
    layers = sorted(set(effects.index["layer"]))
    values = effects.values.unflatten(0, (len(layers), -1)).mean(1)
    return replace(effects, values=values, places=tuple(Site("pattern", layer) for layer in layers))


def headline(table: DataFrame) -> str:
    """How many heads look at the negator, and which most, on each side, for the head of a page."""
    parts = []
    for side, part in by_side(table):
        chosen, top = part["fraction"] >= SELECTIVE, part.loc[part["fraction"].idxmax()]
        parts.append(f"{int(chosen.sum())} of {len(part)}, head {head(top)} the most ({SIDE_WORDS[side]})")
    return f"Which heads? Clearly looking at the negator (selectivity of {SELECTIVE} or more) are {'; '.join(parts)}."


def selective(table: DataFrame) -> list[str]:
    """How many heads are selective on each side, and which most."""
    said = []
    for side, part in by_side(table):
        chosen = part[part["fraction"] >= SELECTIVE]
        blocks = ", ".join(map(str, sorted({int(layer) for layer in chosen["layer"]})))
        sure = int((chosen["lower"] > SELECTIVE).sum())
        told = f" (blocks {blocks}; the intervals of {sure} lie above that)" if len(chosen) else ""
        top = part.loc[part["fraction"].idxmax()]
        said.append(
            f"{opening(side, top['n'])}{len(chosen)} of {len(part)} heads have a selectivity of {SELECTIVE} or more"
            f"{told}; the largest is that of head {head(top)}, {_share(top)}."
        )
    return said


def of_each_block(table: DataFrame) -> str:
    """The block with the largest mean over its heads, on each side."""
    best = {side: part.loc[part["fraction"].idxmax()] for side, part in by_side(table)}
    parts = [f"block {row['layer']} with {_share(row)} for {SIDE_WORDS[side]}" for side, row in best.items()]
    return f"Averaged over the heads of a block, selectivity is largest in {listed(parts)}."


def along_with_d(table: DataFrame) -> list[str]:
    """Which head's selectivity goes along with d on each side, from the rows of `correlations`."""
    said = []
    for side, part in by_side(table):
        known = part.dropna(subset="r")
        if known.empty:
            said.append(f"{opening(side)}no head's selectivity can be correlated with d.")
            continue
        top = known.loc[known["r"].abs().idxmax()]
        said.append(
            f"{opening(side)}the strongest correlation of a head's selectivity with d is that of head {head(top)}, "
            f"r = {estimate(top, 'r')}. The intervals of {int(clear(known).sum())} of {len(known)} correlations "
            f"exclude 0; about {0.05 * len(known):.0f} would by chance."
        )
    return said


def head(row: Series) -> str:
    """A head's label, from a row of a table by head."""
    return f"{row['layer']}.{row['unit']}"


def _share(row: Series) -> str:
    return estimate(row, "fraction", sign=False)


def _top(table: DataFrame) -> DataFrame:
    shown = {
        "side": "side",
        "head": "head",
        "fraction": "selectivity",
        "lower": "lower",
        "upper": "upper",
        "n": "pairs",
    }
    top = [part.nlargest(MOST, "fraction") for _, part in by_side(table)]
    rows = [row for part in top for _, row in part.iterrows()]
    frame = DataFrame(rows).assign(head=[head(row) for row in rows], side=lambda found: found["side"].map(SIDE_NAMES))
    return frame[list(shown)].rename(columns=shown)


def _selectivity(whole: Effects, blocks: DataFrame) -> Iterator[Picture]:
    for side in dict.fromkeys(whole.pairs["side"]):
        figure = heatmap(whole, "unit", "layer", side=side, title="", limit=1.0)
        title = f"Selectivity of every head: {SIDE_NAMES[side]}"
        yield Picture(figure, title, SELECTIVITY, data="selectivity.csv", pair="heads")
    lines = curve(blocks, "layer", "fraction", lower="lower", upper="upper", by="side")
    lines.update_xaxes(title_text="block, counted from 0").update_yaxes(title_text="mean selectivity")
    yield Picture(lines, "Mean selectivity of each block", BLOCKS, data="selectivity-by-block.csv", wide=True)


def _by_query(at: Effects, blocks: DataFrame) -> Iterator[Picture]:
    for side, part in by_side(blocks):
        best = int(part.loc[part["fraction"].idxmax(), "layer"])
        figure = heatmap(at.where(side=side, layer=best), "slot", "unit", title="", limit=1.0)
        title = f"The heads of block {best}, by the slot that looks: {SIDE_NAMES[side]}"
        yield Picture(figure, title, BY_QUERY, data="selectivity-by-slot.csv", pair="slots")


def _correlated(along: DataFrame) -> Iterator[Picture]:
    for side, part in by_side(along):
        grid = part.pivot(index="unit", columns="layer", values="r")
        figure = heatmap(grid.rename_axis(index="head", columns="block"), value="r", title="", limit=1.0)
        title = f"Selectivity and the score: {SIDE_NAMES[side]}"
        yield Picture(figure, title, CORRELATED, data="correlations.csv", pair="correlations")
