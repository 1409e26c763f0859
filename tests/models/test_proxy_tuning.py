"""Proxy-tuning: by formula, with CLIPs of different scales, and what is refused."""

import math

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from reference.hosts import lively

import visionpeft as vp
from visionpeft.errors import ConfigurationError

NAMES = ["dog", "cat", "owl"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def learner(width, scale, seed, names=NAMES, **more):
    """A zero-shot learner on a tiny CLIP with exp(logit_scale) = scale."""
    torch.manual_seed(seed)
    vision = CLIPVisionCfg(layers=1, width=width, head_width=8, patch_size=8, image_size=32)
    clip = CLIP(16, vision, CLIPTextCfg(context_length=77, width=16, heads=2, layers=1))
    clip = lively(clip).double().eval()
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(scale))
    return vp.ZeroShot(clip, open_clip.get_tokenizer("ViT-B-16"), names, **more)


def cosines(model):
    """Of images and texts, from the features alone."""
    image, text = model.image_features(IMAGES), model.text_features()
    return torch.stack([torch.stack([(i * t).sum() / (i.norm() * t.norm()) for t in text]) for i in image])


@torch.no_grad()
def test_learners_of_other_scales():
    """At the scale of the large one: 50 (cos_l + alpha (cos_t - cos_s)), whatever the scales of the small ones."""
    large, tuned, small = learner(32, 50, 0), learner(16, 20, 1), learner(16, 80, 2)
    found = vp.ProxyTuned(large, tuned, small, alpha=0.6)(IMAGES)
    expected = 50 * (cosines(large) + 0.6 * (cosines(tuned) - cosines(small)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - (large(IMAGES) + 0.6 * (tuned(IMAGES) - small(IMAGES)))).abs().max() > 0.1  # scales matter
    same = vp.ProxyTuned(large, small, learner(16, 80, 2))(IMAGES)
    torch.testing.assert_close(same, large(IMAGES), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_classifiers():
    """Logits as they are; alpha 0 is the large model; small models may read images of their own size."""
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
    large, tuned, small = (
        lively(timm.create_model("vit_tiny_patch16_224", img_size=size, **options)).eval() for size in (48, 32, 32)
    )
    wide, narrow = torch.randn(2, 3, 48, 48), torch.randn(2, 3, 32, 32)
    found = vp.ProxyTuned(large, tuned, small, alpha=2)(wide, narrow)
    torch.testing.assert_close(found, large(wide) + 2 * tuned(narrow) - 2 * small(narrow))
    assert torch.equal(vp.ProxyTuned(large, tuned, small, alpha=0)(wide, narrow), large(wide))


def test_a_constant_of_an_image_changes_no_probability():
    """And what is added to single classes does."""
    torch.manual_seed(0)
    logits = [torch.randn(3, 4) for _ in range(3)]
    before = vp.proxy_logits(*logits).softmax(1)
    for index in range(3):
        moved = [each + torch.randn(3, 1) if number == index else each for number, each in enumerate(logits)]
        torch.testing.assert_close(vp.proxy_logits(*moved).softmax(1), before)
        moved = [each + torch.randn(3, 4) if number == index else each for number, each in enumerate(logits)]
        assert (vp.proxy_logits(*moved).softmax(1) - before).abs().max() > 0.01


def test_refusals():
    one = learner(16, 20, 0)
    other = learner(16, 20, 0, ["dog", "owl", "cat"])
    plain = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3)
    with pytest.raises(ConfigurationError, match="the small model has the classes dog, owl, cat, and the large one"):
        vp.ProxyTuned(one, one, other)
    with pytest.raises(ConfigurationError, match="only large and small of the three models is a CLIP learner"):
        vp.ProxyTuned(one, plain, one)
    with pytest.raises(ConfigurationError, match=r"\(2, 3\), \(2, 3\), \(2, 4\)"):
        vp.proxy_logits(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4))
