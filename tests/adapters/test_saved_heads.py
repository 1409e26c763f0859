"""Classification heads of every kind that timm gives a model, and of several layers, are saved with an adapter."""

import pytest
import timm
import torch
from torch import nn

import visionpeft as vp
from visionpeft.adapters.fingerprint import fingerprint
from visionpeft.adapters.head_layout import head_from_layout, head_layout

SEQUENCER = {"layers": (1, 1, 1, 1), "embed_dims": (8,) * 4, "hidden_sizes": (4,) * 4}
SEQUENCER |= {"pretrained_cfg_overlay": {"input_size": (3, 56, 56)}}
HEADS = {  # classes of heads that timm has besides torch's Linear, and a model with each and the side of its images
    "Linear": ("mobilenetv3_small_050", {}, 64),
    "NormLinear": ("levit_128s", {}, 224),  # two heads, each with a batch normalisation
    "ClassifierHead": ("sequencer2d_s", SEQUENCER, 56),
}


def trained(model):
    """Adapters away from their start, so that they have an effect."""
    with torch.no_grad():
        for parameter in vp.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def vit(**options):
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 3} | options
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_heads_of_the_library(kind, tmp_path):
    """Loaded into models of any number of classes, whose own heads come back."""
    name, options, side = HEADS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).eval()
    others = [timm.create_model(name, num_classes=number, **options).eval() for number in (3, 0)]
    images = torch.randn(2, 3, side, side)
    backbone = {key: value for key, value in model.state_dict().items() if not key.startswith(("head", "classifier"))}
    heads = vp.attach(model, vp.LinearProbe()).peft["default"].head_paths
    assert type(model.get_submodule(heads[0])).__name__ == kind
    vp.save(trained(model), tmp_path)
    for other in others:
        other.load_state_dict(other.state_dict() | backbone)
        own = other(images)
        vp.load(other, tmp_path)
        assert torch.equal(other(images), model(images))
        assert all(parameter.requires_grad for parameter in vp.trainable_parameters(other))
        vp.disable(other)
        assert torch.equal(other(images), own)
        assert own.shape != (2, 3) or not torch.allclose(own, model(images))  # negative control


@pytest.mark.parametrize(
    "entry", [{"num_classes": "3"}, {"num_classes": -1}, {"num_classes": 10**15}, {"class": "Upsample"}]
)
def test_edited_heads_of_the_library_are_refused(entry):
    name, options, _ = HEADS["ClassifierHead"]
    model = timm.create_model(name, num_classes=3, **options)
    layout = head_layout(model.head)
    assert layout == {"class": "ClassifierHead", "num_classes": 3}
    assert head_from_layout(layout, model, "head").fc.out_features == 3
    with pytest.raises(vp.StorageError, match="not one this version can build"):
        head_from_layout(layout | entry, model, "head")


@torch.no_grad()
def test_a_head_of_several_layers(tmp_path):
    torch.manual_seed(0)
    model, other = vit(), vit()
    other.load_state_dict(model.state_dict())
    model.head = nn.Sequential(
        *(nn.Linear(32, 8), nn.ReLU(inplace=True), nn.BatchNorm1d(8), nn.GELU("tanh"), nn.SiLU(), nn.Tanh()),
        *(nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 3)),
    )
    vp.attach(model, vp.LoRA(rank=2))
    vp.save(trained(model).eval(), tmp_path)
    vp.load(other, tmp_path)
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(other(images), model(images))
    other.peft["default"].head[3].approximate = "none"  # negative control: the words of an activation are kept
    assert not torch.equal(other(images), model(images))


def test_a_head_of_one_s_own_is_refused(tmp_path):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = vit()
    model.head = Doubled(32, 3)
    vp.attach(model, vp.LoRA(rank=2))
    with pytest.raises(vp.StorageError, match=r"a head of class Doubled cannot be saved; .*torch\.save"):
        vp.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_statistics_of_a_head(tmp_path):
    """Of a model with layer sites only a trained head learns them, and they do not count as those of the backbone."""
    torch.manual_seed(0)
    model, other = (timm.create_model("test_resnet", num_classes=3).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        each.fc = nn.Sequential(nn.BatchNorm1d(each.num_features), each.fc)
        each.get_classifier = lambda each=each: each.fc
    vp.attach(model, vp.LinearProbe())
    images = torch.randn(4, 3, 64, 64)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    model.train()(images)
    learnt = model.peft["default"].fc[0]
    assert torch.allclose(learnt.running_mean, 0.1 * features.mean(0), atol=1e-6)
    assert torch.allclose(learnt.running_var, 0.9 + 0.1 * features.var(0), atol=1e-6)
    assert not model.fc[0].running_mean.any()  # negative control: the model's own head, and the backbone, stay
    assert torch.equal(model.bn1.running_mean, other.bn1.running_mean)
    vp.save(model.eval(), tmp_path)
    vp.load(other, tmp_path)
    assert torch.equal(other(images), model(images))
    before = fingerprint(other)
    other.bn1.running_mean += 1  # negative control: those of the backbone count
    assert fingerprint(other) != before
