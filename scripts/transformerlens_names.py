"""Writes docs/transformerlens.md: of every public name of TransformerLens' models and tools, whether it works here.

    python scripts/transformerlens_names.py

A name works when a test says so. The tests of this page check that no name is missing and that every test exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import nn
from transformer_lens import ActivationCache, FactoredMatrix, SVDInterpreter, TransformerBridge, head_detector, patching
from transformer_lens.tools import analysis

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "transformerlens.md"


@dataclass(frozen=True)
class Verdict:
    """What is said of some names. Those that work or differ have a test; `note` says how they differ, or why not."""

    names: str
    word: str
    note: str = ""
    test: str = ""

    def __iter__(self) -> Iterator[str]:
        return iter(self.names.split())


def works(names: str, test: str, note: str = "") -> Verdict:
    """Names that give what TransformerLens gives."""
    return Verdict(names, "works", note, test)


def differs(names: str, test: str, note: str) -> Verdict:
    """Names that are here and do something else, or need something else."""
    return Verdict(names, "differs", note, test)


def absent(names: str, note: str) -> Verdict:
    """Names that do not apply to a text tower, or are not here."""
    return Verdict(names, "not applicable", note)


MODEL = (
    works("forward", "test_every_hook_has_the_value_and_shape_of_a_run_by_hand"),
    differs("return_type", "test_clear_errors", "the output is an embedding at every position; 'loss' is refused"),
    works("start_at_layer stop_at_layer", "test_stopping_and_starting_at_a_layer_is_the_whole_run"),
    works("run_with_hooks hooks", "test_hooks_are_gone_after_a_run_and_after_an_exception"),
    works(
        "bwd_hooks", "test_gradients_need_nothing_but_backward_hooks", "weights stay frozen, the embedding is a leaf"
    ),
    works("add_hook add_perma_hook reset_hooks", "test_hooks_of_every_kind_are_named_while_they_are_on"),
    works("hook_dict", "test_every_hook_has_the_value_and_shape_of_a_run_by_hand"),
    works("run_with_cache", "test_costly_hooks_are_cached_only_by_name", "an unknown name in `names_filter` warns"),
    differs(
        "incl_bwd",
        "test_a_backward_cache_needs_a_scalar",
        "an embedding is no scalar to start from: give `hooks(bwd_hooks=...)` and a metric's `backward()`",
    ),
    works(
        "set_use_attn_result set_use_split_qkv_input set_use_hook_mlp_in",
        "test_a_flag_says_what_a_cache_of_everything_holds",
        "the hooks need no flag; the flag says what a cache of everything holds",
    ),
    works(
        "hook_points mod_dict check_hooks_to_add remove_all_hook_fns clear_contexts get_caching_hooks",
        "test_the_root_modules_own_methods",
    ),
    works("add_caching_hooks", "test_the_root_modules_own_methods"),
    absent("cache_all cache_some", "TransformerLens' own predecessors of `add_caching_hooks`, which works"),
    absent(
        "set_use_attn_in", "no `hook_attn_in`: `hook_q_input`, `hook_k_input` and `hook_v_input` are its three parts"
    ),
    differs(
        "embed",
        "test_stopping_and_starting_at_a_layer_is_the_whole_run",
        "token plus position embedding; `W_E[tokens]` is the token's alone",
    ),
    works("unembed", "test_parameters_by_name"),
    differs(
        "W_U b_U",
        "test_every_hook_has_the_value_and_shape_of_a_run_by_hand",
        "the text projection, d_model x d_embed, and its bias",
    ),
    works("W_E W_pos W_Q W_K W_V W_O W_in W_out", "test_weights_are_views_of_the_packed_ones"),
    works("b_Q b_K b_V b_O b_in b_out", "test_weights_are_views_of_the_packed_ones"),
    works(
        "attn.W_O=",
        "test_a_packed_weight_can_be_assigned_to",
        "likewise every weight of a block's attention and MLP; `.data = x` on a view is lost, as PyTorch does it",
    ),
    works("QK OV", "test_factored_circuits"),
    works("W_E_pos all_head_labels tl_parameters tl_named_parameters", "test_parameters_by_name"),
    works("blocks_with", "test_subspace_affinity_of_heads"),
    works("all_composition_scores", "test_composition_scores"),
    works("accumulated_bias", "test_accumulated_bias"),
    works("cfg", "test_moving_and_casting_keeps_the_config", "`d_vocab` are tokens, `d_vocab_out` what comes out"),
    works("to half bfloat16 double", "test_the_config_knows_however_the_tower_was_cast"),
    differs(
        "tokens_to_residual_directions",
        "test_a_direction_reads_the_normalised_residual_stream",
        "takes directions of the joint space; tokens are refused",
    ),
    differs(
        "to_tokens",
        "test_what_the_tokenizer_does_not_do_is_refused",
        "pads to the context unless `padding=False`; start of text, side of padding and truncation are the "
        "tokenizer's, and another wish is refused",
    ),
    differs("to_str_tokens", "test_str_tokens_of_a_text_of_a_list_and_of_rows", 'padded as `to_tokens`, with "<pad>"'),
    differs("to_string", "test_to_string", "without the padding"),
    works("to_single_token get_token_position", "test_get_token_position"),
    works("to_single_str_token", "test_an_exclamation_mark_is_no_padding"),
    works("tokenizer", "test_what_the_tokenizer_does_is_taken"),
    works(
        "process_weights_ fold_layer_norm center_writing_weights fold_value_biases",
        "test_processed_weights_give_open_clips_embeddings",
        "in place, without a state dict; `fold_ln` folds the last norm into `W_U` and `b_U`",
    ),
    absent("process_weights", "here `process_weights_`, HookedTransformer's name for it"),
    differs(
        "center_unembed refactor_factored_attn_matrices",
        "test_processing_that_would_change_embeddings_is_refused",
        "refused: an embedding without its components' mean is another embedding; `QK`, `OV` give the products",
    ),
    absent("generate generate_stream hf_generate diffusion_generate", "CLIP's text tower generates nothing"),
    absent("loss_fn predict_next_sentence", "there is no loss over tokens"),
    absent(
        "from_pretrained from_pretrained_no_processing boot_transformers boot_native boot_tl_legacy "
        "list_supported_models check_model_support",
        "`clip_lens.load` loads, and says what it does not support",
    ),
    absent(
        "enable_compatibility_mode original_model hook_aliases clear_hook_registry close get_params get_hook_point "
        "list_hooks block_hooks",
        "of a bridge's wrapping: the tower is the model itself; `hook_dict` lists its hooks",
    ),
    absent(
        "QK_for_attn_layers OV_for_attn_layers stack_params_for composition_layer_indices attn_head_labels "
        "layer_types block_submodules",
        "of hybrid models: every block here has attention, so that `QK`, `OV`, `W_Q` and the like are complete",
    ),
    absent("W_gate", "no MLP of a CLIP text tower that is supported has a gate"),
    absent("input_to_embed", "`tower.embed(tokens)` or `stop_at_layer=0` gives the stream that enters block 0"),
    absent("encoder_output prepare_multimodal_inputs to_sentence_pair_tokens", "of models with two inputs"),
    absent("init_weights", "the tower is loaded, not trained"),
    absent("n_params_total", "`sum(weight.numel() for weight in tower.parameters())`"),
    absent("mps", "`tower.to('mps')`"),
)

CACHE = (
    works(
        "keys values items apply_slice_to_batch_dim remove_batch_dim to toggle_autodiff stack_activation",
        "test_slices_and_copies_of_a_cache",
    ),
    works("accumulated_resid", "test_accumulated_resid"),
    works("decompose_resid", "test_a_cache_of_everything_has_the_scales_that_norms_are_applied_with"),
    works("get_full_resid_decomposition", "test_everything_written_sums_to_the_final_residual_stream"),
    works("stack_head_results", "test_head_results_are_the_hooks"),
    works("compute_head_results", "test_attributions_sum_to_the_score_less_the_constant"),
    works("apply_ln_to_stack", "test_apply_ln_to_stack_is_the_final_norm_without_its_weights"),
    works("get_neuron_results stack_neuron_results", "test_neuron_results"),
    differs(
        "logit_attrs",
        "test_attributions_sum_to_the_score_less_the_constant",
        "`tokens=` takes directions of the joint space",
    ),
    differs(
        "logit_lens",
        "test_the_logit_lens_reads_the_stream_by_norm_and_projection",
        'a "logit" is a component of the embedding; leave out `targets` given as text, which are tokens, and '
        "probabilities, which mean nothing here",
    ),
    absent("ssm_layers compute_ssm_effective_attention compute_ssm_state", "no CLIP text tower has a state space"),
)

FACTORED = (
    works("A B AB", "test_factored_circuits"),
    works("BA T U S V svd eigenvalues norm pair unsqueeze make_even collapse_l collapse_r get_corner ndim shape "
          "ldim mdim rdim has_leading_dims", "test_factored_matrices"),
    works("Vh", "test_factored_matrices", "deprecated by TransformerLens: it is `V`"),
)  # fmt: skip

PATCHING = (
    works("generic_activation_patch", "test_a_patch_of_ones_own"),
    works(
        "get_act_patch_resid_pre get_act_patch_resid_mid get_act_patch_attn_out get_act_patch_mlp_out "
        "get_act_patch_attn_head_out_all_pos get_act_patch_attn_head_q_all_pos get_act_patch_attn_head_k_all_pos "
        "get_act_patch_attn_head_v_all_pos get_act_patch_attn_head_out_by_pos get_act_patch_attn_head_q_by_pos "
        "get_act_patch_attn_head_k_by_pos get_act_patch_attn_head_v_by_pos get_act_patch_attn_head_pattern_all_pos "
        "get_act_patch_attn_head_pattern_by_pos get_act_patch_attn_head_pattern_dest_src_pos",
        "test_transformer_lens_patching_agrees_with_a_loop",
    ),
    works(
        "get_act_patch_attn_head_all_pos_every get_act_patch_attn_head_by_pos_every",
        "test_every_head_activation_is_its_own_sweep",
    ),
    works("get_act_patch_block_every", "test_every_block_is_its_own_sweep"),
    works(
        "get_act_patch_direct_path get_act_patch_direct_path_all_sources",
        "test_direct_path_patching_is_the_receivers_input_written_out",
    ),
)

TOOLS = (
    works("attribution_patch EdgeAttributionConfig Node", "test_node_attribution_is_the_gradient_times_the_change",
          "of edges too, equal to `clip_lens.gradient_effects`"),
    works("faithfulness FaithfulnessConfig", "test_faithfulness_of_everything_and_of_nothing"),
    works("get_act_patch_direct_path get_act_patch_direct_path_all_sources",
          "test_direct_path_patching_is_the_receivers_input_written_out"),
    differs("direct_logit_attribution", "test_direct_logit_attribution_of_a_direction",
            "give a direction of the joint space as `answer_tokens`"),
    differs("logit_lens logit_readout", "test_the_logit_lens_reads_the_stream_by_norm_and_projection",
            "as the cache's `logit_lens`"),
    differs("SVDInterpreter get_singular_vectors", "test_singular_vectors_read_by_the_projection",
            "set `interpreter.cfg = copy.copy(tower.cfg); interpreter.cfg.d_vocab = tower.cfg.d_vocab_out`: it takes "
            "what comes out to be the vocabulary"),
    differs("detect_head", "test_heads_are_detected_in_tokens",
            "give `tower.to_tokens(text, padding=False)` as `seq`: of a text it makes a whole context, which it "
            "refuses; its patterns are those of causal towers"),
    works("compute_head_attention_similarity_score get_previous_token_head_detection_pattern "
          "get_duplicate_token_head_detection_pattern get_induction_head_detection_pattern",
          "test_detection_patterns_of_tokens"),
    works("collect_activations run_with_intervention intervened_logits SubspaceInterchange",
          "test_subspaces_and_probes", "`task_logits` are yours: scores by directions, say"),
    works("fit_sparse_probe", "test_subspaces_and_probes"),
    works("fit_das", "test_a_learned_subspace_of_a_tower"),
    works("attention_head_subspace_affinity", "test_subspace_affinity_of_heads"),
    absent("reinitialized random_init_bridge", "a tower's weights can't be drawn anew: `reset_parameters` is not here; "
           "load an untrained module of your own"),
    absent("JacobianLens JSpaceDecomposition", "insists on an instance of TransformerBridge and on a vocabulary that "
           "comes out (`test_the_jacobian_lens_insists_on_a_bridge`)"),
    absent("LearnedSubspace NormMatchedPlacebo SparseProbeConvergenceError SubspaceBasis arbitrary_targets "
           "get_sparse_decomposition "
           "mean_difference_basis neuron_basis orthonormal_subspace probe_basis projection_kernel random_basis "
           "random_neuron_basis random_projection_kernel_moments solve_coordinate_patch sweep_sparse_probe",
           "never meet a model: they take tensors, and work on those of any"),
    absent("get_supported_heads", "prints the names of head patterns, and meets no model"),
    absent("evals", "language models' losses on texts, by `return_type='loss'`"),
)  # fmt: skip

SECTIONS = {
    "The model": MODEL,
    "ActivationCache": CACHE,
    "FactoredMatrix": FACTORED,
    "transformer_lens.patching": PATCHING,
    "Tools": TOOLS,
}

HEAD = """# TransformerLens' names, and what they do here

`encoder.tower` is a `HookedRootModule`; code for HookedTransformer runs on it. This page says of every public name of
HookedTransformer and TransformerBridge, of the cache and of the tools (TransformerLens 4.3) what becomes of it:
*works*, *differs* (how), *not applicable* (why). What works or differs has a test in
`tests/model/test_transformerlens.py` or `tests/model/test_tower.py`. The page is written by
`scripts/transformerlens_names.py`.

```python
import clip_lens
from transformer_lens import patching
from transformer_lens.tools import analysis

encoder = clip_lens.load()
model = encoder.tower  # was: HookedTransformer.from_pretrained("gpt2-small")
clean, corrupted = encoder.tokens("There are no circles."), encoder.tokens("There are some circles.")
direction = encoder("There are circles.")[0]


def metric(y):
    return (y[:, -1] @ direction).sum()


_, cache = model.run_with_cache(clean)
streams = patching.get_act_patch_resid_pre(model, corrupted, cache, metric)
config = analysis.EdgeAttributionConfig(granularity="edge")
edges = analysis.attribution_patch(model, clean, corrupted, metric, config).edge_scores
heads = cache.logit_attrs(cache.stack_head_results(pos_slice=-1), direction, pos_slice=-1)
```
"""


def _public(owner: type | ModuleType) -> set[str]:
    return {name for name in dir(owner) if not name.startswith("_")}


def expected() -> dict[str, set[str]]:
    """The public names that a section must have, read from the TransformerLens that is installed."""
    functions = {
        module: {name for name, value in inspect.getmembers(module, inspect.isfunction) if value.__module__ == path}
        for module, path in ((patching, "transformer_lens.patching"), (head_detector, "transformer_lens.head_detector"))
    }
    sweeps = {
        name for name in functions[patching] | _public(patching) if name.startswith(("get_act_patch_", "generic_"))
    }
    tools = set(analysis.__all__) | functions[head_detector] | (_public(SVDInterpreter) - {"cfg", "model", "params"})
    return {
        "The model": _public(TransformerBridge) - _public(nn.Module),
        "ActivationCache": _public(ActivationCache),
        "FactoredMatrix": _public(FactoredMatrix),
        "transformer_lens.patching": sweeps,
        "Tools": tools,
    }


def page() -> str:
    """The page as text."""
    lines = [HEAD]
    for title, verdicts in SECTIONS.items():
        lines += [f"## {title}\n", "| name | verdict | how, or why not | test |", "|---|---|---|---|"]
        for verdict in verdicts:
            names = ", ".join(f"`{name}`" for name in verdict)
            test = f"`{verdict.test}`" if verdict.test else ""
            lines.append(f"| {names} | {verdict.word} | {verdict.note} | {test} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
