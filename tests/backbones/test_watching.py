"""What watches a model sees of the sited forms what it sees of the library's: hooks on every submodule, torch.fx."""

import copy

import pytest
import torch
from away_from_start import moved
from reference.hosts import HOSTS
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import nn

import visionpeft as vp

IMAGES = [host for host in HOSTS if host.takes == "images"]
METHODS = {
    "lora": vp.LoRA(rank=2),
    "ssf": vp.SSF(),
    "vpt": vp.VPT(num_tokens=2),
    "shallow": vp.VPT(num_tokens=2, deep=False),
    "prefix": vp.PrefixTuning(num_tokens=2),
    "adaptformer": vp.AdaptFormer(bottleneck=4),
}


def unfused(model):
    """Attention written out, as recipes for attention maps ask for."""
    for module in model.modules():
        for name in ("fused_attn", "use_fsdpa"):
            if hasattr(module, name):
                setattr(module, name, False)
    return model


def calls(model, inputs):
    """Paths of the base's submodules in the order in which they are called."""
    seen, handles = [], []
    for path, module in model.named_modules():
        if path and not path.startswith("peft"):
            handles.append(module.register_forward_hook(lambda *_, path=path: seen.append(path)))
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", IMAGES, ids=lambda host: host.name)
def test_hooks_on_every_submodule_fire_as_often_as_in_the_library(host, method, fused):
    model = host.build()
    if not fused:
        unfused(model)
    expected = calls(model, host.inputs())
    vp.attach(model, METHODS[method])
    found = calls(model, host.inputs())
    if host.name == "clip_visual":  # torch's own attention reads out_proj, ours calls it
        found = [path for path in found if not path.endswith("out_proj")]
    assert sorted(found) == sorted(expected)
    assert any("attn_drop" in path for path in expected) is (not fused and host.name != "clip_visual")


@pytest.mark.parametrize("method", ["lora", "ssf", "adaptformer"])
@pytest.mark.parametrize("host", [h for h in IMAGES if h.name != "clip_visual"], ids=lambda host: host.name)
def test_attention_maps(host, method):
    """The public recipe, a hook on attn_drop: at the start, where LoRA changes nothing, the maps of the library."""

    def maps(model):
        found = []
        for module in model.modules():
            if hasattr(module, "attn_drop") and hasattr(module, "fused_attn"):
                module.attn_drop.register_forward_hook(lambda _, inputs, output: found.append(output))
        model(host.inputs(dtype=torch.float64))
        return found

    model = unfused(host.build(torch.float64))
    expected = maps(copy.deepcopy(model))
    vp.attach(model, METHODS[method])
    if method == "ssf":
        with torch.no_grad():
            for name, parameter in model.peft.named_parameters():
                if "head" not in name:
                    parameter.fill_(1.0 if name.endswith("scale") else 0.0)
    found = maps(model)
    assert len(found) == len(expected) >= 3
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
        assert torch.allclose(ours.sum(-1), torch.ones((), dtype=torch.float64))
    if method == "lora":  # and the comparison is not blind
        with torch.no_grad():
            for name, parameter in model.peft.named_parameters():
                if name.endswith(".B"):
                    parameter.normal_()
        changed = []
        model.blocks[0].attn.attn_drop.register_forward_hook(lambda _, inputs, output: changed.append(output))
        model(host.inputs(dtype=torch.float64))
        assert (changed[0] - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize("host", [h for h in IMAGES if h.name in ("vit_cls", "beit", "eva_fused")], ids=str)
def test_maps_of_prompts_have_a_column_for_each(host):
    model, found = unfused(host.build()), []
    vp.attach(model, vp.VPT(num_tokens=2))
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda _, inputs, output: found.append(output))
    model(host.inputs())
    assert found[0].shape[-2:] == (17, 19)


def test_a_hook_on_every_module_of_the_program_sees_the_fused_projection():
    host = IMAGES[0]
    model, seen = host.build(), []
    vp.attach(model, vp.LoRA(rank=2))
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(host.inputs())
    finally:
        handle.remove()
    assert sum(each is model.blocks[1].attn.qkv for each in seen) == 1


def linear_outputs(model, inputs, *, backward=False):
    """What hooks on every linear layer of the base see, in order; with `backward`, also the gradients of its input."""
    seen, handles = [], []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not path.startswith("peft"):
            handles.append(module.register_forward_hook(lambda _, x, y, path=path: seen.append((path, y.detach()))))
            if backward:
                watch = lambda _, into, out, path=path: seen.append((path, into[0], out[0]))  # noqa: E731
                handles.append(module.register_full_backward_hook(watch))
    with torch.set_grad_enabled(backward):
        y = model(inputs.requires_grad_(backward))
        if backward:
            y.square().sum().backward()
    for handle in handles:
        handle.remove()
    return [y.detach(), *(tensor for _, *tensors in sorted(seen, key=lambda each: each[0]) for tensor in tensors)]


@pytest.mark.parametrize(
    "method", [vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2")), vp.BitFit()], ids=str
)
@pytest.mark.parametrize("host", [h for h in IMAGES if h.name != "clip_visual"], ids=lambda host: host.name)
def test_hooks_on_linear_layers_see_what_they_see_of_the_merged_model(host, method):
    """Also on a fused qkv, whose rows are three sites: keys of it are what dense features of a ViT are made of."""
    model = vp.attach(host.build(torch.float64), method)
    moved(model)
    merged = vp.merge(copy.deepcopy(model), keep=False)
    inputs = host.inputs(dtype=torch.float64)
    for backward in (False, True) if host.name in ("vit_cls", "dinov3", "eva_split") else (False,):
        found, expected = (linear_outputs(each, inputs.clone(), backward=backward) for each in (model, merged))
        assert len(found) == len(expected) > 5
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() <= 1e-9 * theirs.norm().clamp(min=1e-3)


def test_hooks_on_a_fused_projection_see_the_route_and_may_give_another_output():
    """Row by row what the adapter of the row gives; and what a hook returns is what the attention reads."""
    host = next(host for host in IMAGES if host.name == "vit_cls")
    model = host.build(torch.float64)
    for name in ("a", "b"):
        vp.attach(model, vp.LoRA(rank=2), name)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    inputs, seen = host.inputs(dtype=torch.float64), []
    handle = model.blocks[1].attn.qkv.register_forward_hook(lambda _, x, y: seen.append(y.detach().clone()))
    names = ["a", None, "b", "a"][: len(inputs)]
    with torch.no_grad(), vp.route(model, names):
        model(inputs)
    for row, name in enumerate(names):
        with torch.no_grad(), vp.use(model, name):
            model(inputs)
        assert torch.allclose(seen[0][row], seen[-1][row], atol=1e-12)
    handle.remove()
    vp.activate(model, "a")
    model.blocks[1].attn.qkv.register_forward_hook(lambda _, x, y: torch.zeros_like(y))
    entered = []
    model.blocks[1].attn.proj.register_forward_pre_hook(lambda _, x: entered.append(x[0]))
    model(inputs)
    assert not entered[0].any()


class Tracer(torch.fx.Tracer):
    """With the leaves that timm names."""

    def __init__(self):
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))

    def is_leaf_module(self, module, path):
        return isinstance(module, tuple(get_notrace_modules())) or super().is_leaf_module(module, path)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", IMAGES, ids=lambda host: host.name)
def test_fx_traces_what_timm_traces(host, method, fused):
    """timm's own model is traced, then the adapted one, and the graph computes the same for another batch."""
    model = host.build() if fused or host.name == "clip_visual" else unfused(host.build())
    Tracer().trace(model)
    vp.attach(model, METHODS[method])
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    inputs = host.inputs(batch=3, seed=1)
    expected = model(inputs)
    assert torch.allclose(traced(inputs), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    vp.disable(model)
    assert not torch.allclose(model(inputs), expected, rtol=1e-3)
