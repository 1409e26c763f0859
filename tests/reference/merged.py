"""The weights of a merged model, by formula: W0 + dW for LoRA, scaled rows for SSF, moved biases for BitFit, ..."""

import torch

from .anatomy import addresses_of, shapes_of
from .methods import fact_change, grouped, neurons_moved, random_matrix, sites_of
from .weight_changes import CHANGES as OF_WEIGHTS

# what several layers share, which is no layer itself
SHARED = ("rule", "factors", "bank", "subspace")
# a site whose tokens matrices read -> these matrices
READERS = {"attn_in": ("q", "k", "v"), "mlp_in": ("fc1", "fc1_g", "fc1_x"), "hidden": ("fc2",)}
SPARSE = (
    "pa_fi",
    "fish_mask",
    "fish_dip",
    "ltsft",
    "diff_pruning",
    "pruned_bit_fit",
    "child_tuning",
    "spt",
    "neuro_ada",
    "gps",
    "second_order",
)


def moved(method, fields, weight, bias, found, sites):
    """(weight, bias) of one matrix or norm after merging; a bias appears where there was none."""
    if method in CHANGES:
        return CHANGES[method](weight, fields, found, sites), bias
    if method in SPARSE and "A" not in found:
        return tuple(entries_moved(value, found, part) for value, part in ((weight, "weight"), (bias, "bias")))
    if method in ("lora", "spt"):
        fields = {"alpha": None} | fields
        rank = found["A"].shape[0]
        alpha = fields["alpha"] if fields["alpha"] is not None else rank
        return weight + (alpha / rank * found["B"] @ found["A"]).reshape(weight.shape), bias
    if method == "sct":
        into = torch.eye(len(weight), dtype=weight.dtype)
        shift = torch.zeros(len(weight), dtype=weight.dtype)
        for i, place in enumerate(found["channels"].tolist()):
            shift[place] = found["bias"][i]
            for j, other in enumerate(found["channels"].tolist()):
                into[place, other] += found["weight"][i, j]
        return into @ weight, shift if bias is None else into @ bias + shift
    if method == "far":
        return neurons_moved(weight, bias, found)
    if method == "ia3":
        return found["scale"][:, None] * weight, None if bias is None else found["scale"] * bias
    if method == "rep_adapter":
        up = grouped(found, fields["groups"])
        into = torch.eye(weight.shape[1], dtype=weight.dtype) + fields["scale"] * up @ found["down.weight"]
        shift = weight @ (fields["scale"] * (up @ found["down.bias"] + found["up.bias"]))
        return weight @ into, shift if bias is None else bias + shift
    bias = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias
    if method == "bit_fit":
        return weight, bias + found["shift"]
    assert method == "ssf"
    scale = found["scale"].reshape(-1, *[1] * (weight.ndim - 1))
    return scale * weight, found["scale"] * bias + found["shift"]


def entries_moved(value, found, part):
    """A weight or bias some of whose entries have moved."""
    for values, at in ((part, f"{part}_index"), (f"{part}_before", f"{part}_before_at")):
        if values in found:
            flat = value.clone().flatten()
            for place, change in zip(found[at].tolist(), found[values], strict=True):
                flat[place] += change
            value = flat.reshape(value.shape)
    return value


def dora(weight, fields, found, sites):
    """m (W + s B A) / |W + s B A| by rows."""
    rank = found["A"].shape[0]
    scale = 1 if fields["alpha"] is None else fields["alpha"] / rank
    rows = []
    for row, b, length in zip(weight, found["B"], found["magnitude"], strict=True):
        direction = row + scale * b @ found["A"]
        rows.append(length * direction / torch.linalg.vector_norm(direction))
    return torch.stack(rows)


def vera(weight, fields, found, sites):
    """W + (b 1^T) * (B (A * d 1^T))."""
    (rows, columns), rank = weight.shape, len(found["d"])
    A, B = random_matrix(rank, columns, fields["seed"], 0), random_matrix(rows, rank, fields["seed"], 1)
    return weight + found["b"][:, None] * (B @ (A * found["d"][:, None]))


def ada_lora(weight, fields, found, sites):
    """W + s sum_i lambda_i p_i q_i^T."""
    scale = 1 if fields["alpha"] is None else fields["alpha"] / fields["initial_rank"]
    return weight + scale * sum(
        value * torch.outer(p, q) for value, p, q in zip(found["values"], found["P"].T, found["Q"], strict=True)
    )


def krona(weight, fields, found, sites):
    """W_(ij)(kl) + s A_ik B_jl."""
    change = torch.einsum("ik,jl->ijkl", found["A"], found["B"])
    return weight + fields["scale"] * change.reshape(weight.shape)


def kadaptation(weight, fields, found, sites):
    """W_(ab)(cd) + sum_ir A_iac u_irb v_ird."""
    change = torch.einsum("iac,irb,ird->abcd", sites[None, "rule"]["A"], found["u"], found["v"])
    return weight + change.reshape(weight.shape)


CHANGES = {"dora": dora, "vera": vera, "ada_lora": ada_lora, "krona": krona, "kadaptation": kadaptation} | OF_WEIGHTS


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
            for index, site, found, layer in matrices_of(sites, addresses):
                address = addresses[index, layer]
                weight, bias = address.read(weights)
                if site == "hidden":
                    weight = weight * found["scale"]
                elif method == "fact":
                    weight = weight + fact_change(sites, values, (index, site), weight.shape)
                else:
                    weight, bias = moved(method, values, weight, bias, found, sites)
                put(weights, address.weight, address.rows, weight)
                if address.bias in weights:
                    put(weights, address.bias, address.bias_rows, bias)
                elif bias is not None:
                    put_without_bias(weights, model, index, layer, bias)
    return weights


def matrices_of(sites, addresses):
    """(index, site, tensors, layer) for each matrix or norm that the tensors at a site change."""
    for (index, site), found in sites.items():
        if site in READERS:
            yield from ((index, site, found, layer) for layer in READERS[site] if (index, layer) in addresses)
        elif site not in SHARED:
            yield index, site, found, site.removesuffix("_lora")


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
