"""Backbones whose linear layers torchao has quantised: adapters train on them, and merging gives plain numbers."""

import copy

import pytest
import torch
import torch.nn as nn
from conftest import MERGE_REFUSALS, distance, randomise
from reference.hosts import HOSTS
from torch.func import functional_call
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

import visionpeft as vp

HOST = {host.name: host for host in HOSTS}
CONFIGURATIONS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8)),
    "float8": Float8WeightOnlyConfig(),
}
# precision of the model, whether it came to that after it was quantised, precision of autocast
PRECISIONS = {
    "float32": (torch.float32, False, None),
    "bfloat16": (torch.bfloat16, False, None),
    "bfloat16_after": (torch.bfloat16, True, None),
    "autocast": (torch.float32, False, torch.bfloat16),
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


def quantised(host, kind, dtype=torch.float32, after=False):
    model = host.build()
    if not after:
        model.to(dtype)
    quantize_(model, CONFIGURATIONS[kind], in_blocks)
    return model.to(dtype) if after else model


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


def changed_by_hand(model, adapter, images):
    """Logits and gradients of LoRA by its formula: W + s B A in float64 in the library's own model, W dequantised."""
    own = {name: value.detach() for name, value in model.named_parameters() if not name.startswith("peft.")}
    base = {
        name: (v if type(v) in (torch.Tensor, nn.Parameter) else v.dequantize()).double() for name, v in own.items()
    }
    base |= {f"head.{name}": value.detach().double() for name, value in adapter.head.named_parameters()}
    factors = {
        name: value.detach().double().requires_grad_()
        for name, value in adapter.named_parameters()
        if name.endswith((".A", ".B"))
    }
    weights = dict(base)
    for name in factors:
        if not name.endswith(".A"):
            continue
        _, _, block, site, _ = name.split(".")
        layer = {"fc1": "mlp.fc1", "fc2": "mlp.fc2", "proj": "attn.proj"}.get(site, "attn.qkv")
        change = factors[name.removesuffix("A") + "B"] @ factors[name] * 1.5
        key = f"blocks.{block}.{layer}.weight"
        if layer == "attn.qkv":
            before = "qkv".index(site) * len(change)
            change = nn.functional.pad(change, (0, 0, before, len(weights[key]) - before - len(change)))
        weights[key] = weights[key] + change
    plain = HOST["vit_cls"].build().double()
    logits = functional_call(plain, weights, (images.double(),))
    return logits, dict(zip(factors, torch.autograd.grad(logits.square().mean(), list(factors.values())), strict=True))


def relative(left, right):
    left, right = left.detach().double(), right.detach().double()
    return float((left - right).norm() / right.norm())


@kinds
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision(kind, precision, tmp_path):
    """Forward, gradients, saved file, merged and unmerged model against the formula in float64, within its rounding."""
    dtype, after, autocast = PRECISIONS[precision]
    if kind == "float8" and after:
        pytest.skip("refused: test_a_precision_that_the_weights_do_not_follow_to_is_refused")
    host = HOST["vit_cls"]
    rounds = precision != "float32"
    model = quantised(host, kind, dtype, after)
    images = host.inputs().to(dtype)
    vp.attach(model, vp.LoRA(rank=2, alpha=3, targets=("q", "v", "proj", "fc1", "fc2")))
    adapter = model.peft["default"]
    randomise(adapter)
    assert {value.dtype for value in adapter.parameters()} == {torch.float32}

    def run(model):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return model(images)

    expected, gradients = changed_by_hand(model, adapter, images)
    logits = run(model)
    assert relative(logits, expected) < (0.03 if rounds else 2e-6)
    logits.float().square().mean().backward()
    found = {name: value.grad for name, value in adapter.named_parameters() if name in gradients}
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        assert relative(gradient, gradients[name]) < (0.15 if rounds else 2e-5), name
    # Without the adapter the logits are far from that, so that the bounds say something.
    with vp.use(model, None):
        assert relative(run(model), expected) > 0.3

    vp.save(model, tmp_path / "adapter")
    again = quantised(host, kind, dtype, after)
    vp.load(again, tmp_path / "adapter")
    assert torch.equal(run(again), run(model))

    before = run(model)
    vp.merge(model)
    assert {value.dtype for value in model.parameters() if type(value) is nn.Parameter} == {dtype}
    assert relative(run(model), expected) < (0.03 if rounds else 2e-6)
    vp.unmerge(model)
    assert torch.equal(run(model), before)


def test_moved_to_another_precision_while_merged():
    """The integers follow the model as they would have without merging, or `unmerge` says that they cannot."""
    host = HOST["vit_cls"]
    everything = vp.LoRA(rank=2, targets=("q", "v", "proj", "fc1", "fc2"))
    images = host.inputs().to(torch.bfloat16)
    for kind in ("int8", "int4"):
        merged = vp.attach(quantised(host, kind), everything)
        randomise(merged.peft["default"])
        plain = vp.attach(quantised(host, kind, torch.bfloat16, after=True), everything)
        plain.peft["default"].load_state_dict(merged.peft["default"].state_dict())
        vp.merge(merged).to(torch.bfloat16)
        vp.unmerge(merged)
        assert torch.equal(merged(images), plain(images))
    model = vp.attach(quantised(host, "float8"), everything)
    expected = output(host, model)
    vp.merge(model).to(torch.bfloat16)
    with pytest.raises(vp.UnsupportedError, match=r"moved to bfloat16 .* Float8Tensor weights cannot follow"):
        vp.unmerge(model)
    assert torch.isfinite(model(images)).all()
    vp.unmerge(model.to(torch.float32))
    assert relative(output(host, model), expected) < 0.01  # its norms and biases were rounded on the way


def test_a_precision_that_the_weights_do_not_follow_to_is_refused():
    """torchao's own layer fails then; the sentence comes before anything is changed."""
    host = HOST["vit_cls"]
    model = quantised(host, "float8", torch.bfloat16, after=True)
    with pytest.raises(RuntimeError, match="dtype"):
        model(host.inputs().to(torch.bfloat16))
    with pytest.raises(vp.UnsupportedError, match=r"blocks\.0\.attn\.qkv: .*cannot be multiplied with bfloat16.*first"):
        vp.attach(model, vp.LoRA(rank=2))
    assert not hasattr(model, "peft")
    vp.attach(model.to(torch.float32), vp.LoRA(rank=2))


@pytest.mark.parametrize(
    "configuration",
    [
        Int8DynamicActivationInt8WeightConfig(),
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(8)),
    ],
    ids=["int8", "int4"],
)
def test_layers_without_a_gradient_are_refused(configuration):
    """Where activations are quantised, too, torchao gives them no gradient: earlier adapters would never learn."""
    host = HOST["vit_cls"]
    model = host.build()
    quantize_(model, configuration, in_blocks)
    x = torch.randn(2, 32, requires_grad=True)
    assert not nn.functional.linear(x, model.blocks[0].attn.qkv.weight).requires_grad
    with pytest.raises(vp.UnsupportedError, match="gives it no gradient"):
        vp.attach(model, vp.LoRA(rank=2))
    assert not hasattr(model, "peft")
    # Also where only the head is such a layer, which no adapter may train through.
    model = host.build()
    quantize_(model, configuration, lambda module, name: name == "head")
    with pytest.raises(vp.UnsupportedError, match=r"head: .*no gradient"):
        vp.attach(model, vp.LoRA(rank=2), head=False)


def test_weights_that_stand_for_something_else_are_refused():
    """Inputs scaled beforehand, as AWQ and SmoothQuant do it, are no part of the numbers that a merge would add to."""
    host = HOST["vit_cls"]
    model = quantised(host, "int8")
    weight = model.blocks[1].mlp.fc1.weight
    weight.act_pre_scale = torch.full((weight.shape[1],), 1.5)
    with pytest.raises(vp.UnsupportedError, match=r"blocks\.1\.mlp\.fc1: .*another product than the numbers"):
        vp.attach(model, vp.LoRA(rank=2))


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


def test_weights_without_rows_are_refused():
    """NF4, whose blocks run over the borders of rows."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    model = HOST["vit_cls"].build()
    layer = model.blocks[1].mlp.fc1
    layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 32, 16), requires_grad=False)
    assert torch.isfinite(output(HOST["vit_cls"], model)).all()  # the library's own model computes with it
    with pytest.raises(vp.UnsupportedError, match="as a NF4Tensor of torchao, of which no rows can be read"):
        vp.attach(model, vp.LoRA(rank=2))
    assert not hasattr(model, "peft")


def test_packed_integers_are_refused():
    """Other libraries keep a weight in a shape of its own, whose rows are not those of the layer."""
    model = HOST["vit_cls"].build()
    model.blocks[1].mlp.fc1.weight = nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(vp.UnsupportedError, match=r"blocks\.1\.mlp\.fc1 .* holds codes"):
        vp.attach(model, vp.LoRA(rank=2))
    assert not hasattr(model, "peft")
