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


def cayley(upper, block):
    """(I - Q) (I + Q)^-1 for the skew-symmetric Q with this upper triangle, row by row."""
    places = [(i, j) for i in range(block) for j in range(i + 1, block)]
    Q = torch.zeros(block, block, dtype=upper.dtype)
    for value, (i, j) in zip(upper, places, strict=True):
        unit = torch.zeros_like(Q)
        unit[i, j], unit[j, i] = 1, -1
        Q = Q + value * unit
    identity = torch.eye(block, dtype=upper.dtype)
    return (identity - Q) @ torch.linalg.inv(identity + Q)


def oft(weight, fields, found, sites):
    """OFT, arXiv 2306.07280: W R with a block diagonal R of Cayley transforms."""
    return weight @ torch.block_diag(*(cayley(upper, fields["block"]) for upper in found["Q"]))


def boft(weight, fields, found, sites):
    """BOFT, arXiv 2311.06243: s * (W F_0 F_1 ...), the blocks of F_i joining halves that are 2^i halves apart."""
    half = fields["block"] // 2
    for level, of_level in enumerate(found["Q"]):
        factor = torch.zeros(weight.shape[1], weight.shape[1], dtype=weight.dtype)
        for number, upper in enumerate(of_level):
            group, place = divmod(number, 2**level)
            first = (group * 2 ** (level + 1) + place) * half
            rows = [*range(first, first + half), *range(first + 2**level * half, first + (2**level + 1) * half)]
            if level == 0:
                rows = range(number * fields["block"], (number + 1) * fields["block"])
            take = torch.eye(weight.shape[1], dtype=weight.dtype)[list(rows)]
            factor = factor + take.T @ cayley(upper, fields["block"]) @ take
        weight = weight @ factor
    return found["scale"][:, None] * weight


CHANGES = {
    "pissa": counted_from_start,
    "olora": counted_from_start,
    "oft": oft,
    "boft": boft,
}

SHAPES = {
    "pissa": lambda m, rows, columns: {"U": (rows, m.rank), "V": (m.rank, columns)},
    "olora": lambda m, rows, columns: {"U": (rows, m.rank), "V": (m.rank, columns)},
    "oft": lambda m, rows, columns: {"Q": (columns // m.block, m.block * (m.block - 1) // 2)},
    "boft": lambda m, rows, columns: {
        "Q": (m.factors, columns // m.block, m.block * (m.block - 1) // 2),
        "scale": (rows,),
    },
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
