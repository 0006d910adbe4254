"""The negation study by plain hooks on open_clip's own modules, one text, layer and position at a time.

It shares no code with the package: what causal tracing, selectivity and a comparison with published results must equal.
"""

import numpy as np
import open_clip
import torch

POSITIONS = ["sot", "there", "be", "negator", "subject", "subject_rest", "stop", "eot"]
FIRST, LAST = 5, -2  # further subject tokens stand between the first one and the full stop


def slow_tracing(clip, texts, image):
    """d* at each (layer, position) of the affirmative text, and d; `texts` are (affirmative, negated)."""
    affirmative, negated = open_clip.tokenize(texts)
    modules = [clip.transformer.resblocks[0], *clip.transformer.resblocks]

    def logit(tokens):
        return clip.logit_scale.exp() * (clip.encode_text(tokens[None], normalize=True)[0] @ image)

    stream = []

    def keep_input(module, args):
        stream.append(args[0].clone())

    def keep_output(module, args, output):
        stream.append(output.clone())

    handles = [modules[0].register_forward_pre_hook(keep_input)]
    handles += [module.register_forward_hook(keep_output) for module in modules[1:]]
    target = logit(negated)
    for handle in handles:
        handle.remove()
    plain = logit(affirmative)

    moved = []
    for layer, module in enumerate(modules):
        for position in range(int(affirmative.argmax()) + 1):

            def patch(module, args, output=None, layer=layer, position=position):
                value = (args[0] if output is None else output).clone()
                value[0, position] = stream[layer][0, position]
                return value if output is not None else (value, *args[1:])

            register = module.register_forward_pre_hook if layer == 0 else module.register_forward_hook
            handle = register(patch)
            moved.append(logit(affirmative) - plain)
            handle.remove()
    return torch.stack(moved).reshape(len(modules), -1), target - plain


@torch.no_grad()
def patterns(clip, text):
    """Every head's weights, [layer, head, query, key], and the end of text, from open_clip's blocks."""
    tokens = open_clip.tokenize([text])
    inputs, found = [], []
    handles = [
        block.ln_1.register_forward_hook(lambda module, args, output: inputs.append(output))
        for block in clip.transformer.resblocks
    ]
    clip.encode_text(tokens)
    for handle in handles:
        handle.remove()
    for block, x in zip(clip.transformer.resblocks, inputs, strict=True):
        weights = block.attn(
            x, x, x, need_weights=True, average_attn_weights=False, attn_mask=clip.attn_mask.to(x.dtype)
        )[1]
        found.append(weights[0])
    return torch.stack(found), int(tokens.argmax())


@torch.no_grad()
def study(clip, pairs, images, block):
    """(pairs, arrays) as the study has published them: by key what the model says, and the means."""
    found = {}
    for key, caption, foil, side, image in zip(*(getattr(pairs, name) for name in COLUMNS), strict=True):
        u, v = (clip.encode_text(open_clip.tokenize([text]), normalize=True)[0] for text in (caption, foil))
        scores = [float(clip.logit_scale.exp() * (text @ images[image])) for text in (u, v)]
        d = scores[0] - scores[1]
        found[key] = {
            **{"caption": caption, "foil": foil, "negation": side, "image_file": image, "score": d},
            **{"logit_caption": scores[0], "logit_foil": scores[1], "similarity_caption_foil": float(u @ v)},
            "segment": "incorrect" if d < -1 else "ambiguous" if d < 1 else "correct",
            "positions": int(open_clip.tokenize([caption])[0].argmax()) + 1,
            "subject_area": len(caption) / 100 if side == "foil" else None,
        }
    texts = {
        key: [item["caption"], item["foil"]][:: 1 if item["negation"] == "foil" else -1] for key, item in found.items()
    }
    arrays = {"positions": POSITIONS, "causal_tracing": {}, "selectivity": {}, "selectivity_correlation": {}}
    for side, segment in (("caption", "correct"), ("foil", "correct"), ("foil", "incorrect")):
        chosen = [key for key, item in found.items() if (item["negation"], item["segment"]) == (side, segment)]
        arrays["causal_tracing"][f"{side}, {segment}"] = traced(
            clip, [(texts[key], images[found[key]["image_file"]]) for key in chosen]
        )
    by_position = arrays[f"attention_by_position_block_{block}"] = {}
    for side in ("caption", "foil"):
        chosen = [key for key, item in found.items() if item["negation"] == side]
        extra = [differences(clip, *texts[key]) for key in chosen]
        d = np.array([found[key]["score"] for key in chosen])
        largest = np.stack([each[:, :, 4:].max(-1) for each in extra])
        arrays["selectivity"][side] = largest.mean(0).T.tolist()
        r = [
            [np.corrcoef(largest[:, layer, head], d)[0, 1] for layer in range(largest.shape[1])]
            for head in range(largest.shape[2])
        ]
        arrays["selectivity_correlation"][side] = r
        by_position[side] = np.mean([categories(each[block], np.max)[0] for each in extra], 0).tolist()
    return found, arrays


COLUMNS = ("key", "caption", "foil", "side", "image")


def traced(clip, chosen):
    """8 positions x layers: the mean of d*/d over pairs, further subject tokens weighing by their number."""
    total, weights = 0.0, 0.0
    for texts, image in chosen:
        moved, d = slow_tracing(clip, texts, image)
        values, further = categories((moved / d).double().numpy(), np.mean)
        weight = np.where(np.arange(8) == FIRST, further, 1.0)
        total, weights = total + weight * values, weights + weight
    return (total / weights).T.tolist()


def differences(clip, affirmative, negated):
    """[layer, head, query]: how much more is attended to the negator's place in the text with the negation."""
    (without, _), (having, end) = (patterns(clip, text) for text in (affirmative, negated))
    return (having - without)[:, :, : end + 1, 3].double().numpy()


def categories(values, of):
    """[..., position] as [..., category], further subject tokens as one (0 if there is none), and how many they are."""
    further = values[..., FIRST:LAST]
    one = of(further, -1) if further.shape[-1] else np.zeros(values.shape[:-1])
    return np.concatenate([values[..., :FIRST], one[..., None], values[..., LAST:]], -1), further.shape[-1]
