"""Methods that change weights and nothing else: the weight each one makes, by formula, and the shapes of its tensors.

A function of CHANGES gets the weight (out, in), the fields of the method, the tensors found at the layer, all `sites`
of the tower, and answers with the new weight; the bias stays. SHAPES gives the shapes of the trained tensors of a layer
from the method, rows and columns of its weight, SHARED_SHAPES those of what a tower shares. To add a method, enter its
name in both.
"""

import torch


def counted_from_start(weight, fields, found, sites):
    """PiSSA, arXiv 2404.02948, and OLoRA, 2406.01775: W + s (U V - U0 V0)."""
    rank = len(found["V"])
    scale = 1 if fields["alpha"] is None else fields["alpha"] / rank
    return weight + scale * (found["U"] @ found["V"] - found["U_start"] @ found["V_start"])


CHANGES = {
    "pissa": counted_from_start,
    "olora": counted_from_start,
}

SHAPES = {
    "pissa": lambda m, rows, columns: {"U": (rows, m.rank), "V": (m.rank, columns)},
    "olora": lambda m, rows, columns: {"U": (rows, m.rank), "V": (m.rank, columns)},
}

# name -> (name of what a tower shares, shapes of its trained tensors by method, its targets' (rows, columns))
SHARED_SHAPES = {}


def edit_with(change):
    """The function for `methods.METHODS` of a change of weights."""

    def method(sites, fields, shape):
        def weight(pair, index, site):
            found = sites.get((index, site))
            return pair if found is None else (change(pair[0], fields, found, sites), pair[1])

        return {"weight": weight}

    return method
