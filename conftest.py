"""One thread per test process, and the names that the examples in docstrings use."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; small tensors are slower on several threads


@pytest.fixture(autouse=True)
def _names(request: pytest.FixtureRequest) -> None:
    if "doctest_namespace" in request.fixturenames or request.node.__class__.__name__ == "DoctestItem":
        import torch

        import clip_lens

        namespace = request.getfixturevalue("doctest_namespace")
        namespace |= {"clip_lens": clip_lens, "torch": torch}
