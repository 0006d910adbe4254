"""TransformerLens' tools and HookedTransformer's habits on the tower; oracles: open_clip, hooks by hand, identities."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from towers import random_clip, random_encoder
from transformer_lens import ActivationCache, HookedRootModule, SVDInterpreter, head_detector, patching
from transformer_lens.tools import analysis

from clip_lens.model.convert import convert
from clip_lens.model.tower import HookedTextTower

LAYERS, HEADS, WIDTH, D_HEAD, D_EMBED = 3, 4, 64, 16, 32
TEXT, OTHER = "There are no dogs.", "There are some dogs."


@pytest.fixture(scope="module")
def tower() -> HookedTextTower:
    return random_encoder(dtype=torch.float64).tower


@pytest.fixture(scope="module")
def run(tower: HookedTextTower) -> Tensor:
    return tower.to_tokens(TEXT, padding=False)


@pytest.fixture(scope="module")
def other(tower: HookedTextTower) -> Tensor:
    return tower.to_tokens(OTHER, padding=False)


def direction() -> Tensor:
    return torch.randn(D_EMBED, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def metric(y: Tensor) -> Tensor:
    return (y[:, -1] @ direction()).sum()


def close(left: Tensor, right: Tensor, tolerance: float = 1e-11) -> None:
    assert left.shape == right.shape
    assert float((left - right).abs().max()) <= tolerance


# --- texts, tokens, strings -----------------------------------------------------------------------------------------

START, END = 49406, 49407


def shared(texts: list[str], context_length: int = 77) -> Tensor:
    """OpenAI's files as transformers reads them: the end of text is the padding."""
    rows = open_clip.SimpleTokenizer()(texts, context_length)
    filled = torch.arange(rows.shape[1]) > rows.argmax(1, keepdim=True)
    return torch.where(filled, END, rows)


def without_start(texts: list[str], context_length: int = 77) -> Tensor:
    """As SigLIP's: no start, and an end that is the padding."""
    rows = open_clip.SimpleTokenizer()(texts, context_length + 1)[:, 1:]
    return torch.where((rows == 0) | (rows == END), 1, rows)


def with_tokenizer(tower: HookedTextTower, tokenizer: Callable[..., Tensor]) -> HookedTextTower:
    changed = copy.deepcopy(tower)
    changed.tokenizer = tokenizer
    return changed


def test_padding_is_cut_to_the_longest_text_and_the_embedding_stays(tower: HookedTextTower) -> None:
    tokens = tower.to_tokens([TEXT, "dogs"], padding=False)
    assert tokens.tolist() == [[START, 997, 631, 871, 3255, 269, END], [START, 3255, END, 0, 0, 0, 0]]
    whole = tower.to_tokens([TEXT, "dogs"])
    assert whole.shape == (2, 77) and not whole[:, 7:].any()
    close(tower(tokens), tower(whole)[:, :7])
    assert torch.equal(tower.to_tokens(tokens), tokens)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(shared, [START, 3255, END]), (without_start, [3255, 1])],
    ids=["end is padding", "no start"],
)
def test_an_end_that_is_the_padding_is_not_cut(
    tower: HookedTextTower, tokenizer: Callable[..., Tensor], expected: list[int]
) -> None:
    assert with_tokenizer(tower, tokenizer).to_tokens("dogs", padding=False).tolist() == [expected]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prepend_bos": False}, "adds the start of text itself"),
        ({"padding_side": "left"}, "padded on the right"),
        ({"truncate": False, "input": "dogs " * 80}, "does not fit into 77"),
    ],
)
def test_what_the_tokenizer_does_not_do_is_refused(tower: HookedTextTower, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tower.to_tokens(**{"input": TEXT, **options})


def test_what_the_tokenizer_does_is_taken(tower: HookedTextTower) -> None:
    full = "dogs " * 75
    same = tower.to_tokens([TEXT, full], prepend_bos=True, padding_side="right", truncate=False)
    assert torch.equal(same, tower.to_tokens([TEXT, full])) and same[1, -1] == END
    bare = with_tokenizer(tower, without_start)
    assert torch.equal(bare.to_tokens(TEXT, prepend_bos=False), bare.to_tokens(TEXT))
    with pytest.raises(ValueError, match="adds no start of text"):
        bare.to_tokens(TEXT, prepend_bos=True)
    deaf = with_tokenizer(tower, lambda texts: open_clip.SimpleTokenizer()(texts))
    assert deaf.to_tokens(TEXT, truncate=False).shape == (1, 77)
    with pytest.raises(ValueError, match="does not fit"):
        deaf.to_tokens("dogs " * 80, truncate=False)


def test_a_tower_that_reads_its_padding_keeps_it() -> None:
    with pytest.raises(ValueError, match="read the padding"):
        random_encoder(causal=False).tower.to_tokens("dogs", padding=False)


WORDS = ["<start_of_text>", "there", "are", "no", "dogs", ".", "<end_of_text>"]


def test_str_tokens_of_a_text_of_a_list_and_of_rows(tower: HookedTextTower, run: Tensor) -> None:
    padded = WORDS + ["<pad>"] * 70
    short = ["<start_of_text>", "dogs", "<end_of_text>"] + ["<pad>"] * 74
    assert tower.to_str_tokens(TEXT) == padded
    assert tower.to_str_tokens([TEXT, "dogs"]) == [padded, short]
    assert tower.to_str_tokens(tower.to_tokens([TEXT, "dogs"])) == [padded, short]
    assert tower.to_str_tokens(run) == tower.to_str_tokens(run[0]) == tower.to_str_tokens(run[0].numpy()) == WORDS
    with pytest.raises(ValueError, match="padding_side"):
        tower.to_str_tokens(TEXT, padding_side="left")


def test_an_exclamation_mark_is_no_padding(tower: HookedTextTower) -> None:
    """Token 0 is "!" in the middle of a word, and what open_clip fills with."""
    assert tower.to_str_tokens(torch.tensor([0])) == ["!"]
    assert tower.to_str_tokens(torch.tensor([START, 3255, 0, 0])) == ["<start_of_text>", "dogs", "!", "!"]
    assert tower.to_single_str_token(0) == "!" and tower.to_single_str_token(3255) == "dogs"
    assert tower.to_str_tokens(torch.tensor([3255, END, 0, 0]))[2:] == ["<pad>", "<pad>"]


def test_to_string(tower: HookedTextTower, run: Tensor) -> None:
    said = "<start_of_text>there are no dogs . <end_of_text>"
    assert tower.to_string(run[0]) == tower.to_string(tower.to_tokens(TEXT)[0]) == said
    assert tower.to_string(tower.to_tokens([TEXT, "dogs"])) == [said, "<start_of_text>dogs <end_of_text>"]
    assert tower.to_string([3255, 631]) == "dogs are"


def test_get_token_position(tower: HookedTextTower, run: Tensor) -> None:
    twice = "dogs and dogs"
    assert tower.get_token_position("dogs", twice) == tower.get_token_position(3255, twice) == 1
    assert tower.get_token_position("dogs", twice, mode="last") == 3
    assert tower.to_single_token("dogs") == 3255
    assert tower.get_token_position("no", run) == tower.get_token_position("no", run[0]) == 3
    for asked, said in (
        (("cats", TEXT), "nowhere"),
        (("no", run.repeat(2, 1)), "2 texts"),
        (("no", TEXT, "any"), "mode"),
    ):
        with pytest.raises(ValueError, match=said):
            tower.get_token_position(*asked)


# --- weights --------------------------------------------------------------------------------------------------------

PARTS = [("attn", name) for name in ["W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"]]
PARTS += [("mlp", name) for name in ["W_in", "W_out", "b_in", "b_out"]]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: nn.Parameter(x, requires_grad=False)], ids=["tensor", "param"])
@pytest.mark.parametrize(("part", "name"), PARTS)
def test_a_packed_weight_can_be_assigned_to(
    tower: HookedTextTower, run: Tensor, part: str, name: str, wrap: Callable[[Tensor], Tensor]
) -> None:
    """The run afterwards is the one with the weight edited in place."""
    assigned, edited = copy.deepcopy(tower), copy.deepcopy(tower)
    module = getattr(assigned.blocks[1], part)
    setattr(module, name, wrap(getattr(module, name) * 0.5))
    getattr(getattr(edited.blocks[1], part), name).mul_(0.5)
    assert torch.equal(assigned(run), edited(run)) and not torch.equal(assigned(run), tower(run))
    assert set(dict(assigned.named_parameters())) == set(dict(tower.named_parameters()))
    with pytest.raises(RuntimeError):
        setattr(module, name, torch.zeros(3, 5))


def test_parameters_by_name(tower: HookedTextTower) -> None:
    found = tower.tl_parameters()
    assert len(found) == 16 * LAYERS + 6 and dict(tower.tl_named_parameters()).keys() == found.keys()
    for name, value in found.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            expected = getattr(getattr(tower.blocks[int(parts[1])], parts[2]), parts[3])
        else:
            expected = getattr(tower.ln_final if parts[0] == "ln_final" else tower, parts[1])
        assert torch.equal(value, expected), name
    assert torch.equal(tower.unembed.W_U, tower.W_U) and torch.equal(tower.unembed.b_U, tower.b_U)
    assert torch.equal(tower.W_E_pos, torch.cat([tower.W_E, tower.W_pos]))
    assert tower.all_head_labels[:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    assert tower.cfg.d_vocab_out == D_EMBED and tower.cfg.d_vocab == 49408


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_scores(tower: HookedTextTower, mode: str) -> None:
    found = tower.all_composition_scores(mode)
    for layer, head, later, of in torch.cartesian_prod(*map(torch.arange, (LAYERS, HEADS, LAYERS, HEADS))).tolist():
        attn = tower.blocks[later].attn
        ov, qk = attn.W_V[of] @ attn.W_O[of], attn.W_Q[of] @ attn.W_K[of].T
        right = {"Q": qk, "K": qk.T, "V": ov}[mode]
        left = tower.blocks[layer].attn.W_V[head] @ tower.blocks[layer].attn.W_O[head]
        expected = (left @ right).norm() / left.norm() / right.norm() if layer < later else torch.tensor(0.0)
        assert abs(float(found[layer, head, later, of] - expected)) <= 1e-12
    with pytest.raises(ValueError, match="mode="):
        tower.all_composition_scores("q")


PROCESSING: dict[str, Callable[[HookedTextTower], None]] = {
    "fold_layer_norm": lambda tower: tower.fold_layer_norm(),
    "center_writing_weights": lambda tower: tower.center_writing_weights(),
    "fold_value_biases": lambda tower: tower.fold_value_biases(),
    "process_weights_": lambda tower: tower.process_weights_(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("how", PROCESSING)
def test_processed_weights_give_open_clips_embeddings(how: str, causal: bool, dtype: torch.dtype) -> None:
    module = random_clip(causal=causal).to(dtype)
    tower, pool = convert(module, name="it")
    tokens = torch.randint(1, 49000, (3, tower.cfg.n_ctx), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in tower.named_parameters()}
    PROCESSING[how](tower)
    assert any(not torch.equal(value, before[name]) for name, value in tower.named_parameters())
    with torch.no_grad():
        expected = module.encode_text(tokens)
    found = tower(tokens)[torch.arange(3), pool(tokens)]
    assert (found - expected).abs().max() <= {torch.float32: 1e-5, torch.float64: 1e-12}[dtype] * expected.abs().max()


def test_what_processing_makes_of_weights(run: Tensor) -> None:
    tower = random_encoder(causal=False, dtype=torch.float64).tower
    tower.process_weights_()
    for norm in [tower.ln_final, *(getattr(block, name) for block in tower.blocks for name in ("ln1", "ln2"))]:
        assert (norm.w == 1).all() and (norm.b == 0).all()
    assert not tower.b_V.any() and tower.cfg.normalization_type == "LNPre"
    read = [tower.W_Q.mean(-2), tower.W_K.mean(-2), tower.W_V.mean(-2), tower.W_in.mean(-2), tower.W_U.mean(0)]
    written = [value.mean(-1) for value in (tower.W_E, tower.W_pos, tower.W_O, tower.b_O, tower.W_out, tower.b_out)]
    assert max(float(mean.abs().max()) for mean in read + written) <= 1e-15
    assert tower.b_U.abs().max() > 0.1


def test_direct_attribution_of_folded_weights_is_that_of_the_embeddings(run: Tensor) -> None:
    """Behind the fold a direction is read by `W_U` alone, as TransformerLens' notebooks write it out."""
    tower = random_encoder(dtype=torch.float64).tower
    score = float(metric(tower(run)))
    tower.process_weights_()
    _, cache = tower.run_with_cache(run)
    parts = cache.decompose_resid(apply_ln=True, pos_slice=-1)[:, 0]
    assert abs(float((parts @ tower.W_U @ direction()).sum() + tower.b_U @ direction()) - score) <= 1e-11


@pytest.mark.parametrize("option", ["center_unembed", "refactor_factored_attn_matrices"])
def test_processing_that_would_change_embeddings_is_refused(tower: HookedTextTower, option: str) -> None:
    with pytest.raises(ValueError, match=option):
        tower.process_weights_(**{option: True})


# --- caches and flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setter", "names"),
    [
        ("set_use_attn_result", ["attn.hook_result"]),
        ("set_use_split_qkv_input", [f"{at}hook_{part}_input" for at in ("", "attn.") for part in "qkv"]),
        ("set_use_hook_mlp_in", ["hook_mlp_in"]),
    ],
)
def test_a_flag_says_what_a_cache_of_everything_holds(run: Tensor, setter: str, names: list[str]) -> None:
    tower = random_encoder(dtype=torch.float64).tower
    expected, without = tower.run_with_cache(run)
    getattr(tower, setter)(True)
    output, cache = tower.run_with_cache(run)
    close(output, expected)
    assert set(cache) - set(without) == {f"blocks.{layer}.{name}" for layer in range(LAYERS) for name in names}
    for name in without:
        finite = without[name].isfinite()
        close(cache[name][finite], without[name][finite])
    getattr(tower, setter)(False)
    assert set(tower.run_with_cache(run)[1]) == set(without)


@pytest.mark.parametrize("options", [{}, {"layer": 1}, {"layer": 1, "mlp_input": True}], ids=str)
def test_a_cache_of_everything_has_the_scales_that_norms_are_applied_with(
    tower: HookedTextTower, run: Tensor, options: dict[str, Any]
) -> None:
    _, everything = tower.run_with_cache(run, names_filter=lambda name: True)
    _, plain = tower.run_with_cache(run)
    found = everything.decompose_resid(apply_ln=True, **options)
    close(found, plain.decompose_resid(apply_ln=True, **options))
    norm = "ln_final" if not options else f"blocks.1.ln{2 if 'mlp_input' in options else 1}"
    close(found.sum(0), plain[f"{norm}.hook_normalized"])


def test_an_unknown_name_to_cache_warns(tower: HookedTextTower, run: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"no hook \['blocks.0.hook_mlp_ou'\].*blocks.0.hook_mlp_out"):
        _, cache = tower.run_with_cache(run, names_filter=["hook_embed", "blocks.0.hook_mlp_ou"])
    assert list(cache) == ["hook_embed"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower.run_with_cache(run, names_filter="hook_embed")
        tower.run_with_cache(run, names_filter=lambda name: False)


@pytest.mark.parametrize("part", "qkv")
def test_both_names_of_a_split_input_are_one_place(tower: HookedTextTower, run: Tensor, part: str) -> None:
    shift = lambda value, hook: value + torch.linspace(-1, 1, WIDTH, dtype=value.dtype)
    ours, theirs = f"blocks.1.hook_{part}_input", f"blocks.1.attn.hook_{part}_input"
    found = tower.run_with_hooks(run, fwd_hooks=[(theirs, shift)])
    close(found, tower.run_with_hooks(run, fwd_hooks=[(ours, shift)]))
    assert (found - tower(run)).abs().max() > 1e-3


def test_gradients_need_nothing_but_backward_hooks(tower: HookedTextTower, run: Tensor) -> None:
    name, seen = "blocks.1.attn.hook_z", {}
    keep = lambda gradient, hook: seen.update({hook.name: gradient.clone()})
    with tower.hooks(bwd_hooks=[(name, keep)]):
        metric(tower(run)).backward()
    step = torch.zeros_like(seen[name])
    step[0, 3, 2, 5] = 1e-5
    up, down = (
        metric(tower.run_with_hooks(run, fwd_hooks=[(name, lambda value, hook, sign=sign: value + sign * step)]))
        for sign in (1, -1)
    )
    assert abs(float((up - down) / 2e-5 - seen[name][0, 3, 2, 5])) <= 1e-8
    assert not tower(run).requires_grad and all(weight.grad is None for weight in tower.parameters())


def test_slices_and_copies_of_a_cache(tower: HookedTextTower, run: Tensor, other: Tensor) -> None:
    _, cache = tower.run_with_cache(torch.cat([run, other]))
    _, second = tower.run_with_cache(other)
    row = cache.apply_slice_to_batch_dim(1)
    assert not row.has_batch_dim and set(cache.keys()) == set(second.keys()) == set(dict(cache.items()))
    close(row["resid_post", 2], second["resid_post", 2][0])
    assert len(list(cache.values())) == len(cache)
    close(second.remove_batch_dim()["resid_post", 2], row["resid_post", 2])
    assert cache.to("cpu")["z", 0].device.type == "cpu"
    close(cache.stack_activation("mlp_out"), torch.stack([cache["mlp_out", layer] for layer in range(LAYERS)]))
    cache.toggle_autodiff(True)  # of PyTorch as a whole


def test_neuron_results(tower: HookedTextTower, run: Tensor) -> None:
    _, cache = tower.run_with_cache(run)
    by_hand = [cache["post", layer][..., None] * tower.W_out[layer] for layer in range(LAYERS)]
    close(cache.get_neuron_results(1), by_hand[1])
    close(cache.stack_neuron_results(LAYERS), torch.cat(by_hand, 2).movedim(2, 0))


# --- tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all_pos", "by_pos"])
def test_every_head_activation_is_its_own_sweep(tower: HookedTextTower, run: Tensor, other: Tensor, name: str) -> None:
    _, cache = tower.run_with_cache(run)
    every = {
        "all_pos": patching.get_act_patch_attn_head_all_pos_every,
        "by_pos": patching.get_act_patch_attn_head_by_pos_every,
    }
    parts = [getattr(patching, f"get_act_patch_attn_head_{part}_{name}") for part in ("out", "q", "k", "v", "pattern")]
    alone = [part(tower, other, cache, metric) for part in parts]
    alone[4] = alone[4] if name == "all_pos" else alone[4].mT
    assert torch.equal(every[name](tower, other, cache, metric), torch.stack(alone))


def test_a_patch_of_ones_own(tower: HookedTextTower, run: Tensor, other: Tensor) -> None:
    """Neurons, which no `get_act_patch_*` patches."""
    _, cache = tower.run_with_cache(run)

    def setter(value: Tensor, index: list[int], clean: Tensor) -> Tensor:
        value[:, index[1]] = clean[:, index[1]]
        return value

    axes = ("layer", "pos")
    found = patching.generic_activation_patch(tower, other, cache, metric, setter, "post", axes)
    for layer, pos in torch.cartesian_prod(torch.arange(LAYERS), torch.arange(7)).tolist():
        put = lambda value, hook, pos=pos: value.index_copy(1, torch.tensor([pos]), cache[hook.name][:, [pos]])
        expected = metric(tower.run_with_hooks(other, fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", put)]))
        assert abs(float(found[layer, pos] - expected)) <= 2e-6


def test_every_block_is_its_own_sweep(tower: HookedTextTower, run: Tensor, other: Tensor) -> None:
    _, cache = tower.run_with_cache(run)
    alone = (patching.get_act_patch_resid_pre, patching.get_act_patch_attn_out, patching.get_act_patch_mlp_out)
    expected = torch.stack([part(tower, other, cache, metric) for part in alone])
    assert torch.equal(patching.get_act_patch_block_every(tower, other, cache, metric), expected)


@pytest.mark.parametrize("part", "qkv")
def test_direct_path_patching_is_the_receivers_input_written_out(
    tower: HookedTextTower, run: Tensor, other: Tensor, part: str
) -> None:
    (_, clean), (_, corrupted) = tower.run_with_cache(run), tower.run_with_cache(other)
    found = patching.get_act_patch_direct_path_all_sources(tower, other, clean, corrupted, metric, part, verbose=False)
    expected = torch.zeros(LAYERS, HEADS, LAYERS, HEADS)
    for layer, head, later, of in torch.cartesian_prod(*map(torch.arange, expected.shape)).tolist():
        if later <= layer:
            continue
        change = (clean["z", layer] - corrupted["z", layer])[:, :, head] @ tower.W_O[layer, head]
        norm, attn = tower.blocks[later].ln1, tower.blocks[later].attn
        read = F.layer_norm(corrupted["resid_pre", later] + change, (WIDTH,), norm.w, norm.b, norm.eps)
        put = read @ getattr(attn, f"W_{part.upper()}")[of] + getattr(attn, f"b_{part.upper()}")[of]

        def patch(value: Tensor, hook: object, put: Tensor = put, of: int = of) -> Tensor:
            return value.index_copy(2, torch.tensor([of]), put[:, :, None])

        expected[layer, head, later, of] = metric(
            tower.run_with_hooks(other, fwd_hooks=[(f"blocks.{later}.attn.hook_{part}", patch)])
        )
    close(found, expected, 2e-6)  # TransformerLens keeps its results in float32
    one = patching.get_act_patch_direct_path(tower, other, clean, corrupted, metric, 0, 1, part, verbose=False)
    assert torch.equal(one, found[0, 1])


def test_node_attribution_is_the_gradient_times_the_change(tower: HookedTextTower, run: Tensor, other: Tensor) -> None:
    scores = analysis.attribution_patch(tower, run, other, metric, analysis.EdgeAttributionConfig()).node_scores
    (_, clean), (_, corrupted) = tower.run_with_cache(run), tower.run_with_cache(other)
    node = analysis.Node(kind="mlp_out", layer=1, position=3)
    change = torch.zeros(1, 7, WIDTH, dtype=torch.float64)
    change[:, 3] = (clean["mlp_out", 1] - corrupted["mlp_out", 1])[:, 3]
    up, down = (
        metric(tower.run_with_hooks(other, fwd_hooks=[("blocks.1.hook_mlp_out", lambda v, hook, h=h: v + h * change)]))
        for h in (1e-5, -1e-5)
    )
    assert abs(float(up - down) / 2e-5 - scores[node]) <= 1e-7
    assert len(scores) == 7 * (1 + LAYERS * (HEADS + 1))


def test_faithfulness_of_everything_and_of_nothing(tower: HookedTextTower, run: Tensor, other: Tensor) -> None:
    edges = analysis.EdgeAttributionConfig(granularity="edge")
    found = analysis.attribution_patch(tower, run, other, metric, edges).edge_scores
    config = analysis.FaithfulnessConfig()
    whole = analysis.faithfulness(tower, run, other, metric, list(found), config)
    none = analysis.faithfulness(tower, run, other, metric, [], config)
    assert abs(whole.recovered - 1) <= 1e-9 and abs(none.recovered) <= 1e-9
    assert whole.full_metric == none.full_metric and abs(whole.full_metric - float(metric(tower(run)))) <= 1e-12
    assert not tower.cfg.use_attn_result and not tower.cfg.use_split_qkv_input and not tower.cfg.use_hook_mlp_in


def test_the_logit_lens_reads_the_stream_by_norm_and_projection() -> None:
    module = random_clip().double()
    tower, _ = convert(module, name="it")
    tokens = torch.randint(1, 49000, (2, 7), generator=torch.Generator().manual_seed(0))
    output, cache = tower.run_with_cache(tokens)
    found = cache.logit_lens(positions=None)
    assert found.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    close(found.values[-1], output)
    with torch.no_grad():
        read = [module.ln_final(cache["resid_pre", layer]) @ module.text_projection for layer in range(LAYERS)]
    close(found.values[:-1], torch.stack(read))
    close(analysis.logit_lens(tower, tokens, positions=None).values, found.values)
    close(analysis.logit_readout(tower, cache["resid_pre", 1]).values, read[1])
    assert torch.equal(cache.logit_lens(positions=None, top_k=1).readout.top_ids[-1, ..., 0], output.argmax(-1))


def test_direct_logit_attribution_of_a_direction(tower: HookedTextTower, run: Tensor) -> None:
    found = analysis.direct_logit_attribution(tower, run, direction())
    constant = (tower.ln_final.b @ tower.W_U + tower.b_U) @ direction()
    assert abs(float(found.attribution.sum() + constant - metric(tower(run)))) <= 1e-11


def test_heads_are_detected_in_tokens(tower: HookedTextTower, run: Tensor) -> None:
    found = head_detector.detect_head(tower, run, "previous_token_head")
    _, cache = tower.run_with_cache(run)
    expected = [cache["pattern", layer][0].diagonal(-1, -2, -1).sum(-1) / 7 for layer in range(LAYERS)]
    close(found, torch.stack(expected))
    with pytest.raises(AssertionError, match="context window"):
        head_detector.detect_head(tower, TEXT, "previous_token_head")  # padded to the context, which it refuses


@pytest.mark.parametrize("kind", ["OV", "w_in", "w_out"])
def test_singular_vectors_read_by_the_projection(tower: HookedTextTower, kind: str) -> None:
    interpreter = SVDInterpreter(tower)
    interpreter.cfg = copy.copy(tower.cfg)
    interpreter.cfg.d_vocab = tower.cfg.d_vocab_out
    found = interpreter.get_singular_vectors(kind, 1, 3, head_index=2)[:, 0]
    block = tower.blocks[1]
    matrix = {
        "OV": block.attn.W_V[2] @ block.attn.W_O[2],
        "w_in": block.mlp.W_in.T * block.ln2.w,
        "w_out": block.mlp.W_out,
    }
    expected = (torch.linalg.svd(matrix[kind])[2][:3] @ tower.W_U).T
    close(found.abs(), expected.abs(), 1e-10)  # singular vectors have no sign


def test_subspaces_and_probes(tower: HookedTextTower, run: Tensor, other: Tensor) -> None:
    name, logits = "blocks.1.hook_resid_post", lambda tokens: tower(tokens)[:, -1]
    positions = torch.tensor([6])
    kept = analysis.collect_activations(tower, name, run, logits, positions=positions)
    close(kept, tower.run_with_cache(run)[1][name][:, 6])
    everything = analysis.SubspaceInterchange(torch.eye(WIDTH, dtype=torch.float64))
    found = analysis.run_with_intervention(tower, name, everything, other, kept, logits, positions=positions)
    put = lambda value, hook: torch.cat([value[:, :6], kept[:, None]], 1)
    close(found, tower.run_with_hooks(other, fwd_hooks=[(name, put)])[:, -1])
    batched = analysis.intervened_logits(tower, name, everything, other, kept, logits, positions=positions)
    close(batched, found)
    features, labels = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    features[:, 5] += 10 * labels
    assert 5 in analysis.fit_sparse_probe(features, labels, k=1).selected_features.tolist()


def test_a_learned_subspace_of_a_tower(tower: HookedTextTower, run: Tensor, other: Tensor) -> None:
    """DAS over the whole stream has nothing to learn: the interchange gives the source's class."""
    name, read = "blocks.2.hook_resid_post", torch.stack([direction(), -direction()])
    single = copy.deepcopy(tower).float()
    logits = lambda tokens: single(tokens)[:, -1] @ read.T.float()
    base, source = torch.cat([run, other]), torch.cat([other, run])
    at = torch.tensor([6, 6])
    targets = logits(source).argmax(-1)
    learned = analysis.fit_das(
        single, name, base, source, targets, logits, rank=WIDTH, base_positions=at, source_positions=at, epochs=1
    )
    kept = analysis.collect_activations(single, name, source, logits, positions=at)
    change = analysis.SubspaceInterchange(learned.basis)
    found = analysis.intervened_logits(single, name, change, base, kept, logits, positions=at)
    assert (found - logits(source)).abs().max() <= 1e-4 * logits(source).abs().max()


@pytest.mark.parametrize("role", ["Q", "K", "V"])
def test_subspace_affinity_of_heads(tower: HookedTextTower, role: str) -> None:
    found = analysis.attention_head_subspace_affinity(tower, source_role="O", target_role=role)
    left = torch.linalg.qr(tower.W_O[0, 1].T)[0]
    right = torch.linalg.qr(getattr(tower, f"W_{role}")[2, 3])[0]
    scores = found.scores if hasattr(found, "scores") else found
    assert abs(float((left.T @ right).square().sum() - scores[0, 1, 2, 3])) <= 1e-9
    assert [layer for layer, _ in tower.blocks_with("attn")] == [0, 1, 2] and tower.blocks_with("ssm") == []


def test_the_jacobian_lens_insists_on_a_bridge(tower: HookedTextTower) -> None:
    with pytest.raises(TypeError, match="supports TransformerBridge only"):
        analysis.JacobianLens.fit(tower, ["a"], corpus="none")


# --- a notebook -----------------------------------------------------------------------------------------------------


def notebook(model: Any, clean: Tensor, corrupted: Tensor, metric: Callable[[Tensor], Tensor], read: Any) -> Any:
    """A notebook for HookedTransformer, behind its model line: nothing here knows of the package."""
    # cell: run with cache
    clean_logits, clean_cache = model.run_with_cache(clean)
    # cell: activation patching of the residual stream and of heads
    resid_pre = patching.get_act_patch_resid_pre(model, corrupted, clean_cache, metric)
    heads = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, clean_cache, metric)
    # cell: direct logit attribution
    stack, labels = clean_cache.stack_head_results(layer=-1, pos_slice=-1, incl_remainder=True, return_labels=True)
    per_head = clean_cache.logit_attrs(stack, tokens=read, pos_slice=-1)
    # cell: attention patterns
    patterns = {
        f"L{layer}H{head}": clean_cache["pattern", layer][0, head]
        for layer in range(model.cfg.n_layers)
        for head in range(model.cfg.n_heads)
    }
    strings = model.to_str_tokens(clean)
    # cell: edge attribution patching
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    config = analysis.EdgeAttributionConfig(granularity="edge")
    edges = analysis.attribution_patch(model, clean, corrupted, metric, config).edge_scores
    # cell: knock out the best head
    best = int(per_head[:-1, 0].argmax())

    def ablate(z: Tensor, hook: Any) -> Tensor:
        z[:, :, best % model.cfg.n_heads] = 0.0
        return z

    layer = best // model.cfg.n_heads
    ablated = model.run_with_hooks(clean, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", ablate)])
    return clean_logits, resid_pre, heads, per_head, labels, patterns, strings, edges, ablated


def test_a_notebook_of_which_only_the_model_line_changed() -> None:
    encoder = random_encoder(dtype=torch.float64)
    model: HookedRootModule = encoder.tower  # was: HookedTransformer.from_pretrained("gpt2-small")
    clean, corrupted = encoder.tokens(TEXT), encoder.tokens(OTHER)
    y, resid_pre, heads, per_head, labels, patterns, strings, edges, ablated = notebook(
        model, clean, corrupted, metric, direction()
    )
    from_clean, from_corrupted = float(metric(y)), float(metric(encoder.tower(corrupted)))
    assert resid_pre.shape == (LAYERS, 7) and heads.shape == (LAYERS, HEADS) and strings == WORDS
    # where the texts do not differ and nothing was read yet, patching changes nothing; at the read position of
    # the last layer's stream it does not give the clean run, since keys and values elsewhere are the corrupted ones
    assert (resid_pre[0, [0, 1, 2, 4, 5, 6]] - from_corrupted).abs().max() <= 2e-6
    assert abs(float(resid_pre[0, 3]) - from_clean) <= 2e-6
    constant = float((encoder.tower.ln_final.b @ encoder.tower.W_U + encoder.tower.b_U) @ direction())
    assert labels[-1] == "remainder" and abs(float(per_head.sum()) + constant - from_clean) <= 1e-10
    assert len(patterns) == LAYERS * HEADS and all(abs(float(p.sum()) - 7) <= 1e-12 for p in patterns.values())
    assert float((ablated - y).abs().max()) > 1e-3
    assert len(edges) == 7 * sum(
        3 * HEADS * (1 + (HEADS + 1) * layer) + 1 + (HEADS + 1) * layer + HEADS for layer in range(LAYERS)
    ) + 7 * (1 + (HEADS + 1) * LAYERS)
    assert max(map(abs, edges.values())) > 1e-3


def test_an_activation_cache_is_transformer_lens_own(tower: HookedTextTower, run: Tensor) -> None:
    assert isinstance(tower.run_with_cache(run)[1], ActivationCache)


# --- names that need a line each ------------------------------------------------------------------------------------


def test_a_backward_cache_needs_a_scalar(tower: HookedTextTower, run: Tensor) -> None:
    with pytest.raises(RuntimeError):
        tower.run_with_cache(run, incl_bwd=True)
    tower.reset_hooks()


def test_the_root_modules_own_methods(run: Tensor) -> None:
    tower = random_encoder(dtype=torch.float64).tower
    assert {name for name, point in tower.hook_dict.items()} <= set(tower.mod_dict)
    assert list(tower.hook_points()) == list(tower.hook_dict.values())
    cached, forward, _ = tower.get_caching_hooks(names_filter="blocks.1.hook_mlp_out")
    tower.run_with_hooks(run, fwd_hooks=forward)
    expected = tower.run_with_cache(run)[1]["mlp_out", 1]
    close(cached["blocks.1.hook_mlp_out"], expected)
    kept = tower.add_caching_hooks(names_filter="blocks.1.hook_mlp_out")
    assert tower.hooked == ("blocks.1.hook_mlp_out",)
    tower(run)
    close(kept["blocks.1.hook_mlp_out"], expected)
    tower.remove_all_hook_fns()
    tower.clear_contexts()
    assert tower.hooked == ()
    tower.check_hooks_to_add(tower.hook_embed, "hook_embed", lambda value, hook: value)


def test_detection_patterns_of_tokens(run: Tensor) -> None:
    """Rows read the token behind an earlier one that is the same, or the same token itself."""
    tokens = torch.tensor([[5, 8, 5, 8]])
    alike = head_detector.compute_head_attention_similarity_score
    previous = head_detector.get_previous_token_head_detection_pattern(tokens)
    assert alike(previous, previous, exclude_bos=False, exclude_current_token=False, error_measure="mul") == 1
    duplicate = head_detector.get_duplicate_token_head_detection_pattern(tokens)
    assert duplicate.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    induction = head_detector.get_induction_head_detection_pattern(tokens)
    assert induction.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


def test_factored_matrices(tower: HookedTextTower) -> None:
    OV = tower.OV
    A, B = OV.A, OV.B
    assert (OV.shape, OV.ndim, OV.ldim, OV.mdim, OV.rdim) == ((LAYERS, HEADS, WIDTH, WIDTH), 4, WIDTH, D_HEAD, WIDTH)
    assert OV.has_leading_dims
    close(OV.T.AB, (A @ B).mT)
    close(OV.BA, B @ A)
    close(OV.U @ torch.diag_embed(OV.S) @ OV.V.mT, A @ B)
    assert all(map(torch.equal, OV.svd(), (OV.U, OV.S, OV.V)))
    with pytest.warns(DeprecationWarning, match="has always returned V"):
        assert torch.equal(OV.Vh, OV.V)
    close(OV.norm(), torch.linalg.matrix_norm(A @ B))
    close(OV.collapse_l().mT @ OV.collapse_l(), (A @ B).mT @ (A @ B))
    close(OV.collapse_r() @ OV.collapse_r().mT, (A @ B) @ (A @ B).mT)
    close(OV.make_even().AB, A @ B)
    close(OV.unsqueeze(0).AB, (A @ B)[None])
    close(OV.eigenvalues.sum(-1).real, torch.einsum("lhii->lh", A @ B))
    assert OV.get_corner(2).shape == (2, 2, 2, 2)
    assert len(OV.pair) == 2
