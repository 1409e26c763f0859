"""Every tensor of an adapted model is in one place, so that tools that go by `state_dict` and names are right with it.

The right values are those of the tools themselves, or a formula in float64: safetensors, `torch.func`, timm's
`ModelEmaV3`, `load_state_dict(assign=True)`.
"""

import copy
from collections import Counter
from dataclasses import dataclass

import pytest
import timm
import torch
from conftest import CASES, adapted, base_state, same_bytes, spread
from safetensors.torch import load, save
from timm.utils import ModelEmaV3
from torch import nn

import visionpeft as vp
from visionpeft.sites import Placement, Shared

TRAIN = ("cls_token", "blocks.0.norm1", "norm")  # a root, a sited layer, and one without a site


def build(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 3} | options
    return timm.create_model("vit_tiny_patch16_224", **options).eval().to(dtype)


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(model=None, name="default", method=None, **options):
    """A model with an adapter, a head and trained copies, all moved away from where they start."""
    model = vp.attach(model or build(), method or vp.LoRA(rank=2), name, **({"train": TRAIN} | options))
    with torch.no_grad():
        for parameter in model.peft[name].parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def repeated(model):
    """Tensors and modules that are registered under several names."""
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names += Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    memory = Counter(t.data_ptr() for t in model.state_dict().values() if t.numel())
    return sum(n > 1 for n in names.values()), sum(n > 1 for n in memory.values())


@spread(CASES)
def test_every_tensor_is_registered_once(host, case):
    """Nothing is registered twice that the plain model does not register twice; its own tensors keep their values."""
    model, plain = adapted(host, case), host.build()
    assert repeated(model) == repeated(plain)
    assert same_bytes(base_state(model), base_state(plain))
    if repeated(plain) == (0, 0):
        state = model.state_dict()
        assert same_bytes(load(save(state)), state)


def test_registered_twice_is_noticed():
    """The negative control: as heads and trained copies were placed before, and safetensors says so, too."""
    model = trained()
    model.norm.weight = model.peft["default"].get_parameter("trained.norm.weight")
    assert repeated(model) == (1, 1)
    with pytest.raises(RuntimeError, match="share memory"):
        save(model.state_dict())


@pytest.mark.parametrize("compiled", [False, True])
def test_functional_call(compiled):
    """Gradients by `torch.func` are those of autograd, for every trained tensor; others have none."""
    model = trained()
    parameters = dict(model.named_parameters())
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    assert {id(p) for p in wanted.values()} == {id(p) for p in vp.trainable_parameters(model)}

    def loss(values):
        return torch.func.functional_call(model, parameters | values, (IMAGES,)).square().sum()

    if compiled:
        forward = torch.compile(model, backend="eager", fullgraph=True)
        found = torch.autograd.grad(forward(IMAGES).square().sum(), list(wanted.values()))
    else:
        found = torch.func.grad(loss)(wanted).values()
    model(IMAGES).square().sum().backward()
    for (name, parameter), gradient in zip(wanted.items(), found, strict=True):
        assert parameter.grad.abs().max() > 0, name
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-4), name


def test_functional_call_computes_with_what_it_is_given():
    """Other values of one trained tensor give what writing them into the model gives."""
    model, twin = trained(), trained()
    for name, parameter in twin.peft.named_parameters():
        with torch.no_grad():
            parameter.copy_(model.peft.get_parameter(name)).mul_(1.5)
        expected = twin(IMAGES)
        assert not torch.equal(expected, model(IMAGES))
        values = {f"peft.{name}": twin.peft.get_parameter(name)}
        assert torch.allclose(torch.func.functional_call(model, values, (IMAGES,)), expected, atol=1e-5), name
        with torch.no_grad():
            parameter.copy_(model.peft.get_parameter(name))


def test_moving_average():
    """timm's average of every tensor, also of heads and trained copies, is (1 - d) sum_i d^(n - i) w_i + d^n w_0."""
    model, decay = trained(), 0.9
    average = ModelEmaV3(model, decay=decay)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in vp.trainable_parameters(model):
                parameter.add_(torch.randn_like(parameter))
        average.update(model)
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    found = average.module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value.double(), expected[name], atol=1e-5), name
    # What it computes with is what it averaged.
    twin = build()
    vp.attach(twin, vp.LoRA(rank=2), train=TRAIN)
    twin.load_state_dict(found)
    assert torch.equal(average.module(IMAGES), twin(IMAGES))


def test_assigned_state():
    """`load_state_dict(assign=True)` gives what loading in place gives, and what is trained then is what computes."""
    model, twin = trained(), trained(build(seed=1))
    twin.peft["default"].requires_grad_(True)
    state = {name: value.clone() for name, value in twin.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert torch.equal(model(IMAGES), twin(IMAGES))
    assert repeated(model) == (0, 0)
    for name, parameter in model.peft["default"].named_parameters():
        before = model(IMAGES)
        with torch.no_grad():
            parameter.mul_(1.5).add_(0.1)
        assert not torch.equal(model(IMAGES), before), name
    vp.detach(model)
    assert torch.equal(model(IMAGES), build(seed=1)(IMAGES))


def test_assigned_state_is_masked():
    """A method that masks gradients masks those of assigned parameters, once."""
    model = vp.attach(build(), vp.ChildTuning(share=0.5), head=False)
    adapter = model.peft["default"].train()
    for assign in (False, True, False, True):
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=assign)
        model.zero_grad()
        model(IMAGES).sum().backward()
        before = {name: adapter.get_parameter(name).grad.clone() for name in adapter.masked}
        torch.optim.SGD(vp.trainable_parameters(model), lr=0.0).step()
        kept = total = 0
        for name, gradient in before.items():
            masked = adapter.get_parameter(name).grad
            assert torch.allclose(masked[masked != 0], 2 * gradient[masked != 0])  # 4 times, if it were masked twice
            kept, total = kept + (masked != 0).sum().item(), total + (gradient != 0).sum().item()
        assert 0.4 < kept / total < 0.6


def test_own_attributes_compute_with_the_trained():
    """`model.head.weight` and `model.cls_token` are what computes while the adapter acts, the model's own otherwise."""
    model, plain = trained(), build()
    adapter = model.peft["default"]
    assert model.head.weight is adapter.head.weight
    assert model.get_parameter("cls_token") is adapter.get_parameter("trained.cls_token")
    features = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    assert torch.allclose(model(IMAGES), features @ adapter.head.weight.T + adapter.head.bias, atol=1e-5)
    with vp.use(model, None):
        assert torch.equal(model.head.weight, plain.head.weight)
        assert torch.equal(model.cls_token, plain.cls_token)
    assert type(model).__name__ == "VisionTransformer"
    assert isinstance(model.norm, torch.nn.LayerNorm)


def test_several_adapters_with_heads_and_copies():
    """Copies, pickles, switches and merges of a model with two adapters follow the one that acts."""
    model = trained()
    with vp.use(model, None):
        alone = {"default": model(IMAGES)}
    for name in ("one", "two"):
        vp.disable(model)
        trained(model, name, vp.AdaptFormer(bottleneck=4))
        alone[name] = model(IMAGES)
    vp.activate(model, "default")
    alone["default"] = model(IMAGES)
    assert len({value.sum().item() for value in alone.values()}) == 3
    twin = copy.deepcopy(model)
    for each in (model, twin):
        for name in ("two", "default", "one"):
            with vp.use(each, name):
                assert torch.equal(each(IMAGES), alone[name])
    vp.merge(twin)
    assert torch.allclose(twin(IMAGES), alone["default"], atol=1e-5)
    assert twin.state_dict().keys() == build().state_dict().keys()
    plain = build()
    plain.load_state_dict(twin.state_dict())
    assert torch.equal(plain(IMAGES), twin(IMAGES))
    vp.unmerge(twin)
    assert torch.equal(twin(IMAGES), alone["default"])
    vp.detach(twin)
    assert torch.equal(twin(IMAGES), build()(IMAGES))


@pytest.mark.parametrize("layers", [1, 2])
def test_hooks_on_the_head_see_each_call(layers):
    """Hooks of others that were there before see the head once a call, whether an adapter acts or not."""
    model = build()
    if layers == 2:
        model.head = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 3))
    watched = model.head if layers == 1 else model.head[1]
    calls = []
    watched.register_forward_hook(lambda module, inputs, output: calls.append(output))
    trained(model)
    assert not calls
    for names in ("default", None):
        with vp.use(model, names):
            output = model(IMAGES)
        assert len(calls) == 1
        assert torch.equal(calls.pop(), output)


def test_counts_leave_out_what_does_not_compute():
    """The total is that of the values that compute: those of the plain model and of the adapter beside its copies."""
    model, plain = trained(), build()
    added = sum(p.numel() for name, p in model.peft["default"].named_parameters() if name.startswith("lora."))
    assert vp.summary(model).total == sum(p.numel() for p in plain.parameters()) + added


@dataclass(frozen=True)
class SharedScale(vp.Method):
    """A vector that all blocks share.

    Args:
        tuples: keep it in a tuple in the blocks.
        blocks: which.
        towers: which.
    """

    tuples: bool = True
    blocks: str = "all"
    towers: str | None = None

    def place(self, tower):
        shared = Scale(tower.width)
        yield Shared(tower.name, "scale", shared)
        for index in range(tower.depth):
            yield Placement(tower.name, index, "mlp_out", UsesScale(shared, self.tuples))


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class UsesScale(nn.Module):
    tokenwise = True

    def __init__(self, shared, tuples):
        super().__init__()
        self.shared = (shared,) if tuples else shared

    def forward(self, x):
        shared = self.shared[0] if isinstance(self.shared, tuple) else self.shared
        return x * shared.scale


def test_a_parameter_with_two_owners_is_refused_when_it_is_attached(tmp_path):
    """safetensors would refuse to save it, after the training."""
    model = vp.create_backbone("nano_vit", num_classes=3)
    with pytest.raises(vp.ConfigurationError, match=r"one parameter at two paths, visual\.scale\.scale and visual\.0"):
        vp.attach(model, SharedScale(tuples=False))
    assert not hasattr(model, "peft")
    vp.attach(model, SharedScale())
    vp.save(model, tmp_path / "adapter")
