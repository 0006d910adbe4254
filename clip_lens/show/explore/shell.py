"""`explore`: one pair at a time, patched everywhere, in a notebook. A widget where widgets run, else a picture."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clip_lens.core.effects import Effects
from clip_lens.core.record import RUNS
from clip_lens.data.batch import Batch
from clip_lens.data.images import ImageStore, UnknownImage
from clip_lens.files import written_whole
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.show.explore.code import code
from clip_lens.show.explore.desk import Desk
from clip_lens.show.explore.page import KIND_NAMES, SOURCE_NAMES, data_uri, render, style, whole_page
from clip_lens.show.explore.view import KINDS, Panels, View
from clip_lens.show.figures.export import save_figure
from clip_lens.show.figures.figure import Figure
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.figures.thumbnails import Pictures, picture_file, thumbnail

NEEDS = ("ipywidgets", "anywidget")
INSTALL = (
    "This is a picture. In a notebook with ipywidgets and anywidget, pip install 'clip_lens[notebook]', it is a widget "
    "to click in."
)
LISTED = 3000
"""Entries of a list to choose from; a page with more is slow."""


def explore(
    encoder: HookedTextEncoder,
    what: Batch | str | tuple[str, str],
    *,
    images: ImageStore | None = None,
    pictures: Pictures = None,
) -> Explorer:
    """A view of one pair or one text to play with, as a notebook shows it: an `Explorer`.

    `what` is a batch, whose pairs can be picked, or a text of one's own, or a caption and its foil. Pick a pair or type
    texts, pick an image, the kind of site, the source and the text that is run; the heat map (the part of d that goes
    when a place is patched, in logits), the attention of every head in both texts and after the patch, what heads add
    to d directly, in all and by the token that they read, the logit lens, and the logits with the image follow. Click a
    cell, a token or a head; cells clicked with Ctrl or Cmd held are patched together. With the foil empty the caption
    is looked at alone, and with the image empty by its own embedding.

    `images` has further images than the batch's own. `pictures`, a folder that holds the image ids or a mapping from id
    to file, shows the image; those of the embedded model are there. A widget in JupyterLab and Notebook 7, which needs
    no network; where no widgets run it is a picture.

    Raises:
        ValueError: the batch is empty, or judged along something else than its images; or a text of one's own can't be
            read.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder)
        >>> explorer = explore(encoder, batch).show(pair=1, kind="head", layer=1, head=2)
        >>> explorer
        Explorer('We can see a star.' / 'We can see no star.', head from counterpart)
        >>> explorer.effects.values.shape
        torch.Size([24, 1])
        >>> explore(encoder, "There is a star.")
        Explorer('There is a star.', resid from zeros)
    """
    if isinstance(what, Batch):
        return Explorer(Desk(encoder, what, images), pictures)
    caption, foil = (what, "") if isinstance(what, str) else what
    image = images.ids[0] if images is not None and foil else ""
    desk = Desk(encoder, None, images)
    explorer = Explorer(desk, pictures, View(caption, foil, image, layer=encoder.n_layers // 2))
    explorer.panels_or_raise()
    return explorer


class Explorer:
    """A view, what is to be seen of it, and the widget that shows it.

    `view` is what was asked for, `panels` the numbers of the last view that could be computed; their `view` is what is
    shown. `message` says why the one asked for could not be, "" = it is shown. `notes` is what must be known of the
    texts, such as words that the model never saw.
    """

    def __init__(self, desk: Desk, pictures: Pictures = None, view: View | None = None):
        self.desk, self.pictures = desk, pictures
        self.view = desk.start() if view is None else view
        self.panels: Panels | None = None
        self.message = ""
        self._widget: Any = None
        self.show()

    def show(self, **changes: Any) -> Explorer:
        """The explorer, at a view with some fields of `View` changed. What can't be shown is said in `message`, and the
        last picture stays.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> explorer = explore(encoder, clip_lens.align(clip_lens.read_pairs()[:4], store, encoder))
            >>> explorer.show(caption="There is no dog.").notes
            ("tiny never saw 'dog.' in training: what it says of texts with this word means nothing",)
            >>> explorer.show(foil="There is no dog.").message
            'caption and foil are the same tokens; change one of them'
        """
        try:
            self.view = self.desk.change(self.view, **changes)
            self.panels, self.message = self.desk.look(self.view), ""
        except (ValueError, TypeError, UnknownImage) as error:
            self.message = str(error)
        if self._widget is not None:
            self._widget.follow()
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be known of the texts before their numbers are believed."""
        return self.panels.notes if self.panels else ()

    @property
    def effects(self) -> Effects:
        """The result behind the heat map.

        Raises:
            ValueError: the view can't be computed; the message says why.
        """
        return self.panels_or_raise().effects

    @property
    def code(self) -> str:
        """Python that computes this view, with the `encoder` and `batch` (and `images`) that were given to `explore`.

        Raises:
            ValueError: the view can't be computed; the message says why.
        """
        return code(self.desk, self.panels_or_raise())

    @property
    def figure(self) -> Figure:
        """The heat map as a plotly figure.

        Raises:
            ValueError: the view can't be computed; the message says why.
        """
        view = self.panels_or_raise().view
        columns = "unit" if view.one_block else "layer"
        return heatmap(self.effects, rows="unit" if view.by_head else "slot", columns=columns, value="effect")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """The path of the file that the picture was written to.

        `.html` is a page with all panels, by itself; other endings are those of `save_figure`, with the heat map alone.

        Raises:
            ValueError: the view can't be computed, or another ending.

        Example:
            >>> explorer = explore(clip_lens.load(), "There is a star.")
            >>> explorer.save(getfixture("tmp_path") / "star.html").name
            'star.html'
        """
        file = Path(path)
        if file.suffix.lower() != ".html":
            return save_figure(self.figure, file)
        self.panels_or_raise()
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as temporary:
            temporary.write_text(whole_page(self.html(), repr(self)), encoding="utf-8")
        return file

    def panels_or_raise(self) -> Panels:
        """The panels of the view that was asked for.

        Raises:
            ValueError: it can't be computed; the message says why.
        """
        if self.panels is None or self.message:
            raise ValueError(f"there is nothing to show: {self.message}")
        return self.panels

    @property
    def widget(self) -> Any:
        """The widget, made when it is first asked for.

        Raises:
            ImportError: ipywidgets or anywidget are not installed.
        """
        if self._widget is None:
            from clip_lens.show.explore.widget import ExploreWidget

            self._widget = ExploreWidget(self)
        return self._widget

    def html(self, *, live: bool = False, opened: bool = False) -> str:
        """The panels as HTML, with buttons for cells if `live`."""
        said = [{"kind": "note", "text": note} for note in self.notes]
        if self.message:
            said = [{"kind": "error", "text": self.message}]
            last = f"below is still the last picture: {_texts(self.panels.view)}" if self.panels else ""
            said += [{"kind": "note", "text": last}] if last else []
        text, picture = (code(self.desk, self.panels), self._picture(self.panels.view)) if self.panels else ("", None)
        return render(self.panels, said=said, code=text, picture=picture, live=live, opened=opened)

    def state(self) -> dict[str, Any]:
        """What the page draws: the fields of the view as they are shown, what each can be set to, and the panels."""
        view = self.view if self.message or self.panels is None else self.panels.view
        at = f"{min(view.layer, self.desk.encoder.n_layers - 1)}.{view.head}"
        return {
            "view": {**asdict(view), "at": at, "typed": self.desk.typed(view)},
            "offers": self.desk.offers(view),
            "html": self.html(live=True),
            "code": code(self.desk, self.panels) if self.panels else "",
        }

    def choices(self) -> dict[str, Any]:
        """What there is to choose from, by field of `View`."""
        return {
            **self._batch_choices(),
            "image": [] if self.desk.images is None else list(self.desk.images.ids[:LISTED]),
            "kind": {kind: KIND_NAMES[kind] for kind in KINDS},
            "source": SOURCE_NAMES,
            "rows": {"token": "by token", "slot": "by slot", "head": "by head"},
            "layers": self.desk.encoder.n_layers,
            "heads": self.desk.encoder.n_heads,
            "style": style(),
        }

    def _batch_choices(self) -> dict[str, Any]:
        """The pairs to choose from, and which of their texts may be run."""
        if self.desk.batch is None:
            return {"pair": [], "pairs": 0, "run": RUNS}
        pairs = self.desk.batch.pairs
        listed = [
            f"{key}: {caption} / {foil}" if foil else f"{key}: {caption}"
            for key, caption, foil in zip(pairs.key[:LISTED], pairs.caption, pairs.foil, strict=False)
        ]
        return {"pair": listed, "pairs": len(pairs), "run": RUNS}

    def _picture(self, view: View) -> str | None:
        if not view.image:
            return None
        if self.pictures is not None:
            return thumbnail(picture_file(view.image, self.pictures))
        scene = re.fullmatch(r"scene-(\d+)\.png", view.image)
        return _scene(int(scene[1])) if scene and self.desk.encoder.name == "tiny" else None

    def __repr__(self) -> str:
        return f"Explorer({_titled(self.view if self.panels is None else self.panels.view)})"

    def _repr_html_(self) -> str:
        note = f'<p class="cl-soft">{escape(INSTALL)}</p>'
        return f'<style>{style()}</style><div class="clip-lens-explore">{self.html()}{note}</div>'

    def _repr_mimebundle_(self, **how: Any) -> Any:
        bundle, metadata = {"text/plain": repr(self), "text/html": self._repr_html_()}, {}
        if all(find_spec(name) for name in NEEDS):
            shown = self.widget._repr_mimebundle_(**how)
            data, metadata = shown if isinstance(shown, tuple) else (shown or {}, {})
            bundle = {**data, **bundle}
        return bundle, metadata


def _titled(view: View) -> str:
    return f"{_texts(view)}, {view.kind} from {view.source}"


def _texts(view: View) -> str:
    return repr(view.caption) if view.alone else f"{view.caption!r} / {view.foil!r}"


def _scene(seed: int) -> str:
    """The picture of a rendered scene."""
    from PIL import Image

    from clip_lens.tiny.scenes import render as rendered
    from clip_lens.tiny.scenes import sample_scene

    return data_uri(Image.fromarray(rendered(sample_scene(seed))))
