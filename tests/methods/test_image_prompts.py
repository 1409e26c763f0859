"""Prompts and adapters of images: options and hosts beside the matrix, and what must hold by their papers."""

import dataclasses

import pytest
import torch
from conftest import distance, randomise
from reference import edits_of, forward, shapes_of
from reference.hosts import HOSTS

import visionpeft as vp
from visionpeft.errors import UserError
from visionpeft.methods.mona import MultiCognitiveAdapter

BY_NAME = {host.name: host for host in HOSTS}
HOST = BY_NAME["vit_cls"]


def stacked(host, *methods):
    """A model with these methods stacked, off their start, in float64."""
    torch.manual_seed(2)
    model = vp.attach(host.build(torch.float64), list(methods), head=False)
    randomise(model.peft["default"])
    return model.eval()


def output(model, host=HOST, seed=0):
    with torch.no_grad():
        return model(host.inputs(dtype=torch.float64, seed=seed))


def at(model, method, block, site):
    """A module of the adapter."""
    return model.peft["default"].get_submodule(f"{method}.visual.{block}.{site}")


GRID = {"grid": (5, 3)}  # of vit_dynamic, which takes images of any size


@pytest.mark.parametrize(
    ("host", "methods"),
    [
        ("vit_dynamic", [vp.Mona(3, **GRID), vp.VPT(2, deep=False)]),
        ("vit_registers", [vp.Mona(3), vp.VPT(2)]),
        ("vit_registers", [vp.AdaptFormer(4, before_scaling=True)]),
        ("vit_res_post", [vp.AdaptFormer(4, before_scaling=True)]),
        ("beit", [vp.E2VPT(num_tokens=2, num_keys=3, shared=True)]),
        ("vit_map", [vp.LPT(num_tokens=2, bottleneck=3, start=2)]),
        ("vit_registers", [vp.LPT(num_tokens=3, bottleneck=3, reads="patches")]),
        ("dinov3", [vp.PrefixPropagation(num_tokens=2, keep=0.5)]),
    ],
    ids=repr,
)
def test_formula(host, methods):
    """Options, registers, other prompts, no class token, a grid that is not square: as in the transcription."""
    host = BY_NAME[host]
    model, plain = stacked(host, *methods), host.build(torch.float64)
    tensors = {name: p.detach() for name, p in model.peft["default"].named_parameters()}
    fields = {method.name: dataclasses.asdict(method) for method in methods}
    expected = forward(plain, host.inputs(dtype=torch.float64), edits_of(tensors, fields, shapes_of(plain)))
    assert distance(output(model, host), expected) < 1e-11


# Mona


def mona(grid=(9, 9)):
    torch.manual_seed(0)
    module = MultiCognitiveAdapter(4, 3, grid, 0.0).double().eval()
    randomise(module)
    return module


@torch.no_grad()
def change(module, image):
    """What it adds to an image (rows, columns, 4) of patches after one class token."""
    x = torch.cat((torch.zeros(1, image.shape[-1], dtype=image.dtype), image.flatten(0, 1)))[None]
    return (module(x, 1) - x)[0, 1:].unflatten(0, image.shape[:2])


def test_mona_without_convolutions_is_a_bottleneck_of_a_scaled_norm():
    module, image = mona(), torch.randn(9, 9, 4, dtype=torch.float64)
    with torch.no_grad():
        for part in (*module.depthwise, module.pointwise):
            part.weight.zero_()
            part.bias.zero_()
        u = module.norm_scale * module.norm(image) + module.scale * image
        assert distance(change(module, image), module.up(torch.nn.functional.gelu(module.down(u)))) < 1e-12
        module.depthwise[1].bias.add_(0.1)
        assert distance(change(module, image), module.up(torch.nn.functional.gelu(module.down(u)))) > 1e-3


def test_mona_moves_inner_patches_of_a_constant_image_alike():
    """Kernels of 7 x 7 reach three patches: further in all see the same, nearer they see the border."""
    delta = change(mona(), torch.randn(4, dtype=torch.float64).expand(9, 9, 4))
    inner = delta[3:6, 3:6].flatten(0, 1)
    assert (inner - inner[0]).abs().max() < 1e-12
    assert (delta[2, 3:6] - inner[0]).abs().max() > 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
def test_mona_transposes_with_symmetric_kernels(symmetric):
    module, image = mona((9, 9)), torch.randn(9, 9, 4, dtype=torch.float64)
    if symmetric:
        with torch.no_grad():
            for each in module.depthwise:
                each.weight.copy_((each.weight + each.weight.mT) / 2)
    same = distance(change(module, image.transpose(0, 1)), change(module, image).transpose(0, 1)) < 1e-12
    assert same == symmetric


def test_mona_starts_as_published():
    module = MultiCognitiveAdapter(4, 3, (2, 2), 0.1)
    assert torch.equal(module.norm_scale, torch.full((4,), 1e-6))
    assert torch.equal(module.scale, torch.ones(4))
    assert all(each.weight.abs().max() <= each.kernel_size[0] ** -1 for each in module.depthwise)
    assert module.up.weight.any()


# prompts that travel


def copy_prompts(model, method, tokens):
    """Give the prompts of each block to a method with such modules at `stream_in`."""
    with torch.no_grad():
        for block, own in tokens.items():
            at(model, method, block, "stream_in").prompts.copy_(own)


def test_propagation_is_deep_or_shallow_at_its_ends():
    deep = stacked(HOST, vp.PrefixPropagation(num_tokens=3, keep=0.0))
    tokens = {block: at(deep, "prefix_propagation", block, "stream_in").source.tokens for block in range(3)}
    other = stacked(HOST, vp.VPT(num_tokens=3))
    copy_prompts(other, "vpt", tokens)
    assert distance(output(deep), output(other)) < 1e-12
    travelling = stacked(HOST, vp.PrefixPropagation(num_tokens=3))
    assert distance(output(travelling), output(other)) > 1e-3  # with keep = 1 it is another function
    shallow = stacked(HOST, vp.VPT(num_tokens=3, deep=False))
    copy_prompts(shallow, "vpt", {0: at(travelling, "prefix_propagation", 0, "stream_in").source.tokens})
    with torch.no_grad():
        for block in (1, 2):
            at(travelling, "prefix_propagation", block, "stream_in").source.tokens.zero_()
    assert distance(output(travelling), output(shallow)) < 1e-12


def test_prompts_that_travel_keep_their_place_beside_others():
    """Beside deep prompts, which enter after them and before them in the sequence: with keep = 0 as more of those."""
    model = stacked(HOST, vp.VPT(num_tokens=2), vp.PrefixPropagation(num_tokens=3, keep=0.0))
    more = stacked(HOST, vp.VPT(num_tokens=5))
    both = {}
    for block in range(3):
        own = at(model, "prefix_propagation", block, "stream_in").source.tokens
        both[block] = torch.cat((at(model, "vpt", block, "stream_in").prompts, own))
    copy_prompts(more, "vpt", both)
    assert distance(output(model), output(more)) < 1e-12
    with torch.no_grad():
        both[1][-1] += torch.randn(32, dtype=torch.float64)  # a constant would be taken out by the norm
    copy_prompts(more, "vpt", both)
    assert distance(output(model), output(more)) > 1e-4


def test_late_prompts_leave_everything_below_alone():
    """Tokens that reach block m are the backbone's to the bit, and no gradient goes below it."""
    model, plain = stacked(HOST, vp.LPT(num_tokens=2, bottleneck=3, start=2)), HOST.build(torch.float64)
    seen = []
    for each in (model, plain):
        for block in each.blocks[1:]:
            block.register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
        each(HOST.inputs(dtype=torch.float64))
    (below, late), (_, late_result), (plain_below, plain_late), _ = [(a, b) for a, b in seen]
    assert torch.equal(below, plain_below)
    assert torch.equal(late, plain_late)
    assert not below.requires_grad
    assert not late.requires_grad
    assert late_result.requires_grad


def test_late_prompts_are_those_of_the_class_token():
    """Images of one class token get the same prompts, others do not; a generator of zeros and a bias is VPT-shallow."""
    source = at(stacked(HOST, vp.LPT(num_tokens=2, bottleneck=3)), "lpt", 1, "stream_in").source
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    x[1, 0] = x[0, 0]
    with torch.no_grad():
        first, second = source(x, 1)
        assert torch.equal(first, second)
        x[1, 0] += 1
        assert (source(x, 1)[1] - first).abs().max() > 1e-4
    model, shallow = stacked(HOST, vp.LPT(2, 3, start=0)), stacked(HOST, vp.VPT(2, deep=False))
    source = at(model, "lpt", 0, "stream_in").source
    with torch.no_grad():
        source.up.weight.zero_()
    copy_prompts(shallow, "vpt", {0: source.up.bias.unflatten(0, (2, -1))})
    assert distance(output(model), output(shallow)) < 1e-12


# keys, values and prompts


def test_e2vpt_is_vpt_without_keys_and_prefix_tuning_without_prompts():
    alone, deep = stacked(HOST, vp.E2VPT(num_tokens=3, num_keys=0)), stacked(HOST, vp.VPT(num_tokens=3))
    copy_prompts(deep, "vpt", {block: at(alone, "e2vpt", block, "stream_in").prompts for block in range(3)})
    assert distance(output(alone), output(deep)) < 1e-12
    for shared in (True, False):
        keys, prefix = stacked(HOST, vp.E2VPT(0, 3, shared=shared)), stacked(HOST, vp.PrefixTuning(num_tokens=3))
        with torch.no_grad():
            for block in range(3):
                own, other = at(keys, "e2vpt", block, "kv"), at(prefix, "prefix_tuning", block, "kv")
                other.keys.copy_(own.keys)
                other.values.copy_(own.keys if shared else own.values)
        assert distance(output(keys), output(prefix)) < 1e-12


def test_e2vpt_starts_kaiming_uniform():
    """Over (heads, tokens, head width), the fan of each head is tokens times head width."""
    model = vp.attach(HOST.build(), vp.E2VPT(num_keys=4), head=False)
    values = torch.cat([at(model, "e2vpt", block, "kv").values.detach().flatten() for block in range(3)])
    bound = (6 / (4 * 8)) ** 0.5
    assert 0.98 * bound < values.max() <= bound
    assert abs(values.square().mean() - bound**2 / 3) < 0.15 * bound**2 / 3


def test_adaptformer_before_scaling_is_scaled():
    """Beside a layer scale of one it is the default; a layer scale of zero takes it out."""
    host, outputs = BY_NAME["vit_registers"], {}
    for scale in (1.0, 0.0):
        for before in (False, True):
            model = stacked(host, vp.AdaptFormer(4, before_scaling=before))
            for block in model.blocks:
                torch.nn.init.constant_(block.ls2.gamma, scale)
            outputs[scale, before] = output(model, host)
        with vp.use(model, None):
            outputs[scale, None] = output(model, host)
    assert distance(outputs[1.0, False], outputs[1.0, True]) < 1e-12
    assert torch.equal(outputs[0.0, True], outputs[0.0, None])
    assert distance(outputs[0.0, False], outputs[0.0, None]) > 1e-3


# refusals


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (vp.Mona, {"bottleneck": 0}, "bottleneck must be a positive integer"),
        (vp.Mona, {"grid": (0, 3)}, "grid must be rows and columns"),
        (vp.Mona, {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        (vp.E2VPT, {"num_tokens": -1}, "integers from 0 on"),
        (vp.E2VPT, {"num_tokens": 0, "num_keys": 0}, "nothing would be learned"),
        (vp.PrefixPropagation, {"num_tokens": 0}, "num_tokens must be a positive integer"),
        (vp.PrefixPropagation, {"add": 0.0}, "use VPT"),
        (vp.LPT, {"bottleneck": 0}, "bottleneck must be a positive integer"),
        (vp.LPT, {"reads": "words"}, "reads must be"),
    ],
    ids=repr,
)
def test_refused_options(kind, fields, sentence):
    with pytest.raises(vp.ConfigurationError, match=sentence):
        kind(**fields)


@pytest.mark.parametrize(
    ("host", "method", "sentence"),
    [
        ("vit_dynamic", vp.Mona(2), "Mona needs the grid of patches"),
        ("clip_whole", vp.Mona(2, towers="text"), "the text tower has none"),
        ("clip_whole", vp.LPT(towers="text"), "the text tower has none"),
        ("clip_whole", vp.E2VPT(towers="text"), "the text tower has no patches"),
        ("vit_cls", vp.LPT(start=3), "start must be a block of the visual tower, 0 to 2, not 3"),
        ("vit_cls", vp.PrefixPropagation(blocks=[0, 2]), "consecutive blocks"),
    ],
    ids=repr,
)
def test_refused_hosts(host, method, sentence):
    """In words, and before anything is changed."""
    model = BY_NAME[host].build()
    with pytest.raises(UserError, match=sentence):
        vp.attach(model, method)
    assert not hasattr(model, "peft")


def test_mona_refuses_images_of_other_sizes():
    model = vp.attach(BY_NAME["vit_dynamic"].build(), vp.Mona(2, **GRID))
    with pytest.raises(vp.UnsupportedError, match="5 x 3 patches, but there are 16"):
        model(torch.zeros(1, 3, 32, 32))
