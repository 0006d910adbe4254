"""docs/checkpoints.md: every row names a test that exists, and every case of those tests has its row."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = re.compile(r"^Tests: `(tests/\S+\.py)`$(.*?)(?=^## |\Z)", re.M | re.S)
ROW = re.compile(r"^\|.*\| `(test_\w+)(?:\[(.+)\])?` \|$", re.M)
CASES = {"test_checkpoint.py": ("WRAPPED", "REFUSED"), "test_transformers.py": ("RELATIVES",),
         "test_tokenizers.py": ("TOKENIZERS",), "test_settings.py": ()}  # fmt: skip

PAGE = {
    Path(file): ROW.findall(text)
    for file, text in SECTIONS.findall((ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8"))
}


def syntax_of(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def cases(file: Path, names: tuple[str, ...]) -> set[str]:
    """The keys of a test file's dicts of cases."""
    found = [
        node.value
        for node in syntax_of(file).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in names
    ]
    assert len(found) == len(names)
    return {key.value for value in found for key in value.keys}  # type: ignore[union-attr, attr-defined]


def test_every_row_of_the_page_names_a_test() -> None:
    lines = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| what is given")]
    assert len(rows) == sum(map(len, PAGE.values())) > 60
    assert {file.name for file in PAGE} == set(CASES)


@pytest.mark.parametrize("file", PAGE, ids=lambda file: file.name)
def test_the_tests_that_rows_name_exist(file: Path) -> None:
    functions = {node.name for node in syntax_of(file).body if isinstance(node, ast.FunctionDef)}
    assert {name for name, _ in PAGE[file]} <= functions
    known = cases(file, CASES[file.name]) | {"clip.tokenize"}
    assert {case for _, case in PAGE[file] if case} <= known


@pytest.mark.parametrize("file", PAGE, ids=lambda file: file.name)
def test_every_case_has_a_row(file: Path) -> None:
    assert cases(file, CASES[file.name]) <= {case for _, case in PAGE[file]}
