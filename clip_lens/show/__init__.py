"""What is shown of results: figures, reports, the explorer. The parts of a report of one's own are named here."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
