"""SigLIP's loss and bias: the logits of learners, what they learn with it, and what their answers then mean."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from clip_reference import WordTokenizer, clip_model, images, tokenizer
from open_clip.loss import SigLipLoss
from small_learner_runs import run_learner
from small_runs import draw_images

from visionpeft import evaluate, predict
from visionpeft.clip import learners
from visionpeft.clip.learner import Learner
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import open_run, open_saved

NAMES = ["dog", "red kite", "heron"]
LABELS = torch.tensor([2, 0, 1])
OPTIONS = {
    "CoOp": {"context_length": 2},
    "PLOT": {"context_length": 2, "pooled": True},
    "TDA": {},
    "KgCoOp": {"init": "photo of"},
    "DAPT": {"init": "photo of", "num_visual": 2},
    "ProDA": {"num_contexts": 4, "context_length": 2},
    "RPO": {"num_pairs": 2},
}


@pytest.fixture(scope="module")
def tokenize():
    return WordTokenizer()


def build(name, tokenize, bias=-3.0):
    clip = clip_model("siglip")
    clip.logit_bias.data.fill_(bias)
    torch.manual_seed(1)
    learner = getattr(learners, name)(clip, tokenize, NAMES, **OPTIONS.get(name, {}))
    generator = torch.Generator().manual_seed(2)
    features = F.normalize(torch.randn(6, learner.text.num_features, generator=generator).double(), dim=-1)
    learner.fit_features((features, torch.arange(6) % 3))
    return learner.eval()


# The mechanisms by which learners get from features to logits.
WITH_BIAS = ("ZeroShot", "CoOp", "PLOT", "PLOTPlusPlus", "TipAdapter", "CLAP", "TDA", "RPO", "ProDA", "TwoStageFewShot")


def shift(name, tokenize):
    """By how much logits grow where the bias of the CLIP grows by one and a half."""
    with torch.no_grad():
        return build(name, tokenize, -1.5)(images()) - build(name, tokenize)(images())


@pytest.mark.parametrize("name", WITH_BIAS)
def test_the_bias_is_in_the_logits(tokenize, name):
    torch.testing.assert_close(shift(name, tokenize), torch.full((3, 3), 1.5).double(), rtol=0, atol=1e-11)


def test_a_lost_bias_is_noticed(tokenize, monkeypatch):
    """The negative control."""
    monkeypatch.setattr(Learner, "with_bias", lambda learner, logits: logits)
    assert shift("PLOT", tokenize).abs().max() == 0


def test_logits_are_those_of_open_clip_before_and_after_they_are_saved(tokenize, tmp_path):
    learner = build("ZeroShot", tokenize)
    learner.set_loss("sigmoid")
    texts = tokenize([f"a photo of a {name}." for name in NAMES])
    with torch.no_grad():
        expected = learner.clip.get_logits(images(), texts)[0]
        torch.testing.assert_close(learner(images()), expected, rtol=0, atol=1e-12)
        save_learner(learner, tmp_path)
        loaded = load_learner(tmp_path, learner.clip, tokenize)
        assert loaded.loss_name == "sigmoid"
        torch.testing.assert_close(loaded(images()), expected, rtol=0, atol=1e-12)
        trained = open_saved(tmp_path, model=learner.clip, tokenizer=tokenize)
        answers = trained.answers(trained.model(images()))
        torch.testing.assert_close(answers, 1 / (1 + (-expected.float()).exp()), rtol=1e-6, atol=0)
        other = clip_model("siglip")
        other.logit_bias.data.fill_(-7.0)
        with pytest.raises(StorageError, match="other weights"):
            load_learner(tmp_path, other, tokenize)


def test_the_loss_is_siglips(tokenize):
    """OpenCLIP has it for as many texts as images, of which each belongs to its own."""
    learner = build("CoOp", tokenize)
    learner.set_loss("sigmoid")
    loss, logits = learner.loss(images()[LABELS], LABELS)
    (found,) = torch.autograd.grad(loss, learner.vectors)
    f, t = learner.image_features(images()[LABELS]), learner.text_features()[LABELS]
    expected = SigLipLoss()(f, t, learner.clip.logit_scale.exp(), learner.clip.logit_bias)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, torch.autograd.grad(expected, learner.vectors)[0], rtol=0, atol=1e-12)
    assert abs(F.cross_entropy(logits, LABELS) - loss) > 0.01  # and no softmax


def test_the_loss_of_other_numbers_of_images(tokenize):
    learner = build("CoOp", tokenize)
    learner.set_loss("sigmoid")
    labels = torch.tensor([1, 1, 2, 0])
    loss, logits = learner.loss(torch.cat((images(), images(1, seed=3))), labels)
    signs = torch.tensor([[-1, 1, -1], [-1, 1, -1], [-1, -1, 1], [1, -1, -1]])
    torch.testing.assert_close(loss, (1 + (-signs * logits).exp()).log().sum() / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["KgCoOp", "DAPT", "ProVP", "RPO"])
def test_what_learners_add_to_their_loss_stays(tokenize, name):
    learner = build(name, tokenize)
    loss, logits = learner.loss(images(), LABELS)
    added = loss - F.cross_entropy(logits, LABELS)
    assert name == "RPO" or added.abs() > 1e-6
    learner.set_loss("sigmoid")
    pairs = F.one_hot(LABELS, 3).double()
    by_pair = -(pairs * logits.sigmoid().log() + (1 - pairs) * (-logits).sigmoid().log()).sum() / 3
    torch.testing.assert_close(learner.loss(images(), LABELS)[0], by_pair + added, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["ProGrad", "PromptSRC", "ProDA", "CLAP", "TipAdapter", "LPPlusPlus", "DePT", "TPT"])
def test_learners_that_compare_classes_refuse_it(tokenize, name):
    options = {"ProGrad": {"init": "photo of", "context_length": 2}, "PromptSRC": {"template": "a photo of a {}."}}
    options |= {"DePT": {"host_options": {"context_length": 2}}}
    make = functools.partial(getattr(learners, name), **(OPTIONS | options).get(name, {}))
    learner = make(clip_model("siglip"), tokenize, NAMES)
    with pytest.raises(ConfigurationError, match=f"^{name} has no form with loss 'sigmoid'.*leave the loss"):
        learner.set_loss("sigmoid")
    assert learner.loss_name == "cross_entropy"


def test_a_clip_without_a_bias_refuses_it():
    learner = learners.ZeroShot(clip_model(), tokenizer(), NAMES)
    with pytest.raises(ConfigurationError, match="for a CLIP with a logit_bias, such as SigLIP"):
        learner.set_loss("sigmoid")
    with pytest.raises(ConfigurationError, match="one of cross_entropy, sigmoid, not 'softmax'"):
        learner.set_loss("softmax")


def test_runs_answer_and_calibrate_by_pair(tmp_path):
    """Trained with the loss by the command line; its record, and what is predicted later, are of sigmoids."""
    squares = draw_images(tmp_path / "squares", per_class=6)
    more = ("--model.loss", "sigmoid", "--model.backbone_kwargs", "{init_logit_bias: -30.0}")
    folder = run_learner(tmp_path / "runs", squares, *more, epochs=1)
    run = RunDirectory(folder)
    results = run.read_results()
    assert results["loss"] == "sigmoid"
    trained = open_run(run)
    logits = torch.tensor([[-1.0, -4.0, -2.0]])
    torch.testing.assert_close(trained.answers(logits), 1 / (1 + (-logits).exp()))
    # With this bias no pair is likely, and a softmax over three classes gives a third or more.
    assert 0 < results["test"]["confidence"] < 0.01
    assert evaluate.main([str(folder)]) == 0
    # One class alone is a question, too, where each is judged by itself; a softmax would say 1 whatever is shown.
    made = ["--class-names", "frog", "--output", str(tmp_path / "out.json")]
    assert predict.main([str(folder), str(squares / "red" / "0.png"), *made]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["classes"] == ["frog"]
    assert row["probabilities"][0] < 0.5
