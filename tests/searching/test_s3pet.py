"""The gates of S3PET against their formula, what they keep, and a search in seconds."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from scipy.optimize import brentq
from small_protocols import write_config

import visionpeft as vp
from visionpeft import search
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError
from visionpeft.searching.structure import S3PET, Structure

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES, BUDGET, BETA, TEMPERATURE = (400, 100, 250, 1000, 40), 600, 0.7, 0.5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def probabilities(alpha):
    """sigmoid((a - z) / beta), z such that they cost the budget."""
    z = brentq(lambda z: sigmoid((alpha - z) / BETA) @ SIZES - BUDGET, -1000, 1000, xtol=1e-13)
    return sigmoid((alpha - z) / BETA)


def structure(alpha):
    made = Structure(SIZES, BUDGET, BETA, TEMPERATURE).double()
    made.alpha.data.copy_(torch.from_numpy(alpha))
    return made


def test_gates_are_those_of_the_formula():
    generator = np.random.default_rng(0)
    for scale in (0.0, 1.0, 30.0):
        alpha = scale * generator.standard_normal(len(SIZES))
        made = structure(alpha).eval()
        expected = probabilities(alpha)
        gates = made.gates().detach().numpy()
        np.testing.assert_allclose(gates, expected, rtol=1e-9, atol=1e-12)
        assert abs(gates @ SIZES - BUDGET) < 1e-6
        made.train()
        made.draw(3, 7)
        uniform = sigmoid(made.noise.numpy())
        logits = np.log(expected) - np.log1p(-expected) + np.log(uniform) - np.log1p(-uniform)
        concrete = sigmoid(logits / TEMPERATURE)
        np.testing.assert_allclose(made.gates().detach().numpy(), concrete, rtol=1e-6, atol=1e-9)
    made.alpha.data.zero_()  # a change is seen
    np.testing.assert_allclose(made.eval().gates().detach().numpy(), probabilities(np.zeros(5)), rtol=1e-9)


def test_a_binary_concrete_gate_is_open_as_often_as_its_probability_says():
    alpha = np.array([0.0, 2.0, -1.0, 0.5, 1.0])
    made = structure(alpha).train()
    drawn = []
    for step in range(2000):
        made.draw(0, step)
        drawn.append((made.gates() > 0.5).double().detach().numpy())
    np.testing.assert_allclose(np.mean(drawn, axis=0), probabilities(alpha), atol=0.04)


def test_the_gradient_knows_that_the_budget_stays():
    alpha = np.array([0.3, -0.2, 0.9, -1.1, 0.0])
    weights = np.array([1.0, -2.0, 0.5, 3.0, 0.7])
    made = structure(alpha).eval()
    (made.gates() * torch.from_numpy(weights)).sum().backward()
    steps = 1e-6 * np.eye(len(SIZES))
    expected = [(probabilities(alpha + step) - probabilities(alpha - step)) @ weights / 2e-6 for step in steps]
    np.testing.assert_allclose(made.alpha.grad.numpy(), expected, rtol=1e-5, atol=1e-8)
    made.alpha.grad = None
    (made.gates() * torch.tensor(SIZES)).sum().backward()
    np.testing.assert_allclose(made.alpha.grad.numpy(), 0, atol=1e-9)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()


def test_what_is_kept_fits_into_the_budget(model):
    method = S3PET(budget=2000, rank=1, bottleneck=1, targets=("q", "fc1"))
    vp.attach(model, method)
    part = model.peft["default"].get_submodule("s3pet")
    (made,) = (module for module in part.modules() if isinstance(module, Structure))
    # of 192: q 384, fc1 960, an adapter 577 values
    assert sorted(made.sizes) == [384, 384, 577, 577, 960, 960]
    assert sum(made.sizes) == 3842
    tower = next(iter(describe(model).towers.values()))
    names = list(method.candidates(tower))
    order = ["1.fc1", "0.adapter", "1.adapter", "0.q", "1.q", "0.fc1"]
    made.alpha.data.copy_(torch.tensor([-float(order.index(name)) for name in names]))
    following, _ = method.next_stage([tower], part, {}, {}, None)
    assert set(following.kept) == {"1.fc1", "0.adapter", "0.q"}  # 960 + 577 = 1537; 577 more is too much, 384 is not
    assert following.stages_after == 0
    made.alpha.data.zero_()
    with pytest.raises(ConfigurationError, match="its gates say nothing"):
        method.next_stage([tower], part, {}, {}, None)
    vp.detach(model)
    vp.attach(model, following)
    assert vp.summary(model).adapter == 960 + 577 + 384


def test_every_candidate_learns_and_a_gate_moves_its_change(model):
    vp.attach(model, S3PET(budget=2000, rank=1, bottleneck=1, targets=("q", "fc1")))
    model.peft.train()
    with torch.no_grad():
        for name, parameter in model.peft.named_parameters():
            if name.endswith("up"):
                parameter.normal_()
    images = torch.randn(2, 3, 32, 32)
    model(images).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.peft.parameters())
    before = model(images).detach()
    vp.after_step(model, 1, 5)
    assert not torch.allclose(model(images), before)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget": 10}, "a budget of 10 leaves nothing to choose"),
        ({"budget": 10**9}, "leaves nothing to choose"),
        ({"kept": ["9.q"]}, "there is no candidate 9.q here"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1"),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused(options, sentence, model):
    with pytest.raises(ConfigurationError, match=sentence):
        vp.attach(model, S3PET(**options))


def test_a_search_trains_what_the_gates_have_found(tmp_path):
    config = write_config(tmp_path)
    command = [
        *("--space", "s3pet", "--space_options", "{bottleneck: 2}", "--base", config, "--tasks", "dsprites_ori"),
        *("--budget", "1", "--max_parameters", "3000", "--seeds", "1", "--output", str(tmp_path / "out")),
        *("--search_epochs", "1"),
    ]
    assert search.main(command) == 0
    (score,) = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("trials/*/*/score.json")]
    (kept,) = [method["fields"]["kept"] for method in score["methods"]]
    (row,) = csv.DictReader((tmp_path / "out/results.csv").open())
    assert json.loads(row["hyper_parameters"])["kept"] == kept
    assert 2000 < int(row["adapter_parameters"]) <= 3000
    (costs,) = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("trials/*/*/costs.json")]
    assert costs["parameters"] == int(row["adapter_parameters"])
    assert (row["method"], row["search_steps"], row["steps"]) == ("s3pet, found", "6", "9")
