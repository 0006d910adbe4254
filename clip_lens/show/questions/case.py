"""What the study's questions are asked of, and what a question is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pandas import DataFrame

from clip_lens.core.effects import Effects
from clip_lens.core.keep import Keep
from clip_lens.core.record import Record
from clip_lens.core.record import Setting as Value
from clip_lens.core.setting import Setting
from clip_lens.data.batch import Batch
from clip_lens.data.images import ImageStore
from clip_lens.methods.confounds import Confounds, confounds
from clip_lens.methods.patching import patch_effects
from clip_lens.methods.registry import PATCHING, STUDY
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import Place
from clip_lens.show.report.section import Section


@dataclass(frozen=True)
class Case:
    """A model and its pairs, a folder of finished results, which segment is traced, and the bank that labels heads."""

    encoder: HookedTextEncoder
    batch: Batch
    keep: Keep
    segment: str = "correct"
    images: ImageStore | None = None
    rows: int = 256
    seed: int = 0
    progress: bool = True
    jobs: int = 1
    executor: object = None

    @cached_property
    def patching(self) -> Setting:
        """Patching from the other text of each pair."""
        return Setting.of(self.encoder, self.batch, rows=self.rows, progress=self.progress)

    @cached_property
    def reading(self) -> Setting:
        """Reading both texts of each pair, patching nothing."""
        return Setting.reading(self.encoder, self.batch, progress=self.progress)

    def patched(self, name: str, places: Sequence[Place]) -> Effects:
        """Activation patching of these places from the text with the negation."""
        how = {"rows": self.rows, "progress": self.progress, **self.keep.sharing(name, self.jobs, self.executor)}
        run = lambda chosen: patch_effects(self.encoder, self.batch, chosen, **how)
        return self.keep.effects(name, self.patching.record(PATCHING), places, run)

    def read(self, name: str, record: Record, places: Sequence[Place], compute: Callable[[], Effects]) -> Effects:
        """A result of this record that is computed in one go."""
        return self.keep.effects(name, record, places, lambda _: compute(), whole=True)

    def table(self, name: str, compute: Callable[[], DataFrame], **settings: Value) -> DataFrame:
        """A table that the study makes of its results."""
        return self.keep.frame(name, self.reading.record(STUDY, table=name, **settings), compute)

    @cached_property
    def data(self) -> Confounds:
        """What is known of every pair, its score with it: computed once for all questions."""
        return confounds(self.encoder, self.batch)

    def chosen(self, effects: Effects) -> Effects:
        """The pairs of the segment that is traced."""
        return effects if self.segment == "all" else effects.where(segment=self.segment)


class Question(NamedTuple):
    """A question of the study: its name in the page's contents, what answers it, and how that is defined."""

    name: str
    answer: Callable[[Case], Section]
    methods: tuple[tuple[str, str], ...] = ()
