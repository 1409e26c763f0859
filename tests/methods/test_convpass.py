"""Convpass where tokens are not a square of patches behind one class token."""

import dataclasses

import pytest
import torch
from conftest import distance, randomise
from reference import edits_of, forward, shapes_of
from reference.hosts import HOSTS

import visionpeft as vp

BY_NAME = {host.name: host for host in HOSTS}


def stack(host, *methods):
    """A model with these methods stacked, moved off their start, and its tensors."""
    model = vp.attach(host.build(torch.float64), list(methods), head=False)
    randomise(model.peft["default"])
    return model.eval(), {name: p.detach() for name, p in model.peft["default"].named_parameters()}


@pytest.mark.parametrize("host", ["vit_registers", "vit_map", "vit_dynamic", "dinov3"])
@pytest.mark.parametrize("prompts", [vp.VPT(2, deep=True), vp.VPT(3, deep=False), vp.GatedVPT(2, gate=0.5)], ids=repr)
def test_prompts_and_registers_are_images_of_one_pixel(host, prompts):
    """Beside prompts, with registers, without a class token, on grids that are not square: as in the transcription."""
    host = BY_NAME[host]
    grid = tuple(side // 8 for side in host.size) if host.name in ("vit_dynamic", "dinov3") else None
    bypass = vp.Convpass(bottleneck=3, grid=grid)
    model, tensors = stack(host, prompts, bypass)
    inputs, plain = host.inputs(dtype=torch.float64), host.build(torch.float64)
    fields = {method.name: dataclasses.asdict(method) for method in (prompts, bypass)}
    expected = forward(plain, inputs, edits_of(tensors, fields, shapes_of(plain)))
    with torch.no_grad():
        assert distance(model(inputs), expected) < 1e-11


def test_transposed_images_give_transposed_convolutions():
    """Rows are rows: on a grid of 5 x 3 the neighbour below is three patches later."""
    module = vp.methods.convpass.ConvolutionalBypass(4, 4, (5, 3), 1.0, 0.0, 0.0, "xavier").double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
        x = torch.randn(1, 1 + 15, 4, dtype=torch.float64, requires_grad=True)
        where = 1 + 2 * 3 + 1  # the patch in row 2, column 1
    with torch.enable_grad():
        module(x, 1)[0, where].sum().backward()
    reached = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert reached == [1 + row * 3 + column for row in (1, 2, 3) for column in (0, 1, 2)]


def test_other_image_sizes_are_refused():
    """More or fewer patches than the grid has are refused when they come, an unknown grid when attaching."""
    host = BY_NAME["vit_dynamic"]
    model = host.build()
    with pytest.raises(vp.UnsupportedError, match="grid"):
        vp.attach(model, vp.Convpass())
    assert not hasattr(model, "peft")
    vp.attach(model, vp.Convpass(grid=(5, 3)))
    with pytest.raises(vp.UnsupportedError, match="5 x 3 patches, but there are 16"):
        model(torch.zeros(1, 3, 32, 32))
    assert model(torch.zeros(1, 3, 40, 24)).shape == (1, 5)


def test_towers_without_patches_are_refused():
    model = BY_NAME["clip_whole"].build()
    with pytest.raises(vp.UnsupportedError, match="text tower"):
        vp.attach(model, vp.Convpass(towers="text"))
    assert not hasattr(model, "peft")


@pytest.mark.parametrize(
    "options", [{"bottleneck": 0}, {"positions": ("block",)}, {"positions": "mlp"}, {"init": "zeros"}, {"grid": (4,)}]
)
def test_refused_options(options):
    with pytest.raises(vp.ConfigurationError):
        vp.Convpass(**options)


def test_starts():
    """The published convolution starts as the identity or Xavier-uniform; nothing is added at the start."""
    for init in ("identity", "xavier"):
        model = vp.attach(BY_NAME["vit_cls"].build(), vp.Convpass(bottleneck=6, init=init))
        conv = model.peft["default"].convpass.visual["0"].attn_in.conv.weight
        identity = torch.zeros_like(conv)
        for channel in range(6):
            identity[channel, channel, 1, 1] = 1
        assert torch.equal(conv, identity) == (init == "identity")
        assert conv.abs().max() <= max(1.0, (6 / (2 * 9 * 6)) ** 0.5)


def test_the_bypass_is_dropped_for_whole_samples():
    """Drop path, as in the paper, leaves out the bypass of a sample or keeps it, scaled."""
    torch.manual_seed(0)
    module = vp.methods.convpass.ConvolutionalBypass(4, 4, (2, 2), 1.0, 0.0, 0.5, "xavier")
    torch.nn.init.normal_(module.up.weight)
    x = torch.randn(1, 5, 4).expand(64, -1, -1)
    full = module.eval()(x, 1)[0]
    dropped = module.train()(x, 1)
    kinds = [0 if sample.abs().max() == 0 else 1 for sample in dropped]
    assert 0 < sum(kinds) < 64
    for sample, kind in zip(dropped, kinds, strict=True):
        assert torch.allclose(sample, 2 * full * kind, atol=1e-5)
