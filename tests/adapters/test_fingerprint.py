"""The same weights are recognised in every precision, others are refused, and the sentence names what differs."""

import hashlib
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import visionpeft as vp
from visionpeft.adapters import fingerprint


def build(dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 3} | options
    return timm.create_model("vit_tiny_patch16_224", **options).eval().to(dtype)


def saved(folder, dtype=torch.float32, change=lambda model: None):
    model = build(dtype)
    change(model)
    vp.save(vp.attach(model, vp.LoRA(rank=2)), folder)
    return folder


def negative_zero(model):
    with torch.no_grad():
        model.blocks[0].norm1.bias.fill_(-0.0)


def test_the_hash_is_the_one_that_is_described():
    """By hashlib alone; -0.0 counts as 0.0."""
    model, digest = build(), hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.named_parameters()):
        if not name.startswith("head."):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update((value.detach().bfloat16() + 0.0).view(torch.int16).numpy().tobytes())
    assert fingerprint.fingerprint(model) == digest.hexdigest()
    negative_zero(model)
    assert fingerprint.fingerprint(model) == digest.hexdigest()


@pytest.mark.parametrize("then", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("before", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precisions(tmp_path, before, then):
    """Compared in the coarser precision; nothing is known of bfloat16 beside float16, which is said."""
    folder = saved(tmp_path, before, negative_zero)
    if {before, then} == {torch.bfloat16, torch.float16}:
        with pytest.raises(vp.StorageError, match="one is kept in bfloat16 and one in float16"):
            vp.load(build(then), folder)
    else:
        vp.load(build(then), folder)
    other = build(then)
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight[0, 0] += 0.1
    with pytest.raises(vp.StorageError, match="was trained on other weights"):
        vp.load(other, folder)


def pooled_by_swin(pooling):
    torch.manual_seed(0)
    options = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 32, "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **options).eval()
    model.reset_classifier(3, pooling)
    return model


@pytest.mark.parametrize(
    ("make", "before", "then"),
    [
        (lambda pooling: build(global_pool=pooling, fc_norm=False, final_norm=True), "token", "avg"),
        (pooled_by_swin, "avg", "max"),
    ],
)
def test_the_same_weights_pooled_otherwise_are_refused(tmp_path, monkeypatch, make, before, then):
    """No weight says it; the head would have read another feature without a word."""
    vp.save(vp.attach(make(before), vp.LoRA(rank=2)), tmp_path)
    vp.load(make(before), tmp_path)
    with pytest.raises(vp.StorageError, match=f"pools by '{before}', and this one of the same weights pools by '"):
        vp.load(make(then), tmp_path)
    vp.load(make(then), tmp_path, check_fingerprint=False)
    vp.save(vp.attach(make(before), vp.LoRA(rank=2), head=False), tmp_path / "headless")
    vp.load(make(then), tmp_path / "headless")  # whose user reads what he likes
    with monkeypatch.context() as patch:
        patch.setattr("visionpeft.backbones.tower.Backbone.pooling", None)
        vp.save(vp.attach(make(before), vp.LoRA(rank=2)), tmp_path / "earlier")  # by a version that does not say it
    vp.load(make(then), tmp_path / "earlier")


def test_a_head_on_maps_does_not_mind_the_pooling(tmp_path):
    make = [build(global_pool=pooling, fc_norm=False, final_norm=True, num_classes=0) for pooling in ("token", "avg")]
    first, second = (vp.DensePredictor(backbone, classes=3) for backbone in make)
    vp.save(vp.attach(first, vp.LoRA(rank=2)), tmp_path)
    vp.load(second, tmp_path)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(first.eval()(images), second.eval()(images))


def other_block(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] += 0.1


@pytest.mark.parametrize(
    ("options", "change", "sentence"),
    [
        ({}, other_block, r"\(blocks.1 is of other values\)"),
        ({"img_size": 64}, None, r"\(pos_embed is of another shape; the image size may be another one\)"),
        ({}, lambda model: setattr(model, "norm", torch.nn.Identity()), r"\(norm is missing here\)"),
        ({"fc_norm": True, "final_norm": True}, None, r"fc_norm is here only"),
        ({"depth": 3}, None, r"\(blocks.2 is here only\)"),
    ],
)
def test_what_differs_is_named(tmp_path, options, change, sentence):
    folder, model = saved(tmp_path), build()
    model.load_state_dict(build().state_dict())
    other = build(**options)
    same = {k: v for k, v in model.state_dict().items() if other.state_dict().get(k, torch.empty(0)).shape == v.shape}
    other.load_state_dict(same, strict=False)
    if change:
        change(other)
    with pytest.raises(vp.StorageError, match=sentence):
        vp.load(other, folder)


def test_records_of_older_versions(tmp_path):
    """They have one hash, for which -0.0 is not 0.0: that of the bytes of bfloat16."""
    folder = saved(tmp_path, change=negative_zero)
    model = build()
    negative_zero(model)
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.named_parameters()):
        if not name.startswith("head."):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().bfloat16().view(torch.int16).numpy().tobytes())
    described = vp.read_metadata(folder)
    described["backbone"] = {k: described["backbone"][k] for k in ("source", "class", "architecture")}
    described["backbone"]["fingerprint"] = digest.hexdigest()
    tensors = load_file(folder / "adapter.safetensors")
    save_file(tensors, folder / "adapter.safetensors", metadata={"visionpeft": json.dumps(described)})
    (folder / "adapter.json").unlink()
    vp.load(model, folder)
    other = build()
    other_block(other)
    with pytest.raises(vp.StorageError, match=f"fingerprint {digest.hexdigest()}, here"):
        vp.load(other, folder)


def test_unchanged_weights_are_hashed_once(tmp_path, monkeypatch):
    """A change is noticed however it is made; switching adapters and saving is none."""
    hashed, real = [], fingerprint._hash_all
    monkeypatch.setattr(fingerprint, "_hash_all", lambda parameters: hashed.append(1) or real(parameters))
    model = vp.attach(build(), vp.LoRA(rank=2))
    for folder in ("one", "two"):
        vp.save(model, tmp_path / folder)
        with vp.use(model, None):
            vp.save(model, tmp_path / folder)
    vp.load(model, tmp_path / "one", "other")
    assert len(hashed) == 1
    for change in (
        lambda: other_block(model),
        lambda: model.blocks[0].norm1.weight.data.mul_(2),
        lambda: setattr(model.norm, "weight", torch.nn.Parameter(torch.zeros(32))),
    ):
        before = fingerprint.fingerprint(model)
        change()
        assert fingerprint.fingerprint(model) != before
