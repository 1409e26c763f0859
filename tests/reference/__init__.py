"""Transcriptions of backbones and methods in plain float64 arithmetic: the oracle of the tests.

Nothing here imports `visionpeft`. A backbone is computed from the state_dict of an untouched timm or OpenCLIP model and
a few of its numbers (heads, eps); attention is an explicit softmax. A method is one function of `methods.py`: it takes
its tensors under the names they are saved with and answers with the edits it makes at named stations of that
computation. `merged.py` gives the weights a merged model must have.
"""

from .anatomy import addresses_of, shapes_of
from .backbones import forward
from .merged import merged_weights
from .methods import METHODS, edits_of, trained_weights

__all__ = [
    "METHODS",
    "addresses_of",
    "edits_of",
    "forward",
    "merged_weights",
    "shapes_of",
    "trained_weights",
]
