"""Work shared out: the parts put together are the whole, bit for bit, whoever computes them and whatever gets lost."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch

import clip_lens
from clip_lens import Site
from clip_lens.core import spread as spreading
from clip_lens.core.effects import Effects
from clip_lens.core.shard import Shard, gather
from clip_lens.core.spread import Spread

encoder = clip_lens.load()
images = clip_lens.ImageStore.open("tiny")
pairs = clip_lens.read_pairs()[:150]
batch = clip_lens.align(pairs, images, encoder)
captions = clip_lens.align(pairs, images, encoder, run="caption")


def circuits():
    return [clip_lens.Circuit.full(encoder), *clip_lens.sized_circuits(gradients(), [0.1])]


def gradients(**how):
    edges = encoder.edges(receivers=[Site("out")])
    return clip_lens.gradient_effects(encoder, captions, edges, steps=2, progress=False, **how)


VERBS = {
    "patch_effects": lambda **how: clip_lens.patch_effects(
        encoder, batch, encoder.sites("resid", slots=("negator", "eot")), progress=False, **how
    ),
    "the mean over the whole batch": lambda **how: clip_lens.patch_effects(
        encoder, batch, encoder.sites("mlp"), source=clip_lens.mean, progress=False, **how
    ),
    "resample from the whole batch": lambda **how: clip_lens.patch_effects(
        encoder, batch, encoder.sites("head", layers=[1]), source=clip_lens.resample(3), progress=False, **how
    ),
    "noise": lambda **how: clip_lens.patch_effects(
        encoder, batch, encoder.sites("mlp"), source=clip_lens.noise(1.0, 2), progress=False, **how
    ),
    "path_effects": lambda **how: clip_lens.path_effects(
        encoder, batch, encoder.sites("head", layers=[0]), [Site("v", 1)], progress=False, **how
    ),
    "path_effects through MLPs": lambda **how: clip_lens.path_effects(
        encoder, batch[:70], [Site("head", 0, 1)], [Site("out")], through="mlp", progress=False, **how
    ),
    "gradient_effects": gradients,
    "faithfulness": lambda **how: clip_lens.faithfulness(encoder, captions, circuits(), progress=False, **how).effects,
}


def same(one: Effects, two: Effects) -> None:
    assert torch.equal(one.values, two.values) or bool((one.values.isnan() == two.values.isnan()).all())
    for name in ("values", "total", "baseline"):
        a, b = getattr(one, name), getattr(two, name)
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))
    assert one.places == two.places and one.record == two.record
    pd.testing.assert_frame_equal(one.pairs, two.pairs, check_exact=True)


@pytest.mark.parametrize("verb", VERBS)
def test_shards_put_together_are_the_whole(verb: str) -> None:
    run = VERBS[verb]
    same(gather([run(executor=Shard(number, 3)) for number in (2, 0, 1)]), run())


def test_more_shards_than_chunks_leave_some_empty_and_lose_nothing(tmp_path: Path) -> None:
    parts = [VERBS["patch_effects"](executor=Shard(number, 5)) for number in range(5)]
    assert [len(part.pairs) for part in parts][3:] == [0, 0]
    for number, part in enumerate(parts):
        part.save(tmp_path / f"{number}.parquet")
    same(gather([Effects.load(tmp_path / f"{number}.parquet") for number in range(5)]), VERBS["patch_effects"]())


def test_a_shard_holds_no_more_than_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a worker is that of its pairs, however many the whole has."""
    monkeypatch.setattr("clip_lens.core.sweep.gathered", lambda *_: pytest.fail("columns for every pair"))
    part = VERBS["patch_effects"](executor=Shard(2, 3))
    assert part.values.shape[1] == len(part.pairs) == 150 - 2 * 64
    assert part.values.untyped_storage().nbytes() <= part.values.numel() * part.values.element_size()


def test_what_is_missing_twice_or_foreign_is_named() -> None:
    run = VERBS["the mean over the whole batch"]
    one, two = run(executor=Shard(0, 2)), run(executor=Shard(1, 2))
    with pytest.raises(ValueError, match=r"of 2 shards these are missing: 1/2"):
        gather([one])
    with pytest.raises(ValueError, match=r"come twice: 1/2"):
        gather([one, two, two])
    with pytest.raises(ValueError, match=r"shard 1/2 is of another run than shard 0/2: .*source"):
        other = clip_lens.patch_effects(encoder, batch, encoder.sites("mlp"), executor=Shard(1, 2), progress=False)
        gather([one, other])
    with pytest.raises(ValueError, match="is no shard"):
        gather([one, run()])
    with pytest.raises(ValueError, match="other places"):
        gather(
            [
                one,
                clip_lens.patch_effects(
                    encoder, batch, [Site("mlp", 1)], source=clip_lens.mean, executor=Shard(1, 2), progress=False
                ),
            ]
        )
    with pytest.raises(ValueError, match="no shards"):
        gather([])


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "1/0", "-1/3"])
def test_what_names_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shard"):
        Shard.parse(text)


@pytest.mark.parametrize("verb", ["patch_effects", "the mean over the whole batch", "gradient_effects", "faithfulness"])
def test_two_processes_give_the_same_bytes(verb: str) -> None:
    same(VERBS[verb](jobs=2), VERBS[verb]())


class Losing:
    """An engine that works here and loses some of what it is given."""

    def __init__(self, lose: dict[int, list[Exception]]):
        self.lose, self.given = lose, []

    def submit(self, function, folder, number, of):
        self.given.append(number)
        future: Future = Future()
        if errors := self.lose.get(number):
            future.set_exception(errors.pop(0))
        else:
            future.set_result(function(folder, number, of))
        return future


def test_a_lost_shard_is_done_again() -> None:
    engine = Losing({1: [OSError("node died"), RuntimeError("node died again")]})
    same(VERBS["patch_effects"](executor=engine), VERBS["patch_effects"]())
    assert engine.given == [0, 1, 2, 1, 1]


def test_a_shard_that_stays_lost_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    engine = Losing({1: [OSError(f"died {n}") for n in range(3)]})
    with pytest.raises(
        RuntimeError, match=r"1 of 3 shards failed or were lost 3 times: 1/3; .*OSError: died 2"
    ) as caught:
        VERBS["patch_effects"](executor=Spread(engine, folder=tmp_path))
    assert isinstance(caught.value.__cause__, OSError)
    again = Losing({})
    same(VERBS["patch_effects"](executor=Spread(again, folder=tmp_path)), VERBS["patch_effects"]())
    assert again.given == [1]  # the others lay there


def test_another_call_never_takes_these_shards(tmp_path: Path) -> None:
    first, second = Losing({}), Losing({})
    VERBS["the mean over the whole batch"](executor=Spread(first, folder=tmp_path))
    same(VERBS["noise"](executor=Spread(second, folder=tmp_path)), VERBS["noise"]())
    assert second.given == [0, 1, 2]
    anonymous = Losing({})
    metric = clip_lens.metric(lambda u, readout: u[:, 0], oriented=False, name="a lambda")
    for _ in range(2):
        clip_lens.patch_effects(
            encoder, batch, [Site("mlp", 1)], metric=metric, executor=Spread(anonymous, folder=tmp_path)
        )
    assert anonymous.given == [0, 1, 2] * 2  # whether it is the same can't be told


def test_a_damaged_shard_is_computed_again(tmp_path: Path) -> None:
    VERBS["patch_effects"](executor=Spread(Losing({}), folder=tmp_path))
    (file,) = tmp_path.glob("*/1-of-3.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    engine = Losing({})
    same(VERBS["patch_effects"](executor=Spread(engine, folder=tmp_path)), VERBS["patch_effects"]())
    assert engine.given == [1]


def test_processes_that_break_are_begun_anew() -> None:
    class Breaking(Losing):
        renewed = 0

        def renew(self):
            self.renewed += 1

    engine = Breaking({0: [BrokenExecutor("killed")]})
    same(VERBS["patch_effects"](executor=engine), VERBS["patch_effects"]())
    assert engine.renewed == 1


def test_a_shard_that_is_lost_after_it_was_done_is_done() -> None:
    """Its worker wrote it, and was gone with the others before it said so."""

    class Forgetful(Losing):
        renewed = 0

        def submit(self, function, folder, number, of):
            future = super().submit(function, folder, number, of)
            if number == 1 and future.exception() is None:
                future = Future()
                future.set_exception(BrokenExecutor("killed"))
            return future

        def renew(self):
            self.renewed += 1

    engine = Forgetful({0: [BrokenExecutor("killed")]})
    same(VERBS["patch_effects"](executor=engine), VERBS["patch_effects"]())
    assert engine.renewed == 1 and engine.given == [0, 1, 2, 0]


def test_words_for_encoder_and_batch_make_no_other_call(tmp_path: Path) -> None:
    places, engine = encoder.sites("mlp"), Losing({})
    how = {"places": places, "progress": False, "executor": Spread(engine, folder=tmp_path)}
    same(
        clip_lens.patch_effects(encoder=encoder, batch=batch, **how),
        clip_lens.patch_effects(encoder, batch, places, progress=False),
    )
    clip_lens.patch_effects(encoder=encoder, batch=batch, **how)
    assert engine.given == [0, 1, 2]  # the second time all lay there


def test_a_call_that_lies_there_is_never_opened(tmp_path: Path) -> None:
    """Opening a call runs code: only what this process has written is opened."""
    VERBS["patch_effects"](executor=Spread(Losing({}), folder=tmp_path))
    (call,) = tmp_path.glob("*/call.pt")
    call.write_bytes(b"somebody else's")
    (call.parent / "1-of-3.parquet").unlink()
    spreading.opened_call.cache_clear()
    same(VERBS["patch_effects"](executor=Spread(Losing({}), folder=tmp_path)), VERBS["patch_effects"]())


def test_what_needs_whole_results_takes_no_shard(tmp_path: Path) -> None:
    found, judged = captions[:80].split(by="text")
    with pytest.raises(ValueError, match="shard 0/2 is a part of one sweep"):
        clip_lens.discover(encoder, found, judged, executor=Shard(0, 2), progress=False)
    with pytest.raises(ValueError, match="shard 0/2 is a part of one sweep"):
        clip_lens.study(encoder, batch, tmp_path, executor=Shard(0, 2), progress=False)


def test_what_the_verb_refuses_is_refused_once() -> None:
    engine = ThreadPoolExecutor(1)
    with pytest.raises(ValueError, match="no places"):
        clip_lens.patch_effects(encoder, batch, [], executor=engine)
    with pytest.raises(ValueError, match="jobs=0"):
        clip_lens.patch_effects(encoder, batch, [Site("mlp", 1)], jobs=0)
    with pytest.raises(ValueError, match="give one of them"):
        clip_lens.patch_effects(encoder, batch, [Site("mlp", 1)], jobs=2, executor=engine)
    with pytest.raises(TypeError, match="submit"):
        clip_lens.patch_effects(encoder, batch, [Site("mlp", 1)], executor=7)
    with (
        encoder.tower.hooks([("blocks.0.hook_mlp_out", lambda x, hook: x)]),
        pytest.raises(ValueError, match="hooks of yours"),
    ):
        clip_lens.patch_effects(encoder, batch, [Site("mlp", 1)], executor=engine)


def test_edited_weights_reach_the_workers() -> None:
    edited = clip_lens.load()
    edited.tower.blocks[1].mlp.W_out.zero_()
    how = {"places": encoder.sites("mlp"), "progress": False}
    same(
        clip_lens.patch_effects(edited, clip_lens.align(pairs, images, edited), jobs=2, **how),
        clip_lens.patch_effects(edited, clip_lens.align(pairs, images, edited), **how),
    )


def test_nothing_is_left_of_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    VERBS["patch_effects"](executor=Losing({}))
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
import clip_lens
from clip_lens.core.spread import Spread, processes
encoder = clip_lens.load()
batch = clip_lens.align(clip_lens.read_pairs()[:150], clip_lens.ImageStore.open("tiny"), encoder)
folder = Path(sys.argv[1])
def kill():
    while not list(folder.glob("*/*-of-*.parquet")):
        time.sleep(.01)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
with processes(1) as engine:
    (folder / "worker").write_text(str(engine.submit(os.getpid).result()))
    clip_lens.patch_effects(encoder, batch, encoder.sites("resid", slots=("negator", "eot")), progress=False,
                            executor=Spread(engine, folder=folder))
"""


def test_a_killed_parent_goes_on_from_what_is_done(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    there = {path.name for path in tmp_path.glob("*/*-of-*.parquet")}
    engine = Losing({})
    same(VERBS["patch_effects"](executor=Spread(engine, folder=tmp_path)), VERBS["patch_effects"]())
    assert there and len(engine.given) <= 3 - len(there)
    worker = int((tmp_path / "worker").read_text())
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker outlives its parent")


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the processes is killed by a signal while it computes."""
    marker = tmp_path / "killed"
    source = clip_lens.source(_Killing(str(marker)), name="killing", holds=str(marker))
    places = [Site("mlp", 1)]
    found = clip_lens.patch_effects(encoder, batch, places, source=source, jobs=2, progress=False)
    assert marker.exists()
    expected = clip_lens.patch_effects(encoder, batch, places, progress=False)
    assert torch.equal(found.values, expected.values)


class _Killing:
    """The counterpart's activations, from a process that dies the first time it is asked."""

    def __init__(self, marker: str):
        self.marker = marker

    def __call__(self, encoder, batch):
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return clip_lens.counterpart(encoder, batch)
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_engine_module_says_how_often_it_tries() -> None:
    assert spreading.TRIES == 3


def test_a_discovery_by_two_processes_is_the_same() -> None:
    found, judged = captions[:80].split(by="text")
    how = {"method": "eap", "edges": 40, "progress": False}
    one, two = (clip_lens.discover(encoder, found, judged, **how, **more) for more in ({}, {"jobs": 2}))
    same(one.scores, two.scores)
    same(one.judged.effects, two.judged.effects)
    assert one.circuit.digest == two.circuit.digest
