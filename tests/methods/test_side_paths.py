"""Side paths beside the blocks: what they carry from block to block, and what the backbone need not keep for them.

That they compute their formulas is tested with all methods; here are the properties that only they have.
"""

import pytest
import torch
from conftest import HOSTS, distance, expected_output, randomise

import visionpeft as vp
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites import Carrying

BY_HOST = {host.name: host for host in HOSTS}
HOST = BY_HOST["vit_cls"]
IMAGES = HOST.inputs(2, torch.float64)


def model_with(*methods, seed=1):
    """The host with adapters of these methods, all active, off their start."""
    model = HOST.build(torch.float64)
    for number, method in enumerate(methods):
        vp.attach(model, method, f"a{number}")
        randomise(model.peft[f"a{number}"], seed + number)
    return model.eval()


def need_gradients(model, images=IMAGES):
    """For each block, whether the tokens that enter it and those that leave it have gradients."""
    seen = []

    def look(block, inputs, output):
        tokens = [x.tokens if isinstance(x, Carrying) else x for x in (inputs[0], output)]
        seen.append(tuple(x.requires_grad for x in tokens))

    handles = [block.register_forward_hook(look) for block in model.blocks]
    output = model(images)
    for handle in handles:
        handle.remove()
    return seen, output


@pytest.mark.parametrize("first", [0, 1, 2])
def test_dtl_trains_without_a_gradient_in_the_first_blocks(first):
    """Nothing is differentiated up to block `first`, and still every B has a gradient at once, every A in step two."""
    model = vp.attach(HOST.build(torch.float64), vp.DTL(first=first), head=False)
    seen, output = need_gradients(model)
    assert seen == [(index > first, index >= first) for index in range(3)]
    optimizer = torch.optim.SGD(vp.trainable_parameters(model), lr=0.1)
    output.square().sum().backward()
    sizes = {name: p.grad.abs().max().item() for name, p in model.peft.named_parameters()}
    assert {name for name, size in sizes.items() if size > 0} == {name for name in sizes if name.endswith(".B")}
    optimizer.step()
    optimizer.zero_grad()
    model(IMAGES).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.peft.parameters())


def test_something_trained_before_dtl_keeps_its_gradient():
    """The tokens are not cut off: a LoRA in block 0 learns beside the side path, and images have a gradient."""
    model = model_with(vp.LoRA(2, blocks=[0]), vp.DTL(first=2))
    assert need_gradients(model)[0][0] == (False, True)
    images = IMAGES.clone().requires_grad_()
    vp.activate(model, "a1")
    seen, output = need_gradients(model, images)
    assert seen[0] == (True, True)
    output.square().sum().backward()
    assert images.grad.abs().max() > 0


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_dtl_without_steepness_is_linear_in_each_product(beta):
    """beta = 0 halves h, so that the tokens after the last block change in proportion to every A B."""
    model = HOST.build(torch.float64)
    model.norm, model.head = torch.nn.Identity(), torch.nn.Identity()  # what follows is not linear
    plain = model(IMAGES)
    vp.attach(model, vp.DTL(first=2, beta=beta))
    randomise(model.peft["default"])
    once = model(IMAGES) - plain
    with torch.no_grad():
        for name, parameter in model.peft.named_parameters():
            parameter *= 3 if name.endswith(".B") else 1
    difference = distance(model(IMAGES) - plain, 3 * once)
    assert difference < 1e-12 if beta == 0 else difference > 0.1


@pytest.mark.parametrize("convolution", [False, True])
def test_dtl_reads_the_mean_of_the_patches(convolution):
    """In the place of the class token, before the final norm, as the formula has it; only where that token is read."""
    method = vp.DTL(first=1, convolution=convolution, pooling="mean")
    model = vp.attach(HOST.build(torch.float64), method)
    randomise(model.peft["default"])
    case = type("Case", (), {"method": method, "sources": (), "on": lambda self, host: method})()
    tensors = dict(model.peft["default"].state_dict())
    assert distance(model(IMAGES), expected_output(HOST, case, tensors, IMAGES)) < 1e-12
    by_class_token = vp.attach(HOST.build(torch.float64), vp.DTL(first=1, convolution=convolution))
    by_class_token.peft["default"].load_state_dict(tensors)
    assert distance(by_class_token(IMAGES), model(IMAGES)) > 0.01
    with pytest.raises(UnsupportedError, match="reads other tokens"):
        vp.attach(BY_HOST["vit_avg"].build(), method)


# carrying


def test_two_side_paths_carry_their_own():
    """Two adapters together change the tokens by what each adds; their order of attaching does not matter."""
    methods = vp.DTL(first=2, beta=2.0), vp.DTL(3, first=2, beta=1.0, convolution=True)
    models = [model_with(*methods), model_with(*methods[::-1])]
    for index, name in enumerate(("a1", "a0")):
        models[1].peft[name].load_state_dict(models[0].peft[f"a{index}"].state_dict())
    vp.activate(models[1], ["a1", "a0"])
    outputs = []
    for model, names in ((models[0], ["a0", "a1"]), (models[1], ["a1", "a0"])):
        for name in names:
            model.peft[name].head.load_state_dict(models[0].peft["a0"].head.state_dict())
        outputs.append(model(IMAGES))
    assert distance(*outputs) < 1e-12
    with vp.use(models[0], "a0"):
        assert distance(models[0](IMAGES), outputs[0]) > 1e-3


def test_a_later_block_alone_is_refused():
    model = model_with(vp.DTL(first=1))
    tokens = torch.randn(2, 17, 32, dtype=torch.float64)
    assert isinstance(model.blocks[0](tokens), Carrying)
    with pytest.raises(UnsupportedError, match="call the whole model"):
        model.blocks[1](tokens)
    with vp.use(model, None):
        assert model.blocks[1](tokens).shape == tokens.shape


def test_intermediates_are_refused_and_come_back():
    model = model_with(vp.DTL(first=1))
    with pytest.raises(UnsupportedError, match="carried from block to block"):
        model.forward_intermediates(IMAGES)
    vp.detach(model)
    assert len(model.forward_intermediates(IMAGES, intermediates_only=True)) == 3


@pytest.mark.parametrize("first", ["shallow", "dtl"])
def test_shallow_prompts_beside_it_are_refused(first):
    """In either order, with nothing changed; deep prompts, which leave each block, are not."""
    named = {"shallow": vp.VPT(3, deep=False), "dtl": vp.DTL(first=1)}
    model = vp.attach(HOST.build(torch.float64), named.pop(first), "one")
    before = model(IMAGES)
    with pytest.raises(UnsupportedError, match="shallow prompts"):
        vp.attach(model, *named.values(), "two")
    assert torch.equal(model(IMAGES), before)
    assert [*model.peft] == ["one"]


def test_deep_prompts_do_not_enter_the_side_path():
    """They enter after it has read and leave before it adds: with a side path that adds nothing, as without it."""
    model = model_with(vp.VPT(3))
    alone = model(IMAGES)
    vp.attach(model, vp.DTL(first=1), "side", head=False)
    assert distance(model(IMAGES), alone) < 1e-12
    randomise(model.peft["side"])
    assert distance(model(IMAGES), alone) > 1e-3


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda: vp.DTL(rank=0), "rank"),
        (lambda: vp.DTL(beta=-1.0), "beta"),
        (lambda: vp.DTL(pooling="max"), "pooling"),
        (lambda: vp.DTL(first=3), "3 blocks"),
        (lambda: vp.DTL(grid=(0, 4)), "grid"),
    ],
    ids=["rank", "beta", "pooling", "first", "grid"],
)
def test_what_cannot_be_is_refused_in_words(method, words):
    with pytest.raises(ConfigurationError, match=words):
        vp.attach(HOST.build(), method())
