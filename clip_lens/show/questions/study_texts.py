"""What the negation study says below its figures, for a reader who has not read the paper; and its methods."""

TRACING = (
    "The text without negation is run; at one layer and one slot its residual stream is replaced by that of the text "
    "with the negation, and the rest of the tower computes on. The number is the share of d that this moves: the "
    "paper's causal tracing effect. Patching a slot whole moves all its tokens together; single tokens are patched "
    "one by one and averaged."
)
DIFFERENCES = (
    "Bars count pairs by their logit difference d = S(caption) - S(foil). To the right of 0 the model prefers the "
    "true text. d below -1 is called incorrect, from -1 to 1 ambiguous, from 1 on correct."
)
LOCALISATION = (
    "The standard deviation (ddof 0) of the slots' shares of d, from the negator to the end of text, single tokens "
    "averaged by slot: high where one slot has everything, low where it is spread. In brackets the number of pairs; "
    "segments with fewer than ten pairs on a side, or with a mean d below 1 logit (of which no share can be told), are "
    "in the table only."
)
SELECTIVITY = (
    "How much more a head attends to the negator, in the text with the negation, than to the word in its place in "
    "the text without: the largest difference over the later positions, averaged over pairs. 0: no more; 1: all of "
    "its attention."
)
BY_QUERY = (
    "The same difference at one slot that looks back (rows) for each head (columns): which words read the negator. A "
    "slot of several tokens counts with the largest."
)
BLOCKS = "The mean over the heads of a block of the numbers above."
CORRELATED = (
    "Pearson's r over pairs between a head's selectivity and d. Blue: the more a head looks at the negator, the "
    "better the model tells the texts apart; red: the worse."
)
DIRECT_TEXT = (
    "What a part writes at the end of text, read through the final LayerNorm and the projection with their scales "
    "frozen, is its direct contribution; all contributions sum to d exactly. It leaves out what a part does through "
    "later parts."
)
DIRECT = (
    "The part of d, in logits, that each component writes by itself into the end of text, with 95 % bootstrap "
    "intervals over pairs. Blue parts speak for the caption, red ones for the foil; with those not shown they sum to "
    "d."
)
DIRECT_HEADS = "The same for every head: rows are heads, columns blocks."
LENS = {
    "frozen": "d as it would be if nothing were written from this layer on, with the final LayerNorm's scale and the "
    "embedding's norm held at their final values: each step is what a layer writes.",
    "recomputed": "d if the stream before this layer were read as if it were the last, both scales computed from it.",
}
LABELS = (
    "For the heads of the largest direct effects: the images and texts of these pairs that the first principal "
    "component of what the head writes points to and from, in the joint space. The column share is the part of its "
    "variance on that line: labels of a small share say little."
)
HEADS_TEXT = (
    "Here each head's output, at every position, is taken from the text with the negation, and everything behind it "
    "computes on. Heads that share the work show less than they do: effects of single heads need not add up."
)
CORRELATION = (
    "Pearson's r between a feature of the pairs and d, with its 95 % interval (Fisher). A confound is a feature of "
    "the data that goes along with the score, whatever the model does with negation."
)
BY_SIZE = (
    "Pairwise accuracy of the pairs whose subject covers more than this share of the image, with Wilson's 95 % "
    "interval. Where the negation is in the caption the subject is not in the picture, and its size not defined."
)
REGRESSION = (
    "Ordinary least squares of d on all features at once, in logits per unit of the feature, with HC3 standard "
    "errors; the note says why a feature has no coefficient."
)
READ = (
    "Accuracy of a logistic regression on the stream at the end of text, on held-out pairs: is this text negated? If "
    "it does as well on shuffled words, it reads that the negator is there, not what is negated. Random labels show "
    "what memory alone gives."
)
USED = (
    "The share of d that moves when the difference of the class means is added to the text without negation, or "
    "removed from the text with it, at the end of text of one layer; beside it the largest share of five random "
    "directions."
)

METHODS = (
    (
        "The logit difference",
        "S(text, image) is the scale times the cosine of the two embeddings; d = S(caption) - S(foil), and the model "
        "is right when d > 0. Segments, in logits: incorrect d < -1, ambiguous -1 <= d < 1, correct d >= 1.",
    ),
    (
        "Sides",
        "Negation in the caption and negation in the foil are never averaged before the effects are signed: sigma "
        "times an effect is the part of d that it moves. Shares are ratios of means over pairs, per side.",
    ),
    (
        "Causal tracing",
        "The text without negation is the run, the residual stream of the text with it the source, one layer and "
        "slot at a time; layer 0 is the embedding, layer l the stream after l blocks (Quantmeyer et al. 2024; Meng et "
        "al. 2022). Tokens are matched by a minimum edit-distance alignment; a token without counterpart has no "
        "value.",
    ),
    (
        "Selectivity",
        "The maximum over later positions p of A_neg[p, q] - A_aff[p, q], q the negator's position, A_neg the "
        "attention pattern of the text with the negation, A_aff of the text without (Quantmeyer et al. 2024).",
    ),
    (
        "Direct logit attribution",
        "C(a) = <W^T (gamma (a - mean a) / std), w> / norm for what a component writes; std and norm are the text's "
        "own, w is the scale times the image's embedding. All components, biases and a constant sum to S.",
    ),
    (
        "Intervals",
        "95 %: percentile bootstrap over pairs with 1,000 resamples for means and shares, Wilson for accuracies, "
        "Fisher for correlations, HC3 for the regression. Nothing is corrected for the number of comparisons.",
    ),
    (
        "Probe",
        "Logistic regression (C = 1) on standardised coordinates; pairs that share a text are held out together; the "
        "direction that is added or removed is the difference of the class means on the training half.",
    ),
)
