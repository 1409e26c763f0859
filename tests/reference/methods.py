"""The methods as their papers state them: one function each, from its tensors to the edits it makes (`block.py`).

A function gets `sites`, {(block index or None, site): {parameter: tensor}} of one tower, the fields of the method, and
the `shape` of the tower ({"depth": blocks, "prefix": tokens before the patches}). It answers with one edit: a dict from
a station to a function. To add a method, write the function and enter it in METHODS.
"""

import torch

from .arithmetic import ACTIVATIONS, linear, split_heads


def lora(sites, fields, shape):
    """LoRA, arXiv 2106.09685: W + (alpha / r) B A, one pair for each target."""
    alpha = fields["alpha"]

    def weight(pair, index, site):
        found = sites.get((index, site))
        if found is None:
            return pair
        rank = found["A"].shape[0]
        return pair[0] + (rank if alpha is None else alpha) / rank * found["B"] @ found["A"], pair[1]

    return {"weight": weight}


def vpt(sites, fields, shape):
    """VPT, arXiv 2203.12119: prompts after the prefix tokens; deep ones overwrite the slots before every block."""
    prompts = {index: found["prompts"] for (index, site), found in sites.items() if site == "stream_in"}
    projection = sites.get((None, "projection"))
    first = shape["prefix"]

    def enter(state, index):
        x, present = state
        if index not in prompts:
            return state
        fresh = prompts[index]
        if projection:
            fresh = linear(fresh, projection["weight"], projection["bias"])
        fresh = fresh.expand(len(x), -1, -1)
        return torch.cat([x[:, :first], fresh, x[:, first + present :]], dim=1), fresh.shape[1]

    def leave(state, index):
        x, present = state
        last = index + 1 not in prompts if fields["deep"] else index == shape["depth"] - 1
        if not present or not last:
            return state
        return torch.cat([x[:, :first], x[:, first + present :]], dim=1), 0

    return {"enter": enter, "leave": leave}


def bottleneck(found, fields, x):
    """scale * Up(activation(Down(x)))."""
    hidden = ACTIVATIONS[fields["activation"]](linear(x, found["down.weight"], found["down.bias"]))
    scale = found.get("scale", 1 if fields["scale"] is None else fields["scale"])
    return scale * linear(hidden, found["up.weight"], found["up.bias"])


def adapter(sites, fields, shape):
    """Serial and parallel adapters at the five places of Adapter+ (arXiv 2406.06820), table 1."""

    def at(site):
        def serial(x, index):
            found = sites.get((index, site))
            return x if found is None else x + bottleneck(found, fields, x)

        return serial

    if fields["placement"] == "parallel":
        return {"beside": beside_mlp(sites, fields)}
    return {
        "houlsby": {"attn_out": at("attn_out"), "mlp_out": at("mlp_out")},
        "pfeiffer": {"mlp_out": at("mlp_out")},
        "pre": {"mid": at("stream_mid")},
        "adapter_plus": {"exit": at("stream_out")},
    }[fields["placement"]]


def beside_mlp(sites, fields):
    """z + A(y), y the stream after the attention residual, not normalised."""

    def beside(z, index, y):
        found = sites.get((index, "stream_mid"))
        return z if found is None else z + bottleneck(found, fields, y)

    return beside


def adapt_former(sites, fields, shape):
    """AdaptFormer, arXiv 2205.13535: a ReLU bottleneck beside the MLP, reading the un-normalised stream."""
    return {"beside": beside_mlp(sites, fields | {"activation": "relu"})}


def ssf(sites, fields, shape):
    """SSF, arXiv 2210.08823: gamma * y + beta after every matrix and norm."""

    def output(y, index, site):
        found = sites.get((index, site))
        return y if found is None else found["scale"] * y + found["shift"]

    return {"output": output}


def bit_fit(sites, fields, shape):
    """BitFit, arXiv 2106.10199: the biases move by a learned shift."""

    def weight(pair, index, site):
        found = sites.get((index, site))
        return pair if found is None else (pair[0], pair[1] + found["shift"])

    return {"weight": weight}


def prefix_tuning(sites, fields, shape):
    """Prefix-tuning, arXiv 2101.00190: learned keys and values in front of those of the tokens."""

    def kv(pair, index):
        found = sites.get((index, "kv"))
        if found is None:
            return pair
        return tuple(
            torch.cat([split_heads(found[name][None], old.shape[1]).expand(len(old), -1, -1, -1), old], dim=2)
            for name, old in zip(("keys", "values"), pair, strict=True)
        )

    return {"kv": kv}


METHODS = {
    "lora": lora,
    "vpt": vpt,
    "adapter": adapter,
    "adapt_former": adapt_former,
    "ssf": ssf,
    "bit_fit": bit_fit,
    "prefix_tuning": prefix_tuning,
}


def sites_of(tensors, method):
    """{tower: {(block index or None, site): {parameter: tensor}}} of the tensors saved by one method."""
    towers = {}
    for name, tensor in tensors.items():
        owner, _, rest = name.partition(".")
        if owner != method:
            continue
        tower, *parts = rest.split(".")
        index = int(parts.pop(0)) if parts[0].isdigit() else None
        site, parameter = parts[0], ".".join(parts[1:])
        towers.setdefault(tower, {}).setdefault((index, site), {})[parameter] = tensor
    return towers


def edits_of(tensors, fields, shapes):
    """{tower: [edit]} of an adapter.

    Args:
        tensors: the adapter's tensors under the names they are saved with.
        fields: {method name: its hyper-parameters}.
        shapes: {tower: {"depth": ..., "prefix": ...}}.
    """
    edits = {}
    for method, values in fields.items():
        for tower, sites in sites_of(tensors, method).items():
            edits.setdefault(tower, []).append(METHODS[method](sites, values, shapes[tower]))
    return edits


def trained_weights(weights, tensors):
    """The model's weights with those replaced that were trained themselves (`trained.*`) and the head (`head.*`)."""
    changed = {name.removeprefix("trained."): t for name, t in tensors.items() if name.startswith("trained.")}
    changed |= {name: t for name, t in tensors.items() if name.startswith("head.")}
    assert set(changed) <= set(weights)
    return weights | changed
