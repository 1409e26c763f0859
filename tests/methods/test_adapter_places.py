"""Before or after layer scale and drop path: where adapters on the branches of a block act."""

import pytest
import torch
from conftest import distance, randomise
from reference.hosts import HOSTS

import visionpeft as vp

HOST = next(host for host in HOSTS if host.name == "vit_registers")  # with layer scale


def adapted(placement, after_scaling, **scales):
    """A host whose layer scales are these, with adapters off their start."""
    model = HOST.build(torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            for name, value in scales.items():
                getattr(block, name).gamma.fill_(value)
    torch.manual_seed(3)
    vp.attach(model, vp.Adapter(4, placement, after_scaling=after_scaling), head=False)
    randomise(model.peft["default"])
    return model.eval()


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_with_layer_scale_places_differ_and_without_they_are_one(placement):
    """The tensors have the same names; layer scales of one make both places the same."""
    inputs = HOST.inputs(dtype=torch.float64)
    with torch.no_grad():
        for scale, same in ((1.0, True), (0.3, False)):
            before, after = (adapted(placement, each, ls1=scale, ls2=scale) for each in (False, True))
            states = [model.peft["default"].state_dict() for model in (before, after)]
            assert states[0].keys() == states[1].keys()
            assert (distance(before(inputs), after(inputs)) < 1e-12) == same


def test_adapter_sees_the_scaled_branch():
    """What it reads is the output of layer scale, prompts and class token included."""
    model, seen, scaled = adapted("pfeiffer", True, ls2=0.3), [], []
    vp.attach(model, vp.VPT(num_tokens=2, deep=False), name="prompts", head=False)
    part = model.peft["default"].adapter.visual["1"].mlp_out
    part.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.blocks[1].ls2.register_forward_hook(lambda module, args, output: scaled.append(output.detach()))
    with torch.no_grad():
        model(HOST.inputs(dtype=torch.float64))
    assert seen[0].shape == scaled[0].shape
    assert distance(seen[0], scaled[0]) < 1e-12


def test_a_dropped_branch_is_dropped_before_the_adapter():
    """Where drop path drops the branch of a sample, the adapter reads zeros and adds up(act(bias)), as in its code."""
    model = adapted("pfeiffer", True)
    for block in model.blocks:
        block.drop_path2 = torch.nn.Dropout(1.0)  # drops everything
        block.drop_path2.train()
    seen = []
    part = model.peft["default"].adapter.visual["0"].mlp_out
    part.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(HOST.inputs(dtype=torch.float64))
    assert not seen[0].any()


@pytest.mark.parametrize("placement", ["parallel", "pre", "adapter_plus"])
def test_other_places_have_no_branch_of_their_own(placement):
    with pytest.raises(vp.ConfigurationError, match="after_scaling is for placement houlsby and pfeiffer"):
        vp.Adapter(placement=placement, after_scaling=True)
