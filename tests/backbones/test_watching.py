"""What watches a model sees of the sited forms what it sees of the library's: hooks on every submodule, torch.fx."""

import copy

import pytest
import torch
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
