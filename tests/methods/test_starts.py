"""Where methods start, as their published code starts."""

import math

import pytest
import torch
from conftest import distance
from reference.hosts import HOSTS

import visionpeft as vp
from visionpeft.methods.prefix_tuning import Reparameterisation

HOST = next(host for host in HOSTS if host.name == "vit_cls")


def mean_cosine(tokens):
    """Of all pairs of different tokens (number, width)."""
    unit = torch.nn.functional.normalize(tokens, dim=1)
    cosines = unit @ unit.T
    return (cosines.sum() - cosines.trace()).item() / (len(tokens) * (len(tokens) - 1))


def test_prefixes_of_an_mlp_start_apart():
    """On the width of ViT-B/16: tokens from the published N(0, 1) have nothing in common, from N(0, .02) nearly all."""
    torch.manual_seed(0)
    source = Reparameterisation(num_tokens=20, width=768, hidden=512, num_blocks=2)
    assert source.embedding.std().item() == pytest.approx(1.0, rel=0.03)
    with torch.no_grad():
        for keys_or_values in source(1):
            assert abs(mean_cosine(keys_or_values)) < 0.05
        source.embedding.mul_(0.02)
        for keys_or_values in source(1):
            assert mean_cosine(keys_or_values) > 0.85
    plain = vp.attach(HOST.build(), vp.PrefixTuning(num_tokens=50)).peft["default"]
    for index, block in plain.prefix_tuning.visual.items():
        assert block["kv"].keys.std().item() == pytest.approx(0.02, rel=0.1), index


def test_compacter_starts_as_released():
    """A with the standard deviation of the released configurations, u and v within the bound of Glorot times sqrt 2."""
    torch.manual_seed(0)
    model = HOST.build(torch.float64)
    inputs = HOST.inputs(dtype=torch.float64)
    with torch.no_grad():
        plain = model.eval()(inputs)
        vp.attach(model, vp.Compacter(bottleneck=16, terms=8, rank=2), head=False)
        part = model.peft["default"].compacter.visual
        assert part.rule.A.std().item() == pytest.approx(1e-4, rel=0.1)
        for fans, matrix in {(2, 4): part["0"].attn_out.down.v, (2, 2): part["0"].attn_out.down.u}.items():
            bound = math.sqrt(2) * math.sqrt(6 / sum(fans))
            assert matrix.shape[1:] == fans
            assert 0.85 * bound < matrix.abs().max().item() <= bound  # without the gain, at most .71 of it
        assert 0 < distance(model.eval()(inputs), plain) < 1e-5
        part.rule.A.mul_(100)  # as by the code's own default, 0.01
        assert distance(model.eval()(inputs), plain) > 1e-3
