"""Gated prompts among other prompts, at the ends of their gates and beyond the borders of their temperatures."""

import dataclasses

import pytest
import torch
from conftest import Case, distance, expected_output, randomise
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


READING_CLASS_TOKEN = ["vit_cls", "vit_registers", "eva_split", "clip_whole"]


def pooled(host, pooling):
    """A host with gated prompts off their start."""
    model = vp.attach(host.build(torch.float64), vp.GatedVPT(3, gate=0.5, dropout=0.0, pooling=pooling))
    randomise(model.peft["default"])
    return model.eval()


@pytest.mark.parametrize("name", READING_CLASS_TOKEN)
def test_mean_pooling_takes_prompts_in(name):
    """The reference's mean of prompts and patches and then the tower's own norm; the class token alone is far away."""
    host = BY_NAME[name]
    inputs, model = host.inputs(dtype=torch.float64), pooled(host, "mean")
    case = Case("mean", dataclasses.replace(model.peft["default"].methods[0]), image_only=True)
    with torch.no_grad():
        expected = expected_output(host, case, dict(model.peft["default"].state_dict()), inputs)
        assert distance(host.run(model, inputs), expected) < 1e-12
        assert distance(host.run(pooled(host, "model"), inputs), expected) > 0.01


def test_mean_pooling_is_the_pretrained_norm_of_the_mean():
    """Written out from the tokens after the last block; a mean of normalised tokens is another number."""
    host, seen = BY_NAME["vit_registers"], []
    inputs, model = host.inputs(dtype=torch.float64), pooled(host, "mean")
    removal = model.peft["default"].gated_vpt.visual["2"].stream_out
    removal.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = output_of(model, inputs)
    tokens = seen[0][:, 3:]  # without the class token and two registers
    assert tokens.shape[1] == 3 + model.patch_embed.num_patches
    mean = tokens.sum(dim=1) / tokens.shape[1]
    spread = ((mean - mean.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    normed = (mean - mean.mean(-1, keepdim=True)) / (spread + model.norm.eps) ** 0.5
    head = model.peft["default"].head
    expected = (normed * model.norm.weight + model.norm.bias) @ head.weight.T + head.bias
    assert distance(output, expected.detach()) < 1e-12
    others = {
        "patches alone": model.norm(tokens[:, 3:].mean(dim=1)),
        "normalised first": model.norm(tokens).mean(dim=1),
    }
    for features in others.values():
        assert distance((features @ head.weight.T + head.bias).detach(), expected.detach()) > 0.01


@pytest.mark.parametrize("name", ["vit_avg", "vit_map", "clip_visual"])
def test_mean_pooling_is_for_towers_that_read_the_class_token(name):
    model = BY_NAME[name].build()
    with pytest.raises(vp.UnsupportedError, match="pooling='mean' takes the place of the class token"):
        vp.attach(model, vp.GatedVPT(pooling="mean"))
    assert not hasattr(model, "peft")


def test_refused_options():
    with pytest.raises(vp.ConfigurationError, match="pooling must be 'model' or 'mean', not 'avg'"):
        vp.GatedVPT(pooling="avg")
    with pytest.raises(vp.ConfigurationError, match="reach the last block"):
        vp.attach(BY_NAME["vit_cls"].build(), vp.GatedVPT(pooling="mean", blocks="first:2"))
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
