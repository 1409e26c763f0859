"""Several prompts for each class: PLOT and ProDA, by float64 formulas written out here."""

import functools
from decimal import Decimal

import pytest
import torch
from clip_reference import (
    NAMES,
    RESNET,
    TEXT,
    clip_model,
    cross_entropy,
    image_features,
    images,
    lively_,
    lively_clip,
    prompt_features,
    raw_text_feature,
    text_feature,
    tokenizer,
    transport_plan,
)
from open_clip import CLIP

from visionpeft.clip.learners import PLOT, ProDA
from visionpeft.clip.learners.plot import transport
from visionpeft.clip.local_features import with_local_features
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError, UnsupportedError

LABELS = torch.tensor([0, 2, 3])


@functools.cache
def plain():
    """The CLIP of all tests here, which no learner changes."""
    return clip_model()


def unit_rows(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def parts_by_hand(clip):
    """Features (batch, patches, e) of patches: the last tokens of the ViT through its last norm and projection."""
    seen = []
    visual = clip.visual
    hook = visual.transformer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        clip.encode_image(images())
        hook.remove()
        return visual.ln_post(seen[0])[:, 1:] @ visual.proj


@pytest.mark.parametrize("pooled", [False, True])
def test_plot_is_the_formula(pooled, tmp_path):
    torch.manual_seed(0)
    learner = PLOT(plain(), tokenizer(), NAMES, num_contexts=3, context_length=4, pooled=pooled)
    assert sum(p.numel() for p in learner.trainable_parameters()) == 3 * 4 * 32
    lively_(learner)
    f = unit_rows(parts_by_hand(plain()))
    t = torch.stack([prompt_features(plain(), NAMES, context) for context in learner.vectors])  # contexts, classes, e
    scale = plain().logit_scale.detach().exp()
    rows = []
    for own in f:
        similarities = [own @ t[:, k].T for k in range(4)]
        rows.append(torch.stack([scale * (transport_plan(s.detach()) * s).sum() for s in similarities]))
    expected = torch.stack(rows)
    if pooled:
        raw = learner.encode(learner.layout, learner.context())  # its directions are checked above
        torch.testing.assert_close(unit_rows(raw), t, rtol=0, atol=1e-10)
        expected = expected + scale * image_features(plain(), images()) @ unit_rows(raw.mean(0)).T
    loss, logits = learner.loss(images(), LABELS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    (found,) = torch.autograd.grad(loss, learner.vectors)
    (wanted,) = torch.autograd.grad(cross_entropy(expected, LABELS), learner.vectors)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    learner.eval()
    with torch.no_grad():
        alone = torch.cat([learner(images()[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(alone, learner(images()), rtol=0, atol=1e-11)
        save_learner(learner, tmp_path)
        loaded = load_learner(tmp_path, clip_model(), tokenizer(), ["heron", "passion flower"])
        learner.set_class_names(["heron", "passion flower"])
        assert torch.equal(loaded(images()), learner(images()))


def test_transport_has_the_marginals_it_is_given():
    s = torch.rand(5, 3, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = transport(s, 0.1)
    torch.testing.assert_close(plan.sum(-2), torch.full((5, 3, 4), 1 / 4, dtype=torch.float64))
    assert ((plan.sum(-1) - 1 / 9).abs().amax() < 0.05) & ((plan.sum(-1) - 1 / 9).abs().amax() > 1e-9)
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(transport(s[..., order], 0.1), plan[..., order])
    # One context: every part has the same share. One part: every context.
    torch.testing.assert_close(transport(s[..., :1], 0.1), torch.full_like(s[..., :1], 1 / 9))
    torch.testing.assert_close(transport(s[..., :1, :], 0.1), torch.full_like(s[..., :1, :], 1 / 4))


def plan_in_decimals(s, epsilon):
    """The plan of one image and class with numbers of any size."""
    parts, contexts = s.shape
    k = [[((Decimal(value) - 1) / Decimal(epsilon)).exp() for value in row] for row in s.tolist()]
    r, c = [Decimal(1)] * parts, [Decimal(1)] * contexts
    for _ in range(100):
        before, r = r, [1 / sum(map(Decimal.__mul__, row, c)) / parts for row in k]
        c = [1 / sum(map(Decimal.__mul__, column, r)) / contexts for column in zip(*k, strict=True)]
        if sum(abs(new - old) for new, old in zip(r, before, strict=True)) / parts < Decimal("0.01"):
            break
    return torch.tensor([[float(a * v * b) for v, b in zip(row, c, strict=True)] for a, row in zip(r, k, strict=True)])


@pytest.mark.parametrize("epsilon", [0.1, 0.01, 0.001])
def test_transport_has_no_epsilon_too_small_for_its_numbers(epsilon):
    """exp(-1 / 0.01) is below the numbers of float32, and exp(-1 / 0.001) below those of float64."""
    s = 0.3 * torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([plan_in_decimals(own, epsilon) for own in s]).double()
    torch.testing.assert_close(transport(s, epsilon), expected, rtol=0, atol=1e-7)  # those are read in float32
    torch.testing.assert_close(transport(s.float(), epsilon), expected.float(), rtol=0, atol=1e-4)
    assert (transport(s, 0.2) - expected).abs().max() > 1e-2


def test_plot_learns_with_a_small_epsilon():
    def learnt(dtype):
        learner = PLOT(clip_model(dtype=dtype), tokenizer(), NAMES, context_length=4, epsilon=0.003)
        learner.vectors.data.zero_()
        lively_(learner)
        loss, logits = learner.loss(images(dtype=dtype), LABELS)
        return logits.detach(), torch.autograd.grad(loss, learner.vectors)[0]

    for found, wanted in zip(learnt(torch.float32), learnt(torch.float64), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())


def resnet_of_four_places():
    """A ResNet whose last grid has 2 x 2 places, for images of 64 pixels, with lively weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lively_clip(CLIP(64, RESNET | {"image_size": 64}, TEXT)).double()


def attention_pool_by_hand(pool, grid):
    """What every place, and their mean before them, gives (batch, 1 + places, e) of a grid (batch, D, 2, 2)."""
    x = torch.stack([grid[:, :, i, j] for i in range(2) for j in range(2)], 1)
    x = torch.cat((x.mean(1, keepdim=True), x), 1) + pool.positional_embedding
    q, k, v = (x @ part.weight.T + part.bias for part in (pool.q_proj, pool.k_proj, pool.v_proj))
    size = x.shape[2] // pool.num_heads
    heads = []
    for i in range(pool.num_heads):
        part = slice(i * size, (i + 1) * size)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / size**0.5, -1)
        heads.append(weights @ v[..., part])
    return torch.cat(heads, -1) @ pool.c_proj.weight.T + pool.c_proj.bias


def test_plot_matches_the_places_of_a_resnet_that_its_attention_pool_gives():
    """As published: all outputs of the pool, of which the first is the image's own and no part."""
    clip = resnet_of_four_places()
    visual, pictures = clip.visual, images(size=64)
    with torch.no_grad():
        grid = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pictures)))))
        outputs = attention_pool_by_hand(visual.attnpool, grid)
        torch.testing.assert_close(outputs[:, 0], clip.encode_image(pictures), rtol=0, atol=1e-10)
        torch.testing.assert_close(with_local_features(clip, pictures), outputs, rtol=0, atol=1e-10)
    assert outputs.shape == (3, 5, 64)
    torch.manual_seed(0)
    learner = lively_(PLOT(clip, tokenizer(), NAMES, num_contexts=2, context_length=4, pooled=True))
    whole, f = unit_rows(outputs[:, 0]), unit_rows(outputs[:, 1:])
    raw = torch.stack([prompt_features(clip, NAMES, context, feature=raw_text_feature) for context in learner.vectors])
    t, scale = unit_rows(raw), clip.logit_scale.detach().exp()
    matched = [[(transport_plan((s := own @ t[:, k].T).detach()) * s).sum() for k in range(4)] for own in f]
    expected = scale * (torch.stack([torch.stack(row) for row in matched]) + whole @ unit_rows(raw.mean(0)).T)
    loss, logits = learner.loss(pictures, LABELS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    (found,) = torch.autograd.grad(loss, learner.vectors)
    (wanted,) = torch.autograd.grad(cross_entropy(expected, LABELS), learner.vectors)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    kept, _ = learner.loss(None, LABELS, learner.image_features(pictures))
    torch.testing.assert_close(kept, loss, rtol=0, atol=1e-12)


def small_proda():
    torch.manual_seed(0)
    return lively_(ProDA(plain(), tokenizer(), NAMES, num_contexts=8, context_length=4, contexts_per_step=4))


def proda_by_hand(t, f, labels, nameless, weight=0.1):
    """Loss and logits from text features (contexts, classes, e), with every covariance written out."""
    count = len(t)
    scale = plain().logit_scale.detach().exp()
    mean = t.mean(0)
    s = torch.einsum("nkd,njd->kjd", t - mean, t - mean) / (count + 1)
    logits, rows = scale * f @ mean.T, []
    for own, y in zip(f, labels, strict=True):
        spread = [(own**2 * (s[y, y] + s[k, k] - 2 * s[y, k])).sum() for k in range(4)]
        rows.append(scale * mean @ own + scale**2 / 2 * torch.stack(spread))
    upper = torch.stack(rows)
    pairs = [(nameless[i] @ nameless[j]).abs() for i in range(count) for j in range(count) if i != j]
    assert ((upper - logits) > -1e-9).all()
    assert (upper - logits)[range(3), labels].abs().max() < 1e-9
    assert (upper - logits).max() > 0.1
    return cross_entropy(upper, labels) + weight * sum(pairs) / len(pairs), logits


def nameless_by_hand(contexts):
    """Unit features (contexts, e) of texts that are a context and a full stop."""
    clip, rows = plain(), []
    for context in contexts:
        start, stop, end = (clip.token_embedding.weight[[index]] for index in (49406, 269, 49407))
        padding = clip.token_embedding.weight[[0]].expand(77 - 3 - len(context), -1)
        rows.append(text_feature(clip, torch.cat((start, context, stop, end, padding)), 2 + len(context)))
    return torch.stack(rows)


@pytest.mark.parametrize("training", [False, True])
def test_proda_is_the_formula(training, tmp_path):
    learner = small_proda().train(training)
    assert sum(p.numel() for p in learner.trainable_parameters()) == 8 * 4 * 32
    places = ("front",) * 2 + ("middle",) * 2 + ("end",) * 4
    chosen = range(8)
    if training:
        torch.manual_seed(5)
        chosen = learner.draw().tolist()
        assert [places[i] for i in chosen] == ["front", "middle", "end", "end"]
        assert len(set(chosen)) == 4
        torch.manual_seed(5)
    t = torch.stack([prompt_features(plain(), NAMES, learner.vectors[i], places[i]) for i in chosen])
    f = image_features(plain(), images())
    expected, expected_logits = proda_by_hand(t, f, LABELS, nameless_by_hand(learner.vectors[list(chosen)]))
    loss, logits = learner.loss(images(), LABELS)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-9)
    (found,) = torch.autograd.grad(loss, learner.vectors)
    (wanted,) = torch.autograd.grad(expected, learner.vectors)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)
    if training:
        return
    with torch.no_grad():
        torch.testing.assert_close(learner(images()), expected_logits.detach(), rtol=0, atol=1e-9)
        save_learner(learner, tmp_path)
        loaded = load_learner(tmp_path, clip_model(), tokenizer(), ["heron", "passion flower"])
        learner.set_class_names(["heron", "passion flower"])
        assert torch.equal(loaded(images()), learner(images()))


def test_the_loss_of_proda_bounds_the_mean_over_gaussian_classifiers():
    """Classifiers w = m + sum_n z_n (t_n - m) / sqrt(contexts + 1), z normal, have just these means and covariances."""
    learner = small_proda().eval()
    with torch.no_grad():
        t, f = learner.features_of(), image_features(plain(), images())
        learner.orthogonality = 0
        bound, _ = learner.loss(images(), LABELS)
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(4000, 8, generator=generator, dtype=torch.float64) / 3
        drawn = t.mean(0) + torch.einsum("sn,nkd->skd", z, t - t.mean(0))
        logits = plain().logit_scale.exp() * torch.einsum("bd,skd->sbk", f, drawn)
        mean = torch.stack([cross_entropy(each, LABELS) for each in logits]).mean()
        assert cross_entropy(plain().logit_scale.exp() * f @ t.mean(0).T, LABELS) < mean < bound


REFUSED = {
    "three contexts": (lambda: ProDA(plain(), tokenizer(), NAMES, num_contexts=3), "must be multiples of 4"),
    "weight": (lambda: ProDA(plain(), tokenizer(), NAMES, orthogonality=-1), "orthogonality must be a number"),
    "no contexts": (lambda: PLOT(plain(), tokenizer(), NAMES, num_contexts=0), "integer of at least 1"),
    "epsilon": (lambda: PLOT(plain(), tokenizer(), NAMES, epsilon=0), "epsilon positive"),
    "no parts": (lambda: PLOT(plain(), tokenizer(), NAMES).classify(torch.ones(2, 64)), "parts of an image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_clear_sentence(case):
    act, message = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        act()
    assert message in str(caught.value)


def test_a_tower_that_pools_by_attention_is_refused(monkeypatch):
    clip = clip_model()
    monkeypatch.setattr(clip.visual, "pool_type", "none")
    with pytest.raises(UnsupportedError, match="local image features need"):
        PLOT(clip, tokenizer(), NAMES)
