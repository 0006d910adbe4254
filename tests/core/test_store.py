"""Files: what was saved comes back bit by bit, what is damaged, old or foreign is refused by name, memory is linear."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clip_lens.core.effects import Effects, toy_effects
from clip_lens.core.record import Method, MetricRecord, Record, SourceRecord
from clip_lens.core.store import read_frame, write_frame
from clip_lens.model.site import Edge, Outside, Site

RECORD = Record(
    Method("toy", "a toy", definition=("What", "It is.")), model="toy", weights="abc", layers=3, scale=100.0,
    source=SourceRecord("zeros", "z"), metric=MetricRecord("cosine", False, "cosine", "c"), pairs=9,
    dropped={"no image": 2}, notes=("a note",), selected=("side = foil: 9 of 12",), settings={"steps": 5, "tau": 0.1},
    versions={"torch": "2"},
)  # fmt: skip
PLACES = (
    Site("head", 3, 1, "eot"), Site("resid", 12, slot=7), Site("embed"),
    (Site("mlp", 0, slot="negator"), Site("attn", 1)), Edge(Site("embed"), Site("q", 0, 1)), Outside("mine", 5, 12),
)  # fmt: skip


def made(n_pairs=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(len(PLACES), n_pairs, generator=generator, dtype=torch.float64)
    values[1, 2] = torch.nan
    pairs = pd.DataFrame(
        {
            "key": [f"pair {n}" for n in range(n_pairs)],
            "caption": [f"There are no things, {n}." for n in range(n_pairs)],
            "foil": [f"There are some things, {n}." for n in range(n_pairs)],
            "image": [f"{n}.png" for n in range(n_pairs)],
            "side": ["foil", "caption", "none"] * (n_pairs // 3),
            "sigma": [-1, 1, 1] * (n_pairs // 3),
            "d": np.linspace(-2, 2, n_pairs),
            "segment": ["correct"] * n_pairs,
            "mine": [[n, "a"] for n in range(n_pairs)],
            "counted": pd.Series([None, *range(n_pairs - 1)], dtype="Int64"),
        }
    )
    total = torch.randn(n_pairs, generator=generator, dtype=torch.float64)
    return Effects(values.to(dtype), total.to(dtype), total.to(dtype) * 2, PLACES, pairs, RECORD)


def same(one, two):
    for name in ("values", "total", "baseline"):
        a, b = getattr(one, name), getattr(two, name)
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return False
        if not torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)):
            return False
    return one.places == two.places and one.record == two.record and one.pairs.equals(two.pairs)


def flipped(content, seed):
    """The bytes with one bit turned."""
    where = random.Random(seed).randrange(8 * len(content))
    damaged = bytearray(content)
    damaged[where // 8] ^= 1 << where % 8
    return bytes(damaged)


def test_everything_comes_back(tmp_path):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        effects = made(dtype=dtype)
        effects.save(tmp_path / "e.parquet")
        again = Effects.load(tmp_path / "e.parquet")
        assert same(effects, again) and again.record.method.definition == ("What", "It is.")
        assert again.pairs["mine"].tolist() == effects.pairs["mine"].tolist()


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    effects, path = made(), tmp_path / "e.parquet"
    effects.save(path)
    whole, refused = path.read_bytes(), 0
    for seed in range(300):
        path.write_bytes(flipped(whole, seed))
        try:
            assert same(Effects.load(path), effects), seed
        except ValueError as error:
            refused += 1
            assert "e.parquet" in str(error) and "ompute it again" in str(error), (seed, str(error))
    assert refused > 100  # most of the file is content


def test_a_flipped_bit_in_a_table_is_noticed_or_changes_nothing(tmp_path):
    frame, path = table(), tmp_path / "t.parquet"
    write_frame(path, frame, RECORD)
    whole, refused = path.read_bytes(), 0
    expected, _ = read_frame(path)
    for seed in range(300):
        path.write_bytes(flipped(whole, seed))
        try:
            found, record = read_frame(path)
        except ValueError as error:
            refused += 1
            assert "t.parquet" in str(error) and "ompute it again" in str(error), (seed, str(error))
        else:
            assert record == RECORD and found.attrs == expected.attrs, seed
            assert found.to_dict("list").__repr__() == expected.to_dict("list").__repr__(), seed
    assert refused > 100


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path, share):
    made().save(tmp_path / "e.parquet")
    write_frame(tmp_path / "t.parquet", table(), RECORD)
    for name, read in (("e.parquet", Effects.load), ("t.parquet", read_frame)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(ValueError, match=rf"{name} is no whole Parquet file.*compute it again"):
            read(path)


def rewritten(path, **metadata):
    """The file with some of the schema's metadata changed, None = removed."""
    found = pq.read_table(path)
    changed = {**found.schema.metadata, **{name.encode(): value for name, value in metadata.items()}}
    pq.write_table(found.replace_schema_metadata({k: v for k, v in changed.items() if v is not None}), path)


NOTE = b'{"format": 2'
DAMAGED = {
    "half a note": ({"clip_lens": NOTE}, "damaged"),
    "no JSON": ({"clip_lens": b"\xff\xfe"}, "damaged"),
    "another note": ({"clip_lens": b"null"}, "damaged"),
    "another digest": ({"clip_lens_digest": b"0" * 64}, "damaged"),
    "no note": ({"clip_lens": None}, "not one that Effects.save wrote"),
    "no digest": ({"clip_lens_digest": None}, "damaged"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_metadata_are_named(tmp_path, how):
    path = tmp_path / "e.parquet"
    made().save(path)
    metadata, words = DAMAGED[how]
    rewritten(path, **metadata)
    with pytest.raises(ValueError, match=rf"e\.parquet is .*{words}"):
        Effects.load(path)


def test_a_column_of_texts_among_the_numbers_is_named(tmp_path):
    path = tmp_path / "effects.parquet"
    made().save(path)
    table = pq.read_table(path)
    texts = pa.array(["x"] * table.num_rows)
    pq.write_table(table.set_column(table.num_columns - 1, table.column_names[-1], texts), path)
    with pytest.raises(ValueError, match=r"effects\.parquet"):
        Effects.load(path)


def test_the_first_format_is_refused_and_says_what_it_lacks(tmp_path):
    """As version 0.1 wrote it: a table of pandas' with a note of format 1 and neither digest nor record."""
    effects = toy_effects()
    frame = pd.concat([effects.index, pd.DataFrame(effects.values.numpy(), columns=effects.pairs["key"])], axis=1)
    note = {
        "format": 1,
        "dtype": "float32",
        "places": [[site.kind, site.layer, site.unit, site.slot] for site in effects.places],
        "total": effects.total.tolist(),
        "baseline": effects.baseline.tolist(),
        "pairs": [
            {"name": name, "dtype": "str" if column.dtype == "str" else str(column.dtype), "values": column.tolist()}
            for name, column in effects.pairs.items()
        ],
        "meta": {"method": "activation patching", "metric": "cosine", "source": "counterpart", "model": "tiny"},
    }
    written = pa.Table.from_pandas(frame, preserve_index=False)
    told = {**written.schema.metadata, b"clip_lens": json.dumps(note).encode()}
    pq.write_table(written.replace_schema_metadata(told), tmp_path / "old.parquet")
    with pytest.raises(ValueError, match=r"old\.parquet was written by clip_lens 0\.1.*compute it again"):
        Effects.load(tmp_path / "old.parquet")
    assert pd.read_parquet(tmp_path / "old.parquet")[["a", "b", "c"]].to_numpy().tolist() == effects.values.tolist()


def test_a_later_version_s_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_lens.core.store.FORMAT", 3)
    made().save(tmp_path / "later.parquet")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"later\.parquet is of format 3, this version reads 2"):
        Effects.load(tmp_path / "later.parquet")
    monkeypatch.setattr("clip_lens.core.store.as_json", lambda record: {"gravity": 9.81})
    made().save(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet was written by another version of clip_lens \(.*gravity"):
        Effects.load(tmp_path / "other.parquet")


def test_foreign_files_are_named(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "foreign.parquet")
    made().save(tmp_path / "effects.parquet")
    write_frame(tmp_path / "table.parquet", table(), RECORD)
    (tmp_path / "text.parquet").write_text("no parquet")
    for name, read in (
        ("foreign", Effects.load),
        ("table", Effects.load),
        ("foreign", read_frame),
        ("effects", read_frame),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.parquet is a Parquet file, but not one that"):
            read(tmp_path / f"{name}.parquet")
    for read in (Effects.load, read_frame):
        with pytest.raises(ValueError, match=r"text\.parquet is no whole Parquet file"):
            read(tmp_path / "text.parquet")
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.parquet")


# Tables


def table():
    frame = pd.DataFrame(
        {
            "layer": pd.Series([0, None, 2], dtype="Int64"),
            "r": [0.1, float("nan"), 1 / 3],
            "note": ["", None, "é"],
            "kept": [True, False, True],
            "mine": [[1, 2], [], [3]],
            "when": pd.to_datetime(["2020-01-01", "2021-01-01", None]),
            "kind": pd.Categorical(["a", "b", "a"]),
        }
    )
    frame.attrs = {"seed": 3, "share": 0.1, "said": "so"}
    return frame


def test_a_table_comes_back_with_its_record(tmp_path):
    write_frame(tmp_path / "t.parquet", table(), RECORD)
    found, record = read_frame(tmp_path / "t.parquet")
    assert record == RECORD and found.attrs == table().attrs
    assert found["layer"].dtype == "Int64" and found["kind"].dtype == "category"
    plain = [name for name in found if name not in ("mine", "when")]
    pd.testing.assert_frame_equal(found[plain], table()[plain], check_column_type=False)
    assert [list(cell) for cell in found["mine"]] == table()["mine"].tolist()
    assert list(pd.read_parquet(tmp_path / "t.parquet").columns) == list(table().columns)
    write_frame(tmp_path / "indexed.parquet", table().set_index("note")[["r"]], RECORD)
    assert read_frame(tmp_path / "indexed.parquet")[0].index.name == "note"


def test_what_json_does_not_have_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "t.parquet"
    write_frame(path, table(), RECORD)
    whole, bad = path.read_bytes(), table()
    bad.attrs = {"thing": object()}
    with pytest.raises(TypeError):
        write_frame(path, bad, RECORD)
    assert path.read_bytes() == whole and [each.name for each in tmp_path.iterdir()] == ["t.parquet"]


# Size

MEASURE = """
import resource, sys
import pandas as pd, torch
from clip_lens.core.effects import Effects, toy_effects
from clip_lens.model.site import Site

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
n, path = int(sys.argv[1]), sys.argv[2]
column = lambda form: [form.format(i) for i in range(n)]
texts = {"key": column("pair {}"), "caption": column("There is no dog {}."), "foil": column("There is a dog {}.")}
rest = {"image": column("{}.png"), "side": "caption", "sigma": 1, "d": 1.5, "segment": "correct"}
places = tuple(Site("head", layer, head) for layer in range(6) for head in range(4))
values = torch.arange(24.0)[:, None] + torch.arange(float(n)) / n
effects = Effects(values, values[0], values[1], places, pd.DataFrame(texts).assign(**rest), toy_effects().record)
toy_effects().save(path)
Effects.load(path)
before = peak()
effects.save(path)
found = Effects.load(path)
print(peak() - before)
assert found.values.equal(values) and found.total.equal(values[0]) and found.pairs.equals(effects.pairs)
"""


def megabytes(n, path):
    """How much the peak of the memory rises when n pairs are saved and loaded, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(n), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_memory_does_not_grow_with_the_square_of_the_pairs(tmp_path):
    """That was 10 GB at 50,000 pairs, 650 MB at 12,500; linear are some 10 kB a pair."""
    assert megabytes(12_500, tmp_path / "e.parquet") < 300


@pytest.mark.slow
def test_fifty_thousand_pairs_need_hundreds_of_megabytes_and_not_ten_thousand(tmp_path):
    assert megabytes(50_000, tmp_path / "e.parquet") < 1000


def test_columns_of_a_user_s_are_kept(tmp_path):
    effects = toy_effects()
    effects.pairs["subject"] = ["a dog", "a cat", None]
    effects.pairs["d of theirs"] = [1, 2, 3]
    replace(effects).save(tmp_path / "e.parquet")
    found = Effects.load(tmp_path / "e.parquet").pairs
    assert found["subject"].tolist()[:2] == ["a dog", "a cat"] and found["d of theirs"].tolist() == [1, 2, 3]
