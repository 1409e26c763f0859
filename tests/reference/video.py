"""Methods for clips as their papers state them, to the edits of `block.py`, and what becomes of the frames' features.

Tokens are (clips * frames, tokens, width), the frames of a clip in order.
"""

import torch

from .anatomy import shapes_of
from .arithmetic import gelu, layer_norm, linear, rotate, softmax, split_heads
from .backbones import forward
from .methods import METHODS, sites_of


def st_adapter(sites, fields, shape):
    """ST-Adapter, arXiv 2206.13559: z + Up(DWConv3D(Down(z))) on the patches; the final norm is of the frames' mean."""
    first = {"stream_in": "before_attention", "stream_mid": "before_mlp"}

    def at(site, x, index):
        found = sites.get((index, site))
        if found is None:
            return x
        assert first[site] in fields["positions"]
        rows, columns = shape["grid"]
        number = rows * columns
        rest, patches = x[:, :-number], x[:, -number:]
        h = linear(patches, found["down.weight"], found["down.bias"])
        h = h.reshape(-1, shape["frames"], rows, columns, h.shape[-1])
        h = depthwise(h, found["conv.weight"], found["conv.bias"]).reshape(len(x), number, -1)
        return torch.cat([rest, patches + linear(h, found["up.weight"], found["up.bias"])], dim=1)

    def leave(state, index):
        if index < shape["depth"] - 1 or not fields["norm_of_mean"]:
            return state
        z, prompts = state
        clips = z.reshape(-1, shape["frames"], *z.shape[1:])
        mean = sum(clips[:, t] for t in range(shape["frames"])) / shape["frames"]
        return torch.stack([mean] * shape["frames"], dim=1).reshape(z.shape), prompts

    return {
        "time": lambda x, index, block, weights: at("stream_in", x, index),
        "mid": lambda x, index: at("stream_mid", x, index),
        "leave": leave,
    }


def depthwise(h, weight, bias):
    """Correlation of each channel of h (clips, frames, rows, columns, channels) with its own kernel, zeros outside."""
    sizes, kernel = h.shape[1:4], weight.shape[2:]
    padded = torch.zeros(
        len(h), *(n + k - 1 for n, k in zip(sizes, kernel, strict=True)), h.shape[-1], dtype=h.dtype
    )  # fmt: skip
    inner = tuple(slice(k // 2, k // 2 + n) for n, k in zip(sizes, kernel, strict=True))
    padded[(slice(None), *inner)] = h
    total = bias.expand_as(h)
    for a in range(kernel[0]):
        for b in range(kernel[1]):
            for c in range(kernel[2]):
                moved = padded[:, a : a + sizes[0], b : b + sizes[1], c : c + sizes[2]]
                total = total + moved * weight[:, 0, a, b, c]
    return total


def aim(sites, fields, shape):
    """AIM, arXiv 2302.03024: the attention in time, then in space, then the MLP, each with its adapter."""

    def adapter(found, name, x):
        h = gelu(linear(x, found[f"{name}down.weight"], found[f"{name}down.bias"]))
        return linear(h, found[f"{name}up.weight"], found[f"{name}up.bias"])

    def tokens(x):
        embedding = sites[None, "tokens"]["embedding"]
        assert len(embedding) == shape["frames"]
        return x + embedding.repeat(len(x) // len(embedding), 1)[:, None]

    def time(x, index, block, weights):
        found = sites.get((index, "stream_in"))
        if found is None:
            return x
        h = x if block.norm_after else norm(block, weights, "norm1", x)
        if fields["num_temporal"] == 2:
            h = h + adapter(found, "inner.", h)
        return x + adapter(found, "adapter.", attention_in_time(block, weights, h, shape["frames"]))

    def space(x, index):
        found = sites.get((index, "attn_out"))
        return x if found is None else x + adapter(found, "", x)

    def joint(z, index, h):
        found = sites.get((index, "mlp_in"))
        return z if found is None else z + fields["scale"] * adapter(found, "", h)

    return {"tokens": tokens, "time": time, "attn_out": space, "joint": joint}


def norm(block, weights, site, x):
    """A norm of the block, without edits."""
    if site not in block.eps:
        return x
    return layer_norm(x, *block.addresses[site].read(weights), block.eps[site])


def attention_in_time(block, weights, h, frames):
    """Tokens of one index attend to each other over the frames; every token keeps its place in the frame."""

    def project(site, heads):
        y = split_heads(linear(h, *block.addresses[site].read(weights)), heads)
        if site in "qk":
            y = norm(block, weights, f"{site}_norm", y)
        if site in "qk" and block.rope is not None:
            sin, cos, half = block.rope
            length = torch.sqrt(sin.double() ** 2 + cos.double() ** 2)  # tables in float32 are no exact rotations
            sin, cos = sin / length, cos / length
            y = torch.cat([y[:, :, : block.prefix], rotate(y[:, :, block.prefix :], sin, cos, half)], dim=2)
        y = y.repeat_interleave(block.heads // heads, dim=1)
        return y.reshape(-1, frames, *y.shape[1:])

    tokens = h.shape[1]
    if block.rope is not None:
        assert block.rope[0].shape[-2] == tokens - block.prefix, "the transcription has no place for prompts here"
    q, k, v = project("q", block.heads), project("k", block.kv_heads), project("v", block.kv_heads)
    scores = torch.einsum("bthnd,bshnd->bhnts", q, k) / q.shape[-1] ** 0.5
    if block.logit_bias is not None:
        scores = scores + torch.diagonal(block.logit_bias, dim1=-2, dim2=-1)[:, :tokens, None, None]
    x = torch.einsum("bhnts,bshnd->bthnd", softmax(scores), v).flatten(0, 1)
    if block.head_scale:
        x = x * weights[block.head_scale]
    x = norm(block, weights, "attn_norm", x.transpose(1, 2).flatten(2))
    x = linear(x, *block.addresses["proj"].read(weights))
    return norm(block, weights, "attn_branch_norm", x)


VIDEO_METHODS = {"st_adapter": st_adapter, "aim": aim}


def frame_features(backbone, clips, tensors=None, fields=None):
    """Features (clips, frames, features) of an untouched backbone with the methods of an adapter.

    Args:
        backbone: the plain model of images, in float64.
        clips: (clips, channels, frames, height, width).
        tensors: the adapter's tensors under the names they are saved with.
        fields: {method name: its hyper-parameters}.
    """
    tensors, fields = tensors or {}, fields or {}
    batch, _, frames, height, width = clips.shape
    images = torch.stack([clips[b, :, t] for b in range(batch) for t in range(frames)])
    trunk = getattr(backbone, "trunk", backbone)
    size = trunk.patch_size if hasattr(trunk, "conv1") else trunk.patch_embed.patch_size
    shape = shapes_of(backbone)["visual"] | {"frames": frames, "grid": (height // size[0], width // size[1])}
    edits = []
    for method, values in fields.items():
        for sites in sites_of(tensors, method).values():
            edits += [(METHODS | VIDEO_METHODS)[method](sites, values, shape)]
    classifier = ("head.weight", "head.bias")
    weights = {name: tensor for name, tensor in backbone.state_dict().items() if name not in classifier}
    for name, tensor in tensors.items():
        if name.startswith("trained.backbone."):
            assert name.removeprefix("trained.backbone.") in weights
            weights[name.removeprefix("trained.backbone.")] = tensor
    return forward(backbone, images, {"visual": edits}, weights).reshape(batch, frames, -1)
