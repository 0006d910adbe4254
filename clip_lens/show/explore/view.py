"""What the explorer looks at, and its numbers: one pair, patched everywhere. Nothing is drawn here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from pandas import DataFrame, Index
from torch import Tensor

from clip_lens.core.effects import Effects
from clip_lens.core.source import Mean, MeanOver, Source, as_source, counterpart, mean, noise, zeros
from clip_lens.data.batch import Batch, Run, align
from clip_lens.data.images import ImageStore
from clip_lens.data.pairs import Pairs
from clip_lens.methods.direct import direct_effects
from clip_lens.methods.patching import patch_effects
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.site import LAYOUTS, Kind, Site, hook_name
from clip_lens.words import some

SourceName = Literal["counterpart", "zeros", "mean", "noise"]
Rows = Literal["token", "slot"]
KINDS: tuple[Kind, ...] = ("resid", "mid", "attn", "mlp", "head", "q", "k", "v", "pattern")
"""Kinds of site that fit a small grid: by token or slot, or, where there are heads, by head."""
TYPED = ("caption", "foil", "image")
KEPT = 64


@dataclass(frozen=True)
class View:
    """What is looked at: two texts and an image, what is patched with what, and the chosen cell.

    `pair` is a row of the batch; other texts than its own are typed ones. `run` says which text is patched. Grids are
    laid out by `rows`, or by head where the kind has heads. `layer`, `head` and `query` (a position of the run, None =
    the pooled one) are the cell, the head and the token that were clicked.

    Raises:
        ValueError: a kind, run, source or layout that does not exist, or an empty text.

    Example:
        >>> View(caption="There is no star.", foil="There is a star.", image="1.png").kind
        'resid'
    """

    caption: str
    foil: str
    image: str
    pair: int = 0
    run: Run = "foil"
    kind: Kind = "resid"
    source: SourceName = "counterpart"
    rows: Rows = "token"
    layer: int = 0
    head: int = 0
    query: int | None = None

    def __post_init__(self) -> None:
        known = {"run": get_args(Run), "kind": KINDS, "source": get_args(SourceName), "rows": get_args(Rows)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {', '.join(choices)}")

    @property
    def by_head(self) -> bool:
        """Whether the grid's rows are heads."""
        return LAYOUTS[self.kind].unit_axis is not None


class Text(NamedTuple):
    """One text of the pair: its tokens in words, what it is, and the chosen head's pattern."""

    name: str
    tokens: list[str]
    pattern: Float[Tensor, "query key"]
    query: int | None
    origin: list[int]
    logit: float


class Panels(NamedTuple):
    """Everything that the explorer shows of a view. Effects are signed: the part of d that each patch moves, in logits.

    `grid` and `direct` have a column per layer; `labels` names the rows of `grid`, and `positions` has the first token
    of the run in each (nothing where rows are heads); `direct` is each head's and MLP's direct contribution to d.
    `texts` are the caption and the foil; their `origin` is the position of the run that each token belongs to, -1 =
    none. `patched` is the run's logit with the chosen cell patched.
    """

    view: View
    effects: Effects
    grid: DataFrame
    labels: list[str]
    positions: list[int]
    chosen: int | None
    direct: DataFrame
    texts: tuple[Text, Text]
    d: float
    patched: float
    notes: tuple[str, ...]


class One(NamedTuple):
    """The pair of a view, aligned, and what was to be said about its texts."""

    batch: Batch
    notes: tuple[str, ...]


class Reading(NamedTuple):
    """The patterns and the logit of the run and of the other text."""

    patterns: tuple[Float[Tensor, "layer head query key"], ...]
    logits: tuple[float, ...]


class Desk:
    """An encoder and a batch on which views are looked at; what was computed for a view is kept.

    Raises:
        ValueError: the batch is empty, or judged along something else than its images.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> desk = Desk(encoder, clip_lens.align(clip_lens.read_pairs()[:4], store, encoder))
        >>> panels = desk.look(desk.start())
        >>> panels.grid.shape, len(panels.texts)
        ((11, 7), 2)
    """

    def __init__(self, encoder: HookedTextEncoder, batch: Batch, images: ImageStore | None = None):
        self.encoder, self.batch, self.given = encoder, batch, images is not None
        own = images_of(batch, encoder)
        self.images = own if images is None else images
        self._one = lru_cache(KEPT)(self._find)
        self._read = lru_cache(KEPT)(self._reading)
        self._direct = lru_cache(KEPT)(self._contributions)
        self._effects = lru_cache(KEPT)(self._patch)
        self._means = lru_cache(len(get_args(Run)))(self._means_of)

    def start(self, pair: int = 0) -> View:
        """The first view: a pair of the batch, run as the batch runs it, its residual stream patched.

        Raises:
            ValueError: the batch does not have this pair.
        """
        if not 0 <= pair < len(self.batch):
            raise ValueError(f"the batch has the pairs 0 to {len(self.batch) - 1}, got {pair}")
        run = self.batch.run if self.batch.run in get_args(Run) else "foil"
        return View(*self.own(pair), pair=pair, run=run, layer=self.encoder.n_layers // 2)  # type: ignore[arg-type]

    def own(self, pair: int) -> tuple[str, str, str]:
        """Caption, foil and image of a pair of the batch."""
        pairs = self.batch.pairs
        return pairs.caption[pair], pairs.foil[pair], pairs.image[pair]

    def change(self, view: View, **changes: Any) -> View:
        """The view with some fields changed: another pair brings its texts and image, other texts or another run give
        up the chosen token, and a layer that the kind does not have becomes its last.

        Raises:
            ValueError: a field or a choice that does not exist.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> desk = Desk(encoder, clip_lens.align(clip_lens.read_pairs()[:4], store, encoder))
            >>> desk.change(desk.start(), pair=1, kind="head").caption
            'We can see a star.'
        """
        if unknown := changes.keys() - set(View.__dataclass_fields__):
            raise ValueError(
                f"a view has no {', '.join(sorted(unknown))}; it has {', '.join(View.__dataclass_fields__)}"
            )
        if "pair" in changes:
            own = self.start(changes["pair"])
            changes = {name: getattr(own, name) for name in TYPED} | changes
        if changes.keys() & {"caption", "foil", "run", "pair"}:
            changes = {"query": None} | changes
        changes |= {name: " ".join(changes[name].split()) for name in TYPED[:2] if name in changes}
        view = replace(view, **changes)
        return replace(view, layer=max(0, min(view.layer, self.depth(view.kind) - 1)))

    def depth(self, kind: Kind) -> int:
        """How many layers a kind has: `resid` is there once more than there are blocks."""
        return self.encoder.n_layers + (kind == "resid")

    def look(self, view: View) -> Panels:
        """The numbers of a view.

        Raises:
            ValueError: the texts can't be compared (empty, too long, the same), the image is not known, the run needs
                a side that the pair does not have, or the source has nothing for this kind.
        """
        if not 0 <= view.head < self.encoder.n_heads:
            raise ValueError(f"the heads of a block are 0 to {self.encoder.n_heads - 1}, got {view.head}")
        one, notes = self._one(_texts(view))
        effects = self._effects(_stem(view))
        query = self._query(one, view)
        rows = self.rows(one, view)
        grid = _laid_out(effects.signed()[:, 0], self.depth(view.kind), rows)
        chosen = self._chosen(one, view, query, rows)
        texts = self._both(one, view, query)
        moved = 0.0 if chosen is None else float(grid.iloc[chosen, view.layer])
        run = texts[0 if int(one.sigma) < 0 else 1]
        return Panels(
            view=replace(view, query=query),
            effects=effects,
            grid=grid,
            labels=self._labels(one, view, rows),
            positions=[] if view.by_head else [_first(one, row) for row in rows],
            chosen=chosen,
            direct=self._direct(_texts(view)),
            texts=texts,
            d=texts[0].logit - texts[1].logit,
            patched=run.logit + int(one.sigma) * moved,
            notes=notes,
        )

    # The pair

    def typed(self, view: View) -> bool:
        """Whether the view's texts are others than those of its pair."""
        return (view.caption, view.foil) != self.own(view.pair)[:2]

    def _find(self, view: View) -> One:
        if not view.caption or not view.foil:
            raise ValueError(f"the {'foil' if view.caption else 'caption'} is empty; write a text")
        if view.image not in self.images and (self.typed(view) or view.image != self.own(view.pair)[2]):
            ids = self.images.ids
            raise ValueError(
                f"no image {view.image!r} among the {len(ids)} known ones, such as {some(ids[:3], quote=True)}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once for both texts, below
            one = self._aligned(view) if self.typed(view) else self._row(view)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.encoder.tokenize([view.caption, view.foil])
        return One(one, tuple(str(warning.message) for warning in caught))

    def _aligned(self, view: View) -> Batch:
        if not all(self.encoder.fits([view.caption, view.foil])):
            long = next(text for text in (view.caption, view.foil) if not self.encoder.fits([text])[0])
            raise ValueError(
                f"longer than the {self.encoder.n_ctx} tokens of the context: {long[:60]!r}...; shorten it"
            )
        tokens = self.encoder.tokenize([view.caption, view.foil])
        if bool((tokens[0] == tokens[1]).all()):
            raise ValueError("caption and foil are the same tokens; change one of them")
        pair = Pairs(["typed"], [view.caption], [view.foil], [view.image], name="typed")
        _sigma(view.run, pair.side[0])  # says what is wrong in words that fit one pair
        return align(pair, self.images, self.encoder, run=view.run)

    def _row(self, view: View) -> Batch:
        one = self.batch[[view.pair]]
        if int(one.sigma) != _sigma(view.run, one.pairs.side[0]):
            one = one.flip()
        if view.image != one.pairs.image[0]:
            one = one.along(self.encoder.scale * self.images[[view.image]])
        return one

    # The patches

    def places(self, one: Batch, view: View) -> list[Site]:
        """The places of a view's grid, layer by layer."""
        slots = [None] if view.by_head else self.rows(one, view)
        return self.encoder.sites(view.kind, slots=slots)

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
        one = self._one(_texts(view)).batch
        return patch_effects(self.encoder, one, self.places(one, view), source=self._source(view))

    def _source(self, view: View) -> Source:
        if view.source == "mean":
            return self._means(view.run)
        return {"counterpart": counterpart, "zeros": as_source(zeros), "noise": noise(1.0, seed=0)}[view.source]

    def _means_of(self, run: Run) -> Source:
        """The means over the whole batch, with this text of each pair as the run; each is computed once."""
        whole = self._running(run)
        means = Mean(self.encoder, whole)
        return replace(mean(over=whole), function=lambda encoder, one: MeanOver(means, one))

    def _running(self, run: Run) -> Batch:
        """The whole batch with this text of each pair as the run."""
        way = _way(self.batch, run)
        if way != "align":
            return self.batch.flip() if way == "flip" else self.batch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return align(self.batch.pairs, self.images, self.encoder, run=run)

    def _contributions(self, view: View) -> DataFrame:
        """Each head's and MLP's direct contribution to d, with a column per block."""
        encoder, one = self.encoder, self._one(_texts(view)).batch
        layers = range(encoder.n_layers)
        rows = [*(f"head {head}" for head in range(encoder.n_heads)), "MLP"]
        places = [Site("head", layer, head) for layer in layers for head in range(encoder.n_heads)]
        values = direct_effects(encoder, one, [*places, *(Site("mlp", layer) for layer in layers)]).signed()[:, 0]
        heads = values[: len(places)].reshape(len(layers), -1)
        return _laid_out(torch.cat([heads, values[len(places) :, None]], 1).flatten(), len(layers), rows)

    # The texts

    def _query(self, one: Batch, view: View) -> int:
        """The chosen token's position in the run: the pooled one unless another was chosen."""
        pooled = int(self.encoder.pool(one.tokens))
        if view.query is None:
            return pooled
        if view.query not in _positions(self.encoder, one.tokens):
            raise ValueError(f"the run has the positions 0 to {pooled}, got {view.query}")
        return view.query

    def _chosen(self, one: Batch, view: View, query: int, rows: Sequence[Any]) -> int | None:
        """The row of the chosen cell."""
        if view.by_head:
            return view.head
        row = query if view.rows == "token" else one.slots[int(one.slot[0, query])]
        return rows.index(row) if view.rows == "token" or int(one.slot[0, query]) >= 0 else None

    def _labels(self, one: Batch, view: View, rows: Sequence[Any]) -> list[str]:
        if view.by_head:
            return [f"head {row}" for row in rows]
        return list(rows) if view.rows == "slot" else _words(self.encoder, one.tokens)

    def _both(self, one: Batch, view: View, query: int) -> tuple[Text, Text]:
        """Caption and foil."""
        matched = one.flip().origin[0].tolist()
        run = self._text(one.tokens, view, 0, query, range(one.tokens.shape[1]))
        other = self._text(one.other, view, 1, matched.index(query) if query in matched else None, matched)
        if int(one.sigma) < 0:
            return run._replace(name="caption"), other._replace(name="foil")
        return other._replace(name="caption"), run._replace(name="foil")

    def _text(
        self, tokens: Int[Tensor, "1 pos"], view: View, number: int, query: int | None, origin: Sequence[int]
    ) -> Text:
        patterns, logits = self._read(_texts(view))
        kept = _positions(self.encoder, tokens)
        index = torch.tensor(kept)
        pattern = patterns[number][min(view.layer, self.encoder.n_layers - 1), view.head][index][:, index]
        query = kept.index(query) if query in kept else None
        words = _words(self.encoder, tokens)
        return Text("", words, pattern, query, [origin[position] for position in kept], logits[number])

    def _reading(self, view: View) -> Reading:
        encoder, one = self.encoder, self._one(_texts(view)).batch
        names = [hook_name(Site("pattern", layer), encoder.n_layers) for layer in range(encoder.n_layers)]
        patterns, logits = [], []
        with torch.inference_mode():
            for tokens in (one.tokens, one.other):
                seen: list[Tensor] = []  # one run gives the patterns and the embedding
                u = encoder(
                    tokens, hooks=[(name, lambda value, hook, seen=seen: seen.append(value[0])) for name in names]
                )
                patterns.append(torch.stack(seen).cpu())
                logits.append(float((u[0] * one.direction[0]).sum()))
        return Reading(tuple(patterns), tuple(logits))


def images_of(batch: Batch, encoder: HookedTextEncoder) -> ImageStore:
    """The images of a batch's pairs, in memory: its directions at length one.

    Raises:
        ValueError: the batch is empty, or judged along something else than its images.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:2], store, encoder)
        >>> images_of(batch, encoder).ids
        ('scene-500000.png', 'scene-500001.png')
    """
    if len(batch) == 0:
        raise ValueError("the batch has no pairs to look at")
    first = {image: row for row, image in reversed(list(enumerate(batch.pairs.image)))}
    first = dict(sorted(first.items(), key=lambda entry: entry[1]))
    rows = batch.direction[list(first.values())].double().cpu() / encoder.scale
    if not torch.allclose(rows.norm(dim=1), torch.ones(len(rows), dtype=rows.dtype), atol=1e-3):
        raise ValueError(
            "the batch is judged along other directions than its images; give explore the batch before `along`"
        )
    return ImageStore.from_tensors(list(first), rows)


def _stem(view: View) -> View:
    """The view without what was clicked: clicks need no new patches."""
    return replace(view, layer=0, head=0, query=None)


def _texts(view: View) -> View:
    """The view without what is patched: only the texts, the image and which text is run."""
    return replace(_stem(view), kind="resid", source="counterpart", rows="token")


def _sigma(run: Run, side: str) -> int:
    """+1 where the run is the foil."""
    if run in ("caption", "foil"):
        return 1 if run == "foil" else -1
    if side == "none":
        raise ValueError(f"neither text is the negated one, so that none is {run}; run the caption or the foil")
    return 1 if (side == "foil") == (run == "negated") else -1


def _way(batch: Batch, run: Run) -> Literal["as it is", "flip", "align"]:
    """How a batch gets to run these texts."""
    if batch.run == run:
        return "as it is"
    pairs = ({"caption", "foil"}, {"affirmative", "negated"})
    return "flip" if {batch.run, run} in pairs else "align"


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


def _laid_out(values: Float[Tensor, "cell"], depth: int, rows: Sequence[Any]) -> DataFrame:
    """Values that come layer by layer, as a grid with a column per layer."""
    return DataFrame(values.reshape(depth, len(rows)).T.numpy(), index=Index(rows, dtype=object), columns=range(depth))


def code(desk: Desk, view: View) -> str:
    """Python that computes what the view shows, with the `encoder` and the `batch` that were given to `explore`.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder)
        >>> desk = Desk(encoder, batch)
        >>> print(code(desk, desk.start()).splitlines()[4])
        one = batch[[0]]
    """
    one = desk._one(_texts(view)).batch
    layer, rows = min(view.layer, desk.encoder.n_layers - 1), desk.rows(one, view)
    way = _way(desk.batch, view.run)
    stored = desk.typed(view) or view.image != desk.own(view.pair)[2] or (view.source == "mean" and way == "align")
    fits = "" if view.by_head else f", slots={_listed(rows)}"
    names = "encoder, batch and images" if stored and desk.given else "encoder and batch"
    lines = [
        f"# {names}: as given to explore",
        "import clip_lens",
        "from clip_lens import Site",
        *([] if not stored or desk.given else ["from clip_lens.show.explore.view import images_of"]),
        "",
        *([] if not stored or desk.given else ["images = images_of(batch, encoder)"]),
        *_pair_code(desk, view),
        f"places = encoder.sites({view.kind!r}{fits})",
        f"effects = clip_lens.patch_effects(encoder, one, places, source={_source_code(view, way)})",
        "",
        f"# head {view.head} of block {layer}: where it looks in the run and in the other text, what it adds to d",
        f'pattern = "blocks.{layer}.attn.hook_pattern"',
        f"looks = [encoder.cache(text, names=pattern)[pattern][0, {view.head}] for text in (one.tokens, one.other)]",
        f'adds = clip_lens.direct_effects(encoder, one, [Site("head", {layer}, {view.head})]).signed()',
        "",
        f'clip_lens.heatmap(effects, rows="{"unit" if view.by_head else "slot"}", value="effect")',
    ]
    return "\n".join(lines) + "\n"


def _pair_code(desk: Desk, view: View) -> list[str]:
    if desk.typed(view):
        texts = f"[{view.caption!r}], [{view.foil!r}], [{view.image!r}]"
        return [
            f'pair = clip_lens.Pairs(["typed"], {texts})',
            f"one = clip_lens.align(pair, images, encoder, run={view.run!r})",
        ]
    own = desk.batch[[view.pair]]
    turn = ".flip()" if int(own.sigma) != _sigma(view.run, own.pairs.side[0]) else ""
    along = f".along(encoder.scale * images[[{view.image!r}]])" if view.image != own.pairs.image[0] else ""
    return [f"one = batch[[{view.pair}]]{turn}{along}"]


def _source_code(view: View, way: str) -> str:
    if view.source == "noise":
        return "clip_lens.noise(1.0, seed=0)"
    if view.source != "mean":
        return f"clip_lens.{view.source}"
    aligned = f"clip_lens.align(batch.pairs, images, encoder, run={view.run!r})"
    whole = {"as it is": "batch", "flip": "batch.flip()", "align": aligned}[way]
    return f"clip_lens.mean(over={whole})"


def _listed(rows: list[Any]) -> str:
    return f"range({len(rows)})" if rows == list(range(len(rows))) else repr(rows)
