"""Methods that are trained in stages: what they choose, what goes back to the start, and what the last stage trains."""

import pytest
import torch
import torch.nn.functional as F
from reference.hosts import HOSTS

import visionpeft as vp

VIT = next(host for host in HOSTS if host.name == "vit_cls")
IMAGES, LABELS = VIT.inputs(6, torch.float64, seed=4), torch.tensor([0, 3, 1, 4, 4, 2])


def train(model, rate=0.1, steps=3):
    """A few steps of gradient descent on whatever is trained."""
    trained = vp.trainable_parameters(model)
    for _ in range(steps):
        loss = F.cross_entropy(model(IMAGES), LABELS)
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= rate * gradient


def in_stages(method, batches=None):
    """A small ViT with a method that was trained in all its stages, and its outputs before each of them."""
    model, before = vp.attach(VIT.build(torch.float64), method).eval(), []
    for _ in vp.stages(model, batches):
        before.append(model(IMAGES).detach())
        train(model)
    return model, before


# LT-SFT


def fine_tuned(masks=None, rate=0.1, steps=3):
    """A plain ViT trained by torch alone: its values before and after; outside of the masks weights do not move."""
    model = VIT.build(torch.float64).eval()
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if name not in ("cls_token", "pos_embed")}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(steps):
        gradients = torch.autograd.grad(F.cross_entropy(model(IMAGES), LABELS), list(trained.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                free = 1.0 if masks is None or name.startswith("head.") else masks[name]
                parameter -= rate * gradient * free
    return model, before


def test_lt_sft_trains_what_full_fine_tuning_moves_most():
    """Two trainings by torch itself, with a mask between them by a sort over all entries, are what the stages do."""
    full, before = fine_tuned()
    moved = {n: (p.detach() - before[n]).abs() for n, p in full.named_parameters() if n in before}
    moved = {name: each for name, each in moved.items() if not name.startswith("head.")}
    number = round(0.03 * sum(p.numel() for n, p in full.named_parameters() if not n.startswith("head.")))
    threshold = torch.cat([each.flatten() for each in moved.values()]).sort(descending=True).values[number - 1]
    masks = {name: (each >= threshold).double() for name, each in moved.items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == number
    sparse, _ = fine_tuned(masks)

    model, outputs = in_stages(vp.LTSFT(density=0.03))
    assert torch.equal(*outputs)  # the second training starts bit by bit where the first did, head and all
    assert model.peft["default"].num_parameters() == number
    distance = (model(IMAGES) - sparse(IMAGES)).abs().max()
    assert distance < 1e-10
    assert (model(IMAGES) - full(IMAGES)).abs().max() > 1e-3 > distance  # nor has it gone on from the first stage
    vp.merge(model)
    changed = {n: (p.detach() != before[n]).double() for n, p in model.named_parameters() if n in masks}
    assert all(torch.equal(changed[name], mask) for name, mask in masks.items())


def test_lt_sft_counts_all_parameters():
    """0.5 % of 85,798,656 are 428,993; K is taken of the towers together, class token and positions counted."""
    assert round(0.005 * 85_798_656) == 428_993
    plain = VIT.build()
    total = sum(p.numel() for n, p in plain.named_parameters() if not n.startswith("head."))
    layers = total - plain.cls_token.numel() - plain.pos_embed.numel()
    model = vp.attach(plain, vp.LTSFT(density=0.1))
    assert model.peft["default"].num_parameters() == layers
    for stage in vp.stages(model):
        if stage == 1:
            train(model.double())
    assert model.peft["default"].num_parameters() == round(0.1 * total)


# What is refused


def test_a_first_stage_that_moves_nothing_leaves_nothing_to_choose():
    model = vp.attach(VIT.build(), vp.LTSFT())
    before = model(IMAGES.float())
    with pytest.raises(vp.ConfigurationError, match=r"^LTSFT: its first stage has moved no weight to choose by$"):
        list(vp.stages(model))
    assert torch.equal(model(IMAGES.float()), before)


def test_one_method_in_stages_at_a_time():
    with pytest.raises(vp.ConfigurationError, match="LTSFT and LTSFT are both trained in stages"):
        next(vp.stages(vp.attach(VIT.build(), [vp.LTSFT(), vp.LTSFT()])))
    with pytest.raises(vp.ConfigurationError, match="LTSFT is trained in stages and FishMask waits for data"):
        next(vp.stages(vp.attach(VIT.build(), [vp.LTSFT(), vp.FishMask()])))


def test_any_other_method_has_one_stage():
    model = vp.attach(VIT.build(), vp.LoRA(rank=2))
    adapter = model.peft["default"]
    assert list(vp.stages(model)) == [1]
    assert model.peft["default"] is adapter
    vp.attach(model, vp.LoRA(rank=2), "second")
    with pytest.raises(vp.ConfigurationError, match="say which one is trained with name="):
        next(vp.stages(model))
