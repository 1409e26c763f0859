"""Where a method acts, in words: block ranges, targets, towers, overrides; what matches nothing is an error."""

import open_clip
import pytest
import timm
import torch

import visionpeft as vp
from visionpeft.methods.parts.addressing import select_blocks


@pytest.fixture
def vit():
    return timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=32, num_heads=2, num_classes=3)


@pytest.fixture
def clip():
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 3}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(16, vision, text)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("last:2", [4, 5]),
        ("first:1", [0]),
        ("2:4", [2, 3]),
        ("::3", [0, 3]),
        ("-1:", [5]),
        ("3", [3]),
        (-1, [5]),
        ([5, 0], [0, 5]),
    ],
)
def test_block_ranges(blocks, expected):
    assert select_blocks(blocks, depth=6) == expected


@pytest.mark.parametrize("blocks", ["last:7", "last:0", "some", "4:4", 6, [0, 9], [], "last:x"])
def test_block_ranges_that_name_nothing(blocks):
    with pytest.raises(vp.ConfigurationError, match="allowed are"):
        select_blocks(blocks, depth=6)


def ranks(model):
    return {
        name.removeprefix("lora.visual.").removesuffix(".A"): len(parameter)
        for name, parameter in model.peft["default"].named_parameters()
        if name.endswith(".A")
    }


def test_later_overrides_win(vit):
    overrides = {"q": 4, "last:2": 8, "3/q": 1}
    vp.attach(vit, vp.LoRA(rank=2, targets=("q", "fc1"), overrides=overrides, blocks="1:"))
    assert ranks(vit) == {"1.q": 4, "1.fc1": 2, "2.q": 8, "2.fc1": 8, "3.q": 1, "3.fc1": 8}


def test_bottlenecks_differ_by_block(vit):
    vp.attach(vit, vp.Adapter(bottleneck=2, overrides={"last:1": 6}))
    widths = [vit.peft["default"].get_parameter(f"adapter.visual.{i}.mlp_out.up.weight").shape[1] for i in range(4)]
    assert widths == [2, 2, 2, 6]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (vp.LoRA(targets=("qkv",)), "target 'qkv' matches no layer"),
        (vp.LoRA(targets=("q",), overrides={"v": 2}), "'v' matches nothing"),
        (vp.LoRA(blocks="last:5"), "names no block"),
        (vp.VPT(towers="text"), "no tower 'text'"),
        (vp.LastBlocks(5), "the tower has 4 blocks"),
        (vp.VPT(deep=False, blocks=[0, 2]), "consecutive blocks"),
    ],
)
def test_what_matches_nothing_is_an_error(vit, method, sentence):
    with pytest.raises(vp.ConfigurationError, match=sentence):
        vp.attach(vit, method)
    assert not hasattr(vit, "peft")


@pytest.mark.parametrize(
    "fields",
    [{"rank": 0}, {"rank": 2.5}, {"dropout": 1.0}, {"targets": "q"}, {"overrides": {"q": -1}}],
)
def test_bad_hyper_parameters(fields):
    with pytest.raises(vp.ConfigurationError, match="LoRA"):
        vp.LoRA(**fields)


def test_towers_of_clip(clip):
    vp.attach(clip, vp.LoRA(rank=2), name="image")
    vp.attach(clip, vp.LoRA(rank=2, towers="text"), name="words")
    vp.attach(clip, vp.LoRA(rank=2, towers=["visual", "text"]), name="both")
    towers = {n: {key.split(".")[1] for key in clip.peft[n].state_dict()} for n in ("image", "words", "both")}
    assert towers == {"image": {"visual"}, "words": {"text"}, "both": {"visual", "text"}}


def test_names_of_adapters(vit):
    vp.attach(vit, vp.LoRA(), name="pets")
    for name, sentence in (("pets", "already attached"), ("a.b", "plain word"), ("", "plain word"), ("keys", "plain")):
        with pytest.raises(vp.ConfigurationError, match=sentence):
            vp.attach(vit, vp.LoRA(), name=name)
    with pytest.raises(vp.ConfigurationError, match="no adapter 'pet'; attached are pets"):
        vp.activate(vit, "pet")


def test_parameters_to_train(vit):
    vp.attach(vit, vp.LinearProbe(), train=("cls_token", "norm", "blocks.*.norm1"))
    expected = {"cls_token", "norm.weight", "norm.bias"} | {
        f"blocks.{i}.norm1.{p}" for i in range(4) for p in ("weight", "bias")
    }
    assert set(vit.peft["default"].trained_names) == expected
    with pytest.raises(vp.ConfigurationError, match=r"near names are .*cls_token"):
        vp.attach(vit, vp.LoRA(), name="other", train=("cls_tokens",))


def test_one_of_two_merged_adapters_can_be_detached(vit):
    vp.attach(vit, vp.LoRA(rank=2), name="a")
    vp.attach(vit, vp.SSF(), name="b")
    images = torch.randn(1, 3, 224, 224)
    vit.eval()
    with torch.no_grad(), vp.use(vit, "b"):
        alone = vit(images)
    vp.merge(vit)
    with pytest.raises(vp.ConfigurationError, match="no adapter 'c'"):
        vp.detach(vit, "c")
    assert not hasattr(vit, "peft")  # still merged
    vp.detach(vit, "a")
    with torch.no_grad():
        assert torch.equal(vit(images), alone)
