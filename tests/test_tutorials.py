"""The notebooks in tutorials/ run from top to bottom, assertions included, and are committed without outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.~:/])/(?:home|Users|work|opt|root|tmp|var|mnt|usr|private)/|\b[A-Z]:\\")

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 2


@notebooks
def test_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(TUTORIALS)}}
    )
    client.execute()


@notebooks
def test_is_valid_and_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert not cell.metadata.get("execution")


@notebooks
def test_names_no_machine_path(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not [cell.source for cell in notebook.cells if MACHINE_PATH.search(cell.source)]


def test_machine_paths_are_found() -> None:
    assert all(MACHINE_PATH.search(text) for text in ("open('/home/me/a.csv')", "cd /tmp/x", r"C:\me"))
    assert not any(MACHINE_PATH.search(text) for text in ("build/tiny-0/x", "https://a.org/home/b", "text/html"))


@notebooks
def test_links_lead_somewhere(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert all((TUTORIALS / link).exists() for link in links)
