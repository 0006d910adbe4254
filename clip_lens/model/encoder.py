"""Tokens or texts in, unit text embeddings out: the tower with its tokenizer, its pooling and its scale."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformer_lens import ActivationCache

from clip_lens.model.convert import Pool
from clip_lens.model.site import LAYOUTS, NO_LAYER, Edge, Kind, Site, order, precedes, readers, unknown_kind, writers
from clip_lens.model.tower import HookedTextTower
from clip_lens.originals.original import Preparation, digest
from clip_lens.words import close, nearest, some

Hook: TypeAlias = tuple[str, Callable[..., Tensor | None]]
Cache: TypeAlias = Mapping[str, Shaped[Tensor, "pair ..."]]


class Activations(dict[str, Tensor]):
    """Activations by hook name; another key is an error that says where TransformerLens' short ones are taken."""

    def __missing__(self, key: object) -> Tensor:
        near = nearest(key, self) if isinstance(key, str) else ""
        raise KeyError(
            f"no activation {key!r}{near}: the keys are hook names, such as 'blocks.0.hook_mlp_out'; short ones, "
            "('pattern', 2), work with encoder.run_with_cache(texts)[1]"
        )


class HookedTextEncoder:
    """A CLIP text encoder whose every activation can be read and patched.

        texts -> tokenizer -> tokens -> tower (TransformerLens hooks) -> pooled position -> / norm -> pair d_embed

    `scale` is exp(logit_scale): `scale * <text, image>` is CLIP's logit. `digest` names the text tower's weights as
    they are now, `image_digest` those of the image tower that was dropped at loading. The tower runs in `dtype`; what
    it says is given, and counted, in `precision`. `notes` say of a checkpoint's file what its weights don't: where its
    activation is from, and what was unusual in reading it.

    Example:
        >>> encoder = clip_lens.load()
        >>> encoder(["There are no circles.", "There are some circles."]).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        tower: HookedTextTower,
        pool: Pool,
        *,
        scale: float,
        name: str,
        pretrained: str | None = None,
        image_digest: str | None = None,
        preparation: Preparation | None = None,
        vocabulary: frozenset[int] | None = None,
        notes: tuple[str, ...] = (),
    ):
        self.tower, self.pool, self.scale = tower, pool, scale
        self.name, self.pretrained, self.image_digest = name, pretrained, image_digest
        self.vocabulary, self.notes, self._preparation = vocabulary, notes, preparation
        self._pad, self._end = 0, None
        self._digest: str | None = None
        if tower.tokenizer is not None:
            empty = self.raw_tokens([""])
            self._pad, self._end = int(empty[0, -1]), int(empty[0, pool(empty)])

    device = property(lambda self: self.tower.W_U.device)
    dtype = property(lambda self: self.tower.W_U.dtype)
    precision = property(
        lambda self: torch.promote_types(self.dtype, torch.float32),
        doc="The dtype of embeddings, metrics and sums: float32, or float64 where the tower runs in it.",
    )
    hooked = property(lambda self: self.tower.hooked, doc="The tower's modules that bear hooks right now, by name.")
    causal = property(lambda self: self.tower.causal)
    n_layers = property(lambda self: self.tower.cfg.n_layers)
    n_heads = property(lambda self: self.tower.cfg.n_heads)
    d_embed = property(lambda self: self.tower.W_U.shape[1])
    n_ctx = property(lambda self: self.tower.cfg.n_ctx)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits for the text tower's weights as they are now: an edit in place gives others.

        Example:
            >>> encoder = clip_lens.load()
            >>> before = encoder.digest
            >>> encoder.tower.blocks[2].attn.W_O[1].zero_(), encoder.digest == before
            (tensor(...), False)
        """
        return self._digest or digest(dict(self.tower.named_parameters()))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """For verbs that are called one after the other on the same weights: inside, nobody edits them, so that
        `digest` is computed once, and other threads wait for the tower.

        Example:
            >>> encoder = clip_lens.load()
            >>> with encoder.unchanged():
            ...     encoder.digest == encoder.digest
            True
        """
        with self.tower.turn:
            outer, self._digest = self._digest, self.digest
            try:
                yield
            finally:
                self._digest = outer

    @property
    def image_preprocessing(self) -> str | None:
        """How the model's images are prepared: settings as sorted JSON, None = not known, as where it is a guess.

        Raises:
            ValueError: the model is of transformers', and its image processor can't be read.

        Example:
            >>> clip_lens.load().image_preprocessing
            '{"fill_color": 0, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], ...}'
        """
        return None if self._preparation is None else self._preparation.settings

    @property
    def architecture(self) -> str:
        """What the tower does with its weights, in words: what else than weights decides its embeddings.

        Example:
            >>> clip_lens.load().architecture
            '4 heads, QuickGELU(), causal, eps 1e-05, pooled at argmax'
        """
        cfg, end = self.tower.cfg, "" if self.pool.eos_id is None else f" {self.pool.eos_id}"
        activations = sorted({repr(block.mlp.act) for block in cast(Any, self.tower.blocks)})
        return (
            f"{cfg.n_heads} heads, {', '.join(activations)}, {cfg.attention_dir}, eps {cfg.eps:g}, "
            f"pooled at {self.pool.type}{end}"
        )

    def raw_tokens(self, texts: Sequence[str], longer: int = 0) -> Int[Tensor, "pair pos"]:
        """What the tokenizer makes of texts, on the CPU and whatever their length, for a context `longer` than is.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self.tower.tokenizer is None:
            raise ValueError(f"{self.name} was loaded without a tokenizer; give tokens, or load(module, tokenizer=...)")
        number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        wider = {"context_length": self.n_ctx + longer} if longer else {}
        with self.tower.turn:  # a tokenizer of transformers' keeps the length to pad to
            rows = self.tower.tokenizer(list(number), **wider)
        return torch.as_tensor(rows).long()[[number[text] for text in texts]]

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "pair pos"]:
        """The token ids of texts, padded to the context.

        Warns about words that the embedded model never saw, by name, and about texts that are not read at their end.

        Raises:
            ValueError: a text is too long for the context, or there is no tokenizer.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        long = [text for text, fits in zip(texts, self.fits(texts), strict=True) if not fits]
        if long:
            more = "more than" if self._says_length else "as many tokens as the context has, so that they may be cut:"
            raise ValueError(
                f"{len(long)} of {len(texts)} texts have {more} {self.n_ctx} tokens, the first is {long[0][:80]!r}; "
                "shorten them"
            )
        tokens = self.raw_tokens(texts)
        self._warn_unseen(texts, tokens)
        self._warn_read_elsewhere(texts, tokens)
        return tokens.to(self.device)

    def fits(self, texts: Sequence[str]) -> list[bool]:
        """For each text, whether all its tokens fit into the context: tokenizers cut what does not, silently.

        A text that the tokenizer refuses does not fit. Of a tokenizer that can't be asked for a longer context, a text
        does not that fills it: it may have been cut.
        """
        if not texts or self.tower.tokenizer is None:
            return [True] * len(texts)
        try:
            return self._fit(texts)
        except (ValueError, RuntimeError, AssertionError):  # as OpenAI's: the whole batch, for one text
            if len(texts) == 1:
                return [False]
            half = len(texts) // 2
            return self.fits(texts[:half]) + self.fits(texts[half:])

    @property
    def _says_length(self) -> bool:
        """Whether the tokenizer can be asked for a longer context."""
        return "context_length" in inspect.signature(self.tower.tokenizer).parameters  # type: ignore[arg-type]

    def _fit(self, texts: Sequence[str]) -> list[bool]:
        tokens = self.raw_tokens(texts)
        if not self._says_length:
            return (self.length(tokens) < self.n_ctx).tolist()
        wider = self.raw_tokens(texts, longer=8)
        fit = self.length(wider) <= self.n_ctx
        if self.pool.type not in ("argmax", "eos"):
            # An end that looks like padding is not counted, but a text cut to make room for it has other tokens.
            fit &= (wider[:, : self.n_ctx] == tokens).all(1)
        return fit.tolist()

    def _warn_read_elsewhere(self, texts: Sequence[str], tokens: Int[Tensor, "pair pos"]) -> None:
        """A tower that pools at the highest id pools at a token that was added behind the end of text."""
        if self.pool.type != "argmax":
            return
        elsewhere = [row for row, highest in enumerate(tokens.amax(-1).tolist()) if highest != self._end]
        if elsewhere:
            first = texts[elsewhere[0]][:80]
            warnings.warn(
                f"{len(elsewhere)} of {len(texts)} texts have a token with a higher id than the end of text, "
                f"{self._end}, and are read there, as {self.name} itself does; the first is {first!r}",
                stacklevel=3,
            )

    def _warn_unseen(self, texts: Sequence[str], tokens: Int[Tensor, "pair pos"]) -> None:
        rows = unseen_words(self, tokens).nonzero().flatten().tolist()
        words = sorted({word for row in rows for word in texts[row].split()})
        if not words:
            return
        new = unseen_words(self, self.raw_tokens(words)).tolist()
        unseen = [word for word, is_new in zip(words, new, strict=True) if is_new]
        warnings.warn(
            f"{self.name} never saw {some(unseen, 10, quote=True)} in training: what it says of texts with "
            f"{'this word' if len(unseen) == 1 else 'these words'} means nothing",
            stacklevel=3,
        )

    def length(self, tokens: Int[Tensor, "pair pos"]) -> Int[Tensor, "pair"]:
        """The number of positions of each text up to its end: the pooled one, or the last that is not padding."""
        if self.pool.type in ("argmax", "eos"):
            return self.pool(tokens) + 1
        content = tokens != self._pad
        return tokens.shape[1] - content.flip(1).int().argmax(1) * content.any(1) - (~content.any(1)) * tokens.shape[1]

    def cut(self, tokens: Int[Tensor, "pair pos"]) -> Int[Tensor, "pair cut"]:
        """The tokens up to the longest text's end. Exact in causal towers, in which nothing reads what lies behind it;
        a tower that reads its padding gets every position, and so does one that is `hooked`, so that a hook finds the
        positions that it addresses, whichever texts are run together."""
        if not self.causal or self.pool.type == "last" or len(tokens) == 0 or self.hooked:
            return tokens
        return tokens[:, : int(self.length(tokens).max())]

    def tokens(self, texts: str | Sequence[str] | Tensor) -> Int[Tensor, "pair pos"]:
        """Tokens as they are run: texts tokenized, on the tower's device, cut to the longest end of text."""
        if isinstance(texts, Tensor):
            return self.cut(torch.atleast_2d(texts).to(self.device))
        return self.cut(self.tokenize([texts] if isinstance(texts, str) else texts))

    def read(
        self, y: Float[Tensor, "pair pos d_embed"], at: Int[Tensor, "pair"] | int
    ) -> Float[Tensor, "pair d_embed"]:
        """The unit embedding at one position of each row, in `precision`."""
        return F.normalize(y[torch.arange(len(y), device=y.device), at].to(self.precision), dim=-1)

    def __call__(
        self, texts: str | Sequence[str] | Int[Tensor, "pair pos"], hooks: Sequence[Hook] = ()
    ) -> Float[Tensor, "pair d_embed"]:
        """Unit text embeddings, `u = y / |y|` with `y = W_U^T ln_final(x[L, pooled])` (method, section 1).

        `hooks` are TransformerLens hooks, `(name, function)`, alive for this call.

        Raises:
            ValueError: a hook's name that does not exist.

        Example:
            >>> encoder = clip_lens.load()
            >>> zero = ("blocks.0.hook_attn_out", lambda value, hook: 0 * value)
            >>> encoder("There are no circles.", hooks=[zero]).norm().round(decimals=4)
            tensor(1.)
        """
        self._known(name for name, _ in hooks)
        tokens = self.tokens(texts)
        return self.read(self.tower.run_with_hooks(tokens, fwd_hooks=list(hooks)), self.pool(tokens))

    def cache(
        self,
        texts: str | Sequence[str] | Int[Tensor, "pair pos"],
        hooks: Sequence[Hook] = (),
        *,
        names: str | Iterable[str] | None = None,
    ) -> Cache:
        """The activations of a run by hook name, at the positions up to the longest end of text.

        `names` limits what is kept. `hooks` act first, so that the cache is the intervened run's.

        Raises:
            ValueError: a name that is no hook.

        Example:
            >>> encoder = clip_lens.load()
            >>> name = "blocks.1.attn.hook_pattern"
            >>> encoder.cache("There are no circles.", names=name)[name].shape
            torch.Size([1, 4, 7, 7])
        """
        chosen = None if names is None else {names} if isinstance(names, str) else set(names)
        self._known([*(chosen or ()), *(name for name, _ in hooks)])
        tokens = self.tokens(texts)
        with self.tower.hooks(fwd_hooks=list(hooks)):
            _, cache = self.tower.run_with_cache(
                tokens, names_filter=chosen, return_cache_object=False, return_type="logits"
            )
        return Activations(cast(Cache, cache))

    def _known(self, names: Iterable[str | Callable[[str], bool]]) -> None:
        strange = {name for name in names if isinstance(name, str)} - set(self.tower.hook_dict)
        if strange:
            first = min(strange)
            near = nearest(first, self.tower.hook_dict)
            raise ValueError(f"no hook {sorted(strange)}{near}; encoder.tower.hook_dict lists all of them")

    @property
    def cfg(self) -> Any:
        """The tower's configuration, as HookedTransformer's."""
        return self.tower.cfg

    def to_tokens(self, texts: str | Sequence[str]) -> Int[Tensor, "pair pos"]:
        """The token ids of texts, padded to the context, as HookedTransformer's; `tokens` cuts them."""
        return self.tokenize([texts] if isinstance(texts, str) else texts)

    def run_with_cache(
        self,
        texts: str | Sequence[str] | Int[Tensor, "pair pos"],
        names_filter: str | Iterable[str] | Callable[[str], bool] | None = None,
    ) -> tuple[Float[Tensor, "pair d_embed"], ActivationCache]:
        """The unit text embeddings, as `encoder(texts)`, and the activations of the run as TransformerLens caches them.

        `encoder.tower.run_with_cache` takes all of TransformerLens' options and gives an embedding at every position.

        Raises:
            ValueError: a name that is no hook.

        Example:
            >>> u, cache = clip_lens.load().run_with_cache("There are no circles.")
            >>> u.shape, cache["pattern", 2].shape
            (torch.Size([1, 128]), torch.Size([1, 4, 7, 7]))
        """
        names: Any = names_filter
        if names is not None and not callable(names):
            names = {names} if isinstance(names, str) else set(names)
            self._known(names)
        tokens = self.tokens(texts)
        y, cache = self.tower.run_with_cache(tokens, names_filter=names)
        return self.read(cast(Tensor, y), self.pool(tokens)), cast(ActivationCache, cache)

    def encode_text(
        self, texts: str | Sequence[str] | Int[Tensor, "pair pos"], normalize: bool = False
    ) -> Float[Tensor, "pair d_embed"]:
        """The text embeddings as open_clip's `encode_text` gives them: as long as they are, or with `normalize` of
        length 1, as `encoder(texts)`.

        Example:
            >>> encoder = clip_lens.load()
            >>> torch.equal(encoder.encode_text("a circle", normalize=True), encoder("a circle"))
            True
        """
        if normalize:
            return self(texts)
        tokens = self.tokens(texts)
        y = cast(Tensor, self.tower(tokens))
        return y[torch.arange(len(y), device=y.device), self.pool(tokens)].to(self.precision)

    def __getattr__(self, name: str) -> Any:
        """What there is not: an error that says where it is, since the tower is the TransformerLens model."""
        tower = self.__dict__.get("tower")
        if tower is not None and not name.startswith("__") and hasattr(tower, name):
            raise AttributeError(
                f"the encoder has no {name!r}; its tower, the TransformerLens model, has: encoder.tower.{name}"
            )
        names = [each for each in dir(type(self)) if not each.startswith("_")]
        raise AttributeError(f"the encoder has no {name!r}{close(name, names)}")

    def sites(
        self, kind: Kind, *, layers: Iterable[int] | int | None = None, slots: Iterable[str | int | None] = (None,)
    ) -> list[Site]:
        """One place per layer, unit and slot of a kind: every head, every neuron, every residual stream ...

        `resid` runs over 0..L. Heads and neurons are places of their own; `Site(kind, layer)` is all of them together.

        Raises:
            ValueError: a kind or a layer that does not exist.
            TypeError: one slot's name instead of a list of slots.

        Example:
            >>> encoder = clip_lens.load()
            >>> len(encoder.sites("head")), len(encoder.sites("resid", slots=("negator", "eot")))
            (24, 14)
        """
        if kind not in LAYOUTS:
            raise ValueError(unknown_kind(kind, LAYOUTS))
        if isinstance(slots, str):
            raise TypeError(f"slots are a list, got the text {slots!r}; write slots=[{slots!r}]")
        depth = 1 if kind in NO_LAYER else self.n_layers + (kind == "resid")
        chosen = range(depth) if layers is None else [layers] if isinstance(layers, int) else list(layers)
        if wrong := [layer for layer in chosen if not 0 <= layer < depth]:
            raise ValueError(f"{self.name} has {kind} sites at layers 0..{depth - 1}, got {wrong}")
        return [Site(kind, layer, unit, slot) for layer in chosen for unit in self.units(kind) for slot in tuple(slots)]

    def edges(
        self,
        *,
        senders: Iterable[Site] | None = None,
        receivers: Iterable[Site] | None = None,
        slots: Iterable[str | int] | None = None,
    ) -> list[Edge]:
        """Every edge from some senders to some receivers, single units each, receivers in the order of the tower and
        within one the senders: 15,355 in ViT-B/32.

        `None`: all there are. A site without unit stands for all heads of its layer; a receiver's slot goes with it.
        With `slots` every receiver but the output, which is read at the pooled position, stands there once for each.

        Raises:
            ValueError: no edge is among them.
            TypeError: one slot's name instead of a list of slots.

        Example:
            >>> encoder = clip_lens.load()
            >>> len(encoder.edges()), [str(edge) for edge in encoder.edges(receivers=[Site("q", 0, unit=0)])]
            (1108, ['embed -> q 0.0'])
            >>> [str(edge) for edge in encoder.edges(receivers=[Site("q", 0, unit=0)], slots=["negator", "eot"])]
            ['embed -> q 0.0 @negator', 'embed -> q 0.0 @eot']
        """
        if senders is None:
            senders = writers(self.n_layers, self.n_heads)
        if receivers is None:
            receivers = readers(self.n_layers, self.n_heads)
        if isinstance(slots, str):
            raise TypeError(f"slots are a list, got the text {slots!r}; write slots=[{slots!r}]")
        if slots is not None:
            at = tuple(slots)
            receivers = [
                replace(site, slot=slot) for site in receivers for slot in ((None,) if site.kind == "out" else at)
            ]
        ends = [
            sorted(
                dict.fromkeys(unit for site in sites for unit in self._single(site)), key=lambda site: order(site)[:4]
            )
            for sites in (senders, receivers)
        ]
        edges = [Edge(sender, receiver) for receiver in ends[1] for sender in ends[0] if precedes(sender, receiver)]
        if not edges:
            raise ValueError("no edge runs from these senders to these receivers; a receiver comes after its sender")
        return edges

    def _single(self, site: Site) -> list[Site]:
        return [site] if site.unit is not None else [replace(site, unit=unit) for unit in self.units(site.kind)]

    def units(self, kind: Kind) -> Iterable[int | None]:
        """The units of a kind: heads, neurons, or None where it has none."""
        if kind not in LAYOUTS or LAYOUTS[kind].unit_axis is None:
            return (None,)
        neurons = ".mlp." in LAYOUTS[kind].hook
        return range(self.tower.cfg.d_mlp if neurons else self.n_heads)

    def to(self, *args: Any, **kwargs: Any) -> HookedTextEncoder:
        """The encoder itself, moved or cast as `torch.nn.Module.to` does."""
        self.tower.to(*args, **kwargs)
        return self

    @property
    def full_name(self) -> str:
        """The model's name with its weights: "ViT-B-32 (openai)"."""
        return f"{self.name} ({self.pretrained})" if self.pretrained else self.name

    def __repr__(self) -> str:
        cfg = self.tower.cfg
        return (
            f"HookedTextEncoder({self.full_name}: {cfg.n_layers} layers x {cfg.n_heads} heads, d_model {cfg.d_model}, "
            f"d_embed {self.d_embed}, {cfg.attention_dir}, pooled at {self.pool.type}, scale {self.scale:.4g})"
        )

    def _repr_html_(self) -> str:
        return f"<code>{escape(repr(self))}</code>"


def unseen_words(encoder: HookedTextEncoder, tokens: Int[Tensor, "pair pos"]) -> Bool[Tensor, "pair"]:
    """For each text, whether it has a token that the model never saw; all False where the vocabulary is not known."""
    if encoder.vocabulary is None:
        return torch.zeros(len(tokens), dtype=torch.bool)
    known = torch.tensor(sorted({*encoder.vocabulary, encoder._pad}), device=tokens.device)
    return (~torch.isin(tokens, known)).any(1)
