"""What is trained when adapters are switched, when the model is changed beneath them, and in which precision."""

import copy
import os

import pytest
import timm
import torch
from away_from_start import moved
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import visionpeft as vp
from visionpeft.adapters.adapters import has_adapters
from visionpeft.adapters.attach import register
from visionpeft.adapters.attached_adapter import AttachedAdapter
from visionpeft.backbones.whole_model import describe
from visionpeft.errors import ConfigurationError, UnsupportedError


def build(dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 5} | options
    return timm.create_model("vit_tiny_patch16_224", **options).eval().to(dtype)


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


def test_a_new_head_is_refused(tmp_path):
    """After `reset_classifier` what would train, save or bring back the old head is refused, until it is detached."""
    model = vp.attach(build(), vp.LoRA(rank=2))
    model.reset_classifier(7)
    for act in (
        lambda: vp.trainable_parameters(model),
        lambda: vp.save(model, tmp_path / "adapter"),
        lambda: vp.activate(model, "default"),
        lambda: vp.attach(model, vp.LoRA(rank=2), "other"),
        lambda: vp.merge(model),
    ):
        with pytest.raises(ConfigurationError, match=r"'head' of the model was exchanged after adapter 'default'"):
            act()
    assert not (tmp_path / "adapter").exists()
    vp.detach(model)
    assert model(IMAGES).shape == (4, 7)
    assert all(parameter.requires_grad for parameter in model.parameters())
    vp.attach(model, vp.LoRA(rank=2))
    assert {tuple(p.shape) for p in vp.trainable_parameters(model)} >= {(7, 32), (7,)}


def test_a_head_that_is_not_trained_may_be_changed():
    """The negative control: an adapter without a head has no copy that could be the wrong one."""
    model = vp.attach(build(), vp.LoRA(rank=2), head=False)
    model.reset_classifier(7)
    assert vp.trainable_parameters(model)
    with vp.use(model, None):
        assert model(IMAGES).shape == (4, 7)


def test_a_new_head_of_a_merged_model_stays():
    """Detaching brings back the weights and leaves the head that the model was given since."""
    model, plain = vp.attach(build(), vp.LoRA(rank=2)), build()
    vp.merge(model).reset_classifier(7)
    with pytest.raises(ConfigurationError, match="'head' of the model was exchanged"):
        vp.unmerge(model)
    vp.detach(model)
    assert model(IMAGES).shape == (4, 7)
    assert torch.equal(model.forward_features(IMAGES), plain.forward_features(IMAGES))


def test_an_input_size_cannot_change_what_is_trained():
    """`set_input_size` resamples `pos_embed`; refused before anything is changed while a copy of it is trained."""
    model, plain = vp.attach(build(), vp.LoRA(rank=2), train="pos_embed"), build()
    with torch.no_grad():
        model.pos_embed.add_(1)
    expected = model(IMAGES)
    with pytest.raises(UnsupportedError, match="while an adapter trains pos_embed"):
        model.set_input_size(64)
    with pytest.raises(UnsupportedError, match="cannot change its shape"):
        model.pos_embed = torch.nn.Parameter(torch.zeros(1, 17, 32))
    assert torch.equal(model(IMAGES), expected)
    vp.detach(model)
    assert vars(model).keys() == vars(plain).keys()
    assert model.patch_embed.img_size == plain.patch_embed.img_size
    assert torch.equal(model(IMAGES), plain(IMAGES))


def test_an_input_size_changed_in_between_is_refused(tmp_path):
    """While the adapter is off, the library changes the size, and the copy no longer fits."""
    model = vp.attach(build(), vp.LoRA(rank=2), train="pos_embed")
    vp.disable(model).set_input_size(64)
    for act in (lambda: vp.activate(model, "default"), lambda: vp.save(model, tmp_path)):
        with pytest.raises(ConfigurationError, match="'pos_embed' of the model was exchanged"):
            act()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_an_input_size_may_change_what_is_not_trained():
    """The negative control: the plain model of the new size computes the same at the start."""
    model, plain = vp.attach(build(), vp.LoRA(rank=2), train="norm"), build()
    images = torch.randn(2, 3, 64, 64)
    for each in (model, plain):
        each.set_input_size(64)
    assert torch.allclose(model(images), plain(images), atol=1e-6)
    assert vp.trainable_parameters(model)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of(model, *names, head):
    """Names of the parameters of adapters, with the head of one of them."""
    heads = {f"peft.{head}.head.weight", f"peft.{head}.head.bias"}
    every = {name for name, _ in model.named_parameters()}
    return {n for n in every if n.startswith(tuple(f"peft.{a}.lora" for a in names))} | heads


def test_what_acts_is_what_requires_gradients():
    """Also while adapters act together, of which the last one's head is used, and while a batch is routed."""
    model = build()
    for name in ("a", "b", "c"):
        vp.attach(model, vp.LoRA(rank=2), name)
    frozen = "peft.b.lora.visual.0.q.A"
    model.get_parameter(frozen).requires_grad_(False)  # by the user, which no switching forgets
    assert trainable(model) == of(model, "a", "b", "c", head="c") - {frozen}
    vp.activate(model, "b")
    assert trainable(model) == of(model, "b", head="b") - {frozen}
    with vp.use(model, ["b", "a"]):
        assert trainable(model) == of(model, "a", "b", head="a") - {frozen}
    with vp.use(model, None):
        assert trainable(model) == set()
    with vp.route(model, ["a", None, "c", "a"]):
        assert trainable(model) == of(model, "a", head="a") | of(model, "c", head="c")
    assert trainable(model) == of(model, "b", head="b") - {frozen}
    twin = copy.deepcopy(model)
    assert trainable(vp.activate(twin, ["a", "b"])) == of(model, "a", "b", head="b") - {frozen}
    vp.detach(model)
    assert trainable(model) == {name for name, _ in build().named_parameters()}


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("together", [False, True])
def test_ddp_with_two_adapters(one_process, together):
    """Three steps under DDP, which refuses a step when a parameter with requires_grad got no gradient in the last."""
    model = build()
    for name in ("a", "b"):
        vp.attach(model, vp.LoRA(rank=2), name)
    if not together:
        vp.activate(model, "a")
    parallel, optimiser = DistributedDataParallel(model), torch.optim.SGD(vp.trainable_parameters(model), lr=0.1)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(parallel(IMAGES), LABELS)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_ddp_notices_a_parameter_without_gradient(one_process):
    """The negative control: as it was, with an inactive adapter that requires gradients."""
    model = build()
    for name in ("a", "b"):
        vp.attach(model, vp.LoRA(rank=2), name)
    vp.activate(model, "a").peft["b"].requires_grad_(True)
    parallel = DistributedDataParallel(model)
    parallel(IMAGES).sum().backward()
    with pytest.raises(RuntimeError, match="did not receive grad"):
        parallel(IMAGES)


TRAIN = ("cls_token", "norm", "blocks.0.norm1", "blocks.1.attn.qkv.bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_backbones_train_in_float32(dtype):
    """Small steps are not rounded away, as they are in the backbone's own precision, and AdamW gives numbers."""
    model, exact = build(dtype), build().requires_grad_(False)
    exact.load_state_dict(model.state_dict())
    for each in (model, exact):
        torch.manual_seed(1)
        vp.attach(each, vp.LoRA(rank=2), train=TRAIN)
    assert {p.dtype for p in vp.trainable_parameters(model)} == {torch.float32}
    start = [p.detach().clone() for p in vp.trainable_parameters(model)]
    moved = []
    for each, images in ((model, IMAGES.to(dtype)), (exact, IMAGES)):
        optimiser = torch.optim.AdamW(vp.trainable_parameters(each), lr=1e-5, weight_decay=0)
        for _ in range(10):
            output = each(images)
            assert output.dtype == images.dtype
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(output.float(), LABELS).backward()
            optimiser.step()
        moved.append([(p - s).norm().item() for p, s in zip(vp.trainable_parameters(each), start, strict=True)])
    for low, full in zip(*moved, strict=True):
        assert 0.7 * full < low < 1.4 * full
    # In the backbone's own precision such steps are lost.
    assert torch.equal((torch.ones(3, dtype=dtype) - 1e-5), torch.ones(3, dtype=dtype))


def test_a_float32_adapter_acts_on_a_bfloat16_backbone(tmp_path):
    """One saved beside a float32 backbone acts on a bfloat16 one, and is saved again to the bit."""
    model = vp.attach(build(), vp.LoRA(rank=2), train=TRAIN)
    with torch.no_grad():
        for parameter in vp.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    vp.save(model, tmp_path / "one")
    low = build(torch.bfloat16)
    vp.load(low, tmp_path / "one")
    output = low(IMAGES.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output - model(IMAGES)).norm() < 0.05 * output.norm()
    vp.save(low, tmp_path / "two")
    saved = [load_file(tmp_path / folder / "adapter.safetensors") for folder in ("one", "two")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(value, saved[1][key]) for key, value in saved[0].items())
    merged = vp.merge(copy.deepcopy(low))
    assert {value.dtype for value in merged.state_dict().values()} == {torch.bfloat16}
    assert (merged(IMAGES.bfloat16()) - output).norm() < 0.05 * output.norm()


def test_a_float64_backbone_trains_in_float64(tmp_path):
    model = vp.attach(build(torch.float64), vp.LoRA(rank=2), train=TRAIN)
    vp.save(model, tmp_path / "adapter")
    other = build(torch.float64)
    vp.load(other, tmp_path / "adapter", check_fingerprint=False)
    for each in (model, other):
        assert {p.dtype for p in vp.trainable_parameters(each)} == {torch.float64}
        assert each(IMAGES.double()).dtype == torch.float64


def test_a_head_without_a_place_is_refused_before_anything_changes():
    """Neither the adapter nor the freezing stays behind."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
    backbone = describe(model)
    adapter = AttachedAdapter((vp.LoRA(rank=2),), backbone, True, ())
    del model.head
    with pytest.raises(vp.ConfigurationError, match="no module of this name"):
        register(model, "pets", adapter, backbone)
    assert not has_adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", [vp.VeRA(rank=4), vp.RandLoRA(rank=4), vp.LoRA(rank=2)], ids=lambda m: m.name)
def test_a_model_without_values_gets_none_that_are_drawn(method):
    """Random matrices are in no state dict: `to_empty` gave them what was in memory, and no error said so."""
    saved = vp.attach(build(), method)
    moved(saved)
    with torch.device("meta"):
        model = timm.create_model(
            "vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=32, num_classes=5
        )
        vp.attach(model, method)
    if method.name != "lora":
        with pytest.raises(UnsupportedError, match="is drawn when it is attached and is in no state dict"):
            model.to_empty(device="cpu")
        with torch.device("meta"):
            model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=32)
            model.reset_classifier(5)
        model = vp.attach(model.to_empty(device="cpu"), method)
    else:  # all of it is in the state dict
        model.to_empty(device="cpu")
    model.load_state_dict(saved.state_dict())
    assert torch.equal(model.eval()(IMAGES), saved(IMAGES))
