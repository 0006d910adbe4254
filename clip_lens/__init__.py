"""clip_lens: how a CLIP text encoder computes what it says.

One concept: what a reader reads = what this run gives + weight * (what the source gives - what this run gives).
A *place* says where (`Site`), a *source* with what (`counterpart`), and every method returns one result, `Effects`.

Axes, everywhere: pair pos slot layer head neuron place d_model d_head d_mlp d_embed.

Names are resolved when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "Site": "model.site",
    "Edge": "model.site",
    "Place": "model.site",
    "load": "model.load",
    "HookedTextEncoder": "model.encoder",
    "HookedTextTower": "model.tower",
    "Pairs": "data.pairs",
    "read_pairs": "data.read",
    "ImageStore": "data.images",
    "embed_images": "data.embed",
    "Batch": "data.batch",
    "align": "data.batch",
    "template_slots": "data.batch",
    "Effects": "core.effects",
    "counterpart": "core.source",
    "zeros": "core.source",
    "mean": "core.source",
    "resample": "core.source",
    "noise": "core.source",
    "steered": "core.source",
    "via": "core.via",
    "source": "core.source",
    "Source": "core.source",
    "metric": "core.metric",
    "Metric": "core.metric",
    "Record": "core.record",
    "Method": "core.record",
    "register": "methods.registry",
    "logit": "core.metric",
    "cosine": "core.metric",
    "kl": "core.metric",
    "correlations": "methods.statistics",
    "patch_effects": "methods.patching",
    "path_effects": "methods.paths",
    "direct_effects": "methods.direct",
    "logit_lens": "methods.lens",
    "components": "methods.direct",
    "labels": "methods.labels",
    "acdc": "methods.circuits.acdc",
    "Circuit": "methods.circuits.circuit",
    "Discovery": "methods.circuits.discover",
    "discover": "methods.circuits.discover",
    "random_circuit": "methods.circuits.circuit",
    "completeness": "methods.circuits.faithfulness",
    "faithfulness": "methods.circuits.faithfulness",
    "minimality": "methods.circuits.faithfulness",
    "sized_circuits": "methods.circuits.selection",
    "stability": "methods.circuits.selection",
    "top_edges": "methods.circuits.selection",
    "gradient_effects": "methods.gradient",
    "attention_effects": "methods.attention",
    "scores": "methods.scores",
    "confounds": "methods.confounds",
    "probe": "methods.probes.probe",
    "probe_effects": "methods.probes.probe",
    "steer": "methods.steering",
    "heatmap": "show.figures.heatmap",
    "qkv": "show.figures.qkv",
    "network": "show.figures.network",
    "bars": "show.figures.bars",
    "curve": "show.figures.curves",
    "scatter": "show.figures.curves",
    "scatter_pairs": "show.figures.scatter",
    "patterns": "show.figures.attention",
    "save_figure": "show.figures.export",
    "report": "show.report.report",
    "study": "show.questions.study",
    "circuit_report": "show.questions.circuits",
    "explore": "show.explore.shell",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"

if TYPE_CHECKING:
    from clip_lens.core.effects import Effects as Effects
    from clip_lens.core.metric import cosine as cosine
    from clip_lens.core.metric import kl as kl
    from clip_lens.core.metric import logit as logit
    from clip_lens.core.source import counterpart as counterpart
    from clip_lens.core.source import mean as mean
    from clip_lens.core.source import noise as noise
    from clip_lens.core.source import resample as resample
    from clip_lens.core.source import steered as steered
    from clip_lens.core.source import zeros as zeros
    from clip_lens.core.via import via as via
    from clip_lens.data.batch import Batch as Batch
    from clip_lens.data.batch import align as align
    from clip_lens.data.batch import template_slots as template_slots
    from clip_lens.data.embed import embed_images as embed_images
    from clip_lens.data.images import ImageStore as ImageStore
    from clip_lens.data.pairs import Pairs as Pairs
    from clip_lens.data.read import read_pairs as read_pairs
    from clip_lens.methods.attention import attention_effects as attention_effects
    from clip_lens.methods.circuits.acdc import acdc as acdc
    from clip_lens.methods.circuits.circuit import Circuit as Circuit
    from clip_lens.methods.circuits.circuit import random_circuit as random_circuit
    from clip_lens.methods.circuits.discover import Discovery as Discovery
    from clip_lens.methods.circuits.discover import discover as discover
    from clip_lens.methods.circuits.faithfulness import completeness as completeness
    from clip_lens.methods.circuits.faithfulness import faithfulness as faithfulness
    from clip_lens.methods.circuits.faithfulness import minimality as minimality
    from clip_lens.methods.circuits.selection import sized_circuits as sized_circuits
    from clip_lens.methods.circuits.selection import stability as stability
    from clip_lens.methods.circuits.selection import top_edges as top_edges
    from clip_lens.methods.confounds import confounds as confounds
    from clip_lens.methods.direct import components as components
    from clip_lens.methods.direct import direct_effects as direct_effects
    from clip_lens.methods.gradient import gradient_effects as gradient_effects
    from clip_lens.methods.labels import labels as labels
    from clip_lens.methods.lens import logit_lens as logit_lens
    from clip_lens.methods.patching import patch_effects as patch_effects
    from clip_lens.methods.paths import path_effects as path_effects
    from clip_lens.methods.probes.probe import probe as probe
    from clip_lens.methods.probes.probe import probe_effects as probe_effects
    from clip_lens.methods.scores import scores as scores
    from clip_lens.methods.statistics import correlations as correlations
    from clip_lens.methods.steering import steer as steer
    from clip_lens.model.encoder import HookedTextEncoder as HookedTextEncoder
    from clip_lens.model.load import load as load
    from clip_lens.model.site import Edge as Edge
    from clip_lens.model.site import Place as Place
    from clip_lens.model.site import Site as Site
    from clip_lens.model.tower import HookedTextTower as HookedTextTower
    from clip_lens.show.explore.shell import explore as explore
    from clip_lens.show.figures.attention import patterns as patterns
    from clip_lens.show.figures.bars import bars as bars
    from clip_lens.show.figures.curves import curve as curve
    from clip_lens.show.figures.curves import scatter as scatter
    from clip_lens.show.figures.export import save_figure as save_figure
    from clip_lens.show.figures.heatmap import heatmap as heatmap
    from clip_lens.show.figures.network import network as network
    from clip_lens.show.figures.qkv import qkv as qkv
    from clip_lens.show.figures.scatter import scatter_pairs as scatter_pairs
    from clip_lens.show.questions.circuits import circuit_report as circuit_report
    from clip_lens.show.questions.study import study as study
    from clip_lens.show.report.report import report as report


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"clip_lens has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"clip_lens.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
