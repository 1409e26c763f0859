"""Backbones by name, their weights from files, their preprocessing, and what is said when something is wrong."""

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import visionpeft as vp
from visionpeft.backbones.preprocessing import Preprocessing, preprocessing_of
from visionpeft.errors import ConfigurationError, StorageError, UnsupportedError
from visionpeft.models.checkpoints import load_timm_checkpoint
from visionpeft.models.embedded import NANO_VITS
from visionpeft.models.image_classifier import ImageClassifier
from visionpeft.models.video_classifier import VideoClassifier

TINY = {"img_size": 32}


def tiny(**options):
    return vp.create_backbone("test_vit", **{"pretrained": False, **TINY, **options})


@pytest.fixture
def state():
    torch.manual_seed(5)
    return tiny(num_classes=4).state_dict()


@pytest.mark.parametrize("name", NANO_VITS)
def test_nano_vit(name):
    model = vp.create_backbone(name, num_classes=3)
    assert type(model) is timm.models.VisionTransformer
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    assert model.backbone_source == {
        "library": "timm",
        "name": name,
        "pretrained": True,
        "kwargs": {},
        "checkpoint": None,
    }
    weights = load_file(NANO_VITS[name] / "model.safetensors")
    assert torch.equal(model.pos_embed, weights["pos_embed"].float())
    random = vp.create_backbone(name, pretrained=False)
    assert not torch.equal(model.pos_embed, random.pos_embed)
    assert preprocessing_of(model).input_size == (64, 64)


def test_source_rebuilds_the_model(tmp_path, state):
    save_file(state, tmp_path / "weights.safetensors")
    model = tiny(checkpoint=tmp_path / "weights.safetensors")
    source = model.backbone_source
    again = vp.create_backbone(
        source["name"], pretrained=source["pretrained"], checkpoint=source["checkpoint"], **source["kwargs"]
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.bin", "nested.pt"])
def test_checkpoints_load(tmp_path, state, name):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(state, path)
    elif name == "nested.pt":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state, path)
    for num_classes in (4, 9, 0):  # a head that does not fit is left out
        model = tiny(checkpoint=path, num_classes=num_classes).state_dict()
        assert all(torch.equal(model[key], state[key]) for key in model if not key.startswith("head."))
    assert torch.equal(tiny(checkpoint=path, num_classes=4).head.weight, state["head.weight"])


def test_npz_loads(tmp_path):
    model = tiny(num_classes=0)
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    generator = np.random.default_rng(0)

    def draw(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    arrays = {
        "cls": draw(1, 1, width),
        "embedding/kernel": draw(16, 16, 3, width),
        "embedding/bias": draw(width),
        "Transformer/posembed_input/pos_embedding": draw(1, 5, width),
        "Transformer/encoder_norm/scale": draw(width),
        "Transformer/encoder_norm/bias": draw(width),
    }
    hidden = model.blocks[0].mlp.fc1.out_features
    for index in range(len(model.blocks)):
        block = f"Transformer/encoderblock_{index}"
        for name in ("query", "key", "value"):
            arrays[f"{block}/MultiHeadDotProductAttention_1/{name}/kernel"] = draw(width, heads, width // heads)
            arrays[f"{block}/MultiHeadDotProductAttention_1/{name}/bias"] = draw(heads, width // heads)
        arrays[f"{block}/MultiHeadDotProductAttention_1/out/kernel"] = draw(heads, width // heads, width)
        arrays[f"{block}/MultiHeadDotProductAttention_1/out/bias"] = draw(width)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays[f"{block}/{norm}/scale"], arrays[f"{block}/{norm}/bias"] = draw(width), draw(width)
        for layer, shape in (("Dense_0", (width, hidden)), ("Dense_1", (hidden, width))):
            arrays[f"{block}/MlpBlock_3/{layer}/kernel"] = draw(*shape)
            arrays[f"{block}/MlpBlock_3/{layer}/bias"] = draw(shape[1])
    np.savez(tmp_path / "vit.npz", **arrays)
    loaded = tiny(checkpoint=tmp_path / "vit.npz")
    assert torch.equal(loaded.cls_token, torch.from_numpy(arrays["cls"]))
    kernel = torch.from_numpy(arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"])
    assert torch.equal(loaded.blocks[1].mlp.fc1.weight, kernel.T)
    np.savez(tmp_path / "other.npz", nothing=np.zeros(3))
    with pytest.raises(StorageError, match=r"other\.npz"):
        tiny(checkpoint=tmp_path / "other.npz")


def test_checkpoints_that_do_not_fit(tmp_path, state):
    path = tmp_path / "weights.pth"

    def refuse(content, said):
        torch.save(content, path)
        with pytest.raises(StorageError, match=said):
            tiny(checkpoint=path)

    refuse({key: value for key, value in state.items() if key != "norm.weight"}, r"missing norm\.weight$")
    refuse(state | {"blocks.0.ls1.gamma": torch.ones(64)}, r"unexpected blocks\.0\.ls1\.gamma$")
    refuse(state | {"cls_token": torch.ones(1, 1, 8)}, r"cls_token is \(1, 1, 8\) in the file and \(1, 1, 64\) in")
    refuse({"model": object}, "holds Python objects")
    refuse([1, 2], "does not hold a state dict")
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(StorageError, match="cannot be read"):
        tiny(checkpoint=path)
    (tmp_path / "weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(StorageError, match="cannot be read"):
        tiny(checkpoint=tmp_path / "weights.safetensors")
    with pytest.raises(StorageError, match="no checkpoint file"):
        tiny(checkpoint=tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_base_patch16_225", "did you mean vit_base_patch16_224"),
        ("nano_clip.distilled", r"is a CLIP.*create_clip\('nano_clip\.distilled'\)"),
        ("vit_base_patch16_224.orig", "it has .*orig_in21k"),
        ("open_clip/ViT-B-61/openai", "did you mean"),
        ("open_clip/ViT-B-16/opnai", "has no weights 'opnai'; it has openai"),
        ("open_clip/ViT-B-16", "name the weights of open_clip/ViT-B-16"),
        ("open_clip/ViT-B-16/openai", r"trained with QuickGELU.* use open_clip/ViT-B-16-quickgelu/openai"),
        ("open_clip/ViT-B-16-quickgelu/laion2b_s34b_b88k", "has no weights|use open_clip/ViT-B-16/laion2b_s34b_b88k"),
    ],
)
def test_wrong_names(name, said):
    with pytest.raises(ConfigurationError, match=said):
        vp.create_backbone(name)


def test_wrong_arguments():
    with pytest.raises(ConfigurationError, match="image_size"):
        tiny(image_size=3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k", "open_clip/ViT-B-32-quickgelu/openai"])
def test_weights_that_cannot_be_fetched(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=r"no network.*checkpoint=.*nano_vit"):
        vp.create_backbone(name)


def test_open_clip_tower():
    name = "open_clip/ViT-B-32-quickgelu/openai"
    model = vp.create_backbone(name, pretrained=False, num_classes=3)
    images = torch.randn(2, 3, 224, 224)
    assert model(images).shape == (2, 3)
    assert model.visual.proj is None
    assert model.forward_features(images).shape == (2, 768)
    assert preprocessing_of(model) == Preprocessing(
        (224, 224), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "bicubic", 1.0
    )
    vp.attach(model, vp.LoRA(rank=2))
    assert vp.summary(model).adapter == 12 * 2 * 2 * 2 * 768
    projected = vp.create_backbone(name, pretrained=False, projected=True)
    assert projected(images).shape == (2, 512)


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize(
    ("pool", "projection"), [("token", "linear"), ("token", "mlp"), ("token", None), ("token", "none"), ("map", None)]
)
def test_timm_towers_of_open_clip(pool, projection, projected):
    """A projection may be a head on the trunk, the classifier of the trunk, or absent."""
    name = "eva02_tiny_patch14_224" if pool == "token" else "vit_pe_core_tiny_patch16_384"
    tower = open_clip.timm_model.TimmModel(name, 24, image_size=224, pool=pool, proj=projection)
    model = ImageClassifier(tower, num_classes=3, projected=projected)
    images = torch.randn(1, 3, *tower.trunk.patch_embed.img_size)
    width = 24 if projected and projection != "none" else 192
    assert model.num_features == width
    assert model.forward_features(images).shape == (1, width)
    assert model(images).shape == (1, 3)
    assert VideoClassifier(tower, num_frames=1).num_features == width
    vp.attach(model, vp.LoRA(rank=2))
    assert {name.split(".")[0] for name in _trained(model)} == {"peft"}  # the head that is trained is the copy


def test_other_image_towers():
    resnet = open_clip.modified_resnet.ModifiedResNet([1, 1, 1, 1], 20, 32, 32, 16).eval()
    assert ImageClassifier(resnet, 3, projected=True)(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(UnsupportedError, match="has no separate projection; pass projected=True"):
        ImageClassifier(resnet, 3)
    with pytest.raises(UnsupportedError, match="Linear is no image tower of an OpenCLIP model"):
        ImageClassifier(torch.nn.Linear(2, 2), projected=True)


def _trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_open_clip_checkpoint(tmp_path):
    clip = open_clip.create_model("RN50", pretrained=None)
    torch.save(clip.visual.state_dict(), tmp_path / "other.pt")
    with pytest.raises(StorageError, match="does not fit OpenCLIP ViT-B-32"):
        vp.create_backbone("open_clip/ViT-B-32", checkpoint=tmp_path / "other.pt")


def test_preprocessing_of_resized_and_unknown_models():
    assert preprocessing_of(tiny()).input_size == (32, 32)
    found = preprocessing_of(vp.create_backbone("vit_tiny_patch16_224.augreg_in21k", pretrained=False))
    assert found == Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
    with pytest.raises(vp.UnsupportedError, match="does not say how"):
        preprocessing_of(torch.nn.Linear(2, 2))


SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("num_classes", [3, 0])
def test_a_distilled_model_takes_weights_with_other_heads(tmp_path, num_classes):
    """It has two heads, and timm names both; the rest is loaded to the bit, and the heads that fit, too."""
    name = "deit_tiny_distilled_patch16_224"
    saved = timm.create_model(name, num_classes=10, **SMALL).state_dict()
    save_file(saved, tmp_path / "deit.safetensors")
    model = timm.create_model(name, num_classes=num_classes, **SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_timm_checkpoint(model, tmp_path / "deit.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("head") else saved[key]), key
    same = timm.create_model(name, num_classes=10, **SMALL)
    load_timm_checkpoint(same, tmp_path / "deit.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in same.state_dict().items())


@pytest.mark.parametrize("options", [{"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}])
def test_weights_without_register_tokens_are_refused_in_words(tmp_path, options):
    sizes = SMALL | {"patch_size": 8}
    save_file(timm.create_model("vit_tiny_patch16_224", **sizes).state_dict(), tmp_path / "vit.safetensors")
    model = timm.create_model("vit_tiny_patch16_224", **sizes, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(StorageError, match=r"vit\.safetensors does not fit VisionTransformer: ") as caught:
        load_timm_checkpoint(model, tmp_path / "vit.safetensors")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
