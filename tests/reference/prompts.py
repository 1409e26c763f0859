"""Prompts and adapters of images as their papers state them, with the shapes of their tensors; see `methods.py`."""

import torch

from .arithmetic import layer_norm, linear, split_heads


def gelu(x):
    """x Phi(x)."""
    return x * (1 + torch.erf(x / 2**0.5)) / 2


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
    learned = {index: found["source.tokens"] for (index, site), found in sites.items() if site == "stream_in"}
    number = fields["num_tokens"]
    return travelling(
        shape["prefix"], sorted(learned), number, lambda x, patches, i: learned[i], fields["keep"], fields["add"]
    )


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


def e2vpt(sites, fields, shape):
    """E^2VPT, arXiv 2307.13770, before pruning: fresh prompts in every block, and learned keys and values."""
    prompts = {index: found["prompts"] for (index, site), found in sites.items() if site == "stream_in"}
    first, number = shape["prefix"], fields["num_tokens"]

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


PROMPTS = {"prefix_propagation": prefix_propagation, "lpt": lpt, "e2vpt": e2vpt, "mona": mona}


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


# name of a method -> (method, depth, width) -> {(block or None, site): {tensor: shape}} of one tower
PROMPT_SHAPES = {
    "prefix_propagation": lambda method, depth, width: {
        (i, "stream_in"): {"source.tokens": (method.num_tokens, width)} for i in range(depth)
    },
    "lpt": lambda method, depth, width: {(depth // 2, "stream_in"): lpt_shapes(method, width)},
    "e2vpt": lambda method, depth, width: {
        (i, site): shapes for i in range(depth) for site, shapes in e2vpt_shapes(method, width).items()
    },
    "mona": lambda method, depth, width: {
        (i, site): mona_shapes(method, width) for i in range(depth) for site in ("stream_mid", "stream_out")
    },
}
