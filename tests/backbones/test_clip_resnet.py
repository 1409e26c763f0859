"""CLIP's ResNets, with their attention pool, and other image towers of OpenCLIP that have layer sites only."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_reference import NAMES, RESNET, clip_model, images, tokenizer

import visionpeft as vp
from visionpeft.clip.local_features import with_local_features
from visionpeft.sites.changed_weights import KeepsStatistics

LABELS = torch.tensor([0, 2, 3])


def moved(clip, scale=0.1):
    """Adapters away from their start, so that they have an effect."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in clip.peft.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return clip


# targets -> paths in the image tower, and where the changes of these layers are kept
POOL = {f"attnpool.{name}_proj": f"4.{site}" for name, site in zip("qkvc", ("q", "k", "v", "proj"), strict=True)}
POINTWISE = {
    f"layer{stage + 1}.0.{path}": f"{stage}.{site}"
    for stage in range(4)
    for path, site in (("conv1", "conv1"), ("conv3", "conv3"), ("downsample.0", "downsample_0"))
}
TARGETS = {
    ("q", "k", "v", "proj"): POOL,
    ("pointwise", "v"): POINTWISE | {"attnpool.v_proj": "4.v"},
    ("conv2",): {"conv2": "conv2"} | {f"layer{stage + 1}.0.conv2": f"{stage}.conv2" for stage in range(4)},
}


def by_hand(clip, plain, targets):
    """The image tower of a plain CLIP with the weights that the low-rank changes of another one make."""
    visual = copy.deepcopy(plain).visual
    changes = clip.peft[next(iter(clip.peft.active))].get_submodule("lora.visual")
    with torch.no_grad():
        for path, place in TARGETS[targets].items():
            change, weight = changes.get_submodule(place), visual.get_submodule(path).weight
            weight += (change.scaling * change.B @ change.A).view_as(weight)
    return visual


def test_blocks_are_bottlenecks_and_the_attention_pool():
    tower = vp.describe(clip_model("resnet")).towers["visual"]
    assert tower.depth == 4 + 1
    pool = tower.blocks[-1].layers
    assert set(pool) == {"q", "k", "v", "proj"}
    assert {layer.changed for layer in pool.values()} == {"always"}  # their weights are read, they are never called
    assert tower.width == RESNET["width"] * 32


@pytest.mark.parametrize("targets", TARGETS)
def test_lora_is_the_changed_weights(targets):
    """On convolutions and in the attention pool; for the image and for its parts, which PLOT matches."""
    plain = clip_model("resnet")
    clip = vp.attach(copy.deepcopy(plain), vp.LoRA(rank=2, alpha=4.0, targets=targets), head=False)
    visual = by_hand(moved(clip), plain, targets)
    found, parts = clip.visual(images()), with_local_features(clip, images())
    assert not torch.allclose(plain.visual(images()), found, atol=1e-3)
    plain.visual = visual
    torch.testing.assert_close(found, visual(images()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts, with_local_features(plain, images()), rtol=1e-10, atol=1e-10)
    vp.merge(clip)
    torch.testing.assert_close(clip.visual(images()), found, rtol=1e-10, atol=1e-10)


def test_biases_and_norms():
    """BitFit trains the bias of every norm and of the pool; statistics stay, in a loop that calls `train()`, too."""
    clip = clip_model("resnet")
    norms = [module for module in clip.visual.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    pool = [getattr(clip.visual.attnpool, f"{name}_proj").out_features for name in "qkvc"]
    before = {name: value.clone() for name, value in clip.named_buffers()}
    for key_bias in (True, False):
        vp.attach(clip, vp.BitFit(key_bias=key_bias), head=False)
        count = sum(norm.num_features for norm in norms) + sum(pool) - (0 if key_bias else pool[1])
        assert sum(p.numel() for p in vp.trainable_parameters(clip)) == count
        vp.detach(clip)
    vp.attach(clip, vp.LayerNormTuning(), head=False)
    assert sum(p.numel() for p in vp.trainable_parameters(clip)) == 2 * sum(norm.num_features for norm in norms)
    expected = moved(clip).visual(images())
    assert torch.equal(clip.train().visual(images()), expected)
    assert all(isinstance(norm, KeepsStatistics) for norm in norms)
    vp.detach(clip)
    assert all(torch.equal(value, before[name]) for name, value in clip.named_buffers())


def test_learners_that_change_the_towers(tmp_path):
    """CLIP-LoRA acts in the attention pool and the text tower, for which its dropout is switched off."""
    plain = clip_model("resnet")
    options = {"rank": 2, "dropout": 0.0, "towers": ["visual"]}
    learner = vp.CLIPLoRA(copy.deepcopy(plain), tokenizer(), NAMES, **options, targets=["q", "k", "v", "proj"])
    moved(learner.clip)
    visual = by_hand(learner.clip, plain, ("q", "k", "v", "proj"))
    f = F.normalize(visual(images()), dim=-1)
    logits = learner(images())
    torch.testing.assert_close(logits, plain.logit_scale.exp() * f @ learner.text_features().T, rtol=1e-10, atol=1e-10)
    vp.save_learner(learner, tmp_path)
    assert torch.equal(vp.load_learner(tmp_path, copy.deepcopy(plain), tokenizer())(images()), logits)
    with pytest.raises(vp.UnsupportedError, match=r"^CLIPLoRA does not work on this CLIP: .*cannot drop inputs at q"):
        vp.CLIPLoRA(copy.deepcopy(plain), tokenizer(), NAMES, targets=["q"])
    norms = vp.TunedCLIP(copy.deepcopy(plain), tokenizer(), NAMES)
    norms.train().loss(images(), LABELS)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in norms.trainable_parameters())


@pytest.mark.parametrize("name", ["IVLP", "MaPLe", "DAPT", "ProVP", "PLOTPlusPlus"])
def test_prompts_in_the_image_tower_are_refused(name):
    clip = clip_model("resnet")
    sentence = f"^{name} does not work on this CLIP: .* needs sited blocks; .* ModifiedResNet has no sited blocks$"
    with pytest.raises(vp.UnsupportedError, match=sentence):
        getattr(vp, name)(clip, tokenizer(), NAMES)
    assert not hasattr(clip, "peft")


def test_a_tower_around_a_timm_model_without_sited_blocks():
    """EfficientNet in a CLIP: its layers, under the paths of the CLIP."""
    torch.manual_seed(0)
    vision = {"timm_model_name": "test_efficientnet", "timm_model_pretrained": False, "image_size": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    clip = open_clip.CustomTextCLIP(32, vision | {"timm_pool": "avg", "timm_proj": "linear"}, text).double().eval()
    plain = copy.deepcopy(clip)
    vp.attach(clip, vp.LoRA(rank=2, targets=("pointwise",)), head=False)
    tower = vp.describe(clip).towers["visual"]
    assert tower.path == "visual.trunk"
    moved(clip)
    paths = {id(module): path for path, module in clip.named_modules()}
    with torch.no_grad():
        placements = clip.peft["default"].placements
        assert placements
        for _, placement in placements:
            weight = plain.get_submodule(paths[id(tower.layer(placement.block, placement.site).owner)]).weight
            weight += (placement.module.scaling * placement.module.B @ placement.module.A).view_as(weight)
    seen = images(size=64)
    torch.testing.assert_close(clip.encode_image(seen), plain.encode_image(seen), rtol=1e-10, atol=1e-10)
    with pytest.raises(vp.UnsupportedError, match=r"needs sited blocks; .* EfficientNet has no sited blocks$"):
        vp.attach(clip, vp.VPT(), name="prompts")
