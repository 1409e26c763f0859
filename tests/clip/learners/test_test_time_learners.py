"""Learners that adapt while testing and without a text tower's gradient, against loops over images written out here."""

import functools
import math

import pytest
import torch
from clip_reference import NAMES, clip_model, image_features, images, plain_features, scaled, tokenizer

from visionpeft.clip.learners import TDA, ZeroShot
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.data.few_shot.definitions import few_shot_datasets
from visionpeft.errors import ConfigurationError

CLEAN = [name.replace("_", " ") for name in NAMES]


@functools.cache
def plain():
    """The CLIP of all tests here, which no learner changes; its scale is small, so that it is not always sure."""
    clip = clip_model()
    clip.logit_scale.data.fill_(math.log(10))
    return clip


@functools.cache
def texts():
    return plain_features(plain(), [f"a photo of a {name}." for name in CLEAN]).detach()


@functools.cache
def stream(count=40):
    """Unit features, each near what sets the text of one class apart."""
    generator = torch.Generator().manual_seed(0)
    apart = texts() - texts().mean(0)
    noise = torch.randn(count, 64, generator=generator, dtype=torch.float64) / 8
    features = (apart / apart.norm(dim=1, keepdim=True))[torch.arange(count) % 4] + noise
    return features / features.norm(dim=1, keepdim=True)


@functools.cache
def views(batch=3, count=20):
    return images(batch * count, seed=3).unflatten(0, (batch, count))


def entropy(p):
    return -sum(value * math.log(value) for value in p.tolist())


def zero_shot(f):
    return scaled(plain(), f, texts())


# TDA


def tda_by_hand(f, alpha=2.0, beta=5.0, window=(0.2, 0.5), selection=0.1):
    """Logits of each image of a stream, (count, features) or (count, views, features), with lists as caches."""
    sure, unsure, rows = {}, {}, []
    for own in f:
        own = own if own.ndim == 2 else own[None]
        logits = zero_shot(own)
        p = logits.softmax(1)
        best = sorted(range(len(own)), key=lambda view: entropy(p[view]))[: max(1, int(len(own) * selection))]
        feature, logits, p = own[best].mean(0), logits[best].mean(0), p[best].mean(0)
        label, uncertainty = int(logits.argmax()), entropy(p)

        def enter(cache, places, feature=feature, p=p, label=label, uncertainty=uncertainty):
            entries = cache.setdefault(label, [])
            if len(entries) < places:
                entries.append((uncertainty, feature, p))
            elif uncertainty < entries[-1][0]:
                entries[-1] = (uncertainty, feature, p)
            entries.sort(key=lambda entry: entry[0])

        enter(sure, 3)
        if window[0] < uncertainty / math.log2(len(NAMES)) < window[1]:
            enter(unsure, 2)
        row = logits.clone()
        for voted, entries in sure.items():
            for _, key, _ in entries:
                row[voted] += alpha * math.exp(-beta * (1 - float(feature @ key)))
        for entries in unsure.values():
            for _, key, theirs in entries:
                row -= 0.117 * math.exp(-(1 - float(feature @ key))) * ((theirs > 0.03) & (theirs < 1)).double()
        rows.append(row)
    assert max(map(len, sure.values())) == 3
    return torch.stack(rows), unsure


@pytest.mark.parametrize("window", [(0.2, 0.5), (0.02, 0.2)])
def test_tda_is_a_stream_in_the_order_of_the_images(window):
    learner = TDA(plain(), tokenizer(), NAMES, entropy_window=window)
    expected, unsure = tda_by_hand(stream(), window=window)
    assert unsure  # images have voted against classes
    found = torch.cat([learner.classify(part) for part in stream().split(7)])  # the state goes on over batches
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert learner.seen == 40
    assert (found - zero_shot(stream())).abs().max() > 0.5
    again = learner.classify(stream())  # it has seen them before
    assert (again - found).abs().max() > 0.1
    learner.reset()
    assert torch.equal(learner.classify(stream()), found)
    learner.reset()
    order = torch.arange(39, -1, -1)
    assert (learner.classify(stream()[order])[order] - found).abs().max() > 0.1
    filled = learner.positive_entropies.isfinite().sum(1)
    assert filled.max() == 3  # a cache has no further places
    kept = sorted(learner.positive_entropies[filled.argmax()].tolist())
    label = int(filled.argmax())
    p = zero_shot(stream()).softmax(1)
    of_class = sorted(entropy(row) for row in p if int(row.argmax()) == label)
    assert kept == pytest.approx(of_class[:3], abs=1e-12)


def test_the_first_image_votes_for_itself():
    learner = TDA(plain(), tokenizer(), NAMES, negative_alpha=0)
    first = stream()[:1]
    logits = zero_shot(first)
    expected = logits + 2 * torch.nn.functional.one_hot(logits.argmax(1), 4)
    torch.testing.assert_close(learner.classify(first), expected, rtol=0, atol=1e-11)
    off = TDA(plain(), tokenizer(), NAMES, alpha=0, negative_alpha=0)
    assert torch.equal(off.classify(stream()), ZeroShot(plain(), tokenizer(), NAMES).classify(stream()))


def test_tda_of_several_views():
    learner = TDA(plain(), tokenizer(), NAMES, selection=0.3)
    x = views(5, 10)
    f = image_features(plain(), x.flatten(0, 1)).unflatten(0, (5, 10))
    expected, _ = tda_by_hand(torch.cat((f, f, f)), selection=0.3)
    with torch.inference_mode():
        found = torch.cat([learner(x), learner(x), learner(x)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_tda_keeps_no_stream_where_it_is_saved_or_named_anew(tmp_path):
    learner = TDA(plain(), tokenizer(), NAMES, alpha=1.5)
    first = learner.classify(stream())
    save_learner(learner, tmp_path)
    loaded = load_learner(tmp_path, plain(), tokenizer())
    assert loaded.options == learner.options
    assert torch.equal(loaded.classify(stream()), first)
    learner.set_class_names(["heron", "passion flower"])
    assert learner.seen == 0
    fresh = TDA(plain(), tokenizer(), ["heron", "passion flower"], alpha=1.5)
    assert torch.equal(learner.classify(stream()), fresh.classify(stream()))


def test_values_of_a_data_set_are_taken_when_asked_for():
    published = {key: entry["published"] for key, entry in few_shot_datasets().items() if "published" in entry}
    assert len([key for key, values in published.items() if "tda" in values]) == 15
    learner = TDA(plain(), tokenizer(), NAMES)
    learner.set_published(published["imagenet_sketch"])
    assert (learner.alpha, learner.beta) == (2, 5)  # one pair for all
    learner = TDA(plain(), tokenizer(), NAMES, published=True, alpha=9)
    learner.set_published(published["imagenet_sketch"])
    assert (learner.alpha, learner.beta) == (9, 7.45)
    learner.set_published({})
    assert (learner.alpha, learner.beta) == (9, 5)


REFUSED = {
    "alpha": (lambda: TDA(plain(), tokenizer(), NAMES, alpha=-1), "must be numbers that are not negative"),
    "places": (lambda: TDA(plain(), tokenizer(), NAMES, capacity=0), "integers of at least 1, not 0 and 2"),
    "window": (lambda: TDA(plain(), tokenizer(), NAMES, entropy_window=(0.5, 0.2)), "the lower one first"),
    "share": (lambda: TDA(plain(), tokenizer(), NAMES, selection=0), "selection between 0 and 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_clear_sentence(case):
    act, message = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        act()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
