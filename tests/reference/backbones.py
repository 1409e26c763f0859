"""The backbones in float64: timm VisionTransformer, Eva and Beit, OpenCLIP towers and whole CLIP models.

`forward(model, inputs, edits, weights)` never calls the model: it reads numbers (heads, eps, pooling) from it and
tensors from `weights`, its state_dict unless told otherwise.
"""

import torch
import torch.nn.functional as F

from .anatomy import addresses_of, eps_of, open_clip_block, text_addresses, timm_block
from .arithmetic import activation_of, attention, join_heads, layer_norm, linear, patches_of, split_heads
from .block import amend, block_forward


def forward(model, inputs, edits=None, weights=None):
    """The output of a plain model, with `edits` ({tower: [edit]}) made on the way.

    Args:
        model: an untouched timm or OpenCLIP model in float64.
        inputs: images, token ids, or a pair of both for a whole CLIP model.
        edits: per tower (`visual`, `text`) the edits of the methods, see `block.py`.
        weights: tensors to compute with, under the names of the model's state_dict.
    """
    weights = model.state_dict() if weights is None else weights
    edits = edits or {}
    return WHOLE[type(model).__name__, type(model).__module__.split(".")[0]](model, inputs, edits, weights, "")


def embed_patches(address, size, images, weights, edits):
    """The patch convolution as a matrix product on flattened patches."""
    weight, bias = address.read(weights)
    weight, bias = amend(edits, "weight", (weight.flatten(1), bias), None, "patch_embed")
    return amend(edits, "output", linear(patches_of(images, size), weight, bias), None, "patch_embed")


def model_norm(module, address, weights, site, x, edits):
    """A norm outside the blocks, and what methods do to it."""
    if not eps_of(module):
        return x
    weight, bias = amend(edits, "weight", address.read(weights), None, site)
    return amend(edits, "output", layer_norm(x, weight, bias, module.eps), None, site)


def run_blocks(blocks, weights, x, edits):
    """All blocks in order; whatever prompts are left at the end are dropped."""
    prompts = 0
    for index, block in enumerate(blocks):
        x, prompts = block_forward(block, weights, x, prompts, index, edits)
    assert prompts == 0, "an edit left its prompts in the sequence"
    return x


def timm_tower(model, images, edits, weights, prefix):
    """timm VisionTransformer, Eva or Beit: logits, or features where the head is an identity."""
    edits = edits.get("visual", [])
    sites = addresses_of(model, "visual", prefix)
    size = model.patch_embed.patch_size
    x = embed_patches(sites[None, "patch_embed"], size, images, weights, edits)
    assert not eps_of(model.patch_embed.norm)
    grid = images.shape[2] // size[0], images.shape[3] // size[1]
    position = weights.get(prefix + "pos_embed")
    first = [weights[prefix + name] for name in ("cls_token", "reg_token") if prefix + name in weights]
    outside = getattr(model, "no_embed_class", False)
    if position is not None and grid != model.patch_embed.grid_size:
        position = resample(position, model.patch_embed.grid_size, grid, 0 if outside else model.num_prefix_tokens)
    if position is not None and outside:
        x = x + position
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in first), x], dim=1)
    if position is not None and not outside:
        x = x + position
    x = amend(edits, "tokens", x)
    x = model_norm(getattr(model, "norm_pre", None), sites.get((None, "norm_pre")), weights, "norm_pre", x, edits)
    more = [{} for _ in model.blocks]
    for index, block in enumerate(model.blocks):
        more[index] = {"prefix": model.num_prefix_tokens, "logit_bias": relative_bias(model, index, weights, prefix)}
        if getattr(model, "rope", None) is not None:
            if model.rope_mixed:
                sin, cos = mixed_rope(weights[prefix + "rope.freqs"][:, index], grid, model.rope.grid_indexing)
            else:
                sin, cos = model.rope.get_embed(grid).chunk(2, -1)
            more[index]["rope"] = (sin, cos, block.attn.rotate_half)
    blocks = [timm_block(b, f"{prefix}blocks.{i}.", **more[i]) for i, b in enumerate(model.blocks)]
    x = run_blocks(blocks, weights, x, edits)
    x = model_norm(model.norm, sites[None, "norm"], weights, "norm", x, edits)
    x = pool(model, x, weights, prefix)
    x = model_norm(model.fc_norm, sites[None, "fc_norm"], weights, "fc_norm", x, edits)
    x = amend(edits, "features", x)
    if prefix + "head.weight" in weights:
        x = linear(x, weights[prefix + "head.weight"], weights[prefix + "head.bias"])
    return x


def mixed_rope(frequencies, grid, indexing):
    """sin and cos (heads, patches, d) of learned frequencies (2, heads, d / 2), in float32 as timm computes them."""
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])
    columns = torch.arange(grid[1]).repeat(grid[0])
    first, second = (columns, rows) if indexing == "xy" else (rows, columns)
    fx, fy = frequencies.float()[:, :, None]
    angles = (first[:, None] * fx + second[:, None] * fy).repeat_interleave(2, -1)
    return angles.sin().to(frequencies.dtype), angles.cos().to(frequencies.dtype)


def resample(position, old, new, prefix):
    """Bicubic, antialiased interpolation of the patches' position embedding, in float32 as timm does."""
    grid = position[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True).to(position.dtype)
    return torch.cat([position[:, :prefix], grid.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)], dim=1)


def relative_bias(model, index, weights, prefix):
    """BEiT: the sum of a block's own and the shared relative position table, (heads, tokens, tokens), else None."""
    tables = {f"{prefix}blocks.{index}.attn.": model.blocks[index].attn, f"{prefix}rel_pos_bias.": model}
    total = None
    for path in tables:
        table = weights.get(path + "relative_position_bias_table")
        if table is not None:
            rows = relative_index(model.patch_embed.grid_size)
            bias = table[rows.flatten()].reshape(*rows.shape, -1).permute(2, 0, 1)
            total = bias if total is None else total + bias
    return total


def relative_index(grid):
    """Row of the table for each pair of tokens: patch offsets, then class-to-patch, patch-to-class, class-to-class."""
    height, width = grid
    last = (2 * height - 1) * (2 * width - 1)
    index = torch.zeros(height * width + 1, height * width + 1, dtype=torch.long)
    for a in range(height * width):
        for b in range(height * width):
            down, right = a // width - b // width, a % width - b % width
            index[1 + a, 1 + b] = (down + height - 1) * (2 * width - 1) + right + width - 1
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return index


def pool(model, x, weights, prefix):
    """Class token, mean over the patches, or attention with one learned query (MAP)."""
    skip = 0 if getattr(model, "pool_include_prefix", False) else model.num_prefix_tokens
    if getattr(model, "attn_pool", None) is not None:
        # Eva lets the learned query see the class token, VisionTransformer does not
        first = 0 if type(model).__name__ == "Eva" else skip
        return attention_pool(model.attn_pool, x[:, first:], weights, prefix + "attn_pool.")
    if model.global_pool == "token":
        return x[:, 0]
    assert model.global_pool == "avg"
    return x[:, skip:].mean(1)


def attention_pool(module, x, weights, path):
    """timm's AttentionPoolLatent with one latent."""

    def apply(name, value):
        return linear(value, weights[f"{path}{name}.weight"], weights[f"{path}{name}.bias"])

    q = split_heads(apply("q", weights[path + "latent"].expand(len(x), -1, -1)), module.num_heads)
    k, v = (split_heads(half, module.num_heads) for half in apply("kv", x).chunk(2, -1))
    x = apply("proj", join_heads(attention(q, k, v)))
    y = layer_norm(x, weights[path + "norm.weight"], weights[path + "norm.bias"], module.norm.eps)
    x = x + apply("mlp.fc2", activation_of(module.mlp.act)(apply("mlp.fc1", y)))
    return x[:, 0]


def timm_in_open_clip(model, images, edits, weights, prefix):
    """OpenCLIP's TimmModel: a timm trunk and a linear projection."""
    x = timm_tower(model.trunk, images, edits, weights, prefix + "trunk.")
    if prefix + "head.proj.weight" in weights:
        x = linear(x, weights[prefix + "head.proj.weight"], weights.get(prefix + "head.proj.bias"))
    return x


def open_clip_visual(model, images, edits, weights, prefix):
    """OpenCLIP's VisionTransformer, projected."""
    edits = edits.get("visual", [])
    sites = addresses_of(model, "visual", prefix)
    x = embed_patches(sites[None, "patch_embed"], model.patch_size, images, weights, edits)
    x = torch.cat([weights[prefix + "class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = x + weights[prefix + "positional_embedding"]
    x = amend(edits, "tokens", x)
    x = model_norm(model.ln_pre, sites[None, "norm_pre"], weights, "norm_pre", x, edits)
    path = prefix + "transformer.resblocks."
    blocks = [open_clip_block(b, f"{path}{i}.", prefix=1) for i, b in enumerate(model.transformer.resblocks)]
    x = run_blocks(blocks, weights, x, edits)
    if model.final_ln_after_pool:
        x = open_clip_pool(model, x)
        x = model_norm(model.ln_post, sites[None, "norm"], weights, "norm", x, edits)
    else:
        x = model_norm(model.ln_post, sites[None, "norm"], weights, "norm", x, edits)
        x = open_clip_pool(model, x)
    return x @ weights[prefix + "proj"] if model.proj is not None else x


def open_clip_pool(model, x):
    """Class token or mean over the patches."""
    return x[:, 0] if model.pool_type == "tok" else x[:, 1:].mean(1)


def open_clip_text(model, text, edits, weights, prefix):
    """OpenCLIP's text tower, on its own (`TextTransformer`) or unpacked on a `CLIP`, projected."""
    edits = edits.get("text", [])
    sites = text_addresses(model, prefix)
    x = weights[prefix + "token_embedding.weight"][text] + weights[prefix + "positional_embedding"][: text.shape[1]]
    x = amend(edits, "tokens", x)
    table = None
    if model.attn_mask is not None:
        length = text.shape[1]
        later = torch.arange(length)[None] > torch.arange(length)[:, None]
        table = torch.zeros(1, length, length, dtype=x.dtype).masked_fill(later, -torch.inf)
    more = {"prefix": 1, "logit_bias": table, "causal": table is not None}
    path = prefix + "transformer.resblocks."
    blocks = [open_clip_block(b, f"{path}{i}.", **more) for i, b in enumerate(model.transformer.resblocks)]
    x = run_blocks(blocks, weights, x, edits)
    x = model_norm(model.ln_final, sites[None, "norm"], weights, "norm", x, edits)
    kind = getattr(model, "text_pool_type", None) or model.pool_type
    if kind == "argmax":
        x = x[torch.arange(len(x)), text.argmax(-1)]
    else:
        x = x[:, {"first": 0, "last": -1}[kind]]
    if prefix + "text_projection.weight" in weights:
        return linear(x, weights[prefix + "text_projection.weight"], weights.get(prefix + "text_projection.bias"))
    return x @ weights[prefix + "text_projection"]


def whole_clip(model, inputs, edits, weights, prefix):
    """(image features, text features, exp of the logit scale), both normalised."""
    images, text = inputs
    visual = WHOLE[type(model.visual).__name__, "open_clip"](model.visual, images, edits, weights, prefix + "visual.")
    if hasattr(model, "text"):
        words = open_clip_text(model.text, text, edits, weights, prefix + "text.")
    else:
        words = open_clip_text(model, text, edits, weights, prefix)
    visual, words = (x / x.norm(dim=-1, keepdim=True) for x in (visual, words))
    return visual, words, weights[prefix + "logit_scale"].exp()


WHOLE = {
    ("VisionTransformer", "timm"): timm_tower,
    ("Eva", "timm"): timm_tower,
    ("Beit", "timm"): timm_tower,
    ("VisionTransformer", "open_clip"): open_clip_visual,
    ("TextTransformer", "open_clip"): open_clip_text,
    ("TimmModel", "open_clip"): timm_in_open_clip,
    ("CLIP", "open_clip"): whole_clip,
    ("CustomTextCLIP", "open_clip"): whole_clip,
}
