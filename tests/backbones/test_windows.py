"""Backbones with attention inside windows of a map, Swin and SwinV2, against formulas written out window by window."""

import copy
import functools

import block_checks
import peft
import pytest
import timm
import torch
from away_from_start import moved, shaken
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

import visionpeft as vp
from visionpeft.adapters import selfcheck
from visionpeft.adapters.fingerprint import fingerprint
from visionpeft.backbones import timm_swin, timm_swin_v2, windows

# maps of 7 x 8 and then 4 x 4 pixels: windows of 3 x 3 do not divide them, and every second block is shifted
SIZE = (28, 32)
FAMILIES = {"swin": SwinTransformer, "swin_v2": SwinTransformerV2}
OPTIONS = {"window_size": 3, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.0}


@functools.cache
def _made(family: str, strict: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family](img_size=SIZE, num_classes=5, strict_img_size=strict, **OPTIONS).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # else the norms of SwinV2, which start at zero, would hide every effect
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def made(family="swin", strict=True):
    return copy.deepcopy(_made(family, strict))


def blocks_of(model):
    return [block for stage in model.layers for block in stage.blocks]


def images(number=2, size=SIZE):
    return torch.randn(number, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(left, right):
    return torch.allclose(left, right, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def output_with(family, forward, number=2):
    """What timm's model gives whose blocks run `forward(index, block, x)`."""
    model = made(family)
    for index, block in enumerate(blocks_of(model)):
        block.forward = functools.partial(forward, index, block)
    return model(images(number))


def attention_of(block, h, prompts=None, prefix=None):
    """One attention of Swin, query by query: h (batch, rows, columns, width) to the same shape.

    Written from the papers: each query sees the pixels of its window in the shifted map that come from one side of the
    border, prompts, which have keys and values of their own, and the keys and values of a prefix.
    """
    attention, (rows, columns), window, shift = block.attn, h.shape[1:3], block.window_size[0], block.shift_size[0]
    heads, width = attention.num_heads, h.shape[-1] // attention.num_heads
    cosine = hasattr(attention, "logit_scale")
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias)) if cosine else attention.qkv.bias
    q_weight, k_weight, v_weight = attention.qkv.weight.chunk(3)
    q_bias, k_bias, v_bias = bias.chunk(3)
    padded = [-(-side // window) * window for side in (rows, columns)]

    def pixel(sample, row, column):
        row, column = (
            (row + shift) % rows if row < rows else row,
            (column + shift) % columns if column < columns else column,
        )
        return h[sample, row, column] if row < rows and column < columns else torch.zeros_like(h[0, 0, 0])

    def region(place, side):
        return 0 if not shift or place < side - window else 1 if place < side - shift else 2

    def position_bias(here, there):
        return biases[here[0] - there[0] + window - 1, here[1] - there[1] + window - 1]

    def bias_of(down, right):
        if not cosine:
            return attention.relative_position_bias_table[down * (2 * window - 1) + right]
        far = [8.0 * (place - window + 1) / (window - 1) for place in (down, right)]
        far = torch.tensor(far, dtype=h.dtype)
        far = far.sign() * (far.abs() + 1).log2() / 3
        return 16 * torch.sigmoid(attention.cpb_mlp[2].weight @ attention.cpb_mlp[0](far).relu())

    places = range(2 * window - 1)
    biases = {(down, right): bias_of(down, right) for down in places for right in places}
    output = torch.zeros_like(h)
    for sample in range(len(h)):
        for top in range(0, padded[0], window):
            for left in range(0, padded[1], window):
                places = [(top + i, left + j) for i in range(window) for j in range(window)]
                read = torch.stack([pixel(sample, *place) for place in places])
                q, k, v = read @ q_weight.T + q_bias, read @ k_weight.T + k_bias, read @ v_weight.T + v_bias
                if prompts is not None:
                    k, v = torch.cat((prompts @ k_weight.T + k_bias, k)), torch.cat((prompts @ v_weight.T + v_bias, v))
                q, k, v = (y.unflatten(-1, (heads, width)).transpose(0, 1) for y in (q, k, v))
                if cosine:
                    q, k = (y / y.norm(dim=-1, keepdim=True).clamp_min(1e-12) for y in (q, k))
                if prefix is not None:
                    k, v = (
                        torch.cat((own.unflatten(-1, (heads, width)).transpose(0, 1), y), dim=1)
                        for own, y in zip(prefix, (k, v), strict=True)
                    )
                scale = attention.logit_scale.clamp(max=torch.tensor(100.0).log()).exp() if cosine else width**-0.5
                scores = scale * (q @ k.mT)
                extra = k.shape[1] - len(places)
                for a, here in enumerate(places):
                    for b, there in enumerate(places):
                        apart = any(
                            region(x, side) != region(y, side) for x, y, side in zip(here, there, padded, strict=True)
                        )
                        scores[:, a, extra + b] += position_bias(here, there) - 100.0 * apart
                attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
                for place, y in zip(places, attention.proj(attended), strict=True):
                    if place[0] < rows and place[1] < columns:
                        output[sample, (place[0] + shift) % rows, (place[1] + shift) % columns] = y
    return output


def block_of(block, x, **more):
    """One block of Swin or SwinV2 on x (batch, rows, columns, width)."""
    if hasattr(block.attn, "logit_scale"):
        x = x + block.norm1(attention_of(block, x, **more))
        return x + block.norm2(block.mlp(x))
    if "prompts" in more:
        more["prompts"] = block.norm1(more["prompts"])
    x = x + attention_of(block, block.norm1(x), **more)
    return x + block.mlp(block.norm2(x))


def test_prompts_and_prefixes_are_keys_in_every_window(family):
    for method, site in ((vp.VPT(num_tokens=2), "stream_in"), (vp.PrefixTuning(num_tokens=2), "kv")):
        model = made(family)
        vp.attach(model, method, head=False)
        values = moved(model)

        def forward(index, block, x, values=values, site=site):
            if site == "kv":
                return block_of(block, x, prefix=[values[f"{index}.kv.{each}"] for each in ("keys", "values")])
            return block_of(block, x, prompts=values[f"{index}.stream_in.prompts"])

        output, expected = model(images()), output_with(family, forward)
        assert close(output, expected)
        assert not close(output, made(family)(images()))
    assert close(made(family)(images()), output_with(family, lambda index, block, x: block_of(block, x)))


IDENTITY = {
    "lora": vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2", "reduction", "patch_embed")),
    "bit_fit": vp.BitFit(),
    "norms": vp.LayerNormTuning(),
    "ia3": vp.IA3(),
    "adapt_former": vp.AdaptFormer(bottleneck=4, dropout=0.0),
    "convpass": vp.Convpass(bottleneck=4),
    "last_blocks": vp.LastBlocks(),
}
OTHERS = {
    "ssf": vp.SSF(std=0.1),
    "mona": vp.Mona(bottleneck=4, dropout=0.0),
    "houlsby": vp.Adapter(placement="houlsby"),
    "vpt": vp.VPT(num_tokens=2),
}
UNMERGED = {"adapt_former", "convpass", "mona", "houlsby", "vpt", "ssf"}


@pytest.mark.parametrize("name", IDENTITY | OTHERS)
def test_exact_at_the_start_live_and_merged(family, name):
    """No change at the start, to the bit; then every tensor has an effect, and what can be merged computes the same."""
    model = made(family)
    with torch.no_grad():
        base = model(images())
        vp.attach(model, (IDENTITY | OTHERS)[name], head=False)
        assert torch.equal(model(images()), base) == (name in IDENTITY)
    moved(model)
    output = model(images())
    grads = torch.autograd.grad(output.square().sum(), list(model.peft.parameters()))
    assert all(bool(grad.any()) for grad in grads)
    assert not close(output, base)
    if name in UNMERGED:
        with pytest.raises(vp.UnsupportedError, match="cannot be merged"):
            vp.merge(model)
        return
    vp.merge(model)
    assert type(blocks_of(model)[0]).__module__.startswith("timm.")
    assert close(model(images()), output)
    vp.detach(model)
    assert torch.equal(model(images()), base)


def test_lora_is_timms_model_with_other_weights(family):
    model, expected = made(family), made(family)
    targets = {"q": 0, "v": 2}
    vp.attach(model, vp.LoRA(rank=2, targets=(*targets, "proj", "reduction"), blocks="stage:1"), head=False)
    values = moved(model)
    assert {name.partition(".")[0] for name in values} == {"2", "3", "downsample"}
    with torch.no_grad():
        for path in {name.rpartition(".")[0] for name in values}:
            change = values[f"{path}.B"] @ values[f"{path}.A"]
            index, _, site = path.partition(".")
            if index == "downsample":
                expected.layers[1].downsample.reduction.weight += change
            elif site == "proj":
                blocks_of(expected)[int(index)].attn.proj.weight += change
            else:
                blocks_of(expected)[int(index)].attn.qkv.weight.chunk(3)[targets[site]].add_(change)
        assert close(model(images()), expected(images()))
        assert not close(made(family)(images()), expected(images()))


@pytest.mark.parametrize("size", [(24, 24), SIZE], ids=str)
def test_what_acts_before_attention_is_merged_where_no_window_is_filled_up(size):
    """It does not see the zeros that fill up a map, which a merged weight would change."""
    torch.manual_seed(0)
    model = SwinTransformer(img_size=size, num_classes=5, **OPTIONS).double().eval()
    vp.attach(model, vp.RepAdapter(bottleneck=4), head=False)
    shaken(model)
    output = model(images(2, size))
    if size == SIZE:
        with pytest.raises(vp.UnsupportedError, match="the windows of this block are filled up with zeros"):
            vp.merge(model)
        vp.detach(model)
        vp.attach(model, vp.RepAdapter(bottleneck=4, positions=("mlp",)), head=False)
        moved(model)
        output = model(images(2, size))
    vp.merge(model)
    assert close(model(images(2, size)), output)


def test_images_of_a_batch_do_not_influence_each_other(family):
    """Prompts that are averaged over windows in the wrong layout would mix them, as in published code."""
    model = made(family)
    vp.attach(model, [vp.VPT(num_tokens=2), vp.PrefixTuning(num_tokens=2), vp.Mona(bottleneck=4), vp.SSF()], head=False)
    moved(model)
    model.eval()
    assert close(model(images(3))[1:2], model(images(3)[1:2]))


def test_a_row_of_a_mixed_batch_is_that_of_its_adapter(family):
    model = made(family)
    lora, prompts, prefix = vp.LoRA(rank=2), vp.VPT(num_tokens=2), vp.PrefixTuning(num_tokens=2)
    methods = {"a": lora, "b": vp.Adapter(placement="houlsby"), "c": prompts, "d": prompts, "e": prefix, "f": prefix}
    mona, convpass = vp.Mona(bottleneck=2, dropout=0.0), vp.Convpass(bottleneck=2, dropout=0.0)
    methods |= {"g": mona, "h": mona, "i": convpass, "j": convpass}  # which read the grid, of a map that is no square
    for name, method in methods.items():
        vp.attach(model, method, name=name, head=False)
    moved(model)
    for names in (["b", "a", None, "a"], ["c", "d", "c"], ["e", "f"], ["g", "j", None, "h", "i", "a"]):
        with torch.no_grad(), vp.route(model, names):
            output = model(images(len(names)))
        for row, name in enumerate(names):
            with torch.no_grad(), vp.use(model, name):
                assert close(output[row], model(images(len(names)))[row])


def test_images_of_other_sizes(family):
    """A model for images of any size: what acts on the grid follows it, and prompts stay keys of every window."""
    model = made(family, strict=False)
    vp.attach(model, [vp.Mona(bottleneck=4), vp.Convpass(bottleneck=4), vp.VPT(num_tokens=2)], head=False)
    moved(model)
    model.eval()
    wide, high = images(2, (32, 48)), images(2, (48, 32))
    assert close(model(wide)[:1], model(wide[:1]))
    assert not close(model(wide), model(high))


@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 3)], ids=str)
def test_clips(kernel):
    """ST-Adapter convolves the maps of each stage, over the frames of one clip alone."""
    backbone = made()
    model = vp.VideoClassifier(backbone, num_frames=2, num_classes=3).double().eval()
    clips = torch.stack((images(2), images(4)[2:]), dim=1).movedim(1, 2).unflatten(0, (2,))
    with torch.no_grad():
        base = model(clips)
        vp.attach(model, vp.STAdapter(bottleneck=4, kernel=kernel, norm_of_mean=False), head=False)
        assert torch.equal(model(clips), base)
        moved(model)
        output = model(clips)
        assert not close(output, base)
        assert close(model(clips[1:]), output[1:])
        assert not close(model(clips.flip(2)), output)


def test_fused_attention():
    """timm's own choice by TIMM_FUSED_ATTN=2."""
    outputs = []
    for fused in (False, True):
        model = made()
        for block in blocks_of(model):
            block.attn.fused_attn = fused
        torch.manual_seed(3)
        vp.attach(model, [vp.VPT(num_tokens=2), vp.LoRA(rank=2)], head=False)
        moved(model)
        outputs.append(model(images()))
    assert close(*outputs)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (vp.VPT(deep=False), "pixels of a map, in which prompts have no place"),
        (vp.DTL(), "widths 8, 16, .* choose the blocks of one stage"),
        (vp.PrefixTuning(mlp=4), "widths 8, 16"),
        (vp.VPT(projection=4), "widths 8, 16"),
        (vp.Convpass(grid=(7, 8)), "leave grid out"),
        (vp.AIM(), "AIM acts across the frames"),
    ],
    ids=str,
)
def test_refused_with_nothing_changed(method, sentence):
    model = made()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(vp.UserError, match=sentence):
        vp.attach(model, method)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("Sited" in type(module).__name__ for module in model.modules())


def test_the_shifted_block_is_checked_although_it_prints_the_same(monkeypatch):
    monkeypatch.setattr(selfcheck, "_check_block", block_checks.every_time)
    first, second, *_ = blocks_of(made())
    assert repr(first) == repr(second)
    original = windows.attend_in_windows

    def not_shifted_back(block, x):
        y = original(block, x)
        return torch.roll(y, (1, 1), (1, 2)) if any(block.shift_size) else y

    monkeypatch.setattr(timm_swin, "attend_in_windows", not_shifted_back)
    with pytest.raises(vp.UnsupportedError, match="does not compute what its sited form computes"):
        vp.attach(made(), vp.LoRA())
    vp.attach(made(), vp.LoRA(blocks="::2"))


def test_what_peft_would_wrap_without_effect_is_not_exported(tmp_path):
    """SwinV2 reads its weight of q, k and v without a call; Swin calls it."""
    model = made("swin_v2")
    vp.attach(model, vp.LoRA(rank=2), head=False)
    with pytest.raises(vp.UnsupportedError, match="reads its weight and never calls it"):
        vp.export_peft(model, tmp_path / "dead")
    model = made()
    vp.attach(model, vp.LoRA(rank=2, targets=("q", "k", "v", "fc1", "reduction")), head=False)
    moved(model)
    vp.export_peft(model, tmp_path / "live")
    other = peft.PeftModel.from_pretrained(made(), tmp_path / "live")
    assert close(other(images()), model(images()))


def test_a_model_whose_norms_start_at_zero(monkeypatch):
    """Of a new SwinV2 every branch is zero: nothing would show what a block computes, and nothing seem to be live."""
    monkeypatch.setattr(selfcheck, "_check_block", block_checks.every_time)
    model = SwinTransformerV2(img_size=SIZE, **OPTIONS)
    vp.detach(vp.attach(model, vp.LoRA()))
    with monkeypatch.context() as patch:
        patch.setattr(timm_swin_v2, "LARGEST_SCALE", 1.0)
        with pytest.raises(vp.UnsupportedError, match="does not compute what its sited form computes"):
            vp.attach(SwinTransformerV2(img_size=SIZE, **OPTIONS), vp.LoRA())
    monkeypatch.setattr(selfcheck, "_enliven", lambda module: None)
    with pytest.raises(vp.UnsupportedError, match="nothing done at site"):
        vp.attach(SwinTransformerV2(img_size=SIZE, **OPTIONS), vp.LoRA())


# of the fact sheet: Swin-B with a window of 7, SwinV2-B with one of 8 at 256 px
COUNTS = {
    "swin_base_patch4_window7_224": [
        (vp.LoRA(rank=8), 385_024),
        (vp.LoRA(rank=8, targets=("q", "k", "v", "proj", "fc1", "fc2")), 1_732_608),
        (vp.DoRA(rank=8), 409_088),
        (vp.SSF(), 278_016),
        (vp.BitFit(), 137_216),
        (vp.LayerNormTuning(), 57_600),
        (vp.AdaptFormer(bottleneck=64), 1_553_664),
        (vp.Adapter(bottleneck=8), 204_736),
        (vp.IA3(), 72_192),
        (vp.Convpass(bottleneck=8), 437_504),
        (vp.Mona(bottleneck=64), 3_667_456),
        (vp.VPT(num_tokens=10), 120_320),
        (vp.PrefixTuning(num_tokens=10), 240_640),
    ],
    "swinv2_base_window8_256": [(vp.LoRA(rank=8), 385_024), (vp.SSF(), 274_432)],
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    """Trained parameters."""
    with torch.device("meta"):
        model = timm.create_model(name)
    for method, expected in COUNTS[name]:
        vp.attach(model, method, head=False)
        assert sum(parameter.numel() for parameter in model.peft.parameters()) == expected, method
        vp.detach(model)


def test_prompts_start_within_one_bound_at_every_width():
    """That of the patches and of the first width, as in the authors' code."""
    model = made()
    vp.attach(model, vp.VPT(num_tokens=200), head=False)
    bound = (6 / (3 * 4 * 4 + 8)) ** 0.5
    largest = [prompts.abs().max().item() for prompts in model.peft.parameters()]
    assert all(0.98 * bound < each <= bound for each in largest)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("swin", "layers.0.blocks.0.attn.relative_position_bias_table"),
        ("swin_v2", "layers.0.blocks.1.attn.logit_scale"),
        ("swin_v2", "layers.1.blocks.0.attn.cpb_mlp.0.weight"),
        ("swin", "layers.1.downsample.reduction.weight"),
    ],
)
def test_the_fingerprint_knows_every_weight(family, name):
    model = made(family)
    before = fingerprint(model)
    with torch.no_grad():
        model.head.fc.weight.add_(1)
        assert fingerprint(model) == before
        model.get_parameter(name).mul_(2)
    assert fingerprint(model) != before
