"""timm's ViTs with a relative position bias against their attention written out, query by query, in float64."""

import copy
import functools
import math

import pytest
import timm
import torch
from away_from_start import moved, shaken
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos

import visionpeft as vp

GRID = (2, 3)
FAMILIES = {
    "mlp": {"qk_norm": True},
    "mlp_of_swin": {"rel_pos_type": "mlp-swin", "class_token": True, "global_pool": "token", "qkv_bias": False},
    "table": {"rel_pos_type": "bias", "class_token": True, "fc_norm": True},
    "shared": {"shared_rel_pos": True, "block_fn": ResPostRelPosBlock, "qkv_bias": False},
}


@functools.cache
def _made(family):
    torch.manual_seed(0)
    sizes = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "rel_pos_dim": 8}
    model = VisionTransformerRelPos(**sizes, num_classes=5, init_values=1.0, **FAMILIES[family]).double().eval()
    shaken(model)
    # Frozen, as with an adapter: without a bias, torch rounds the product with a trained matrix in another way.
    return model.requires_grad_(False)


def made(family):
    return copy.deepcopy(_made(family))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def images(number=2):
    return torch.randn(number, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(left, right):
    return torch.allclose(left, right, rtol=1e-10, atol=1e-10)


def bias_between(positions, here, there):
    """Bias (heads,) of a query at one place for a key at another; None is the class token."""
    if "prompt" in (here, there) or (hasattr(positions, "mlp") and None in (here, there)):
        return torch.zeros(2, dtype=torch.float64)
    if hasattr(positions, "mlp"):
        far = [a - b for a, b in zip(here, there, strict=True)]
        if positions.mode == "swin":
            far = [8 * each / (side - 1) for each, side in zip(far, GRID, strict=True)]
            far = [math.copysign(math.log2(1 + abs(each)) / 3, each) for each in far]
        else:
            far = [math.copysign(math.log(1 + abs(each)), each) for each in far]
        # kept in the precision that the model was made in
        far = torch.tensor(far, dtype=torch.float32).double()
        made = positions.mlp.fc2(positions.mlp.fc1(far).relu())
        return 16 * made.sigmoid() if positions.mode == "swin" else made
    table = positions.relative_position_bias_table
    if here is None:
        return table[-1 if there is None else -3]
    if there is None:
        return table[-2]
    down, right = (a - b + side - 1 for a, b, side in zip(here, there, GRID, strict=True))
    return table[down * (2 * GRID[1] - 1) + right]


def attention_of(model, block, h, extra=0, prefix=None):
    """One attention of h (batch, tokens, width), where `extra` prompts follow the class token, if there is one."""
    attention = block.attn
    patches = [(row, column) for row in range(GRID[0]) for column in range(GRID[1])]
    places = [None] * model.num_prefix_tokens + ["prompt"] * extra + patches
    positions = model.shared_rel_pos or attention.rel_pos
    bias = [torch.stack([bias_between(positions, here, there) for there in places]) for here in places]
    bias = torch.stack(bias).permute(2, 0, 1)
    qkv = h @ attention.qkv.weight.T + (0 if attention.qkv.bias is None else attention.qkv.bias)
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores = q @ k.mT / 8**0.5 + bias
    if prefix is not None:
        ahead, values = (each.unflatten(-1, (2, 8)).transpose(0, 1).expand(len(h), -1, -1, -1) for each in prefix)
        scores, v = torch.cat((q @ ahead.mT / 8**0.5, scores), dim=-1), torch.cat((values, v), dim=2)
    return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def output_with(family, entering=None, leaving=None, prefix=None):
    """What the model gives, written out; some prompts enter before a block and leave after one."""
    model = made(family)
    x = model.patch_embed(images())
    if model.cls_token is not None:
        x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
    first, extra = model.num_prefix_tokens, 0
    for index, block in enumerate(model.blocks):
        if index in (entering or {}):
            prompts = entering[index]
            x, extra = torch.cat((x[:, :first], prompts.expand(len(x), -1, -1), x[:, first:]), dim=1), len(prompts)
        own = None if prefix is None else prefix[index]
        if isinstance(block, ResPostRelPosBlock):
            x = x + block.norm1(attention_of(model, block, x, extra, own))
            x = x + block.norm2(block.mlp(x))
        else:
            x = x + block.ls1(attention_of(model, block, block.norm1(x), extra, own))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        if index in (leaving or ()):
            x, extra = torch.cat((x[:, :first], x[:, first + extra :]), dim=1), 0
    return model.forward_head(model.norm(x))


@torch.no_grad()
def test_prompts_and_prefixes_have_no_position(family):
    assert close(made(family)(images()), output_with(family))
    for method in (vp.VPT(num_tokens=3), vp.VPT(num_tokens=3, deep=False), vp.PrefixTuning(num_tokens=3)):
        model = made(family)
        vp.attach(model, method, head=False)
        values = moved(model)
        if isinstance(method, vp.VPT):
            entering = {i: values[f"{i}.stream_in.prompts"] for i in range(2) if f"{i}.stream_in.prompts" in values}
            expected = output_with(family, entering, (0, 1) if method.deep else (1,))
        else:
            prefix = [[values[f"{i}.kv.{each}"] for each in ("keys", "values")] for i in range(2)]
            expected = output_with(family, prefix=prefix)
        assert close(model(images()), expected)
        assert not close(model(images()), output_with(family))


METHODS = {
    "lora": vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2", "patch_embed")),
    "bit_fit": vp.BitFit(),
    "rep_adapter": vp.RepAdapter(bottleneck=4),
    "convpass": vp.Convpass(bottleneck=4),
    "adapt_former": vp.AdaptFormer(bottleneck=4),
    "ssf": vp.SSF(std=0.1),
}


@pytest.mark.parametrize("name", METHODS)
def test_exact_at_the_start_live_and_merged(family, name):
    model = made(family)
    with torch.no_grad():
        base = model(images())
        vp.attach(model, METHODS[name], head=False)
        assert torch.equal(model(images()), base) == (name != "ssf")
    moved(model)
    output = model(images())
    parameters = dict(model.peft.named_parameters())
    grads = torch.autograd.grad(output.square().sum(), list(parameters.values()))
    # A shift of keys that are not normalised changes nothing.
    void = "kept" if FAMILIES[family].get("qk_norm") else "k.shift"
    assert [name for name, grad in zip(parameters, grads, strict=True) if not grad.any() and void not in name] == []
    assert not close(output, base)
    without_bias = name in ("rep_adapter", "ssf") and not FAMILIES[family].get("qkv_bias", True)
    if name in ("convpass", "adapt_former") or without_bias:
        with pytest.raises(vp.UnsupportedError, match="no bias that could hold" if without_bias else "what it adds"):
            vp.merge(model)
        return
    vp.merge(model)
    assert type(model.blocks[0]).__module__.startswith("timm.")
    assert close(model(images()), output)
    vp.detach(model)
    with torch.no_grad():
        assert torch.equal(model(images()), base)


@pytest.mark.parametrize("options", [{"class_token_only": True}, {"recompute": "mlp"}], ids=str)
def test_economies_are_exact(options):
    model = made("mlp_of_swin")
    vp.attach(model, [vp.LoRA(rank=2), vp.VPT(num_tokens=2)], head=False)
    moved(model)
    found = []
    for chosen in ({}, options):
        vp.economise(model, **chosen)
        output = model(images())
        found.append((output, *torch.autograd.grad(output.square().sum(), list(model.peft.parameters()))))
    assert all(close(*pair) for pair in zip(*found, strict=True))


def test_the_last_bias_is_not_trained_where_nothing_reads_it():
    """Of the class token it is zero, and that token alone is read after the last block."""
    model = made("mlp_of_swin")
    vp.attach(model, vp.BitFit(), head=False)
    trained = [name for name in model.peft["default"].trained_names if "rel_pos" in name]
    assert trained == ["blocks.0.attn.rel_pos.mlp.fc1.bias"]
    vp.detach(model)
    model.global_pool = "avg"
    vp.attach(model, vp.BitFit(), head=False)
    assert sum("rel_pos" in name for name in model.peft["default"].trained_names) == 2


# Trained parameters: 12 blocks of width 768 or 512, whose layers for q, k and v have no bias.
COUNTS = {
    "vit_relpos_base_patch16_224": [
        (vp.LoRA(rank=8), 12 * 8 * 4 * 768),
        (vp.SSF(), 12 * 22 * 768 + 4 * 768),
        (vp.AdaptFormer(bottleneck=64), 12 * (2 * 768 * 64 + 64 + 768)),
        (vp.VPT(num_tokens=10), 12 * 10 * 768),
    ],
    "vit_srelpos_medium_patch16_224": [
        (vp.LoRA(rank=8), 12 * 8 * 4 * 512),
        (vp.PrefixTuning(num_tokens=10), 12 * 2 * 10 * 512),
        (vp.Convpass(bottleneck=8), 12 * 2 * (2 * 512 * 8 + 8 + 512 + 9 * 64 + 8)),
    ],
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    for method, expected in COUNTS[name]:
        vp.attach(model, method, head=False)
        assert sum(parameter.numel() for parameter in model.peft.parameters()) == expected, method
        vp.detach(model)
