"""docs/transformerlens.md: no name is missing, every verdict has its test, and the page is what the script writes."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import transformerlens_names as names  # noqa: E402

FILES = [ROOT / "tests" / "model" / name for name in ("test_transformerlens.py", "test_tower.py")]


@pytest.mark.parametrize("section", names.SECTIONS)
def test_every_public_name_has_one_verdict(section: str) -> None:
    said = [name for verdict in names.SECTIONS[section] for name in verdict]
    assert len(said) == len(set(said))
    assert names.expected()[section] - set(said) == set()


@pytest.mark.parametrize("section", names.SECTIONS)
def test_every_verdict_has_what_it_needs(section: str) -> None:
    text = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
    tests = {node.name for file in FILES for node in ast.parse(file.read_text("utf-8")).body if hasattr(node, "name")}
    for verdict in names.SECTIONS[section]:
        assert verdict.word in ("works", "differs", "not applicable")
        assert verdict.note or verdict.word == "works", verdict
        assert (verdict.test in tests) == (verdict.word != "not applicable"), verdict
        if verdict.test:
            assert [name for name in verdict if name.rstrip("=").split(".")[-1] not in text] == []


def test_the_page_is_the_scripts() -> None:
    assert names.PAGE.read_text(encoding="utf-8") == names.page()
