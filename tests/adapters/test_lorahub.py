"""LoRAHub: what the weights mean by formula, that they are the best of those tried, and what is refused."""

import sys

import numpy as np
import pytest
import torch
from conftest import distance, output_of, randomise
from reference.hosts import HOSTS

import visionpeft as vp
from visionpeft.errors import ConfigurationError, DataError

HOST = next(host for host in HOSTS if host.name == "vit_cls")
IMAGES = HOST.inputs(6, torch.float64)
BATCHES = [(IMAGES[:4],), (IMAGES[4:],)]


def hub(*methods):
    """A host with an adapter of each method, named "a", "b" ..., off its start; the last one is active."""
    torch.manual_seed(0)
    model = HOST.build(torch.float64)
    for seed, (name, method) in enumerate(zip("abcd", methods, strict=False)):
        vp.attach(model, method, name, head=False)
        randomise(model.peft[name], seed)
        vp.activate(model, name)
    return model.eval()


def merged(model, name):
    """The weights of q and v of each block with an adapter."""
    vp.activate(model, name)
    vp.merge(model)
    weights = [block.attn.qkv.weight.detach().clone() for block in model.blocks]
    vp.unmerge(model)
    return weights


def towards(model, goal):
    """A loss that is least, 0, where the model gives this output for all images."""

    def loss(model, batch):
        start = 0 if len(batch[0]) == 4 else 4
        return (model(batch[0]) - goal[start : start + len(batch[0])]).square().sum(1).mean()

    return loss


@pytest.mark.parametrize("form", ["factors", "changes"])
def test_the_change_by_formula(form):
    """(sum w B)(sum w A) s, or sum w s B A, in the model's own weights; so -w is w in the published form alone."""
    methods = (vp.LoRA(2, alpha=6), vp.LoRA(2, alpha=6)) if form == "factors" else (vp.LoRA(2, alpha=6), vp.LoRA(3))
    model = hub(*methods)
    tensors = [{k: v.detach().clone() for k, v in model.peft[n].state_dict().items()} for n in "ab"]
    w = vp.lorahub(model, ["a", "b"], BATCHES, loss=lambda model, batch: -model(batch[0]).norm(), form=form)
    assert model.peft.active == ("lorahub",)
    assert min(abs(each) for each in w.values()) > 1e-3
    found, base = merged(model, "lorahub"), [b.attn.qkv.weight for b in HOST.build(torch.float64).blocks]
    for index, (weight, original) in enumerate(zip(found, base, strict=True)):
        for site, rows in (("q", slice(0, 32)), ("v", slice(64, 96))):
            A, B = ([t[f"lora.visual.{index}.{site}.{part}"] for t in tensors] for part in "AB")
            one, other = w["a"], w["b"]
            if form == "factors":
                change = 3 * (one * B[0] + other * B[1]) @ (one * A[0] + other * A[1])
            else:
                change = one * 3 * B[0] @ A[0] + other * B[1] @ A[1]
            assert distance(weight[rows] - original[rows], change) < 1e-12


def test_weights_are_found():
    """Those with which the images were made, near enough; and the loss at them is the least of all that was tried."""
    model = hub(vp.LoRA(2), vp.LoRA(3))
    vp.combine(model, {"a": 0.7, "b": -0.4}, "goal", head=False)
    goal, tried = output_of(HOST, model, 6, torch.float64), []
    loss = towards(model, goal)

    def noted(model, batch):
        value = loss(model, batch)
        if len(batch[0]) == 4:
            tried.append(value.item())
        return value

    legacy = np.random.get_state()[1].copy()  # noqa: NPY002  (which other packages use)
    torch_state, options = torch.get_rng_state(), {"form": "changes", "regularisation": 0.0}
    w = vp.lorahub(model, ["a", "b"], BATCHES, loss=noted, evaluations=120, **options)
    assert len(tried) == 120
    assert w["a"] == pytest.approx(0.7, abs=0.05)
    assert w["b"] == pytest.approx(-0.4, abs=0.05)
    assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    few = [
        vp.lorahub(model, ["a", "b"], BATCHES, f"of {number}", loss=loss, evaluations=9, seed=seed, **options)
        for number, seed in enumerate((0, 0, 1))
    ]
    assert few[0] == few[1] != few[2]
    vp.merge(model)  # as every LoRA


def test_every_image_counts_the_same():
    """The mean over images and not of means, plus the penalty: at w = 0, and for a single image of large loss."""
    model, seen = hub(vp.LoRA(2), vp.LoRA(2)), []

    def loss(model, batch):
        seen.append(len(batch[0]))
        return torch.tensor(1.0 if len(batch[0]) == 4 else 10.0)

    # every loss is the same, so only the penalty tells weights apart, and 0 has none
    w = vp.lorahub(model, ["a", "b"], BATCHES, loss=loss, evaluations=9)
    assert w == {"a": 0.0, "b": 0.0}
    assert seen == [4, 2] * 9
    plain = HOST.build(torch.float64).eval()
    assert distance(output_of(HOST, model, dtype=torch.float64), output_of(HOST, plain, dtype=torch.float64)) < 1e-12


def test_a_bound_holds():
    """However much better weights beyond it would be."""
    model = hub(vp.LoRA(2), vp.LoRA(2))
    tried = []

    def loss(model, batch):
        part = model.peft["lorahub"].lora.visual["0"].q
        tried.append((part.A.detach().clone(), part.B.detach().clone()))
        return -model(batch[0]).norm()

    w = vp.lorahub(model, ["a", "b"], BATCHES[:1], loss=loss, bound=0.25, evaluations=30)
    assert max(abs(each) for each in w.values()) <= 0.25
    assert max(abs(each) for each in w.values()) > 0.1
    largest = 0.25 * sum(model.peft[name].lora.visual["0"].q.A.abs() for name in "ab")
    assert all((A.abs() <= largest + 1e-12).all() for A, _ in tried)


REFUSED = {
    "one adapter": ((vp.LoRA(2),), ["a"], {}, "at least two adapters"),
    "unknown": ((vp.LoRA(2), vp.LoRA(2)), ["a", "z"], {}, "no adapter 'z'"),
    "another method": ((vp.LoRA(2), vp.SSF()), ["a", "b"], {}, "LoRA alone, but 'b' is SSF"),
    "other ranks": ((vp.LoRA(2), vp.LoRA(3)), ["a", "b"], {}, "differ in rank"),
    "other scales": ((vp.LoRA(2), vp.LoRA(2, alpha=1)), ["a", "b"], {}, "differ in alpha"),
    "other targets": ((vp.LoRA(2), vp.LoRA(2, targets=("k",))), ["a", "b"], {"form": "changes"}, "differ in targets"),
    "no such form": ((vp.LoRA(2), vp.LoRA(2)), ["a", "b"], {"form": "mean"}, "not 'mean'"),
    "no evaluation": ((vp.LoRA(2), vp.LoRA(2)), ["a", "b"], {"evaluations": 0}, "at least one evaluation"),
    "no bound": ((vp.LoRA(2), vp.LoRA(2)), ["a", "b"], {"bound": 0}, "a positive bound"),
    "taken": ((vp.LoRA(2), vp.LoRA(2)), ["a", "b"], {"name": "a"}, "'a'"),
    "no batch": ((vp.LoRA(2), vp.LoRA(2)), ["a", "b"], {"batches": []}, "got no batch"),
    "no number": (
        *((vp.LoRA(2), vp.LoRA(2)), ["a", "b"]),
        *({"loss": lambda *_: torch.tensor(float("nan"))}, "no weights with a finite loss"),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_change_nothing(reason):
    methods, names, options, said = REFUSED[reason]
    model = hub(*methods)
    before = output_of(HOST, model, dtype=torch.float64), model.peft.active, list(model.peft)
    options = {"batches": BATCHES, "evaluations": 3, "loss": lambda model, batch: model(batch[0]).mean()} | options
    with pytest.raises((ConfigurationError, DataError), match=said):
        vp.lorahub(model, names, **options)
    assert (model.peft.active, list(model.peft)) == before[1:]
    assert torch.equal(output_of(HOST, model, dtype=torch.float64), before[0])


def test_without_cma_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    model = hub(vp.LoRA(2), vp.LoRA(2))
    with pytest.raises(ConfigurationError, match=r"pip install 'visionpeft\[lorahub\]'"):
        vp.lorahub(model, ["a", "b"], BATCHES, loss=lambda model, batch: model(batch[0]).mean())
    assert list(model.peft) == ["a", "b"]
