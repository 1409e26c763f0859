"""DAPT and PLOT++: both towers by float64 transcriptions, and what they add to CoOp and PLOT."""

import functools

import pytest
import torch
from clip_reference import (
    NAMES,
    WordTokenizer,
    clip_model,
    cross_entropy,
    image_features,
    images,
    lively_,
    prompt_features,
    scaled,
    tokenizer,
    transport_plan,
)
from reference import prompted_clip

import visionpeft as vp
from visionpeft.clip.learners import DAPT, PLOTPlusPlus
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.clip.text import unit

LABELS = torch.tensor([0, 2, 3])
SHOTS = torch.tensor([0, 1, 1, 2, 3, 0])


@functools.cache
def plain():
    """The CLIP that no learner here changes."""
    return clip_model("quick")


def images_by_hand(prompts, normed):
    """Unit features (batch, e) with prompts (number, width) after the patches, before or after the first norm."""
    weights = dict(plain().state_dict())
    patches = images().unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ weights["visual.conv1.weight"].flatten(1).T
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = prompted_clip.norm(weights, "visual.ln_pre", x + weights["visual.positional_embedding"])
    prompts = prompted_clip.norm(weights, "visual.ln_pre", prompts) if normed else prompts
    x = torch.cat([x, prompts.expand(len(x), -1, -1)], 1)
    open_to_all = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    for index in range(2):
        name = f"visual.transformer.resblocks.{index}"
        x = prompted_clip.block(weights, name, x, 2, prompted_clip.quick_gelu, open_to_all)
    x = prompted_clip.norm(weights, "visual.ln_post", x[:, 0]) @ weights["visual.proj"]
    return x / x.norm(dim=-1, keepdim=True)


def image_prompts(learner):
    (prompts,) = [p for name, p in learner.trained_state().items() if ".visual." in name]
    return prompts


def assert_same_gradients(learner, loss, expected):
    parameters = learner.trainable_parameters()
    wanted = torch.autograd.grad(expected, parameters, retain_graph=True)
    for found, right in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        assert right.abs().max() > 1e-4
        torch.testing.assert_close(found, right, rtol=0, atol=1e-8)


def assert_saved_and_new_names(learner, folder):
    learner.eval()
    with torch.no_grad():
        save_learner(learner, folder)
        loaded = load_learner(folder, clip_model("quick"), tokenizer(), ["heron", "owl"])
        learner.set_class_names(["heron", "owl"])
        assert torch.equal(loaded(images()), learner(images()))


def dapt(**options):
    torch.manual_seed(0)
    return lively_(DAPT(clip_model("quick"), tokenizer(), NAMES, **({"context_length": 4, "num_visual": 3} | options)))


@pytest.mark.parametrize("views", [1, 2])
def test_dapt_is_the_formula(views, tmp_path):
    learner = dapt(image_weight=20.0, text_weight=3.0)
    assert sum(p.numel() for p in learner.trainable_parameters()) == 4 * 32 + 3 * 32
    shots = image_features(plain(), images(6 * views, seed=7))
    learner.fit_features((shots.unflatten(0, (6, views)) if views > 1 else shots, SHOTS))
    mean = shots.unflatten(0, (6, views)).mean(1)
    c = torch.stack([mean[label == SHOTS].mean(0) for label in range(4)])
    assert (c.norm(dim=1) < 0.9999).any()  # not normalised again
    f, t = images_by_hand(image_prompts(learner), normed=False), prompt_features(plain(), NAMES, learner.vectors)
    expected = scaled(plain(), f, t)
    apart = [(-2 * (t[k] - t[other]).square().sum()).exp() for k in range(4) for other in range(k)]
    assert all(torch.tensor(-8.0).exp() < each < 1 for each in apart)
    near = torch.stack([(f[i] - c[LABELS[i]]).square().mean() for i in range(3)]).mean()
    wanted = cross_entropy(expected, LABELS) + 20 * near + 3 * sum(apart) / 6
    loss, logits = learner.loss(images(), LABELS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-9)
    assert_same_gradients(learner, loss, wanted)
    assert_saved_and_new_names(learner, tmp_path)


def test_dapt_without_prototypes_is_refused_and_not_trained():
    learner = dapt()
    with pytest.raises(vp.ConfigurationError, match="call fit_features"):
        learner.loss(images(), LABELS)
    with pytest.raises(vp.ConfigurationError, match="training images of all its 4 classes"):
        learner.fit_features((image_features(plain(), images(3)), LABELS))
    with pytest.raises(vp.ConfigurationError, match="not negative, not -1 and"):
        dapt(image_weight=-1)
    assert dapt(image_weight=0.0).loss(images(), LABELS)[0].isfinite()


def test_plot_plus_plus_is_the_formula_and_learns_in_two_stages(tmp_path):
    torch.manual_seed(0)
    learner = PLOTPlusPlus(clip_model("quick"), tokenizer(), NAMES, num_contexts=3, num_sets=2)
    words = plain().token_embedding.weight[torch.tensor([320, 1125, 539, 320])]
    assert torch.equal(learner.vectors[0], words)  # a photo of a
    assert sum(p.numel() for p in learner.trainable_parameters()) == 3 * 4 * 32 + 2 * 2 * 32
    lively_(learner)
    f = torch.stack([images_by_hand(own, normed=True) for own in image_prompts(learner)], 1)  # (batch, sets, e)
    t = torch.stack([prompt_features(plain(), NAMES, context) for context in learner.vectors])
    scale = plain().logit_scale.detach().exp()
    rows = []
    for own in f:
        similarities = [own @ t[:, k].T for k in range(4)]
        rows.append(torch.stack([scale * (transport_plan(s.detach()) * s).sum() for s in similarities]))
    expected = torch.stack(rows)
    loss, logits = learner.loss(images(), LABELS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    own = torch.autograd.grad(loss, learner.trainable_parameters(), allow_unused=True)
    assert [gradient is None for gradient in own] == [p is learner.vectors for p in learner.trainable_parameters()]
    learner.end_epoch(0, 4)
    assert not learner.second_stage
    learner.end_epoch(1, 4)
    assert learner.second_stage
    assert_same_gradients(learner, learner.loss(images(), LABELS)[0], cross_entropy(expected, LABELS))
    again = PLOTPlusPlus(clip_model("quick"), tokenizer(), NAMES, num_contexts=3, num_sets=2)
    again.load_state_dict(learner.state_dict())
    assert again.second_stage  # as in a run that goes on
    assert_saved_and_new_names(learner, tmp_path)


def test_a_further_training_of_plot_plus_plus_begins_with_its_texts_as_they_are():
    """Also if the second stage of the one before was made by an optimiser that counts no versions."""
    learner = PLOTPlusPlus(clip_model(), tokenizer(), NAMES, num_contexts=2, num_sets=2)
    learner.loss(images(), LABELS)
    learner.begin_second_stage()
    learner.loss(images(), LABELS)[0].backward()
    torch.optim.AdamW(learner.trainable_parameters(), lr=0.1, fused=True).step()
    learner.begin_training()
    assert not learner.second_stage
    assert torch.equal(learner.text_features(), learner.encode_text())


def test_phrases_that_a_tokenizer_reads_in_unequal_numbers_of_tokens():
    """Here "one picture of a" has five: all contexts have four, the last of each phrase."""
    words = WordTokenizer()

    def in_pieces(texts, context_length=12):
        return words([text.replace("picture", "pic ture") for text in texts], context_length)

    clip = clip_model("siglip")
    learner = PLOTPlusPlus(clip, in_pieces, ["dog", "red kite"])
    last = ["a photo of a", "this is a photo", "pic ture of a", "an image of a"]
    assert torch.equal(learner.vectors, clip.text.token_embedding(words(last)[:, :4]))
    exact = [learner.tokenizer.contents([f"{phrase} red kite."])[0] for phrase in last]
    ids = torch.tensor([[*row, *[1] * (12 - len(row))] for row in exact])
    torch.testing.assert_close(learner.text_features()[:, 1], unit(clip.encode_text(ids)), rtol=0, atol=1e-10)


def test_refusals_of_plot_plus_plus():
    with pytest.raises(vp.ConfigurationError, match="epsilon positive"):
        PLOTPlusPlus(plain(), tokenizer(), NAMES, epsilon=0)
    with pytest.raises(vp.ConfigurationError, match="a share from 0 to 1, not -1"):
        PLOTPlusPlus(plain(), tokenizer(), NAMES, first_stage=-1)
    assert PLOTPlusPlus(clip_model(), tokenizer(), NAMES, first_stage=0).second_stage
