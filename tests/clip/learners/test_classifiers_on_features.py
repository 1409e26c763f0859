"""Few-shot classifiers on frozen features against float64 formulas written out here."""

import functools
import math

import pytest
import torch
from clip_reference import NAMES, clip_model, cross_entropy, image_features, images, lively_, tokenizer

from visionpeft.clip.learners import TaskRes, ZeroShot
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


REFUSED = {
    "no strength": (lambda: TaskRes(plain(), tokenizer(), NAMES, strength=0), "must be a positive number"),
    "endless strength": (lambda: TaskRes(plain(), tokenizer(), NAMES, strength=math.inf), "must be a positive number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_clear_sentence(case):
    act, message = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        act()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
