"""Learners on a CLIP like SigLIP: a text tower that is not causal and is read at the last position, and a bias.

Every text is written out at all 12 positions, without a start token, and run by the library's blocks one at a time.
"""

import functools
import math

import pytest
import torch
from clip_reference import (
    WordTokenizer,
    clip_model,
    cross_entropy,
    image_features,
    images,
    lively_,
    transport_plan,
)

from visionpeft.clip import learners

NAMES = ["dog", "red kite", "passion flower"]
LABELS = torch.tensor([0, 2, 1])
TEMPLATE = "a {}."


@functools.cache
def plain():
    """The CLIP of the tests that change no tower."""
    return clip_model("siglip")


@functools.cache
def words():
    return WordTokenizer()


def build(name, clip=None, **options):
    torch.manual_seed(0)
    return getattr(learners, name)(clip or plain(), words(), NAMES, **options)


def unit_rows(x):
    return x / x.norm(dim=-1, keepdim=True)


def embedded(text):
    return plain().text.token_embedding.weight[words()([text])[0]]


def prompt(context, name, rest="{}."):
    """Embeddings (12, d) of a context (M, d) and what stands after it."""
    rows = embedded(" ".join(["x"] * len(context)) + " " + rest.format(name))
    return torch.cat((context, rows[len(context) :]))


def text_feature(rows, overwritten=()):
    """Feature (e,) of embeddings (12, d), whose first ones are overwritten by those (block, (M, d)) in later blocks."""
    tower, later = plain().text, dict(overwritten)
    x = rows + tower.positional_embedding
    for index, block in enumerate(tower.transformer.resblocks):
        if index in later:
            x = torch.cat((later[index], x[len(later[index]) :]))
        x = block(x[None])[0]
    return tower.text_projection(tower.ln_final(x)[-1])


def prompt_features(context):
    return torch.stack([text_feature(prompt(context, name)) for name in NAMES])


def template_features():
    return unit_rows(torch.stack([text_feature(embedded(TEMPLATE.format(name))) for name in NAMES])).detach()


def logits_of(f, t):
    return plain().logit_scale.detach().exp() * f @ t.T + plain().logit_bias.detach()


def assert_step(learner, expected, loss=None):
    """Logits, loss and every gradient of a step."""
    wanted = cross_entropy(expected, LABELS) if loss is None else loss
    found, logits = learner.loss(images(), LABELS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    parameters = learner.trainable_parameters()
    right = torch.autograd.grad(wanted, parameters)
    for own, other in zip(torch.autograd.grad(found, parameters), right, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)


def test_plot():
    learner = lively_(build("PLOT", num_contexts=2, context_length=4, pooled=True))
    seen, visual = [], plain().visual
    hook = visual.transformer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    whole = image_features(plain(), images())
    hook.remove()
    parts = unit_rows(visual.ln_post(seen[0])[:, 1:] @ visual.proj).detach()
    raw = torch.stack([prompt_features(context) for context in learner.vectors])
    t = unit_rows(raw)
    rows = [torch.stack([(transport_plan((s := f @ t[:, k].T).detach()) * s).sum() for k in range(3)]) for f in parts]
    matched = plain().logit_scale.detach().exp() * torch.stack(rows)
    assert_step(learner, matched + logits_of(whole, unit_rows(raw.mean(0))))


def test_tcp():
    learner = lively_(build("TCP", template=TEMPLATE, layer=1, weight=3.0))
    z, (first, _, second) = template_features(), learner.meta_net
    h = z @ first.weight.T + first.bias
    p = ((h / (1 + torch.exp(-1.702 * h))) @ second.weight.T + second.bias).reshape(3, 4, 32)
    rows = [text_feature(prompt(learner.vectors, name), {1: own}.items()) for name, own in zip(NAMES, p, strict=True)]
    t = unit_rows(torch.stack(rows))
    expected = logits_of(image_features(plain(), images()), t)
    assert_step(learner, expected, cross_entropy(expected, LABELS) + 3 * (1 - (t * z).sum(1).mean()))


def test_cocoop():
    learner = lively_(build("CoCoOp", init="a photo"))
    f, (first, _, second) = image_features(plain(), images()), learner.meta_net
    shifts = torch.relu(f @ first.weight.T + first.bias) @ second.weight.T + second.bias
    rows = [
        logits_of(own, unit_rows(prompt_features(learner.vectors + shift)))
        for own, shift in zip(f, shifts, strict=True)
    ]
    assert_step(learner, torch.stack(rows))


def image_feature(prompts):
    """Unit features (batch, e) with prompts (M, D) of each of the first blocks after the patches."""
    visual = plain().visual
    x = visual.conv1(images()).flatten(2).mT
    x = torch.cat((visual.class_embedding.expand(len(x), 1, -1), x), 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat((x, prompts[0].expand(len(x), -1, -1)), 1))
    for index, block in enumerate(visual.transformer.resblocks):
        if 0 < index < len(prompts):
            x = torch.cat((x[:, : -len(prompts[index])], prompts[index].expand(len(x), -1, -1)), 1)
        x = block(x)
    return unit_rows(visual.ln_post(x[:, 0]) @ visual.proj)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ["IVLP", "MaPLe"])
def test_deep_prompts(name, depth):
    own = {"num_tokens": 2, "depth": depth}
    if name == "IVLP":
        own = {"num_text": 2, "num_visual": 3, "depth_text": depth, "depth_visual": depth}
    learner = lively_(build(name, clip_model("siglip"), init="a photo of a", **own))
    state = learner.trained_state()
    if name == "MaPLe":
        texts = [p for p in state.values() if p.shape == (2, 32)]
        weights, biases = ([p for key, p in state.items() if key.endswith(end)] for end in ("weight", "bias"))
        pictures = [p @ w.T + b for p, w, b in zip(texts, weights, biases, strict=True)]
    else:
        texts = [learner.vectors, *(p for key, p in state.items() if ".text." in key)]
        pictures = [p for key, p in state.items() if ".visual." in key]
    assert len(texts) == len(pictures) == depth
    rows = [
        text_feature(prompt(texts[0], each, "of a {}."), {block: texts[block] for block in range(1, depth)}.items())
        for each in NAMES
    ]
    with_words = embedded("a photo of a dog.")
    torch.testing.assert_close(prompt(with_words[:2], "dog", "of a {}."), with_words)  # the rest of the phrase is fixed
    assert_step(learner, logits_of(image_feature(pictures), unit_rows(torch.stack(rows))))


def entropy(p):
    return -float((p.detach() * p.detach().log()).sum())


def test_tda():
    """The bias, equal for all classes, moves neither probabilities nor the order of entropies."""
    learner = build("TDA", template=TEMPLATE, negative_alpha=0.5, entropy_window=(0.0, 1.0))
    stream, z = image_features(plain(), images(30, seed=4)), template_features()
    sure, unsure, rows = {}, {}, []
    for f in stream:
        row = logits_of(f, z)
        p, label = row.softmax(0), int(row.argmax())
        for cache, places in ((sure, 3), (unsure, 2)):
            entries = cache.setdefault(label, [])
            if len(entries) < places:
                entries.append((entropy(p), f, p))
            elif entropy(p) < entries[-1][0]:
                entries[-1] = (entropy(p), f, p)
            entries.sort(key=lambda entry: entry[0])
        row = row.clone()
        for voted, entries in sure.items():
            for _, key, _ in entries:
                row[voted] += 2 * math.exp(-5 * (1 - float(f @ key)))
        for entries in unsure.values():
            for _, key, theirs in entries:
                row -= 0.5 * math.exp(-(1 - float(f @ key))) * ((theirs > 0.03) & (theirs < 1)).double()
        rows.append(row)
    torch.testing.assert_close(learner.classify(stream), torch.stack(rows), rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2])
def test_c_tpt(steps):
    """All of an image's tuning: what is chosen, both terms through the text tower, and AdamW's first steps."""
    learner = build("CTPT", weight=50.0, init="a photo", selection=0.3, steps=steps, lr=0.01)
    views = image_features(plain(), images(20, seed=6)).unflatten(0, (2, 10))
    for own, found in zip(views, learner.classify(views), strict=True):
        context = learner.vectors.detach().clone()
        first, second, chosen = torch.zeros_like(context), torch.zeros_like(context), None
        for step in range(1, steps + 1):
            context = context.requires_grad_()
            t = unit_rows(prompt_features(context))
            rows = logits_of(own, t)
            if chosen is None:
                chosen = sorted(range(10), key=lambda view, rows=rows: entropy(rows[view].softmax(0)))[:3]
            mean = rows[chosen].softmax(1).mean(0)
            spread = (t - t.mean(0)).norm(dim=1).mean()
            (g,) = torch.autograd.grad(-(mean * mean.log()).sum() - 50 * spread, context)
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            context = context.detach() * (1 - 0.01 * 0.01)
            context = context - 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        expected = logits_of(own[0], unit_rows(prompt_features(context)))
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-8)
        assert (found - logits_of(own[0], unit_rows(prompt_features(learner.vectors)))).abs().max() > 1e-4
