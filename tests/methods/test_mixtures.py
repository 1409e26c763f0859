"""Mixtures of experts: what holds of them beside their formulas."""

import pytest
import torch
from conftest import output_of, randomise
from reference.hosts import HOSTS

import visionpeft as vp
from visionpeft.errors import ConfigurationError

HOST = next(host for host in HOSTS if host.name == "vit_cls")
MIXED = {"molora": vp.MoLORA(experts=3, rank=2), "mov": vp.MoV(experts=3)}


def moved(method):
    """A host with a method attached, off its start."""
    torch.manual_seed(0)
    model = vp.attach(HOST.build(torch.float64), method).eval()
    randomise(model.peft["default"])
    return model


@pytest.mark.parametrize("name", MIXED)
def test_equal_experts_make_the_router_irrelevant(name):
    """Whatever it says, the shares add up to 1; experts that differ are weighed."""
    model = moved(MIXED[name])
    parameters = dict(model.peft.named_parameters())
    routers = [p for path, p in parameters.items() if path.endswith("router.weight")]
    changed = []
    for equal in (False, True):
        with torch.no_grad():
            for path, parameter in parameters.items():
                if equal and path.endswith((".A", ".B", ".scales")):
                    parameter.copy_(parameter[:1].expand_as(parameter))
            before = output_of(HOST, model, dtype=torch.float64)
            for router in routers:
                router.mul_(-3)
        changed.append((output_of(HOST, model, dtype=torch.float64) - before).norm() / before.norm())
    assert changed[0] > 1e-3
    assert changed[1] < 1e-13


@pytest.mark.parametrize("name", MIXED)
def test_a_token_is_weighed_by_itself(name):
    """What acts on one token does not depend on the others."""
    model = moved(MIXED[name])
    for _, placement in model.peft["default"].placements:
        module = placement.module
        read, given = (module.A.shape[2], module.B.shape[1]) if name == "molora" else [module.scales.shape[1]] * 2
        x, y = (torch.randn(2, 5, width, dtype=torch.float64) for width in (read, given))
        layer = placement.site != "hidden"
        with torch.no_grad():
            whole = module(x, y, None, None) if layer else module(x)
            alone = module(x[1:, 3:4], y[1:, 3:4], None, None) if layer else module(x[1:, 3:4])
        torch.testing.assert_close(whole[1:, 3:4], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (vp.MoLORA, {"experts": 0}, "experts must be a positive integer"),
        (vp.MoLORA, {"rank": 0}, "rank must be a positive integer"),
        (vp.MoLORA, {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        (vp.MoLORA, {"targets": ()}, "targets must be a list of names"),
        (vp.MoV, {"experts": -1}, "experts must be a positive integer"),
        (vp.MoV, {"targets": ("q",)}, "targets must be a list out of k, v, hidden"),
    ],
)
def test_refusals(kind, fields, sentence):
    with pytest.raises(ConfigurationError, match=f"^{kind.__name__}: {sentence}"):
        kind(**fields)
