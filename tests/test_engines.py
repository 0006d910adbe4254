"""Real engines: Ray with a worker that is killed, dask's local cluster, submitit. They take minutes and packages of
their own: `pip install -e ".[dev,engines]"`, then `pytest -n 0 -m engines tests/test_engines.py`."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

import clip_lens
from clip_lens.core.spread import Spread, on_ray

pytestmark = pytest.mark.engines
encoder = clip_lens.load()
batch = clip_lens.align(clip_lens.read_pairs()[:300], clip_lens.ImageStore.open("tiny"), encoder)
places = encoder.sites("resid", slots=("negator", "eot"))


def same_bytes(executor: object) -> None:
    one = clip_lens.patch_effects(encoder, batch, places, progress=False)
    two = clip_lens.patch_effects(encoder, batch, places, progress=False, executor=executor)
    assert torch.equal(one.values, two.values) and torch.equal(one.total, two.total) and one.record == two.record
    pd.testing.assert_frame_equal(one.pairs, two.pairs, check_exact=True)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    import ray as real

    real.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    real.shutdown()


def test_ray(ray: None) -> None:
    same_bytes(on_ray(num_cpus=1))


def test_ray_with_a_worker_that_is_killed(ray: None, tmp_path: Path) -> None:
    """The worker that writes the first shard is killed as soon as it has: what it does next is done by another."""
    killed: list[int] = []

    def kill() -> None:
        while not list(tmp_path.glob("*/*-of-*.parquet")):
            time.sleep(0.05)
        killed.extend(int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit() and _computes(each))
        for process in killed[:1]:
            os.kill(process, signal.SIGKILL)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    same_bytes(Spread(on_ray(num_cpus=1), folder=tmp_path))
    watcher.join(10)
    assert killed


def _computes(process: Path) -> bool:
    try:
        return (process / "cmdline").read_bytes().startswith(b"ray::compute")
    except OSError:
        return False


def test_dask() -> None:
    from dask.distributed import Client, LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        same_bytes(client.get_executor())


def test_submitit(tmp_path: Path) -> None:
    import submitit

    executor = submitit.LocalExecutor(folder=tmp_path)
    executor.update_parameters(timeout_min=20)
    same_bytes(executor)
