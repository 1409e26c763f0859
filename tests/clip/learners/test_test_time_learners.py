"""Learners that adapt while testing and without a text tower's gradient, against loops over images written out here."""

import functools
import math

import pytest
import torch
from clip_reference import NAMES, clip_model, image_features, images, plain_features, scaled, tokenizer

from visionpeft.clip.learners import CTPT, MTA, TDA, TPS, TPT, ZERO, DiffTPT, ZeroShot
from visionpeft.clip.learners.c_tpt import dispersion
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
    assert learner.num_seen == 40
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


def test_tda_may_be_cast_in_the_middle_of_a_stream():
    learner = TDA(clip_model(dtype=torch.float32), tokenizer(), NAMES)
    f = stream().float()
    expected = torch.cat([learner.classify(f), learner.classify(f)])
    learner.reset()
    found = torch.cat([learner.classify(f), learner.bfloat16().classify(f)])
    assert learner.num_seen == 80
    assert torch.equal(found[:40], expected[:40])
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_tda_keeps_no_stream_where_it_is_saved_or_named_anew(tmp_path):
    learner = TDA(plain(), tokenizer(), NAMES, alpha=1.5)
    first = learner.classify(stream())
    save_learner(learner, tmp_path)
    loaded = load_learner(tmp_path, plain(), tokenizer())
    assert loaded.options == learner.options
    assert torch.equal(loaded.classify(stream()), first)
    learner.set_class_names(["heron", "passion flower"])
    assert learner.num_seen == 0
    fresh = TDA(plain(), tokenizer(), ["heron", "passion flower"], alpha=1.5)
    assert torch.equal(learner.classify(stream()), fresh.classify(stream()))


def test_tda_forgets_what_it_has_seen_with_other_texts():
    learner, texture = TDA(plain(), tokenizer(), NAMES), "a texture of {}."
    first = learner.classify(stream())
    for refused in ("no slot", "texture " * 99 + "{}"):
        with pytest.raises(ConfigurationError):
            learner.set_template(refused)
    learner.set_template("a photo of a {}.")  # which it has already
    assert learner.num_seen == 40
    learner.set_template(texture)
    assert learner.num_seen == 0
    found = learner.classify(stream())
    assert torch.equal(found, TDA(plain(), tokenizer(), NAMES, template=texture).classify(stream()))
    assert (found - first).abs().max() > 0.1
    given = TDA(plain(), tokenizer(), NAMES, template="a photo of a {}.")
    given.classify(stream())
    given.set_template(texture)  # ignored, as it was given one
    assert given.num_seen == 40


def test_values_of_a_data_set_are_taken_when_asked_for(tmp_path):
    published = {key: entry["published"] for key, entry in few_shot_datasets().items() if "published" in entry}
    assert len([key for key, values in published.items() if "tda" in values]) == 15
    learner = TDA(plain(), tokenizer(), NAMES)
    learner.set_published(published["imagenet_sketch"])
    assert (learner.alpha, learner.beta) == (2, 5)  # one pair for all
    learner = TDA(plain(), tokenizer(), NAMES, published=True, alpha=9)
    learner.set_published(published["imagenet_sketch"])
    assert (learner.alpha, learner.beta) == (9, 7.45)
    save_learner(learner, tmp_path)
    again = load_learner(tmp_path, plain(), tokenizer())
    assert (again.alpha, again.beta) == (9, 7.45)  # also where no data set says them
    learner.set_published({})
    assert (learner.alpha, learner.beta) == (9, 5)


# Views of one image


@functools.cache
def of_views():
    """Unit features (images, views, features) of the views, near texts as those of the stream."""
    return torch.stack([stream()[i : i + 20] for i in (0, 3, 9, 14, 20)])


def lowest_entropies(own, share):
    """Views of one image, the most confident first, and how many are kept."""
    p = zero_shot(own).softmax(1)
    return sorted(range(len(own)), key=lambda view: entropy(p[view])), max(1, int(len(own) * share))


def zero_by_hand(own, share):
    """Votes of each class."""
    order, count = lowest_entropies(own, share)
    preferred = [int(zero_shot(own[view : view + 1]).argmax()) for view in order]
    votes = [preferred[:count].count(label) for label in range(4)]
    tied = [label for label in range(4) if votes[label] == max(votes)]
    if len(tied) > 1:
        others = [label for label in preferred[count:] if label in tied]
        first = zero_shot(own[order[count] : order[count] + 1])[0] if count < len(own) else None
        votes[others[0] if others else max(tied, key=lambda label: first[label])] += 1
    return votes


@pytest.mark.parametrize("share", [0.3, 0.2, 0.1])
def test_zero_counts_the_votes_of_confident_views(share):
    learner = ZERO(plain(), tokenizer(), NAMES, selection=share)
    for own, logits in zip(of_views(), learner.classify(of_views()), strict=True):
        votes = zero_by_hand(own, share)
        expected = torch.tensor(votes, dtype=torch.float64) / sum(votes)
        torch.testing.assert_close(logits.softmax(0), expected, rtol=0, atol=1e-12)
        assert logits.isfinite().all()


SURE = [[0, 8, 0, 0], [9, 0, 0, 0], [0.3, 0.1, 5, 0]]  # two views that are kept, and the surest of the others
TIES = {
    "a later view of class 0": ([*SURE, [1, 0, 0, 0.5]], [2, 1, 0, 0]),
    "a later view of class 1": ([*SURE, [0, 1, 0, 0.5]], [1, 2, 0, 0]),
    "no later view of either": ([*SURE, [0, 0, 0, 1]], [2, 1, 0, 0]),  # what the surest of the others says of the two
    "no tie": ([[0, 8, 0, 0], [0, 9, 0, 0], *SURE[2:], [1, 0, 0, 0.5]], [0, 2, 0, 0]),
}


@pytest.mark.parametrize("case", TIES)
def test_zero_breaks_ties_by_the_next_views(case, monkeypatch):
    views_of_case, votes = TIES[case]
    learner = ZERO(plain(), tokenizer(), NAMES, selection=0.5)
    order = torch.tensor([3, 0, 2, 1])  # in which the learner finds them is no matter
    logits = torch.tensor(views_of_case, dtype=torch.float64)[order][None]
    monkeypatch.setattr(learner, "logits", lambda features, texts: logits)
    found = learner.classify(of_views()[:1, :4])[0].softmax(0)
    torch.testing.assert_close(found, torch.tensor(votes, dtype=torch.float64) / sum(votes), rtol=0, atol=1e-12)


def test_classes_of_one_text_share_votes():
    twins = ZERO(plain(), tokenizer(), ["dog", "dog", "red kite"], selection=1.0, allow_duplicates=True)
    probabilities = twins.classify(texts()[None, :1].expand(1, 4, -1))[0].softmax(0)
    # Both have half a vote of each of the four views; the first view decides.
    torch.testing.assert_close(probabilities, torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64) / 5)


def test_zero_needs_one_pass_of_the_images_and_no_gradient(monkeypatch):
    learner = ZERO(plain(), tokenizer(), NAMES, num_views=5)
    learner.text_features()
    rows, texts_encoded = [], []
    encode, of_texts = learner.clip.encode_image, learner.text.encode
    monkeypatch.setattr(learner.clip, "encode_image", lambda x, **options: rows.append(len(x)) or encode(x, **options))
    learner.text.encode = lambda *args, **options: texts_encoded.append(1) or of_texts(*args, **options)
    with torch.enable_grad():
        logits = learner(images(3))
    assert (rows, texts_encoded) == ([15], [])
    assert not logits.requires_grad
    warmer = ZERO(plain(), tokenizer(), NAMES, selection=1.0)
    before = warmer.classify(of_views())
    monkeypatch.setattr(type(warmer), "scale", torch.tensor(77.0))
    assert torch.equal(warmer.classify(of_views()), before)  # all views vote, however sure they are


def mta_by_hand(own, agreement=4.0, temperature=0.2):
    """The mode of unit features (views, features), view by view."""
    count = len(own)
    p = zero_shot(own).softmax(1)
    squared = [[float((u - v).square().sum()) for v in own] for u in own]
    h = [sum(sorted(row)[1 : 1 + int(0.3 * (count - 1))]) / int(0.3 * (count - 1)) / 2 for row in squared]
    y, m = [1 / count] * count, own[0]

    def near():
        return [math.exp(-float((f - m).square().sum()) / (2 * width)) for f, width in zip(own, h, strict=True)]

    for _ in range(5):
        k = near()
        for _ in range(5):
            scores = [k[v] + agreement * sum(float(p[v] @ p[u]) * y[u] for u in range(count)) for v in range(count)]
            powers = [math.exp(score / temperature) for score in scores]
            y = [power / sum(powers) for power in powers]
        for _ in range(5):
            m = sum(weight * height * f for weight, height, f in zip(y, near(), own, strict=True))
            m = m / m.norm()
    return m


def test_mta_finds_the_mode_of_the_views():
    learner = MTA(plain(), tokenizer(), NAMES)
    found = learner.classify(of_views()[:2])
    expected = torch.stack([zero_shot(mta_by_hand(own)[None])[0] for own in of_views()[:2]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (found - zero_shot(of_views()[:2, 0])).abs().max() > 0.1
    order = [0, *range(19, 0, -1)]
    torch.testing.assert_close(learner.classify(of_views()[:2, order]), found, rtol=0, atol=1e-9)
    for equal in (of_views()[:, :1], of_views()[:, :1].expand(-1, 6, -1)):  # one view, and six that are equal
        torch.testing.assert_close(learner.classify(equal), zero_shot(of_views()[:, 0]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2])
def test_tps_shifts_the_texts_of_each_image(steps):
    learner = TPS(plain(), tokenizer(), NAMES, steps=steps, selection=0.3, lr=0.01)
    assert learner.num_tuned == 4 * 64
    with torch.inference_mode():
        found = learner.classify(of_views())
    for own, logits in zip(of_views(), found, strict=True):
        order, count = lowest_entropies(own, 0.3)
        x = torch.zeros(4, 64, dtype=torch.float64)
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        for step in range(1, steps + 1):
            x = x.detach().requires_grad_()
            rows = texts() + x
            rows = rows / rows.norm(dim=1, keepdim=True)
            mean = scaled(plain(), own[order[:count]], rows).softmax(1).mean(0)
            (g,) = torch.autograd.grad(-(mean * mean.log()).sum(), x)
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            x = x - 0.01 * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        rows = (texts() + x).detach()
        expected = scaled(plain(), own[:1], rows / rows.norm(dim=1, keepdim=True))[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-7)
    assert (found - zero_shot(of_views()[:, 0])).abs().max() > 0.1
    alone = torch.cat([learner.classify(own[None]) for own in of_views()])
    torch.testing.assert_close(alone, found, rtol=0, atol=1e-10)
    still = TPS(plain(), tokenizer(), NAMES, lr=0.0)
    torch.testing.assert_close(still.classify(of_views()), zero_shot(of_views()[:, 0]), rtol=0, atol=1e-10)


def test_the_first_step_of_tps_has_the_size_of_the_learning_rate():
    learner = TPS(plain(), tokenizer(), NAMES, lr=0.02)
    shift = learner.tune(of_views(), texts()).abs()
    torch.testing.assert_close(shift, torch.full_like(shift, 0.02), rtol=1e-2, atol=0)


def test_c_tpt_spreads_the_texts():
    features = of_views()[:2]
    tpt = TPT(plain(), tokenizer(), NAMES)
    assert torch.equal(CTPT(plain(), tokenizer(), NAMES, weight=0).classify(features), tpt.classify(features))
    learner = CTPT(plain(), tokenizer(), NAMES, weight=50)
    moved = torch.stack([row - texts().mean(0) for row in texts()]).square().sum(1).sqrt().mean()
    torch.testing.assert_close(dispersion(texts()), moved, rtol=0, atol=1e-12)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    torch.testing.assert_close(dispersion(texts() @ rotation), moved, rtol=0, atol=1e-12)
    assert dispersion(texts()[:1]) == 0
    # Steps alone are lr times a sign; what the weight does shows in the gradient with respect to the texts.
    rows = texts().clone().requires_grad_()
    (found,) = torch.autograd.grad(learner.objective(features, rows.expand(2, -1, -1)).sum(), rows)
    mean = scaled(plain(), features, rows).softmax(-1).mean(1)
    apart = (rows - rows.mean(0)).square().sum(1).sqrt().mean()
    (expected,) = torch.autograd.grad(-(mean * mean.log()).sum() - 2 * 50 * apart, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for weight, sign in ((0, None), (1e6, 1)):
        learner = CTPT(plain(), tokenizer(), NAMES, weight=weight)
        with torch.no_grad():
            spread = dispersion(
                torch.nn.functional.normalize(learner.encode(learner.layout, learner.tune(features)), dim=-1)
            )
        assert sign is None or (spread > dispersion(texts())).all()
    assert not torch.equal(learner.tune(features), tpt.tune(features))


@pytest.mark.parametrize("similarity", [0.8, 0.3, 0.0])
def test_diff_tpt_leaves_out_views_that_stray(similarity):
    learner = DiffTPT(plain(), tokenizer(), NAMES, similarity=similarity)
    features = image_features(plain(), views(2, 21).flatten(0, 1)).unflatten(0, (2, 21))
    logits = zero_shot(features)
    found = learner.choose_views(features, logits)
    for own, rows, chosen in zip(features, logits, found, strict=True):
        cosines = [float(row @ rows[0] / (row.norm() * rows[0].norm())) for row in rows]
        alike = sorted(range(1, 21), key=lambda view: -cosines[view])[: int(20 * similarity)]
        kept = [0, *alike]
        sure = sorted(kept, key=lambda view: entropy(rows[view].softmax(0)))[: max(1, int(len(kept) * 0.3))]
        assert torch.equal(chosen, own[sure])
    other = TPT(plain(), tokenizer(), NAMES, selection=0.3).choose_views(features, logits)
    assert other.shape != found.shape or not torch.equal(other, found)  # likeness decides


def test_a_bias_equal_for_all_classes_leaves_diff_tpt_its_views():
    features = image_features(plain(), views(2, 21).flatten(0, 1)).unflatten(0, (2, 21))
    expected = DiffTPT(plain(), tokenizer(), NAMES, similarity=0.3).choose_views(features, zero_shot(features))
    clip = clip_model()
    clip.logit_scale.data.fill_(math.log(10))
    clip.logit_bias = torch.nn.Parameter(torch.tensor(-10.0, dtype=torch.float64))
    learner = DiffTPT(clip, tokenizer(), NAMES, similarity=0.3)
    logits = learner.logits(features, texts())
    torch.testing.assert_close(logits, zero_shot(features) - 10)
    assert torch.equal(learner.choose_views(features, logits), expected)
    other = logits - logits.new_tensor([0, 0, 5, 0])  # which is not equal for all
    assert not torch.equal(learner.choose_views(features, other), expected)


def test_diff_tpt_that_keeps_all_is_tpt():
    features = image_features(plain(), views().flatten(0, 1)).unflatten(0, (3, 20))
    learner = DiffTPT(plain(), tokenizer(), NAMES, similarity=1.0, selection=0.1, steps=2)
    assert torch.equal(learner.tune(features), TPT(plain(), tokenizer(), NAMES, steps=2).tune(features))
    assert DiffTPT(plain(), tokenizer(), NAMES).steps == 4


@pytest.mark.parametrize("make", [ZERO, MTA, TPS, CTPT, DiffTPT])
def test_what_sees_views_is_saved_and_named_anew(make, tmp_path):
    learner = make(plain(), tokenizer(), NAMES, num_views=4)
    assert learner.trainable_parameters() == []
    with pytest.raises(ConfigurationError, match="several views"):
        learner.classify(stream())
    x = views(2, 4)
    save_learner(learner, tmp_path)
    loaded = load_learner(tmp_path, plain(), tokenizer())
    assert loaded.options == learner.options
    with torch.inference_mode():
        assert torch.equal(loaded(x), learner(x))
    learner.set_class_names(["heron", "passion flower"])
    assert torch.equal(learner(x), make(plain(), tokenizer(), ["heron", "passion flower"], num_views=4)(x))
    torch.manual_seed(0)
    assert learner(images(2)).shape == (2, 2)


REFUSED = {
    "alpha": (lambda: TDA(plain(), tokenizer(), NAMES, alpha=-1), "must be numbers that are not negative"),
    "places": (lambda: TDA(plain(), tokenizer(), NAMES, capacity=0), "integers of at least 1, not 0 and 2"),
    "window": (lambda: TDA(plain(), tokenizer(), NAMES, entropy_window=(0.5, 0.2)), "the lower one first"),
    "views": (lambda: ZERO(plain(), tokenizer(), NAMES, num_views=1.5), "num_views must be an integer, not 1.5"),
    "temperature": (lambda: MTA(plain(), tokenizer(), NAMES, temperature=0), "temperature must be positive"),
    "steps": (lambda: TPS(plain(), tokenizer(), NAMES, steps=0), "steps must be an integer of at least 1"),
    "weight": (lambda: CTPT(plain(), tokenizer(), NAMES, weight=math.nan), "weight must be a number, not nan"),
    "similarity": (lambda: DiffTPT(plain(), tokenizer(), NAMES, similarity=1.5), "a share between 0 and 1, but is 1.5"),
    "share": (lambda: TDA(plain(), tokenizer(), NAMES, selection=0), "selection between 0 and 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_clear_sentence(case):
    act, message = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        act()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
