"""Circuits as sets of edges: against Python's sets, networkx's reachability, and what a person would read and break."""

import json
from dataclasses import replace
from itertools import combinations, product

import networkx
import pytest
import torch

from clip_lens.core.record import Method, MetricRecord, Record, SourceRecord
from clip_lens.methods.circuits.circuit import Circuit, Graph, Selection, random_circuit
from clip_lens.model.site import Edge, Site, precedes, readers, writers

LAYERS, HEADS = 3, 2


def drawn(seed, density=0.3, scores=True, **said):
    generator = torch.Generator().manual_seed(seed)
    edges = Graph.of(LAYERS, HEADS).edges
    keep = edges & (torch.rand(edges.shape, generator=generator) < density)
    numbers = torch.randn(edges.shape, generator=generator, dtype=torch.float64) if scores else None
    record = Record(Method("toy", f"drawn {seed}"), **said) if said else None
    return Circuit(keep, LAYERS, HEADS, numbers, f"drawn {seed}", record)


def lines(circuit):
    return {str(edge) for edge in circuit.edges()}


@pytest.mark.parametrize(("n_layers", "n_heads"), [(1, 1), (3, 2), (6, 4)])
def test_the_edges_are_those_from_senders_to_later_receivers(n_layers, n_heads):
    graph, ends = Graph.of(n_layers, n_heads), product(readers(n_layers, n_heads), writers(n_layers, n_heads))
    full = Circuit(graph.edges.clone(), n_layers, n_heads)
    assert full.edges() == [Edge(sender, receiver) for receiver, sender in ends if precedes(sender, receiver)]
    assert len(full.removed()) == 0 and len(full) == len(full.edges())


def test_vit_b_32_has_15355_edges():
    assert int(Graph.of(12, 8).edges.sum()) == 15_355


@pytest.mark.parametrize("seed", range(12))
def test_pruned_is_what_lies_on_a_path(seed):
    circuit = drawn(seed, density=(0.04, 0.1, 0.3)[seed % 3])
    graph = networkx.DiGraph([(str(e.sender), str(owner(e.receiver))) for e in circuit.edges()])
    graph.add_nodes_from(["embed", "out"])
    reached = networkx.descendants(graph, "embed") | {"embed"}
    reaching = networkx.ancestors(graph, "out") | {"out"}
    kept = {str(e) for e in circuit.edges() if str(e.sender) in reached and str(owner(e.receiver)) in reaching}
    assert lines(circuit.pruned()) == kept
    assert lines(circuit.pruned().pruned()) == kept


def owner(receiver):
    return Site("head", receiver.layer, receiver.unit) if receiver.kind in ("q", "k", "v") else receiver


def test_nothing_of_a_circuit_or_a_graph_is_shared_with_what_it_was_made_of():
    graph, scores = Graph.of(LAYERS, HEADS), torch.zeros(Graph.of(LAYERS, HEADS).edges.shape, dtype=torch.float64)
    circuit = Circuit(graph.edges, LAYERS, HEADS, scores)
    n = len(circuit)
    graph.edges[:], graph.node_of[:], scores[:] = False, 0, 7.0
    assert len(circuit) == n and circuit.scores[circuit.keep].abs().max() == 0
    circuit.keep[:] = False
    circuit.graph.edges[:], circuit.graph.node_of[:] = False, 0
    again = Graph.of(LAYERS, HEADS)
    assert int(again.edges.sum()) == n and again.node_of.any()
    assert len(Circuit(again.edges, LAYERS, HEADS).pruned()) == n
    with pytest.raises(TypeError):
        again.sender_at[Site("mlp", 0)] = 3


def test_pruning_is_said_with_what_was_asked_for():
    circuit = replace(drawn(1, 0.3), selection=Selection("above", "signed", threshold=0.1, of=46))
    pruned = circuit.pruned()
    assert pruned.selection == Selection("above", "signed", None, len(circuit), True, 46, 0.1)
    assert pruned.pruned().selection == pruned.selection and not circuit.selection.pruned


def test_the_baseline_of_a_pruned_circuit_is_drawn_as_large_and_pruned():
    like = drawn(1, 0.3, model="tiny", batch="of these pairs")
    whole, pruned = (random_circuit(one, 4) for one in (like, like.pruned()))
    assert len(whole) == len(like) > len(like.pruned()) and pruned.keep.equal(whole.pruned().keep)
    assert whole.scores is None and whole.record == Record(model="tiny") and whole.name == "random(4)"
    assert whole.selection == Selection("drawn", asked=len(like), of=len(Circuit(like.graph.edges, LAYERS, HEADS)))


def test_pruned_keeps_scores_of_what_stays():
    circuit = drawn(1, 0.3)
    pruned = circuit.pruned()
    assert 0 < len(pruned) < len(circuit)
    assert pruned.scores[pruned.keep].equal(circuit.scores[pruned.keep])
    assert pruned.scores[~pruned.keep].isnan().all()


@pytest.mark.parametrize("seed", range(4))
def test_set_operations_are_those_of_sets(seed):
    a, b = drawn(seed, 0.3), drawn(seed + 100, 0.5)
    one, two = lines(a), lines(b)
    assert lines(a & b) == one & two and lines(a | b) == one | two and lines(a - b) == one - two
    assert a.jaccard(b) == len(one & two) / len(one | two)
    assert {str(edge) for edge in a.removed()} == lines(Circuit(a.graph.edges, LAYERS, HEADS)) - one


def test_joined_circuits_say_what_they_are_and_keep_the_left_ones_scores():
    a, b = (drawn(seed, model="tiny", source=SourceRecord(name)) for seed, name in ((1, "zeros"), (2, "mean")))
    both = a | b
    assert both.name == "(drawn 1) | (drawn 2)" and both.record == Record(model="tiny")
    assert both.selection == Selection("joined") and (a | drawn(2)).record is None
    assert both.scores[a.keep].equal(a.scores[a.keep]) and both.scores[(b - a).keep].isnan().all()


def test_the_overlap_of_nothing_with_nothing_is_whole():
    nothing = drawn(0) - drawn(0)
    assert nothing.jaccard(nothing) == 1.0 and nothing.jaccard(drawn(1)) == 0.0


def test_circuits_of_towers_of_other_shapes_are_not_compared():
    other = Circuit(Graph.of(2, 2).edges, 2, 2)
    for operation in ("__and__", "__or__", "__sub__", "jaccard"):
        with pytest.raises(ValueError, match="3 layers x 2 heads and 2 x 2"):
            getattr(drawn(0), operation)(other)


def test_overlaps_have_a_row_for_each_two():
    circuits = {name: drawn(seed) for seed, name in enumerate("abc")}
    table = Circuit.overlaps(circuits)
    assert list(zip(table["first"], table["second"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    for _, line in table.iterrows():
        one, two = ({*circuits[line[end]].edges()} for end in ("first", "second"))
        assert (line["edges_first"], line["edges_second"], line["shared"]) == (len(one), len(two), len(one & two))
    a, b, n = len(circuits["a"]), len(circuits["b"]), int(Graph.of(LAYERS, HEADS).edges.sum())
    assert table["jaccard"][0] == circuits["a"].jaccard(circuits["b"])
    assert table["by_chance"][0] == a * b / n


def test_an_overlap_says_what_each_has_alone_and_how_likely_chance_does_as_well():
    """The probability counted: of all ways to draw b of n edges, those with as many of a's or more."""
    n_layers, n_heads = 1, 1
    graph = Graph.of(n_layers, n_heads)
    every = [Edge(graph.senders[s], graph.receivers[r]) for r, s in graph.edges.nonzero().tolist()]
    one, two = (Circuit.of(some, n_layers=n_layers, n_heads=n_heads) for some in (every[:3], every[1:5]))
    (line,) = Circuit.overlaps({"one": one, "two": two}).to_dict("records")
    assert (line["shared"], line["only_first"], line["only_second"]) == (2, 1, 2)
    drawn = [len(set(every[:3]) & set(some)) for some in combinations(every, 4)]
    assert line["p"] == pytest.approx(sum(count >= 2 for count in drawn) / len(drawn), rel=1e-12)


def test_random_circuits_are_as_large_and_depend_on_the_seed_alone():
    like = drawn(3)
    drawn_again = [random_circuit(like, seed) for seed in (0, 0, 1)]
    assert {len(circuit) for circuit in drawn_again} == {len(like)}
    assert drawn_again[0].jaccard(drawn_again[1]) == 1 and drawn_again[0].jaccard(drawn_again[2]) < 1


def test_a_layers_heads_are_written_as_one():
    circuit = Circuit.of([Edge(Site("head", 0), Site("k", 2))], n_layers=LAYERS, n_heads=HEADS)
    assert lines(circuit) == {f"head 0.{s} -> k 2.{r}" for s in range(2) for r in range(2)}
    assert Edge(Site("head", 0), Site("k", 2)) in circuit and Edge(Site("head", 0, 1), Site("k", 2, 0)) in circuit
    assert Edge(Site("head", 0), Site("v", 2)) not in circuit and "head 0" not in circuit


def test_nodes_count_their_edges():
    edges = {
        Edge(Site("embed"), Site("q", 1, 0)): 1.0,
        Edge(Site("embed"), Site("v", 1, 0)): -3.0,
        Edge(Site("head", 1, 0), Site("out")): 2.0,
    }
    nodes = Circuit.of(edges, n_layers=2, n_heads=2).nodes().set_index("node")
    assert nodes[["incoming", "outgoing", "strongest"]].to_numpy().tolist() == [[0, 2, -3], [2, 1, -3], [1, 0, 2]]
    assert nodes.index.tolist() == ["embed", "head 1.0", "out"] and nodes["layer"].isna().tolist() == [
        True,
        False,
        True,
    ]


def test_networkx_gets_every_edge_with_its_score():
    circuit = drawn(5)
    graph = circuit.to_networkx()
    found = {}
    for sender, receiver, data in graph.edges(data=True):
        assert abs(data["score"]) == max(abs(score) for score in data["scores"].values())
        for through, score in data["scores"].items():
            target = receiver if through in ("mlp", "out") else receiver.replace("head", through)
            found[f"{sender} -> {target}"] = score
    assert found == {str(edge): score for edge, score in circuit.scored().items()}
    assert graph.nodes["head 0.1"] == {"kind": "head", "layer": 0, "unit": 1} and graph.graph == circuit.as_text()


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_a_file_gives_back_the_circuit(tmp_path, density, scores):
    circuit = drawn(2, density, scores, data='Büßer "quoted"', metric=MetricRecord("mine", False), hooks=("a",))
    circuit = replace(circuit, selection=Selection("above", "signed", None, 7, True, 46, 0.1 + 0.2, (3, 8)))
    circuit.save(tmp_path / "c.json")
    again = Circuit.load(tmp_path / "c.json")
    assert again.keep.equal(circuit.keep) and again.name == circuit.name
    assert again.record == circuit.record and again.selection == circuit.selection
    assert (again.n_layers, again.n_heads) == (LAYERS, HEADS)
    if scores:
        torch.testing.assert_close(again.scores, circuit.scores, rtol=0, atol=0, equal_nan=True)
    else:
        assert again.scores is None


def test_a_person_can_read_and_edit_the_file(tmp_path):
    path = tmp_path / "c.json"
    drawn(2).save(path)
    content = json.loads(path.read_text())
    content["edges"] = {"head 1.0 -> v 2.1": 0.5, "embed -> out": None}
    path.write_text(json.dumps(content))
    circuit = Circuit.load(path)
    assert lines(circuit) == {"head 1.0 -> v 2.1", "embed -> out"}
    assert circuit.scored()[Edge(Site("head", 1, 0), Site("v", 2, 1))] == 0.5


def damaged(change):
    def write(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_text(path.read_text()[:-40]), "no whole JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "no whole JSON"),
        (lambda path: path.write_text("[1, 2]"), "not a circuit"),
        (lambda path: path.write_text('{"format": "other"}'), "not a circuit"),
        (
            lambda path: path.write_text('{"format": "clip_lens circuit 1", "meta": {}}'),
            "0.1, .*find the circuit again",
        ),
        (damaged(lambda content: content.pop("selection")), "damaged"),
        (damaged(lambda content: content["selection"].update(ruel="top")), "damaged"),
        (damaged(lambda content: content.update(record={"modle": "tiny"})), "damaged"),
        (damaged(lambda content: content.pop("layers")), "damaged: KeyError 'layers'"),
        (damaged(lambda content: content.update(edges=[1])), "damaged"),
        (damaged(lambda content: content["edges"].update({"embed -> out": "much"})), "damaged"),
        (damaged(lambda content: content["edges"].update({"mlp 2 -> q 2.0": 1.0})), "'mlp 2 -> q 2.0', which a tower"),
        (lambda path: path.write_text(path.read_text().replace('"heads": 2', '"heads": 2, "heads": 3')), "twice"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, spoil, message):
    path = tmp_path / "c.json"
    drawn(2).save(path)
    spoil(path)
    with pytest.raises(ValueError, match=message):
        Circuit.load(path)


def test_an_interrupted_save_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    drawn(2).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        drawn(3).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_html_escapes_what_others_wrote():
    html = drawn(2, data="<script>")._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "more edges" in html


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Circuit(torch.ones(3, 3, dtype=torch.bool), 3, 2), r"Got torch.bool of shape \[3, 3\]"),
        (lambda: Circuit(Graph.of(3, 2).edges.float(), 3, 2), "Got torch.float32"),
        (lambda: Circuit(torch.ones_like(Graph.of(3, 2).edges), 3, 2), "no edge runs from head 0.0 to q 0.0"),
        (lambda: Circuit(Graph.of(3, 2).edges, 3, 2, torch.zeros(2, 2)), r"scores must be .* Got \[2, 2\]"),
        (lambda: Circuit.of([Edge(Site("embed"), Site("mlp", 3))], n_layers=3, n_heads=2), "3 layers x 2 heads"),
        (lambda: Circuit.of([Edge(Site("embed"), Site("q", 0, 2))], n_layers=3, n_heads=2), "no such edge"),
        (lambda: Graph.of(3, 2, ("eot", "eot")), "each once"),
        (lambda: Graph.of(3, 2, ("eot", 3)), "all names or all positions"),
    ],
)
def test_what_is_no_circuit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
