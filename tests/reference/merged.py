"""The weights of a merged model, by formula: W0 + dW for LoRA, scaled rows for SSF, moved biases for BitFit."""

import torch

from .anatomy import addresses_of, shapes_of
from .methods import sites_of


def moved(method, fields, weight, bias, found):
    """(weight, bias) of one matrix or norm after merging; a bias appears where there was none."""
    if method == "lora":
        rank = found["A"].shape[0]
        alpha = fields["alpha"] if fields["alpha"] is not None else rank
        return weight + (alpha / rank * found["B"] @ found["A"]).reshape(weight.shape), bias
    bias = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias
    if method == "bit_fit":
        return weight, bias + found["shift"]
    assert method == "ssf"
    scale = found["scale"].reshape(-1, *[1] * (weight.ndim - 1))
    return scale * weight, found["scale"] * bias + found["shift"]


def merged_weights(model, tensors, fields):
    """The state_dict of a merged model.

    Args:
        model: the plain model, in the precision of the tensors.
        tensors: the adapter's tensors under the names they are saved with.
        fields: {method name: its hyper-parameters}, applied in this order.

    Returns:
        The whole state_dict. A bias for which a model of this architecture has no place is under `missing.*`.
    """
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method, values in fields.items():
        for tower, sites in sites_of(tensors, method).items():
            addresses = addresses_of(model, tower)
            for (index, site), found in sites.items():
                address = addresses[index, site]
                weight, bias = moved(method, values, *address.read(weights), found)
                put(weights, address.weight, address.rows, weight)
                if address.bias in weights:
                    put(weights, address.bias, address.bias_rows, bias)
                elif bias is not None:
                    put_without_bias(weights, model, index, site, bias)
    return weights


def put_without_bias(weights, model, index, site, shift):
    """A shift for which there is no bias: that of the patches goes to their positions, others are `missing.*`."""
    names = [name for name in weights if name.rpartition(".")[2] in ("pos_embed", "positional_embedding")]
    names = [name for name in names if name.startswith("visual") or not hasattr(model, "visual")]
    if site != "patch_embed" or not names:
        weights[f"missing.{index}.{site}"] = shift
        return
    position = weights[names[0]].clone()
    first = 0 if getattr(model, "no_embed_class", False) else shapes_of(model)["visual"]["prefix"]
    position[..., first:, :] += shift
    weights[names[0]] = position


def put(weights, key, rows, value):
    """Write rows of an entry, or the whole entry."""
    if rows is None or key not in weights:
        weights[key] = value
    else:
        weights[key] = weights[key].clone()
        weights[key][rows] = value
