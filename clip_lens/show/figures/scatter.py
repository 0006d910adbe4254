"""Points that show their picture: a scatter of per-pair numbers, with the image of a pair beside it on hovering.

plotly's hover labels hold no images. So the figure carries small copies of the pictures in `layout.meta`, and wherever
it is shown as HTML - in a notebook or a file, without a network - a few lines of script put the picture of the point
under the pointer into the figure's corner. Where no script runs, the label names the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from pandas import DataFrame

from clip_lens.show.figures.curves import need
from clip_lens.show.figures.figure import Figure, carrying
from clip_lens.show.figures.style import LIGHT, SIDE_COLOURS, template, under
from clip_lens.show.figures.thumbnails import Pictures, picture_file, thumbnail
from clip_lens.show.figures.words import side_name

MOST = 400  # small copies in one figure, of at most some 8 kB each
SCRIPT = """
(function () {
  var plot = document.getElementById('{plot_id}');
  var pictures = (plot.layout.meta || {}).pictures || {};
  var shown = document.createElement('img');
  shown.alt = '';
  shown.style.cssText = 'position:absolute;top:4px;height:96px;display:none;pointer-events:none;border:1px solid #888';
  plot.style.position = 'relative';
  plot.appendChild(shown);
  plot.on('plotly_hover', function (event) {
    var id = (event.points[0].customdata || [])[0];
    if (!Object.prototype.hasOwnProperty.call(pictures, id)) { shown.style.display = 'none'; return; }
    shown.src = pictures[id];
    shown.alt = id;
    var right = event.points[0].xaxis.d2p(event.points[0].x) > plot._fullLayout.width / 2;
    shown.style.left = right ? '64px' : 'auto';
    shown.style.right = right ? 'auto' : '4px';
    shown.style.display = 'block';
  });
  plot.on('plotly_unhover', function () { shown.style.display = 'none'; });
})();
"""


class PictureFigure(Figure):
    """A plotly figure whose points show pictures wherever it is shown as HTML; otherwise it is a figure like others."""

    def to_html(self, *args: Any, post_script: Any = None, **kwargs: Any) -> str:
        """The figure as HTML, as plotly's `to_html` gives it, with the script that shows pictures."""
        further = [post_script] if isinstance(post_script, str) else list(post_script or ())
        return str(super().to_html(*args, post_script=[SCRIPT, *further], **kwargs))

    def write_html(self, file: Any, *args: Any, **kwargs: Any) -> None:
        """Writes `to_html`; to a path or to something with `write`."""
        page = self.to_html(*args, **kwargs)
        file.write(page) if hasattr(file, "write") else Path(file).write_text(page, encoding="utf-8")

    def _repr_mimebundle_(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"text/html": self.to_html(full_html=False, include_plotlyjs=True), "text/plain": repr(self)}

    _ipython_display_ = None  # plotly's own would go past the script


def scatter_pairs(
    frame: DataFrame,
    x: str,
    y: str,
    *,
    pictures: Pictures = None,
    image: str = "image",
    by: str | None = "side",
    title: str = "",
) -> PictureFigure:
    """A plotly figure of two columns, a point per row, with the picture of the pair under the pointer.

    `frame` is `Effects.pairs` or any table; its column `image` has the images' ids, `by` the groups that get a colour,
    where these columns exist. `pictures` is the folder that the ids are paths in, or a mapping from id to file; small
    copies of them, at most 400, go into the figure; ids without one are shown as text. Rows without an x, a y or a
    group are left out. A caption and foil in the frame are in the label.

    Raises:
        ValueError: no such column, one that holds no numbers, or nothing to draw.
        FileNotFoundError: the folder of pictures does not exist.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> pairs = toy_effects().pairs.assign(size=[0.1, 0.2, 0.3])
        >>> figure = scatter_pairs(pairs, "size", "d")  # pictures="folder/" adds the pictures
        >>> [(trace.name, trace.y.tolist()) for trace in figure.data]
        [('negation in the caption', [2.0]), ('negation in the foil', [4.0, 1.0])]
    """
    need(frame, [x, y], [])
    grouped = by is not None and by in frame
    rows = frame.dropna(subset=[x, y, by] if grouped else [x, y])
    if rows.empty:
        raise ValueError(f"nothing to draw: no row has both {x!r} and {y!r}")
    ids = [str(name) for name in dict.fromkeys(rows[image])] if image in rows else []
    figure = PictureFigure()
    groups = list(dict.fromkeys(rows[by])) if grouped else [None]
    for number, group in enumerate(groups):
        figure.add_trace(
            _points(rows if group is None else rows[rows[by] == group], (x, y), image, group, number, groups)
        )
    figure.update_layout(
        template=template(), height=440, margin={"t": 40 if title else 14, "b": 76, "l": 10, "r": 14},
        hovermode="closest", legend=under(46, 340), showlegend=len(groups) > 1,
        title={"text": escape(title)} if title else None, meta={"pictures": _copies(ids, pictures)},
    )  # fmt: skip
    figure.update_xaxes(title_text=escape(x), nticks=7)
    figure.update_yaxes(title_text=escape(y), nticks=7)
    known = ["key", image, "caption", "foil", *([by] if grouped else []), x, y]
    return carrying(figure, rows[[name for name in dict.fromkeys(known) if name in rows]])


def _points(
    part: DataFrame, columns: tuple[str, str], image: str, group: Any, number: int, groups: list[Any]
) -> go.Scatter:
    x, y = columns
    words = [name for name in (image, "caption", "foil") if name in part]
    told = "".join(f"<br>%{{customdata[{place}]}}" for place in range(1, 1 + len(words)))
    # the id comes once as it is, for the script, and once as it is shown, since an id may hold markup
    ids = part[image].astype(str) if image in part else [""] * len(part)
    texts = [[escape(text, quote=False) for text in row] for row in part[words].astype(str).to_numpy()]
    details = [[name, *row] for name, row in zip(ids, texts, strict=True)]
    name, colour = side_name(str(group), map(str, groups)), SIDE_COLOURS.get(str(group), number % len(LIGHT.series))
    return go.Scatter(
        x=part[x].to_numpy(dtype=float), y=part[y].to_numpy(dtype=float), mode="markers", customdata=details,
        name="pairs" if group is None else escape(name, quote=False),
        marker={"size": 8, "opacity": 0.75, "color": LIGHT.series[colour]},
        hovertemplate=f"{escape(x)} %{{x:.3f}}, {escape(y)} <b>%{{y:.3f}}</b>{told}<extra></extra>",
    )  # fmt: skip


def _copies(ids: list[str], pictures: Pictures) -> dict[str, str]:
    """A small copy of each picture that there is, by id, as a data URI."""
    if pictures is not None and not isinstance(pictures, Mapping) and not Path(pictures).is_dir():
        raise FileNotFoundError(f"{pictures} is no folder; give the one that holds the pictures, or a mapping by id")
    found = {name: thumbnail(picture_file(name, pictures)) for name in ids}
    return dict([(name, uri) for name, uri in found.items() if uri][:MOST])
