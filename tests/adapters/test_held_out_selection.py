"""What is learnt on a held-out part: the gradient through a step of the training, and nothing else is changed."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import distance, randomise
from reference import edits_of, forward, shapes_of, trained_weights
from reference.hosts import HOSTS

import visionpeft as vp
from visionpeft.adapters.selection import unrolled_gradient

VIT = next(host for host in HOSTS if host.name == "vit_cls")
BATCH = VIT.inputs(4, torch.float64, seed=4), torch.tensor([0, 3, 1, 4])
HELD_OUT = VIT.inputs(3, torch.float64, seed=5), torch.tensor([4, 2, 0])


def relative(found, exact):
    found, exact = (torch.cat([each.flatten() for each in every]) for every in (found, exact))
    return (distance(found, exact) / exact.abs().max()).item()


def test_gradient_is_that_of_the_exact_bilevel_problem():
    """By autograd through the step itself, in float64; without the second order it is another one."""
    torch.manual_seed(0)
    w, u = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (3, 5)))
    a, unused = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)

    def loss(w, u, rows):
        return (torch.tanh(x[rows] @ w.T) * a.softmax(0) @ u.T - y[rows]).square().mean()

    first, second, rate = slice(0, 4), slice(4, 7), 0.4
    slopes = torch.autograd.grad(loss(w, u, first), (w, u), create_graph=True)
    moved = [p - rate * slope for p, slope in zip((w, u), slopes, strict=True)]
    (exact,) = torch.autograd.grad(loss(*moved, second), (a,))
    before = w.detach().clone()
    arguments = (lambda: loss(w, u, first), lambda: loss(w, u, second), [w, u], [a, unused])
    found = unrolled_gradient(*arguments, rate)
    assert relative(found[:1], [exact]) < 1e-4
    assert torch.equal(found[1], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(w, before)
    ahead = [p.detach() for p in moved]
    (first_order,) = torch.autograd.grad(loss(*ahead, second), (a,))
    assert relative([first_order], [exact]) > 0.01
    assert relative(unrolled_gradient(*arguments, 0.0)[:1], torch.autograd.grad(loss(w, u, second), (a,))) < 1e-12


def test_a_step_follows_the_exact_gradient_of_the_transcription():
    """Selections move by Adam's first step along it; whatever else the model has is what it was, bit by bit."""
    torch.manual_seed(1)
    method = vp.AutoLoRA(rank=3, alpha=6, dropout=0.2)
    model = vp.attach(VIT.build(torch.float64), method).eval()
    randomise(model.peft["default"])
    tensors = {name: value.detach().clone() for name, value in model.peft["default"].state_dict().items()}
    plain, rate = VIT.build(torch.float64), 0.5

    def loss(values, batch):
        edits = edits_of(values, {"auto_lora": dataclasses.asdict(method)}, shapes_of(plain))
        weights = trained_weights(plain.state_dict(), {k: v for k, v in values.items() if k.startswith("head.")})
        return F.cross_entropy(forward(plain, batch[0], edits, weights), batch[1])

    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    chosen = [name for name in leaves if name.endswith("selection")]
    trained = [name for name in leaves if name not in chosen]
    slopes = torch.autograd.grad(loss(leaves, BATCH), [leaves[n] for n in trained], create_graph=True)
    ahead = leaves | {name: leaves[name] - rate * g for name, g in zip(trained, slopes, strict=True)}
    exact = torch.autograd.grad(loss(ahead, HELD_OUT), [leaves[n] for n in chosen])
    assert {id(p) for p in vp.trainable_parameters(model)} == {
        id(p) for n, p in model.peft["default"].named_parameters() if n in trained
    }

    selection, seen = vp.Selection(model, lr=0.01), []
    selection.optimiser.register_step_pre_hook(lambda *_: seen.extend(p.grad for p in selection.parameters))
    selection.step(BATCH, HELD_OUT, rate)
    after = model.peft["default"].state_dict()
    assert relative(seen, exact) < 1e-3
    assert all(torch.equal(after[name], tensors[name]) for name in trained)
    for name, gradient in zip(chosen, exact, strict=True):
        assert distance(after[name], tensors[name] - 0.01 * gradient.sign()) < 1e-4
    model.train()  # with dropout, what is drawn is the same in all passes, and the finite difference no noise
    selection.step(BATCH, HELD_OUT, rate)
    assert max(each.abs().max() for each in seen[len(chosen) :]) < 100 * max(each.abs().max() for each in exact)


def test_ranks_are_those_whose_share_is_large_enough():
    model = vp.attach(VIT.build(torch.float64), vp.AutoLoRA(rank=4, alpha=2, blocks="first:1")).eval()
    stages = vp.stages(model)
    next(stages)
    before, shares = model(BATCH[0]).detach(), {"q": [3.0, 0.0, 0.1, 2.9], "v": [1.0, 1.0, 1.0, 1.0]}
    for site, values in shares.items():
        module = model.peft["default"].get_submodule(f"auto_lora.visual.0.{site}")
        with torch.no_grad():
            module.selection.copy_(torch.tensor(values))
            module.up.normal_()
    with torch.no_grad():
        model.head.weight.add_(1.0)
    assert next(stages) == 2
    (method,) = model.peft["default"].methods
    assert method.ranks == {"visual.0.q": 2, "visual.0.v": 4}  # equal shares are 1 / rank each
    assert model.peft["default"].num_parameters() == 2 * 2 * 32 + 4 * 2 * 32
    assert torch.equal(model(BATCH[0]), before)  # the head has gone back as well
    assert next(stages, None) is None


def test_selective_prompts_follow_their_gates():
    """By the transcription while gates are learnt; then a gate is one or none at all, and what stays goes back."""
    torch.manual_seed(3)
    method = vp.SelectivePrompts(num_tokens=2, share=0.5)
    model, plain = vp.attach(VIT.build(torch.float64), method).eval(), VIT.build(torch.float64)
    stages = vp.stages(model)
    next(stages)
    start = {name: value.clone() for name, value in model.peft["default"].state_dict().items()}
    randomise(model.peft["default"], 2)

    def expected(tensors):
        edits = edits_of(tensors, {"selective_prompts": dataclasses.asdict(method)}, shapes_of(plain))
        weights = trained_weights(plain.state_dict(), {k: v for k, v in tensors.items() if k.startswith("head.")})
        return forward(plain, BATCH[0], edits, weights)

    found = {name: value.clone() for name, value in model.peft["default"].state_dict().items()}
    assert distance(model(BATCH[0]), expected(found)) < 1e-11
    gates = {name: value.item() for name, value in found.items() if name.endswith("gate")}
    assert len(gates) == 2
    assert {id(p) for p in vp.Selection(model).parameters}.isdisjoint(map(id, vp.trainable_parameters(model)))
    best = max(gates, key=gates.get)
    assert next(stages) == 2
    after = model.peft["default"].state_dict()
    kept = {best.replace("gate", "source.prompts"), "selective_prompts.visual.0.stream_in.source.prompts"}
    assert {name for name in after if not name.startswith("head.")} == kept
    assert all(torch.equal(value, start[name]) for name, value in after.items())
    hard = {name: value for name, value in start.items() if not name.endswith("gate")}
    hard |= {name: torch.tensor([60.0 if name == best else -60.0]).double() for name in gates}  # a sigmoid of 1 or 0
    assert distance(model(BATCH[0]), expected(hard)) < 1e-11
    assert distance(model(BATCH[0]), expected(start)) > 1e-4
    with pytest.raises(vp.ConfigurationError, match="there is one block alone, so that nothing can be selected"):
        vp.attach(VIT.build(), vp.SelectivePrompts(blocks="last:1"))


def test_selection_needs_a_method_that_selects():
    model = vp.attach(VIT.build(), vp.LoRA(rank=2))
    with pytest.raises(vp.ConfigurationError, match="no method of the active adapters learns on a held-out part"):
        vp.Selection(model)
    with pytest.raises(vp.ConfigurationError, match="held_out must be between 0 and 1"):
        vp.AutoLoRA(held_out=1.0)
