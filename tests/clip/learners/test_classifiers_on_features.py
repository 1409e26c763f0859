"""Few-shot classifiers on frozen features against float64 formulas written out here."""

import functools
import math

import pytest
import torch
from clip_reference import NAMES, clip_model, cross_entropy, image_features, images, lively_, tokenizer

from visionpeft.clip.learners import CLAP, LPPlusPlus, TaskRes, ZeroShot
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError

CLEAN = [name.replace("_", " ") for name in NAMES]
TEMPLATES = ["a photo of a {}.", "art of the {}"]
LABELS = torch.tensor([0, 2, 3])


@functools.cache
def plain():
    """The CLIP of all tests here, which no learner changes."""
    return clip_model()


@functools.cache
def raw_texts():
    """Text features (classes, e) of their own length, the mean over two templates, by OpenCLIP."""
    with torch.no_grad():
        each = [plain().encode_text(tokenizer()([t.format(name) for name in CLEAN])) for t in TEMPLATES]
    return sum(each) / 2


def rows_of_length_one(x):
    return x / x.square().sum(1, keepdim=True).sqrt()


def scale():
    return plain().logit_scale.detach().exp()


def gradient_of(loss, parameter):
    return torch.autograd.grad(loss, parameter)[0]


def check_saved(learner, folder):
    """Saved and loaded it gives the same bits, and takes no other classes."""
    save_learner(learner, folder)
    loaded = load_learner(folder, clip_model(), tokenizer())
    assert torch.equal(loaded(images()), learner.eval()(images()))
    assert loaded.options == learner.options
    with pytest.raises(ConfigurationError, match="each of its 4 classes"):
        loaded.set_class_names(["heron", "owl"])


def test_task_res_is_the_formula(tmp_path):
    learner = TaskRes(plain(), tokenizer(), NAMES, strength=0.7, template=TEMPLATES)
    zero_shot = rows_of_length_one(raw_texts())
    torch.testing.assert_close(learner.text_features(), zero_shot, rtol=0, atol=1e-11)
    assert (raw_texts().norm(dim=1) - 1).abs().min() > 0.5  # their own length is another than 1
    assert not learner.residual.any()
    assert sum(p.numel() for p in learner.trainable_parameters()) == 4 * 64
    lively_(learner)
    f, x = image_features(plain(), images()), learner.residual
    expected = scale() * f @ rows_of_length_one(raw_texts() + 0.7 * x).T
    loss, logits = learner.loss(images(), LABELS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    found, wanted = gradient_of(loss, x), gradient_of(cross_entropy(expected, LABELS), x)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    # The length of a row is divided out, so nothing pulls along it. With texts of length 1 it would be another row.
    rows = (raw_texts() + 0.7 * x).detach()
    assert (found * rows).sum(1).abs().max() < 1e-10
    other = zero_shot + 0.7 * x.detach()
    assert (found * other).sum(1).abs().max() > 1e-3
    check_saved(learner, tmp_path)


def test_task_res_takes_the_template_of_the_data_set():
    learner = TaskRes(plain(), tokenizer(), NAMES)
    learner.set_template("a drawing of a {}.")
    expected = ZeroShot(plain(), tokenizer(), NAMES, template="a drawing of a {}.").text_features()
    torch.testing.assert_close(learner.text_features().detach(), expected, rtol=0, atol=1e-12)


# CLAP and ZS-LP


SHOTS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3])


@functools.cache
def shots():
    """Unit features (images, views, features) of eight training images in two views."""
    return image_features(plain(), images(16, seed=7)).unflatten(0, (8, 2))


@pytest.mark.parametrize("constrained", [True, False])
def test_clap_is_held_by_what_zero_shot_knows(constrained, tmp_path):
    learner = CLAP(plain(), tokenizer(), NAMES, constrained=constrained, template=TEMPLATES)
    assert torch.equal(learner.weight, learner.raw_template_features())
    torch.testing.assert_close(learner.weight.detach(), raw_texts(), rtol=0, atol=1e-10)
    assert sum(p.numel() for p in learner.trainable_parameters()) == 4 * 64
    if constrained:
        assert learner.loss(images(), LABELS)[0].isnan()  # it has seen no shots
    chosen = learner.fit_features((shots(), SHOTS))
    p = (scale() * shots() @ rows_of_length_one(raw_texts()).T).softmax(-1)
    strengths = torch.stack([p[k == SHOTS][:, :, k].mean() for k in range(4)])
    if constrained:
        torch.testing.assert_close(learner.strengths, strengths, rtol=0, atol=1e-11)
        ends = {"smallest_strength": strengths.min().item(), "largest_strength": strengths.max().item()}
        assert chosen == pytest.approx(ends, abs=1e-12)
        some = CLAP(plain(), tokenizer(), NAMES, template=TEMPLATES)
        some.fit_features((shots()[:3], SHOTS[:3]))
        assert some.strengths[3] == 1  # nothing is known of it
    lively_(learner)
    w = learner.weight
    logits = scale() * image_features(plain(), images()) @ rows_of_length_one(w).T
    expected = cross_entropy(logits, LABELS)
    if constrained:
        expected = expected + sum(s * (w[k] - raw_texts()[k]).square().sum() for k, s in enumerate(strengths)) / 4
    loss, found = learner.loss(images(), LABELS)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient_of(loss, w), gradient_of(expected, w), rtol=0, atol=1e-9)
    check_saved(learner, tmp_path)


def test_clap_starts_at_the_template_of_the_data_set_until_it_has_moved():
    learner = CLAP(plain(), tokenizer(), NAMES)
    learner.set_template(TEMPLATES)
    torch.testing.assert_close(learner.weight.detach(), raw_texts(), rtol=0, atol=1e-10)
    lively_(learner)
    moved = learner.weight.detach().clone()
    learner.set_template("{}")
    assert torch.equal(learner.weight, moved)


# LP++


@functools.cache
def unit_texts():
    """Unit text features (classes, e): those of each template count alike."""
    with torch.no_grad():
        each = [plain().encode_text(tokenizer()([t.format(name) for name in CLEAN])) for t in TEMPLATES]
    return rows_of_length_one(sum(map(rows_of_length_one, each)))


def lp_plus_plus_by_autograd(f, labels, steps, cleared=True):
    """Weight, bias and strength after each step, with PyTorch's SGD and backward."""
    t = unit_texts()
    n = len(labels)
    w = torch.stack([f[labels == k].sum(0) for k in range(4)]).requires_grad_()
    b = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    own = sum((f[labels == k] @ t[k]).mean() for k in range(4)) / 4
    a = torch.full((4,), 250 * own.item(), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w, b], lr=4 * n / torch.linalg.eigvalsh(f.T @ f)[-1].item(), momentum=0.9)
    rate = n / (4 * max(((f @ t[k]) ** 2).sum().item() for k in range(4)))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        if cleared:
            a.grad = None
        cross_entropy(f @ w.T + b + (f @ t.T) * a, labels).backward()
        optimizer.step()
        if step % 10 == 0:
            a.data -= rate * a.grad
        yield w.detach().clone(), b.detach().clone(), a.detach().clone()


def test_lp_plus_plus_is_the_published_solver_with_a_cleared_gradient(tmp_path):
    learner = LPPlusPlus(plain(), tokenizer(), NAMES, steps=40, template=TEMPLATES)
    zero_shot = ZeroShot(plain(), tokenizer(), NAMES, template=TEMPLATES)
    assert torch.equal(learner(images()).argsort(1), zero_shot(images()).argsort(1))
    f, labels = shots().flatten(0, 1), SHOTS.repeat_interleave(2)
    assert learner.fit_features((shots(), SHOTS)) == {"step": 40}  # each view is an image
    *_, (w, b, a) = lp_plus_plus_by_autograd(f, labels, 40)
    for found, expected in zip((learner.weight, learner.bias, learner.strength), (w, b, a), strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-8)
    *_, (_, _, never_cleared) = lp_plus_plus_by_autograd(f, labels, 40, cleared=False)
    assert (never_cleared - a).abs().max() > 1e-3
    g = image_features(plain(), images())
    expected = g @ w.T + b + (g @ unit_texts().T) * a
    torch.testing.assert_close(learner(images()).detach(), expected, rtol=0, atol=1e-8)
    assert learner.trainable_parameters() == []
    assert sum(tensor.numel() for tensor in learner.trained_state().values()) == 4 * (64 + 2)
    check_saved(learner, tmp_path)


def test_lp_plus_plus_keeps_the_step_that_validation_likes_best():
    learner = LPPlusPlus(plain(), tokenizer(), NAMES, steps=30, template=TEMPLATES)
    held_out = image_features(plain(), images(40, seed=20)), torch.arange(40) % 4
    seen = shots(), SHOTS  # kept for other tests, which want gradients of it
    with torch.inference_mode():
        chosen = learner.fit_features(seen, held_out)
    steps = list(lp_plus_plus_by_autograd(shots().flatten(0, 1), SHOTS.repeat_interleave(2), 30))
    responses = held_out[0] @ unit_texts().T
    reached = [((held_out[0] @ w.T + b + responses * a).argmax(1) == held_out[1]).sum().item() for w, b, a in steps]
    assert len(set(reached)) > 1
    assert reached.count(max(reached)) > 1  # of which the authors keep the last
    best = max(step for step, correct in enumerate(reached) if correct == max(reached))
    assert chosen == {"step": best + 1, "validation_accuracy": max(reached) / 40}
    torch.testing.assert_close(learner.weight.detach(), steps[best][0], rtol=0, atol=1e-8)


REFUSED = {
    "steps": (lambda: LPPlusPlus(plain(), tokenizer(), NAMES, steps=0), "integer of at least 1, not 0"),
    "a class without images": (
        lambda: LPPlusPlus(plain(), tokenizer(), NAMES).fit_features((shots()[:3], SHOTS[:3])),
        "training images of all its 4 classes",
    ),
    "labels": (
        lambda: CLAP(plain(), tokenizer(), NAMES).fit_features((shots()[:2], torch.tensor([0, 4]))),
        "labels 0 to 3",
    ),
    "no strength": (lambda: TaskRes(plain(), tokenizer(), NAMES, strength=0), "must be a positive number"),
    "endless strength": (lambda: TaskRes(plain(), tokenizer(), NAMES, strength=math.inf), "must be a number, not inf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_clear_sentence(case):
    act, message = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        act()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
