"""Fixtures of the whole suite."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared/` beside the repository, with data that is not part of it (`CLIP_LENS_SHARED` names another).

    A stranger doesn't have it, so tests that need it are skipped; in CI (the variable CI is set) they fail instead.
    """
    folder = Path(os.environ.get("CLIP_LENS_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "data").is_dir():
        missing = f"no data in {folder}; set CLIP_LENS_SHARED to the folder that has it"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--count-asserts", action="store_true", help="list tests and examples that check nothing")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--count-asserts", default=False):
        from counted import Counted

        config.pluginmanager.register(Counted())
