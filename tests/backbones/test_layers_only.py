"""Models of timm without sited blocks: exact and live at their layers, and everything else refused by name.

Every architecture is walked by `python benchmarks/layer_sites.py`, whose examination runs here on tiny ones.
"""

import copy
import dataclasses
import gc
import importlib.util
import pickle
import weakref
from pathlib import Path

import peft
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import visionpeft as vp
from visionpeft import methods
from visionpeft.methods.lora import LowRank, LowRankConv
from visionpeft.sites.changed_weights import KeepsStatistics

PATH = Path(__file__).parents[2] / "benchmarks" / "layer_sites.py"
ALL = vp.LoRA(rank=2, targets=("all",))


@pytest.fixture(scope="module")
def walk():
    spec = importlib.util.spec_from_file_location("layer_sites", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def resnet():
    """A tiny ResNet in float64, as its constructor leaves it: the last norm of every residual branch is zero."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(model):
    """Adapters away from their start, so that they have an effect."""
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# Kinds of layers: norms with their activation and depthwise convolutions; standardised weights and weights read with a
# gain; linear layers and norms of channels last, with norms of channels first between them; norms that read a third
# tensor, which norm tuning trains where BitFit changes the bias; a model that calls its heads `heads`.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_efficientnet", {}),
        ("test_nfnet", {}),
        ("test_mambaout", {}),
        ("efficientvim_m1", {"embed_dim": (8, 16, 32), "depths": (1, 1, 1), "state_dim": (4, 4, 4)}),
        ("resnetv2_50d_evos", {"layers": (1, 1, 1, 1), "channels": (128, 128, 128, 128), "stem_chs": 64}),
    ],
)
def test_exact_and_live(walk, name, options):
    assert walk.examine(name, 64, **options) is None


@pytest.mark.parametrize(
    ("module", "fault"), [(LowRankConv, "forward"), (LowRank, "merge")], ids=["on outputs", "on weights"]
)
def test_the_walk_sees_a_wrong_change(walk, monkeypatch, module, fault):
    """The negative control: a change that is twice what it should be, in each of the two ways it is computed."""
    right = getattr(module, fault)

    def wrong(self, *inputs):
        made = right(self, *inputs)
        return 2 * made - inputs[1] if fault == "forward" else (2 * made[0] - inputs[0], made[1])

    monkeypatch.setattr(module, fault, wrong)
    assert "not the model changed by hand" in walk.examine("test_efficientnet", 64)


GEOMETRIES = [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}, {"groups": 3}]


@pytest.mark.parametrize("options", GEOMETRIES)
def test_a_convolution_is_a_matrix(options):
    """W + alpha / r B A in torch's own convolution, whatever its geometry, by r (out + in / groups * k * k) values."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).double().eval()
    model.conv1 = nn.Sequential(nn.Conv2d(3, 6, 3, **options), nn.Conv2d(6, model.bn1.num_features, 1)).double()
    conv = model.conv1[0]
    vp.attach(model, vp.LoRA(rank=2, alpha=6.0, targets=("conv1_0",)), head=False)
    change = trained(model).peft["default"].lora["visual"]["conv1_0"]
    assert change.A.numel() + change.B.numel() == 2 * (6 + 27 // options.get("groups", 1))
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    geometry = {key: options.get(key, 1 - (key == "padding")) for key in ("stride", "padding", "dilation", "groups")}
    weight = conv._parameters["weight"] + 3.0 * (change.B @ change.A).reshape(conv._parameters["weight"].shape)
    expected = F.conv2d(x, weight, conv._parameters["bias"], **geometry)
    assert torch.allclose(conv(x), expected, rtol=1e-12, atol=1e-12)
    vp.merge(model)
    assert torch.allclose(conv(x), expected, rtol=1e-12, atol=1e-12)


# Relatives of LoRA, with sizes that fit a matrix of 16 x 16.
RELATIVES = [
    *(vp.BinaryMask(), vp.BOFT(block=4, factors=1), vp.CapaBoost(rank=2), vp.DoRA(rank=2), vp.FourierFT(number=10)),
    *(vp.GraLoRA(rank=2), vp.HiRA(rank=2), vp.HiWi(), vp.KAdaptation(), vp.KronA(), vp.MiSS(rank=2)),
    *(vp.MoSLoRA(rank=2), vp.OFT(block=4), vp.OLoRA(rank=2), vp.PiSSA(rank=2), vp.RandLoRA(rank=2)),
    *(vp.SAID(dimension=9), vp.VBLoRA(length=4), vp.VeRA(rank=2), vp.WaveFT(number=9)),
]


@pytest.mark.parametrize("method", RELATIVES, ids=lambda method: type(method).__name__)
def test_relatives_on_convolutions(method):
    """What changes the matrix of a linear layer changes a convolution as that of its unfolded patches, in training."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).double()
    conv = nn.Conv2d(4, 16, 2, stride=2, padding=1)
    model.conv1 = nn.Sequential(nn.Conv2d(3, 4, 1), conv, nn.Conv2d(16, model.bn1.num_features, 1)).double()
    vp.attach(model, dataclasses.replace(method, targets=("conv1_1",)), head=False)
    ((_, placement),) = trained(model).peft["default"].placements
    parameters = [parameter for parameter in model.peft.parameters() if parameter.requires_grad]
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    weight, bias = conv._parameters["weight"].flatten(1), conv._parameters["bias"]
    patches = F.unfold(x, 2, stride=2, padding=1).mT
    plain = F.linear(patches, weight, bias)
    found, expected = conv(x).flatten(2).mT, placement.module(patches, plain, weight, bias)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found, plain, rtol=1e-3)
    grads = [torch.autograd.grad(y.square().sum(), parameters, retain_graph=True) for y in (found, expected)]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_lora_on_convolutions_is_that_of_peft(resnet, images):
    """peft's definition on convolutions without groups is the same: kernels A, then 1 x 1 kernels B."""
    theirs = peft.get_peft_model(
        copy.deepcopy(resnet), peft.LoraConfig(r=2, lora_alpha=4, target_modules=r"layer\d\.0\.conv1", bias="none")
    ).double()
    vp.attach(resnet, vp.LoRA(rank=2, alpha=4.0, targets=("conv1",), blocks="all"), head=False)
    tower = vp.describe(resnet).towers["visual"]
    copied = 0
    with torch.no_grad():
        for _, placement in trained(resnet).peft["default"].placements:
            owner = tower.layer(placement.block, placement.site).owner
            path = next(path for path, module in resnet.named_modules() if module is owner)
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(placement.module.A.view_as(layer.lora_A["default"].weight))
            layer.lora_B["default"].weight.copy_(placement.module.B[:, :, None, None])
            copied += 1
        assert copied == tower.depth
        assert torch.allclose(resnet(images), theirs.eval()(images), rtol=1e-10, atol=1e-10)


def test_layers_that_start_at_zero_hide_nothing(resnet):
    """And what the forward does not compute with has no site and is not trained."""
    assert not any(norm.weight.any() for norm in (block.bn2 for block in resnet.layer1))
    resnet.unused = nn.Linear(4, 4).double()
    tower = vp.describe(resnet).towers["visual"]
    layers = [layer.owner for _, layer in tower.all_layers()]
    every = [m for m in resnet.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)]
    assert {id(layer) for layer in layers} == {id(m) for m in every} - {id(resnet.unused), id(resnet.fc)}
    assert tower.unreached == {"unused.weight", "unused.bias"}
    vp.attach(resnet, vp.FullFineTuning())
    assert not any("unused" in name for name in resnet.peft["default"].trained_names)


def test_nothing_keeps_a_model_alive():
    model = timm.create_model("test_resnet")
    vp.attach(model, ALL)
    vp.detach(model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_a_weight_that_is_read_and_not_called(images):
    """Where the library reads the weight of a layer, a wrapper of the layer would be dead."""

    class Reads(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, x):
            return F.linear(x.mean((2, 3)), self.inside.weight)[:, :, None, None]

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).double().eval()
    model.global_pool = nn.Sequential(Reads(nn.Linear(model.num_features, model.num_features).double()), nn.Flatten())
    linear = model.global_pool[0].inside
    vp.attach(model, vp.LoRA(rank=2, targets=("linears",)), head=False)
    (change,) = (placement.module for _, placement in trained(model).peft["default"].placements)
    found = model(images)
    vp.disable(model)
    with torch.no_grad():
        linear.weight += change.B @ change.A
    assert torch.allclose(found, model(images), rtol=1e-10)


def test_statistics_stay(resnet, images):
    """In a loop of one's own that calls `train()`, too; without adapters the model is as before."""
    before = {name: value.clone() for name, value in resnet.named_buffers()}
    vp.attach(resnet, [ALL, vp.LayerNormTuning()])
    trained(resnet)
    expected = resnet(images)
    resnet.train()
    assert isinstance(resnet.bn1, KeepsStatistics)
    assert torch.equal(resnet(images), expected)
    vp.detach(resnet)
    assert all(torch.equal(value, before[name]) for name, value in resnet.named_buffers())
    assert resnet.bn1.training
    resnet(images)  # negative control
    assert not torch.equal(resnet.bn1.running_mean, before["bn1.running_mean"])


def test_saved_and_loaded(resnet, images, tmp_path):
    other = copy.deepcopy(resnet)
    vp.attach(resnet, [ALL, vp.BitFit(), vp.SSF()], name="pets")
    vp.save(trained(resnet), tmp_path / "adapter")
    vp.load(other, tmp_path / "adapter")
    assert torch.equal(other(images), resnet(images))
    for model in (copy.deepcopy(resnet), pickle.loads(pickle.dumps(resnet))):
        assert torch.equal(model(images), resnet(images))
    assert "(layer sites only)" in str(vp.summary(resnet))
    vp.detach(other)
    other.bn1.running_mean += 1
    with pytest.raises(vp.UserError, match=r"bn1.* of other values"):
        vp.load(other, tmp_path / "adapter")


def test_a_head_that_is_a_convolution(images, tmp_path):
    """As that of DLA and others: found by timm's own word for it, trained and saved."""
    torch.manual_seed(0)
    models = [timm.create_model("test_efficientnet", num_classes=3).double().eval() for _ in range(2)]
    for model in models:
        model.global_pool.flatten = nn.Identity()
        model.classifier = nn.Sequential(nn.Conv2d(model.num_features, 3, 1), nn.Flatten()).double()
        model.get_classifier = lambda model=model: model.classifier[0]
    models[1].load_state_dict(models[0].state_dict())
    vp.attach(models[0], vp.LinearProbe())
    assert models[0].peft["default"].head_paths == ("classifier.0",)
    vp.save(trained(models[0]), tmp_path / "adapter")
    vp.load(models[1], tmp_path / "adapter")
    assert torch.equal(models[0](images), models[1](images))
    vp.disable(models[1])
    assert not torch.allclose(models[0](images), models[1](images))


@pytest.mark.slow
def test_compiled(resnet, images):
    """In one graph: changes of outputs and of weights, and statistics that are kept."""
    vp.attach(resnet, [ALL, vp.SSF()])
    trained(resnet).train()
    stem = nn.Sequential(resnet.conv1, resnet.bn1)
    compiled = torch.compile(stem, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(images), stem(images), rtol=1e-10)


def defaults():
    """Every listed method that can be made without options."""
    for name in methods.__all__:
        kind = getattr(methods, name)
        try:
            yield kind()
        except (TypeError, vp.UserError):  # it needs adapters, tasks or experts
            continue


def test_what_needs_blocks_is_refused(resnet):
    keys = list(resnet.state_dict())
    needing = [method for method in defaults() if method.needs_blocks]
    assert {"VPT", "AdaptFormer", "PrefixTuning", "Convpass", "GatedVPT"} <= {type(each).__name__ for each in needing}
    for method in needing:
        sentence = (
            f"^{type(method).__name__} needs sited blocks; this model has layer sites only: ResNet has no sited blocks$"
        )
        with pytest.raises(vp.UnsupportedError, match=sentence):
            vp.attach(resnet, method)
    assert list(resnet.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in resnet.parameters())


def test_other_refusals(resnet, tmp_path):
    with pytest.raises(
        vp.ConfigurationError, match=r"'q' matches no layer; .*convolutions.*\(layer sites only: ResNet has"
    ):
        vp.attach(resnet, vp.LoRA())
    grouped = timm.create_model("test_efficientnet", num_classes=3)
    with pytest.raises(vp.UnsupportedError, match="cannot drop inputs at conv_dw"):
        vp.attach(grouped, vp.LoRA(rank=2, targets=("grouped",), dropout=0.1))
    assert not hasattr(grouped, "peft")
    assert not hasattr(resnet, "peft")
    vp.attach(resnet, ALL, name="a")
    with pytest.raises(vp.UnsupportedError, match="use it for a whole batch"), vp.route(resnet, ["a", None]):
        pass
    with pytest.raises(vp.UnsupportedError, match="needs sited blocks"):
        vp.economise(resnet, recompute="mlp")
    with pytest.raises(vp.UnsupportedError, match="not converted"):
        vp.export_peft(resnet, tmp_path / "peft")
