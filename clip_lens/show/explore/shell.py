"""`explore`: one pair at a time, patched everywhere, in a notebook. A widget where widgets run, else a picture."""

from __future__ import annotations

import re
from html import escape
from importlib.util import find_spec
from typing import Any, get_args

from clip_lens.core.effects import Effects
from clip_lens.core.record import RUNS
from clip_lens.data.batch import Batch, Run
from clip_lens.data.images import ImageStore, UnknownImage
from clip_lens.model.encoder import HookedTextEncoder
from clip_lens.show.explore.page import KIND_NAMES, SOURCE_NAMES, data_uri, render, style
from clip_lens.show.explore.view import KINDS, Desk, Panels, View, code
from clip_lens.show.figures.thumbnails import Pictures, picture_file, thumbnail

NEEDS = ("ipywidgets", "anywidget")
INSTALL = (
    "This is a picture. In a notebook with ipywidgets and anywidget, pip install 'clip_lens[notebook]', it is a widget "
    "to click in."
)
LISTED = 3000
"""Entries of a list to choose from; a page with more is slow."""


def explore(
    encoder: HookedTextEncoder, batch: Batch, *, images: ImageStore | None = None, pictures: Pictures = None
) -> Explorer:
    """A view of one pair to play with, as a notebook shows it: an `Explorer`.

    Pick a pair of the batch or type a caption and a foil, pick an image, the kind of site, the source and the text that
    is run; the heatmap (the part of d that each patch moves, in logits), a head's attention over the tokens of both
    texts and its direct contribution to d, and the logits with the image follow. Click a cell, a token or a head.

    `images` has further images than the batch's own. `pictures`, a folder that holds the image ids or a mapping from id
    to file, shows the image; those of the embedded model are there. A widget in JupyterLab and Notebook 7, which needs
    no network; where no widgets run it is a picture.

    Raises:
        ValueError: the batch is empty, or judged along something else than its images.

    Example:
        >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
        >>> batch = clip_lens.align(clip_lens.read_pairs()[:4], store, encoder)
        >>> explorer = explore(encoder, batch).show(pair=1, kind="head", layer=1, head=2)
        >>> explorer
        Explorer('We can see a star.' / 'We can see no star.', head from counterpart)
        >>> explorer.effects.values.shape
        torch.Size([24, 1])
    """
    return Explorer(Desk(encoder, batch, images), pictures)


class Explorer:
    """A view, what is to be seen of it, and the widget that shows it.

    `view` is what is looked at, `panels` its numbers (None while it can't be computed), `message` why not, `notes` what
    must be known of its texts, such as words that the model never saw.
    """

    def __init__(self, desk: Desk, pictures: Pictures = None):
        self.desk, self.pictures = desk, pictures
        self.view: View = desk.start()
        self.panels: Panels | None = None
        self.message = ""
        self._widget: Any = None
        self.show()

    def show(self, **changes: Any) -> Explorer:
        """The explorer, at a view with some fields of `View` changed. What can't be shown is said in `message`.

        Example:
            >>> encoder, store = clip_lens.load(), clip_lens.ImageStore.open("tiny")
            >>> explorer = explore(encoder, clip_lens.align(clip_lens.read_pairs()[:4], store, encoder))
            >>> explorer.show(caption="There is no dog.").notes
            ("tiny never saw 'dog.' in training: what it says of texts with this word means nothing",)
            >>> explorer.show(foil="There is no dog.").message
            'caption and foil are the same tokens; change one of them'
        """
        try:
            self.view, self.panels, self.message = self.desk.change(self.view, **changes), None, ""
            self.panels = self.desk.look(self.view)
            self.view = self.panels.view
        except (ValueError, UnknownImage) as error:
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
        """The result behind the heatmap.

        Raises:
            ValueError: the view can't be computed; the message says why.
        """
        return self._panels().effects

    @property
    def code(self) -> str:
        """Python that computes this view, with the `encoder` and `batch` (and `images`) that were given to `explore`.

        Raises:
            ValueError: the view can't be computed; the message says why.
        """
        self._panels()
        return code(self.desk, self.view)

    def _panels(self) -> Panels:
        if self.panels is None:
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
        shown = self.panels is not None
        text, picture = (self.code, self._picture()) if shown else ("", None)
        return render(self.panels, said=said, code=text, picture=picture, live=live, opened=opened)

    def choices(self) -> dict[str, Any]:
        """What there is to choose from, by field of `View`."""
        pairs = self.desk.batch.pairs
        texts = zip(pairs.key, pairs.caption, pairs.foil, strict=True)
        listed = [f"{key}: {caption} / {foil}" for key, caption, foil in texts]
        return {
            "pair": listed[:LISTED],
            "pairs": len(listed),
            "image": list(self.desk.images.ids[:LISTED]),
            "kind": {kind: KIND_NAMES[kind] for kind in KINDS},
            "source": SOURCE_NAMES,
            "run": {run: RUNS.get(run, f"the {run}") for run in _runs(pairs.side)},
            "rows": {"token": "by token", "slot": "by slot"},
            "layers": self.desk.encoder.n_layers,
            "heads": self.desk.encoder.n_heads,
        }

    def _picture(self) -> str | None:
        image = self.view.image
        if self.pictures is not None:
            return thumbnail(picture_file(image, self.pictures))
        scene = re.fullmatch(r"scene-(\d+)\.png", image)
        return _scene(int(scene[1])) if scene and self.desk.encoder.name == "tiny" else None

    def __repr__(self) -> str:
        view = self.view
        return f"Explorer({view.caption!r} / {view.foil!r}, {view.kind} from {view.source})"

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


def _runs(sides: tuple[str, ...]) -> tuple[Run, ...]:
    return get_args(Run) if set(sides) != {"none"} else ("caption", "foil")


def _scene(seed: int) -> str:
    """The picture of a rendered scene."""
    from PIL import Image

    from clip_lens.tiny.scenes import render as rendered
    from clip_lens.tiny.scenes import sample_scene

    return data_uri(Image.fromarray(rendered(sample_scene(seed))))
