"""The names of this floor: `__init__.py` resolves them lazily, type checkers and editors read them here."""

from .figures.figure import Figure as Figure
from .figures.style import themed as themed
from .report.effects_section import section_of as section_of
from .report.section import Picture as Picture
from .report.section import Section as Section
from .report.section import Table as Table
