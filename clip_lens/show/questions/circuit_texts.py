"""What a report on circuits says below its figures, for a reader who has not read the papers; and its methods."""

CIRCUIT_TEXT = (
    "A text tower is a network: the embedding, every attention head and every MLP write into a stream that all later "
    "parts read. An edge is the direct way from one writer to one reader; a head reads three times, for its queries "
    "(q), keys (k) and values (v). A circuit is a choice of edges. It is run by cutting the others: along a cut edge "
    "the reader gets what the other text of the pair sends instead of what this text sends. If the circuit is what "
    "makes the model prefer the caption, d stays as it is; with every edge cut, nothing of it stays."
)
NETWORK = (
    "The edges of the circuit, blocks from left to right. An edge is as wide as its mean score is large: blue "
    "supports the model's own d, red works against it, grey has no score. Hovering tells the numbers; a click in the "
    "legend hides a kind of edges."
)
STRONGEST = (
    "The largest mean scores of the circuit's edges, in logits of d, on the pairs on which the circuit was found, "
    "with 95 % bootstrap intervals over pairs. What is to the right of 0 supports d."
)
SEARCHED = (
    "The largest changes of the mean metric when an edge of the circuit is taken away as well, given what the search "
    "had taken away before it. What is to the right of 0 supports d."
)
CURVES = {
    "absolute": "How much of d is left (f, upwards) when only a share of the edges is kept (to the right, a "
    "logarithmic axis): those of the largest scores by size. 1 is what the whole model does, 0 what is left with no "
    "edge; the band is a 95 % bootstrap interval over pairs. The random line is the mean of five random choices of "
    "that many edges, its band goes from the smallest to the largest of them. The closer to 1, the better: the area "
    "between a line and 1 is CMD.",
    "signed": "The same, with the edges that support d the most: none that works against d comes before those that "
    "support it, so that f can rise above 1. The higher the better: the area below a line is CPR.",
}
JUDGED = (
    "f of the circuit with a 95 % bootstrap interval, and the mean f of five random circuits of its size, on the "
    "held-out pairs. Edges are counted after pruning; of random ones few lie on a path. verdict.csv has every circuit "
    "by itself."
)
AREAS = (
    "CPR is the area below f over the kept share of edges, from .001 to 1 on a linear axis: larger is better. CMD is "
    "the area between f and 1: smaller is better, 0 is a circuit that does at every size just what the model does."
)
AGREES = (
    "A point is an edge: to the right what patching it alone moves on the held-out pairs, upwards the method's score "
    "on the pairs of the other split, both means in logits of d. On the thin line both are equal. Pearson's r is 1 "
    "when the points lie on some straight line upwards."
)
STABLE = (
    "The pairs were drawn anew with replacement and the circuit chosen again. jaccard: of the edges in either of the "
    "two circuits, the share in both, mean over resamples and 95 % interval; certain: edges that every resample "
    "chose. Nothing is run again for it."
)
COMPARED = (
    "The share of edges in both of two circuits among those in either, for circuits of towers of one shape; by_chance "
    "is how many edges two circuits of these sizes drawn at random have in common on average."
)
OVERLAP = "Each cell is the Jaccard overlap of two circuits, edges in both over edges in either: 1 is the same circuit."
SUMMARY = (
    "A row per run and side. f, CPR, CMD on held-out pairs, beside the mean of random circuits; r: Pearson's "
    "correlation of the scores with exact ones of the held-out pairs, where these were computed; jaccard: the "
    "stability of the circuit."
)

EXACT = (
    "Exact scores",
    "Every edge is patched by itself: its receiver reads what the sender of the other text gives, everything behind "
    "computes on. The score of an edge is the mean over pairs of the part of d that this moves.",
)
EAP = (
    "EAP, EAP-IG",
    "Attribution patching estimates what patching an edge would move by the difference that its sender would make "
    "times the gradient of the metric at its receiver (Nanda 2023; Syed et al. 2310.10348). EAP-IG takes the mean "
    "gradient over inputs on the line from the other text's embedding to the run's (Hanna et al. 2024). Both are "
    "estimates: r says how good.",
)
ACDC = (
    "ACDC",
    "From the output backwards each edge is taken away for good if that changes the mean metric by less than a "
    "threshold (Conmy et al. 2023). The result is one circuit, without an order of edges by which smaller and larger "
    "ones could be chosen: it has one point on the curves, no CPR and no CMD.",
)
OF_METHOD = {"exact": EXACT, "eap": EAP, "eap-ig": EAP, "acdc": ACDC}
METHODS = (
    (
        "Scores and selection",
        "An edge's score is the mean over pairs of its effect, signed so that positive supports the model's own d. "
        "The circuit is the edges with the largest scores by size; those on no path from the embedding to the output "
        "are taken out after that, since they change nothing.",
    ),
    (
        "Two splits",
        "Circuits are found on one part of the pairs and judged on the other. Pairs of one image are in the same part.",
    ),
    (
        "Faithfulness",
        "f = (m(circuit) - m(empty)) / (m(full) - m(empty)), a ratio of means over pairs, m the metric, every edge "
        "outside of the circuit carrying the other text's value (Mueller et al. 2025, MIB, 2504.13151). Per side of "
        "the negation, and pooled over both.",
    ),
    (
        "CPR and CMD",
        "The integral of f, and of |1 - f|, over the kept share k in .001, .002, .005, .01, .02, .05, .1, .2, .5, 1; "
        "int(k N) of N edges, by signed score for CPR and by size for CMD, trapezoids on a linear axis. Half of the "
        "edges weigh as much as the step from .5 to 1: the areas say most about large circuits, the curves about "
        "small ones.",
    ),
    (
        "Intervals",
        "95 % percentile bootstrap intervals over whole pairs, 1,000 resamples (stability: 200), seeded. Nothing is "
        "corrected for the number of comparisons.",
    ),
)
