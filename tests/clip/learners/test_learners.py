"""Learners against float64 formulas written out here, the exact fast text path, precision, caches and refusals."""

import copy
import functools
import inspect
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_reference import (
    NAMES,
    WordTokenizer,
    clip_model,
    cross_entropy,
    image_features,
    images,
    lively_,
    mlp,
    plain_features,
    prompt_features,
    relative,
    scaled,
    tokenizer,
)
from open_clip import CLIP
from open_clip.model import convert_weights_to_lp

import visionpeft as vp
from visionpeft.clip import packing
from visionpeft.clip.gradients import gradients_of
from visionpeft.clip.learners import (
    CLAP,
    DAPT,
    IVLP,
    PLOT,
    RPO,
    TCP,
    TPT,
    CLIPAdapter,
    CLIPLinearProbe,
    CLIPLoRA,
    CoCoOp,
    CoOp,
    DePT,
    KgCoOp,
    PLOTPlusPlus,
    ProDA,
    ProGrad,
    PromptSRC,
    ProVP,
    TaskRes,
    TipAdapter,
    TwoStageFewShot,
    ZeroShot,
    prograd,
)
from visionpeft.clip.learners.tip_adapter import grid
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.data.few_shot.definitions import few_shot_datasets
from visionpeft.errors import ConfigurationError, StorageError, UnsupportedError
from visionpeft.models.create_clip import create_clip

LABELS = torch.tensor([0, 2, 3])
CLEAN = [name.replace("_", " ") for name in NAMES]
POSITIONS = ("end", "middle", "front")
ON_TEXT = {
    "coop": functools.partial(CoOp, context_length=5),
    "coop_middle": functools.partial(CoOp, context_length=5, position="middle"),
    "coop_front": functools.partial(CoOp, context_length=5, position="front"),
    "coop_specific": functools.partial(CoOp, context_length=3, class_specific=True),
    "coop_specific_middle": functools.partial(CoOp, context_length=3, class_specific=True, position="middle"),
    "cocoop": CoCoOp,
    "kgcoop": KgCoOp,
    "kgcoop_front": functools.partial(KgCoOp, position="front"),
    "prograd": functools.partial(ProGrad, context_length=6),
    "prograd_middle": functools.partial(ProGrad, context_length=6, position="middle"),
}
ON_IMAGES = {
    "zero_shot": ZeroShot,
    "clip_adapter": CLIPAdapter,
    "tip": TipAdapter,
    "tip_f": functools.partial(TipAdapter, train_keys=True),
    "linear_probe": CLIPLinearProbe,
    "linear_probe_gradient": functools.partial(CLIPLinearProbe, solver="gradient"),
}


def build(name, clip=None, **options):
    """A learner on four classes, with what it has to be fitted on, moved off its start."""
    make = (ON_TEXT | ON_IMAGES)[name]
    clip = clip_model() if clip is None else clip
    torch.manual_seed(3)
    learner = make(clip, tokenizer(), NAMES, **options)
    if name.startswith(("tip", "linear")):
        features = learner.image_features(images(8, seed=4))
        learner.fit_features((features, torch.arange(8) % 4))
    return lively_(learner)


def gradients(loss, learner):
    """Gradients of what is trained, by one backward pass."""
    learner.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in learner.trainable_parameters()]


# Formulas


def expected_coop(learner, f, labels, position="end"):
    texts = prompt_features(learner.clip, NAMES, learner.vectors, position)
    logits = scaled(learner.clip, f, texts)
    return cross_entropy(logits, labels), logits


def expected_kgcoop(learner, f, labels, position="end"):
    loss, logits = expected_coop(learner, f, labels, position)
    texts = prompt_features(learner.clip, NAMES, learner.vectors, position)
    taught = plain_features(learner.clip, [f"a photo of a {name}." for name in CLEAN])
    distances = (texts - taught).square().sum(1)  # 2 (1 - cos) of unit vectors
    return loss + 8.0 * distances.mean() / 2, logits


def expected_cocoop(learner, f, labels):
    layers = [(learner.meta_net[i].weight, learner.meta_net[i].bias) for i in (0, 2)]
    rows = []
    for feature in f:
        texts = prompt_features(learner.clip, NAMES, learner.vectors + mlp(layers, feature))
        rows.append(scaled(learner.clip, feature[None], texts)[0])
    return cross_entropy(torch.stack(rows), labels), torch.stack(rows)


EXPECTED = {
    "coop": expected_coop,
    "coop_middle": functools.partial(expected_coop, position="middle"),
    "coop_front": functools.partial(expected_coop, position="front"),
    "coop_specific": expected_coop,
    "coop_specific_middle": functools.partial(expected_coop, position="middle"),
    "cocoop": expected_cocoop,
    "kgcoop": expected_kgcoop,
    "kgcoop_front": functools.partial(expected_kgcoop, position="front"),
}


@pytest.mark.parametrize("kind", ["plain", "quick"])
@pytest.mark.parametrize("name", EXPECTED)
def test_logits_loss_and_gradients_are_the_formula(name, kind):
    learner = build(name, clip_model(kind))
    x, f = images(), image_features(learner.clip, images())
    loss, logits = learner.loss(x, LABELS)
    expected_loss, expected_logits = EXPECTED[name](learner, f, LABELS)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(learner(x), expected_logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-10)
    for actual, expected in zip(gradients(loss, learner), gradients(expected_loss, learner), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    from_features = learner.loss(None, LABELS, features=f)
    torch.testing.assert_close(from_features[0], loss, rtol=0, atol=1e-12)


def test_numbers_of_numpy_are_those_of_python(tmp_path):
    """They are in the saved options, as JSON."""
    learner = KgCoOp(clip_model(), tokenizer(), np.array(NAMES), weight=np.float32(0.5), context_length=np.int64(2))
    assert (learner.options["weight"], learner.options["context_length"]) == (0.5, 2)
    assert [type(learner.options[name]) for name in ("weight", "context_length")] == [float, int]
    save_learner(learner, tmp_path)
    assert load_learner(tmp_path, clip_model(), tokenizer()).options == learner.options


@pytest.mark.parametrize("template", ["a photo of a {}.", ["a photo of a {}.", "{} texture.", "art of the {}"]])
def test_zero_shot_is_the_formula(template):
    learner = ZeroShot(clip_model(), tokenizer(), NAMES, template=template)
    templates = [template] if isinstance(template, str) else template
    each = [plain_features(learner.clip, [t.format(name) for name in CLEAN]) for t in templates]
    mean = sum(each) / len(each)
    expected = mean / mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(learner.text_features(), expected, rtol=0, atol=1e-11)
    f = image_features(learner.clip, images())
    torch.testing.assert_close(learner(images()), scaled(learner.clip, f, expected), rtol=0, atol=1e-10)
    assert learner.trainable_parameters() == []


def test_clip_adapter_acts_on_unnormalised_features():
    learner = build("clip_adapter")
    f = learner.clip.encode_image(images())
    assert f.norm(dim=1).min() > 2 or f.norm(dim=1).max() < 0.5  # far from unit length
    w1, w2 = learner.adapter[0].weight, learner.adapter[2].weight
    adapted = 0.2 * F.relu(F.relu(f @ w1.T) @ w2.T) + 0.8 * f
    texts = plain_features(learner.clip, [f"a photo of a {name}." for name in CLEAN])
    expected = scaled(learner.clip, adapted / adapted.norm(dim=1, keepdim=True), texts)
    torch.testing.assert_close(learner(images()), expected, rtol=0, atol=1e-10)
    loss, _ = learner.loss(images(), LABELS)
    for actual, wanted in zip(
        gradients(loss, learner), gradients(cross_entropy(expected, LABELS), learner), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("name", ["tip", "tip_f"])
def test_tip_adapter_is_the_formula(name, views):
    learner = (ON_IMAGES[name])(clip_model(), tokenizer(), NAMES, alpha=1.7, beta=3.5)
    train = image_features(learner.clip, images(10, seed=8))
    train = train * torch.linspace(1, 7, 10, dtype=torch.float64)[:, None]  # as the tower gives them: of any length
    labels = torch.tensor([0, 1, 2, 3, 0])
    cached = train.reshape(5, 2, -1).mean(1) if views else train[:5]
    cached = cached / cached.norm(dim=1, keepdim=True)
    of_units = (train / train.norm(dim=1, keepdim=True)).reshape(5, 2, -1).mean(1)
    assert not views or (of_units / of_units.norm(dim=1, keepdim=True) - cached).abs().max() > 0.01
    assert learner.fit_features((train.reshape(5, 2, -1) if views else train[:5], labels)) == {}
    f = image_features(learner.clip, images())
    texts = plain_features(learner.clip, [f"a photo of a {name}." for name in CLEAN])
    one_hot = torch.eye(4, dtype=torch.float64)[labels]
    keys = learner.keys
    torch.testing.assert_close(keys.detach(), cached, rtol=0, atol=1e-12)
    expected = scaled(learner.clip, f, texts) + 1.7 * (-3.5 * (1 - f @ keys.T)).exp() @ one_hot
    torch.testing.assert_close(learner(images()), expected, rtol=0, atol=1e-10)
    if name == "tip":
        assert learner.trainable_parameters() == []
        return
    (trained,) = learner.trainable_parameters()
    assert trained.numel() == 5 * 64
    (actual,) = gradients(learner.loss(images(), LABELS)[0], learner)
    (wanted,) = gradients(cross_entropy(expected, LABELS), learner)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train_keys", [False, True])
def test_tip_adapter_may_be_cast_after_its_cache_is_filled(half, train_keys):
    learner = TipAdapter(clip_model(dtype=torch.float32), tokenizer(), NAMES, train_keys=train_keys)
    features, labels = learner.image_features(images(8, torch.float32, seed=4)), torch.arange(8) % 4
    learner.fit_features((features, labels), (features, labels))
    chosen = learner.choose()
    expected = learner.classify(features).detach()
    learner.to(half)
    learner._kept.clear()
    with torch.no_grad():
        found = learner.classify(features)
        # What is off is the texts' and the votes' rounding, and no more.
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
        assert learner(images(2, half)).isfinite().all()
        again = learner.choose()
    assert again.keys() == chosen.keys()
    assert not train_keys or abs(again["validation_accuracy"] - chosen["validation_accuracy"]) <= 0.25


@pytest.mark.parametrize("train_keys", [False, True])
def test_tip_adapter_chooses_on_validation_alone(train_keys):
    learner = TipAdapter(clip_model(), tokenizer(), NAMES, train_keys=train_keys, max_alpha=12, max_beta=9)
    train, validation = (image_features(learner.clip, images(n, seed=n)) for n in (12, 40))
    labels, others = torch.arange(12) % 4, torch.arange(40) % 4
    chosen = learner.fit_features((train, labels), (validation, others))
    if train_keys:
        assert chosen == {}
        assert (learner.alpha.item(), learner.beta.item()) == (1.17, 1)  # ImageNet's
        learner.keys.data.mul_(1.1)
        chosen = learner.end_training()
    else:
        assert learner.end_training() == {}
    zero_shot = scaled(learner.clip, validation, plain_features(learner.clip, [f"a photo of a {n}." for n in CLEAN]))

    def accuracy(alpha, beta):
        votes = (-beta * (1 - validation @ learner.keys.detach().T)).exp() @ torch.eye(4, dtype=torch.float64)[labels]
        return ((zero_shot + alpha * votes).argmax(1) == others).double().mean().item()

    betas = [0.1 + i * (9 - 0.1) / 200 for i in range(200)]
    alphas = [0.1 + i * (12 - 0.1) / 20 for i in range(20)]
    searched = {(a, b): accuracy(a, b) for b in betas for a in alphas}
    best = max(searched.values())
    assert best > min(searched.values())
    alpha, beta = next(pair for pair, reached in searched.items() if reached == best)  # the first of equals
    assert (learner.alpha.item(), learner.beta.item()) == (alpha, beta)
    assert chosen == {"alpha": alpha, "beta": beta, "validation_accuracy": best}


def test_tip_adapter_searches_the_published_values():
    betas, alphas = grid(7, 200), grid(3, 20)
    assert (len(betas), betas[0], round(betas[-1], 4)) == (200, 0.1, 6.9655)  # published; not 7
    assert (len(alphas), alphas[0], round(alphas[-1], 4)) == (20, 0.1, 2.855)
    steps = torch.tensor(betas, dtype=torch.float64).diff()
    torch.testing.assert_close(steps, torch.full((199,), 6.9 / 200, dtype=torch.float64), rtol=0, atol=1e-12)
    # With the end, as this was once done, the values are others.
    assert torch.linspace(0.1, 7, 200)[-1] == 7


OF_TIP_ADAPTER = {  # initial alpha, ends of the search for beta and alpha, by the authors' configurations
    **{"imagenet": (1.17, 7, 3), "oxford_pets": (1.17, 7, 3), "food101": (1.17, 10, 10), "sun397": (1.17, 12, 10)},
    **{"dtd": (2, 13, 13), "eurosat": (2, 12, 10), "caltech101": (3, 12, 5), "stanford_cars": (3, 20, 10)},
    **{"ucf101": (3, 7, 3), "fgvc_aircraft": (5, 30, 30), "oxford_flowers": (10, 50, 50)},
}


def test_tip_adapter_takes_the_values_of_the_data_set():
    published = {key: entry.get("published", {}) for key, entry in few_shot_datasets().items()}
    published = {key: values for key, values in published.items() if "tip_adapter" in values}
    assert published.keys() == OF_TIP_ADAPTER.keys()
    for key, (alpha, max_beta, max_alpha) in OF_TIP_ADAPTER.items():
        learner = TipAdapter(clip_model(), tokenizer(), NAMES)
        learner.set_published(published[key])
        values = (learner.alpha.item(), learner.beta.item(), learner.max_beta, learner.max_alpha)
        assert values == (alpha, 1, max_beta, max_alpha)
    learner = TipAdapter(clip_model(), tokenizer(), NAMES, alpha=1.5, max_beta=9)
    learner.set_published(published["dtd"])
    assert (learner.alpha.item(), learner.max_beta, learner.max_alpha) == (1.5, 9, 13)  # what was given stays
    learner = TipAdapter(clip_model(), tokenizer(), NAMES)
    learner.fit_features((image_features(learner.clip, images(4)), torch.arange(4)))
    learner.set_published(published["dtd"])
    assert learner.alpha.item() == 1.17  # what was chosen for a cache stays
    learner.set_published({})
    assert learner.max_alpha == 3


def test_linear_probe_solves_logistic_regression():
    clip = clip_model()
    learner = CLIPLinearProbe(clip, tokenizer(), NAMES, inverse_strength=7.0)
    f, labels = image_features(clip, images(30, seed=2)), torch.arange(30) % 4
    assert learner.fit_features((f, labels)) == {"inverse_strength": 7.0}
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in (learner.weight, learner.bias))
    objective = 7.0 * 30 * cross_entropy(f @ weight.T + bias, labels) + weight.square().sum() / 2
    objective.backward()
    # the objective is convex: where its gradient vanishes is the solution
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4
    assert weight.abs().max() > 0.1
    g = image_features(clip, images())
    torch.testing.assert_close(learner(images()), (g @ weight.T + bias).detach(), rtol=0, atol=1e-12)
    with pytest.raises(UnsupportedError, match="no text features"):
        learner.text_features()


def test_linear_probe_chooses_on_validation_alone():
    clip = clip_model()
    f, labels = image_features(clip, images(24, seed=2)), torch.arange(24) % 4
    v, others = image_features(clip, images(60, seed=6)), torch.arange(60) % 4
    learner = CLIPLinearProbe(clip, tokenizer(), NAMES)
    chosen = learner.fit_features((f, labels), (v, others))
    predicted = learner.classify(v).argmax(1)
    assert chosen["validation_accuracy"] == (predicted == others).double().mean().item()
    for strength in (1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6):
        fixed = CLIPLinearProbe(clip, tokenizer(), NAMES, inverse_strength=strength)
        fixed.fit_features((f, labels))
        logits, own = fixed.classify(v), learner.classify(v)
        reached = (logits.argmax(1) == others).double().mean().item()
        assert reached <= chosen["validation_accuracy"]
        if reached == chosen["validation_accuracy"]:
            assert cross_entropy(own, others) <= cross_entropy(logits, others) + 1e-6


def test_linear_probe_counts_every_view_as_an_image():
    clip = clip_model()
    f, labels = image_features(clip, images(24, seed=2)), torch.arange(12) % 4
    by_view, flat = (CLIPLinearProbe(clip, tokenizer(), NAMES) for _ in range(2))
    by_view.fit_features((f.unflatten(0, (12, 2)), labels))
    flat.fit_features((f, labels.repeat_interleave(2)))
    assert torch.equal(by_view.weight, flat.weight)


def test_linear_probe_trained_by_an_optimiser_reaches_the_same_solution():
    clip = clip_model()
    f, labels = image_features(clip, images(30, seed=2)), torch.arange(30) % 4
    solved = CLIPLinearProbe(clip, tokenizer(), NAMES, inverse_strength=5.0)
    solved.fit_features((f, labels))
    learner = CLIPLinearProbe(clip, tokenizer(), NAMES, solver="gradient")
    assert learner.fit_features((f, labels)) == {}
    assert len(learner.trainable_parameters()) == 2
    assert solved.trainable_parameters() == []
    optimizer = torch.optim.SGD(
        [{"params": [learner.weight], "weight_decay": 1 / (5.0 * 30)}, {"params": [learner.bias]}], lr=2.0, momentum=0.9
    )
    for _ in range(600):
        optimizer.zero_grad()
        learner.loss(None, labels, features=f)[0].backward()
        optimizer.step()
    torch.testing.assert_close(learner.weight, solved.weight, rtol=0, atol=1e-5)


# ProGrad


def expected_prograd(learner, f, labels, position, strength, temperature):
    vectors = learner.vectors
    logits = scaled(learner.clip, f, prompt_features(learner.clip, NAMES, vectors, position))
    taught = scaled(learner.clip, f, plain_features(learner.clip, [f"a photo of a {name}." for name in CLEAN]))
    p, q = (taught / temperature).softmax(1), (logits / temperature).softmax(1)
    kl = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    (g,) = torch.autograd.grad(cross_entropy(logits, labels), vectors, retain_graph=True)
    (h,) = torch.autograd.grad(kl, vectors)
    dot = (g * h).sum()
    return cross_entropy(logits, labels), (g if dot >= 0 else g - strength * dot / (h * h).sum() * h), dot


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("strength", "temperature"), [(1.0, 1.0), (0.8, 2.0), (0.0, 1.0)])
def test_prograd_has_the_projected_gradient(position, strength, temperature):
    learner = lively_(
        ProGrad(
            clip_model(),
            tokenizer(),
            NAMES,
            context_length=6,
            position=position,
            strength=strength,
            temperature=temperature,
        )
    )
    f = image_features(learner.clip, images())
    signs = set()
    for labels in torch.cartesian_prod(*[torch.arange(4)] * 3)[::5]:
        expected_loss, expected_gradient, dot = expected_prograd(learner, f, labels, position, strength, temperature)
        loss, logits = learner.loss(images(), labels)
        (gradient,) = gradients(loss, learner)
        torch.testing.assert_close(loss.detach(), expected_loss.detach(), rtol=0, atol=1e-11)
        torch.testing.assert_close(logits, scaled(learner.clip, f, learner.text_features()).detach())
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)
        signs.add(bool(dot >= 0))
    assert signs == {True, False}


def test_prograd_projection():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        g, h = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
        projected = prograd.project(g, h, 1.0)
        if (g * h).sum() >= 0:
            assert torch.equal(projected, g)
        else:
            assert abs((projected * h).sum()) < 1e-12
            assert not torch.equal(projected, g)
            halfway = prograd.project(g, h, 0.5)
            torch.testing.assert_close(halfway, (g + projected) / 2)
        torch.testing.assert_close(prograd.project(g, 1e3 * h, 0.7), prograd.project(g, h, 0.7))
        assert torch.equal(prograd.project(g, torch.zeros_like(h), 1.0), g)
        assert torch.equal(prograd.project(torch.zeros_like(g), h, 1.0), torch.zeros_like(g))


def test_prograd_loss_may_be_scaled_and_accumulated():
    learner = lively_(ProGrad(clip_model(), tokenizer(), NAMES, context_length=6))
    (once,) = gradients(learner.loss(images(), LABELS)[0], learner)
    (scaled_up,) = gradients(learner.loss(images(), LABELS)[0] * 65536, learner)
    torch.testing.assert_close(scaled_up / 65536, once)
    learner.zero_grad()
    for _ in range(2):
        learner.loss(images(), LABELS)[0].backward()
    torch.testing.assert_close(learner.vectors.grad, 2 * once)
    with torch.no_grad():
        loss, _ = learner.loss(images(), LABELS)
    assert not loss.requires_grad


def test_prograd_starts_with_the_words_of_its_template_at_the_end():
    template = "a type of pet, a photo of a {}."
    learner = ProGrad(clip_model(), tokenizer(), NAMES, template=template)
    ids = tokenizer()(["a type of pet, a photo of a"])[0, 1:10]
    assert ids[-1] == 320  # nine tokens for eight words, the comma is one
    assert torch.equal(learner.vectors[-9:], learner.clip.token_embedding.weight[ids])
    assert torch.equal(learner.vectors[:7], torch.zeros(7, 32, dtype=torch.float64))
    expected = plain_features(learner.clip, [template.format(name) for name in CLEAN])
    torch.testing.assert_close(learner.template_features(), expected, rtol=0, atol=1e-11)
    nothing_in_front = ProGrad(clip_model(), tokenizer(), NAMES, template="{} texture.")
    assert torch.equal(nothing_in_front.vectors[-4:], learner.clip.token_embedding.weight[[320, 1125, 539, 320]])
    with pytest.raises(ConfigurationError, match="9 tokens, and context_length=8"):
        ProGrad(clip_model(), tokenizer(), NAMES, template=template, context_length=8)


def test_prograd_as_published_counts_words():
    template = "a type of pet, a photo of a {}."
    learner = ProGrad(clip_model(), tokenizer(), NAMES, template=template, layout="published")
    ids = tokenizer()(["a type of pet, a photo of a"])[0, 1:10]
    assert torch.equal(learner.vectors[:8], torch.zeros(8, 32, dtype=torch.float64))
    assert torch.equal(learner.vectors[8:], learner.clip.token_embedding.weight[ids[:8]])
    lively_(learner)
    expected = prompt_features(learner.clip, [f"a {name}" for name in CLEAN], learner.vectors, "end")
    torch.testing.assert_close(learner.text_features(), expected, rtol=0, atol=1e-11)
    without = prompt_features(learner.clip, CLEAN, learner.vectors, "end")
    assert (without - expected).abs().max() > 1e-3
    with pytest.raises(ConfigurationError, match="must stand at the end, not at position 'middle'"):
        ProGrad(clip_model(), tokenizer(), NAMES, template=template, layout="published", position="middle")
    with pytest.raises(ConfigurationError, match=r"layout must be .tokens. or .published."):
        ProGrad(clip_model(), tokenizer(), NAMES, layout="words")


def test_prograd_as_published_has_fixed_words_on_four_data_sets():
    learner = ProGrad(clip_model(), tokenizer(), NAMES, layout="published")
    fixed = {}
    for key, entry in few_shot_datasets().items():
        phrase = entry["templates"]["prograd"].split(" {}")[0]
        learner.set_template(phrase + " {}.")
        (last,) = tokenizer().encode(phrase)[-1:]
        assert learner.fixed in ((), (last,))
        if learner.fixed:
            fixed[key] = tokenizer().decode(learner.fixed).strip()
            assert int((learner.vectors != 0).any(1).sum()) == len(
                entry["templates"]["prograd"].split(" {}")[0].split()
            )
    assert fixed == {"oxford_pets": "a", "oxford_flowers": "a", "fgvc_aircraft": "a", "food101": "of"}


def test_fixed_words_of_prograd_stay_with_what_was_trained(tmp_path):
    def of_pets(clip):
        learner = ProGrad(clip, tokenizer(), NAMES, layout="published")
        learner.set_template("a type of pet, a photo of a {}.")
        return learner

    learner = lively_(of_pets(clip_model()))
    expected = learner.text_features().detach()
    save_learner(learner, tmp_path)
    learner.set_template("a texture of {}.")  # of another data set, on which it is tested
    assert torch.equal(learner.text_features(), expected)
    again = load_learner(tmp_path, clip_model(), tokenizer())
    torch.testing.assert_close(again.text_features(), expected, rtol=0, atol=1e-12)


def test_fixed_words_of_prograd_are_saved_and_not_guessed_from_a_later_template(tmp_path):
    learner = ProGrad(clip_model(), tokenizer(), NAMES, layout="published")
    learner.set_template("a type of pet, a photo of a {}.")
    lively_(learner)
    learner.set_template("a texture of {}.")  # of another data set, and what is saved with the learner
    save_learner(learner, tmp_path)
    again = load_learner(tmp_path, clip_model(), tokenizer(), ["heron", "passion flower"])
    expected = prompt_features(learner.clip, ["a heron", "a passion flower"], learner.vectors, "end")
    torch.testing.assert_close(again.text_features(), expected, rtol=0, atol=1e-11)
    without = prompt_features(learner.clip, ["heron", "passion flower"], learner.vectors, "end")
    assert (without - expected).abs().max() > 1e-3
    assert again.templates == ("a texture of {}.",)
    assert "fixed" not in lively_(ProGrad(clip_model(), tokenizer(), NAMES)).trained_state()


def test_fixed_words_of_an_older_file_are_those_of_its_template():
    learner = ProGrad(clip_model(), tokenizer(), NAMES, layout="published")
    learner.set_template("a type of pet, a photo of a {}.")
    fixed, state = learner.fixed, learner.trained_state()
    lively_(learner)
    learner.load_trained_state({"vectors": state["vectors"] + 1}, "the learner in here")
    assert learner.fixed == fixed != ()
    wrong = {
        "no token": state | {"fixed": torch.tensor([49408])},
        "numbers": state | {"fixed": torch.tensor([320.0])},
        "a table": state | {"fixed": torch.tensor([[320]])},
        "width": {"fixed": torch.tensor([539]), "vectors": state["vectors"][:, :4]},
    }
    expected = learner.text_features().detach()
    for tensors in wrong.values():
        with pytest.raises(StorageError):
            learner.load_trained_state(tensors, "the learner in here")
        assert learner.fixed == fixed
        assert torch.equal(learner.text_features(), expected)


def test_prograd_takes_the_template_of_a_data_set_until_it_is_trained():
    learner = ProGrad(clip_model(), tokenizer(), NAMES)
    learner.set_template("a texture of {}.")
    fresh = ProGrad(clip_model(), tokenizer(), NAMES, template="a texture of {}.")
    assert torch.equal(learner.vectors, fresh.vectors)
    assert torch.equal(learner.template_features(), fresh.template_features())
    lively_(learner)
    trained = learner.vectors.detach().clone()
    learner.set_template("a photo of a {}.")
    assert torch.equal(learner.vectors, trained)
    before = learner.templates, learner.vectors.detach().clone()
    with pytest.raises(ConfigurationError):
        learner.set_template("without a slot")
    assert (learner.templates, learner.vectors.tolist()) == (before[0], before[1].tolist())
    fresh.set_template("a photo of a {}.")
    assert fresh.templates == ("a texture of {}.",)


# The fast text tower


def features_and_gradients(learner):
    """Text features, and the gradients of a random combination of them."""
    f = image_features(learner.clip, images(dtype=next(learner.clip.parameters()).dtype))
    texts = learner.text_features(f) if isinstance(learner, CoCoOp) else learner.text_features()
    weights = torch.randn(texts.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return texts.detach(), gradients((texts * weights.to(texts.dtype)).sum(), learner)


@pytest.mark.parametrize("chunk_size", [None, 3, 8])
@pytest.mark.parametrize("kind", ["plain", "custom"])
@pytest.mark.parametrize("name", ON_TEXT)
def test_fast_text_is_exact(name, kind, chunk_size):
    for dtype, absolute, limit in ((torch.float64, 1e-10, 1e-10), (torch.float32, 2e-6, 1e-5)):
        learner = build(name, clip_model(kind, dtype))
        learner.fast_text = False
        expected, expected_gradients = features_and_gradients(learner)
        learner.fast_text, learner.chunk_size = True, chunk_size
        assert learner.text.why_in_full(learner.layout) is None
        actual, actual_gradients = features_and_gradients(learner)
        assert (actual - expected).abs().max() < absolute
        for left, right in zip(actual_gradients, expected_gradients, strict=True):
            assert right.abs().max() > 1e-3
            assert relative(left, right) < limit
            assert dtype == torch.float32 or (left - right).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["coop", "cocoop", "kgcoop_front"])
def test_the_comparison_notices_a_wrong_prefix(name, monkeypatch):
    learner = build(name)
    learner.fast_text = False
    expected, _ = features_and_gradients(learner)
    learner.fast_text = True
    right = packing.common_length
    monkeypatch.setattr(packing, "common_length", lambda texts: right(texts) + 1)
    actual, _ = features_and_gradients(learner)
    assert (actual - expected).abs().max() > 1e-3


def test_fast_text_runs_fewer_tokens():
    learner = build("coop")
    widths = []
    hook = learner.clip.transformer.resblocks[1].mlp.c_fc.register_forward_hook(
        lambda module, inputs, output: widths.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    learner.text_features()
    hook.remove()
    names = sum(int(tokenizer()([name])[0].argmax()) - 1 for name in CLEAN)
    assert sum(widths) == 6 + names + 2 * 4  # start and context once, then the names with full stop and end


def test_chunks_bound_the_texts_of_all_images_at_once():
    learner = build("cocoop")
    largest = []
    run = learner.text.encode
    learner.text.encode = lambda layout, context, **options: (
        largest.append(len(context) * min(len(layout), options["chunk_size"] or len(layout)))
        or run(layout, context, **options)
    )
    f = image_features(learner.clip, images(8, seed=3))
    everything = learner.classify(f)
    assert max(largest) == 32
    for chunk_size in (1, 4, 9, 32):
        largest.clear()
        learner.chunk_size = chunk_size
        torch.testing.assert_close(learner.classify(f), everything, rtol=0, atol=1e-11)
        assert max(largest) <= chunk_size


def test_cut_texts_equal_padded_ones():
    learner = ZeroShot(clip_model(dtype=torch.float32), tokenizer(), NAMES)
    padded = learner.clip.encode_text(tokenizer()([f"a photo of a {name}." for name in CLEAN]))
    torch.testing.assert_close(learner.text_features(), F.normalize(padded, dim=-1), rtol=0, atol=1e-5)


# Equivalences


def test_coop_from_a_phrase_is_the_template():
    learner = CoOp(clip_model(), tokenizer(), NAMES, init="a photo of a")
    expected = plain_features(learner.clip, [f"a photo of a {name}." for name in CLEAN])
    torch.testing.assert_close(learner.text_features(), expected, rtol=0, atol=1e-11)
    specific = CoOp(clip_model(), tokenizer(), NAMES, init="a_photo_of_a", class_specific=True)
    assert specific.vectors.shape == (4, 4, 32)
    torch.testing.assert_close(specific.text_features(), expected, rtol=0, atol=1e-11)
    middle = CoOp(clip_model(), tokenizer(), NAMES, init="a photo of a", position="middle")
    expected = plain_features(middle.clip, [f"a photo {name} of a." for name in CLEAN])
    torch.testing.assert_close(middle.text_features(), expected, rtol=0, atol=1e-11)


def test_cocoop_without_meta_net_is_coop():
    learner = build("cocoop")
    with torch.no_grad():
        learner.meta_net[2].weight.zero_()
        learner.meta_net[2].bias.zero_()
    coop = CoOp(clip_model(), tokenizer(), NAMES, context_length=4)
    coop.vectors.data.copy_(learner.vectors)
    torch.testing.assert_close(learner(images()), coop(images()), rtol=0, atol=1e-10)


def test_kgcoop_without_weight_and_prograd_without_strength_are_coop():
    kgcoop = lively_(KgCoOp(clip_model(), tokenizer(), NAMES, weight=0.0))
    prograd_learner = lively_(ProGrad(clip_model(), tokenizer(), NAMES, context_length=4, strength=0.0))
    coop = CoOp(clip_model(), tokenizer(), NAMES, context_length=4)
    for learner in (kgcoop, prograd_learner):
        coop.vectors.data.copy_(learner.vectors)
        loss, _ = learner.loss(images(), LABELS)
        expected, _ = coop.loss(images(), LABELS)
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(gradients(loss, learner), gradients(expected, coop), rtol=0, atol=1e-10)


def test_adapters_turned_off_are_zero_shot():
    zero_shot = ZeroShot(clip_model(), tokenizer(), NAMES)(images())
    adapter = lively_(CLIPAdapter(clip_model(), tokenizer(), NAMES, ratio=0.0))
    torch.testing.assert_close(adapter(images()), zero_shot, rtol=0, atol=1e-11)
    tip = TipAdapter(clip_model(), tokenizer(), NAMES, alpha=0.0)
    tip.fit_features((image_features(tip.clip, images(8, seed=4)), torch.arange(8) % 4))
    torch.testing.assert_close(tip(images()), zero_shot, rtol=0, atol=1e-11)


# Other towers


@pytest.mark.parametrize("name", [*ON_TEXT, *ON_IMAGES])
def test_learners_work_on_resnet_clip_in_training_mode(name):
    clip = clip_model("resnet")
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    learner = build(name, clip).train()
    loss, _ = learner.loss(images(), LABELS)
    if learner.trainable_parameters():
        assert all(gradient.abs().sum() > 0 for gradient in gradients(loss, learner))
    assert all(torch.equal(value, before[key]) for key, value in clip.state_dict().items())
    assert not clip.training


def test_learners_work_on_siglip_towers():
    names, tokenize = ["dog", "red kite", "heron"], WordTokenizer()
    clip = clip_model("siglip")
    text = clip.text
    for make in (CoOp, CoCoOp, KgCoOp, ProGrad):
        options = {"init": "photo of", "context_length": 2} if make is not CoOp else {"context_length": 2}
        learner = make(clip, tokenize, names, **options)
        assert "last token" in learner.text.why_in_full(learner.layout)
        vectors = lively_(learner).vectors
        f = image_features(clip, images())
        if make is CoCoOp:
            context = vectors + learner.meta_net(f)[:, None]
        else:
            context = vectors[None].expand(3, -1, -1)
        rows = []
        for own, feature in zip(context, f, strict=True):
            ids = tokenize([f"photo of {name}." for name in names])
            x = text.token_embedding(ids)
            x[:, :2] = own
            x = x + text.positional_embedding
            for block in text.transformer.resblocks:
                x = block(x)
            t = text.text_projection(text.ln_final(x)[:, -1])
            t = t / t.norm(dim=1, keepdim=True)
            rows.append(clip.logit_scale.exp() * t @ feature + clip.logit_bias)
        torch.testing.assert_close(learner(images()), torch.stack(rows), rtol=0, atol=1e-10)
        everything = gradients(learner.loss(images(), torch.tensor([0, 1, 2]))[0], learner)
        learner.chunk_size = 2
        chunked = gradients(learner.loss(images(), torch.tensor([0, 1, 2]))[0], learner)
        torch.testing.assert_close(chunked, everything, rtol=0, atol=1e-10)
    tuned = TPT(clip, tokenize, names, init="photo of", num_views=4)
    assert tuned(images()).shape == (3, 3)
    zero_shot = ZeroShot(clip, tokenize, names)
    expected = F.normalize(clip.encode_text(tokenize([f"a photo of a {name}." for name in names])), dim=-1)
    torch.testing.assert_close(zero_shot.text_features(), expected.detach(), rtol=0, atol=1e-12)


# Precision


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("name", [*ON_TEXT, "clip_adapter", "tip_f", "linear_probe_gradient"])
def test_half_precision_gives_finite_float32_gradients(name, how, half):
    clip = clip_model(dtype=torch.float32)
    if how == "weights":
        convert_weights_to_lp(clip, dtype=half)
    learner = build(name, clip)
    assert all(parameter.dtype == torch.float32 for parameter in learner.trainable_parameters())
    with torch.autocast("cpu", dtype=half, enabled=how == "autocast"):
        loss, logits = learner.loss(images(dtype=torch.float32), LABELS)
        actual = gradients(loss, learner)
    assert logits.dtype == torch.float32
    assert loss.isfinite()
    learner = build(name, clip_model(dtype=torch.float32))
    exact, exact_logits = learner.loss(images(dtype=torch.float32), LABELS)
    assert (logits - exact_logits).abs().max() < 0.5
    for gradient, wanted in zip(actual, gradients(exact, learner), strict=True):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        if not name.startswith("prograd"):  # where the projection may set in or not
            assert F.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0) > 0.9


def test_logits_in_float16_are_closer_than_in_bfloat16():
    """So the overlays of CLIP have float16, as the authors: on the clip art mean errors are .0010 and .0124."""
    clip, tokenize = create_clip("nano_clip")
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(24, 3, 64, 64, generator=generator)
    names = ["cat", "dog", "house", "tree"]
    with torch.no_grad():
        errors = {}
        for half in (torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype=half):
                errors[half] = ZeroShot(clip, tokenize, names)(pictures).double()
        exact = ZeroShot(clip.double(), tokenize, names)(pictures.double())
    errors = {half: (logits - exact).abs().mean().item() for half, logits in errors.items()}
    assert 0 < errors[torch.float16] < errors[torch.bfloat16] / 4
    assert errors[torch.bfloat16] > 0.004


def test_small_gradients_survive_float16():
    learner = build("prograd", convert(clip_model(dtype=torch.float32), torch.float16))
    with torch.autocast("cpu", dtype=torch.float16):
        texts = learner.encode_text()
        upstream = torch.full_like(texts, 2e-8)
        (gradient,) = gradients_of(learner.text, texts, [learner.vectors], upstream)
        assert gradient.abs().max() > 0


def convert(clip, dtype):
    """The CLIP with half-precision matrices, as OpenCLIP makes it."""
    convert_weights_to_lp(clip, dtype=dtype)
    return clip


# Counts


def test_trainable_counts_at_real_widths():
    config = open_clip.get_model_config("ViT-B-16")
    with torch.device("meta"):
        clip = CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    clip.attn_mask = torch.full((77, 77), float("-inf")).triu_(1)

    def count(make, **options):
        learner = make(clip, tokenizer(), [f"class {index}" for index in range(100)], **options)
        return sum(parameter.numel() for parameter in learner.trainable_parameters())

    assert count(CoOp) == 8192
    assert count(CoOp, context_length=4) == 2048
    assert count(CoOp, class_specific=True) == 819_200
    assert count(CoCoOp) == 35_360
    assert count(CoCoOp, context_length=16, init=None) == 41_504
    assert count(ProGrad) == 8192
    assert count(KgCoOp) == 2048
    assert count(CLIPAdapter) == 131_072
    assert count(PLOT) == 32_768
    assert count(ProDA) == 262_144
    assert count(TCP) == 331_904
    assert count(RPO) == 30_720
    assert count(ProVP) == 147_456
    assert count(DAPT) == 20_480
    assert count(PLOTPlusPlus) == 14_336
    assert count(DePT) == 8192 + 53_348
    assert count(TwoStageFewShot) == 65_536 + 51_200
    assert count(TaskRes) == count(CLAP) == 51_200
    assert count(CLIPLinearProbe, solver="gradient") == 100 * 513
    assert count(ZeroShot) == count(TipAdapter) == count(TPT) == count(CLIPLinearProbe) == 0
    assert TPT(clip, tokenizer(), NAMES).num_tuned == 2048


@pytest.mark.parametrize("name", [*ON_TEXT, *ON_IMAGES])
def test_nothing_but_the_learners_own_tensors_is_trained(name):
    learner = build(name)
    own = {parameter for key, parameter in learner.named_parameters() if not key.startswith("clip.")}
    assert set(learner.trainable_parameters()) <= own
    assert not any(parameter.requires_grad for parameter in learner.clip.parameters())


# Kept text features


def count_encodings(learner):
    calls = []
    run = learner.text.encode
    learner.text.encode = lambda *args, **options: calls.append(1) or run(*args, **options)
    return calls


TEACHERS = {
    "promptsrc": (lambda clip: PromptSRC(clip, tokenizer(), NAMES, template=["a {}.", "the {}.", "one {}."]), 1),
    "ivlp without text": (lambda clip: IVLP(clip, tokenizer(), NAMES, num_text=0), 0),
    "lora of images": (lambda clip: CLIPLoRA(clip, tokenizer(), NAMES, towers=["visual"]), 0),
}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_frozen_texts_are_encoded_once_while_images_are_learned(teacher):
    """Only what the text features depend on makes them new: a step on the image side does not."""
    make, per_step = TEACHERS[teacher]
    learner = make(clip_model(dtype=torch.float32)).train()
    calls = count_encodings(learner)
    optimizer = torch.optim.SGD(learner.trainable_parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        learner.loss(images().float(), LABELS)[0].backward()
        optimizer.step()
        made = len(calls)
        calls.clear()
        return made

    first = step()
    assert first == (4 if teacher == "promptsrc" else 1)
    assert [step() for _ in range(3)] == [per_step] * 3
    with torch.no_grad():
        learner.text.module.ln_final.weight.mul_(1.5)  # a change of the text tower is noticed
    assert step() == first


def test_texts_with_adapters_of_their_own_are_encoded_anew():
    learner = CLIPLoRA(clip_model(dtype=torch.float32), tokenizer(), NAMES, towers=["visual", "text"]).eval()
    calls = count_encodings(learner)
    with torch.no_grad():
        kept = [learner.text_features() for _ in range(2)]
        assert len(calls) == 1
        for name, parameter in learner.clip.peft.named_parameters():
            if ".text." in name and name.endswith(".B"):
                parameter.add_(0.1)
        assert (learner.text_features() - kept[0]).abs().max() > 1e-3
    assert len(calls) == 2


def test_text_features_are_kept_until_something_changes():
    learner = build("coop", clip_model(dtype=torch.float32))
    calls = count_encodings(learner)
    optimizer = torch.optim.SGD(learner.trainable_parameters(), lr=0.1)

    def kept():
        with torch.no_grad():
            return learner.text_features()

    def fresh():
        with torch.enable_grad():
            return learner.text_features().detach()

    first = kept()
    assert kept() is first
    assert len(calls) == 1
    changes = {
        "step": lambda: (learner.loss(images(), LABELS)[0].backward(), optimizer.step()),
        "data": lambda: learner.vectors.data.mul_(1.1),
        "data_item": lambda: learner.vectors.data[0].add_(0.1),
        "names": lambda: learner.set_class_names(["heron", "owl"]),
        "frozen": lambda: learner.clip.text_projection.neg_(),
        "autocast": lambda: None,
        "cast": lambda: learner.clip.bfloat16(),
    }
    for what, change in changes.items():
        before = kept()
        change()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=what == "autocast"):
            after = kept()
            torch.testing.assert_close(after, fresh(), rtol=0, atol=1e-5)
        assert after.shape != before.shape or not torch.equal(after, before), what
        assert what == "autocast" or kept() is after, what
    learner.load_trained_state({"vectors": torch.zeros(5, 32)}, "zeros")
    torch.testing.assert_close(kept(), fresh(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["kgcoop", "prograd", "clip_adapter", "tip_f", "zero_shot"])
def test_texts_of_templates_are_encoded_once_and_again_for_other_templates(name):
    learner = build(name)
    learner.loss(images(), LABELS)
    frozen = learner.template_features()
    calls = count_encodings(learner)
    for _ in range(3):
        learner.loss(images(), LABELS)
    assert len(calls) == (3 if name in ON_TEXT else 0)
    assert learner.template_features() is frozen
    learner.set_template("a drawing of a {}.")
    assert not torch.equal(learner.template_features(), frozen)
    assert not frozen.requires_grad


@pytest.mark.parametrize("name", [*ON_TEXT, *ON_IMAGES])
def test_validation_in_inference_mode_does_not_spoil_training(name):
    learner = build(name)
    with torch.inference_mode():
        before = learner(images())
        loss, _ = learner.loss(images(), LABELS)
    trained, _ = learner.loss(images(), LABELS)
    torch.testing.assert_close(trained.detach(), loss.clone(), rtol=0, atol=1e-11)
    if learner.trainable_parameters():
        assert all(gradient.isfinite().all() for gradient in gradients(trained, learner))
    torch.testing.assert_close(learner(images()).detach(), before.clone(), rtol=0, atol=1e-11)


def test_fitting_in_inference_mode_does_not_spoil_training():
    for name in ("tip_f", "linear_probe"):
        learner = ON_IMAGES[name](clip_model(), tokenizer(), NAMES)
        with torch.inference_mode():
            learner.fit_features((learner.image_features(images(8)), torch.arange(8) % 4))
        learner.loss(images(), LABELS)[0].backward()


# Class names


@pytest.mark.parametrize("name", ["coop", "cocoop", "kgcoop", "prograd", "zero_shot", "clip_adapter"])
def test_new_class_names_give_what_a_new_learner_gives(name):
    learner = build(name)
    learner.set_class_names(["heron", "passion_flower"])
    other = (ON_TEXT | ON_IMAGES)[name](clip_model(), tokenizer(), ["heron", "passion flower"])
    other.load_trained_state(learner.trained_state(), "the other")
    torch.testing.assert_close(learner(images()), other(images()), rtol=0, atol=1e-11)
    assert learner.class_names == ["heron", "passion flower"]


@pytest.mark.parametrize("name", ["coop_specific", "tip", "tip_f", "linear_probe"])
def test_what_belongs_to_its_classes_takes_no_others(name):
    learner = build(name)
    expected = learner(images())
    with pytest.raises(ConfigurationError, match=f"each of its {len(NAMES)} classes"):
        learner.set_class_names(["heron", "owl"])
    learner.set_class_names(NAMES)
    assert torch.equal(learner(images()), expected)


@pytest.mark.parametrize("name", [*ON_TEXT, *ON_IMAGES])
def test_refused_names_change_nothing(name):
    learner = build(name)
    expected = learner(images())
    for names in ([], "dog", ["dog", ""], ["dog", "DOG"], ["dog", " ".join(["word"] * 90)]):
        with pytest.raises(ConfigurationError):
            learner.set_class_names(names)
    assert torch.equal(learner(images()), expected)
    assert learner.class_names == CLEAN


def test_a_name_too_long_for_the_second_template_changes_nothing():
    learner = ZeroShot(clip_model(), tokenizer(), NAMES, template=["{}", "a " * 60 + "{}"])
    expected = learner(images())
    with pytest.raises(ConfigurationError, match="this CLIP reads 77"):
        learner.set_class_names(["dog", " ".join(["word"] * 20)])
    assert torch.equal(learner(images()), expected)


@pytest.mark.parametrize("name", [*ON_TEXT, *ON_IMAGES])
def test_saved_and_loaded_learners_agree(name, tmp_path):
    learner = build(name, clip_model(dtype=torch.float32)).eval()
    save_learner(learner, tmp_path)
    loaded = load_learner(tmp_path, clip_model(dtype=torch.float32), tokenizer())
    assert torch.equal(loaded(images()), learner(images()))
    assert loaded.options == learner.options
    assert {key: value.shape for key, value in loaded.trained_state().items()} == {
        key: value.shape for key, value in learner.trained_state().items()
    }


def test_a_cache_that_does_not_fit_is_refused():
    learner = build("tip_f")
    expected = learner(images())
    state = {key: value.detach().clone() for key, value in learner.trained_state().items()}
    wrong = {
        "labels": state | {"labels": state["labels"] + 1},
        "fewer": state | {"labels": state["labels"][:3]},
        "width": state | {"keys": state["keys"][:, :4]},
        "missing": {key: value for key, value in state.items() if key != "alpha"},
    }
    for tensors in wrong.values():
        with pytest.raises(StorageError):
            learner.load_trained_state(tensors, "the learner in here")
        assert torch.equal(learner(images()), expected)


# Refusals


REFUSED = {
    "no images": (lambda: build("cocoop").text_features(), "depend on the image"),
    "empty cache": (lambda: TipAdapter(clip_model(), tokenizer(), NAMES)(images()), "call fit_features first"),
    "labels": (
        lambda: TipAdapter(clip_model(), tokenizer(), NAMES).fit_features((torch.ones(2, 64), torch.tensor([0, 4]))),
        "labels 0 to 3",
    ),
    "position": (lambda: KgCoOp(clip_model(), tokenizer(), NAMES, position="back"), "'end' or 'middle' or 'front'"),
    "weight": (lambda: KgCoOp(clip_model(), tokenizer(), NAMES, weight=-1), "that is not negative, but is -1"),
    "no weight": (
        lambda: KgCoOp(clip_model(), tokenizer(), NAMES, weight=math.nan),
        "weight must be a number, not nan",
    ),
    "endless weight": (
        lambda: KgCoOp(clip_model(), tokenizer(), NAMES, weight=math.inf),
        "weight must be a number, not inf",
    ),
    "temperature": (lambda: ProGrad(clip_model(), tokenizer(), NAMES, temperature=0), "must be positive"),
    "much strength": (lambda: ProGrad(clip_model(), tokenizer(), NAMES, strength=1.5), "between 0 (CoOp) and 1"),
    "little strength": (lambda: ProGrad(clip_model(), tokenizer(), NAMES, strength=-0.1), "between 0 (CoOp) and 1"),
    "no strength": (lambda: ProGrad(clip_model(), tokenizer(), NAMES, strength=math.nan), "must be a number, not nan"),
    "rate": (lambda: TPT(clip_model(), tokenizer(), NAMES, lr=-1), "lr and weight_decay must not be negative"),
    "two templates": (
        lambda: CLIPLoRA(clip_model(), tokenizer(), NAMES, template="simple_7"),
        "one template, not with 7",
    ),
    "ratio": (lambda: CLIPAdapter(clip_model(), tokenizer(), NAMES, ratio=1.5), "between 0 and 1"),
    "reduction": (lambda: CLIPAdapter(clip_model(), tokenizer(), NAMES, reduction=99), "between 1 and 64"),
    "alpha": (lambda: TipAdapter(clip_model(), tokenizer(), NAMES, alpha=-1), "must not be negative"),
    "solver": (lambda: CLIPLinearProbe(clip_model(), tokenizer(), NAMES, solver="sgd"), "'lbfgs' or 'gradient'"),
    "strength": (lambda: CLIPLinearProbe(clip_model(), tokenizer(), NAMES, inverse_strength=0), "must be positive"),
    "template": (lambda: KgCoOp(clip_model(), tokenizer(), NAMES, template="a photo"), "has no {} for the class name"),
    "templates": (lambda: ZeroShot(clip_model(), tokenizer(), NAMES, template=[]), "at least one template"),
    "long phrase": (lambda: CoCoOp(clip_model(), tokenizer(), NAMES, context_length=9), "has 4 tokens"),
    "no vectors": (lambda: CoOp(clip_model(), tokenizer(), NAMES, context_length=0), "at least 1"),
    "half a vector": (
        lambda: CoOp(clip_model(), tokenizer(), NAMES, context_length=2.5),
        "must be an integer or None, not 2.5",
    ),
    "half a vector of a phrase": (
        lambda: KgCoOp(clip_model(), tokenizer(), NAMES, context_length=2.5),
        "must be an integer or None, not 2.5",
    ),
    "half a vector behind zeros": (
        lambda: ProGrad(clip_model(), tokenizer(), NAMES, context_length=16.5),
        "must be an integer, not 16.5",
    ),
    "large images": (
        lambda: build("coop")(torch.zeros(2, 3, 48, 32, dtype=torch.float64)),
        "images are 48 x 32, and this CLIP takes 32 x 32",
    ),
    "large images of a resnet": (
        lambda: build("coop", clip_model("resnet"))(torch.zeros(2, 3, 96, 96, dtype=torch.float64)),
        "images are 96 x 96, and this CLIP takes",
    ),
    "long context": (lambda: CoOp(clip_model(), tokenizer(), NAMES, context_length=70), "70 of them learned context"),
    "gray": (lambda: build("coop")(torch.zeros(2, 1, 32, 32)), "convert gray images to RGB"),
    "one image": (lambda: build("coop")(torch.zeros(3, 32, 32)), "must be"),
    "no tokenizer": (lambda: CoCoOp(clip_model(), None, NAMES), "needs the tokenizer of its CLIP"),
    "vision only": (lambda: CoCoOp(clip_model().visual, tokenizer(), NAMES), "image and a text tower"),
    "no model": (lambda: KgCoOp(torch.nn.Linear(2, 2), tokenizer(), NAMES), "image and a text tower"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_clear_sentence(case):
    act, message = REFUSED[case]
    with pytest.raises((ConfigurationError, UnsupportedError)) as caught:
        act()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_constructor_argument_is_documented():
    for learner in (CoCoOp, KgCoOp, ProGrad, TPT, CLIPAdapter, TipAdapter, CLIPLinearProbe):
        documented = inspect.getdoc(learner)
        for parameter in inspect.signature(learner).parameters:
            assert f"    {parameter}: " in documented, (learner.__name__, parameter)


def check_deep_copy(learner):
    """A deep copy computes the same, and neither learns from what the other does."""
    with torch.no_grad():
        expected = learner(images(3))
        twin = copy.deepcopy(learner)
        assert torch.equal(twin(images(3)), expected)
        ours = {id(tensor) for tensor in (*learner.parameters(), *learner.buffers())}
        assert ours.isdisjoint(id(tensor) for tensor in (*twin.parameters(), *twin.buffers()))
        assert twin.clip is not learner.clip
        assert twin.text.clip is twin.clip
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                tensor += 0.1
        assert torch.equal(learner(images(3)), expected)
        assert not torch.equal(twin(images(3)), expected)
        twin.set_class_names(twin.class_names)
    assert torch.equal(learner(images(3)), expected)


@pytest.mark.parametrize("name", ON_TEXT | ON_IMAGES)
def test_a_deep_copy_is_a_learner_of_its_own(name):
    check_deep_copy(build(name))


def test_a_copy_of_a_learner_with_kept_features_learns():
    """What is kept may belong to a graph, which cannot be copied."""
    learner = build("kgcoop")
    loss, _ = learner.loss(images(3), LABELS)
    expected = torch.autograd.grad(loss, learner.trainable_parameters())
    twin = copy.deepcopy(learner)
    again, _ = twin.loss(images(3), LABELS)
    assert torch.equal(again, loss)
    found = torch.autograd.grad(again, twin.trainable_parameters())
    assert all(map(torch.equal, found, expected))


class FixedTemplate(vp.Learner):
    """Zero-shot by a template that is no option of it, as a learner of somebody's own may be."""

    def __init__(self, clip, tokenizer, class_names, allow_duplicates=False):
        super().__init__(
            clip, tokenizer, class_names, options={}, templates="a sketch of {}.", allow_duplicates=allow_duplicates
        )
        self.set_class_names(class_names)

    def prompts(self, names):
        return self.tokenizer.contents(f"a sketch of {name}." for name in names)


def test_a_template_that_is_no_option_stays_that_of_the_learner(tmp_path):
    learner = FixedTemplate(clip_model(), tokenizer(), NAMES)
    expected = learner.template_features()
    learner.set_template("a texture of {}.")  # that of a data set
    assert learner.templates == ("a sketch of {}.",)
    assert torch.equal(learner.template_features(), expected)
    save_learner(learner, tmp_path)
    assert torch.equal(load_learner(tmp_path, clip_model(), tokenizer()).template_features(), expected)
