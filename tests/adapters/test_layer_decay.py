"""Learning rates that decay from layer to layer reach adapters: as timm gives them to the blocks that they act in."""

import open_clip
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay

import visionpeft as vp
from visionpeft.adapters.trained import layer_distances
from visionpeft.tasks.optimisation import Optimisation, parameter_groups

MODELS = ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"]
SIZES = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}


def scales(model, groups):
    """lr_scale of each parameter by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", MODELS)
def test_as_timm_decays_the_block(name):
    """The right values are timm's own for the plain model, of which all parameters are trained."""
    plain = timm.create_model(name, **SIZES)
    expected = scales(plain, param_groups_layer_decay(plain, layer_decay=0.5))
    model = vp.attach(
        timm.create_model(name, **SIZES),
        [vp.LoRA(rank=2), vp.VPT(num_tokens=2)],
        train=["patch_embed", "blocks.1.norm1"],
    )
    vp.attach(model, vp.AdaptFormer(bottleneck=2), "other")
    vp.activate(model, "default")
    found = scales(model, param_groups_layer_decay(model, layer_decay=0.5))
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for path, scale in found.items():
        _, _, method, *rest = path.split(".")
        own = ".".join([method, *rest]) if method == "head" else ".".join(rest)
        if method in ("lora", "vpt"):
            own = f"blocks.{rest[1]}.norm1.weight"
        assert scale == expected[own], path
    assert len(set(found.values())) == 5
    optimiser = create_optimizer_v2(model, opt="sgd", lr=1.0, layer_decay=0.5)
    assert {group["lr_scale"] for group in optimiser.param_groups} == set(found.values())
    vp.detach(model)
    assert scales(model, param_groups_layer_decay(model, layer_decay=0.5)) == expected


def test_groups_of_the_tasks():
    """lr * decay ** distance, with `head_lr` for the head, whose distance is 0."""
    model = vp.attach(timm.create_model(MODELS[0], **SIZES), vp.LoRA(rank=2), train="norm")
    distance = layer_distances(model)
    trained = vp.trainable_parameters(model)
    assert distance.keys() == set(trained)
    optimisation = Optimisation(lr=0.1, head_lr=0.3, layer_decay=0.5)
    head = model.peft["default"].head_parameters()
    groups = parameter_groups(trained, head, optimisation, 64, distances=distance)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for index in range(3):
        factor = model.peft["default"].get_parameter(f"lora.visual.{index}.q.A")
        assert rates[id(factor)] == pytest.approx(0.1 * 0.5 ** (3 - index))
    assert rates[id(model.peft["default"].get_parameter("trained.norm.weight"))] == pytest.approx(0.05)
    assert {rates[id(p)] for p in head} == {0.3}
    # The negative control: without decay there is one rate for the adapter.
    groups = parameter_groups(trained, head, Optimisation(lr=0.1), 64, distances=distance)
    assert {group["lr"] for group in groups} == {0.1}


@pytest.mark.parametrize("decay", [0, -0.5, 1.5])
def test_decays_out_of_range(decay):
    with pytest.raises(vp.ConfigurationError, match="layer_decay lies in"):
        Optimisation(layer_decay=decay)


def test_nothing_to_decay():
    with pytest.raises(vp.ConfigurationError, match="leave it at 1"):
        parameter_groups([torch.nn.Parameter(torch.ones(1))], [], Optimisation(layer_decay=0.5), 64)


def test_shared_tensors_and_clip_towers():
    """What blocks share has the distance of the first of them; each tower counts its own blocks."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        text_cfg={"layers": 2, "width": 32, "heads": 2, "vocab_size": 50, "context_length": 8},
    )
    vp.attach(clip, vp.LoRA(rank=2, towers=["visual", "text"]))
    distance = layer_distances(clip)
    adapter = clip.peft["default"]
    assert [distance[adapter.get_parameter(f"lora.visual.{i}.q.A")] for i in range(3)] == [3, 2, 1]
    assert [distance[adapter.get_parameter(f"lora.text.{i}.q.A")] for i in range(2)] == [2, 1]
    model = vp.attach(timm.create_model(MODELS[0], **SIZES), vp.FacT(rank=2), head=False)
    assert set(layer_distances(model).values()) >= {3}
