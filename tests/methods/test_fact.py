"""FacT: the shared factors, their start, and layers that are no multiple of the token width."""

import dataclasses

import pytest
import torch
from conftest import distance, randomise
from reference import edits_of, forward, shapes_of
from reference.hosts import HOSTS, Host, vit

import visionpeft as vp

BY_NAME = {host.name: host for host in HOSTS}


@pytest.mark.parametrize("decomposition", ["tt", "tk"])
@pytest.mark.parametrize("ratio", [2.75, 0.5])
def test_layers_of_any_width(decomposition, ratio):
    """The last part of a wider layer is cut, so that MLPs of any width work; output and merged output agree."""
    host = Host(f"vit_{ratio}", lambda: vit(mlp_ratio=ratio))
    method = vp.FacT(3, decomposition, scale=0.7)
    model = vp.attach(host.build(torch.float64), method, head=False)
    randomise(model.peft["default"])
    tensors = {name: p.detach() for name, p in model.peft["default"].named_parameters()}
    inputs, plain = host.inputs(dtype=torch.float64), host.build(torch.float64)
    expected = forward(plain, inputs, edits_of(tensors, {"fact": dataclasses.asdict(method)}, shapes_of(plain)))
    with torch.no_grad():
        assert distance(model.eval()(inputs), expected) < 1e-11
        assert distance(vp.merge(model)(inputs), expected) < 1e-11


def test_blocks_share_their_factors_and_towers_do_not():
    """One U and V for each tower; moving them moves every layer."""
    model = BY_NAME["clip_whole"].build()
    vp.attach(model, vp.FacT(2, towers=["visual", "text"]))
    names = [name for name, _ in model.peft["default"].named_parameters()]
    assert sorted(name for name in names if name.endswith((".U", ".V"))) == sorted(
        f"fact.{tower}.factors.{factor}" for tower in ("visual", "text") for factor in "UV"
    )
    assert sum(name.endswith(".S") for name in names) == 2 * 3 * 6


def test_start():
    """V is zero, U uniform like a linear layer, the core and P Xavier-uniform over all parts of the tower."""
    model = vp.attach(BY_NAME["vit_cls"].build(), vp.FacT(8, "tk"))
    tensors = dict(model.peft["default"].named_parameters())
    # mlp_ratio 2: four square matrices, and two parts each in fc1 and fc2
    bounds = {"U": 32**-0.5, "core": (6 / (2 * 8 * 8)) ** 0.5, "P": (6 / (8 + 3 * 8)) ** 0.5}
    for letter, bound in bounds.items():
        values = torch.cat([p.detach().flatten() for name, p in tensors.items() if name.endswith(f".{letter}")])
        assert 0.9 * bound < values.abs().max() <= bound, letter
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.15), letter
    assert not tensors["fact.visual.factors.V"].any()
    model = vp.attach(BY_NAME["vit_cls"].build(), vp.FacT(8))
    blocks = model.peft["default"].fact.visual
    for site, columns in (("q", 1), ("fc1", 1), ("fc2", 2)):
        S, bound = blocks["0"][site].S, (columns * 8) ** -0.5
        assert 0.9 * bound < S.abs().max() <= bound


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"decomposition": "cp"}, {"targets": ("patch_embed",)}, {"targets": ()}, {"dropout": -0.1}]
)
def test_refused_options(options):
    with pytest.raises(vp.ConfigurationError):
        vp.FacT(**options)
