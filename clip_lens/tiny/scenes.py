"""Rendered scenes with captions whose truth can be computed: any number of fresh pairs, each known to the pixel.

A scene is up to four things in distinct cells of a 3x3 grid, seen at 48x48 pixels. Everything about it follows from
one number, its seed, which is also the name of its picture. Captions ask whether something is there, in the style of
VALSE's existence pairs; caption and foil differ in one word, always in the place before the subject: `no` in one, `a`
or `some` in the other. "Some" means one or more.

    sample_scene(seed) -> Scene -> render(scene)                pixels
                                -> masks(scene)                 which pixels each thing covers
                                -> holds(scene, caption)        is it true?
    scene_pairs(n)              -> a table of pairs, ready to be written as csv; save_pictures(table.scene, folder)

Scenes below `FRESH` are for training; the embedded model has seen none from `FRESH` on. The six combinations of
`HELD_OUT` are never negated in its training, though it sees them and reads about them.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

SIZE = 48  # pixels, height and width
FRESH = 500_000  # the first scene that is never used in training

HUES = {
    "red": 0.0,
    "yellow": 0.15,
    "green": 0.34,
    "blue": 0.62,
    "purple": 0.80,
    "white": 0.0,
}  # turns of the colour wheel
COLOURS = tuple(HUES)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
ANY = "any"  # of a colour or a shape that a phrase leaves open: "red shapes", "circles", "shapes"
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in (*SHAPES, "shape")}
HELD_OUT = frozenset(zip(COLOURS, SHAPES, strict=True))  # one combination per colour and per shape

FORMS = {
    "there-is": "There is {a} {thing}.",
    "there-is-picture": "There is {a} {thing} in the picture.",
    "there-are": "There are {some} {things}.",
    "there-are-picture": "There are {some} {things} in the picture.",
    "picture-there-is": "In the picture there is {a} {thing}.",
    "picture-there-are": "In the picture there are {some} {things}.",
    "we-see": "We can see {a} {thing}.",
    "picture-with": "A picture with {some} {things}.",
    "and-last": "There is a {other} and {a} {thing}.",
    "and-first": "There is {a} {thing} and a {other}.",
}

# What is asked about, and the texts that may carry its negation, as the caption is the true one.
KINDS = {
    "present": ("foil",),
    "absent": ("caption",),  # the colour or the shape, or both, are nowhere
    "apart": ("caption",),  # colour and shape are both there, but not in one thing
    "held-out": ("caption", "foil"),
}
_WEIGHTS = {"present": 5.0, "absent": 3.0, "apart": 2.0, "held-out": 1.0}


@dataclass(frozen=True)
class Thing:
    """One coloured shape: centre and radius in pixels, angle in radians, rgb from 0 to 1."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """Things on a background; the seed names the picture and draws its grain: `replace(scene, things=...)` keeps both.

    `slope` is the change of brightness from edge to edge, across and down; `noise` a standard deviation, both of 1.
    """

    seed: int
    things: tuple[Thing, ...]
    background: tuple[float, float, float] = (0.2, 0.2, 0.2)
    slope: tuple[float, float] = (0.0, 0.0)
    noise: float = 0.03

    @property
    def image(self) -> str:
        """The file name of its picture, which is its id in an image store."""
        return f"scene-{self.seed:06d}.png"


@dataclass(frozen=True)
class Clause:
    """What one noun phrase of a caption claims: that such a thing is there, or (negated) that none is."""

    colour: str
    shape: str
    negated: bool


@dataclass(frozen=True)
class Parts:
    """A caption cut at its subject; joined by spaces it is the caption again, with a space before the full stop."""

    before: str
    determiner: str
    head: str
    rest: str
    suffix: str
    stop: str


# --- scenes -----------------------------------------------------------------------------------------------------------


def sample_scene(seed: int) -> Scene:
    """The scene with this number, 0 to 4 things, the same on every call.

    >>> scene = sample_scene(7)
    >>> scene.image, scene == sample_scene(7), len(scene.things) <= 4
    ('scene-000007.png', True, True)
    """
    rng = np.random.default_rng([seed, 0])
    amount = rng.choice(5, p=(0.05, 0.20, 0.25, 0.25, 0.25))
    cells = rng.permutation(9)[:amount]
    things = tuple(_sample_thing(rng, int(cell)) for cell in cells)
    background = _rgb(rng.uniform(), rng.uniform(0, 0.25), rng.uniform(0.05, 0.4))
    slope = (rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1))
    return Scene(seed, things, background, slope, noise=rng.uniform(0.01, 0.05))


def _sample_thing(rng: np.random.Generator, cell: int) -> Thing:
    colour, shape = COLOURS[rng.integers(6)], SHAPES[rng.integers(6)]
    radius = rng.uniform(4.5, 7.5)
    slack = 8.5 - radius  # a large thing has less room in its cell
    x, y = (8 + 16 * (cell % 3) + rng.uniform(-slack, slack), 8 + 16 * (cell // 3) + rng.uniform(-slack, slack))
    hue, saturation, value = rng.normal(0, 0.012), rng.uniform(0.7, 1.0), rng.uniform(0.7, 1.0)
    if colour == "white":
        saturation, value = 0.08 * saturation, 0.85 + 0.5 * (value - 0.7)
    return Thing(colour, shape, x, y, radius, rng.uniform(-0.45, 0.45), _rgb(HUES[colour] + hue, saturation, value))


def _rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """Red, green, blue from 0 to 1; the hue in turns."""
    falls = [min(max(abs((hue + shift) % 1 * 6 - 3) - 1, 0), 1) for shift in (0, 2 / 3, 1 / 3)]
    red, green, blue = (float(value * (1 - saturation * (1 - fall))) for fall in falls)
    return red, green, blue


# --- pixels -----------------------------------------------------------------------------------------------------------


def _polygon(x: ndarray, y: ndarray, points: int, inner: float) -> ndarray:
    """Distance to the outline of a star with so many points (outer radius 1), folded onto one half of one point."""
    half = np.pi / points
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
    distance = np.hypot(x, y)
    edge = np.array([inner * np.cos(half) - 1, inner * np.sin(half)])  # from the tip to the inner corner
    across, along = edge[1], -edge[0]
    return ((distance * np.cos(angle) - 1) * across + distance * np.sin(angle) * along) / np.hypot(*edge)


# Signed distance to the outline in radii, negative inside, of the coordinates in radii (y down).
_OUTLINES: dict[str, Callable[[ndarray, ndarray], ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.82,
    "triangle": lambda x, y: _polygon(x, y - 0.15, 3, 0.5) - 0.1,
    "star": lambda x, y: _polygon(x, y, 5, 0.42) - 0.05,
    "cross": lambda x, y: np.maximum(np.minimum(np.abs(x), np.abs(y)) - 0.27, np.maximum(np.abs(x), np.abs(y)) - 1.0),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.22,
}

_Y, _X = np.mgrid[:SIZE, :SIZE] + 0.5  # pixel centres


def _cover(thing: Thing) -> Float[ndarray, "height width"]:
    """The share of each pixel inside the outline, from its distance to it (a pixel wide ramp)."""
    share = np.zeros((SIZE, SIZE))
    rows, columns = (
        slice(max(0, int(at - 1.3 * thing.radius) - 1), int(at + 1.3 * thing.radius) + 2) for at in (thing.y, thing.x)
    )
    x, y = (_X[rows, columns] - thing.x) / thing.radius, (_Y[rows, columns] - thing.y) / thing.radius
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    inside = _OUTLINES[thing.shape](cos * x + sin * y, cos * y - sin * x)
    share[rows, columns] = np.clip(0.5 - thing.radius * inside, 0, 1)
    return share


def masks(scene: Scene) -> Float[ndarray, "thing height width"]:
    """The visible share of each pixel that each thing covers, 0 to 1; later things lie over earlier ones.

    >>> scene = sample_scene(7)
    >>> masks(scene).shape == (len(scene.things), 48, 48)
    True
    """
    shown = np.zeros((len(scene.things), SIZE, SIZE))
    for index, thing in enumerate(scene.things):
        share = _cover(thing)
        shown[:index] *= 1 - share
        shown[index] = share
    return shown


def render(scene: Scene) -> UInt8[ndarray, "height width 3"]:
    """The picture of a scene, 48 x 48 pixels, red, green and blue from 0 to 255.

    >>> render(sample_scene(7)).shape
    (48, 48, 3)
    """
    shown = masks(scene)
    colours = np.array([thing.rgb for thing in scene.things]).reshape(-1, 3)
    ground = np.asarray(scene.background) + (
        scene.slope[0] * (_X / SIZE - 0.5)[..., None] + scene.slope[1] * (_Y / SIZE - 0.5)[..., None]
    )
    picture = ground * (1 - shown.sum(0))[..., None] + np.tensordot(shown, colours, axes=(0, 0))
    grain = np.random.default_rng([scene.seed, 1]).standard_normal((SIZE, SIZE, 3), dtype=np.float32)
    return np.rint(255 * np.clip(picture + scene.noise * grain, 0, 1)).astype(np.uint8)


def subject_size(scene: Scene, subject: str) -> float:
    """The share of the picture's pixels that the things of this noun phrase cover, 0 if there are none.

    >>> red = Thing("red", "square", x=24, y=24, radius=10, angle=0, rgb=(1, 0, 0))
    >>> round(subject_size(Scene(0, (red,)), "red squares"), 3), round(16.4**2 / 48**2, 3)
    (0.117, 0.117)
    """
    clause = clauses(f"no {subject}")[0]
    chosen = [_fits(thing, clause) for thing in scene.things]
    return float(masks(scene)[chosen].sum() / SIZE**2)


def save_pictures(seeds: Iterable[int], folder: str | Path) -> list[Path]:
    """The paths of the PNG files written, one for each scene, named by `Scene.image`.

    >>> import tempfile
    >>> [path.name for path in save_pictures([7, 8], tempfile.mkdtemp())]
    ['scene-000007.png', 'scene-000008.png']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [sample_scene(int(seed)) for seed in seeds]
    for scene in scenes:
        Image.fromarray(render(scene)).save(folder / scene.image)
    return [folder / scene.image for scene in scenes]


# --- truth ------------------------------------------------------------------------------------------------------------

_NOUNS = {form: shape for shape, plural in PLURALS.items() for form in (shape, plural)}
_CLAUSE = re.compile(rf"\b(no|an?|some) (?:({'|'.join(COLOURS)}) )?({'|'.join(_NOUNS)})\b", re.IGNORECASE)


def clauses(caption: str) -> list[Clause]:
    """What each noun phrase of a caption claims, in the caption's order.

    >>> clauses("There is a red circle and no shape.")
    [Clause(colour='red', shape='circle', negated=False), Clause(colour='any', shape='any', negated=True)]
    """
    found = [
        Clause(colour.lower() or ANY, _NOUNS[noun.lower()].replace("shape", ANY), word.lower() == "no")
        for word, colour, noun in _CLAUSE.findall(caption)
    ]
    if not found:
        raise ValueError(
            f"no claim found in {caption!r}. A claim is no/a/an/some, then one of {', '.join(COLOURS)} or no colour, "
            f"then one of {', '.join(SHAPES)}, shape, or their plurals."
        )
    return found


def holds(scene: Scene, caption: str) -> bool:
    """Whether every claim of a caption is true of a scene, read from the caption's words and the scene's things.

    >>> scene = Scene(0, (Thing("red", "square", x=24, y=24, radius=6, angle=0, rgb=(1, 0, 0)),))
    >>> holds(scene, "There are some red squares."), holds(scene, "There is a square and no red shape.")
    (True, False)
    """
    return all(any(_fits(thing, clause) for thing in scene.things) != clause.negated for clause in clauses(caption))


def _fits(thing: Thing, clause: Clause) -> bool:
    return clause.colour in (ANY, thing.colour) and clause.shape in (ANY, thing.shape)


# --- captions ---------------------------------------------------------------------------------------------------------


def phrase(colour: str, shape: str, *, plural: bool = False) -> str:
    """The noun phrase for a colour and a shape, either of which may be "any".

    >>> phrase("red", "cross", plural=True), phrase("any", "ring"), phrase("blue", "any")
    ('red crosses', 'ring', 'blue shape')
    """
    noun = "shape" if shape == ANY else shape
    noun = PLURALS[noun] if plural else noun
    return noun if colour == ANY else f"{colour} {noun}"


def write(form: str, subject: str, *, negated: bool, other: str = "") -> str:
    """The caption of this form about this subject, which stands in it as given.

    >>> write("and-last", "blue square", negated=True, other="red circle")
    'There is a red circle and no blue square.'
    """
    a, some = ("no", "no") if negated else ("a", "some")
    return FORMS[form].format(a=a, some=some, thing=subject, things=subject, other=other)


def parts(caption: str, subject: str) -> Parts:
    """The caption cut at its subject: the word right before it is the place of no, a, an or some.

    >>> parts("There are no red squares in the picture.", "red squares")
    Parts(before='There are', determiner='no', head='red', rest='squares', suffix='in the picture', stop='.')
    """
    match = re.fullmatch(rf"(?:(.*) )?(\S+) {re.escape(subject)}\b ?(.*?)(\.?)", caption)
    if match is None:
        raise ValueError(
            f"{caption!r} does not hold {subject!r} after another word; give the phrase as it stands in it."
        )
    before, determiner, suffix, stop = match.groups(default="")
    head, _, rest = subject.partition(" ")
    return Parts(before, determiner, head, rest, suffix, stop)


# --- pairs ------------------------------------------------------------------------------------------------------------


def scene_pairs(
    n: int, *, first: int = FRESH, forms: Sequence[str] = tuple(FORMS), kinds: Sequence[str] = tuple(KINDS)
) -> pd.DataFrame:
    """A table of n pairs, each on its own scene, from scene number `first` on; the caption is true and the foil false.

    The sides alternate as far as the kinds allow. `subject` stands in both texts as given, `subject_size` is the share
    of the picture's pixels that it covers, `objects` the things as JSON (pixels, radians), `scene` the scene's number.

    >>> pairs = scene_pairs(4)
    >>> list(pairs.negation), pairs.image[0]
    (['caption', 'foil', 'caption', 'foil'], 'scene-500000.png')
    >>> all(holds(sample_scene(row.scene), row.caption) for row in pairs.itertuples())
    True
    """
    _check(forms, FORMS, "form")
    _check(kinds, KINDS, "kind")
    sides = [side for side in ("caption", "foil") if any(side in KINDS[kind] for kind in kinds)]
    rows: list[dict] = []
    scenes: Iterator[Scene] = (sample_scene(seed) for seed in count(first))
    while len(rows) < n:
        scene, side = next(scenes), sides[len(rows) % len(sides)]
        row = ask(scene, np.random.default_rng([scene.seed, 2]), side=side, forms=forms, kinds=kinds)
        rows += [_described(scene, row)] if row else []
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = [
    *("key", "caption", "foil", "image", "negation", "subject", "subject_size", "form", "kind"),
    *("colour", "shape", "objects", "scene"),
]


def _check(given: Sequence[str], known: Iterable[str], noun: str) -> None:
    if isinstance(given, str) or not given or set(given) - set(known):
        raise ValueError(f"{noun}s must be a non-empty sequence out of {', '.join(known)}. Got {given!r}.")


def ask(
    scene: Scene,
    rng: np.random.Generator,
    *,
    side: str,
    forms: Sequence[str] = tuple(FORMS),
    kinds: Sequence[str] = tuple(KINDS),
) -> dict[str, str] | None:
    """Caption, foil, negation, subject, form, kind, colour and shape of one pair on this scene; None if nothing fits.

    >>> ask(sample_scene(7), np.random.default_rng(0), side="foil", kinds=["present"])["negation"]
    'foil'
    """
    possible = [kind for kind in kinds if side in KINDS[kind]]
    weights = np.array([_WEIGHTS[kind] for kind in possible])
    kind, form = possible[rng.choice(len(possible), p=weights / weights.sum())], forms[int(rng.integers(len(forms)))]
    double = "{other}" in FORMS[form]
    target = _target(scene, rng, kind, present=side == "foil", whole=double)
    others = [thing for thing in scene.things if (thing.colour, thing.shape) != target]
    if target is None or (double and not others):
        return None
    other = others[rng.integers(len(others))] if double else None
    subject = phrase(*target, plural="{things}" in FORMS[form])
    extra = phrase(other.colour, other.shape) if other else ""
    caption, foil = (write(form, subject, negated=side == text, other=extra) for text in ("caption", "foil"))
    texts = {"caption": caption, "foil": foil, "negation": side, "subject": subject}
    return texts | {"form": form, "kind": kind, "colour": target[0], "shape": target[1]}


def _target(scene: Scene, rng: np.random.Generator, kind: str, *, present: bool, whole: bool) -> tuple[str, str] | None:
    """A colour and a shape to ask about; with `whole`, neither is left open."""
    there = {(thing.colour, thing.shape) for thing in scene.things}
    colours, shapes = {colour for colour, _ in there}, {shape for _, shape in there}
    groups: list[list[tuple[str, str]]] = []
    if kind == "held-out":
        groups = [[target for target in HELD_OUT if (target in there) == present]]
    elif kind == "present":
        groups = [[*there - HELD_OUT], [(ANY, s) for s in shapes], [(c, ANY) for c in colours], [(ANY, ANY)]]
    elif kind == "apart":
        groups = [[(c, s) for c in colours for s in shapes if (c, s) not in there | HELD_OUT]]
    elif kind == "absent":
        pairs = {(c, s) for c in COLOURS for s in SHAPES if not (c in colours and s in shapes)} - HELD_OUT
        groups = [
            [*pairs],
            [(ANY, s) for s in SHAPES if s not in shapes],
            [(c, ANY) for c in COLOURS if c not in colours],
        ]
        groups += [[(ANY, ANY)]] * (not there)
    openness = 0 if whole else rng.choice(4, p=(0.60, 0.19, 0.16, 0.05))
    group = sorted(groups[min(openness, len(groups) - 1)]) if there or not present else []
    return group[rng.integers(len(group))] if group else None


def _described(scene: Scene, row: dict[str, str]) -> dict[str, object]:
    """One row of the table: the pair, and what is known of its scene."""
    things = [
        {"colour": t.colour, "shape": t.shape}
        | {name: round(float(getattr(t, name)), 2) for name in ("x", "y", "radius", "angle")}
        for t in scene.things
    ]
    known = {"key": scene.image.removesuffix(".png"), "image": scene.image, "scene": scene.seed}
    size = round(subject_size(scene, row["subject"]), 6)
    return row | known | {"subject_size": size, "objects": json.dumps(things, separators=(",", ":"))}
