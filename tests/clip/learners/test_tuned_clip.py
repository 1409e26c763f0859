"""Any method in the towers of CLIP: OpenCLIP itself with changed weights is the oracle."""

import functools

import pytest
import torch
from clip_reference import NAMES, clip_model, image_features, images, lively_, plain_features, scaled, tokenizer

import visionpeft as vp
from visionpeft.clip.learners import TunedCLIP, ZeroShot
from visionpeft.clip.storage import load_learner, save_learner

CLEAN = [name.replace("_", " ") for name in NAMES]
LABELS = torch.tensor([0, 2, 3])
METHODS = {
    "both": (functools.partial(vp.LayerNormTuning, towers=["visual", "text"]), False, False),
    "images": (functools.partial(vp.DoRA, rank=2), False, True),
    "texts": (functools.partial(vp.BitFit, towers="text"), True, False),
}


@pytest.mark.parametrize("case", METHODS)
def test_a_method_in_the_towers_is_open_clip_with_changed_weights(case, tmp_path):
    make, frozen_images, frozen_texts = METHODS[case]
    method = make()
    clip = clip_model()
    learner = TunedCLIP(clip, tokenizer(), NAMES, method=method).eval()
    assert (learner.frozen_images, learner.frozen_texts) == (frozen_images, frozen_texts)
    zero_shot = ZeroShot(clip_model(), tokenizer(), NAMES)(images())
    torch.testing.assert_close(learner(images()), zero_shot, rtol=0, atol=1e-10)
    lively_(learner)
    loss, logits = learner.loss(images(), LABELS)
    gradients = torch.autograd.grad(loss, learner.trainable_parameters())
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    with torch.no_grad():
        torch.testing.assert_close(learner(images()), logits, rtol=0, atol=1e-10)
        save_learner(learner, tmp_path)
        loaded = load_learner(tmp_path, clip_model(), tokenizer())
        assert torch.equal(loaded(images()), learner(images()))
        assert loaded.options == learner.options
        # Merged into the weights it is a plain OpenCLIP model, which the reference runs one text at a time.
        merged = vp.merge(clip)
        texts = plain_features(merged, [f"a photo of a {name}." for name in CLEAN])
        expected = scaled(merged, image_features(merged, images()), texts)
        vp.unmerge(clip)
    torch.testing.assert_close(logits.detach(), expected.detach(), rtol=0, atol=1e-9)
    assert (expected - zero_shot).abs().max() > 1e-2
    learner.set_class_names(["heron", "owl"])
    assert learner(images()).shape == (3, 2)


REFUSED = {
    "no method": (lambda: TunedCLIP(clip_model(), tokenizer(), NAMES, method="LoRA"), "must be a method such as"),
    "a pass over data": (lambda: TunedCLIP(clip_model(), tokenizer(), NAMES, method=vp.FishMask()), "by a pass over"),
    "templates": (lambda: TunedCLIP(clip_model(), tokenizer(), NAMES, template="simple_7"), "one template, not with 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_clear_sentence(case):
    act, message = REFUSED[case]
    with pytest.raises(vp.ConfigurationError) as caught:
        act()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
