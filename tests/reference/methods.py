"""The methods as their papers state them: one function each, from its tensors to the edits it makes (`block.py`).

A function gets `sites`, {(block index or None, site): {parameter: tensor}} of one tower, the fields of the method, and
the `shape` of the tower ({"depth": blocks, "prefix": tokens before the patches}). It answers with one edit: a dict from
a station to a function. To add a method, write the function and enter it in METHODS.
"""

from dataclasses import replace

import torch

from .arithmetic import ACTIVATIONS, attention, join_heads, layer_norm, linear, quick_gelu, softmax, split_heads
from .block import block_forward
from .prompts import PROMPTS, unpruned
from .weight_changes import CHANGES, edit_with, random_matrix


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


def xprompt(sites, fields, shape):
    """XPrompt, arXiv 2210.04457: VPT with the tokens that were kept, zero but for the pieces that were kept."""
    tokens = round(fields["token_share"] * fields["num_tokens"])
    dense = {key: {"prompts": unpruned(found, tokens, fields)} for key, found in sites.items()}
    return vpt(dense, fields, shape)


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
    attn, mlp = ("scaled_attn", "scaled_mlp") if fields["after_scaling"] else ("attn_out", "mlp_out")
    return {
        "houlsby": {attn: at("attn_out"), mlp: at("mlp_out")},
        "pfeiffer": {mlp: at("mlp_out")},
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
    if not fields.get("before_scaling"):
        return {"beside": beside_mlp(sites, fields | {"activation": "relu"})}
    streams = {}

    def mid(y, index):
        streams[index] = y
        return y

    def mlp_out(m, index):
        return beside_mlp(sites, fields | {"activation": "relu"})(m, index, streams[index])

    return {"mid": mid, "mlp_out": mlp_out}


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


def moved_entries(values, index, like):
    """A tensor like another with values at flat indices, added up one by one, and zeros."""
    rows = like.flatten(1) if like.ndim > 1 else like  # of a convolution, one row for each output
    places = [divmod(int(i), rows[0].numel()) if rows.ndim > 1 else (int(i),) for i in index]
    unit = torch.stack(
        [torch.zeros_like(rows).index_put_(tuple(map(torch.tensor, p)), like.new_ones(())) for p in places]
    )
    return torch.tensordot(values.to(like.dtype), unit, dims=1).reshape(like.shape)


def sparse(sites, fields, shape):
    """PaFi (arXiv 2305.16742), FISH Mask (2111.09839), Child-Tuning (2109.05687): single entries of W and b move."""

    def weight(pair, index, site):
        found, moved = sites.get((index, site), {}), list(pair)
        for place, part in enumerate(("weight", "bias")):
            for values, at in (
                (part, f"{part}_index"),
                (f"{part}_before", f"{part}_before_at"),
            ):  # the latter FISH-DIP's
                if values in found:
                    moved[place] = moved[place] + moved_entries(found[values], found[at], pair[place])
        return tuple(moved)

    return {"weight": weight}


def neurons_moved(weight, bias, found):
    """W and b with the change of some rows, or W with that of some columns."""
    weight, bias, change = weight.clone(), None if bias is None else bias.clone(), found["weight"]
    index = found["index"].tolist()
    if change.shape == (len(index), weight.shape[1]):
        for place, row in zip(index, range(len(index)), strict=True):
            weight[place] += change[row]
            if bias is not None:
                bias[place] += found["bias"][row]
    else:
        for place, column in zip(index, range(len(index)), strict=True):
            weight[:, place] += change[:, column]
    return weight, bias


def far(sites, fields, shape):
    """FAR, arXiv 2205.01541: the neurons of an MLP that learn move, by rows of fc1 and columns of fc2."""

    def weight(pair, index, site):
        found = sites.get((index, site))
        return pair if found is None else neurons_moved(*pair, found)

    return {"weight": weight}


def spt(sites, fields, shape):
    """SPT, arXiv 2303.08566: besides single entries, W + B A, or a bottleneck on the output of a matrix."""
    entries = sparse(sites, fields, shape)["weight"]

    def weight(pair, index, site):
        moved, low_rank = entries(pair, index, site), sites.get((index, f"{site}_lora"))
        return moved if low_rank is None else (moved[0] + low_rank["B"] @ low_rank["A"], moved[1])

    def driven(y, index, site, x):
        found = sites.get((index, f"{site}_adapter"))
        if found is None:
            return y
        return y + bottleneck(found, {"activation": "gelu", "scale": 1}, x if site == "proj" else y)

    return {"weight": weight, "driven": driven}


def prefix_tuning(sites, fields, shape):
    """Prefix-tuning, arXiv 2101.00190: learned keys and values in front of those of the tokens."""

    def kv(pair, index, h):
        found = sites.get((index, "kv"))
        if found is None:
            return pair
        return tuple(
            torch.cat([split_heads(found[name][None], old.shape[1]).expand(len(old), -1, -1, -1), old], dim=2)
            for name, old in zip(("keys", "values"), pair, strict=True)
        )

    return {"kv": kv}


def dora(sites, fields, shape):
    """DoRA, arXiv 2402.09353: rows of V = W + (alpha / r) B A get the length m; |V| is a constant for the gradient."""

    def weight(pair, index, site):
        found = sites.get((index, site))
        if found is None:
            return pair
        rank = found["A"].shape[0]
        alpha = rank if fields["alpha"] is None else fields["alpha"]
        changed = pair[0] + alpha / rank * found["B"] @ found["A"]
        length = (changed**2).sum(1, keepdim=True).sqrt().detach()
        return found["magnitude"][:, None] * changed / length, pair[1]

    return {"weight": weight}


def vera(sites, fields, shape):
    """VeRA, arXiv 2310.11454: W + diag(b) B diag(d) A, A and B frozen."""

    def weight(pair, index, site):
        found = sites.get((index, site))
        if found is None:
            return pair
        (rows, columns), rank = pair[0].shape, len(found["d"])
        A, B = random_matrix(rank, columns, fields["seed"], 0), random_matrix(rows, rank, fields["seed"], 1)
        return pair[0] + torch.diag(found["b"]) @ B @ torch.diag(found["d"]) @ A, pair[1]

    return {"weight": weight}


def ada_lora(sites, fields, shape):
    """AdaLoRA, arXiv 2303.10512: W + s P diag(lambda) Q, in the authors' code with s = alpha / initial rank."""
    scale = 1 if fields["alpha"] is None else fields["alpha"] / fields["initial_rank"]

    def weight(pair, index, site):
        found = sites.get((index, site))
        if found is None:
            return pair
        return pair[0] + scale * found["P"] @ torch.diag(found["values"]) @ found["Q"], pair[1]

    return {"weight": weight}


def kronecker(left, right):
    """left kron right, entry by entry of left."""
    return torch.cat([torch.cat([entry * right for entry in row], dim=1) for row in left], dim=0)


def krona(sites, fields, shape):
    """KronA, arXiv 2212.10650: W + s A kron B."""

    def weight(pair, index, site):
        found = sites.get((index, site))
        if found is None:
            return pair
        return pair[0] + fields["scale"] * kronecker(found["A"], found["B"]), pair[1]

    return {"weight": weight}


def sum_of_products(rule, u, v):
    """sum_i A_i kron sum_r u_ir v_ir^T."""
    terms = []
    for A, left, right in zip(rule, u, v, strict=True):
        terms.append(kronecker(A, sum(torch.outer(a, b) for a, b in zip(left, right, strict=True))))
    return sum(terms)


def kadaptation(sites, fields, shape):
    """KAdaptation, arXiv 2203.16329: W + sum_i A_i kron (u_i v_i^T), A_i shared by all matrices."""
    rule = sites[None, "rule"]["A"]

    def weight(pair, index, site):
        found = sites.get((index, site))
        return pair if found is None else (pair[0] + sum_of_products(rule, found["u"], found["v"]), pair[1])

    return {"weight": weight}


def compacter(sites, fields, shape):
    """Compacter, arXiv 2106.04647: adapters with matrices sum_i A_i kron (u_i v_i^T), A_i shared by all of them."""
    rule = sites[None, "rule"]["A"]

    def layer(found, name, x):
        weight = sum_of_products(rule, found[f"{name}.u"], found[f"{name}.v"])
        return linear(x, weight, found[f"{name}.bias"])

    def at(site):
        def serial(x, index):
            found = sites.get((index, site))
            if found is None:
                return x
            return x + layer(found, "up", ACTIVATIONS[fields["activation"]](layer(found, "down", x)))

        return serial

    return {"attn_out": at("attn_out"), "mlp_out": at("mlp_out")}


def mam(sites, fields, shape):
    """MAM adapter, arXiv 2110.04366: prefix-tuning and a scaled ReLU adapter beside the MLP."""
    return prefix_tuning(sites, fields, shape) | adapt_former(sites, fields, shape)


def gate(found, x):
    """One number for each sample: the mean over tokens of sigmoid(w x + c)."""
    scores = linear(x, found["gate.linear.weight"], found["gate.linear.bias"])
    return (1 / (1 + torch.exp(-scores))).mean(dim=1, keepdim=True)


def unipelt(sites, fields, shape):
    """UniPELT, arXiv 2110.07577: gated LoRA, prefix and adapter behind the MLP."""

    def driven(y, index, site, x):
        found = sites.get((index, site))
        if found is None:
            return y
        A, B = found["low_rank.A"], found["low_rank.B"]
        scale = 1 if fields["alpha"] is None else fields["alpha"] / A.shape[0]
        return y + gate(found, x) * scale * linear(x, B @ A)

    def kv(pair, index, h):
        found = sites.get((index, "kv"))
        if found is None:
            return pair
        opened = gate(found, h if fields["prefix_gate"] == "input" else join_heads(pair[1]))
        longer = []
        for name, old in zip(("keys", "values"), pair, strict=True):
            prefix = opened * found[f"prefix.{name}"]
            longer.append(torch.cat([split_heads(prefix, old.shape[1]), old], dim=2))
        return tuple(longer)

    def mlp_out(m, index):
        found = sites.get((index, "mlp_out"))
        if found is None:
            return m
        own = {name.removeprefix("bottleneck."): tensor for name, tensor in found.items()}
        return m + gate(found, m) * bottleneck(own, {"activation": fields["activation"], "scale": 1}, m)

    return {"driven": driven, "kv": kv, "mlp_out": mlp_out}


def gated_vpt(sites, fields, shape):
    """GatedVPT, arXiv 2306.05067: shallow prompts, after each block but the last g P_out + (1 - g) P_in; q k^T / t."""
    (start, prompts), *_ = [(i, found["prompts"]) for (i, site), found in sites.items() if site == "stream_in"]
    last = max(index for index, site in sites if site == "kv")
    first, number = shape["prefix"], len(prompts)
    entered = {}

    def enter(state, index):
        x, present = state
        if index == start:
            x, present = torch.cat([x[:, :first], prompts.expand(len(x), -1, -1), x[:, first:]], dim=1), number
        entered[index] = x[:, first : first + number]
        return x, present

    def leave(state, index):
        x, present = state
        if not start <= index <= last:
            return state
        rest = x[:, :first], x[:, first + number :]
        if index == last:
            if fields["pooling"] == "mean":  # over prompts and patches, read in the place of the class token
                mean = x[:, first:].sum(dim=1, keepdim=True) / (x.shape[1] - first)
                rest = mean, x[:, 1:first], rest[1]
            return torch.cat(rest, dim=1), 0
        gate = 1 / (1 + torch.exp(-sites[index, "gate"]["logit"]))
        mixed = gate * x[:, first : first + number] + (1 - gate) * entered[index]
        return torch.cat([rest[0], mixed, rest[1]], dim=1), present

    def kv(pair, index, h):
        found = sites.get((index, "kv"))
        return pair if found is None else (pair[0] / found["temperature"], pair[1])

    return {"enter": enter, "leave": leave, "kv": kv}


def ia3(sites, fields, shape):
    """(IA)^3, arXiv 2205.05638: l_k * k, l_v * v, fc2(l_ff * act(fc1 x))."""

    def output(y, index, site):
        found = sites.get((index, site)) if site in ("k", "v") else None
        return y if found is None else found["scale"] * y

    def hidden(x, index):
        found = sites.get((index, "hidden"))
        return x if found is None else x * found["scale"]

    return {"output": output, "hidden": hidden}


def grouped(found, groups):
    """The matrix (D, h) of a 1 x 1 convolution in groups: part g of the outputs reads part g of the inputs."""
    up = found["up.weight"]
    outputs, inputs = len(up) // groups, up.shape[1]
    dense = torch.zeros(len(up), inputs * groups, dtype=up.dtype)
    for g in range(groups):
        for row in range(g * outputs, (g + 1) * outputs):
            dense[row, g * inputs : (g + 1) * inputs] = up[row]
    return dense


def rep_adapter(sites, fields, shape):
    """RepAdapter, arXiv 2302.08106: u + s (B (A u + a) + b) on what attention and MLP read, B in groups."""

    def at(site):
        def serial(u, index):
            found = sites.get((index, site))
            if found is None:
                return u
            hidden = linear(u, found["down.weight"], found["down.bias"])
            return u + fields["scale"] * linear(hidden, grouped(found, fields["groups"]), found["up.bias"])

        return serial

    return {"attn_in": at("attn_in"), "mlp_in": at("mlp_in")}


def convolved(images, weight, bias):
    """A 3 x 3 convolution of (batch, rows, columns, channels) with zeros outside, tap by tap."""
    batch, rows, columns, channels = images.shape
    padded = torch.zeros(batch, rows + 2, columns + 2, channels, dtype=images.dtype)
    padded[:, 1:-1, 1:-1] = images
    total = bias.expand(batch, rows, columns, -1)
    for down in range(3):
        for right in range(3):
            total = total + linear(padded[:, down : down + rows, right : right + columns], weight[:, :, down, right])
    return total


def convpass(sites, fields, shape):
    """Convpass, arXiv 2207.07039: s Up(g(Conv(g(Down u)))) beside both branches; what is no patch is a 1 x 1 image."""
    rows, columns = fields["grid"] or shape["grid"]

    def bypass(found, u):
        hidden = quick_gelu(linear(u, found["down.weight"], found["down.bias"]))
        batch, tokens, channels = hidden.shape
        first = tokens - rows * columns
        parts = [hidden[:, index].reshape(batch, 1, 1, channels) for index in range(first)]
        parts.append(hidden[:, first:].reshape(batch, rows, columns, channels))
        parts = [convolved(part, found["conv.weight"], found["conv.bias"]).flatten(1, 2) for part in parts]
        return fields["scale"] * linear(quick_gelu(torch.cat(parts, dim=1)), found["up.weight"], found["up.bias"])

    def at(site):
        def beside(x, index, u):
            found = sites.get((index, site))
            return x if found is None else x + bypass(found, u)

        return beside

    return {"aside": at("attn_in"), "joint": at("mlp_in")}


def fact_change(sites, fields, key, size):
    """dW of one matrix: parts V S_ij U of width x width, cut to its size."""
    factors, own = sites[None, "factors"], sites[key]
    rank, width = factors["U"].shape
    rows, columns = -(-size[0] // width), -(-size[1] // width)
    change = torch.zeros(rows * width, columns * width, dtype=factors["U"].dtype)
    for i in range(rows):
        for j in range(columns):
            if fields["decomposition"] == "tt":
                inner = own["S"][i * rank : (i + 1) * rank, j * rank : (j + 1) * rank]
            else:
                inner = sum(factors["core"][:, :, s] * own["P"][s, i * columns + j] for s in range(rank))
            part = factors["V"] @ inner @ factors["U"]
            change[i * width : (i + 1) * width, j * width : (j + 1) * width] = part
    return fields["scale"] * change[: size[0], : size[1]]


def fact(sites, fields, shape):
    """FacT, arXiv 2212.03145: W + s dW with factors that all matrices share, tensor train or Tucker."""

    def weight(pair, index, site):
        if (index, site) not in sites:
            return pair
        return pair[0] + fact_change(sites, fields, (index, site), pair[0].shape), pair[1]

    return {"weight": weight}


def molora(sites, fields, shape):
    """MoLORA, arXiv 2309.05444: y + alpha / r sum_e softmax(G x)_e B_e A_e x, expert by expert."""

    def driven(y, index, site, x):
        found = sites.get((index, site))
        if found is None:
            return y
        experts, rank = found["A"].shape[:2]
        share = softmax(linear(x, found["router.weight"]))
        scale = 1 if fields["alpha"] is None else fields["alpha"] / rank
        for e in range(experts):
            y = y + scale * share[..., e : e + 1] * linear(x, found["B"][e] @ found["A"][e])
        return y

    return {"driven": driven}


def ada_mix(sites, fields, shape):
    """AdaMix, arXiv 2205.12410, in use: an adapter behind the MLP whose weights are the means of those trained."""

    def mlp_out(m, index):
        found = sites.get((index, "mlp_out"))
        if found is None:
            return m
        mean = {name: sum(tensor.unbind()) / len(tensor) for name, tensor in found.items()}
        own = {name.replace("_", "."): tensor for name, tensor in mean.items()}
        return m + bottleneck(own, {"activation": fields["activation"], "scale": 1}, m)

    return {"mlp_out": mlp_out}


def mix_lora(sites, fields, shape):
    """MixLoRA, arXiv 2404.15159: the MLPs of the best experts, each with W + alpha / r B_e A_e, by their shares."""
    scale = 1 if fields["alpha"] is None else fields["alpha"] / fields["rank"]

    def experts(h, index, branch):
        router = sites[index, "mlp_in"]["router.weight"]
        share = softmax(linear(h, router))
        order = share.argsort(dim=-1, descending=True)[..., : fields["top"]]
        kept = torch.zeros_like(share).scatter(-1, order, 1.0) * share
        kept = kept / kept.sum(-1, keepdim=True)

        def expert(e):
            def weight(pair, at, site):
                found = sites.get((at, site)) if site.startswith("fc") else None
                return pair if found is None else (pair[0] + scale * found["B"][e] @ found["A"][e], pair[1])

            return {"weight": weight}

        return sum(kept[..., e : e + 1] * branch(expert(e)) for e in range(len(router)))

    attention = {key: found for key, found in sites.items() if key[1] in ("q", "k", "v", "proj")}
    return lora(attention, fields, shape) | {"experts": experts}


def parts_of(found, fields):
    """(fields, tensors) of each source of a method over trained adapters, at one place."""
    parts = []
    for number, own in enumerate(fields["sources"]):
        start = f"frozen.{number}."
        parts.append((own, {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}))
    return parts


def mole(sites, fields, shape):
    """MoLE, arXiv 2404.13628: y + sum_n g_n d_n, g a softmax over the normalised changes d_n side by side."""

    def driven(y, index, site, x):
        found = sites.get((index, site))
        if found is None:
            return y
        changes = []
        for own, part in parts_of(found, fields):
            scale = 1 if own["alpha"] is None else own["alpha"] / own["rank"]
            changes.append(scale * linear(x, part["B"] @ part["A"]))
        gates = softmax(linear(layer_norm(torch.cat(changes, -1), None, None, 1e-5), found["router.weight"]))
        return y + sum(gates[..., n : n + 1] * change for n, change in enumerate(changes))

    return {"driven": driven}


def hyper_former(sites, fields, shape):
    """HyperFormer++, arXiv 2106.04489, for one task: x + s norm(U gelu(D x)) + b, all linear in MLP([z; l; p])."""
    net = sites[None, "network"]

    def at(position):
        def serial(x, index):
            given = torch.cat([net["tasks"][0], net["layers"][index], net["positions"][position]])
            hidden = linear(given, net["project.0.weight"], net["project.0.bias"]).clamp(min=0)
            embedded = linear(hidden, net["project.2.weight"], net["project.2.bias"])
            change = linear(ACTIVATIONS["gelu"](linear(x, net["down"] @ embedded)), net["up"] @ embedded)
            return x + layer_norm(change, net["scale"] @ embedded, net["shift"] @ embedded, 1e-5)

        return serial

    return {"attn_out": at(0), "mlp_out": at(1)}


def moa(sites, fields, shape):
    """MoA, arXiv 2403.03432, in use: y + d_n of the low-rank change n whose share softmax(G mean token) is largest."""

    def driven(y, index, site, x):
        found = sites.get((index, site))
        if found is None:
            return y
        shares = softmax(linear(x.mean(dim=1), found["router.weight"]))
        parts, chosen = parts_of(found, fields), []
        for row, share in zip(x, shares, strict=True):
            kept = share - share.detach()  # zero, with the gradient of the share
            kept[share.argmax()] += 1
            changes = [
                (1 if own["alpha"] is None else own["alpha"] / own["rank"]) * linear(row, part["B"] @ part["A"])
                for own, part in parts
            ]
            chosen.append(sum(one * change for one, change in zip(kept, changes, strict=True)))
        return y + torch.stack(chosen)

    return {"driven": driven}


def adapter_fusion(sites, fields, shape):
    """AdapterFusion, arXiv 2005.00247: x + sum_n softmax_n(Q x . K z_n) V z_n, z_n what adapter n gives for x."""

    def mlp_out(x, index):
        found = sites.get((index, "mlp_out"))
        if found is None:
            return x
        given = [bottleneck(part, own, x) for own, part in parts_of(found, fields)]
        query = linear(x, found["query.weight"], found["query.bias"])
        keys = [linear(z, found["key.weight"], found["key.bias"]) for z in given]
        scores = torch.stack([(query * key).sum(-1) for key in keys], dim=-1) / fields["temperature"]
        shares = softmax(scores)
        return x + sum(shares[..., n : n + 1] * linear(z, found["value.weight"]) for n, z in enumerate(given))

    return {"mlp_out": mlp_out}


def mov(sites, fields, shape):
    """MoV, arXiv 2309.05444: u sum_e softmax(G u)_e s_e on the keys and values of each head and on hidden u."""

    def scaled(u, found, width):
        parts = []
        for part, scales in zip(u.split(width, dim=-1), found["scales"].split(width, dim=-1), strict=True):
            share = softmax(linear(part, found["router.weight"]))
            parts.append(part * sum(share[..., e : e + 1] * scale for e, scale in enumerate(scales)))
        return torch.cat(parts, dim=-1)

    def output(y, index, site):
        found = sites.get((index, site)) if site in ("k", "v") else None
        return y if found is None else scaled(y, found, found["router.weight"].shape[1])

    def hidden(x, index):
        found = sites.get((index, "hidden"))
        return x if found is None else scaled(x, found, x.shape[-1])

    return {"output": output, "hidden": hidden}


def dtl(sites, fields, shape):
    """DTL, arXiv 2312.07856: h_{i+1} = h_i + B_i A_i x_i beside the blocks, h sigmoid(beta h) after the later ones."""
    first = shape["depth"] // 2 if fields["first"] is None else fields["first"]
    kernels = sites.get((None, "convolution"))
    path = {}

    def enter(state, index):
        found = sites[index, "stream_in"]
        step = linear(state[0], found["B"] @ found["A"])
        path["h"] = step if index == 0 else path["h"] + step
        return state

    def leave(state, index):
        x, prompts = state
        if index >= first:
            change = path["h"] * (1 + torch.tanh(fields["beta"] * path["h"] / 2)) / 2  # exp of -beta h overflows
            if kernels is not None:
                rows, columns = fields["grid"] or shape["grid"]
                change[:, shape["prefix"] :] = by_channel(change, rows, columns, kernels["conv.weight"])
            x = x + change
        if fields["pooling"] == "mean" and index == shape["depth"] - 1:
            patches = x[:, shape["prefix"] :]
            x = torch.cat([patches.sum(1, keepdim=True) / patches.shape[1], x[:, 1:]], dim=1)
        return x, prompts

    return {"enter": enter, "leave": leave}


def by_channel(x, rows, columns, weight):
    """The patches of x, the last tokens, after a 3 x 3 kernel for each channel, tap by tap, zeros outside."""
    batch, _, channels = x.shape
    padded = torch.zeros(batch, rows + 2, columns + 2, channels, dtype=x.dtype)
    padded[:, 1:-1, 1:-1] = x[:, -rows * columns :].reshape(batch, rows, columns, channels)
    taps = [(down, right) for down in range(3) for right in range(3)]
    return sum(padded[:, d : d + rows, r : r + columns] * weight[:, 0, d, r] for d, r in taps).flatten(1, 2)


def side_block(found, heads, s):
    """A transformer block with its norms before attention and MLP."""

    def layer(name, x):
        return linear(x, found[f"block.{name}.weight"], found[f"block.{name}.bias"])

    def normed(name, x):
        return layer_norm(x, found[f"block.{name}.weight"], found[f"block.{name}.bias"], 1e-6)

    q, k, v = (split_heads(part, heads) for part in layer("attn.qkv", normed("norm1", s)).chunk(3, dim=-1))
    s = s + layer("attn.proj", join_heads(attention(q, k, v, None)))
    return s + layer("mlp.fc2", ACTIVATIONS["gelu"](layer("mlp.fc1", normed("norm2", s))))


def lst(sites, fields, shape):
    """LST, arXiv 2206.06522: s <- block(g s + (1 - g) D x) with g = sigmoid(a / T), and U norm(s) at the end."""
    state = {}

    def enter(entered, index):
        if index == 0:
            found = sites[0, "stream_in"]
            state["s"] = linear(entered[0], found["start.weight"], found["start.bias"])
        return entered

    def leave(left, index):
        x, prompts = left
        found = sites.get((index, "stream_in"), {})
        if index not in fields["dropped"]:
            gate = 1 / (1 + torch.exp(-found["gate"] / fields["temperature"]))
            ladder = linear(x, found["down.weight"], found["down.bias"])
            state["s"] = side_block(found, shape["heads"], gate * state["s"] + (1 - gate) * ladder)
        if index == shape["depth"] - 1:
            normed = layer_norm(state["s"], found["norm.weight"], found["norm.bias"], 1e-6)
            x = linear(normed, found["up.weight"], found["up.bias"])
        return x, prompts

    return {"enter": enter, "leave": leave}


def sct(sites, fields, shape):
    """SCT, arXiv 2309.08513: u_c + W_c u_S + b_c for the channels c of S, after the attention or a layer."""

    def mapped(u, found):
        changed, chosen = u.clone(), found["channels"].tolist()
        for i, channel in enumerate(chosen):
            moved = sum(found["weight"][i, j] * u[..., other] for j, other in enumerate(chosen))
            changed[..., channel] = u[..., channel] + moved + found["bias"][i]
        return changed

    def output(y, index, site):
        found = sites.get((index, site))
        return y if found is None else mapped(y, found)

    def mid(y, index):
        found = sites.get((index, "stream_mid"))
        return y if found is None else mapped(y, found)

    return {"output": output, "mid": mid}


def vqt(sites, fields, shape):
    """VQT, arXiv 2212.03220: queries pass a block with keys and values of its tokens; the head reads what they get."""
    got = []

    def time(x, index, block, weights):
        if index == 0:
            got.clear()
        borrowed = []
        block_forward(block, weights, x, 0, index, [{"kv": lambda pair, _, h: borrowed.append(pair) or pair}])
        apart = replace(block, rope=None, logit_bias=None)
        queries = sites[index, "kv"]["prompts"].expand(len(x), -1, -1)
        got.append(block_forward(apart, weights, queries, 0, index, [{"kv": lambda pair, _, h: borrowed[0]}])[0])
        return x

    def features(x):
        parts = [x, *(z.reshape(len(z), -1) for z in got)]
        return torch.cat([part / (part**2).sum(-1, keepdim=True).sqrt() for part in parts], dim=-1)

    return {"time": time, "features": features}


METHODS = {
    "vqt": vqt,
    "lst": lst,
    "dtl": dtl,
    "sct": sct,
    "molora": molora,
    "mole": mole,
    "moa": moa,
    "hyper_former": hyper_former,
    "adapter_fusion": adapter_fusion,
    "mix_lora": mix_lora,
    "ada_mix": ada_mix,
    "mov": mov,
    "gated_vpt": gated_vpt,
    "ia3": ia3,
    "rep_adapter": rep_adapter,
    "convpass": convpass,
    "fact": fact,
    "dora": dora,
    "vera": vera,
    "ada_lora": ada_lora,
    "krona": krona,
    "kadaptation": kadaptation,
    "compacter": compacter,
    "mam": mam,
    "unipelt": unipelt,
    "lora": lora,
    "vpt": vpt,
    "xprompt": xprompt,
    "adapter": adapter,
    "adapt_former": adapt_former,
    "ssf": ssf,
    "bit_fit": bit_fit,
    "prefix_tuning": prefix_tuning,
    "pa_fi": sparse,
    "fish_mask": sparse,
    "fish_dip": sparse,
    "far": far,
    "ltsft": sparse,
    "diff_pruning": sparse,
    "pruned_bit_fit": sparse,
    "child_tuning": sparse,
    "neuro_ada": sparse,
    "gps": sparse,
    "second_order": sparse,
    "spt": spt,
    **PROMPTS,
    **{name: edit_with(change) for name, change in CHANGES.items()},
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
