"""The files of the embedded model: weights, pairs, image embeddings, pictures, model card."""

from importlib.resources import files
from pathlib import Path

ASSETS = Path(str(files(__name__)))
