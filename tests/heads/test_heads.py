"""Heads for dense prediction: their counts in closed form, and their formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

import visionpeft as vp


def count(head, channels=768, maps=1, num_classes=150):
    return sum(parameter.numel() for parameter in head.make(channels, maps, num_classes).parameters())


def test_counts_are_those_of_the_papers():
    assert count(vp.LinearSegmentation()) == 768 * (150 + 2) + 150 == 116_886
    assert count(vp.LinearSegmentation(layers=4), maps=4) == 467_094
    assert count(vp.LinearSegmentation(batch_norm=False)) == 768 * 150 + 150
    assert count(vp.SETR(kind="naive")) == 768 * (256 + 2) + 3 * 256 + 150 * 257 == 237_462
    pup = 9 * 256 * (768 + 3 * 256) + 2 * 768 + 12 * 256 + 150 * 257
    assert count(vp.SETR()) == pup == 3_582_102
    assert count(vp.SETR(), channels=1024) == 4_172_438
    blocks = 2 * (12 * 768**2 + 13 * 768)
    assert count(vp.Segmenter()) == 768 * 769 + blocks + 2 * 768 + 150 * 768 + 2 * 768**2 + 300 == 16_063_020
    neck = 12 * 768**2 + 5 * 768
    assert neck == 7_081_728
    assert count(vp.UPerNet(width=512), maps=4) - neck == 512 * (7 * 768 + 9 * 768 + 99 * 512 + 24) + 150 * 513
    assert count(vp.UPerNet(width=512), maps=4) - neck == 32_332_950
    assert count(vp.UPerNet(), maps=4) - neck == 9_678_486
    readout = 4 * (2 * 768 * 768 + 768)  # which is left out here
    assert count(vp.DPT(), maps=4) + readout == 23_907_926


def normalised(x, weight, bias):
    """Batch normalisation over batch and places, by its formula."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]


def made(head, maps):
    torch.manual_seed(0)
    module = head.make(6, maps, 3).double().train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module, dict(module.named_parameters()), torch.randn(2, maps, 6, 4, 5, dtype=torch.float64)


def test_linear():
    module, p, maps = made(vp.LinearSegmentation(layers=2, dropout=0.0), 2)
    x = normalised(torch.cat([maps[:, 0], maps[:, 1]], dim=1), p["norm.weight"], p["norm.bias"])
    expected = torch.einsum("kc,bchw->bkhw", p["classify.weight"].squeeze(), x) + p["classify.bias"][:, None, None]
    assert torch.allclose(module(maps), expected, atol=1e-10)
    assert not torch.allclose(module(maps.flip(1)), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["naive", "pup"])
def test_setr(kind):
    module, p, maps = made(vp.SETR(kind=kind, width=4), 1)
    x = maps[:, 0]
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    x = (x - mean) / (variance + 1e-5).sqrt() * p["norm.weight"][:, None, None] + p["norm.bias"][:, None, None]
    for step in range(1 if kind == "naive" else 4):
        if step:
            x = F.interpolate(x, size=[2 * side for side in x.shape[-2:]], mode="bilinear", align_corners=False)
        x = F.conv2d(x, p[f"steps.{step}.0.weight"], p[f"steps.{step}.0.bias"], padding=0 if kind == "naive" else 1)
        x = normalised(x, p[f"steps.{step}.1.weight"], p[f"steps.{step}.1.bias"]).clamp(min=0)
    expected = F.conv2d(x, p["classify.weight"], p["classify.bias"])
    assert expected.shape[-2:] == ((4, 5) if kind == "naive" else (32, 40))
    assert torch.allclose(module(maps), expected, atol=1e-9)


def test_layers():
    assert vp.LinearSegmentation(layers=4).blocks(12) == (8, 9, 10, 11)
    assert vp.LinearSegmentation(layers="quarters").blocks(12) == (2, 5, 8, 11)
    assert vp.LinearSegmentation(layers=[0, -1]).blocks(12) == (0, 11)


def test_first_weights_are_small():
    weight = vp.LinearSegmentation().make(768, 1, 150).classify.weight
    assert abs(weight.std().item() - 0.01) < 2e-4


def convolved(p, name, x, padding=0):
    """A convolution without bias, batch normalisation and ReLU, in a Sequential."""
    x = F.conv2d(x, p[f"{name}.0.weight"], padding=padding)
    return normalised(x, p[f"{name}.1.weight"], p[f"{name}.1.bias"]).clamp(min=0)


def to(x, size, corners=False):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=corners)


def test_upernet():
    module, p, maps = made(vp.UPerNet(width=4, dropout=0.0), 4)
    first, second, third, fourth = maps.unbind(1)
    x = F.conv_transpose2d(first, p["neck.0.0.weight"], p["neck.0.0.bias"], stride=2)
    x = F.gelu(normalised(x, p["neck.0.1.weight"], p["neck.0.1.bias"]))
    first = F.conv_transpose2d(x, p["neck.0.3.weight"], p["neck.0.3.bias"], stride=2)
    second = F.conv_transpose2d(second, p["neck.1.weight"], p["neck.1.bias"], stride=2)
    fourth = F.max_pool2d(fourth, 2, ceil_mode=True)
    pools = [
        to(convolved(p, f"pools.{i}", F.adaptive_avg_pool2d(fourth, n)), (2, 3)) for i, n in enumerate((1, 2, 3, 6))
    ]
    d = convolved(p, "pooled", torch.cat([fourth, *pools], dim=1), padding=1)
    c = convolved(p, "lateral.2", third) + to(d, (4, 5))
    b = convolved(p, "lateral.1", second) + to(c, (8, 10))
    a = convolved(p, "lateral.0", first) + to(b, (16, 20))
    smooth = [to(convolved(p, f"smooth.{i}", x, padding=1), (16, 20)) for i, x in enumerate((a, b, c))]
    x = convolved(p, "fuse", torch.cat([*smooth, to(d, (16, 20))], dim=1), padding=1)
    expected = F.conv2d(x, p["classify.weight"], p["classify.bias"])
    assert torch.allclose(module(maps), expected, rtol=1e-9, atol=1e-8)


def test_dpt():
    module, p, maps = made(vp.DPT(width=8, dropout=0.0), 4)

    def residual(name, x):
        y = F.conv2d(x.clamp(min=0), p[f"{name}.1.weight"], padding=1)
        y = normalised(y, p[f"{name}.2.weight"], p[f"{name}.2.bias"]).clamp(min=0)
        y = F.conv2d(y, p[f"{name}.4.weight"], padding=1)
        return x + normalised(y, p[f"{name}.5.weight"], p[f"{name}.5.bias"])

    def fused(index, x, size):
        x = to(residual(f"fusion.{index}.of_sum", x), size, corners=True)
        return F.conv2d(x, p[f"fusion.{index}.out.weight"], p[f"fusion.{index}.out.bias"])

    a, b, c, d = (F.conv2d(x, p[f"project.{i}.weight"], p[f"project.{i}.bias"]) for i, x in enumerate(maps.unbind(1)))
    a = F.conv_transpose2d(a, p["resample.0.weight"], p["resample.0.bias"], stride=4)
    b = F.conv_transpose2d(b, p["resample.1.weight"], p["resample.1.bias"], stride=2)
    d = F.conv2d(d, p["resample.3.weight"], p["resample.3.bias"], stride=2, padding=1)
    a, b, c, d = (F.conv2d(x, p[f"level.{i}.weight"], padding=1) for i, x in enumerate((a, b, c, d)))
    x = fused(3, d, (4, 5))
    x = fused(2, x + residual("fusion.2.of_level", c), (8, 10))
    x = fused(1, x + residual("fusion.1.of_level", b), (16, 20))
    x = fused(0, x + residual("fusion.0.of_level", a), (32, 40))
    expected = F.conv2d(convolved(p, "before", x, padding=1), p["classify.weight"], p["classify.bias"])
    assert torch.allclose(module(maps), expected, rtol=1e-8, atol=1e-6)


def test_segmenter():
    module, p, maps = made(vp.Segmenter(depth=1, dropout=0.0), 1)

    def layer_norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = linear("enter", maps[:, 0].reshape(2, 6, 20).transpose(1, 2))
    x = torch.cat([x, p["tokens"].expand(2, -1, -1)], dim=1)
    q, k, v = linear("blocks.0.attn.qkv", layer_norm("blocks.0.norm1", x)).split(6, dim=-1)
    x = x + linear("blocks.0.attn.proj", (q @ k.transpose(1, 2) / 6**0.5).softmax(-1) @ v)
    h = linear("blocks.0.mlp.fc1", layer_norm("blocks.0.norm2", x))
    x = x + linear("blocks.0.mlp.fc2", h * 0.5 * (1 + torch.erf(h / 2**0.5)))
    x = layer_norm("norm", x)
    patches, classes = x[:, :20] @ p["of_patches"], x[:, 20:] @ p["of_classes"]
    cosine = (patches / patches.norm(dim=-1, keepdim=True)) @ (classes / classes.norm(dim=-1, keepdim=True)).mT
    expected = layer_norm("norm_of_masks", cosine).transpose(1, 2).reshape(2, 3, 4, 5)
    assert torch.allclose(module(maps), expected, atol=1e-8)
    assert not torch.allclose(expected[:, 0], expected[:, 1], atol=1e-3)


@pytest.mark.parametrize("head", [vp.DPT(), vp.UPerNet()])
def test_four_maps_are_needed(head):
    assert head.blocks(12) == (2, 5, 8, 11)
    with pytest.raises(vp.ConfigurationError, match="reads 4 blocks, not 2; set its layers to 'quarters', or to 4"):
        type(head)(layers=2).blocks(12)


@pytest.mark.parametrize("make", [lambda: vp.DPT(width=12), lambda: vp.UPerNet(width=0), lambda: vp.Segmenter(depth=0)])
def test_sizes_that_make_no_head_are_refused(make):
    with pytest.raises(vp.ConfigurationError, match="must be"):
        make()
