"""One transformer block of any of the families, in float64, with the stations at which methods edit it.

Stations (an edit is a dict from a station to a function of the value passing there and where it is):

    weight   (W, b), index, site        the matrices q k v proj fc1 fc2 (fc1_g fc1_x), patch_embed, norms; before use
    driven   y, index, site, x          what such a matrix produced, given what it read
    output   y, index, site             what such a matrix or norm produced
    attn_in  h, index                   what the attention reads: the normalised stream, or the stream
    kv       (k, v), index, h           keys and values (batch, heads, tokens, d), just before attention, which reads h
    enter    (x, prompts), index        the stream at the block's entrance; `prompts` tokens sit after the prefix tokens
    leave    (x, prompts), index        the stream at the block's exit
    time     x, index, block, weights   the stream behind `enter`, with the block as it is without any edit
    attn_out a, index                   attention branch before LayerScale
    scaled_attn, scaled_mlp  a, index   the branches after LayerScale, as they are added to the stream
    aside    y, index, h                the stream after the attention residual, given what the attention read
    mid      y, index                   the same point, after `aside`
    mlp_in   h, index                   what the MLP reads
    experts  h, index, branch           the whole MLP branch in its place, of what it reads; branch(edit) is the MLP
                                        with one more edit
    hidden   x, index                   what fc2 reads
    mlp_out  m, index                   MLP branch before LayerScale
    joint    z, index, h                the stream at the exit, given what the MLP read
    beside   z, index, y                the stream at the exit, given the stream y after the attention residual
    exit     z, index                   the same point, after `beside`
    features f                          what the head reads
"""

from dataclasses import dataclass, field

import torch

from .arithmetic import attention, join_heads, layer_norm, linear, rotate, split_heads


@dataclass
class Address:
    """Where a matrix or norm lies in a state_dict: keys and the rows that belong to it (None: all)."""

    weight: str
    bias: str | None = None
    rows: slice | None = None
    bias_rows: slice | None = None

    def read(self, weights):
        """(weight, bias) of this address; the bias is None where there is none."""
        weight = weights[self.weight]
        bias = weights.get(self.bias)
        if self.rows is not None:
            weight = weight[self.rows]
        if bias is not None and self.bias_rows is not None:
            bias = bias[self.bias_rows]
        return weight, bias


@dataclass
class Block:
    """What tells one block from another. `addresses` maps sites to the state_dict; norms map names to their eps."""

    addresses: dict[str, Address]
    eps: dict[str, float]
    heads: int
    kv_heads: int
    activation: object
    norm_after: bool = False
    mlp: str = "plain"  # plain, gate_first, gate_last, split
    scales: tuple[str | None, str | None] = (None, None)
    head_scale: str | None = None
    rope: tuple | None = None  # sin, cos, half
    logit_bias: object = None  # (heads or 1, tokens, tokens)
    prefix: int = 1
    causal: bool = field(default=False)


def amend(edits, station, value, *where):
    """Pass a value through every edit of a station."""
    for edit in edits:
        if station in edit:
            value = edit[station](value, *where)
    return value


def normalise(block, weights, site, x, index, edits):
    """A norm of the block (identity where it has none), and what methods do to its output."""
    if site not in block.eps:
        return x
    weight, bias = amend(edits, "weight", block.addresses[site].read(weights), index, site)
    return amend(edits, "output", layer_norm(x, weight, bias, block.eps[site]), index, site)


def project(block, weights, site, x, index, edits):
    """A matrix of the block, and what methods do to it and to its output."""
    weight, bias = amend(edits, "weight", block.addresses[site].read(weights), index, site)
    y = amend(edits, "driven", linear(x, weight, bias), index, site, x)
    return amend(edits, "output", y, index, site)


def extended_bias(block, prompts, dtype):
    """The additive attention table with zero rows and columns where the prompts sit; causal for a text tower."""
    table = block.logit_bias
    if table is None or prompts == 0:
        return table
    where = block.prefix
    tokens = table.shape[-1]
    kept = [*range(where), *range(where + prompts, tokens + prompts)]
    larger = torch.zeros(table.shape[0], tokens + prompts, tokens + prompts, dtype=dtype)
    larger[:, torch.tensor(kept)[:, None], torch.tensor(kept)[None]] = table.to(dtype)
    if block.causal:
        later = torch.arange(tokens + prompts)[None] > torch.arange(tokens + prompts)[:, None]
        larger = torch.where(later, torch.full_like(larger, -torch.inf), larger)
    return larger


def attend(block, weights, h, index, edits, prompts):
    """The attention branch: q, k, v, norms of q and k, rotation, softmax, projection."""
    q = split_heads(project(block, weights, "q", h, index, edits), block.heads)
    k = split_heads(project(block, weights, "k", h, index, edits), block.kv_heads)
    v = split_heads(project(block, weights, "v", h, index, edits), block.kv_heads)
    q = normalise(block, weights, "q_norm", q, index, edits)
    k = normalise(block, weights, "k_norm", k, index, edits)
    if block.rope is not None:
        sin, cos, half = block.rope
        first = block.prefix + prompts
        q = torch.cat([q[:, :, :first], rotate(q[:, :, first:], sin, cos, half)], dim=2)
        k = torch.cat([k[:, :, :first], rotate(k[:, :, first:], sin, cos, half)], dim=2)
    table = extended_bias(block, prompts, q.dtype)
    tokens = k.shape[2]
    k, v = amend(edits, "kv", (k, v), index, h)
    if table is not None and k.shape[2] > tokens:
        # what a method puts before the keys is seen by every query, with no position
        table = torch.cat([torch.zeros(*table.shape[:2], k.shape[2] - tokens, dtype=q.dtype), table], dim=-1)
    groups = block.heads // block.kv_heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    x = attention(q, k, v, table)
    if block.head_scale:
        x = x * weights[block.head_scale]
    x = normalise(block, weights, "attn_norm", join_heads(x), index, edits)
    x = project(block, weights, "proj", x, index, edits)
    x = normalise(block, weights, "attn_branch_norm", x, index, edits)
    return amend(edits, "attn_out", x, index)


def feed_forward(block, weights, h, index, edits):
    """The MLP branch: plain, gated with one packed matrix, or gated with two."""
    routed, *_ = [edit for edit in edits if "experts" in edit] or [None]
    if routed is not None:
        rest = [edit for edit in edits if edit is not routed]
        inside = [{station: act for station, act in edit.items() if station != "mlp_out"} for edit in rest]
        m = routed["experts"](h, index, lambda more: feed_forward(block, weights, h, index, [*inside, more]))
        return amend(rest, "mlp_out", m, index)
    if block.mlp == "split":
        gate = project(block, weights, "fc1_g", h, index, edits)
        x = block.activation(gate) * project(block, weights, "fc1_x", h, index, edits)
    else:
        x = project(block, weights, "fc1", h, index, edits)
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        if block.mlp == "plain":
            x = block.activation(x)
        elif block.mlp == "gate_first":
            x = block.activation(first) * second
        else:
            x = first * block.activation(second)
    x = normalise(block, weights, "mlp_norm", x, index, edits)
    x = amend(edits, "hidden", x, index)
    x = project(block, weights, "fc2", x, index, edits)
    return amend(edits, "mlp_out", x, index)


def block_forward(block, weights, x, prompts, index, edits):
    """The block: attention and MLP, each added to the stream. Answers with the stream and its number of prompts."""
    x, prompts = amend(edits, "enter", (x, prompts), index)
    x = amend(edits, "time", x, index, block, weights)
    scale1, scale2 = (1 if key is None else weights[key] for key in block.scales)
    if block.norm_after:
        h = amend(edits, "attn_in", x, index)
        a = attend(block, weights, h, index, edits, prompts)
        y = x + amend(edits, "scaled_attn", scale1 * normalise(block, weights, "norm1", a, index, edits), index)
    else:
        h = amend(edits, "attn_in", normalise(block, weights, "norm1", x, index, edits), index)
        y = x + amend(edits, "scaled_attn", scale1 * attend(block, weights, h, index, edits, prompts), index)
    y = amend(edits, "aside", y, index, h)
    y = amend(edits, "mid", y, index)
    if block.norm_after:
        h = amend(edits, "mlp_in", y, index)
        m = feed_forward(block, weights, h, index, edits)
        z = y + amend(edits, "scaled_mlp", scale2 * normalise(block, weights, "norm2", m, index, edits), index)
    else:
        h = amend(edits, "mlp_in", normalise(block, weights, "norm2", y, index, edits), index)
        z = y + amend(edits, "scaled_mlp", scale2 * feed_forward(block, weights, h, index, edits), index)
    z = amend(edits, "joint", z, index, h)
    z = amend(edits, "beside", z, index, y)
    z = amend(edits, "exit", z, index)
    return amend(edits, "leave", (z, prompts), index)
