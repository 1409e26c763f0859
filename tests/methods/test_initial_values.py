"""With which values methods start: drawn many at once, their mean, spread and bounds are those of the papers."""

import math

import pytest
import torch
from reference.hosts import HOSTS

import visionpeft as vp

HOST = {host.name: host for host in HOSTS}["vit_cls"]


def started(method, ending):
    """All first values of the parameters whose path ends so, of several models."""
    values = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = vp.attach(HOST.build(), method)
        values += [p.detach().flatten() for name, p in model.peft.named_parameters() if name.endswith(ending)]
    return torch.cat(values).double()


@pytest.mark.parametrize(
    ("method", "ending", "mean", "std"),
    [
        (vp.SSF(), ".scale", 1.0, 0.02),
        (vp.SSF(), ".shift", 0.0, 0.02),
        (vp.SSF(std=0.3), ".scale", 1.0, 0.3),
        (vp.VPT(num_tokens=8, init="normal"), ".prompts", 0.0, 0.02),
        (vp.MoLORA(experts=4), ".A", 0.0, 0.02),
        (vp.MoV(experts=4), ".router.weight", 0.0, 0.02),
    ],
    ids=["ssf_scale", "ssf_shift", "ssf_wide", "vpt_normal", "molora_a", "router"],
)
def test_normal(method, ending, mean, std):
    """Mean and standard deviation within five standard errors, and as far out as a normal distribution reaches."""
    values = started(method, ending)
    count = len(values)
    assert count > 1000
    assert abs(values.mean().item() - mean) < 5 * std / math.sqrt(count)
    assert abs(values.std().item() - std) < 5 * std / math.sqrt(2 * count)
    beyond = ((values - mean).abs() > 2 * std).double().mean().item()  # 4.55 % of a normal, none of a uniform one
    assert 0.03 < beyond < 0.06


@pytest.mark.parametrize(
    ("method", "ending", "bound"),
    [
        # patches of 8 x 8 pixels with 3 channels, width 32
        (vp.VPT(num_tokens=8), ".prompts", math.sqrt(6 / (3 * 8 * 8 + 32))),
        (vp.VQT(num_tokens=16), ".prompts", math.sqrt(6 / (3 * 8 * 8 + 32))),
        # Kaiming-uniform with a = sqrt(5) is 1 / sqrt(inputs)
        (vp.LoRA(rank=4), ".A", 1 / math.sqrt(32)),
        (vp.MixLoRA(rank=4), "fc1.A", 1 / math.sqrt(32)),
    ],
    ids=["vpt_uniform", "vqt_uniform", "lora_a", "mix_lora_a"],
)
def test_uniform(method, ending, bound):
    """Evenly between the bounds."""
    values = started(method, ending)
    assert len(values) > 1000
    assert 0.99 * bound < values.max() <= bound
    assert -bound <= values.min() < -0.99 * bound
    assert abs(values.mean().item()) < 5 * bound / math.sqrt(3 * len(values))
    assert abs(values.square().mean().item() - bound**2 / 3) < 5 * bound**2 * math.sqrt(4 / 45 / len(values))


def test_low_rank_changes_start_at_nothing():
    assert not started(vp.LoRA(rank=4), ".B").any()
