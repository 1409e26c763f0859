"""Backbones whose linear layers torchao has quantised: adapters train on them, and merging gives plain numbers."""

import copy

import pytest
import torch
import torch.nn as nn
from conftest import MERGE_REFUSALS, distance, randomise
from reference.hosts import HOSTS
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

import visionpeft as vp

HOST = {host.name: host for host in HOSTS}
CONFIGURATIONS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8)),
}
METHODS = {
    "lora": vp.LoRA(rank=2, targets=("q", "v", "proj", "fc1", "fc2")),
    "dora": vp.DoRA(rank=2, targets=("q", "fc1")),
    "ia3": vp.IA3(),
    "ssf": vp.SSF(),
    "bit_fit": vp.BitFit(),
    "vpt": vp.VPT(num_tokens=2),
    "adapt_former": vp.AdaptFormer(bottleneck=4),
    "prefix": vp.PrefixTuning(num_tokens=2),
    "norms": vp.LayerNormTuning(),
}
MERGEABLE = ("lora", "dora", "ia3", "ssf", "bit_fit", "norms")
kinds = pytest.mark.parametrize("kind", CONFIGURATIONS)
hosts = pytest.mark.parametrize("host", [HOST["vit_cls"], HOST["eva_split"]], ids=repr)


def in_blocks(module, name):
    return isinstance(module, nn.Linear) and "blocks." in name


def quantised(host, kind):
    model = host.build()
    quantize_(model, CONFIGURATIONS[kind], in_blocks)
    return model


def dequantised(host, kind):
    """The same backbone with the numbers its integers stand for."""
    model = quantised(host, kind)
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight) is not nn.Parameter:
            module.weight = nn.Parameter(module.weight.dequantize())
    return model


def output(host, model):
    with torch.no_grad():
        return host.run(model, host.inputs())


@kinds
@hosts
@pytest.mark.parametrize("name", METHODS)
def test_training_and_detaching(host, kind, name):
    """Three steps give the weights and logits that they give on the dequantised backbone; detached, it is unchanged."""
    results, before = [], None
    for build in (quantised, dequantised):
        model = build(host, kind)
        before = output(host, model)
        torch.manual_seed(0)
        vp.attach(model, METHODS[name])
        randomise(model.peft["default"])
        optimiser = torch.optim.SGD(vp.trainable_parameters(model), lr=0.01)
        for _ in range(3):
            optimiser.zero_grad()
            host.run(model, host.inputs()).square().mean().backward()
            optimiser.step()
        trained = torch.cat([p.detach().flatten() for p in model.peft["default"].parameters()])
        results.append((output(host, model), trained))
        vp.detach(model)
        assert torch.equal(output(host, model), before)
    (logits, weights), (expected_logits, expected_weights) = results
    assert distance(logits, expected_logits) < 1e-4
    assert distance(weights, expected_weights) < 1e-4
    assert distance(logits, before) > 1e-3


@kinds
@hosts
@pytest.mark.parametrize("name", MERGEABLE)
def test_merging_gives_numbers(host, kind, name):
    """Layers that change become plain float layers, the others stay as they are; `unmerge` brings the integers back."""
    if (host.name, name) in MERGE_REFUSALS:
        pytest.skip(MERGE_REFUSALS[host.name, name])
    model = vp.attach(quantised(host, kind), METHODS[name])
    randomise(model.peft["default"])
    types = {key: type(value) for key, value in model.named_parameters() if not key.startswith("peft.")}
    expected = output(host, model)
    vp.merge(model)
    assert distance(output(host, model), expected) < 1e-5
    proj = model.blocks[0].attn.proj.weight
    if name == "lora":
        assert type(proj) is nn.Parameter
        assert proj.dtype == torch.float32
    if name == "dora":
        assert type(proj) is types["blocks.0.attn.proj.weight"]
    vp.unmerge(model)
    assert torch.equal(output(host, model), expected)
    assert {k: type(v) for k, v in model.named_parameters() if not k.startswith("peft.")} == types


@kinds
def test_saving_and_loading(kind, tmp_path):
    """An adapter goes back onto the same integers, not onto the numbers they were made from."""
    host = HOST["vit_cls"]
    model = vp.attach(quantised(host, kind), vp.LoRA(rank=2))
    randomise(model.peft["default"])
    vp.save(model, tmp_path / "adapter")
    fresh = quantised(host, kind)
    vp.load(fresh, tmp_path / "adapter")
    assert torch.equal(output(host, fresh), output(host, model))
    with pytest.raises(vp.StorageError, match="other weights"):
        vp.load(host.build(), tmp_path / "adapter")


def test_copies(tmp_path):
    host = HOST["vit_cls"]
    model = vp.attach(quantised(host, "int8"), vp.LoRA(rank=2))
    randomise(model.peft["default"])
    expected = output(host, model)
    twin = copy.deepcopy(model)
    assert torch.equal(output(host, twin), expected)
    vp.detach(twin)
    assert torch.equal(output(host, model), expected)


def test_self_check_still_holds(monkeypatch):
    """A sited block that computes something else than the library's is refused on integers, too."""
    from visionpeft.backbones.timm_vit import SitedBlock

    forward = SitedBlock.forward
    monkeypatch.setattr(SitedBlock, "forward", lambda self, x, **options: forward(self, x, **options) + 0.01 * x)
    model = quantised(HOST["vit_cls"], "int8")
    with pytest.raises(vp.UnsupportedError, match="does not compute what its sited form computes"):
        vp.attach(model, vp.LoRA(rank=2))
    assert not hasattr(model, "peft")


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (vp.FullFineTuning(), {}, "is quantised and cannot be trained"),
        (vp.LoRA(rank=2), {"train": ("blocks.0.mlp.fc1",)}, "blocks.0.mlp.fc1.weight is quantised"),
        (vp.PaFi(density=0.1), {}, "quantised, so that single entries"),
    ],
)
def test_what_needs_numbers_is_refused(method, options, sentence):
    model = quantised(HOST["vit_cls"], "int8")
    with pytest.raises(vp.UnsupportedError, match=sentence):
        vp.attach(model, method, **options)
    assert not hasattr(model, "peft")
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))


def test_quantised_head_is_refused():
    model = HOST["vit_cls"].build()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(vp.UnsupportedError, match=r"head\.weight is quantised"):
        vp.attach(model, vp.LoRA(rank=2))
    vp.attach(model, vp.LoRA(rank=2), head=False)


def test_packed_integers_are_refused():
    """Other libraries keep a weight in a shape of its own, whose rows are not those of the layer."""
    model = HOST["vit_cls"].build()
    model.blocks[1].mlp.fc1.weight = nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(vp.UnsupportedError, match="packed in integers"):
        vp.attach(model, vp.LoRA(rank=2))
    assert not hasattr(model, "peft")
