"""What only LoRA's options, starts and relatives do: their scale, what they start from, what they save."""

import dataclasses
import math

import pytest
import torch
from conftest import adapter_tensors, distance, randomise
from reference.hosts import HOSTS
from safetensors.torch import load_file

import visionpeft as vp

HOST = {host.name: host for host in HOSTS}["vit_cls"]
INPUTS = HOST.inputs(3, torch.float64)


def output_of(model):
    with torch.no_grad():
        return model.eval()(INPUTS)


def attached(method, moved=True):
    torch.manual_seed(0)
    model = vp.attach(HOST.build(torch.float64), method, head=False)
    if moved:
        randomise(model.peft["default"])
    return model.eval()


def weight_of(model, block=0):
    return model.blocks[block].attn.qkv.weight.detach()[:32]


def change_of(method, moved=True):
    """The change of q of the first block, with the weight it is a change of."""
    model = attached(method, moved)
    before = weight_of(model).clone()
    vp.merge(model)
    return weight_of(model) - before, before


# options of LoRA


def test_rank_stabilised_scale_is_divided_by_the_root_of_the_rank():
    wanted = attached(vp.LoRA(rank=4, alpha=6 * 2, targets=("q",), overrides={"1": 1}))
    model = attached(vp.LoRA(rank=4, alpha=6, targets=("q",), overrides={"1": 1}, rank_stabilised=True))
    modules = [model.peft["default"].get_submodule(f"lora.visual.{index}.q") for index in (0, 1)]
    assert [module.scaling for module in modules] == [6 / math.sqrt(4), 6 / math.sqrt(1)]
    assert modules[0].scaling == wanted.peft["default"].get_submodule("lora.visual.0.q").scaling
    vp.combine(model, {"default": 0.5}, "halved")  # keeps the scale in B
    assert not model.peft["halved"].methods[0].rank_stabilised
    a, b = (model.peft[name].get_submodule("lora.visual.1.q") for name in ("default", "halved"))
    assert torch.allclose(b.scaling * b.B @ b.A, 0.5 * 6 * a.B @ a.A, atol=1e-14)


def test_a_scale_that_nothing_is_divided_by_is_refused():
    with pytest.raises(vp.ConfigurationError, match="^LoRA: rank_stabilised divides alpha"):
        vp.LoRA(rank_stabilised=True)


def test_frozen_a_stays_and_is_saved(tmp_path):
    """B alone moves, and starts from the very A of LoRA; the file has A, so that it does not depend on a seed."""
    model = attached(vp.LoRA(rank=2, train_A=False), moved=False)
    other = attached(vp.LoRA(rank=2), moved=False)
    before, own = adapter_tensors(model), adapter_tensors(other)
    assert all(torch.equal(before[name], own[name]) for name in own)
    frozen = {name: tensor.clone() for name, tensor in before.items() if name.endswith(".A")}
    assert frozen and not any(tensor.requires_grad for name, tensor in before.items() if name in frozen)
    optimiser = torch.optim.SGD(vp.trainable_parameters(model), lr=0.1)
    model(INPUTS).square().sum().backward()
    optimiser.step()
    after = adapter_tensors(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert all(tensor.abs().sum() > 0 for name, tensor in after.items() if name.endswith(".B"))
    vp.save(model, tmp_path / "adapter")
    assert frozen.keys() < load_file(tmp_path / "adapter" / "adapter.safetensors").keys()
    loaded = HOST.build(torch.float64)
    vp.load(loaded, tmp_path / "adapter")
    assert torch.equal(output_of(loaded), output_of(model))


# starts from the weight


def start_of(method):
    """s B0 A0 of q of the first block, and its weight."""
    model = attached(method, moved=False)
    module = model.peft["default"].get_submodule(f"{method.name}.visual.0.q")
    return module.scaling * module.U_start @ module.V_start, weight_of(model), module


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_pissa_takes_the_largest_singular_values(alpha):
    part, weight, module = start_of(vp.PiSSA(rank=3, alpha=alpha))
    values = torch.linalg.svdvals(weight)
    assert torch.allclose(torch.linalg.svdvals(weight - part)[:-3], values[3:], rtol=1e-10)
    assert torch.allclose(torch.linalg.svdvals(part)[:3], values[:3], rtol=1e-10)
    # both factors share the values evenly
    assert torch.allclose(module.U_start.norm(dim=0), module.V_start.norm(dim=1), rtol=1e-10)
    other, _, _ = start_of(vp.OLoRA(rank=3, alpha=alpha))
    assert not torch.allclose(torch.linalg.svdvals(weight - other)[:-3], values[3:], rtol=1e-2)


def test_olora_takes_the_first_columns():
    part, weight, module = start_of(vp.OLoRA(rank=3))
    assert (weight - part)[:, :3].norm() < 1e-12 * weight.norm()
    assert (weight - part)[:, 3:].norm() > 0.1 * weight.norm()
    assert torch.allclose(module.U_start.T @ module.U_start, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("kind", [vp.PiSSA, vp.OLoRA])
def test_a_start_changes_nothing_and_is_saved_as_lora(kind, tmp_path):
    """To the bit at the start; the file is a LoRA of twice the rank with the same output, bit by bit."""
    method = kind(rank=2, alpha=3, targets=("q", "fc2"), overrides={"1/q": 1})
    model = HOST.build(torch.float32)
    images = HOST.inputs(2)
    plain = model.eval()(images).detach()
    vp.attach(model, method, head=False)
    assert torch.equal(model(images), plain)
    randomise(model.peft["default"])
    trained = model(images).detach()
    assert not torch.allclose(trained, plain, atol=1e-2)
    vp.save(model, tmp_path / "adapter")
    loaded = HOST.build(torch.float32)
    vp.load(loaded, tmp_path / "adapter")
    (saved,) = loaded.peft["default"].methods
    assert saved == vp.LoRA(rank=4, alpha=6, targets=("q", "fc2"), overrides={"1/q": 2})
    assert torch.equal(loaded.eval()(images), trained)


def test_a_part_larger_than_the_weight_is_refused():
    model = HOST.build()
    for method, sentence in ((vp.PiSSA(rank=33), "PiSSA: q has 32 components"), (vp.OLoRA(rank=33), "OLoRA: q has 32")):
        with pytest.raises(vp.ConfigurationError, match=f"^{sentence}"):
            vp.attach(model, method)
    with pytest.raises(vp.ConfigurationError, match="^PiSSA: alpha must be positive"):
        vp.PiSSA(alpha=-1.0)


# rotations


@pytest.mark.parametrize(
    "method", [vp.OFT(block=8, targets=("q",)), vp.BOFT(block=4, factors=4, targets=("q",))], ids=["oft", "boft"]
)
def test_a_rotation_keeps_lengths_angles_and_singular_values(method):
    """W W^T is W0 W0^T wherever Q is; of BOFT but for the scale of the rows. LoRA of the same size fails it."""
    model = attached(method)
    before = weight_of(model).clone()
    scale = getattr(model.peft["default"].get_submodule(f"{method.name}.visual.0.q"), "scale", torch.ones(32).double())
    vp.merge(model)
    after = weight_of(model) / scale.detach()[:, None]
    assert torch.allclose(after @ after.T, before @ before.T, atol=1e-12)
    assert not torch.allclose(after, before, atol=1e-2)
    change, before = change_of(vp.LoRA(rank=8, targets=("q",)))
    after = before + change
    assert not torch.allclose(after @ after.T, before @ before.T, atol=1e-2)


def test_each_factor_of_boft_doubles_what_a_feature_reaches():
    """R itself, read off a weight that is the identity."""
    for factors in (1, 2, 3, 4):
        module = vp.BOFT(block=4, factors=factors, targets=("q",))
        model = attached(module)
        rotation = model.peft["default"].get_submodule("boft.visual.0.q")
        torch.nn.init.ones_(rotation.scale)
        R, _ = rotation.merge(torch.eye(32, dtype=torch.float64), None)
        reached = {int(n) for n in (R.abs() > 1e-12).sum(1)}
        assert reached == {4 * 2 ** (factors - 1)}


def test_rotations_that_do_not_fit_are_refused():
    for method, sentence in (
        (vp.OFT(block=5), "OFT: q reads 32 features, which blocks of 5 do not divide"),
        (vp.BOFT(block=4, factors=5), "BOFT: q reads 32 features, but 5 factors with blocks of 4 connect groups of 64"),
    ):
        with pytest.raises(vp.ConfigurationError, match=f"^{sentence}"):
            vp.attach(HOST.build(), method)
    with pytest.raises(vp.ConfigurationError, match="blocks of an even size"):
        vp.BOFT(block=3, factors=2)
