"""What must be known before any number of a report: what follows from the results themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from clip_lens.core.effects import Effects
from clip_lens.core.table import Draws, tabulate
from clip_lens.show.figures.words import side_name
from clip_lens.show.report.words import whole
from clip_lens.words import counted, decimals, interval

FEW_PAIRS = 20
"""Pairs below which a bootstrap over them is not to be trusted."""


def cautions_of(results: Mapping[str, Effects]) -> list[str]:
    """What must be known before any number of these results, by name: hooks that were on, notes of the encoder's,
    shares of something that may be 0, few pairs.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> [caution[:34] for caution in cautions_of({"resid": toy_effects()})]
        ['Only 3 pairs: intervals over so fe']
    """
    said = [line for effects in results.values() for line in _of_the_run(effects)]
    return list(dict.fromkeys([*said, *_of_few(results)]))


def few_pairs(count: int, where: str = "") -> str:
    """The caution that results on so few pairs need.

    Example:
        >>> few_pairs(4)[:12], few_pairs(4, "heads")[:21]
        ('Only 4 pairs', 'Only 4 pairs in heads')
    """
    words = f"Only {counted(count, 'pair')}{f' in {where}' if where else ''}"
    return f"{words}: intervals over so few pairs are too narrow to be trusted; below five there is none."


def hooks_on(names: Sequence[str]) -> str:
    """The caution that results under hooks of the user's need.

    Example:
        >>> hooks_on(["blocks.0.hook_mlp_out"])[:60]
        'The tower had hooks of yours on, at blocks.0.hook_mlp_out: t'
    """
    return f"The tower had hooks of yours on, at {', '.join(names)}: the numbers are those under them."


def _of_the_run(effects: Effects) -> Iterator[str]:
    if effects.record.hooks:
        yield hooks_on(effects.record.hooks)
    yield from effects.record.notes
    if effects.record.shares and effects.places:
        yield from _of_nothing(effects)


def _of_nothing(effects: Effects) -> Iterator[str]:
    """A line for each side whose total, of which all shares are shares, has an interval that holds 0."""
    sample = effects.sample._replace(index=effects.index.head(1), values=effects.total[None])
    totals = tabulate(sample, "means", 0.0, pooled=False, draws=Draws(0.95, resamples=1000, seed=0))
    for row in totals[(totals["effect_lower"] <= 0) & (totals["effect_upper"] >= 0)].itertuples():
        side = side_name(row.side, totals["side"])
        bounds = interval(row.effect_lower, row.effect_upper, sign=True)
        yield (
            f"On average over pairs{f' ({side})' if side else ''} {whole(effects)} may be 0, it is "
            f"{decimals(row.effect, 2, sign=True)} {bounds}: shares of it say nothing. Take pairs on which it has one "
            "sign, or read single effects."
        )


def _of_few(results: Mapping[str, Effects]) -> Iterator[str]:
    """A line for each number of pairs that is small, with the names of its results where others have another one."""
    counts = {name: effects.pairs["key"].nunique() for name, effects in results.items()}
    for count in sorted(set(counts.values())):
        names = [name for name, number in counts.items() if number == count]
        if count < FEW_PAIRS:
            yield few_pairs(count, "" if len(names) == len(counts) else ", ".join(names))
