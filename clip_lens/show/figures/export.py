"""`save_figure`: a picture, or its numbers, as a file, and what to install where that can't be."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import plotly.graph_objects as go

from clip_lens.core.spreadsheet import to_csv
from clip_lens.files import written_whole
from clip_lens.show.figures.figure import Figure

DRAWN = (".png", ".svg", ".pdf", ".jpg", ".webp")
KINDS = (".html", ".json", ".csv", *DRAWN)


def save_figure(
    figure: go.Figure, path: str | os.PathLike[str], *, width: int = 1000, height: int | None = None, scale: float = 2.0
) -> Path:
    """The path of the file that a figure was written to; its ending says how.

    `.html` is one page that works offline, `.json` what `plotly.io.read_json` reads, `.csv` the table that the figure
    was drawn from. `.png`, `.svg`, `.pdf`, `.jpg` and
    `.webp` are drawn by kaleido, which needs Chrome or Chromium; `width`, `height` (pixels, by default the figure's
    own) and `scale` are theirs.

    Raises:
        ValueError: another ending, or `.csv` of a figure that carries no table.
        ModuleNotFoundError: kaleido is not installed.
        RuntimeError: kaleido could not draw, mostly because it finds no browser.

    Example:
        >>> from clip_lens.core.effects import toy_effects
        >>> figure = clip_lens.heatmap(toy_effects(), side="foil")
        >>> save_figure(figure, getfixture("tmp_path") / "picture.html").name
        'picture.html'
    """
    file = Path(path)
    ending = file.suffix.lower()
    if ending not in KINDS:
        raise ValueError(f"{file.name!r} does not say what to write; the endings are {', '.join(KINDS)}")
    if ending in DRAWN and importlib.util.find_spec("kaleido") is None:
        raise ModuleNotFoundError(
            f"{ending[1:]} files are drawn by kaleido and Chrome or Chromium, and kaleido is not installed: "
            f"pip install 'clip_lens[export]', and a browser; or write {file.stem}.html, which needs neither"
        )
    content = _content(figure, file, width, height, scale)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as temporary:
        temporary.write_bytes(content)
    return file


def _content(figure: go.Figure, file: Path, width: int, height: int | None, scale: float) -> bytes:
    ending = file.suffix.lower()
    if ending == ".html":
        return str(figure.to_html(include_plotlyjs=True)).encode()
    if ending == ".json":
        return str(figure.to_json()).encode()
    if ending != ".csv":
        return _drawn(figure, file, width, height, scale)
    if not isinstance(figure, Figure) or figure.frame is None:
        raise ValueError(f"{file.name} is for a figure of clip_lens, which carries its table; this one carries none")
    return to_csv(figure.frame).encode()


def _drawn(figure: go.Figure, file: Path, width: int, height: int | None, scale: float) -> bytes:
    kind, height = file.suffix.lower()[1:], height or figure.layout.height
    try:
        return bytes(figure.to_image(format=kind, width=width, height=height, scale=scale))
    except Exception as error:  # kaleido's own errors differ from version to version
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"kaleido could not draw {file.name}: {said.rstrip('.')}. It needs Chrome or Chromium: install one "
            f"(`plotly_get_chrome` fetches one, BROWSER_PATH names one), or write {file.stem}.html, which needs neither"
        ) from None
