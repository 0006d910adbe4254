"""Text towers with weights written by hand, in which the edges that matter are known: what every search must return.

    tower = handmade("chain")
    effects = patch_effects(tower.encoder, tower.batch, tower.encoder.edges())
    # non-zero exactly at tower.edges

How they are made. The residual stream holds *features*, two dimensions each: a feature of value a stands there as
(a, -a), so that its mean is 0. Every token has the feature CONSTANT; "no" has WORD = +1 and "some" WORD = -1; "there" has
PLACE = +1 and the noun PLACE = -1. Captions and foils differ in "no"/"some" alone, so whatever one text has of WORD, or
of what is made of it, the other has with the opposite sign: squares, and with them what LayerNorms divide by, are the
same in both, whichever edges are patched. A component that is not written gives exactly 0. A head moves one feature into
another (attention is even unless q and k are written), an MLP does the same through two opposite neurons, and the output
reads some of the features. So an edge matters if, and only if, it carries a feature made of WORD to a reader of it.

| name | what it tests | edges |
|---|---|---|
| chain | two heads, two blocks apart | embed -> v 0.1, head 0.1 -> v 2.0, head 2.0 -> out |
| mlp | a step through an MLP | embed -> v 0.2, head 0.2 -> mlp 1, mlp 1 -> out |
| query | the word says where to look | embed -> v 0.1, head 0.1 -> q 1.3, head 1.3 -> out |
| key | the word says where to be found (causal towers: it needs places before the word) | embed -> v 0.0, head 0.0 -> k 1.2, head 1.2 -> out |
| parallel | two ways side by side, one by an MLP | 6 edges |
| opposed | one edge works against the rest: head 0.0 -> out | 4 edges |
"""  # noqa: E501

from dataclasses import dataclass
from functools import cache

import open_clip
import torch
from torch import nn
from towers import random_clip

from clip_lens.data.batch import Batch, align
from clip_lens.data.images import ImageStore
from clip_lens.data.pairs import Pairs
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.model.load import load
from clip_lens.model.site import Edge, Site

CONSTANT, WORD, PLACE, A, B, OUT, MORE = range(7)
LAYERS, HEADS, WIDTH = 3, 4, 32
NOUNS = ("dogs", "cats", "people", "trees")
NAMES = ("chain", "mlp", "query", "key", "parallel", "opposed")
EMBED, READ = Site("embed"), Site("out")


@dataclass(frozen=True)
class Handmade:
    """A tower, pairs aligned for it, and the edges that matter; `negative` are those that work against d."""

    clip: nn.Module
    encoder: HookedTextEncoder
    batch: Batch
    edges: frozenset[Edge]
    negative: frozenset[Edge]


class Writer:
    """A tower whose components all give 0, and what writes some of them."""

    def __init__(self, causal):
        self.clip = random_clip(layers=LAYERS, width=WIDTH, heads=HEADS, d_embed=2, causal=causal).double()
        self.text = getattr(self.clip, "text", self.clip)
        for name, parameter in self.clip.named_parameters():
            if name != "logit_scale":
                nn.init.constant_(parameter, float("ln_" in name and name.endswith("weight")))
        self.clip.requires_grad_(False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=77 if causal else 16)
        self.text.token_embedding.weight[:] = 4 * feature(CONSTANT)
        for word, (kind, value) in {"no": (WORD, 1), "some": (WORD, -1), "there": (PLACE, 1)}.items():
            self.text.token_embedding.weight[self.token(word)] += value * feature(kind)
        for noun in NOUNS:
            self.text.token_embedding.weight[self.token(noun)] -= feature(PLACE)
        self.reads(CONSTANT, 1.0, column=1)

    def token(self, word):
        return int(self.tokenizer([word])[0, 1])

    def projection(self, layer, head, kind):
        """The rows of q, k or v of a head, [d_head d_model]."""
        weight = self.text.transformer.resblocks[layer].attn.in_proj_weight
        return weight.unflatten(0, (3, HEADS, -1))["qkv".index(kind), head]

    def looks(self, layer, head, kind, feature_, gain):
        """q or k of a head reads a feature."""
        self.projection(layer, head, kind)[0] = gain * feature(feature_) / 2

    def moves(self, layer, head, source, target, gain=8.0):
        """A head adds the feature `source` of what it looks at, times `gain`, to the feature `target`."""
        self.projection(layer, head, "v")[0] = feature(source) / 2
        out = self.text.transformer.resblocks[layer].attn.out_proj.weight
        out.unflatten(1, (HEADS, -1))[:, head, 0] = gain * feature(target)

    def turns(self, layer, source, target, gain=8.0):
        """An MLP adds an odd function of one feature to another."""
        mlp = self.text.transformer.resblocks[layer].mlp
        for neuron, sign in enumerate((1, -1)):
            mlp.c_fc.weight[neuron] = sign * feature(source) / 2
            mlp.c_proj.weight[:, neuron] = sign * gain * feature(target)

    def reads(self, source, gain=1.0, column=0):
        """The output reads a feature: column 0 is what the images are along."""
        self.text.text_projection[:, column] += gain * feature(source) / 2


def feature(number):
    x = torch.zeros(WIDTH, dtype=torch.float64)
    x[2 * number], x[2 * number + 1] = 1.0, -1.0
    return x


def head(layer, unit):
    return Site("head", layer, unit)


def chain(to):
    to.moves(0, 1, WORD, A)
    to.moves(2, 0, A, OUT)
    to.reads(OUT)
    return [(EMBED, Site("v", 0, 1)), (head(0, 1), Site("v", 2, 0)), (head(2, 0), READ)], []


def mlp(to):
    to.moves(0, 2, WORD, A)
    to.turns(1, A, OUT)
    to.reads(OUT)
    return [(EMBED, Site("v", 0, 2)), (head(0, 2), Site("mlp", 1)), (Site("mlp", 1), READ)], []


def query(to):
    to.moves(0, 1, WORD, A)
    to.looks(1, 3, "q", A, 4.0)
    to.looks(1, 3, "k", PLACE, 4.0)
    to.moves(1, 3, PLACE, OUT)
    to.reads(OUT)
    return [(EMBED, Site("v", 0, 1)), (head(0, 1), Site("q", 1, 3)), (head(1, 3), READ)], []


def key(to):
    to.moves(0, 0, WORD, A)
    to.looks(1, 2, "q", CONSTANT, 1.0)
    to.looks(1, 2, "k", A, 4.0)
    to.moves(1, 2, PLACE, OUT)
    to.reads(OUT)
    return [(EMBED, Site("v", 0, 0)), (head(0, 0), Site("k", 1, 2)), (head(1, 2), READ)], []


def parallel(to):
    to.moves(0, 0, WORD, A)
    to.moves(1, 1, A, OUT)
    to.moves(0, 3, WORD, B)
    to.turns(2, B, MORE, 6.0)
    to.reads(OUT)
    to.reads(MORE)
    left = [(EMBED, Site("v", 0, 0)), (head(0, 0), Site("v", 1, 1)), (head(1, 1), READ)]
    right = [(EMBED, Site("v", 0, 3)), (head(0, 3), Site("mlp", 2)), (Site("mlp", 2), READ)]
    return left + right, []


def opposed(to):
    to.moves(0, 0, WORD, A)
    to.moves(1, 0, A, OUT)
    to.reads(OUT)
    to.reads(A, -2.0)
    supports = [(EMBED, Site("v", 0, 0)), (head(0, 0), Site("v", 1, 0)), (head(1, 0), READ)]
    return supports, [(head(0, 0), READ)]


@cache
def handmade(name, causal=True, run="caption"):
    """The tower of that name in float64, with eight pairs of equal length, half of them with "no" in the caption."""
    writer = Writer(causal)
    supporting, opposing = ([Edge(*ends) for ends in found] for found in globals()[name](writer))
    encoder = load(writer.clip, tokenizer=writer.tokenizer, dtype=torch.float64)
    return Handmade(writer.clip, encoder, _batch(encoder, run), frozenset(supporting + opposing), frozenset(opposing))


def _batch(encoder, run):
    """Pairs that the model judges right: each has the image that its caption's embedding leans to."""
    templates = ("There are {} {}.", "There are {} {} in it.")
    with_no = [template.format("no", noun) for template in templates for noun in NOUNS]
    with_some = [template.format("some", noun) for template in templates for noun in NOUNS]
    swapped = [number % 2 == 1 for number in range(len(with_no))]
    captions = [some if swap else no for swap, no, some in zip(swapped, with_no, with_some, strict=True)]
    foils = [no if swap else some for swap, no, some in zip(swapped, with_no, with_some, strict=True)]
    images = ImageStore.from_tensors(["no.png", "some.png"], _leanings(encoder, with_no[0], with_some[0]))
    pairs = Pairs(range(len(captions)), captions, foils, ["some.png" if swap else "no.png" for swap in swapped])
    return align(pairs, images, encoder, run=run)


def _leanings(encoder, no, some):
    towards = encoder([no]) - encoder([some])
    return torch.cat([towards, -towards]) / towards.norm()
