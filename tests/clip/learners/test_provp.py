"""ProVP-Ref against a float64 transcription of its image tower and of its loss."""

import math

import pytest
import torch
from clip_reference import (
    NAMES,
    clip_model,
    cross_entropy,
    image_features,
    images,
    lively_,
    plain_features,
    scaled,
    tokenizer,
)
from reference import prompted_clip

import visionpeft as vp
from visionpeft.clip.learners import ProVP
from visionpeft.clip.storage import load_learner, save_learner

LABELS = torch.tensor([0, 2, 3])
CLEAN = [name.replace("_", " ") for name in NAMES]


def provp(**options):
    torch.manual_seed(0)
    return lively_(ProVP(clip_model("quick"), tokenizer(), NAMES, **({"num_tokens": 3} | options)))


def images_by_hand(learner, carry):
    """Unit features (batch, e) with the prompts after the patches; where they stand does not matter."""
    weights = dict(learner.clip.state_dict())
    own = {name.rpartition("visual.")[2]: p for name, p in learner.trained_state().items()}
    prompts = [own["0.stream_in.source.prompts"], own["1.stream_in.source.prompts"]]
    patches = images().unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ weights["visual.conv1.weight"].flatten(1).T
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = prompted_clip.norm(weights, "visual.ln_pre", x + weights["visual.positional_embedding"])
    x = torch.cat([x, prompts[0].expand(len(x), -1, -1)], 1)
    number, open_to_all = len(prompts[0]), torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    for index in range(2):
        if index:
            mixed = carry * x[:, -number:] + (1 - carry) * prompts[index]
            x = torch.cat([x[:, :-number], mixed], 1)
        name = f"visual.transformer.resblocks.{index}"
        x = prompted_clip.block(weights, name, x, 2, prompted_clip.quick_gelu, open_to_all)
    x = prompted_clip.norm(weights, "visual.ln_post", x[:, 0]) @ weights["visual.proj"]
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(("carry", "weight", "temperature"), [(0.3, 2.0, None), (0.01, 0.0, None), (0.0, 1.0, 1.0)])
def test_provp_is_the_formula(carry, weight, temperature, tmp_path):
    learner = provp(carry=carry, weight=weight, temperature=temperature)  # fewer prompts than five are prompts, too
    f = images_by_hand(learner, carry)
    frozen = image_features(clip_model("quick"), images())
    t = plain_features(clip_model("quick"), [f"a photo of a {name}." for name in CLEAN]).detach()
    expected = scaled(learner.clip, f, t)
    scale = learner.clip.logit_scale.detach().exp() if temperature is None else 1 / temperature
    held = cross_entropy(scale * f @ frozen.T, torch.arange(3))
    loss, logits = learner.loss(images(), LABELS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    wanted = cross_entropy(expected, LABELS) + weight * held
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-9)
    parameters = learner.trainable_parameters()
    assert sum(p.numel() for p in parameters) == 2 * 3 * 32
    right = torch.autograd.grad(wanted, parameters)
    for found, each in zip(torch.autograd.grad(loss, parameters), right, strict=True):
        assert each.abs().max() > 1e-4
        torch.testing.assert_close(found, each, rtol=0, atol=1e-8)
    # Without a temperature the term is nearly flat: it lies within what cosines in [-1, 1] allow.
    if temperature == 1.0:
        assert abs(held.item() - math.log(3)) < 2
        alone = learner.loss(images(1), LABELS[:1])[0]
        torch.testing.assert_close(alone, cross_entropy(expected[:1], LABELS[:1]), rtol=0, atol=1e-9)
    with torch.no_grad():
        save_learner(learner, tmp_path)
        loaded = load_learner(tmp_path, clip_model("quick"), tokenizer(), ["heron", "owl"])
        learner.set_class_names(["heron", "owl"])
        assert torch.equal(loaded(images()), learner(images()))


def test_without_carry_it_is_deep_vpt():
    learner = provp(carry=0.0)
    clip = vp.attach(clip_model("quick"), vp.VPT(3), head=False)
    with torch.no_grad():
        mine = sorted(name for name in learner.trained_state() if "prompts" in name)
        for name, (_, theirs) in zip(mine, sorted(clip.peft.named_parameters()), strict=True):
            theirs.copy_(learner.trained_state()[name])
        expected = clip.encode_image(images())
        expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(learner.image_features(images()), expected, rtol=0, atol=1e-10)
        learner = provp(carry=0.5)
        assert (learner.image_features(images()) - expected).abs().max() > 1e-3


REFUSED = {
    "weight": ({"weight": -1}, "finite number that is not negative"),
    "temperature": ({"temperature": 0}, "temperature must be positive"),
    "carry": ({"carry": 1.0}, "less than 1, not 1.0"),
    "no prompts": ({"num_tokens": 0}, "must be a positive integer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_clear_sentence(case):
    options, message = REFUSED[case]
    with pytest.raises(vp.ConfigurationError) as caught:
        provp(**options)
    assert message in str(caught.value)
