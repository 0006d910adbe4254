"""Two circuits as sets: which edges both have, and which one of them alone."""

from __future__ import annotations

from clip_lens.methods.circuits.circuit import Circuit
from clip_lens.show.figures.network import network
from clip_lens.show.report.section import Picture, Section, Table
from clip_lens.words import counted, decimals, probability

SHOWN = 60
"""Edges of a table on the page; the file has all of them."""


def sets(a: Circuit, b: Circuit, names: tuple[str, str]) -> Section:
    """A section on what two circuits of towers of one shape share, beside what chance would.

    Raises:
        ValueError: the circuits are of towers of different shapes.

    Example:
        >>> full = Circuit.full(clip_lens.load())
        >>> sets(full, full & full, ("one", "two")).findings[0]
        'one and two share 1108 edges, all that either has.'
    """
    overlap = Circuit.overlaps(dict(zip(names, (a, b), strict=True)))
    parts = {"in both": a & b, f"only in {names[0]}": a - b, f"only in {names[1]}": b - a}
    parts = {name: circuit for name, circuit in parts.items() if len(circuit)}
    return Section(
        "Edges",
        findings=[_finding(overlap.to_dict("records")[0], names)],
        pictures=[
            Picture(
                network(circuit), f"Edges {name}", "A line is an edge; its scores are the first circuit's.", wide=True
            )
            for name, circuit in parts.items()
        ],
        tables=[
            Table(overlap, "Overlap", "By chance: edges drawn uniformly from all of the tower's.", formats={"p": "p"}),
            *(Table(circuit.table(), f"Edges {name}", rows=SHOWN) for name, circuit in parts.items()),
        ],
        meta={name: "; ".join(c.as_text().values()) for name, c in zip(names, (a, b), strict=True)},
    )


def _finding(line: dict[str, float], names: tuple[str, str]) -> str:
    shared = counted(int(line["shared"]), "edge")
    if not line["only_first"] and not line["only_second"]:
        return f"{names[0]} and {names[1]} share {shared}, all that either has."
    return (
        f"{names[0]} and {names[1]} share {shared} (Jaccard {decimals(line['jaccard'])}); {names[0]} has "
        f"{int(line['only_first'])} alone, {names[1]} {int(line['only_second'])}. Drawn at random they would share "
        f"{decimals(line['by_chance'], 1)} (p {probability(line['p'])} of as many or more)."
    )
