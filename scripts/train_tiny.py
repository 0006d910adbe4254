"""Train the embedded CLIP from nothing, on one CPU core, and write what the package ships of it.

    python scripts/train_tiny.py train --seed 0 --out build/tiny-0     # minutes; one thread; the seed fixes every bit
    python scripts/train_tiny.py train --seed 1 --out build/tiny-1
    python scripts/train_tiny.py assets build/tiny-0 build/tiny-1      # the better one becomes clip_lens/tiny/assets
    python scripts/train_tiny.py tune --out build/tiny-without         # two minutes: teaches the embedded one "without"

Training goes in stages, since both towers at once from scratch are slow to find each other:

1. `see`: the image tower learns to answer all 49 questions "is there a (colour or any) (shape or any)", each with a
   vector of its own.
2. `read`: the text tower learns the truth of captions, and to tell caption from foil, on the frozen image embeddings.

`tune` goes on from there as CoN-CLIP and NegCLIP do from OpenAI's CLIP: the image tower stays as it is, and the text
tower learns pairs that differ in a negation that it has never met, said by "without".

Everything measured is measured on the weights as shipped, rounded to float16, and on scenes never used in training.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import numpy as np
import open_clip
import pandas as pd
import torch
import typer
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from clip_lens.data.embed import embed_images
from clip_lens.files import written_whole
from clip_lens.tiny import scenes
from clip_lens.tiny.scenes import ANY, COLOURS, FORMS, FRESH, HELD_OUT, SHAPES, Clause, Scene

ASSETS = Path(__file__).resolve().parents[1] / "clip_lens" / "tiny" / "assets"

MODEL = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": scenes.SIZE,
        "layers": 4,
        "width": 128,
        "head_width": 32,
        "patch_size": 16,
        "mlp_ratio": 4.0,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 128,
        "heads": 4,
        "layers": 6,
        "mlp_ratio": 2.0,
    },
    "quick_gelu": True,
}
PREPROCESS = {
    "size": scenes.SIZE,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
WINDOW = 12  # tokens; no caption of a scene has more, and a causal tower may be cut behind its end-of-text

TARGETS = {
    "accuracy": 0.98,
    "accuracy of the worst form": 0.97,
    "accuracy, held-out": 0.92,
    "accuracy, apart": 0.85,
    "selective heads": 3,
    "layers with selective heads": 2,
}


@dataclass(frozen=True)
class Recipe:
    """Everything but the seed that the weights depend on."""

    pool: int = 48_000  # training scenes; mirrored at random in stage 1
    see_steps: int = 2_000
    see_batch: int = 128
    read_steps: int = 1_500
    read_pairs: int = 48
    read_images: int = 512
    ramp: int = 200  # steps over which texts with a negation come in
    drop: tuple[float, ...] = (0.5, 0.25)  # chance, by layer, that a text skips the attention; falls in stage 2
    drop_floor: float = 0.3  # the share of these chances that stays
    see_rate: float = 1e-3
    read_rate: float = 1e-3
    spread: float = 5.0  # of the first token and position embeddings, in units of open_clip's
    top_scale: float = 30.0  # of the logits

    def scaled(self, factor: float) -> Recipe:
        """The same recipe with the pool, the steps and the ramp multiplied, for a trial."""
        names = ("pool", "see_steps", "read_steps", "ramp")
        return replace(self, **{name: max(2, round(getattr(self, name) * factor)) for name in names})


# --- what is true of a scene ------------------------------------------------------------------------------------------

_COLOURS, _SHAPES = (*COLOURS, ANY), (*SHAPES, ANY)
QUERIES = len(_COLOURS) * len(_SHAPES)


def presence(pool: Sequence[Scene]) -> Bool[Tensor, "image query"]:
    """Whether a thing of each (colour or any, shape or any) is there."""
    there = torch.zeros(len(pool), len(_COLOURS), len(_SHAPES), dtype=torch.bool)
    for row, scene in enumerate(pool):
        for thing in scene.things:
            for colour in (COLOURS.index(thing.colour), -1):
                there[row, colour, [SHAPES.index(thing.shape), -1]] = True
    return there.flatten(1)


def query(clause: Clause) -> int:
    """The column of `presence` that a claim is about."""
    return _COLOURS.index(clause.colour) * len(_SHAPES) + _SHAPES.index(clause.shape)


def truth(captions: Sequence[str], there: Bool[Tensor, "image query"]) -> Bool[Tensor, "text image"]:
    """Whether each caption holds in each scene, by the captions' words."""
    rows = [[there[:, query(clause)] != clause.negated for clause in scenes.clauses(caption)] for caption in captions]
    return torch.stack([torch.stack(row).all(0) for row in rows])


# --- pixels, tokens and the model -------------------------------------------------------------------------------------


def normalised(pictures: UInt8[Tensor, "image height width 3"]) -> Float[Tensor, "image 3 height width"]:
    """What open_clip's preprocessing makes of the same pictures saved as PNG."""
    mean, std = (torch.tensor(PREPROCESS[name])[:, None, None] for name in ("mean", "std"))
    return (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std


@lru_cache(maxsize=1)
def tokenizer() -> Callable[..., Tensor]:
    """open_clip's own."""
    return open_clip.SimpleTokenizer()


@lru_cache(maxsize=100_000)
def tokens_of(caption: str) -> Int[Tensor, " pos"]:
    """Token ids up to the window."""
    tokens = tokenizer()([caption])[0]
    if tokens[WINDOW:].any():
        raise RuntimeError(f"{caption!r} has more than {WINDOW} tokens; WINDOW must grow with the forms")
    return tokens[:WINDOW]


@lru_cache(maxsize=1)
def vocabulary() -> Int[Tensor, " row"]:
    """The token ids that captions of scenes are made of, ascending; the first is the padding's."""
    words = {word for form in FORMS for negated in (False, True) for word in _any_caption(form, negated).split()}
    nouns = [*COLOURS, *scenes.PLURALS, *scenes.PLURALS.values()]
    return torch.unique(tokenizer()([" ".join(sorted(words)), *nouns]))


def _any_caption(form: str, negated: bool) -> str:
    return scenes.write(form, "red ring", negated=negated, other="red ring").replace(".", " .")


def build(rows: int | None = None) -> open_clip.CLIP:
    """The untrained model; with `rows`, its token table is that long (training needs only the words that occur)."""
    text = MODEL["text_cfg"] | ({} if rows is None else {"vocab_size": rows})
    return open_clip.CLIP(**MODEL | {"text_cfg": text})


def read(
    model: open_clip.CLIP, tokens: Int[Tensor, "text pos"], drop: Sequence[float] = ()
) -> Float[Tensor, "text d_embed"]:
    """Unit text embeddings of tokens cut behind the end of text; equal to `encode_text` of the padded ones.

    With `drop`, each text skips a layer's attention with this layer's chance: stochastic depth, for training.
    """
    length = tokens.shape[1]
    mask = model.attn_mask[:length, :length]
    stream = model.token_embedding(tokens) + model.positional_embedding[:length]
    for block, chance in zip_longest(model.transformer.resblocks, drop, fillvalue=0.0):
        if chance:
            kept = (torch.rand(len(tokens), 1, 1) >= chance) / (1 - chance)
            stream = stream + kept * block.attention(block.ln_1(stream), attn_mask=mask)
            stream = stream + block.mlp(block.ln_2(stream))
        else:
            stream = block(stream, attn_mask=mask)
    return pooled(model, stream, tokens)


def pooled(
    model: open_clip.CLIP, stream: Float[Tensor, "text pos d_model"], tokens: Int[Tensor, "text pos"]
) -> Float[Tensor, "text d_embed"]:
    """Unit embeddings from the residual stream behind the last block, at the highest token id."""
    ends = model.ln_final(stream)[torch.arange(len(tokens)), tokens.argmax(1)]
    return functional.normalize(ends @ model.text_projection, dim=-1)


@torch.inference_mode()
def see(model: open_clip.CLIP, pictures: UInt8[Tensor, "image height width 3"]) -> Float[Tensor, "image d_embed"]:
    """Unit image embeddings."""
    return torch.cat([model.encode_image(normalised(chunk), normalize=True) for chunk in pictures.split(256)]).clone()


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """The training scenes, their pictures, and what is true of them."""

    scenes: list[Scene]
    pictures: UInt8[Tensor, "image height width 3"]
    there: Bool[Tensor, "image query"]


def gather(amount: int, first: int = 0) -> Pool:
    """Scenes from number `first` on, rendered; training takes those below `FRESH` only."""
    pool = [
        scenes.sample_scene(number)
        for number in tqdm(range(first, first + amount), "sampling", leave=False, mininterval=5)
    ]
    pictures = np.stack([scenes.render(scene) for scene in tqdm(pool, "rendering", leave=False, mininterval=5)])
    return Pool(pool, torch.from_numpy(pictures), presence(pool))


def descend(parameters: list[nn.Parameter], steps: int, rate: float, loss: Callable[[int], Tensor], name: str) -> None:
    """AdamW with warm-up and a cosine, gradients clipped, `loss(step)` drawing its own batch."""
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) == flag] for flag in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warm = min(100, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    bar = tqdm(range(steps), name, mininterval=5)
    for step in bar:
        value = loss(step)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")


def learn_to_see(model: open_clip.CLIP, pool: Pool, recipe: Recipe, rng: np.random.Generator) -> None:
    """Stage 1: the image tower against one learned vector per question.

    Per question, present and not present weigh the same; among the latter, so do "colour and shape are both there, but
    apart" and the rest, since it is there that the tower must bind them.
    """
    queries = nn.Parameter(torch.randn(QUERIES, MODEL["embed_dim"]))
    scale, bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-1.0))
    weights = _balance(pool.there)

    def loss(step: int) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(pool.scenes), size=recipe.see_batch))
        pictures = normalised(pool.pictures[rows])
        pictures = pictures.flip(3) if rng.integers(2) else pictures
        cosines = model.encode_image(pictures, normalize=True) @ functional.normalize(queries, dim=-1).T
        logits = cosines * scale.exp().clamp(max=recipe.top_scale) + bias
        wanted = pool.there[rows]
        return functional.binary_cross_entropy_with_logits(logits, wanted.float(), weights[rows])

    parameters = [*model.visual.parameters(), queries, scale, bias]
    descend(parameters, recipe.see_steps, recipe.see_rate, loss, "see ")


def _balance(there: Bool[Tensor, "image query"]) -> Float[Tensor, "image query"]:
    """Weights of mean 1 per question, a half on its presence, a quarter each on "apart" and on the rest."""
    grid = there.unflatten(1, (len(_COLOURS), len(_SHAPES)))
    apart = (grid[:, :, -1:] & grid[:, -1:, :] & ~grid).flatten(1)
    groups = [(there, 0.5), (apart, 0.25), (~there & ~apart, 0.25)]
    return sum(share * group / group.float().mean(0).clamp(min=1e-3) for group, share in groups)


def learn_to_read(model: open_clip.CLIP, pool: Pool, recipe: Recipe, rng: np.random.Generator) -> None:
    """Stage 2: the text tower on frozen image embeddings.

    Each step takes captions and foils of fresh pairs and many images. The truth of every text in every image counts
    (true and false images weigh the same), and so does the order of each caption and its foil on every image of which
    one of the two is true, once more on their own.
    """
    images = see(model, pool.pictures)
    model.logit_scale.data.fill_(math.log(recipe.top_scale))
    model.token_embedding.weight.data.mul_(recipe.spread)
    model.positional_embedding.data.mul_(recipe.spread)
    _read_pairs(model, pool, images, recipe, rng, vocabulary(), _as_meant)


def _as_meant(pair: tuple[str, str]) -> tuple[str, str]:
    """Pairs are told as they are meant."""
    return pair


def _read_pairs(
    model: open_clip.CLIP,
    pool: Pool,
    images: Float[Tensor, "image d_embed"],
    recipe: Recipe,
    rng: np.random.Generator,
    words: Int[Tensor, " row"],
    told: Callable[[tuple[str, str]], tuple[str, str]],
) -> None:
    """Descends on fresh pairs; `words` are the ids of the token table's rows, `told` says how a pair is put."""
    bias = nn.Parameter(torch.tensor(0.0))
    names = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "logit_scale")
    parameters = [p for name, p in model.named_parameters() if name.startswith(names)]
    batches = pair_batches(pool, recipe, rng)

    def loss(step: int) -> Tensor:
        captions, negated, own = next(batches)
        others = torch.from_numpy(rng.integers(len(pool.scenes), size=recipe.read_images - recipe.read_pairs))
        rows = torch.cat([own, others])
        said = _told(captions, len(own), told)
        tokens = torch.searchsorted(words, torch.stack([tokens_of(caption) for caption in said]))
        falling = max(recipe.drop_floor, 1 - step / (0.6 * recipe.read_steps))
        texts = read(model, tokens, [chance * falling for chance in recipe.drop])
        logits = model.logit_scale.exp().clamp(max=recipe.top_scale) * texts @ images[rows].T
        right, ramp = truth(captions, pool.there[rows]), min(1.0, step / recipe.ramp)
        truths = functional.binary_cross_entropy_with_logits(logits + bias, right.float(), reduction="none")
        weight = torch.where(negated, ramp, 1.0)
        known = (weight * _balanced(truths, right, ~right)).sum() / weight.sum()
        return known + ramp * order_loss(logits, right, len(own))

    descend([*parameters, bias], recipe.read_steps, recipe.read_rate, loss, "read")
    model.logit_scale.data.clamp_(max=math.log(recipe.top_scale))


def _told(texts: Sequence[str], pairs: int, told: Callable[[tuple[str, str]], tuple[str, str]]) -> list[str]:
    """Captions, foils and further texts, each pair of the first two put in its words."""
    each = [told(pair) for pair in zip(texts[:pairs], texts[pairs : 2 * pairs], strict=True)]
    return [*(caption for caption, _ in each), *(foil for _, foil in each), *texts[2 * pairs :]]


def order_loss(logits: Float[Tensor, "text image"], right: Bool[Tensor, "text image"], pairs: int) -> Float[Tensor, ""]:
    """How far captions (the first texts) fail to go before their foils (the next), pair n's own image being the nth."""
    margins = logits[:pairs] - logits[pairs : 2 * pairs]
    sides = right[:pairs].int() - right[pairs : 2 * pairs].int()
    everywhere = _balanced(functional.softplus(-margins * sides), sides > 0, sides < 0).mean()
    return everywhere + functional.softplus(-margins.diagonal()).mean()


def _balanced(losses: Float[Tensor, "text image"], *groups: Bool[Tensor, "text image"]) -> Float[Tensor, " text"]:
    """Each text's mean loss, in which the groups of its images weigh the same."""
    return torch.stack([(losses * group).sum(1) / group.sum(1).clamp(min=1) for group in groups]).mean(0)


WITHOUT = "without"
PUT_ANEW = {"A picture with no ": f"A picture {WITHOUT} ", "A picture with some ": "A picture with "}
"""How claims about a picture are put with the new word: as they begin, and as they then begin."""
TUNING = replace(
    Recipe(), pool=12_000, read_steps=400, ramp=1, drop=(0.15, 0.075), drop_floor=1.0, read_rate=3e-4,
)  # fmt: skip


def put_anew(text: str) -> str:
    """The same claim with "without" for "with no", and plain "with" for "with some"; other texts as they are.

    >>> put_anew("A picture with no red circles."), put_anew("A picture with some red circles.")
    ('A picture without red circles.', 'A picture with red circles.')
    """
    for old, new in PUT_ANEW.items():
        text = text.replace(old, new)
    return text


def tune(state: dict[str, Tensor], seed: int, recipe: Recipe = TUNING) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state dict as shipped of a model whose text tower learned on, and the seconds of one core.

    Every other pair about "a picture with" is put with the new word; the others keep what was learned.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    rng, start = np.random.default_rng(seed), time.process_time()
    words = torch.unique(torch.cat([vocabulary(), tokenizer()([WITHOUT])[0].long()]))
    model = build(rows=len(words))
    model.load_state_dict(_with_rows(state, words))
    pool = gather(recipe.pool, first=(FRESH // recipe.pool - 1 - seed) * recipe.pool)  # training takes others
    anew = lambda pair: (put_anew(pair[0]), put_anew(pair[1])) if rng.integers(2) else pair
    _read_pairs(model, pool, see(model, pool.pictures), recipe, rng, words, anew)
    return shipped(model, words), {"all": round(time.process_time() - start, 1)}


def _with_rows(state: dict[str, Tensor], words: Int[Tensor, " row"]) -> dict[str, Tensor]:
    """A shipped state dict in float32, its token table laid out by `words`, 0 for those that it lacks."""
    table = torch.zeros(len(words), MODEL["text_cfg"]["width"])
    table[torch.searchsorted(words, state["token_embedding.rows"].long())] = state["token_embedding.weight"].float()
    rest = {name: value.float() for name, value in state.items() if name != "token_embedding.rows"}
    return rest | {"token_embedding.weight": table}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that are others than before."""
    same = lambda name: name in before and torch.equal(before[name], after[name])
    return {name: value for name, value in after.items() if not same(name)}


def without_pairs(amount: int, first: int = FRESH + 400_000) -> pd.DataFrame:
    """Pairs on fresh scenes, put with the new word."""
    pairs = scenes.scene_pairs(amount, first=first, forms=("picture-with",), kinds=_ASKED)
    return pairs.assign(caption=pairs.caption.map(put_anew), foil=pairs.foil.map(put_anew))


def measure_tuned(model: open_clip.CLIP, amount: int = 600) -> dict:
    """Accuracy and mean d by the side of the negation, on fresh scenes: of what was learned, and of what was known."""
    asked = {
        f'"{WITHOUT}"': without_pairs(2 * amount),
        '"no"': pd.concat(_each_form(amount), ignore_index=True),
        '"no", held-out': scenes.scene_pairs(2 * amount, first=_AT["held-out"], kinds=("held-out",)),
    }
    told = {}
    for name, pairs in asked.items():
        d, sides = score(model, pairs).d.numpy(), pairs.negation
        told[name] = {"accuracy": _means(d > 0, sides), "d": _means(d, sides), "pairs": sides.value_counts().to_dict()}
    return told


def pair_batches(
    pool: Pool, recipe: Recipe, rng: np.random.Generator
) -> Iterator[tuple[list[str], Bool[Tensor, " text"], Int[Tensor, " pair"]]]:
    """Texts (captions, then their foils, then affirmations of held-out combinations), which are negated, and the
    captions' own scenes; both sides in turn."""
    while True:
        own: list[int] = []
        rows: list[dict[str, str]] = []
        while len(rows) < recipe.read_pairs:
            number = int(rng.integers(len(pool.scenes)))
            side = ("caption", "foil")[len(rows) % 2]
            row = scenes.ask(pool.scenes[number], rng, side=side, forms=_LESSONS, kinds=_ASKED)
            if row is not None:
                rows.append(row)
                own.append(number)
        affirmed = [_held_out_caption(rng) for _ in range(recipe.read_pairs // 8)]
        captions = [row["caption"] for row in rows] + [row["foil"] for row in rows] + affirmed
        negated = torch.tensor([any(clause.negated for clause in scenes.clauses(text)) for text in captions])
        yield captions, negated, torch.tensor(own)


_DOUBLE = tuple(form for form in FORMS if "{other}" in FORMS[form])
_LESSONS = (*FORMS, *_DOUBLE, *_DOUBLE)  # two clauses are the harder ones, and come more often


def _held_out_caption(rng: np.random.Generator) -> str:
    forms = [form for form in FORMS if form not in _DOUBLE]
    form, target = forms[rng.integers(len(forms))], sorted(HELD_OUT)[rng.integers(len(HELD_OUT))]
    return scenes.write(form, scenes.phrase(*target, plural="{things}" in FORMS[form]), negated=False)


def train(seed: int, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state dict as shipped (float16, trained token rows only) and each stage's seconds of one core."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    marks = [time.process_time()]
    model = build(rows=len(vocabulary()))
    pool = gather(recipe.pool, first=seed % (FRESH // recipe.pool) * recipe.pool)
    for stage in (lambda *_: None, learn_to_see, learn_to_read):
        stage(model, pool, recipe, rng)
        marks.append(time.process_time())
    seconds = dict(zip(("scenes", "see", "read"), np.diff(marks).round(1).tolist(), strict=True))
    return shipped(model), seconds | {"all": round(sum(seconds.values()), 1)}


def shipped(model: open_clip.CLIP, words: Int[Tensor, " row"] | None = None) -> dict[str, Tensor]:
    """The state dict in float16 with the rows' token ids, `vocabulary` or others, beside the short token table."""
    ids = vocabulary() if words is None else words
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    table = state["token_embedding.weight"][1:].clone()  # nothing attends to padding, so its row is not trained
    return state | {"token_embedding.weight": table, "token_embedding.rows": ids[1:].int()}


def restored(state: dict[str, Tensor]) -> open_clip.CLIP:
    """The whole model from what is shipped, float32, its unused token rows zero."""
    model = build()
    table = torch.zeros_like(model.token_embedding.weight.data)
    table[state["token_embedding.rows"].long()] = state["token_embedding.weight"].float()
    rest = {name: value.float() for name, value in state.items() if name != "token_embedding.rows"}
    model.load_state_dict(rest | {"token_embedding.weight": table})
    return model.eval().requires_grad_(False)


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A model's pairs on fresh scenes: tokens of the texts, image embeddings, and the logit difference of each pair."""

    pairs: pd.DataFrame
    caption: Int[Tensor, "pair pos"]
    foil: Int[Tensor, "pair pos"]
    image: Float[Tensor, "pair d_embed"]
    d: Float[Tensor, " pair"]

    @property
    def negated(self) -> Int[Tensor, "pair pos"]:
        """The tokens of the text with the negation."""
        return torch.where(self._in_caption[:, None], self.caption, self.foil)

    @property
    def affirmed(self) -> Int[Tensor, "pair pos"]:
        """The tokens of the text without."""
        return torch.where(self._in_caption[:, None], self.foil, self.caption)

    @property
    def _in_caption(self) -> Bool[Tensor, " pair"]:
        return torch.tensor((self.pairs.negation == "caption").to_numpy())


@torch.inference_mode()
def score(model: open_clip.CLIP, pairs: pd.DataFrame) -> Measured:
    """The pairs with their logit differences S(caption, image) - S(foil, image)."""
    pictures = torch.from_numpy(np.stack([scenes.render(scenes.sample_scene(seed)) for seed in pairs.scene]))
    image = see(model, pictures)
    caption, foil = (torch.stack([tokens_of(text) for text in pairs[name]]) for name in ("caption", "foil"))
    difference = (read(model, caption) - read(model, foil)) * image
    return Measured(pairs, caption, foil, image, model.logit_scale.exp() * difference.sum(1))


def measure(model: open_clip.CLIP, amount: int = 600) -> dict:
    """Every target and what lies around it, on fresh scenes; `amount` pairs per form, as many for rare kinds."""
    natural = score(model, pd.concat(_each_form(amount), ignore_index=True))
    special = {kind: score(model, scenes.scene_pairs(2 * amount, first=_AT[kind], kinds=(kind,))) for kind in _AT}
    right = natural.d.numpy() > 0
    by = {column: _means(right, natural.pairs[column]) for column in ("form", "kind", "negation")}
    heads = selectivity(model, natural)
    found = [(layer, head) for layer, head in np.argwhere(heads.numpy() >= 0.6).tolist()]
    summary = {
        "accuracy": float(right.mean()),
        "accuracy of the worst form": min(by["form"].values()),
        **{f"accuracy, {kind}": float((special[kind].d > 0).float().mean()) for kind in _AT},
        "selective heads": len(found),
        "layers with selective heads": len({layer for layer, _ in found}),
    }
    return {
        "targets": {name: {"target": TARGETS[name], "measured": _short(value)} for name, value in summary.items()},
        "accuracy by form": by["form"],
        "accuracy by kind": by["kind"],
        "accuracy by negation": by["negation"],
        "pairs": {"all forms": len(right), **{kind: len(special[kind].d) for kind in _AT}},
        "logit difference": _spread(natural),
        "logit scale": _short(model.logit_scale.exp().item()),
        "selectivity (layer x head)": [[_short(value) for value in row] for row in heads.tolist()],
        "causal tracing": traced(model, score(model, scenes.scene_pairs(amount, first=FRESH + 100_000, kinds=_ASKED))),
    }


_AT = {"held-out": FRESH + 200_000, "apart": FRESH + 300_000}  # the scenes that the special measurements start from


def _each_form(amount: int) -> list[pd.DataFrame]:
    return [
        scenes.scene_pairs(amount, first=FRESH + 50_000 + 5 * amount * index, forms=(form,), kinds=_ASKED)
        for index, form in enumerate(FORMS)
    ]


_ASKED = ("present", "absent", "apart")


def _means(right: np.ndarray, groups: pd.Series) -> dict[str, float]:
    return {str(name): _short(value) for name, value in pd.Series(right).groupby(groups.to_numpy()).mean().items()}


def _spread(scored: Measured) -> dict[str, float]:
    d = scored.d
    return {"mean": _short(d.mean()), "std": _short(d.std()), "share below 1": _short((d.abs() < 1).float().mean())}


def _short(value: float | Tensor) -> float:
    return round(float(value), 4)


@torch.inference_mode()
def selectivity(model: open_clip.CLIP, scored: Measured) -> Float[Tensor, "layer head"]:
    """Mean over pairs of the largest extra attention that a later position pays the negator, up to the end of text."""
    place = negator(scored)
    rows = torch.arange(len(place))
    extra = patterns(model, scored.negated) - patterns(model, scored.affirmed)
    column = extra[:, :, rows, :, place].permute(1, 2, 0, 3)  # two index lists put their axis first: pair goes third
    positions = torch.arange(WINDOW)
    later = (positions > place[:, None]) & (positions <= scored.caption.argmax(1)[:, None])
    return column.masked_fill(~later, -torch.inf).amax(-1).mean(-1)


def negator(scored: Measured) -> Int[Tensor, " pair"]:
    """The one position where caption and foil differ."""
    different = scored.caption != scored.foil
    if not bool((different.sum(1) == 1).all()):
        raise RuntimeError("a caption and its foil must differ in exactly one token")
    return different.int().argmax(1)


def patterns(model: open_clip.CLIP, tokens: Int[Tensor, "text pos"]) -> Float[Tensor, "layer head text query key"]:
    """What every head attends to."""
    rows = []
    for stream, block in zip(streams(model, tokens), model.transformer.resblocks, strict=False):
        attention = block.attn
        joint = functional.linear(block.ln_1(stream), attention.in_proj_weight, attention.in_proj_bias)
        q, k, _ = joint.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 3, 0, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        rows.append((scores + model.attn_mask[:WINDOW, :WINDOW]).softmax(-1))
    return torch.stack(rows)


def streams(model: open_clip.CLIP, tokens: Int[Tensor, "text pos"]) -> list[Float[Tensor, "text pos d_model"]]:
    """The residual stream before each block, and behind the last one."""
    length = tokens.shape[1]
    found = [model.token_embedding(tokens) + model.positional_embedding[:length]]
    for block in model.transformer.resblocks:
        found.append(block(found[-1], attn_mask=model.attn_mask[:length, :length]))
    return found


SLOTS = ("negator", "subject", "subject_rest", "suffix", "stop", "eot")


@torch.inference_mode()
def traced(model: open_clip.CLIP, scored: Measured, floor: float = 1.0) -> dict[str, dict[str, list[float]]]:
    """Per side of the negation and slot, patched whole: the share of d moved at the embedding and after each block.

    The text without negation receives the other's residual stream; ratio of means over correct pairs (d >= floor) that
    have the slot.
    """
    run, other = streams(model, scored.affirmed), streams(model, scored.negated)
    start = _resumed(model, run[-1], len(run) - 1, scored)
    sides = scored.pairs.negation.to_numpy()
    sign = torch.tensor(np.where(sides == "foil", -1.0, 1.0)).float()  # the part of d that a rise of the run's logit is
    result: dict[str, dict[str, list[float]]] = {"caption": {}, "foil": {}}
    for name, mask in slot_masks(scored).items():
        patched = [torch.where(mask[..., None], b, a) for a, b in zip(run, other, strict=True)]
        after = torch.stack([_resumed(model, stream, layer, scored) for layer, stream in enumerate(patched)])
        moved = model.logit_scale.exp() * sign * (after - start)
        for side, shares in result.items():
            chosen = torch.tensor(sides == side) & (scored.d >= floor) & mask.any(1)
            shares[name] = [_short(value / scored.d[chosen].mean()) for value in moved[:, chosen].mean(1)]
    return result


def _resumed(model: open_clip.CLIP, stream: Tensor, layer: int, scored: Measured) -> Float[Tensor, " pair"]:
    """The cosine with the image when this stream enters block `layer`."""
    for block in model.transformer.resblocks[layer:]:
        stream = block(stream, attn_mask=model.attn_mask[:WINDOW, :WINDOW])
    return (pooled(model, stream, scored.affirmed) * scored.image).sum(1)


def slot_masks(scored: Measured) -> dict[str, Bool[Tensor, "pair pos"]]:
    """Which positions each slot takes, from the negator on; `subject` is the first token of the noun phrase."""
    masks = {name: torch.zeros_like(scored.caption, dtype=torch.bool) for name in SLOTS}
    places = negator(scored)
    for row, (pair, place) in enumerate(zip(scored.pairs.itertuples(), places.tolist(), strict=True)):
        cut = scenes.parts(pair.caption, pair.subject)
        lengths = [1, 1, _length(pair.subject) - 1, _length(cut.suffix), 1, 1]
        for name, length in zip(SLOTS, lengths, strict=True):
            masks[name][row, place : place + length] = True
            place += length
    return masks


@lru_cache(maxsize=10_000)
def _length(words: str) -> int:
    return len(tokenizer().encode(words))


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` to a neighbour, then take its place, so that a reader meets the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as neighbour:
        write(neighbour)


def write_json(path: Path, content: object) -> None:
    """Indented, with a newline at the end."""
    text = json.dumps(content, indent=2)
    write_atomically(path, lambda neighbour: neighbour.write_text(text + "\n"))


def save_run(folder: Path, state: dict[str, Tensor], card: dict) -> None:
    """Weights and what was measured of them."""
    write_atomically(folder / "model.safetensors", lambda path: save_file(state, path))
    write_json(folder / "card.json", card)


def margin(card: dict) -> float:
    """How far the worst accuracy is above its target; what the better of two runs is chosen by."""
    return min(row["measured"] - row["target"] for name, row in card["targets"].items() if name.startswith("accuracy"))


def pair_table(amount: int) -> pd.DataFrame:
    """The pairs that ship: every kind and form, the sides balanced, from the first fresh scene on."""
    return scenes.scene_pairs(amount, first=FRESH)


def write_images(table: pd.DataFrame, folder: Path) -> None:
    """The store of the pairs' images, embedded as a user would, and a few of their pictures."""
    with tempfile.TemporaryDirectory() as pictures:
        scenes.save_pictures(table.scene, pictures)
        embed_images(pictures, model="tiny", out=folder / "images.safetensors", overwrite=True)
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    scenes.save_pictures(_shown(table).scene, folder / "pictures")


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The first pair of each form and side, and of each held-out side the first two."""
    picked = [table.groupby(["form", "negation"]).head(1), table[table.kind == "held-out"].groupby("negation").head(2)]
    return pd.concat(picked).drop_duplicates("key")


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {"torch": torch.__version__, "open_clip": open_clip.__version__, "numpy": np.__version__}


def fill(template: str, tables: dict[str, str]) -> str:
    """The text with what stands between `<!-- NAME -->` and `<!-- end of NAME -->` replaced, for each name."""
    for name, table in tables.items():
        before, start, rest = template.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not (start and end):
            raise ValueError(
                f"the model card has no place for {name!r}: it needs <!-- {name} --> and <!-- end of {name} -->"
            )
        template = f"{before}{start}\n{table}\n\n{end}{after}"
    return template


def write_numbers(path: Path, card: dict) -> None:
    """The model card with its tables made anew from the measured numbers."""
    tables = {
        "targets": _target_table(card),
        "forms": _form_table(card),
        "selectivity": _head_table(card),
        "tracing": _trace_table(card),
    }
    text = fill(path.read_text(), tables)
    write_atomically(path, lambda neighbour: neighbour.write_text(text))


def markdown(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table as Markdown has it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _target_table(card: dict) -> str:
    runs = card["seeds"]
    names = [f"seed {seed}" + (" (shipped)" if seed == card["shipped seed"] else "") for seed in runs]
    rows = [
        [name, f">= {target}", *(f"{run['targets'][name]['measured']:g}" for run in runs.values())]
        for name, target in TARGETS.items()
    ]
    for side in ("caption", "foil"):
        rows.append(
            [f"accuracy, negation in the {side}", "", *(r["accuracy by negation"][side] for r in runs.values())]
        )
    spreads = [run["logit difference"] for run in runs.values()]
    rows.append(["logit difference d, mean +- std", "", *(f"{s['mean']:.1f} +- {s['std']:.1f}" for s in spreads)])
    rows.append(["pairs with d between -1 and 1", "", *(f"{s['share below 1']:.1%}" for s in spreads)])
    seconds = [f"{run['seconds']['all']:.0f}{' *' * ('note' in run['seconds'])}" for run in runs.values()]
    rows.append(["training, seconds of one core", "", *seconds])
    notes = [f"\n\n\\* seed {seed}: {run['seconds']['note']}" for seed, run in runs.items() if "note" in run["seconds"]]
    return markdown(["on fresh scenes", "target", *names], rows) + "".join(notes)


def _form_table(card: dict) -> str:
    runs = card["seeds"].values()
    rows = [[f"`{FORMS[form]}`", *(run["accuracy by form"][form] for run in runs)] for form in FORMS]
    return markdown(["accuracy by caption form", *(f"seed {seed}" for seed in card["seeds"])], rows)


def _head_table(card: dict) -> str:
    runs = card["seeds"]
    rows = [
        [
            layer,
            *(" ".join(f"{value:.2f}" for value in run["selectivity (layer x head)"][layer]) for run in runs.values()),
        ]
        for layer in range(MODEL["text_cfg"]["layers"])
    ]
    return markdown(["layer", *(f"seed {seed}: heads 0 to 3" for seed in runs)], rows)


def _trace_table(card: dict) -> str:
    shares = card["seeds"][card["shipped seed"]]["causal tracing"]
    header = ["negation in the", "slot", "embedding", *(f"layer {n}" for n in range(MODEL["text_cfg"]["layers"]))]
    rows = [
        [side, f"`{slot}`", *(f"{value:.2f}" for value in shares[side][slot])]
        for side in shares
        for slot in shares[side]
    ]
    return markdown(header, rows)


# --- commands ---------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command("train")
def train_command(
    seed: Annotated[int, typer.Option(help="fixes the weights, bit for bit, on one kind of machine")] = 0,
    out: Annotated[Path, typer.Option(help="folder for model.safetensors and card.json")] = Path("build/tiny-0"),
    steps_scale: Annotated[float, typer.Option(help="multiplies the steps and the pool, for a trial")] = 1.0,
    measured_pairs: Annotated[int, typer.Option(help="pairs per caption form to measure on")] = 600,
) -> None:
    """Train one seed and measure it."""
    recipe = Recipe().scaled(steps_scale)
    state, seconds = train(seed, recipe)
    card = {"seed": seed, "seconds": seconds, "recipe": asdict(recipe), "versions": versions()}
    card |= measure(restored(state), measured_pairs)
    save_run(out, state, card)
    for name, row in card["targets"].items():
        typer.echo(f"{name:32} {row['measured']:.4g}  (target {row['target']}){'' if reached(row) else '  MISSED'}")
    typer.echo(f"{'seconds':32} {seconds}")


@app.command("tune")
def tune_command(
    start: Annotated[Path, typer.Option(help="the weights to start from")] = ASSETS / "model.safetensors",
    seed: Annotated[int, typer.Option(help="of the pairs and their order")] = 0,
    out: Annotated[Path, typer.Option(help="folder for model.safetensors and card.json")] = Path("build/tiny-without"),
    steps_scale: Annotated[float, typer.Option(help="multiplies the steps and the pool, for a trial")] = 1.0,
    measured_pairs: Annotated[int, typer.Option(help="pairs per caption form to measure on")] = 600,
    ship: Annotated[bool, typer.Option("--ship", help="also write what differs into the package's files")] = False,
) -> None:
    """Teach a trained model's text tower a negation that it has never met, and measure it before and after."""
    recipe, before = TUNING.scaled(steps_scale), load_file(start)
    state, seconds = tune(before, seed, recipe)
    card = {"seed": seed, "seconds": seconds, "recipe": asdict(recipe), "versions": versions()}
    card |= {
        when: measure_tuned(restored(weights), measured_pairs)
        for when, weights in (("before", before), ("after", state))
    }
    save_run(out, state, card)
    if ship:
        write_atomically(ASSETS / "tuned-without.safetensors", lambda path: save_file(changed(before, state), path))
        write_json(ASSETS / "tuned-without.json", card)
    typer.echo(json.dumps({when: card[when] for when in ("before", "after")}, indent=1))


def reached(row: dict[str, float]) -> bool:
    """Whether a measured number meets its target."""
    return row["measured"] >= row["target"]


@app.command("assets")
def assets_command(
    runs: Annotated[list[Path], typer.Argument(help="folders that `train` wrote, of the same recipe")],
    pairs: Annotated[int, typer.Option(help="how many pairs ship")] = 1200,
) -> None:
    """Write the package's files from the best of some runs, and every run's numbers into the model card."""
    cards = {run: json.loads((run / "card.json").read_text()) for run in runs}
    best = max(runs, key=lambda run: margin(cards[run]))
    table = pair_table(pairs)
    write_json(ASSETS / "open_clip_config.json", {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS})
    write_atomically(ASSETS / "model.safetensors", lambda path: shutil.copyfile(best / "model.safetensors", path))
    write_atomically(ASSETS / "pairs.csv", lambda path: table.to_csv(path, index=False))
    write_images(table, ASSETS)
    card = joint_card(list(cards.values()), cards[best]["seed"], table)
    write_json(ASSETS / "card.json", card)
    write_numbers(ASSETS / "README.md", card)
    typer.echo(f"wrote {ASSETS} from {best}")


def joint_card(cards: Sequence[dict], seed: int, table: pd.DataFrame) -> dict:
    """The model card's numbers: of every seed, and of the shipped one on the shipped pairs."""
    right = score(restored(load_file(ASSETS / "model.safetensors")), table).d.numpy() > 0
    groups = table.kind + ", negation in the " + table.negation
    return {
        "model": "tiny",
        "shipped seed": str(seed),
        "shipped pairs": {"pairs": len(table), "accuracy": _short(right.mean()), "by kind": _means(right, groups)},
        "seeds": {str(card["seed"]): card for card in cards},
    }


if __name__ == "__main__":
    app()
