"""Heads, parameter groups and the learning-rate schedule."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import visionpeft as vp
from visionpeft.tasks.heads import build_head, replace_head
from visionpeft.tasks.optimisation import (
    Optimisation,
    build_optimizer,
    build_schedule,
    epoch_cosine,
    output_side,
    parameter_groups,
    warmup_cosine,
)
from visionpeft.tasks.steps import Steps


def test_linear_heads():
    features = torch.randn(6, 8)
    assert build_head("linear", 8, 5)(features).shape == (6, 5)
    batchnorm = build_head("batchnorm_linear", 8, 5)
    assert sum(parameter.numel() for parameter in batchnorm.parameters()) == 8 * 5 + 5
    assert torch.equal(batchnorm[0](features).mean(0).abs() < 1e-6, torch.ones(8, dtype=torch.bool))
    layernorm = build_head("layernorm_linear", 8, 5)
    assert sum(parameter.numel() for parameter in layernorm.parameters()) == 2 * 8 + 8 * 5 + 5
    with pytest.raises(vp.ConfigurationError, match="liner"):
        build_head("liner", 8, 5)


def test_head_initialisations():
    torch.manual_seed(0)
    size = 400
    weights = {}
    for init in ("truncated_normal", "zeros", "kaiming", "uniform"):
        linear = build_head("linear", size, size, init)
        weights[init] = linear.weight.std().item()
        if init in ("truncated_normal", "zeros"):
            assert linear.bias.abs().max() == 0
    assert weights["truncated_normal"] == pytest.approx(0.02, rel=0.05)
    assert weights["zeros"] == 0
    assert weights["kaiming"] == pytest.approx(math.sqrt(2 / size), rel=0.05)
    assert weights["uniform"] == pytest.approx(1 / math.sqrt(3 * size), rel=0.05)
    assert build_head("linear", 8, 5, "kaiming").bias[0].sigmoid().item() == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(vp.ConfigurationError, match="initialisation"):
        build_head("linear", 8, 5, "ones")


def test_replaced_head_is_the_one_attached():
    model = vp.create_backbone("test_vit", pretrained=False, num_classes=4, img_size=32)
    replace_head(model, "batchnorm_linear", 4, "zeros")
    vp.attach(model, vp.BitFit())
    model(torch.randn(5, 3, 32, 32))  # in training mode
    assert model.peft["default"].head[0].num_batches_tracked == 1
    assert len(model.peft["default"].head_parameters()) == 2


def groups_of(optimisation, batch_size=64):
    adapter = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3))]
    head = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    groups = parameter_groups([*adapter, *head], head, optimisation, batch_size)
    return {group["name"]: group for group in groups}, adapter, head


def test_parameter_groups():
    groups, adapter, head = groups_of(Optimisation(lr=0.1, head_lr=0.01, weight_decay=0.5))
    found = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert found == {
        "adapter, decayed": (0.1, 0.5),
        "adapter, not decayed": (0.1, 0.0),
        "head, decayed": (0.01, 0.5),
        "head, not decayed": (0.01, 0.0),
    }
    assert groups["adapter, decayed"]["params"][0] is adapter[0]
    assert groups["head, not decayed"]["params"][0] is head[1]


def test_lr_is_scaled_by_the_batch():
    groups, *_ = groups_of(Optimisation(lr=0.1, scale_lr_by_batch=256), batch_size=64)
    assert {group["lr"] for group in groups.values()} == {0.025}


def test_optimizers():
    groups, *_ = groups_of(Optimisation())
    assert isinstance(build_optimizer(list(groups.values()), Optimisation()), torch.optim.AdamW)
    sgd = build_optimizer(list(groups.values()), Optimisation(optimizer="sgd"))
    assert sgd.param_groups[0]["momentum"] == 0.9
    with pytest.raises(vp.ConfigurationError, match="nothing is trained"):
        build_optimizer([], Optimisation())


def test_warmup_and_cosine():
    factor = warmup_cosine(warmup_steps=4, total_steps=24, min_ratio=0.1)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(14) == pytest.approx(0.1 + 0.9 / 2)
    assert factor(24) == pytest.approx(0.1)
    assert factor(30) == pytest.approx(0.1)
    values = [factor(step) for step in range(4, 25)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": -1},
        {"weight_decay": -1},
        {"warmup_epochs": -1},
        {"warmup_lr": -1},
        {"min_lr_ratio": 2},
        {"eps": 0},
        {"lora_plus": 0},
        {"scale_lr_by_batch": 0},
        {"lr": float("nan")},
        {"head_lr": float("inf")},
        {"warmup_epochs": "two"},
    ],
)
def test_impossible_values_are_refused(fields):
    with pytest.raises(vp.ConfigurationError, match=r"(?i)optimisation"):
        Optimisation(**fields)


def test_rates_of_numpy_are_those_of_python():
    """Kept as NumPy's, they would be in checkpoints, which then cannot be read as weights alone."""
    rates = Optimisation(lr=np.float32(0.5), warmup_epochs=np.int64(2))
    assert [type(rate) for rate in (rates.lr, rates.warmup_epochs)] == [float, int]


# Of 50, 10, 5 and 2 epochs at 0.002, 0.002, 0.0035 and 0.0026; the first from a published log, its last six epochs.
PUBLISHED_RATES = {
    (50, 0.002): {
        44: 9.517295e-05,
        45: 7.022351e-05,
        46: 4.894348e-05,
        47: 3.141684e-05,
        48: 1.771275e-05,
        49: 7.885299e-06,
    },
    (10, 0.002): dict(
        enumerate(
            [1e-5, 0.002, 0.00195106, 0.00180902, 0.00158779, 0.00130902, 0.001, 0.00069098, 0.00041221, 0.00019098]
        )
    ),
    (5, 0.0035): dict(enumerate([1e-5, 0.0035, 0.00316578, 0.00229078, 0.00120922])),
    (2, 0.0026): dict(enumerate([1e-5, 0.0026])),
}


@pytest.mark.parametrize(("epochs", "lr"), PUBLISHED_RATES, ids=str)
def test_epoch_cosine_gives_the_published_rates(epochs, lr):
    factor = epoch_cosine(lr, 1e-5, 1, epochs)
    expected = PUBLISHED_RATES[epochs, lr]
    digits = 7 if epochs == 50 else 5
    assert {epoch: f"{lr * factor(epoch):.{digits - 1}e}" for epoch in expected} == {
        epoch: f"{rate:.{digits - 1}e}" for epoch, rate in expected.items()
    }


def test_epoch_cosine_changes_with_the_epochs_only():
    optimisation = Optimisation(optimizer="sgd", lr=0.2, head_lr=0.1, schedule="epoch_cosine", warmup_epochs=1)
    groups, *_ = groups_of(optimisation)
    optimizer = build_optimizer(list(groups.values()), optimisation)
    schedule = build_schedule(optimizer, optimisation, Steps((3,) * 4, 12))
    rates = []
    for _ in range(12):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    for name, peak in (("adapter, decayed", 0.2), ("head, decayed", 0.1)):
        by_epoch = [1e-5, peak, peak / 2 * (1 + math.sqrt(0.5)), peak / 2]
        assert [row[name] for row in rates] == pytest.approx([rate for rate in by_epoch for _ in range(3)])


def test_nothing_is_divided_by_a_rate_of_zero():
    assert [epoch_cosine(0.0, 1e-5, 1, 3)(epoch) for epoch in range(2)] == [0.0, 1.0]


def test_everything_is_decayed_if_asked():
    groups, *_ = groups_of(Optimisation(weight_decay=0.5, decay_all=True))
    assert {name: (len(group["params"]), group["weight_decay"]) for name, group in groups.items()} == {
        "adapter, decayed": (2, 0.5),
        "head, decayed": (2, 0.5),
    }


LOW_RANK = [
    (vp.LoRA(rank=2), "B"),
    (vp.DoRA(rank=2), "B"),
    (vp.AdaLoRA(rank=2, initial_rank=2), "P"),
    (vp.VeRA(rank=2), "b"),
    (vp.UniPELT(rank=2, num_tokens=1, bottleneck=2), "B"),
]


@pytest.mark.parametrize(("method", "name"), LOW_RANK)
def test_lora_plus_is_a_rate_for_the_output_side(method, name):
    model = vp.create_backbone("test_vit", pretrained=False, num_classes=4, img_size=32)
    vp.attach(model, [method, vp.SSF()])
    trainable, head = vp.trainable_parameters(model), model.peft["default"].head_parameters()
    optimisation = Optimisation(lr=0.1, head_lr=0.3, weight_decay=0.5, lora_plus=16)
    groups = parameter_groups(trainable, head, optimisation, 64, output_side(model))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(trainable)
    found = {"head": set(), "fast": set(), "slow": set()}
    for path, parameter in model.peft["default"].named_parameters():
        fast = path.rpartition(".")[2] == name
        found["head" if path.startswith("head") else "fast" if fast else "slow"].add(rates[id(parameter)])
    assert found == {"head": {0.3}, "fast": {1.6}, "slow": {0.1}}
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert all(decayed[id(p)] == (0.5 if p.ndim > 1 else 0.0) for p in trainable)


def test_lora_plus_of_one_leaves_the_groups_as_they_are():
    model = vp.create_backbone("test_vit", pretrained=False, num_classes=4, img_size=32)
    vp.attach(model, vp.LoRA(rank=2))
    groups = parameter_groups(vp.trainable_parameters(model), [], Optimisation(), 64, output_side(model))
    assert [group["name"] for group in groups] == ["adapter, decayed", "adapter, not decayed"]


def test_lora_plus_without_low_rank_changes_is_refused():
    model = vp.create_backbone("test_vit", pretrained=False, num_classes=4, img_size=32)
    vp.attach(model, vp.SSF())
    with pytest.raises(vp.ConfigurationError, match="lora_plus is about the rate of LoRA's B"):
        parameter_groups(vp.trainable_parameters(model), [], Optimisation(lora_plus=8), 64, output_side(model))


def test_eps_is_that_of_adamw():
    groups, *_ = groups_of(Optimisation())
    assert build_optimizer(list(groups.values()), Optimisation(eps=1e-4)).defaults["eps"] == 1e-4


def test_cosine_by_epoch_is_that_of_mmcv():
    """Its hooks, step by step: the rate of the epoch is set, and while warming up scaled down by 1 - k."""
    epochs, steps, warmup, lr = 30, 8, 2.5, 3e-4
    expected = []
    for epoch in range(epochs):
        regular = 0 + (lr - 0) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for inner in range(steps):
            step = epoch * steps + inner
            k = (1 - step / (warmup * steps)) * (1 - 0.1) if step < warmup * steps else 0
            expected.append(regular * (1 - k))
    assert expected[0] == pytest.approx(0.1 * lr)
    assert expected[20] == pytest.approx(lr * 0.5 * (1 + math.cos(math.pi * 2 / 30)))
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimisation = Optimisation(lr=lr, schedule="cosine_by_epoch", warmup_epochs=warmup)
    optimizer = build_optimizer([{"params": [parameter], "lr": lr}], optimisation)
    schedule = build_schedule(optimizer, optimisation, Steps((steps,) * epochs, steps * epochs))
    found = []
    for _ in expected:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(expected, rel=1e-12)
    plain = warmup_cosine(round(warmup * steps), steps * epochs)
    assert max(abs(lr * plain(step) - rate) for step, rate in enumerate(expected)) > 0.05 * lr
    with pytest.raises(vp.ConfigurationError, match="warmup_ratio"):
        Optimisation(warmup_ratio=1.5)


def test_biases_may_decay_without_the_norms_of_the_backbone():
    """As AIM's authors have it: their list of what does not decay names the norms and the frozen embeddings."""
    task = vp.tasks.VideoClassification(
        vp.AIM(num_frames=2),
        ["a", "b"],
        backbone_kwargs={"img_size": 32},
        num_frames=2,
        optimisation=Optimisation(weight_decay=0.05, decay_biases=True),
    )
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}

    def decayed(optimisation):
        groups = parameter_groups(
            task.trained_parameters(), task.head_parameters(), optimisation, 64, norms=task.norm_parameters()
        )
        return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}

    found = decayed(task.optimisation)
    assert {name for name, decay in found.items() if not decay} == {
        "peft.default.trained.backbone.norm.weight",
        "peft.default.trained.backbone.norm.bias",
    }
    assert found["peft.default.aim.visual.tokens.embedding"] == found["peft.default.head.1.bias"] == 0.05
    biases = [name for name in found if name.endswith(("down.bias", "up.bias"))]
    assert biases
    assert not any(decayed(Optimisation(weight_decay=0.05))[name] for name in biases)
    assert all(decayed(Optimisation(weight_decay=0.05, decay_all=True)).values())
