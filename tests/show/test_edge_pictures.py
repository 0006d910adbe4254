"""Pictures of edges: the numbers of the table, in the order of the tower, as wide as they are large."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from show.test_plots import make

import clip_lens
from clip_lens.core.effects import SHOWN
from clip_lens.core.grid import one_side
from clip_lens.methods.circuits.circuit import Circuit
from clip_lens.model.site import Edge, Site, precedes
from clip_lens.show.figures.heatmap import heatmap
from clip_lens.show.figures.network import network, strongest
from clip_lens.show.figures.qkv import qkv
from clip_lens.show.figures.style import LIGHT

SENDERS = [Site("embed"), *(Site("head", layer, unit) for layer in (0, 1, 10) for unit in (0, 1)), Site("mlp", 0)]
RECEIVERS = [Site(kind, layer, unit) for kind in "qkv" for layer in (1, 2, 11) for unit in (0, 1)]
RECEIVERS += [Site("mlp", 0), Site("mlp", 11), Site("out")]
EDGES = [Edge(s, r) for r in reversed(RECEIVERS) for s in reversed(SENDERS) if precedes(s, r)]
IN_ORDER = ["embed", "head 0.0", "head 0.1", "mlp 0", "head 1.0", "head 1.1", "head 10.0", "head 10.1"]


def lines(figure):
    return [trace for trace in figure.data if trace.mode == "lines" and trace.x[0] is not None]


def test_senders_and_receivers_come_in_the_order_of_the_tower():
    effects = make(EDGES)
    grid = effects.grid("sender", "receiver", side="foil")
    assert list(grid.index) == IN_ORDER
    assert list(grid.columns)[:5] == ["mlp 0", "q 1.0", "k 1.0", "v 1.0", "q 1.1"]
    assert list(grid.columns)[-2:] == ["mlp 11", "out"]
    table = one_side(effects.fraction(), "foil").set_index(["sender", "receiver"])["fraction"]
    for sender in grid.index:
        for receiver in grid.columns:
            np.testing.assert_equal(grid.loc[sender, receiver], table.get((sender, receiver), np.nan))


def test_a_heat_map_of_edges_says_no_path():
    figure = heatmap(make(EDGES), "sender", "receiver", side="foil", resamples=30)
    grid = make(EDGES).grid("sender", "receiver", side="foil")
    np.testing.assert_array_equal(figure.data[0].z, grid.to_numpy())
    assert figure.data[1].name == "no path" and "grey: no path" in figure.layout.xaxis.title.text
    assert "no counterpart" not in figure.to_json()


@pytest.mark.parametrize("value", ["effect", "fraction"])
def test_q_k_and_v_hold_the_grid(value):
    effects = make(EDGES)
    panels = [trace for trace in qkv(effects, value, resamples=30).data if trace.name != "no path"]
    assert [panel.name.split(";")[0] for panel in panels] == ["queries", "keys", "values"] * 2
    assert {panel.coloraxis for panel in panels} == {"coloraxis"}
    grid = effects.grid("sender", "receiver", value, side="foil")
    for kind, panel in zip("qkv", panels[3:], strict=True):
        columns = [f"{kind} {layer}.{unit}" for layer in (1, 2, 11) for unit in (0, 1)]
        np.testing.assert_array_equal(panel.z, grid[columns].to_numpy())


def test_q_k_and_v_are_laid_out_alike_where_one_lacks_a_head():
    edges = [Edge(Site("embed"), Site("q", 0, 0)), Edge(Site("embed"), Site("k", 0, 1))]
    panels = [trace for trace in qkv(make(edges), side="foil", resamples=30).data if trace.name != "no path"]
    assert [np.isnan(panel.z).tolist() for panel in panels] == [[[False, True]], [[True, False]]]


@pytest.mark.parametrize("n", [1, 10, 300])
def test_the_diagram_draws_the_largest_as_wide_as_they_are(n):
    effects = make(EDGES)
    figure = network(effects, n=n, side="foil")
    table = one_side(effects.table(), "foil").set_index("place")
    largest = table["effect"].abs().nlargest(n)
    drawn = lines(figure)
    assert {trace.name for trace in drawn} == set(largest.index)
    sizes = [abs(table.loc[trace.name, "effect"]) for trace in drawn]
    widths = [trace.line.width for trace in drawn]
    assert sizes == sorted(sizes) and widths == sorted(widths)  # the strongest on top, and the widest
    for trace in drawn:
        assert trace.line.color == (LIGHT.positive if table.loc[trace.name, "effect"] >= 0 else LIGHT.negative)
        assert f"<b>{table.loc[trace.name, 'effect']:.3f}</b> [" in trace.hovertemplate
        assert (np.diff(trace.x) > 0).all()  # from left to right


def test_every_node_with_an_edge_is_labelled_once():
    effects = make(EDGES)
    chosen = strongest(effects, 12, "foil")["edge"]
    nodes = network(effects, n=12, side="foil").data[-1]
    ends = {edge.sender for edge in chosen} | {
        replace(edge.receiver, kind="head") if edge.receiver.kind in "qkv" else edge.receiver for edge in chosen
    }
    assert set(nodes.hovertext) == {str(end) for end in ends} and len(nodes.hovertext) == len(ends)
    assert len(set(zip(nodes.x, nodes.y, strict=True))) == len(ends)


def test_labels_fit_a_deep_tower():
    edges = [Edge(Site("head", layer, 10), Site("mlp", layer)) for layer in (0, 7)]
    assert set(network(make(edges), side="foil").data[-1].text) == {"0.10", "m0", "7.10", "m7"}
    deeper = [*edges, Edge(Site("head", 8, 10), Site("mlp", 8))]
    assert set(network(make(deeper), side="foil").data[-1].text) == {"10", "m"}


def test_edges_between_the_same_nodes_do_not_cover_each_other():
    edges = [Edge(Site("embed"), Site(kind, 0, 0, slot)) for kind in "qkv" for slot in ("negator", "<a href='x'>")]
    drawn = lines(network(make(edges), side="foil"))
    assert len({tuple(trace.y) for trace in drawn}) == 6
    assert not any("<a" in trace.hovertemplate for trace in drawn)


def test_both_sides_share_the_scale_of_widths():
    figure = network(make(EDGES), n=5)
    assert len(lines(figure)) == 10
    assert [note.text.split("<br>")[0] for note in figure.layout.annotations[:2]] == [
        "negation in the caption",
        "negation in the foil",
    ]
    effects = make(EDGES)
    assert max(trace.line.width for trace in lines(figure)) == 9.0
    still = replace(effects, values=torch.zeros_like(effects.values))
    assert {trace.line.width for trace in lines(network(still, n=5))} == {1.0}


def test_whole_layers_and_missing_effects():
    edges = [
        Edge(Site("head", 0), Site("v", 1)),
        Edge(Site("embed"), Site("v", 1, 0)),
        Edge(Site("embed"), Site("out")),
    ]
    effects = make(edges)
    effects.values[2] = torch.nan
    figure = network(effects, side="foil")
    assert len(lines(figure)) == 2
    assert set(figure.data[-1].text) == {"0.all", "1.all", "embed", "1.0"}


def test_bad_input_is_named():
    for draw in (qkv, network):
        with pytest.raises(ValueError, match="1 of 1 places are no single edges, such as resid 0;"):
            draw(make([Site("resid", 0)]))
        with pytest.raises(ValueError, match="such as embed -> mlp 0"):
            draw(make([(EDGES[0], EDGES[1]), (Edge(Site("embed"), Site("mlp", 0)),)][::-1]))
        with pytest.raises(ValueError, match="no side 'none'"):
            draw(make(EDGES), side="none")
    with pytest.raises(ValueError, match=r"at least 1\. Got 0"):
        network(make(EDGES), n=0)
    with pytest.raises(ValueError, match="q, k or v of a head, only in mlp, out"):
        qkv(make([Edge(Site("embed"), Site("out")), Edge(Site("embed"), Site("mlp", 0))]))
    assert clip_lens.qkv is qkv


SCORED = {EDGES[0]: 0.5, EDGES[3]: -1.0, EDGES[7]: 0.25}


def test_a_circuit_is_drawn_by_its_own_scores():
    circuit = Circuit.of(SCORED, n_layers=12, n_heads=2, name="a <b>")
    figure = network(circuit)
    scores = dict(zip(figure.frame["edge"], figure.frame["score"], strict=True))
    assert scores == {str(edge): n for edge, n in SCORED.items()}
    assert all(f"score <b>{scores[trace.name]:.4f}</b>" in trace.hovertemplate for trace in lines(figure))
    widths = {trace.name: trace.line.width for trace in lines(figure)}
    largest, middle, least = (widths[str(edge)] for edge in (EDGES[3], EDGES[0], EDGES[7]))
    assert largest == 9.0 and middle == pytest.approx(1 + 8 * 0.5) and least == pytest.approx(1 + 8 * 0.25)
    assert figure.layout.annotations[0].text == "a &lt;b&gt;<br>3 edges"
    assert list(figure.layout.yaxis.ticktext) == ["head 0", "head 1", "MLP"]
    assert list(figure.layout.xaxis.ticktext) == ["embed", *map(str, range(12)), "out"]
    nodes = dict(zip(network(EDGES).data[-1].hovertext, network(EDGES).data[-1].x, strict=True))
    ticks = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
    assert ticks["out"] == nodes["out"] and ticks["embed"] == nodes["embed"]
    assert [trace.name for trace in lines(network(circuit, n=1))] == [str(EDGES[3])]
    same = lines(network(list(SCORED), SCORED))
    assert [(trace.name, trace.line.width) for trace in same] == list(widths.items())


def test_a_circuit_is_drawn_by_the_effects_of_a_result():
    effects = make(EDGES)
    circuit = Circuit.of(list(SCORED), n_layers=12, n_heads=2)
    figure = network(circuit, effects)
    assert [note.text for note in figure.layout.annotations[:2]] == [
        "negation in the caption<br>3 edges",
        "negation in the foil<br>3 edges",
    ]
    for drawn, side in zip((lines(figure)[:3], lines(figure)[3:]), ("caption", "foil"), strict=True):
        table = one_side(effects.table(), side).set_index("place")
        assert {trace.name for trace in drawn} == {str(edge) for edge in SCORED}
        frame = figure.frame[figure.frame["side"] == side].set_index("place")[list(SHOWN)]
        pd.testing.assert_frame_equal(frame, table.loc[frame.index, list(SHOWN)])


def test_edges_without_a_score_are_grey_and_alike():
    for circuit in (list(SCORED), Circuit.of(list(SCORED), n_layers=12, n_heads=2)):
        drawn = lines(network(circuit))
        assert {trace.name for trace in drawn} == {str(edge) for edge in SCORED}
        assert {(trace.line.color, trace.line.width) for trace in drawn} == {(LIGHT.soft, drawn[0].line.width)}
        assert not any("score" in trace.hovertemplate for trace in drawn)
    some = network(list(SCORED), {**SCORED, EDGES[7]: float("nan")})
    assert [trace.line.color for trace in lines(some)] == [LIGHT.soft, LIGHT.positive, LIGHT.negative]
    assert "nan" not in str(some.data[-1].customdata).replace("sends in", "")


def test_the_legend_hides_one_kind_of_receiver():
    figure = network(make(EDGES), n=200, side="foil")
    entries = {trace.name: trace for trace in figure.data if trace.showlegend is None}
    assert list(entries) == ["supports (+)", "opposes (-)", "queries", "keys", "values", "into MLPs", "into the output"]
    kinds = {"q": "queries", "k": "keys", "v": "values", "mlp": "into MLPs", "out": "into the output"}
    for trace in lines(figure):
        receiver = trace.name.split(" -> ")[1].split()[0]
        assert trace.legendgroup == kinds[receiver]
        assert trace.line.dash == entries[kinds[receiver]].line.dash


@pytest.mark.parametrize("n", [10, 100, 300])
def test_no_edge_runs_through_a_node_of_its_own_line(n):
    figure = network(make(EDGES), n=n, side="foil")
    nodes = figure.data[-1]
    spots = set(zip(nodes.x, nodes.y, strict=True))
    level = [trace for trace in lines(figure) if trace.y[0] == trace.y[-1] and abs(trace.x[-1] - trace.x[0]) > 1.5]
    assert len(lines(figure)) == min(n, len(EDGES))
    for trace in level:
        for x, y in spots:
            inside = (np.asarray(trace.x) > x - 0.1) & (np.asarray(trace.x) < x + 0.1)
            if trace.x[0] < x < trace.x[-1] and y == trace.y[0] and inside.any():
                assert np.abs(np.asarray(trace.y)[inside] - y).min() > 0.05


def test_the_forty_strongest_are_seen_and_a_slider_shows_the_others():
    effects = make(EDGES)
    figure = network(effects, n=100, side="foil")
    order = effects.where(side="foil").top(100)["place"].tolist()
    seen = lambda flags: {trace.name for trace, there in zip(figure.data, flags, strict=True) if there}
    edges = set(order)
    assert seen([trace.visible for trace in figure.data]) & edges == set(order[:40])
    (slider,) = figure.layout.sliders
    assert [step.label for step in slider.steps] == ["10", "20", "40", "80", "all 100"]
    assert slider.steps[slider.active].label == "40"
    for step, count in zip(slider.steps, (10, 20, 40, 80, 100), strict=True):
        flags = step.args[0]["visible"]
        assert seen(flags) & edges == set(order[:count])
        drawn = [trace for trace, there in zip(figure.data, flags, strict=True) if there and trace.name == "nodes"]
        ends = {end for place in order[:count] for end in place.split(" -> ")}
        heads = {re.sub("^[qkv] ", "head ", end) for end in ends}
        assert len(drawn) == 1 and set(drawn[0].hovertext) == heads  # the nodes are those of the edges that are seen
    assert set(figure.frame["place"]) == edges  # the table has all
    assert not network(effects, n=40, side="foil").layout.sliders
    assert len(lines(network(make(EDGES), side="foil"))) == 100


def test_receivers_are_told_apart_by_dashes_of_one_length():
    edges = [Edge(Site("embed"), Site(kind, 0, 0)) for kind in "qkv"]
    edges += [Edge(Site("embed"), Site("mlp", 0)), Edge(Site("embed"), Site("out"))]
    figure = network(edges, {edge: 1.0 + 4 * number for number, edge in enumerate(edges)})
    drawn = {trace.name.split()[2]: trace.line for trace in lines(figure)}
    assert len({line.dash for line in drawn.values()}) == 5
    assert len({line.width for line in drawn.values()}) == 5
    dashed = [line.dash for kind, line in drawn.items() if kind != "v"]
    assert all(re.fullmatch(r"\d+px(,\d+px)+", dash) for dash in dashed)  # named dashes grow with the width
    assert {trace.name: trace.line.dash for trace in figure.data if trace.legendgroup == trace.name} | {
        "queries": drawn["q"].dash, "keys": drawn["k"].dash, "values": "solid", "into MLPs": drawn["mlp"].dash,
        "into the output": drawn["out"].dash, "supports (+)": "solid",
    } == {trace.name: trace.line.dash for trace in figure.data if trace.legendgroup == trace.name}  # fmt: skip
    symbols = dict(zip(figure.data[-1].text, figure.data[-1].marker.symbol, strict=True))
    assert symbols["m0"] == "square" and symbols["0.0"] == "circle"


def test_edges_run_behind_no_node():
    senders = [Site("embed"), *(Site("head", layer, unit) for layer in range(6) for unit in range(4))]
    senders += [Site("mlp", layer) for layer in range(6)]
    receivers = [Site("v", layer, unit) for layer in range(6) for unit in range(4)]
    receivers += [*(Site("mlp", layer) for layer in range(6)), Site("out")]
    every = [Edge(s, r) for s in senders for r in receivers if precedes(s, r)]
    rng = np.random.default_rng(0)
    for _ in range(3):
        edges = [every[number] for number in rng.choice(len(every), 40, replace=False)]
        edges += [Edge(Site("head", 0, 1), Site("v", 5, 1)), Edge(Site("embed"), Site("out"))]
        figure = network(edges)
        nodes = figure.data[-1]
        across = 900 / np.diff(figure.layout.xaxis.range).item()  # pixels; a page is a little less than 1,100 wide
        down = (figure.layout.height - figure.layout.margin.t - figure.layout.margin.b) / abs(
            np.diff(figure.layout.yaxis.range).item()
        )
        for trace in lines(figure):
            x, y = (np.interp(np.linspace(0, 24, 500), range(25), points) for points in (trace.x, trace.y))
            for at, size in zip(zip(nodes.x, nodes.y, strict=True), nodes.marker.size, strict=True):
                away = np.hypot((x - at[0]) * across, (y - at[1]) * down).min()
                ends = [(trace.x[end], trace.y[end]) for end in (0, -1)]
                assert any(np.allclose(at, end) for end in ends) or away > size / 2, (trace.name, at, away)


def test_what_cannot_be_drawn_is_named():
    empty = Circuit.of([], n_layers=2, n_heads=2)
    with pytest.raises(ValueError, match="the circuit is empty"):
        network(empty)
    with pytest.raises(ValueError, match=f"1 of 2 edges have no score, such as {EDGES[1]};"):
        network(EDGES[:2], {EDGES[0]: 1.0})
    with pytest.raises(ValueError, match=f"1 of 2 edges have no score, such as {EDGES[1]};"):
        network(EDGES[:2], make(EDGES[:1]))
    with pytest.raises(ValueError, match="n=2 takes the edges of the largest effects"):
        network(EDGES[:3], n=2)
    with pytest.raises(ValueError, match="side='foil' chooses among the sides of a result"):
        network(EDGES[:3], SCORED, side="foil")
    assert clip_lens.network is network
