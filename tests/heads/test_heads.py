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
