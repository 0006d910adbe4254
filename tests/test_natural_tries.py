"""What a new user tries first works, or says what does: one test per try."""

import subprocess
import sys

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import batch_of, tower
from towers import random_clip

import clip_lens
from clip_lens import Edge, Site
from clip_lens.cli import tables
from clip_lens.cli.app import main
from clip_lens.core.effects import toy_effects
from clip_lens.model.load import load
from clip_lens.model.site import KINDS, LAYOUTS, NO_LAYER, place_of

TEXTS = ["There are no circles.", "There is a red star in the picture."]


@pytest.fixture(scope="module")
def tiny():
    return clip_lens.load()


@pytest.fixture(scope="module")
def batch(tiny):
    return clip_lens.align(clip_lens.read_pairs()[:24], clip_lens.ImageStore.open("tiny"), tiny)


@pytest.fixture(scope="module")
def heads(tiny, batch):
    return clip_lens.patch_effects(tiny, batch, tiny.sites("head"))


# The encoder


def test_encode_text_is_open_clips():
    clip = random_clip(width=32, heads=4, layers=2, d_embed=16).double()
    encoder = load(clip, tokenizer=open_clip.SimpleTokenizer(context_length=77), dtype=torch.float64)
    for normalize in (False, True):
        expected = clip.encode_text(open_clip.tokenize(TEXTS), normalize=normalize)
        found = encoder.encode_text(TEXTS, normalize=normalize)
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_to_tokens_cfg_and_run_with_cache_are_the_towers(tiny):
    assert torch.equal(tiny.to_tokens(TEXTS), tiny.tower.to_tokens(TEXTS))
    assert tiny.to_tokens(TEXTS[0]).shape == (1, tiny.n_ctx)
    assert tiny.cfg is tiny.tower.cfg
    u, cache = tiny.run_with_cache(TEXTS)
    _, expected = tiny.tower.run_with_cache(TEXTS)
    assert torch.allclose(u, tiny(TEXTS), atol=1e-6)
    assert torch.allclose(cache["pattern", 2], expected["pattern", 2][:, :, :11, :11], atol=1e-6)
    assert list(tiny.run_with_cache(TEXTS, "ln_final.hook_scale")[1]) == ["ln_final.hook_scale"]
    assert len(tiny.run_with_cache(TEXTS, lambda name: name.endswith("hook_z"))[1]) == tiny.n_layers


def test_what_only_the_tower_has_is_said_to_be_there(tiny):
    for name in ("W_E", "run_with_hooks", "blocks", "to_str_tokens", "OV"):
        with pytest.raises(AttributeError, match=rf"encoder\.tower\.{name}$"):
            getattr(tiny, name)
    with pytest.raises(AttributeError, match="did you mean 'tokenize'"):
        tiny.tokenise  # noqa: B018
    assert not hasattr(tiny, "__array__")
    with pytest.raises(ValueError, match=r"did you mean 'blocks.1.hook_mlp_out'\?"):
        tiny.run_with_cache(TEXTS, "block.1.hook_mlp_out")


# Places as words


def sites():
    """Any site: its kind, and a layer, a unit, a slot where it may have them."""
    names = st.text(min_size=1).filter(lambda name: not (name.isascii() and name.isdigit()))
    slot = st.one_of(st.none(), st.integers(0, 99), names)
    number = st.integers(0, 10**6)

    def of(kind):
        layer = st.just(0) if kind in NO_LAYER else number
        unit = kind in LAYOUTS and LAYOUTS[kind].unit_axis is not None
        return st.builds(Site, st.just(kind), layer, st.one_of(st.none(), number) if unit else st.none(), slot)

    return st.sampled_from(KINDS).flatmap(of)


@given(sites())
def test_a_site_is_parsed_from_what_it_is_written_as(site):
    assert Site.parse(str(site)) == site


def test_every_kind_is_parsed():
    for kind in KINDS:
        site = Site(kind, 0 if kind in NO_LAYER else 3)
        assert Site.parse(str(site)) == site
    assert Site.parse(" head2.1@eot") == Site("head", 2, 1, "eot")


def test_edges_and_several_are_parsed(tiny):
    for edge in [*tiny.edges()[::50], Edge(Site("head", 1, 2), Site("v", 3, 0, slot="eot"))]:
        assert Edge.parse(str(edge)) == edge == place_of(str(edge))
    several = (Site("mlp", 4), Site("head", 2, 3, "eot"))
    assert place_of("mlp 4 + head 2.3 @eot") == several


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("heads 2.1", "did you mean 'head'"),
        ("head", "names no layer; write 'head 0'"),
        ("embed 3", "embed has no layer"),
        ("", "is no site; write one as 'head 2.1 @eot'"),
        ("head 2.1 eot", "is no site; write one as 'head 2.1 @eot'"),
        ("mlp 2.1", "has no units"),
    ],
)
def test_what_is_no_site_says_how_one_is_written(text, said):
    with pytest.raises(ValueError, match=said):
        Site.parse(text)


def test_places_may_be_words(tiny, batch, heads):
    found = clip_lens.patch_effects(tiny, batch, ["head 2.1", "head 0.0"])
    assert found.places == (Site("head", 2, 1), Site("head", 0, 0))
    assert torch.allclose(found.values, heads[["head 2.1", "head 0.0"]].values, atol=1e-5)
    with pytest.raises(TypeError, match=r"places are a list, got one place, head 2.1; write \['head 2.1'\]"):
        clip_lens.patch_effects(tiny, batch, "head 2.1")


# Results


def test_a_heatmap_of_heads_is_unit_by_layer(tiny, heads):
    figure = clip_lens.heatmap(heads, side="foil")
    assert figure.data[0].z.shape == (tiny.n_heads, tiny.n_layers)
    assert heads.grid(side="foil").equals(heads.grid("unit", "layer", side="foil"))
    assert heads.grid(columns="unit", rows="layer", side="foil").equals(heads.grid("unit", "layer", side="foil").T)


def test_a_heatmap_of_edges_is_sender_by_receiver(tiny, batch):
    edges = tiny.edges(receivers=[Site("out")])[:5]
    grid = clip_lens.patch_effects(tiny, batch, edges).grid(side="foil")
    assert (grid.index.name, grid.columns.name) == ("sender", "receiver")


def test_a_heatmap_of_slots_is_slot_by_layer():
    assert clip_lens.heatmap(toy_effects(), side="foil").data[0].z.round(3).tolist() == [[1.0, 0.3], [0.0, 0.7]]


def test_top_places_go_straight_back_in(tiny, batch, heads):
    best = heads.top_places(3)
    again = clip_lens.patch_effects(tiny, batch, best)
    assert torch.allclose(again.values, heads[best].values, atol=1e-5)
    by_hand = {}
    for side in ("caption", "foil"):
        here = torch.from_numpy((heads.pairs["side"] == side).to_numpy())
        for place, line in zip(heads.places, heads.signed()[:, here].mean(1).abs().tolist(), strict=True):
            by_hand[place] = max(by_hand.get(place, 0), line)
    assert best == sorted(by_hand, key=by_hand.get, reverse=True)[:3]
    of_foil = heads.top_places(2, side="foil")
    assert [str(place) for place in of_foil] == heads.where(side="foil").top(2)["place"].tolist()
    assert len(heads.top_places(99)) == 24
    with pytest.raises(ValueError, match=r"no side 'foli' .did you mean 'foil'"):
        heads.top_places(1, side="foli")


def test_top_places_without_a_value_are_none():
    effects = toy_effects()
    effects.values[0] = torch.nan
    assert Site("resid", 0, slot="negator") not in effects.top_places(9)
    assert len(effects.top_places(9)) == 3


def test_an_effects_has_a_length_and_items(heads):
    effects = toy_effects()
    assert len(effects) == 4
    assert [each.places[0] for each in effects] == list(effects.places)
    assert effects[-1].places == (Site("resid", 1, slot="eot"),)
    assert torch.equal(effects[1:3].values, effects.values[1:3])
    assert effects[effects.places[2]].values.tolist() == [[1.0, -1.0, -0.5]]
    assert effects[["resid 1 @eot", 0]].places == (effects.places[3], effects.places[0])
    for mask in (
        [True, False, False, True],
        np.array([True, False, False, True]),
        pd.Series([True, False, False, True]),
    ):
        assert effects[mask].places == (effects.places[0], effects.places[3])
    assert effects[torch.tensor([2])].index["place"].tolist() == ["resid 1 @negator"]
    assert torch.equal(effects[1].total, effects.total)
    assert effects[1].table().equals(effects.where(layer=0, slot="eot").table())
    assert effects[effects.index["layer"] == 1].places == effects.places[2:]


def test_items_that_there_are_not(heads):
    effects = toy_effects()
    with pytest.raises(ValueError, match=r"no place 'resid 1 @eto' .did you mean 'resid 1 @eot'"):
        effects["resid 1 @eto"]
    with pytest.raises(ValueError, match=r"no place 'head 9.9' .did you mean 'head"):
        heads[Site("head", 9, 9)]
    with pytest.raises(ValueError, match=r"the column 'layer' is in effects\.to_frame"):
        effects["layer"]
    with pytest.raises(IndexError):
        effects[4]
    with pytest.raises(ValueError, match="2 truth values for 4 places"):
        effects[[True, False]]


def test_to_frame_has_a_row_per_place_and_pair():
    effects = toy_effects()
    frame = effects.to_frame()
    assert len(frame) == 12
    wide = frame.pivot(index="place", columns="key", values="value")
    assert wide.loc["resid 0 @negator"].tolist() == [2.0, -4.0, -1.0]
    assert frame.loc[frame["key"] == "b", "total"].unique().tolist() == [-4.0]
    mean = (frame["value"] * frame["sigma"]).groupby([frame["place"], frame["side"]], sort=False).mean()
    table = effects.table().set_index(["place", "side"])["effect"]
    assert np.allclose(mean.loc[table.index], table)


@pytest.mark.parametrize("most", [0, 20])
def test_top_shows_the_fraction_at_80_columns(heads, most):
    with pd.option_context("display.width", 80, "display.max_columns", most):
        first = repr(heads.top(2)).split("\n\n")[0].splitlines()[0]
    assert len(first) <= 80
    assert {"place", "side", "fraction"} <= set(first.split())


# Attention of a sentence


def test_patterns_of_a_sentence_of_ones_own(tiny):
    figure = clip_lens.patterns(tiny, TEXTS[1], 2, 1)
    _, cache = tiny.tower.run_with_cache(TEXTS[1])
    assert np.allclose(figure.data[0].z, cache["pattern", 2][0, 1, :11, :11].numpy(), atol=1e-6)
    assert len(figure.data) == 1
    assert figure.layout.xaxis.ticktext[5] == "star"
    assert {"query token", "key token", "weight"} <= set(figure.frame)
    with pytest.raises(ValueError, match="head counts from 0 to 3"):
        clip_lens.patterns(tiny, TEXTS[0], 2, 4)


# Names


@pytest.mark.parametrize("name", ["counterpart", "zeros", "mean"])
def test_sources_by_name(name):
    encoder, pairs = tower("causal")[1], batch_of("causal")
    places = [Site("mlp", 1)]
    found = clip_lens.patch_effects(encoder, pairs, places, source=name)
    expected = clip_lens.patch_effects(encoder, pairs, places, source=getattr(clip_lens, name))
    assert torch.equal(found.values, expected.values)
    assert found.record.source == expected.record.source
    assert (
        clip_lens.via(Site("mlp", 0), source=name).name
        == clip_lens.via(Site("mlp", 0), source=getattr(clip_lens, name)).name
    )


def test_metrics_by_name():
    encoder, pairs = tower("causal")[1], batch_of("causal")
    for verb in (clip_lens.patch_effects, clip_lens.gradient_effects):
        found, expected = (verb(encoder, pairs, [Site("mlp", 1)], metric=m) for m in ("cosine", clip_lens.cosine))
        assert torch.equal(found.values, expected.values)
        assert found.record.metric == expected.record.metric


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"source": "meen"}, "no source 'meen' .did you mean 'mean'"),
        ({"source": "zero"}, "no source 'zero' .did you mean 'zeros'"),
        ({"source": "resample"}, r"has to be told its seed: source=clip_lens.resample\(0\)"),
        ({"source": "noise"}, r"has to be told how much: source=clip_lens.noise\(1.0, seed=0\)"),
        ({"source": "corrupted"}, "no source 'corrupted'; there are counterpart, zeros, mean"),
        ({"metric": "cosin"}, "no metric 'cosin' .did you mean 'cosine'"),
        ({"metric": "logit_diff"}, "no metric 'logit_diff' .did you mean 'logit'"),
        ({"metric": "kl"}, "has to be told a bank of texts"),
        ({"places": ["head 2.1 @negater"]}, "no slot 'negater' .did you mean 'negator'"),
        ({"places": ["haed 2.1"]}, "no kind of site 'haed' .did you mean 'head'"),
    ],
)
def test_unknown_names_suggest_the_nearest(tiny, batch, how, said):
    with pytest.raises(ValueError, match=said):
        clip_lens.patch_effects(tiny, batch, **{"places": tiny.sites("mlp"), **how})


def test_other_unknown_names_suggest_the_nearest(tiny, batch, heads):
    for call, said in [
        (lambda: tiny.sites("heads"), "did you mean 'head'"),
        (lambda: Site("reside", 1), "did you mean 'resid'"),
        (lambda: batch.where("negater"), "did you mean 'negator'"),
        (lambda: heads.where(sides="foil"), "did you mean 'side'"),
        (lambda: heads.where(side="foli"), "did you mean 'foil'"),
        (lambda: heads.grid("unit", "layers", side="foil"), "did you mean 'layer'"),
        (lambda: heads.grid(value="fractions", side="foil"), "did you mean 'fraction'"),
        (lambda: heads.grid(side="fiol"), "did you mean 'foil'"),
        (lambda: clip_lens.discover(tiny, batch[:12], batch[12:], method="eap-gi"), "did you mean 'eap-ig'"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()


# The command line


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["tracee"], "Did you mean 'trace'"),
        (["patch", "--sites", "heads"], "did you mean 'head'"),
        (["circuit", "--method", "eapig"], "did you mean 'eap-ig'"),
        (["ablate", "--with", "meen"], "mean"),
        (["patch", "--sitse", "head"], "--sites"),
        (["info", "vit-b-32"], "ViT-B-32"),
    ],
)
def test_unknown_words_of_a_command_suggest_the_nearest(capsys, command, said):
    assert main(command) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("module", ["clip_lens", "clip_lens.cli.app"])
def test_the_module_is_the_command(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"clip-lens {clip_lens.__version__}\n")


@pytest.mark.parametrize("command", ["demo", "trace", "patch", "ablate", "paths", "study", "circuit", "embed"])
def test_what_replaces_files_is_called_overwrite_everywhere(capsys, command):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--overwrite" in said
    assert "--force" not in said


def test_info_knows_files_of_every_kind(capsys, tmp_path, heads):
    from safetensors.torch import save_file

    pairs = pd.DataFrame({"caption": ["no cat"], "foil": ["a cat"], "image": ["1.png"]})
    table = pd.DataFrame({"a": [1, 2]})
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    pairs.to_csv(tmp_path / "pairs.tsv", index=False, sep="\t")
    table.to_csv(tmp_path / "table.csv", index=False)
    table.to_csv(tmp_path / "table.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "table.parquet")
    np.savez(tmp_path / "arrays.npz", ids=np.zeros(2, int), embeddings=np.zeros((2, 3), np.float32))
    save_file({"w": torch.zeros(2, 3)}, tmp_path / "weights.safetensors")
    heads.save(tmp_path / "heads.parquet")
    for name, said in {
        "pairs.csv": "1 pair, negation in 1 caption",
        "pairs.tsv": "1 pair, negation in 1 caption",
        "table.csv": "a table of 2 rows: a",
        "table.tsv": "a table of 2 rows: a",
        "table.parquet": "a Parquet file of another program's, with 2 rows: a",
        "arrays.npz": "embeddings: float32 [2, 3]",
        "weights.safetensors": "w: F32 [2, 3]",
        "heads.parquet": "Effects(24 places x 24 pairs",
    }.items():
        assert main(["info", str(tmp_path / name)]) == 0
        assert said in capsys.readouterr().out, name
    for name in ("pairs.tsv", "arrays.npz", "heads.parquet", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"\xff\x00 no such thing")
        assert main(["info", str(tmp_path / name)]) == 1, name
        assert "clip-lens: " in capsys.readouterr().err
    for name in ("none.csv", "none.tsv", "none.npz", "none.parquet", "none.safetensors"):
        assert main(["info", str(tmp_path / name)]) == 1
        assert name in capsys.readouterr().err


def test_the_terminal_table_of_a_deep_tower_fits_80_columns(capsys, monkeypatch):
    """12 layers and every slot: a line per layer, every number whole, a side in one table."""
    from dataclasses import replace

    from clip_lens.data.slots import SLOTS

    monkeypatch.setenv("COLUMNS", "80")
    places = tuple(Site("resid", layer, slot=slot) for layer in range(13) for slot in SLOTS)
    toy = toy_effects()
    total = torch.ones(3) * toy.orientation
    values = (torch.arange(130.0).reshape(130, 1) - 65) / 100 * total
    tables.print_effects(replace(toy, places=places, values=values, total=total))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for layer in range(13):
        numbers = " ".join(f"{(layer * 10 + slot - 65) / 100:.2f}".replace("-0.00", "0.00") for slot in range(10))
        assert sum(" ".join(line.split()) == f"{layer} {numbers}" for line in lines) == 2, layer
    assert not any("…" in line for line in lines)


def test_positions_that_do_not_fit_come_in_further_tables(capsys, monkeypatch):
    from dataclasses import replace

    monkeypatch.setenv("COLUMNS", "80")
    places = tuple(Site("resid", layer, slot=slot) for layer in range(3) for slot in range(30))
    tables.print_effects(replace(toy_effects(), places=places, values=torch.ones(90, 3)))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert sum(line.strip().startswith("layer") for line in out.splitlines()) > 2
    for layer in range(3):
        line = [line.split()[1:] for line in out.splitlines() if line.split()[:1] == [str(layer)]]
        assert sum(map(len, line)) == 2 * 30


# More that people try


def test_numbers_for_numpy_and_tables_for_pandas(heads):
    assert np.array_equal(np.asarray(heads), heads.values.numpy())
    for name in ("head", "columns", "shape", "query", "to_csv", "sort_values", "mean"):
        with pytest.raises(AttributeError, match=rf"effects\.table\(\)\.{name}$"):
            getattr(heads, name)
    with pytest.raises(AttributeError, match="did you mean 'places'"):
        heads.place  # noqa: B018
    for side in ("caption", "foil"):
        assert heads.top(2, side=side).equals(heads.where(side=side).top(2))
    assert set(heads.top(2)["side"]) == {"caption", "foil"}
    with pytest.raises(IndexError, match=r"pairs.to_frame\(\) for columns"):
        clip_lens.read_pairs()["caption"]


def test_an_effects_is_copied_and_pickled_like_any_value(heads):
    import copy
    import pickle

    for again in (copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
        assert torch.equal(again.values, heads.values)
        assert again.places == heads.places


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("mlp_out", "that is the hook of kind 'mlp'"),
        ("attn_out", "that is the hook of kind 'attn'"),
        ("resid_pre", "that is the hook of kind 'resid'"),
        ("hook_z", "that is the hook of kind 'head'"),
        ("blocks.2.attn.hook_pattern", "that is the hook of kind 'pattern'"),
    ],
)
def test_transformer_lens_names_of_hooks_say_which_kind_they_are(tiny, kind, said):
    for call in (lambda: Site(kind, 2), lambda: tiny.sites(kind)):
        with pytest.raises(ValueError, match=said):
            call()


def test_a_site_takes_numbers_for_layer_and_unit():
    assert Site("head", np.int64(2), np.int64(1)) == Site("head", 2, 1)
    with pytest.raises(ValueError, match=r"unit is a number, got 'eot'; write Site\(kind, layer, unit=..., slot=...\)"):
        Site("head", 2, "eot")
    with pytest.raises(ValueError, match="layer is a number, got '2'"):
        Site("head", "2")


def test_short_names_of_activations_say_where_they_work(tiny):
    cache = tiny.cache(TEXTS[0])
    with pytest.raises(KeyError, match=r"short ones.*run_with_cache"):
        cache["pattern", 2]
    with pytest.raises(KeyError, match=r"did you mean 'blocks.1.hook_mlp_out'"):
        cache["block.1.hook_mlp_out"]


def test_a_text_where_a_batch_belongs_says_so(tiny):
    for verb in (clip_lens.logit_lens, clip_lens.scores, lambda *given: clip_lens.patch_effects(*given, ["mlp 1"])):
        with pytest.raises(TypeError, match="takes an encoder and then a Batch"):
            verb(tiny, "a star")
    with pytest.raises(TypeError, match="patterns are of a Batch, or of one text"):
        clip_lens.patterns(tiny, ["a star"])
    assert clip_lens.patterns(tiny, "a star").data[0].z.shape == (4, 4)


def test_one_layer_is_as_good_as_a_list(tiny):
    assert tiny.sites("head", layers=2) == tiny.sites("head", layers=[2])


def test_places_as_words_everywhere(tiny, batch):
    v = torch.randn(128, generator=torch.Generator().manual_seed(0))
    words, sites = (clip_lens.steer(tiny, batch, {at: v}) for at in ("resid 3 @eot", Site("resid", 3, slot="eot")))
    assert torch.equal(words.values, sites.values)
    assert torch.equal(clip_lens.steer(tiny, batch, {"resid 3 @eot": v.numpy()}).values, sites.values)
    words, sites = (
        clip_lens.path_effects(tiny, batch, [head], [out])
        for head, out in (("head 0.1", "out"), (Site("head", 0, 1), Site("out")))
    )
    assert torch.equal(words.values, sites.values)
    assert clip_lens.via("head 0.1").name == clip_lens.via(Site("head", 0, 1)).name


def test_load_takes_the_tag_second_as_open_clip_does():
    assert load("tiny", None).name == "tiny"


def test_a_report_of_one_result(tmp_path, heads):
    page = clip_lens.report(heads, tmp_path / "report.html")
    assert "Activation patching" in page.read_text(encoding="utf-8")
