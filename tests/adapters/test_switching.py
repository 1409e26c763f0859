"""Adapters that have acted before are put in force at once: as if anew, and anew where the model was changed."""

import copy
import pickle

import pytest
import timm
import torch
from conftest import CASES, FEW_HOSTS, MECHANISMS, adapted, adapter_tensors, anatomy, output_of, randomise
from reference.hosts import HOSTS
from torch import nn

import visionpeft as vp
from visionpeft.adapters import install, routes, selfcheck
from visionpeft.adapters.installation import Installation

HOST = next(host for host in HOSTS if host.name == "vit_cls")
CASE = {case.name: case for case in CASES}


@pytest.fixture
def described(monkeypatch):
    """The models that were described since, in order."""
    found, describe = [], install.describe
    monkeypatch.setattr(install, "describe", lambda model: found.append(model) or describe(model))
    return found


def two(host=HOST, method=None):
    """A model with two adapters that differ."""
    model = host.build()
    for seed, name in enumerate("ab"):
        vp.attach(model, method or vp.LoRA(rank=2), name)
        randomise(model.peft[name], seed)
    return vp.activate(model, "a").eval()


@pytest.mark.parametrize("case", [CASE[name] for name in (*MECHANISMS, "ssf", "vpt_shallow")], ids=repr)
@pytest.mark.parametrize("host", FEW_HOSTS, ids=repr)
def test_switching_back_is_as_if_anew(host, case, described):
    model = adapted(host, case)
    before, output, plain = anatomy(model), output_of(host, model), None
    del described[:]
    for _ in range(3):
        with vp.use(model, None):
            plain = output_of(host, model) if plain is None else plain
            assert torch.equal(output_of(host, model), plain)
        assert anatomy(model) == before
        assert torch.equal(output_of(host, model), output)
    assert not described
    model.peft.forget()
    vp.activate(model, "default")
    assert described
    assert anatomy(model) == before
    assert torch.equal(output_of(host, model), output)
    assert not torch.equal(plain, output)


@pytest.mark.parametrize("method", [vp.LoRA(rank=2), vp.Adapter(bottleneck=4), vp.PrefixTuning(num_tokens=2)], ids=repr)
def test_other_rows_of_the_same_adapters(method, monkeypatch):
    """Only the rows are chosen anew, and each gets its adapter; also in a batch of another size.

    The model is described once for all routes, and so it is after adapters were put in force without one.
    """
    model, images = two(method=method), HOST.inputs(6)
    alone, described = {}, []
    describe = routes.describe
    monkeypatch.setattr(routes, "describe", lambda model: described.append(model) or describe(model))
    with torch.no_grad():
        for name in "ab":
            with vp.use(model, name):
                alone[name] = model(images)
        for names in ("abab", "baab", "abbbab", "abab"):
            with vp.route(model, [*names]):
                routed = model(images[: len(names)])
            expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
            torch.testing.assert_close(routed, expected, rtol=1e-5, atol=1e-5)
            with pytest.raises(vp.ConfigurationError, match="names an adapter for each"), vp.route(model, [*names]):
                model(images[:1])
            with vp.use(model, None):
                pass
    assert len(described) == 1


def replace_mlp(model):
    model.blocks[1].mlp = copy.deepcopy(model.blocks[1].mlp)


def replace_class(model):
    model.blocks[1].norm1.__class__ = type("Own", (type(model.blocks[1].norm1),), {})


def replace_inside_adapter(model):
    part = model.peft["a"].get_submodule("lora.visual.1")
    part.q = copy.deepcopy(part.q)


@pytest.mark.parametrize("change", [replace_mlp, replace_class, replace_inside_adapter])
def test_a_model_changed_by_hand_is_described_anew(change, described):
    model = two(method=vp.LoRA(rank=2, targets=("q", "fc1")))
    with vp.use(model, "b"):
        pass
    output = output_of(HOST, model)
    vp.disable(model)
    change(model)
    del described[:]
    vp.activate(model, "a")
    assert described
    if change is replace_mlp:  # in which the adapter acts as in the one before
        assert torch.equal(output_of(HOST, model), output)


def test_without_looking_an_adapter_would_be_dead(monkeypatch):
    """Negative control of the test before this one."""
    model = two(method=vp.LoRA(rank=2, targets=("q", "fc1")))
    output = output_of(HOST, model)
    vp.disable(model)
    replace_mlp(model)
    monkeypatch.setattr(Installation, "holds", lambda *_: True)
    vp.activate(model, "a")
    assert not torch.equal(output_of(HOST, model), output)


def test_an_exchanged_head_is_refused_as_the_first_time():
    model = two()
    with vp.use(model, None):
        own = output_of(HOST, model)
    vp.disable(model)
    model.reset_classifier(3)
    with pytest.raises(vp.ConfigurationError, match="'head' of the model was exchanged"):
        vp.activate(model, "a")
    assert model.peft.active == ()
    assert output_of(HOST, model).shape == (2, 3) != own.shape


def test_a_parameter_of_another_shape_is_refused_as_the_first_time():
    model = vp.attach(HOST.build(), vp.LoRA(rank=2), train=["pos_embed"])
    vp.disable(model)
    model.set_input_size((64, 64))
    with pytest.raises(vp.ConfigurationError, match="'pos_embed' of the model was exchanged"):
        vp.activate(model, "default")
    assert model.peft.active == ()


@pytest.mark.parametrize("made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_decides_for_its_own_modules(made):
    model = two()
    with vp.use(model, "b"):
        output = output_of(HOST, model)
    twin = made(model)
    with torch.no_grad():
        for tensor in adapter_tensors(twin, "b").values():
            tensor.zero_()
    with vp.use(model, "b"):
        assert torch.equal(output_of(HOST, model), output)
    with vp.use(twin, "b"):
        assert not torch.equal(output_of(HOST, twin), output)


def test_what_is_frozen_follows_what_acts():
    """Also of an adapter whose parameters somebody has exchanged while it rested."""
    model = two()
    with vp.use(model, "b"):
        part = model.peft["b"].get_submodule("lora.visual.0.q")
        assert part.A.requires_grad
        assert not any(parameter.requires_grad for parameter in model.peft["a"].parameters())
        part.A = nn.Parameter(part.A.detach().clone())
    assert not any(parameter.requires_grad for parameter in model.peft["b"].parameters())
    assert all(parameter.requires_grad for parameter in model.peft["a"].parameters())


def test_many_combinations_are_not_kept_for_ever():
    model = two()
    for index in range(install.MOST_KEPT + 5):
        vp.attach(model, vp.LoRA(rank=1), f"n{index}", head=False)
        vp.activate(model, f"n{index}")
    assert len(model.peft.installations) <= install.MOST_KEPT
    vp.detach(model, "n0")
    assert len(model.peft.installations) == 1


# The check of blocks


@pytest.fixture
def checked(monkeypatch):
    """The checks of blocks that were made since."""
    found, check = [], selfcheck._check_block
    monkeypatch.setattr(selfcheck, "_check_block", lambda *args: found.append(args) or check(*args))
    return found


def test_blocks_that_stay_what_they_are_are_checked_once(checked, tmp_path):
    model = vp.attach(HOST.build(), vp.LoRA(rank=2))
    vp.save(model, tmp_path)
    assert len(checked) == 1
    for index in range(3):
        vp.load(model, tmp_path, name=f"n{index}")
    assert len(checked) == 1
    vp.attach(model, vp.Adapter(bottleneck=4), "other sites")
    assert len(checked) == 2


def set_flag(model):
    model.blocks[0].attn.fused_attn = not model.blocks[0].attn.fused_attn


def write_to_weight(model):
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)


def exchange_forward(model):
    model.blocks[0].mlp.act.forward = torch.nn.functional.relu


@pytest.mark.parametrize("change", [set_flag, write_to_weight, exchange_forward])
def test_changed_blocks_are_checked_again(change, checked):
    model = vp.attach(HOST.build(), vp.LoRA(rank=2))
    vp.disable(model)
    change(model)
    vp.attach(model, vp.LoRA(rank=2), "again")
    assert len(checked) == 2


def test_the_head_is_that_of_the_active_adapter():
    """Of two adapters with heads, that of the one that acts, whichever was attached last; and the model's for none."""
    model = timm.create_model("test_vit", img_size=32, num_classes=3).eval()
    vp.attach(model, vp.LoRA(rank=2), "first")
    vp.attach(model, vp.LoRA(rank=2), "last")
    heads = {name: torch.nn.init.normal_(model.peft[name].get_submodule("head").bias) for name in ("first", "last")}
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad(), vp.use(model, None):
        plain = model(images) - model.head.bias
    for name, bias in heads.items():
        with torch.no_grad(), vp.use(model, name):
            torch.testing.assert_close(model(images), plain + bias)
