"""What is shown of results: figures, reports, the explorer. The parts of a report of one's own are named here."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "Section": "report.section",
    "Picture": "report.section",
    "Table": "report.section",
    "section_of": "report.effects_section",
    "themed": "figures.style",
    "Figure": "figures.figure",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from clip_lens.show.figures.figure import Figure as Figure
    from clip_lens.show.figures.style import themed as themed
    from clip_lens.show.report.effects_section import section_of as section_of
    from clip_lens.show.report.section import Picture as Picture
    from clip_lens.show.report.section import Section as Section
    from clip_lens.show.report.section import Table as Table


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"clip_lens.show has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"clip_lens.show.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
