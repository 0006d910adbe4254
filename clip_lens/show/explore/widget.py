"""The explorer in the page: an anywidget that sends what was chosen and shows what comes back. Nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

if TYPE_CHECKING:
    from clip_lens.show.explore.shell import Explorer

HERE = Path(__file__).parent


class ExploreWidget(anywidget.AnyWidget):
    """An `Explorer` as a notebook shows it; `state` is what the page draws, `choices` what it offers."""

    _esm = HERE / "explore.js"
    _css = HERE / "explore.css"
    choices = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, explorer: Explorer):
        self._explorer, self._number = explorer, 0
        super().__init__(choices=explorer.choices(), state=self._drawn())
        self.on_msg(self._receive)

    def _receive(self, _: Any, content: dict[str, Any], __: Any) -> None:
        """A change from the page; whatever goes wrong is said there, since a widget's traceback is seen by nobody."""
        try:
            self._explorer.show(**content["change"])
        except Exception as error:
            self._explorer.message = f"{type(error).__name__}: {error}"
            self.follow()
            raise

    def follow(self) -> None:
        """Sends what the explorer shows now."""
        self.state = self._drawn()

    def _drawn(self) -> dict[str, Any]:
        self._number += 1  # so that the page hears of every answer, also of one that is as the one before
        return {"number": self._number, **self._explorer.state()}
