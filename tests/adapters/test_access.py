"""Compiled models and several threads: what is done to a model is done to the model itself, by one thread at a time."""

import contextlib
import functools
import operator
import threading

import pytest
import timm
import torch
from lightning.fabric import Fabric
from torch.optim.swa_utils import AveragedModel

import visionpeft as vp
from visionpeft.adapters import access
from visionpeft.errors import ConfigurationError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def adapted(model=None, name="default"):
    model = vp.attach(model or build(), vp.LoRA(rank=2), name)
    with torch.no_grad():
        for parameter in model.peft[name].parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def test_compiled_models(tmp_path):
    """Counted, saved, switched and merged as the model they were compiled from; compiled, they follow."""
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    expected = model(IMAGES)
    assert torch.allclose(compiled(IMAGES), expected, atol=1e-5)
    assert str(vp.summary(compiled)) == str(vp.summary(model))
    vp.save(compiled, tmp_path / "adapter")
    other = build()
    vp.load(other, tmp_path / "adapter")
    assert torch.equal(other(IMAGES), expected)
    with vp.use(compiled, None):
        assert torch.allclose(compiled(IMAGES), build()(IMAGES), atol=1e-5)
    assert torch.allclose(compiled(IMAGES), expected, atol=1e-5)
    assert vp.merge(compiled) is compiled
    assert model.state_dict().keys() == build().state_dict().keys()
    assert torch.allclose(compiled(IMAGES), expected, atol=1e-5)
    vp.unmerge(compiled)
    assert torch.equal(model(IMAGES), expected)
    vp.detach(compiled)
    assert torch.equal(model(IMAGES), build()(IMAGES))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_that_fabric_has_set_up(tmp_path, precision):
    """Fabric's module passes on the attributes of the model in it, `peft` and `head` among them."""
    model, fabric = adapted(), Fabric(accelerator="cpu", devices=1, precision=precision)
    before, expected = vp.trainable_parameters(model), model(IMAGES)
    module, optimizer = fabric.setup(model, torch.optim.SGD(before, lr=0.1))
    assert all(map(operator.is_, vp.trainable_parameters(module), before))
    assert str(vp.summary(module)) == str(vp.summary(model))
    with vp.use(module, None):
        assert torch.allclose(module(IMAGES), build()(IMAGES), atol=0.1)
    with torch.no_grad(), vp.route(module, ["default", None]):
        assert torch.allclose(module(IMAGES)[0], expected[0], atol=0.1)
    fabric.backward(module(IMAGES).square().sum() + vp.penalty(module))
    optimizer.step()
    vp.after_step(module, 1, 1)
    vp.save(module, tmp_path / "adapter")
    other = build()
    vp.load(other, tmp_path / "adapter")
    assert torch.equal(other(IMAGES), model(IMAGES))
    assert not torch.equal(other(IMAGES), expected)
    added = {"model": lambda key, _: key.startswith("peft.")}
    fabric.save(tmp_path / "last.ckpt", {"model": module}, filter=added)
    fresh = adapted()
    fabric.load(tmp_path / "last.ckpt", {"model": fabric.setup_module(fresh)}, strict=False)
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    assert vp.merge(module) is module
    vp.unmerge(module)
    assert torch.equal(other(IMAGES), model(IMAGES))
    assert vp.detach(module) is module
    assert torch.equal(model(IMAGES), build()(IMAGES))


class Around(torch.nn.Module):
    """A module of somebody's own around a model of timm."""

    def __init__(self, model):
        super().__init__()
        self.net = model

    def forward(self, images):
        return self.net(images)


@pytest.mark.parametrize("around", [Around, torch.nn.DataParallel, AveragedModel])
def test_a_model_around_a_model_is_refused_with_its_part(around, tmp_path):
    """It says where the model is that can be adapted, and later where the adapters are."""
    outer = around(build())
    path = next(name for name, _ in outer.named_children())
    told = f"its part '{path}' is a VisionTransformer: attach to that" if around is Around else "attach to the model"
    with pytest.raises(vp.UnsupportedError, match=told):
        vp.attach(outer, vp.LoRA(rank=2))
    with pytest.raises(ConfigurationError, match=r"no adapter is attached to this model$"):
        vp.merge(outer)
    adapted(getattr(outer, path))
    for act in (vp.trainable_parameters, vp.merge, vp.detach, vp.disable, lambda model: vp.save(model, tmp_path)):
        with pytest.raises(ConfigurationError, match=f"no adapter is attached .*'{path}' has some: give that part"):
            act(outer)
    vp.merge(getattr(outer, path))
    with pytest.raises(ConfigurationError, match=f"no merged adapters; its part '{path}' has some: give that part"):
        vp.unmerge(outer)
    vp.detach(getattr(outer, path))
    assert torch.equal(outer(IMAGES), build()(IMAGES))


def of_fabric(model):
    return Fabric(accelerator="cpu", devices=1).setup(model)


def of_ddp(model):
    """As it would be, without the processes: what PyTorch makes needs a process group."""
    outer = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    torch.nn.Module.__init__(outer)
    outer.module = model
    return outer


def of_torch_script(model):
    return torch.jit.trace(model, IMAGES)


WRAPPED = {
    "fabric": (of_fabric, "VisionTransformer is already set up by Lightning Fabric; attach before fabric.setup"),
    "fabric of a compiled model": (
        lambda model: of_fabric(torch.compile(model)),
        "VisionTransformer is already set up by Lightning Fabric",
    ),
    "ddp": (of_ddp, "VisionTransformer is already within DistributedDataParallel.*attach first, then wrap"),
    "replicas": (torch.nn.DataParallel, "VisionTransformer is within DataParallel.*attach to the model itself"),
    "average": (AveragedModel, "AveragedModel holds a copy of VisionTransformer.*attach to the model first"),
    "timm's average": (timm.utils.ModelEmaV3, "ModelEmaV3 holds a copy of VisionTransformer"),
    "torch script": (of_torch_script, "is TorchScript, .* use the model that it was made of"),
}


@pytest.mark.parametrize(("wrap", "told"), WRAPPED.values(), ids=WRAPPED.keys())
def test_what_has_to_be_made_after_attaching_says_so(wrap, told, tmp_path):
    """Its part would take an adapter, which would then be trained on one device only, or in no average."""
    vp.save(adapted(), tmp_path)
    inner = build()
    outer = wrap(inner)
    for act in (lambda model: vp.attach(model, vp.LoRA(rank=2)), lambda model: vp.load(model, tmp_path)):
        with pytest.raises(vp.UnsupportedError, match=told):
            act(outer)
    assert not hasattr(inner, "peft")


def test_a_trace_of_an_adapted_model_is_no_model_to_act_on(tmp_path):
    traced = of_torch_script(adapted())
    for act in (vp.trainable_parameters, vp.merge, vp.detach, vp.disable, lambda model: vp.save(model, tmp_path)):
        with pytest.raises(vp.UnsupportedError, match="is TorchScript"):
            act(traced)


def test_features_alone_are_refused_with_their_part():
    """timm's wrapper is described by its layers, on images of the size of what it wraps."""
    options = {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "img_size": 32,
        "features_only": True,
        "out_indices": (0, 1),
    }
    model = timm.create_model("vit_tiny_patch16_224", **options)
    for method in (vp.LoRA(rank=2), vp.VPT(num_tokens=2)):
        with pytest.raises(vp.UserError, match="its part 'model' is a VisionTransformer: attach to that"):
            vp.attach(model, method)
    vp.attach(model.model, vp.VPT(num_tokens=2))
    assert [each.shape for each in model(IMAGES)] == [(2, 32, 2, 2)] * 2


def test_what_is_attached_is_in_the_mode_of_the_model():
    for mode in (True, False):
        model = vp.attach(build().train(mode), vp.LoRA(rank=2, dropout=0.5))
        assert {module.training for module in model.modules()} == {mode}


def test_the_name_of_a_method_is_no_method():
    with pytest.raises(ConfigurationError, match=r"needs a method such as LoRA\(rank=8\), not 'VPT'"):
        vp.attach(build(), "VPT")


@torch.no_grad()
@pytest.mark.parametrize("twice", [False, True])
def test_a_merge_can_be_final(twice):
    """The merged weights are the model's own, as in a plain model that loads them, and another adapter is attached."""
    model = adapted()
    expected = model(IMAGES)
    if twice:
        vp.merge(model)
        with pytest.raises(ConfigurationError, match=r"with merge\(model, keep=False\)"):
            vp.attach(model, vp.LoRA(rank=2))
    vp.merge(model, keep=False)
    plain = build()
    plain.load_state_dict(model.state_dict())
    assert vars(model).keys() == vars(plain).keys()
    assert torch.allclose(model(IMAGES), expected, atol=1e-5)
    assert torch.equal(model(IMAGES), plain(IMAGES))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigurationError):
        vp.unmerge(model)
    adapted(model)
    assert not torch.allclose(model(IMAGES), expected, atol=1e-3)
    vp.detach(model)
    assert torch.equal(model(IMAGES), plain(IMAGES))


@torch.no_grad()
def answers(model, alone, threads=4, times=20):
    """How many answers of several threads that switch one model are those of the adapter they chose, of how many."""
    right, failed = [], []

    def work(number):
        for turn in range(times):
            name = [*alone][(number + turn) % len(alone)]
            try:
                with torch.no_grad(), vp.use(model, name) if turn % 2 else vp.route(model, [name] * 2):
                    right.append(torch.allclose(model(IMAGES), alone[name], atol=1e-5))
            except Exception as error:
                failed.append(error)

    in_threads(*(functools.partial(work, number) for number in range(threads)))
    return sum(right), threads * times


def in_threads(*works):
    """Run functions at the same time."""
    started = [threading.Thread(target=work) for work in works]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in started)


@pytest.fixture
def shared():
    """A model with two adapters, and the answers of each alone."""
    model = adapted(adapted(name="a"), "b")
    alone = {}
    with torch.no_grad():
        for name in ("a", "b"):
            with vp.use(model, name):
                alone[name] = model(IMAGES)
    return model, alone


def test_threads_take_turns(shared):
    right, every = answers(*shared)
    assert right == every


def test_without_turns_answers_are_wrong(shared, monkeypatch):
    """The negative control: threads that do not wait get answers of each other's adapter, or none."""

    class NoTurns:
        alone = beside = staticmethod(contextlib.nullcontext)

    monkeypatch.setitem(access._TURNS, shared[0], NoTurns())
    right, every = answers(*shared)
    assert right < every


def test_two_routes_that_want_to_change_the_model_are_refused(shared):
    """Each would wait for the other; one of them is told so, and the other gets its turn when it has left."""
    model, _ = shared
    inside, told = threading.Barrier(2, timeout=60), []

    def work():
        try:
            with vp.route(model, ["a", "b"]):
                inside.wait()
                vp.activate(model, "a")
        except ConfigurationError as error:
            told.append(str(error))

    in_threads(work, work)
    assert len(told) == 1
    assert "each would wait for the other" in told[0]
