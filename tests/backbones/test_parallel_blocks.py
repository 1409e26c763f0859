"""Blocks of timm's ViT with branches in parallel, and differential attention, against timm's own modules with their
weights changed by hand, timm's own blocks on more tokens, and attention written out.
"""

import copy
import functools

import block_checks
import pytest
import timm
import torch
from away_from_start import moved, shaken
from timm.layers.diff_attention import DiffAttention
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)

import visionpeft as vp
from visionpeft.adapters import selfcheck
from visionpeft.backbones import timm_parallel

FAMILIES = {
    "beside": {"block_fn": ParallelScalingBlock, "qk_norm": True},
    "no_bias": {"block_fn": ParallelScalingBlock, "qkv_bias": False},
    "one_output": {"block_fn": functools.partial(ParallelScalingBlock, fuse_out_proj=True), "qkv_bias": False},
    "differential_beside": {"block_fn": DiffParallelScalingBlock, "qk_norm": True},
    "differential": {"attn_layer": DiffAttention, "scale_attn_norm": True},
    "several": {"block_fn": ParallelThingsBlock, "qk_norm": True},
}
BESIDE = ("beside", "no_bias", "one_output", "differential_beside")
TOGETHER = ("one_output", "differential_beside")  # one output projection for both branches
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


@functools.cache
def _made(family, options):
    torch.manual_seed(0)
    options = SIZES | {"reg_tokens": 1, "init_values": 1.0, "num_classes": 5} | FAMILIES[family] | dict(options)
    model = VisionTransformer(**options).double().eval()
    return shaken(model)


def made(family, **options):
    return copy.deepcopy(_made(family, tuple(options.items())))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def images(number=2):
    return torch.randn(number, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(left, right):
    return torch.allclose(left, right, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def output_with(family, forward, **options):
    """What timm's model gives whose blocks run `forward(index, block, x)` around their own forward."""
    model = made(family, **options)
    for index, block in enumerate(model.blocks):
        block.forward = functools.partial(forward, index, block)
    return model(images())


IDENTITY = {
    "lora": vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2", "patch_embed")),
    "bit_fit": vp.BitFit(),
    "norms": vp.LayerNormTuning(),
    "last_blocks": vp.LastBlocks(),
    "ia3": vp.IA3(),
    "rep_adapter": vp.RepAdapter(bottleneck=4, dropout=0.0),
    "adapt_former": vp.AdaptFormer(bottleneck=4, dropout=0.0),
    "convpass": vp.Convpass(bottleneck=4),
}
OTHERS = {
    "houlsby": vp.Adapter(placement="houlsby"),
    "ssf": vp.SSF(std=0.1),
    "vpt": vp.VPT(num_tokens=2),
    "shallow": vp.VPT(num_tokens=2, deep=False),
    "prefix": vp.PrefixTuning(num_tokens=2),
}
UNMERGED = dict.fromkeys(("adapt_former", "convpass", "houlsby", "vpt", "shallow", "prefix"), "merged: what it adds")
SHIFTING = dict.fromkeys(("ssf", "rep_adapter"), "no bias that could hold a shift")
# what one output projection, or several attentions, have no one place for
REFUSED = {
    **{(family, "ia3"): "have no layer 'fc2'" for family in TOGETHER},
    **{(family, "houlsby"): "at site 'attn_out'" for family in TOGETHER},
    ("several", "ia3"): "have no layer 'k'; they have .* k_1, .* k_2",
    ("several", "rep_adapter"): "at site 'attn_in' of blocks of class ParallelThingsBlock",
    ("several", "convpass"): "at site 'attn_in'",
    ("several", "prefix"): "have no layer 'v'",
}


@pytest.mark.parametrize("name", IDENTITY | OTHERS)
def test_exact_at_the_start_live_and_merged(family, name):
    """No change at the start, to the bit; then every tensor has an effect, and what can be merged computes the same."""
    model, method = made(family), (IDENTITY | OTHERS)[name]
    if (family, name) in REFUSED:
        with pytest.raises(vp.UnsupportedError, match=REFUSED[family, name]):
            vp.attach(model, method, head=False)
        assert not any("Sited" in type(module).__name__ for module in model.modules())
        return
    with torch.no_grad():
        base = model(images())
        vp.attach(model, method, head=False)
        started = model(images())
    if name == "rep_adapter" and family in BESIDE:  # for which the rows of in_proj are multiplied apart
        assert close(started, base)
    else:
        assert torch.equal(started, base) == (name in IDENTITY)
    moved(model)
    output = model(images())
    parameters = dict(model.peft.named_parameters())
    grads = torch.autograd.grad(output.square().sum(), list(parameters.values()))
    assert [name for name, grad in zip(parameters, grads, strict=True) if not grad.any()] == []
    assert not close(output, base)
    refused = UNMERGED | (SHIFTING if family in ("no_bias", "one_output") else {})
    if name in refused:
        with pytest.raises(vp.UnsupportedError, match=refused[name]):
            vp.merge(model)
        assert torch.equal(model(images()), output)
        return
    vp.merge(model)
    assert type(model.blocks[0]).__module__.startswith("timm.")
    assert close(model(images()), output)
    vp.detach(model)
    assert torch.equal(model(images()), base)


ROWS = {"q": 1, "k": 2, "v": 3, "fc1": 0}


def test_lora_is_timms_model_with_other_weights(family):
    """Of in_proj, the rows of the MLP come first; of one output projection there is one change, by either name."""
    model, expected = made(family), made(family)
    vp.attach(model, vp.LoRA(rank=2, targets=("q", "v", "proj", "fc1", "fc2")), head=False)
    values = moved(model)
    sites = {path.rpartition(".")[0] for path in values}
    assert len(sites) == 2 * (4 if family in TOGETHER else 10 if family == "several" else 5)
    with torch.no_grad():
        for path in sites:
            change, (index, _, site) = values[f"{path}.B"] @ values[f"{path}.A"], path.partition(".")
            block, (site, _, number) = expected.blocks[int(index)], site.partition("_")
            attention = block.attns[int(number) - 1].attn if number else getattr(block, "attn", None)
            mlp = block.ffns[int(number) - 1].mlp if number else getattr(block, "mlp", None)
            if family in BESIDE and site in ROWS:
                block.in_proj.weight.split(block.in_split)[ROWS[site]].add_(change)
            elif family in BESIDE:
                layer = block.out_proj or (block.attn_out_proj if site == "proj" else block.mlp_out_proj)
                layer.weight += change
            elif site in "qv":
                attention.qkv.weight.chunk(3)["qkv".index(site)].add_(change)
            else:
                (attention.proj if site == "proj" else getattr(mlp, site)).weight.add_(change)
        assert close(model(images()), expected(images()))
        assert not close(made(family)(images()), expected(images()))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts_are_tokens(family, deep):
    """timm's own blocks, with the prompts among the tokens after class and register token."""
    model = made(family)
    vp.attach(model, vp.VPT(num_tokens=3, deep=deep), head=False)
    values = moved(model)

    def forward(index, block, x):
        if deep or index == 0:
            prompts = values[f"{index}.stream_in.prompts"].expand(len(x), -1, -1)
            x = torch.cat((x[:, :2], prompts, x[:, 2:]), dim=1)
        x = type(block).forward(block, x)
        return torch.cat((x[:, :2], x[:, 5:]), dim=1) if deep or index == 1 else x

    assert close(model(images()), output_with(family, forward))


def attention_of(module, h, rows, prefix):
    """softmax attention, or the difference of two, of h (batch, tokens, width), with a prefix of keys and values."""
    (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias) = rows
    heads, width = module.num_heads, module.head_dim
    maps = 2 if hasattr(module, "lambda_init") else 1
    q, k, v = h @ q_weight.T + q_bias, h @ k_weight.T + k_bias, h @ v_weight.T + v_bias
    output = []
    for head in range(heads):
        values = v[..., head * maps * width : (head + 1) * maps * width]
        values = torch.cat((prefix["values"][:, head].expand(len(h), -1, -1), values), dim=1)
        found = []
        for half in range(maps):
            own = slice((head * maps + half) * width, (head * maps + half + 1) * width)
            keys = module.k_norm(k[..., own])
            ahead = prefix["keys"][:, head, half * width : (half + 1) * width]
            keys = torch.cat((ahead.expand(len(h), -1, -1), keys), dim=1)
            found.append((module.q_norm(q[..., own]) @ keys.mT / width**0.5).softmax(-1) @ values)
        if maps == 1:
            output += found
            continue
        exponents = module.lambda_q1 @ module.lambda_k1, module.lambda_q2 @ module.lambda_k2
        share = exponents[0].float().exp() - exponents[1].float().exp()  # which timm rounds, in any precision
        difference = found[0] - (share + module.lambda_init) * found[1]
        difference = difference / (difference.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.sub_norm.weight
        output.append(difference * (1 - module.lambda_init))
    return torch.cat(output, dim=-1)


def block_of(block, x, prefix=None, at=lambda site, x: x):
    """One block of x (batch, tokens, width), written out, with what `at` makes of it at token sites."""
    if hasattr(block, "attn"):
        rows = [parameter.chunk(3) for parameter in (block.attn.qkv.weight, block.attn.qkv.bias)]
        x = x + block.ls1(block.attn.proj(block.attn.norm(attention_of(block.attn, block.norm1(x), rows, prefix))))
        return x + block.ls2(block.mlp(block.norm2(x)))
    (inner, *weights) = block.in_proj.weight.split(block.in_split)
    if block.in_proj.bias is None:
        inner_bias, biases = block.mlp_bias, [x.new_zeros(len(weight)) for weight in weights]
    else:
        inner_bias, *biases = block.in_proj.bias.split(block.in_split)
    normed = block.in_norm(x)
    attended = attention_of(block, at("attn_in", normed), (weights, biases), prefix)
    hidden = block.mlp_act(at("mlp_in", normed) @ inner.T + inner_bias)
    if block.out_proj is not None:
        return x + block.ls(block.out_proj(torch.cat((attended, hidden), dim=-1)))
    return x + block.ls(at("attn_out", block.attn_out_proj(attended)) + at("mlp_out", block.mlp_out_proj(hidden)))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "several"])
def test_prefixes(name):
    model, heads = made(name), SIZES["num_heads"]
    vp.attach(model, vp.PrefixTuning(num_tokens=3), head=False)
    values = moved(model)

    def forward(index, block, x, start=0):
        prefix = {each: values[f"{index}.kv.{each}"][start:].unflatten(1, (heads, -1)) for each in ("keys", "values")}
        return block_of(block, x, prefix)

    assert close(model(images()), output_with(name, forward))
    assert not close(model(images()), output_with(name, functools.partial(forward, start=1)))


@pytest.mark.parametrize("method", [vp.Adapter(placement="houlsby"), vp.RepAdapter(dropout=0.0)], ids=["out", "in"])
@pytest.mark.parametrize("name", ["beside", "no_bias"])
def test_adapters_at_each_branch(name, method):
    """Attention and MLP read one norm, are changed apart, and are added under one layer scale."""
    model = made(name)
    vp.attach(model, method, head=False)
    moved(model)
    modules = {(each.block, each.site): each.module for _, each in model.peft["default"].placements}
    assert len(modules) == 4
    nothing = torch.zeros(1, 0, dtype=torch.float64)
    prefix = {each: nothing.new_zeros(0, SIZES["num_heads"], 8) for each in ("keys", "values")}

    def forward(index, block, x):
        return block_of(block, x, prefix, lambda site, x: modules.get((index, site), lambda x: x)(x))

    assert close(model(images()), output_with(name, forward))
    modules.pop((1, "mlp_out"), None), modules.pop((1, "mlp_in"), None)
    assert not close(model(images()), output_with(name, forward))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("name", BESIDE)
def test_no_branch_is_scaled_by_itself(name, placement):
    """What attention adds is not in the stream at stream_mid: an adapter of it would read zeros, and learn a bias."""
    method = vp.Adapter(placement=placement, after_scaling=True)
    with pytest.raises(vp.UnsupportedError, match="added together; use after_scaling=False"):
        vp.attach(made(name), method)
    vp.attach(made("several"), method)  # negative control: there they are one after the other


@pytest.mark.parametrize("name", ["several", "one_output"])
def test_neurons_of_one_mlp_are_refused_where_there_is_none(name):
    """With several MLPs in a block, or a last layer that is the attention's, too; it ended in a KeyError."""
    with pytest.raises(vp.UnsupportedError, match="have no layer 'fc2'"):
        vp.attach(made(name), vp.FAR())
    vp.attach(made("beside"), vp.FAR())  # negative control


@pytest.mark.parametrize("name", BESIDE)
def test_what_joins_the_stream_between_is_not_read_by_the_mlp(name):
    """timm's own block, and beside it both bypasses of the norm that attention and MLP read."""
    model = made(name)
    vp.attach(model, vp.Convpass(bottleneck=4, dropout=0.0), head=False)
    moved(model)
    placements = [each for _, each in model.peft["default"].placements]
    assert [(each.site, each.add) for each in placements[:2]] == [("attn_in", "stream_mid"), ("mlp_in", "stream_out")]

    def forward(index, block, x):
        beside = [each.module(block.in_norm(x), 2) for each in placements if each.block == index]
        return type(block).forward(block, x) + sum(beside)

    assert close(model(images()), output_with(name, forward))


@pytest.mark.parametrize("name", ["beside", "no_bias", "differential"])
def test_attention_by_itself(name):
    """Which other methods use once more: that of the backbone, whatever acts at its sites."""
    model = made(name)
    vp.attach(model, [vp.LoRA(rank=2), vp.PrefixTuning(num_tokens=2)], head=False)
    moved(model)
    block, x = model.blocks[0], torch.randn(2, 7, 16, dtype=torch.float64)
    h, nothing = block.attention_input(x), torch.zeros(0, 2, 8, dtype=torch.float64)
    assert close(h, (block.norm1 if name == "differential" else block.in_norm)(x))
    plain, prefix = made(name).blocks[0], {"keys": nothing, "values": nothing}
    if name == "differential":
        rows = [parameter.chunk(3) for parameter in (plain.attn.qkv.weight, plain.attn.qkv.bias)]
        expected = plain.attn.proj(plain.attn.norm(attention_of(plain.attn, h, rows, prefix)))
    else:
        weights = plain.in_proj.weight.split(plain.in_split)[1:]
        biases = [h.new_zeros(16)] * 3 if name == "no_bias" else plain.in_proj.bias.split(plain.in_split)[1:]
        expected = plain.attn_out_proj(attention_of(plain, h, (weights, biases), prefix))
    assert close(block.attend(h), expected)


def gradients(model, x):
    output = model(x)
    return output, torch.autograd.grad(output.square().sum(), list(model.peft.parameters()))


@pytest.mark.parametrize("options", [{"class_token_only": True}, {"recompute": "mlp"}, {"recompute": "block"}], ids=str)
def test_economies_are_exact(family, options):
    model = made(family)
    vp.attach(model, [vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2")), vp.VPT(num_tokens=2)], head=False)
    moved(model)
    plain = gradients(model, images())
    vp.economise(model, **options)
    cheap = gradients(model, images())
    assert close(plain[0], cheap[0])
    assert all(close(*pair) for pair in zip(plain[1], cheap[1], strict=True))


def test_a_row_of_a_mixed_batch_is_that_of_its_adapter(family):
    model = made(family)
    methods = {"a": vp.LoRA(rank=2, targets=("q", "fc1", "proj")), "b": vp.AdaptFormer(), "c": vp.VPT()}
    for name, method in methods.items():
        vp.attach(model, method, name=name, head=False)
    moved(model)
    for names in (["b", "a", None, "a"], ["c", "c"]):
        with torch.no_grad(), vp.route(model, names):
            output = model(images(len(names)))
        for row, name in enumerate(names):
            with torch.no_grad(), vp.use(model, name):
                assert close(output[row], model(images(len(names)))[row])


def test_without_fused_attention(family):
    outputs = []
    for fused in (False, True):
        model = made(family)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        prefix = [vp.PrefixTuning(num_tokens=2)] * (family != "several")
        torch.manual_seed(3)
        vp.attach(model, [vp.VPT(num_tokens=2, deep=False), vp.LoRA(rank=2), *prefix], head=False)
        moved(model)
        outputs.append(model(images()))
    assert close(*outputs)


def test_the_check_at_attach_sees_rows_that_are_multiplied_together(monkeypatch):
    """As where nothing acts on what attention and MLP read; a probe at every site has them multiplied apart."""
    monkeypatch.setattr(selfcheck, "_check_block", block_checks.every_time)
    original = timm_parallel.apply_rows
    monkeypatch.setattr(timm_parallel, "apply_rows", lambda *options: tuple(2 * part for part in original(*options)))
    with pytest.raises(vp.UnsupportedError, match="does not compute what its sited form computes"):
        vp.attach(made("beside"), vp.LoRA(rank=2))


def test_hooks_see_the_layers():
    """in_proj is called as the library calls it, unless what acts must see its rows apart."""
    model, seen = made("beside"), []
    model.blocks[1].in_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    vp.attach(model, vp.LoRA(rank=2, targets=("q", "fc1")), head=False)
    moved(model)
    with torch.no_grad():
        model(images())
    assert [output.shape for output in seen] == [(2, 18, 32 + 3 * 16)]
    attending = made("several")
    attending.blocks[1].attns[1].attn.register_forward_hook(lambda module, args, output: seen.append(output))
    vp.attach(attending, vp.LoRA(rank=2), head=False)
    attending(images())
    assert seen[1].shape == (2, 18, 16)


# Trained parameters. xp: 12 blocks of width 768, without a second norm; 18x2: 18 blocks of width 384, each with two
# attentions and two MLPs; dpwee: 16 blocks of width 256 with one output projection; dwee: 14.
COUNTS = {
    "vit_base_patch16_xp_224": [
        (vp.LoRA(rank=8), 12 * 8 * 4 * 768),
        (vp.LoRA(rank=8, targets=("q", "k", "v", "proj", "fc1", "fc2")), 12 * 8 * (4 * 2 + 2 * 5) * 768),
        (vp.SSF(), 12 * (2 + 6 + 2 + 8 + 2) * 768 + 4 * 768),
        (vp.IA3(), 12 * (2 + 4) * 768),
        (vp.AdaptFormer(bottleneck=64), 12 * (2 * 768 * 64 + 64 + 768)),
        (vp.VPT(num_tokens=10), 12 * 10 * 768),
        (vp.PrefixTuning(num_tokens=10), 12 * 2 * 10 * 768),
    ],
    "vit_small_patch16_18x2_224": [
        (vp.LoRA(rank=8), 18 * 2 * 8 * 4 * 384),
        (vp.SSF(), 18 * 2 * 22 * 384 + 4 * 384),
        (vp.AdaptFormer(bottleneck=64), 18 * (2 * 384 * 64 + 64 + 384)),
        (vp.VPT(num_tokens=10), 18 * 10 * 384),
    ],
    "vit_dpwee_patch16_reg1_gap_256": [
        (vp.LoRA(rank=8, targets=("proj", "fc2")), 16 * 8 * (256 + 1280 + 256)),
        (vp.PrefixTuning(num_tokens=10), 16 * 2 * 10 * 256),
    ],
    "vit_dwee_patch16_reg1_gap_256": [(vp.LoRA(rank=8), 14 * 8 * 4 * 256)],
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    for method, expected in COUNTS[name]:
        vp.attach(model, method, head=False)
        assert sum(parameter.numel() for parameter in model.peft.parameters()) == expected, method
        vp.detach(model)
