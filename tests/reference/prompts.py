"""Prompts and adapters of images as their papers state them, with the shapes of their tensors; see `methods.py`."""

import torch

from .arithmetic import ACTIVATIONS, gelu, layer_norm, linear, patches_of, softmax, split_heads


def travelling(first, span, number, fresh, keep=1.0, add=0.0):
    """Prompts after the prefix tokens: fresh(x, present, index) before the first block of a span, and before each
    other one keep * prompts + add * fresh.
    """

    def enter(state, index):
        x, present = state
        if index not in span:
            return state
        if index == span[0]:
            prompts = fresh(x, first + present, index).expand(len(x), -1, -1)
        else:
            prompts = keep * x[:, first : first + number]
            prompts = prompts + add * fresh(x, first + present, index) if add else prompts
        return torch.cat([x[:, :first], prompts, x[:, first + present :]], dim=1), number

    def leave(state, index):
        x, present = state
        return (torch.cat([x[:, :first], x[:, first + number :]], dim=1), 0) if index == span[-1] else (x, present)

    return {"enter": enter, "leave": leave}


def summary(x, prefix, patches):
    """The class token, or the mean of the tokens from `patches` on."""
    return x[:, 0] if prefix else x[:, patches:].sum(dim=1) / (x.shape[1] - patches)


def prefix_propagation(sites, fields, shape):
    """Prefix-propagation, arXiv 2305.12086: x_P <- x_P + P_l before every block."""
    learned = {index: found["source.prompts"] for (index, site), found in sites.items() if site == "stream_in"}
    number = fields["num_tokens"]
    return travelling(
        shape["prefix"], sorted(learned), number, lambda x, patches, i: learned[i], fields["keep"], fields["add"]
    )


def selective_prompts(sites, fields, shape):
    """SPT, EMNLP 2023: x_P <- (1 - g) x_P + g P_l, g = sigmoid(a), or after the selection x_P <- P_l in some blocks."""
    learned = {index: found for (index, site), found in sites.items() if site == "stream_in"}
    first, number, start = shape["prefix"], fields["num_tokens"], min(learned)

    def enter(state, index):
        x, present = state
        if index not in learned:
            return state
        prompts = learned[index]["source.prompts"].expand(len(x), -1, -1)
        if index != start and "gate" in learned[index]:
            share = 1 / (1 + torch.exp(-learned[index]["gate"]))
            prompts = (1 - share) * x[:, first : first + number] + share * prompts
        return torch.cat([x[:, :first], prompts, x[:, first + present :]], dim=1), number

    def leave(state, index):
        x, present = state
        if index != shape["depth"] - 1:
            return state
        return torch.cat([x[:, :first], x[:, first + present :]], dim=1), 0

    return {"enter": enter, "leave": leave}


def lpt(sites, fields, shape):
    """LPT, arXiv 2210.11292: prompts from the state before block m, for block m and those after it."""
    ((start, _), found), *_ = sites.items()
    prefix, number = shape["prefix"], fields["num_tokens"]

    def fresh(x, patches, index):
        layer = {part: (found[f"source.{part}.weight"], found[f"source.{part}.bias"]) for part in ("down", "up")}
        if fields["reads"] == "class":
            hidden = linear(summary(x, prefix, patches), *layer["down"]).clamp(min=0)
            return linear(hidden, *layer["up"]).reshape(len(x), number, -1)
        hidden = linear(x[:, patches:], *layer["down"]).clamp(min=0)
        tokens = hidden.shape[1]
        runs = [(i * tokens // number, -(-(i + 1) * tokens // number)) for i in range(number)]
        return linear(torch.stack([hidden[:, a:b].sum(1) / (b - a) for a, b in runs], dim=1), *layer["up"])

    return travelling(prefix, range(start, shape["depth"]), number, fresh)


def unpruned(found, tokens, fields):
    """Prompts (tokens, width), of which `found` has all, or the pieces that were kept, the others being zero."""
    if "prompts" in found:
        return found["prompts"]
    rows = [torch.zeros(found["pieces"].shape[1], dtype=torch.float64)] * (tokens * fields["pieces"])
    for place, piece in zip(found["piece_index"].tolist(), found["pieces"], strict=True):
        rows[place] = piece
    return torch.cat(rows).view(tokens, -1)


def e2vpt(sites, fields, shape):
    """E^2VPT, arXiv 2307.13770, pruned or not: fresh prompts in every block, and learned keys and values."""
    kept = max(1, round(fields["token_share"] * fields["num_tokens"]))
    prompts = {index: unpruned(found, kept, fields) for (index, site), found in sites.items() if site == "stream_in"}
    first, number = shape["prefix"], len(next(iter(prompts.values()), ()))

    def enter(state, index):
        x, _ = state
        if index not in prompts:
            return state
        return torch.cat([x[:, :first], prompts[index].expand(len(x), -1, -1), x[:, first:]], dim=1), number

    def leave(state, index):
        x, present = state
        return torch.cat([x[:, :first], x[:, first + present :]], dim=1), 0

    def kv(pair, index, h):
        found = sites.get((index, "kv"))
        if found is None:
            return pair
        own = found["keys"], found["keys"] if fields["shared"] else found["values"]
        return tuple(
            torch.cat([split_heads(new[None], old.shape[1]).expand(len(old), -1, -1, -1), old], dim=2)
            for new, old in zip(own, pair, strict=True)
        )

    return {"enter": enter, "leave": leave, "kv": kv}


def depthwise(images, weight, bias):
    """Each channel of (batch, rows, columns, channels) convolved with a kernel of its own, zeros outside, by taps."""
    size = weight.shape[-1]
    reach = size // 2
    batch, rows, columns, channels = images.shape
    padded = torch.zeros(batch, rows + 2 * reach, columns + 2 * reach, channels, dtype=images.dtype)
    padded[:, reach : reach + rows, reach : reach + columns] = images
    total = bias.expand(batch, rows, columns, -1)
    for down in range(size):
        for right in range(size):
            total = total + padded[:, down : down + rows, right : right + columns] * weight[:, 0, down, right]
    return total


def mona(sites, fields, shape):
    """Mona, CVPR 2025: x + Up(gelu(M(Down(s1 LN(x) + s2 x)))) on the stream after attention and after the MLP."""
    rows, columns = fields["grid"] or shape["grid"]

    def at(site):
        def serial(x, index):
            found = sites.get((index, site))
            if found is None:
                return x
            u = found["norm_scale"] * layer_norm(x, found["norm.weight"], found["norm.bias"], 1e-5) + found["scale"] * x
            h = linear(u, found["down.weight"], found["down.bias"])
            first = h.shape[1] - rows * columns
            parts = [h[:, i].reshape(len(h), 1, 1, -1) for i in range(first)]
            parts.append(h[:, first:].reshape(len(h), rows, columns, -1))
            for place, z in enumerate(parts):
                several = [depthwise(z, found[f"depthwise.{i}.weight"], found[f"depthwise.{i}.bias"]) for i in range(3)]
                z = z + (several[0] + several[1] + several[2]) / 3
                z = z + linear(z, found["pointwise.weight"], found["pointwise.bias"])
                parts[place] = z.flatten(1, 2)
            h = torch.cat(parts, dim=1)
            return x + linear(gelu(h), found["up.weight"], found["up.bias"])

        return serial

    return {"mid": at("stream_mid"), "exit": at("stream_out")}


def kronecker_product_sum(A, S):
    """sum_i A_i kron S_i, entry by entry of A_i."""
    return sum(torch.cat([torch.cat([a * s for a in row], 1) for row in each], 0) for each, s in zip(A, S, strict=True))


def idpg(sites, fields, shape):
    """IDPG, arXiv 2204.04497: x_P <- x_P + G(h) + c_l before every block, h the class token, or the mean patch."""
    shared, number = sites[None, "generator"], fields["num_tokens"]
    biases = {index: found["source.c"] for (index, site), found in sites.items() if site == "stream_in"}
    down, up = (kronecker_product_sum(shared[f"{part}.A"], shared[f"{part}.S"]) for part in ("down", "up"))

    def fresh(x, patches, index):
        h = summary(x, shape["prefix"] if index else 0, patches)
        return linear(gelu(linear(h, down, shared["bias"])), up).reshape(len(x), number, -1) + biases[index]

    return travelling(shape["prefix"], sorted(biases), number, fresh, 1.0, 1.0)


def p_tuning(sites, fields, shape):
    """P-tuning, arXiv 2103.10385, with its MLP alone: shallow prompts W2 relu(W1 E)."""
    found = sites[0, "stream_in"]

    def fresh(x, patches, index):
        hidden = linear(found["source.embedding"], found["source.fc1.weight"], found["source.fc1.bias"]).clamp(min=0)
        return linear(hidden, found["source.fc2.weight"], found["source.fc2.bias"])

    return travelling(shape["prefix"], range(shape["depth"]), fields["num_tokens"], fresh)


def decomposed_prompt_tuning(sites, fields, shape):
    """DePT, arXiv 2309.05173: shallow prompts, and s A B added to all embeddings by position."""
    change, prompts = sites[None, "tokens"], sites[0, "stream_in"]["source.prompts"]
    scale = 1 if fields["alpha"] is None else fields["alpha"] / len(change["B"]) ** 0.5
    edit = travelling(shape["prefix"], range(shape["depth"]), len(prompts), lambda x, patches, index: prompts)
    return edit | {"tokens": lambda x: x + scale * linear(change["A"], change["B"].T)}


def smop(sites, fields, shape):
    """SMoP, EMNLP 2023: the prompts with the largest softmax(W m), times it; m the mean embedded patch."""
    found = sites[0, "stream_in"]

    def fresh(x, patches, index):
        shares = softmax(linear(summary(x, 0, patches), found["source.router"]))
        best = [max(range(len(row)), key=row.tolist().__getitem__) for row in shares]
        return torch.stack([row[e] * found["source.prompts"][e] for row, e in zip(shares, best, strict=True)])

    return travelling(shape["prefix"], range(shape["depth"]), fields["num_tokens"], fresh)


def apt(sites, fields, shape):
    """APT, arXiv 2305.15212: prefix keys and values times lambda sigmoid(W h), h the class token."""

    def kv(pair, index, h):
        found = sites.get((index, "kv"))
        if found is None:
            return pair
        scores = linear(summary(h, shape["prefix"], 0), found["gate.weight"], found["gate.bias"])
        gates = found["level"] / (1 + torch.exp(-scores))
        longer = []
        for name, old in zip(("keys", "values"), pair, strict=True):
            prefix = torch.stack([gate[:, None] * found[name] for gate in gates])
            longer.append(torch.cat([split_heads(prefix, old.shape[1]), old], dim=2))
        return tuple(longer)

    return {"kv": kv}


def pixel_prompt(sites, fields, shape):
    """Visual prompting, arXiv 2203.17274: x + frame, here as the patches of the frame through the same matrix."""
    found, width = sites[None, "patch_embed"], fields["width"]
    size = found["top"].shape[2], found["left"].shape[1] + 2 * width
    frame = torch.zeros(1, len(found["top"]), size[1], size[0], dtype=found["top"].dtype)
    frame[0, :, :width], frame[0, :, -width:] = found["top"], found["bottom"]
    frame[0, :, width:-width, :width], frame[0, :, width:-width, -width:] = found["left"], found["right"]
    rows, columns = fields["grid"] or shape["grid"]
    used = {}

    def weight(pair, index, site):
        if site == "patch_embed":
            used["weight"] = pair[0]
        return pair

    def output(y, index, site):
        if site != "patch_embed":
            return y
        return y + linear(patches_of(frame, (size[1] // rows, size[0] // columns)), used["weight"])

    return {"weight": weight, "output": output}


def ciat(sites, fields, shape):
    """CIAT, arXiv 2104.08154: attn(u) + A(u), mlp(u) + A(u), and x + A(LN(x)) on the embeddings."""
    act, read = ACTIVATIONS[fields["activation"]], {}

    def adapter(found, u, start=""):
        hidden = act(linear(u, found[f"{start}down.weight"], found[f"{start}down.bias"]))
        return linear(hidden, found[f"{start}up.weight"], found[f"{start}up.bias"])

    def keep(site):
        def reading(u, index):
            read[index, site] = u
            return u

        return reading

    def add(site):
        def adding(y, index):
            found = sites.get((index, site))
            return y if found is None else y + adapter(found, read[index, site])

        return adding

    def tokens(x):
        found = sites.get((None, "tokens"))
        if found is None:
            return x
        return x + adapter(found, layer_norm(x, found["norm.weight"], found["norm.bias"], 1e-5), "adapter.")

    edit = {"attn_in": keep("attn_in"), "attn_out": add("attn_in"), "mlp_in": keep("mlp_in"), "mlp_out": add("mlp_in")}
    return edit | {"tokens": tokens}


def soft_top_k(scores, k, temperature):
    """Coordinate descent of CoDA: weights that add up to k, near one for the k largest."""
    above = scores.clone()  # max(0, s + a), but s itself at first
    for step in range(20):
        e = max(temperature, 4 * 0.7**step)
        a = e * torch.log(k / torch.exp((scores - above) / e).sum(-1, keepdim=True))
        above = (scores + a).clamp(min=0)
    return torch.exp((scores + a - above) / e)


def coda(sites, fields, shape):
    """CoDA, arXiv 2304.04947: all patches pass an adapter, those of the k largest scores the block, times a weight."""
    aside = {}

    def enter(state, index):
        x, present = state
        found = sites.get((index, "stream_in"))
        if found is None:
            return state
        first = shape["prefix"] + present
        scores = layer_norm(x[:, first:], None, None, 1e-5) @ found["router"]
        k = -(-scores.shape[1] // fields["reduction"])
        weights = soft_top_k(scores, k, fields["temperature"])
        chosen = scores.sort(dim=1, descending=True).indices[:, :k]
        sent = torch.stack([torch.cat([row[:first], row[first:][own]]) for row, own in zip(x, chosen, strict=True)])
        aside[index] = x, sent, first, chosen, weights
        return sent, present

    def leave(state, index):
        z, present = state
        found = sites.get((index, "stream_out"))
        if found is None:
            return state
        x, sent, first, chosen, weights = aside[index]
        hidden = linear(layer_norm(x, None, None, 1e-5), found["adapter.down.weight"], found["adapter.down.bias"])
        whole = x + linear(hidden.clamp(min=0), found["adapter.up.weight"], found["adapter.up.bias"])
        rows = []
        for row, own, gained, weight in zip(whole, chosen.tolist(), z - sent, weights, strict=True):
            tokens = list(row)
            for place in range(first):
                tokens[place] = tokens[place] + gained[place]
            for place, patch in enumerate(own):
                tokens[first + patch] = tokens[first + patch] + weight[patch] * gained[first + place]
            rows.append(torch.stack(tokens))
        return torch.stack(rows), present

    return {"enter": enter, "leave": leave}


PROMPTS = {
    "coda": coda,
    "prefix_propagation": prefix_propagation,
    "lpt": lpt,
    "selective_prompts": selective_prompts,
    "e2vpt": e2vpt,
    "mona": mona,
    "idpg": idpg,
    "ptuning": p_tuning,
    "decomposed_prompt_tuning": decomposed_prompt_tuning,
    "smop": smop,
    "apt": apt,
    "pixel_prompt": pixel_prompt,
    "ciat": ciat,
}


def linear_shapes(name, rows, columns):
    """Weight and bias of one linear layer."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def mona_shapes(method, width):
    """Tensors of one of the two adapters of a block."""
    inner = method.bottleneck
    shapes = {name: (width,) for name in ("norm.weight", "norm.bias", "norm_scale", "scale")}
    for index, size in enumerate((3, 5, 7)):
        shapes |= {f"depthwise.{index}.weight": (inner, 1, size, size), f"depthwise.{index}.bias": (inner,)}
    shapes |= linear_shapes("pointwise", inner, inner)
    return shapes | linear_shapes("down", inner, width) | linear_shapes("up", width, inner)


def lpt_shapes(method, width):
    """Tensors of the generator."""
    outputs = method.num_tokens * width if method.reads == "class" else width
    inner = method.bottleneck
    return linear_shapes("source.down", inner, width) | linear_shapes("source.up", outputs, inner)


def e2vpt_shapes(method, width):
    """Tensors of one block, by site."""
    kept = {"keys": (method.num_keys, width)}
    kept |= {} if method.shared else {"values": (method.num_keys, width)}
    return {"stream_in": {"prompts": (method.num_tokens, width)}, "kv": kept}


def idpg_shapes(method, shape, width):
    """Tensors of the generator and of the biases."""
    n, inner, number = method.terms, method.bottleneck, method.num_tokens
    shared = {"down.A": (n, n, n), "down.S": (n, inner // n, width // n), "bias": (inner,)}
    shared |= {"up.A": (n, n, n), "up.S": (n, number * width // n, inner // n)}
    return {(None, "generator"): shared} | {
        (i, "stream_in"): {"source.c": (number, width)} for i in range(shape["depth"])
    }


def apt_shapes(method, width):
    """Tensors of one block."""
    number = method.num_tokens
    return (
        {name: (number, width) for name in ("keys", "values")} | linear_shapes("gate", number, width) | {"level": (1,)}
    )


def decomposed_shapes(method, shape, width):
    """Tensors of the change of positions, class and register tokens included, and of the prompts."""
    rows, columns = method.grid or shape["grid"]
    change = {"A": (shape["prefix"] + rows * columns, method.rank), "B": (method.rank, width)}
    return {(None, "tokens"): change, (0, "stream_in"): {"source.prompts": (method.num_tokens, width)}}


def frame_shapes(method, shape):
    """Tensors of a frame of images whose patches are 8 x 8 pixels."""
    border, (height, width) = method.width, (8 * side for side in method.grid or shape["grid"])
    across, down = (3, border, width), (3, height - 2 * border, border)
    return {"top": across, "bottom": across, "left": down, "right": down}


def ciat_shapes(method, shape, width):
    """Tensors of the adapters."""
    inner = method.bottleneck

    def one(start=""):
        return linear_shapes(f"{start}down", inner, width) | linear_shapes(f"{start}up", width, inner)

    found = {(i, site): one() for i in range(shape["depth"]) for site in ("attn_in", "mlp_in")}
    return found | {(None, "tokens"): {"norm.weight": (width,), "norm.bias": (width,)} | one("adapter.")}


# name of a method -> (method, shape, width) -> {(block or None, site): {tensor: shape}} of one tower
PROMPT_SHAPES = {
    "coda": lambda method, shape, width: {
        (i, site): shapes
        for i in range(shape["depth"] - shape["class_token_alone"])
        for site, shapes in {
            "stream_in": {"router": (width,)},
            "stream_out": linear_shapes("adapter.down", method.bottleneck, width)
            | linear_shapes("adapter.up", width, method.bottleneck),
        }.items()
    },
    "prefix_propagation": lambda method, shape, width: {
        (i, "stream_in"): {"source.prompts": (method.num_tokens, width)} for i in range(shape["depth"])
    },
    "lpt": lambda method, shape, width: {(shape["depth"] // 2, "stream_in"): lpt_shapes(method, width)},
    "e2vpt": lambda method, shape, width: {
        (i, site): shapes for i in range(shape["depth"]) for site, shapes in e2vpt_shapes(method, width).items()
    },
    "mona": lambda method, shape, width: {
        (i, site): mona_shapes(method, width) for i in range(shape["depth"]) for site in ("stream_mid", "stream_out")
    },
    "idpg": idpg_shapes,
    "smop": lambda method, shape, width: {
        (0, "stream_in"): {
            "source.prompts": (method.experts, method.num_tokens, width),
            "source.router": (method.experts, width),
        }
    },
    "apt": lambda method, shape, width: {(i, "kv"): apt_shapes(method, width) for i in range(shape["depth"])},
    "decomposed_prompt_tuning": decomposed_shapes,
    "pixel_prompt": lambda method, shape, width: {(None, "patch_embed"): frame_shapes(method, shape)},
    "ciat": ciat_shapes,
    "ptuning": lambda method, shape, width: {
        (0, "stream_in"): {"source.embedding": (method.num_tokens, width)}
        | linear_shapes("source.fc1", method.hidden, width)
        | linear_shapes("source.fc2", width, method.hidden)
    },
}
