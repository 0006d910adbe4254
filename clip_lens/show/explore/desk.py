"""The desk: an encoder, a batch, and the numbers of any view of them, each by the verb that computes it elsewhere."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.source import Mean, MeanOver, Source, as_source, counterpart, mean, noise, zeros
from clip_lens.core.via import via
from clip_lens.data.batch import Batch, Run, align
from clip_lens.data.images import ImageStore
from clip_lens.methods.direct import UNALIGNED, direct_effects
from clip_lens.methods.lens import logit_lens
from clip_lens.methods.patching import patch_effects
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import LAYOUTS, Place, Site, hook_name
from clip_lens.show.explore.given import Given, way_of
from clip_lens.show.explore.view import KINDS, Layout, Panels, Patched, Text, View

KEPT = 64
LOGITS, COSINE = "logits", "of the cosine"
Patterns = Float[Tensor, "layer head query key"]


class Reading(NamedTuple):
    """The patterns and the logit of the run and of the other text."""

    patterns: tuple[Patterns, ...]
    logits: tuple[float, ...]


class Desk(Given):
    """An encoder and a batch, or none, on which views are looked at; what was computed for a view is kept until the
    encoder's weights or hooks are others.

    Raises:
        ValueError: the batch is empty, or judged along something else than its images.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> desk = Desk(encoder, clip_lens.align(clip_lens.read_pairs()[:4], store, encoder))
        >>> panels = desk.look(desk.start())
        >>> panels.grid.shape, len(panels.texts)
        ((11, 7), 2)
        >>> Desk(encoder).look(View("There is a star.")).unit
        'of the cosine'
    """

    def __init__(self, encoder: HookedTextEncoder, batch: Batch | None = None, images: ImageStore | None = None):
        super().__init__(encoder, batch, images)
        self._known: tuple[Any, ...] = ()
        self._one = lru_cache(KEPT)(self.find)
        self._read = lru_cache(KEPT)(self._reading)
        self._parts = lru_cache(KEPT)(self._attributed)
        self._lens = lru_cache(KEPT)(self._by_layer)
        self._effects = lru_cache(KEPT)(self._patch)
        self._together = lru_cache(KEPT)(self._patch_together)
        self._after = lru_cache(KEPT)(self._patterns_after)
        self._means = lru_cache(len(get_args(Run)))(self._means_of)

    def look(self, view: View) -> Panels:
        """The numbers of a view.

        Raises:
            ValueError: the texts can't be compared (empty, too long, the same), the image is not known, or the source
                has nothing for this kind.
        """
        if not 0 <= view.head < self.encoder.n_heads:
            raise ValueError(f"the heads of a block are 0 to {self.encoder.n_heads - 1}, got {view.head}")
        if not view.caption:
            raise ValueError("the caption is empty; write a text")
        with self.encoder.unchanged():
            self._forget_if_changed()
            return self._look(*self.fitting(view))

    def _look(self, view: View, said: tuple[str, ...]) -> Panels:
        one, notes = self._one(view.texts)
        view = replace(view, query=self._query(one, view))
        layout = Layout.of(view, self.rows(one, view), self.encoder)
        effects = self._effects(view.stem)
        grid = layout.grid(effects.signed()[:, 0])
        chosen = _chosen(one, view, layout)
        texts = self._texts(one, view)
        parts = self._parts(view.texts)
        return Panels(
            view=view,
            effects=effects,
            layout=layout,
            grid=grid,
            labels=self._labels(one, view, layout.rows),
            first=[] if view.by_head else [_first(one, row) for row in layout.rows],
            chosen=chosen,
            direct=parts.direct,
            sources=DataFrame(parts.sources[self._block(view)].T.numpy()),
            tokens=parts.tokens,
            lens=self._lens(view.texts),
            texts=texts,
            score=texts[0].logit if view.alone else texts[0].logit - texts[1].logit,
            unit=LOGITS if view.image else COSINE,
            patched=self._patched(one, view, layout, grid, chosen),
            notes=(*said, *notes),
        )

    def _forget_if_changed(self) -> None:
        """Drops what was computed with other weights or hooks; under hooks, which may hold anything, all of it."""
        state = (self.encoder.digest, self.encoder.hooked)
        if state != self._known or self.encoder.hooked:
            for kept in (self._one, self._read, self._parts, self._lens, self._effects):
                kept.cache_clear()
            for kept in (self._together, self._after, self._means):
                kept.cache_clear()
        self._known = state

    def _block(self, view: View) -> int:
        return min(view.layer, self.encoder.n_layers - 1)

    # The patches

    def rows(self, one: Batch, view: View) -> list[Any]:
        """The rows of a view's grid: heads, positions, or the slots that the run has."""
        if view.by_head:
            return list(range(self.encoder.n_heads))
        positions = _positions(self.encoder, one.tokens)
        if view.rows == "token":
            return positions
        held = {int(one.slot[0, position]) for position in positions}
        return [name for number, name in enumerate(one.slots) if number in held]

    def _patch(self, view: View) -> Effects:
        one = self._one(view.texts).batch
        places = Layout.of(view, self.rows(one, view), self.encoder).sites
        return patch_effects(self.encoder, one, places, source=self._source(view), progress=False)

    def _patch_together(self, view: View) -> tuple[float, float]:
        """The part of the score that goes when the view's places are patched together, and the sum of each apart."""
        one, sites = self._one(view.texts).batch, view.together
        places: list[Place] = [sites, *sites]
        moved = patch_effects(self.encoder, one, places, source=self._source(view), progress=False).signed()[:, 0]
        return float(moved[0]), float(moved[1:].nansum())

    def _patterns_after(self, view: View) -> Patterns | None:
        """The run's patterns with the view's places patched together; None where there is nothing to patch with."""
        names = self._pattern_names()
        source = via(view.together, source=self._source(view))
        with torch.inference_mode():
            one = self._one(view.texts).batch
            found = source(self.encoder, one)(torch.zeros(1, dtype=torch.long, device=one.tokens.device), names)
        patterns = torch.stack([found[name][0] for name in names]).cpu()
        return None if patterns.isnan().any() else patterns

    def _patched(
        self, one: Batch, view: View, layout: Layout, grid: DataFrame, chosen: tuple[int, int] | None
    ) -> Patched | None:
        """The run with the places patched that are patched together, or else the chosen one."""
        if view.together:
            places = view.together
            moved, apart = self._together(view.patching(places))
        elif chosen is not None:
            places = (layout.at(*chosen),)
            moved = apart = float(grid.iloc[chosen])
        else:
            return None
        patterns = self._after(view.patching(places))
        if patterns is None or moved != moved:
            return None
        logit = self._read(view.texts).logits[0] + int(one.sigma) * moved
        text = self._text(one.tokens, view, patterns, logit, view.query, range(one.tokens.shape[1]))
        return Patched(places, moved, apart, text._replace(name=f"{_named(one, 0)}, patched"))

    def _source(self, view: View) -> Source:
        if view.source == "mean":
            return self._means(view.run)
        return {"counterpart": counterpart, "zeros": as_source(zeros), "noise": noise(1.0, seed=0)}[view.source]

    def _means_of(self, run: Run) -> Source:
        """The means over the whole batch, with this text of each pair as the run, computed once."""
        whole = self._running(run)
        means = Mean(self.encoder, whole)
        sites = [site for kind in KINDS if not LAYOUTS[kind].query_by_key for site in self.encoder.sites(kind)]
        names = {hook_name(site, self.encoder.n_layers) for site in sites}
        with torch.inference_mode():  # of all kinds: the pass over the batch costs more than keeping them
            means(torch.zeros(1, dtype=torch.long, device=whole.tokens.device), names)
        return replace(mean(over=whole), function=lambda encoder, one: MeanOver(means, one))

    def _running(self, run: Run) -> Batch:
        """The whole batch with this text of each pair as the run."""
        if self.batch is None:
            raise ValueError("no batch was given to take means over; choose another source")
        way = way_of(self.batch, run)
        if way != "align":
            return self.batch.flip() if way == "flip" else self.batch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return align(self.batch.pairs, self._stored, self.encoder, run=run)

    # What is read without a patch

    def _attributed(self, view: View) -> Attributed:
        """What heads and MLPs add to the score, in all and, of heads, from each token that they read."""
        one, encoder = self._one(view).batch, self.encoder
        labels, slots = self._source_slots(one)
        heads, mlps = encoder.sites("head"), encoder.sites("mlp")
        read: list[Place] = [
            tuple(replace(head, slot=slot) for slot in each) for head in encoder.sites("v") for each in slots
        ]
        effects = direct_effects(encoder, one, [*heads, *mlps, *read], contrast=not view.alone, progress=False)
        by_head, by_mlp, by_token = effects.signed()[:, 0].split([len(heads), len(mlps), len(read)])
        whole = torch.cat([by_head.reshape(encoder.n_layers, -1), by_mlp[:, None]], 1).T.numpy()
        direct = DataFrame(whole, index=[*(f"head {head}" for head in range(encoder.n_heads)), "MLP"])
        return Attributed(direct, labels, by_token.reshape(encoder.n_layers, encoder.n_heads, len(slots)))

    def _source_slots(self, one: Batch) -> tuple[list[str], list[Sequence[str | int]]]:
        """The tokens that heads read, in words and as source slots: each of the run's, its padding where that is read,
        and together those that only the other text has."""
        positions = _positions(self.encoder, one.tokens)
        labels = _words(self.encoder, one.tokens)
        slots: list[Sequence[str | int]] = [[position] for position in positions]
        if padding := [place for place in range(int(one.length)) if place not in positions]:
            labels, slots = [*labels, "[padding]"], [*slots, padding]
        if bool(((one.inverse < 0) & one.flip().inside).any()):
            labels, slots = [*labels, "only in the other"], [*slots, [UNALIGNED]]
        return labels, slots

    def _by_layer(self, view: View) -> DataFrame:
        """The logits, and the score, as they would be read from the residual stream before each layer."""
        one = self._one(view).batch
        read = lambda batch: logit_lens(self.encoder, batch, norms="recomputed", contrast=False, progress=False)
        rows = {_named(one, 0): read(one).values[:, 0]}
        if not view.alone:
            rows[_named(one, 1)] = read(one.flip()).values[:, 0]
            rows = {"caption": rows["caption"], "foil": rows["foil"], "d": rows["caption"] - rows["foil"]}
        return DataFrame([values.tolist() for values in rows.values()], index=list(rows))

    def _pattern_names(self) -> list[str]:
        return [hook_name(Site("pattern", layer), self.encoder.n_layers) for layer in range(self.encoder.n_layers)]

    def _reading(self, view: View) -> Reading:
        encoder, one, names = self.encoder, self._one(view).batch, self._pattern_names()
        patterns, logits = [], []
        with torch.inference_mode():
            for tokens in (one.tokens,) if view.alone else (one.tokens, one.other):
                seen: list[Tensor] = []  # one run gives the patterns and the embedding
                u = encoder(
                    tokens, hooks=[(name, lambda value, hook, seen=seen: seen.append(value[0])) for name in names]
                )
                patterns.append(torch.stack(seen).cpu())
                logits.append(float((u[0] * one.direction[0]).sum()))
        return Reading(tuple(patterns), tuple(logits))

    # Words

    def _query(self, one: Batch, view: View) -> int:
        """The chosen token's position in the run: the pooled one unless another was chosen."""
        pooled = int(self.encoder.pool(one.tokens))
        if view.query is None:
            return pooled
        if view.query not in _positions(self.encoder, one.tokens):
            raise ValueError(f"the run has the positions 0 to {pooled}, got {view.query}")
        return view.query

    def _labels(self, one: Batch, view: View, rows: Sequence[Any]) -> list[str]:
        if view.by_head:
            return [f"head {row}" for row in rows]
        return list(rows) if view.rows == "slot" else _words(self.encoder, one.tokens)

    def _texts(self, one: Batch, view: View) -> tuple[Text, ...]:
        """The caption and the foil, or the one text."""
        patterns, logits = self._read(view.texts)
        run = self._text(one.tokens, view, patterns[0], logits[0], view.query, range(one.tokens.shape[1]))
        run = run._replace(name=_named(one, 0))
        if view.alone:
            return (run,)
        matched = one.inverse[0].tolist()
        query = matched.index(view.query) if view.query in matched else None
        other = self._text(one.other, view, patterns[1], logits[1], query, matched)._replace(name=_named(one, 1))
        return (run, other) if int(one.sigma) < 0 else (other, run)

    def _text(
        self,
        tokens: Int[Tensor, "1 pos"],
        view: View,
        patterns: Patterns,
        logit: float,
        query: int | None,
        origin: Sequence[int],
    ) -> Text:
        kept = _positions(self.encoder, tokens)
        index = torch.tensor(kept)
        seen = patterns[self._block(view)][:, index][:, :, index]
        query = kept.index(query) if query in kept else None
        return Text("", _words(self.encoder, tokens), seen, query, [origin[position] for position in kept], logit)


class Attributed(NamedTuple):
    """What heads and MLPs add, a column per block; those tokens in words that heads read, and what they add of each."""

    direct: DataFrame
    tokens: list[str]
    sources: Float[Tensor, "layer head token"]


def _chosen(one: Batch, view: View, layout: Layout) -> tuple[int, int] | None:
    """The row and column of the chosen cell."""
    column = view.head if view.one_block else view.layer
    if view.by_head:
        return view.head, column
    number = int(one.slot[0, view.query])
    if view.rows == "slot" and number < 0:
        return None
    return layout.rows.index(view.query if view.rows == "token" else one.slots[number]), column


def _named(one: Batch, number: int) -> str:
    """Whether the run (0) or the other text (1) is the caption or the foil."""
    return "caption" if (int(one.sigma) < 0) == (number == 0) else "foil"


def _positions(encoder: HookedTextEncoder, tokens: Int[Tensor, "1 pos"]) -> list[int]:
    """The positions of a text up to its end, and the one that is read."""
    return sorted({*range(int(encoder.length(tokens))), int(encoder.pool(tokens))})


def _first(one: Batch, row: int | str) -> int:
    """The position of a row: itself, or the slot's first token."""
    return row if isinstance(row, int) else int((one.slot[0] == one.slots.index(row)).int().argmax())


def _words(encoder: HookedTextEncoder, tokens: Int[Tensor, "1 pos"]) -> list[str]:
    """The tokens of a text as a reader knows them."""
    kept = tokens[0, _positions(encoder, tokens)]
    if encoder.tower.tokenizer is None:
        return [str(token) for token in kept.tolist()]
    special = {"start": "[start]", "end": "[end]", "pad": "[pad]"}
    words = []
    for word in encoder.tower.to_str_tokens(kept):
        named = re.fullmatch(r"<\|?(start|end|pad)\w*\|?>", word)
        words.append(special[named[1]] if named else word)
    return words
