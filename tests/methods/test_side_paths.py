"""Side paths beside the blocks: what they carry from block to block, and what the backbone need not keep for them.

That they compute their formulas is tested with all methods; here are the properties that only they have.
"""

import pytest
import timm
import torch
from conftest import HOSTS, distance, expected_output, randomise

import visionpeft as vp
from visionpeft.costs.saved_bytes import saved_bytes, storages
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


def test_lst_trains_without_a_gradient_in_the_backbone():
    """No tokens that enter a block have one; with one tensor of a LoRA before them they all have."""
    model = model_with(vp.LST(4))
    seen, output = need_gradients(model)
    assert seen == [(False, False), (False, False), (False, True)]
    output.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.peft.parameters())
    beside = model_with(vp.LoRA(2, targets=("q",), blocks=[0]), vp.LST(4))
    assert need_gradients(beside)[0] == [(False, True), (True, True), (True, True)]


@pytest.mark.parametrize("openness", [-1000.0, 1000.0])
def test_lst_with_closed_gates_is_a_map_of_the_last_tokens(openness):
    """g = 0 and side blocks that add nothing leave D_L x_L, x_L the backbone's last tokens; g = 1 leaves D_0 x_0."""
    model = HOST.build(torch.float64)
    kept = []
    handles = [model.blocks[0].register_forward_pre_hook(lambda block, inputs: kept.append(inputs[0]))]
    handles.append(model.blocks[-1].register_forward_hook(lambda block, inputs, output: kept.append(output)))
    model(IMAGES)
    for handle in handles:
        handle.remove()
    vp.attach(model, vp.LST(4))
    randomise(model.peft["default"])
    tensors = dict(model.peft["default"].named_parameters())
    with torch.no_grad():
        for name, parameter in tensors.items():
            if name.endswith("gate"):
                parameter.fill_(openness)
            elif "block.attn.proj" in name or "block.mlp.fc2" in name:
                parameter.zero_()
    x, layer = (kept[1], "lst.visual.2.stream_in.down") if openness < 0 else (kept[0], "lst.visual.0.stream_in.start")
    s = x @ tensors[f"{layer}.weight"].T + tensors[f"{layer}.bias"]
    s = (s - s.mean(-1, keepdim=True)) / (s.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    s = s * tensors["lst.visual.2.stream_in.norm.weight"] + tensors["lst.visual.2.stream_in.norm.bias"]
    y = s @ tensors["lst.visual.2.stream_in.up.weight"].T + tensors["lst.visual.2.stream_in.up.bias"]
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    y = (y * model.norm.weight + model.norm.bias)[:, 0]
    assert distance(model(IMAGES), y @ tensors["head.weight"].T + tensors["head.bias"]) < 1e-9


@pytest.mark.parametrize(("method", "most"), [(vp.LST(8), 1.5), (vp.VQT(), 1.5), (vp.DTL(), 5.6), (vp.LoRA(2), None)])
def test_what_is_kept_for_the_backward_pass(method, most):
    """In tensors as wide as the tokens for each block, on twelve blocks; a LoRA keeps what all layers need."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=112, num_classes=5)
    vp.attach(model, method)
    images = torch.randn(2, 3, 112, 112)
    frozen = storages(model) | {images.untyped_storage().data_ptr()}
    kept, _ = saved_bytes(lambda: model(images).square().sum(), frozen)
    unit = 12 * 4 * 2 * 50 * 192
    assert kept / unit <= most if most else kept / unit > 9


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
        (lambda: vp.LST(ratio=0), "ratio must"),
        (lambda: vp.LST(ratio=16), "use a divisor of 8"),
        (lambda: vp.LST(4, temperature=0.0), "temperature"),
        (lambda: vp.LST(4, dropped=(3,)), "blocks 0 to 2"),
        (lambda: vp.LST(4, dropped=(0, 1, 2)), "no side block"),
    ],
    ids=["rank", "beta", "pooling", "first", "grid", "ratio", "heads", "temperature", "block", "none"],
)
def test_what_cannot_be_is_refused_in_words(method, words):
    with pytest.raises(ConfigurationError, match=words):
        vp.attach(HOST.build(), method())
