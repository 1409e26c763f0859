"""Gated prompts among other prompts, at the ends of their gates and beyond the borders of their temperatures."""

import dataclasses

import pytest
import torch
from conftest import distance, randomise
from reference.hosts import HOSTS

import visionpeft as vp

BY_NAME = {host.name: host for host in HOSTS}
HOST = BY_NAME["vit_registers"]
GATED = vp.GatedVPT(num_tokens=2, dropout=0.0)
OTHERS = [vp.VPT(num_tokens=3, deep=False), vp.VPT(num_tokens=1, deep=True), vp.VPT(4, deep=False, blocks="first:2")]


def gate_of(adapter, logit):
    """Set all gates of an adapter."""
    for name, parameter in adapter.named_parameters():
        if name.endswith("gate.logit"):
            parameter.data.fill_(logit)


def output_of(model, inputs=None):
    with torch.no_grad():
        return model.eval()(HOST.inputs(dtype=torch.float64) if inputs is None else inputs)


def stacked(*named):
    """A model with these (name, method), all active, each with its own noise, which its name decides."""
    model = HOST.build(torch.float64)
    for name, method in named:
        torch.manual_seed(sum(map(ord, name)))
        vp.attach(model, method, name=name, head=False)
        randomise(model.peft[name], seed=sum(map(ord, name)))
    vp.activate(model, [name for name, _ in named])
    return model


def closed(model, name="gated"):
    """Gates that let no block change the prompts, temperatures of one."""
    gate_of(model.peft[name], -torch.inf)
    for parameter_name, parameter in model.peft[name].named_parameters():
        if parameter_name.endswith("temperature"):
            parameter.data.fill_(1.0)
    return model


@pytest.mark.parametrize("others", [(), *((other,) for other in OTHERS), tuple(OTHERS[:2])], ids=repr)
@pytest.mark.parametrize("gated_first", [True, False])
def test_closed_gates_keep_the_prompts(others, gated_first):
    """With closed gates the prompts enter every block as they are, whatever other prompts travel beside them."""
    named = [(f"other{i}", method) for i, method in enumerate(others)]
    gated = ("gated", GATED)
    model = closed(stacked(*([gated, *named] if gated_first else [*named, gated])))
    twin = stacked(("deep", vp.VPT(2, deep=True)), *named)
    for parameter in twin.peft["deep"].parameters():
        parameter.data.copy_(model.peft["gated"].gated_vpt.visual["0"].stream_in.prompts)
    assert distance(output_of(model), output_of(twin)) < 1e-12


def test_gates_of_two_adapters_tell_their_prompts_apart():
    """Two gated sets in one model, one of them within the blocks of the other."""
    inner = dataclasses.replace(GATED, num_tokens=3, blocks="last:2")
    for names in (("a", "b"), ("b", "a")):
        model = stacked(*zip(names, (GATED, inner), strict=True))
        twin = stacked(("c", vp.VPT(2, deep=True)), ("d", vp.VPT(3, deep=True, blocks="last:2")))
        for name, other, block in zip(names, "cd", "01", strict=True):
            closed(model, name)
            for parameter in twin.peft[other].parameters():
                parameter.data.copy_(model.peft[name].gated_vpt.visual[block].stream_in.prompts)
        assert distance(output_of(model), output_of(twin)) < 1e-12


def test_open_gates_are_shallow_prompts():
    """With open gates and temperatures of one it is VPT-shallow."""
    model = closed(stacked(("gated", GATED)))
    gate_of(model.peft["gated"], torch.inf)
    twin = stacked(("shallow", vp.VPT(2, deep=False)))
    twin.peft["shallow"].vpt.visual["0"].stream_in.prompts.data.copy_(
        model.peft["gated"].gated_vpt.visual["0"].stream_in.prompts
    )
    assert distance(output_of(model), output_of(twin)) < 1e-12


def test_starts_with_closed_gates():
    """Logits start at -gate, temperatures at one, prompts within the bound of VPT."""
    model = vp.attach(BY_NAME["vit_cls"].build(), vp.GatedVPT(gate=5.0))
    tensors = {name: p for name, p in model.peft["default"].named_parameters() if not name.startswith("head.")}
    assert {p.item() for name, p in tensors.items() if name.endswith("logit")} == {-5.0}
    assert {p.item() for name, p in tensors.items() if name.endswith("temperature")} == {1.0}
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    assert 0.9 * bound < tensors["gated_vpt.visual.0.stream_in.prompts"].abs().max() <= bound


@pytest.mark.parametrize(("beyond", "border"), [(-3.0, 0.01), (0.0, 0.01), (25.0, 10.0)])
def test_temperatures_stay_within_their_borders(beyond, border):
    """Beyond a border a temperature counts as the border, with the gradient it has there, so that it can come back."""
    found = []
    for value in (beyond, border):
        model = stacked(("gated", GATED))
        temperature = model.peft["gated"].gated_vpt.visual["1"].kv.temperature
        temperature.data.fill_(value)
        output = model.eval()(HOST.inputs(dtype=torch.float64))
        output[:, 0].sum().backward()
        found.append((output.detach(), temperature.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert found[1][1].abs() > 1e-12
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-10)


def test_refused_options():
    for options in ({"num_tokens": 0}, {"dropout": 1.0}, {"init": "zeros"}):
        with pytest.raises(vp.ConfigurationError):
            vp.GatedVPT(**options)
    model = BY_NAME["vit_cls"].build()
    with pytest.raises(vp.ConfigurationError, match="consecutive"):
        vp.attach(model, vp.GatedVPT(blocks=[0, 2]))
    assert not hasattr(model, "peft")


@pytest.mark.parametrize("number", [2, 3])
def test_spans_that_overlap_in_part_are_refused(number):
    """Also where both have equally many prompts; nothing is changed."""
    model = HOST.build(torch.float64)
    vp.attach(model, dataclasses.replace(GATED, blocks="first:2"), name="first", head=False)
    before = output_of(model)
    with pytest.raises(vp.UnsupportedError, match="overlap in part"):
        vp.attach(model, vp.VPT(number, deep=False, blocks="last:2"), name="last", head=False)
    assert torch.equal(output_of(model), before)
