"""The code of a view: Python that computes what the explorer shows, by the package's own verbs."""

from __future__ import annotations

from typing import Any

from clip_lens.data.batch import Run
from clip_lens.show.explore.desk import Desk
from clip_lens.show.explore.given import sigma_of, way_of
from clip_lens.show.explore.view import Panels, View


def code(desk: Desk, panels: Panels) -> str:
    """Python that computes what is shown, with the `encoder` and the `batch` that were given to `explore`.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder)
        >>> desk = Desk(encoder, batch)
        >>> print(code(desk, desk.look(desk.start())).splitlines()[4])
        one = batch[[0]]
    """
    view = panels.view
    stored = _needs_images(desk, view)
    own = stored and not desk.has_images
    known = {"encoder": True, "batch": desk.batch is not None, "images": stored and desk.has_images}
    lines = [
        f"# {_listed_words([name for name, there in known.items() if there])}: as given to explore",
        "import clip_lens",
        "from clip_lens import Site",
        *(["from clip_lens.data.alone import one_text"] if view.alone else []),
        *(["from clip_lens.show.explore.given import images_of"] if own else []),
        "",
        *(["images = images_of(batch, encoder)"] if own else []),
        *_texts_code(desk, view),
        f"places = encoder.sites({view.kind!r}{_block_code(view)}{_slots_code(panels)})",
        f"source = {_source_code(desk, view)}",
        "effects = clip_lens.patch_effects(encoder, one, places, source=source)",
        *_together_code(view),
        "",
        *_reading_code(panels),
        "",
        f"clip_lens.heatmap(effects, {_axes_code(view)}, value='effect')",
    ]
    return "\n".join(lines) + "\n"


def _needs_images(desk: Desk, view: View) -> bool:
    if view.alone:
        return bool(view.image)
    aligned = view.source == "mean" and desk.batch is not None and way_of(desk.batch, view.run) == "align"
    return desk.typed(view) or view.image != desk.own(view.pair)[2] or aligned


def _listed_words(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _texts_code(desk: Desk, view: View) -> list[str]:
    if view.alone:
        by = f"encoder.scale * images[[{view.image!r}]][0]" if view.image else "encoder(text)[0]  # its own embedding"
        return [f"text = {view.caption!r}", f"direction = {by}", "one = one_text(text, encoder, direction)"]
    if desk.typed(view) or desk.batch is None:
        texts = f"[{view.caption!r}], [{view.foil!r}], [{view.image!r}]"
        return [
            f'pair = clip_lens.Pairs(["typed"], {texts})',
            f"one = clip_lens.align(pair, images, encoder, run={view.run!r})",
        ]
    own = desk.batch[[view.pair]]
    turn = ".flip()" if int(own.sigma) != sigma_of(view.run, own.pairs.side[0]) else ""
    along = f".along(encoder.scale * images[[{view.image!r}]])" if view.image != own.pairs.image[0] else ""
    return [f"one = batch[[{view.pair}]]{turn}{along}"]


def _block_code(view: View) -> str:
    return f", layers=[{view.layer}]" if view.one_block else ""


def _slots_code(panels: Panels) -> str:
    return "" if panels.view.by_head else f", slots={_listed(panels.layout.rows)}"


def _listed(rows: list[Any]) -> str:
    return f"range({len(rows)})" if rows == list(range(len(rows))) else repr(rows)


def _source_code(desk: Desk, view: View) -> str:
    if view.source == "noise":
        return "clip_lens.noise(1.0, seed=0)"
    if view.source != "mean" or desk.batch is None:
        return f"clip_lens.{view.source}"
    return f"clip_lens.mean(over={_whole_code(view.run, way_of(desk.batch, view.run))})"


def _whole_code(run: Run, way: str) -> str:
    aligned = f"clip_lens.align(batch.pairs, images, encoder, run={run!r})"
    return {"as it is": "batch", "flip": "batch.flip()", "align": aligned}[way]


def _together_code(view: View) -> list[str]:
    if not view.together:
        return []
    sites = "".join(f"{site!r}, " for site in view.together).strip()
    return [
        f"places = ({sites})",
        "together = clip_lens.patch_effects(encoder, one, [places], source=source)",
    ]


def _reading_code(panels: Panels) -> list[str]:
    view, layer = panels.view, panels.block
    what = "where it looks, before and after the patch" if panels.patched else "where it looks"
    texts = "(one.tokens,)" if view.alone else "(one.tokens, one.other)"
    contrast = ", contrast=False" if view.alone else ""
    lines = [
        f"# head {view.head} of block {layer}: {what}, and what it adds directly",
        f'pattern = "blocks.{layer}.attn.hook_pattern"',
        f"looks = [encoder.cache(text, names=pattern)[pattern][0, {view.head}] for text in {texts}]",
        f'adds = clip_lens.direct_effects(encoder, one, [Site("head", {layer}, {view.head})]{contrast}).signed()',
    ]
    if panels.patched:
        place = "places" if view.together else repr(panels.patched.places[0])
        lines += [
            f"after = clip_lens.via({place}, source=source)(encoder, one)",
            f"after = after(one.tokens.new_zeros(1), [pattern])[pattern][0, {view.head}]",
        ]
    return lines


def _axes_code(view: View) -> str:
    rows = "unit" if view.by_head else "slot"
    return f"rows='{rows}', columns='{'unit' if view.one_block else 'layer'}'"
