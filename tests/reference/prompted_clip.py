"""CLIP with prompts in its first blocks, as MaPLe's authors lay the tokens out, in plain float64 arithmetic.

Text: the prompts stand after the start token; before block i < depth they are overwritten. Images: the prompts are
appended behind the last patch before the norm in front of the blocks; before block i < depth the last tokens are
dropped and the prompts of block i are appended. Behind block depth - 1 both stay as they are.
"""

import math

import torch


def norm(weights, name, x):
    """Layer norm over the last axis."""
    x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)
    return x * weights[name + ".weight"] + weights[name + ".bias"]


def block(weights, name, x, heads, activation, mask):
    """Pre-norm block: attention with packed q, k, v, then a two-layer MLP."""
    batch, tokens, width = x.shape
    h = norm(weights, name + ".ln_1", x)
    h = h @ weights[name + ".attn.in_proj_weight"].T + weights[name + ".attn.in_proj_bias"]
    q, k, v = h.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(width // heads)
    scores = scores.masked_fill(mask, -math.inf)
    attended = torch.einsum("bhij,bhjd->bihd", torch.softmax(scores, -1), v).reshape(batch, tokens, width)
    x = x + attended @ weights[name + ".attn.out_proj.weight"].T + weights[name + ".attn.out_proj.bias"]
    h = norm(weights, name + ".ln_2", x)
    h = activation(h @ weights[name + ".mlp.c_fc.weight"].T + weights[name + ".mlp.c_fc.bias"])
    return x + h @ weights[name + ".mlp.c_proj.weight"].T + weights[name + ".mlp.c_proj.bias"]


def gelu(x):
    """x Phi(x)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def quick_gelu(x):
    """x sigmoid(1.702 x)."""
    return x / (1 + torch.exp(-1.702 * x))


def text_features(weights, ids, prompts, heads, layers, activation, prefix=""):
    """Unit features (texts, features).

    Args:
        weights: state_dict of the CLIP.
        ids: (texts, length) token ids; those in the place of prompts do not matter.
        prompts: for each of the first blocks (num_tokens, width).
        heads: number of heads.
        layers: number of blocks.
        activation: of the MLP.
        prefix: of the text tower in `weights`.
    """
    x = weights[prefix + "token_embedding.weight"][ids]
    number = len(prompts[0]) if prompts else 0
    if number:
        x = torch.cat([x[:, :1], prompts[0].expand(len(x), -1, -1), x[:, 1 + number :]], 1)
    x = x + weights[prefix + "positional_embedding"][: ids.shape[1]]
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for index in range(layers):
        if 1 <= index < len(prompts):
            x = torch.cat([x[:, :1], prompts[index].expand(len(x), -1, -1), x[:, 1 + number :]], 1)
        x = block(weights, f"{prefix}transformer.resblocks.{index}", x, heads, activation, mask)
    x = norm(weights, prefix + "ln_final", x)
    x = x[torch.arange(len(x)), ids.argmax(-1)]
    x = x @ weights[prefix + "text_projection"]
    return x / x.norm(dim=-1, keepdim=True)


def image_features(weights, images, prompts, heads, layers, activation, prefix="visual."):
    """Unit features (batch, features) of images with `prompts`, for each of the first blocks (num_tokens, width)."""
    kernel = weights[prefix + "conv1.weight"]
    size = kernel.shape[-1]
    patches = images.unfold(2, size, size).unfold(3, size, size)  # batch, channels, rows, columns, size, size
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ kernel.flatten(1).T
    x = torch.cat([weights[prefix + "class_embedding"].expand(len(x), 1, -1), x], 1)
    x = x + weights[prefix + "positional_embedding"]
    number = len(prompts[0]) if prompts else 0
    if number:
        x = torch.cat([x, prompts[0].expand(len(x), -1, -1)], 1)
    x = norm(weights, prefix + "ln_pre", x)
    mask = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    for index in range(layers):
        if 1 <= index < len(prompts):
            x = torch.cat([x[:, :-number], prompts[index].expand(len(x), -1, -1)], 1)
        x = block(weights, f"{prefix}transformer.resblocks.{index}", x, heads, activation, mask)
    x = norm(weights, prefix + "ln_post", x[:, 0]) @ weights[prefix + "proj"]
    return x / x.norm(dim=-1, keepdim=True)
