"""clip_lens: how a CLIP text encoder computes what it says.

One concept: what a receiver reads = what this run gives + weight * (what the source gives - what this run gives).
A *place* says where (`Site`), a *source* with what (`counterpart`), and every method returns one result, `Effects`.

Axes, everywhere: pair pos slot layer head neuron place d_model d_head d_mlp d_embed.

Names are resolved when they are first used, so that importing the package costs nothing.
"""

import lazy_loader

_resolved, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted(_names)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in __all__:
        from clip_lens.words import close

        raise AttributeError(f"clip_lens has no {name!r}{close(name, __all__, len(__all__))}")
    return _resolved(name)


def __dir__() -> list[str]:
    return __all__
