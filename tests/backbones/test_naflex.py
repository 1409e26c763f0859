"""NaFlexVit with several image sizes in one batch: what adapters do is that of each image alone.

Its architectures are walked in `test_walk.py`.
"""

import copy

import pytest
import timm
import torch
from reference.hosts import lively

import visionpeft as vp
from visionpeft.sites.masks import padding

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "num_classes": 3}
METHODS = {
    "tokens": [vp.VPT(num_tokens=2, deep=False), vp.LoRA(rank=2), vp.SSF()],
    "keys": [vp.VPT(num_tokens=2), vp.PrefixTuning(num_tokens=2)],
    "layers": [vp.LoRA(rank=2, targets=("patch_embed", "proj", "fc1")), vp.BitFit()],
}


def patches_of(sizes, length):
    """A batch of images of so many rows and columns of patches, filled up to one length."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "patches": torch.zeros(len(sizes), length, 48, dtype=torch.float64),
        "patch_coord": torch.zeros(len(sizes), length, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(sizes), length, dtype=torch.bool),
    }
    for index, (rows, columns) in enumerate(sizes):
        number = rows * columns
        batch["patches"][index, :number] = torch.randn(number, 48, dtype=torch.float64, generator=generator)
        batch["patch_coord"][index, :number] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        batch["patch_valid"][index, :number] = True
    return batch


@pytest.mark.parametrize("key_only", [False, True], ids=["pairs", "keys alone"])
@pytest.mark.parametrize("methods", METHODS.values(), ids=list(METHODS))
def test_a_batch_of_several_sizes(methods, key_only):
    torch.manual_seed(0)
    options = SMALL | {"use_key_only_attn_mask": key_only}
    model = timm.create_model("naflexvit_base_patch16_gap", **options).double().eval()
    vp.attach(model, methods)
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        together = model(patches_of([(2, 3), (3, 3)], 12))
        for index, number in enumerate((6, 9)):
            batch = patches_of([(2, 3), (3, 3)], 12)
            alone = model({name: value[index : index + 1, :number] for name, value in batch.items()})
            assert torch.allclose(together[index], alone[0], rtol=1e-9, atol=1e-12)
        batch = patches_of([(2, 3), (3, 3)], 12)
        batch["patch_valid"][0, 6] = True  # negative control
        assert not torch.allclose(model(batch)[0], together[0], rtol=1e-6)
        vp.disable(model)
        assert not torch.allclose(model(patches_of([(2, 3), (3, 3)], 12)), together, rtol=1e-2)


def lively_model(**options):
    """With registers, and every tensor away from where it starts, so that what is handed on by prompts is seen."""
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", **(SMALL | {"reg_tokens": 1} | options))
    return lively(model).double().eval()


def stirred(model):
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("key_only", [False, True], ids=["pairs", "keys alone"])
@pytest.mark.parametrize(
    "method",
    [vp.VPT(2, deep=False), vp.GatedVPT(2, gate=0.5), vp.PrefixPropagation(2), vp.PTuning(2, hidden=3), vp.XPrompt(2)],
    ids=lambda method: type(method).__name__,
)
def test_prompts_that_travel_see_no_padding(method, key_only):
    """A mask of pairs closes padding to patches; prompts that saw it would hand it on to the patches of the next block.

    Models as they are made hide it: their attention starts near zero.
    """
    model = stirred(vp.attach(lively_model(use_key_only_attn_mask=key_only), method, head=False))
    batch = patches_of([(2, 3), (3, 3)], 12)
    with torch.no_grad():
        together = model(batch)
        for index, number in enumerate((6, 9)):
            alone = model({name: value[index : index + 1, :number] for name, value in batch.items()})
            assert torch.allclose(together[index], alone[0], rtol=1e-9, atol=1e-12)


def test_padding_is_what_no_token_sees():
    """Of masks of both kinds; a causal mask has none, as every token sees itself."""
    valid = torch.tensor([[True, True, False], [True, True, True]])
    pairs = (valid[:, None] & valid[:, :, None])[:, None]
    assert padding(pairs)[:, 0, 0].equal(~valid)
    for closed in (float("-inf"), torch.finfo(torch.float32).min, torch.finfo(torch.float16).min):
        assert padding(torch.zeros(pairs.shape).masked_fill(~pairs, closed))[:, 0, 0].equal(~valid)
    assert not padding(torch.full((3, 3), float("-inf")).triu(1)).any()
    assert not padding(torch.full((3, 3), -100.0)).any()  # a bias, however low, is none


READERS = [
    vp.SMoP(experts=2, num_tokens=2),
    vp.IDPG(num_tokens=2, terms=4),
    vp.LPT(num_tokens=2, bottleneck=3),
    vp.LPT(num_tokens=2, bottleneck=3, reads="patches"),
    vp.APT(num_tokens=2),
    vp.UniPELT(rank=1, num_tokens=2, bottleneck=2),
    vp.LST(ratio=2),
    vp.VQT(1),
    vp.CoDA(bottleneck=2),
]


@pytest.mark.parametrize("method", READERS, ids=lambda method: f"{type(method).__name__}{getattr(method, 'reads', '')}")
def test_what_reads_all_patches_is_refused_with_padding(method):
    """Its means, its own attention or its choice would count what is no part of the image."""
    head = isinstance(method, vp.VQT)
    model = stirred(vp.attach(lively_model(class_token=False), method, head=head))
    with torch.no_grad():
        with pytest.raises(vp.UnsupportedError, match="show it images of one size together"):
            model(patches_of([(2, 3), (3, 3)], 9))
        assert model(torch.randn(2, 3, 12, 8, dtype=torch.float64)).isfinite().all()
        if isinstance(method, vp.CoDA):  # has fewer tokens than any mask
            return
        batch = patches_of([(2, 3), (3, 2)], 6)
        together = model(batch)
        for index in range(2):
            alone = model({name: value[index : index + 1] for name, value in batch.items()})
            assert torch.allclose(together[index], alone[0], rtol=1e-9, atol=1e-12)


def test_padding_is_refused_in_a_routed_batch():
    model = lively_model(class_token=False)
    for name in ("one", "other"):
        vp.attach(model, vp.SMoP(experts=2, num_tokens=2), name, head=False)
    with vp.route(model, ["one", "other"]), torch.no_grad():
        assert model(patches_of([(2, 3), (3, 2)], 6)).isfinite().all()
        with pytest.raises(vp.UnsupportedError, match="reads all patches"):
            model(patches_of([(2, 3), (3, 3)], 9))


def test_the_class_token_may_be_read_with_padding():
    """Negative control: with a class token LPT and APT read no patches, and a row is what it is alone."""
    batch = patches_of([(2, 3), (3, 3)], 12)
    for method in (vp.LPT(num_tokens=2, bottleneck=3), vp.APT(num_tokens=2)):
        model = stirred(vp.attach(lively_model(class_token=True, global_pool="token"), method, head=False))
        with torch.no_grad():
            alone = model({name: value[:1, :6] for name, value in batch.items()})
            assert torch.allclose(model(batch)[0], alone[0], rtol=1e-9, atol=1e-12)


def test_patches_of_another_size():
    """They are multiplied with a resampled weight: what adapters change it by is resampled with it."""
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", enable_patch_interpolator=True, **SMALL).eval()
    vp.attach(model, vp.LoRA(rank=2, targets=("patch_embed",)), head=False)
    batch = {
        "patches": torch.randn(1, 4, 8, 8, 3),
        "patch_coord": torch.cartesian_prod(torch.arange(2), torch.arange(2))[None],
        "patch_valid": torch.ones(1, 4, dtype=torch.bool),
    }
    with torch.no_grad():
        base = model(batch)
        for parameter in model.peft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        found = model(batch)
        vp.merge(model)
        assert torch.allclose(found, model(batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, base, rtol=1e-2)


@pytest.mark.parametrize(
    "method", [vp.LoRA(rank=2, targets=("patch_embed",)), vp.FishMask(0.05, samples=2)], ids=["factors", "entries"]
)
def test_a_changed_patch_embedding_is_trained(method):
    """timm adds the positions to its output in place, which autograd allows for no view that a function of ours gives;
    the gradients are those of timm's own model with the change written into its weights.
    """
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", **SMALL).double().train()
    plain = copy.deepcopy(model)
    images, labels = torch.randn(2, 3, 16, 12, dtype=torch.float64), torch.tensor([0, 2])
    vp.attach(model, method, head=False)
    if model.peft["default"].pending:
        vp.allocate(model, [(images, labels)])
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    module = next(p.module for _, p in model.peft["default"].placements if p.site == "patch_embed")
    projection = plain.embeds.proj
    own = {"weight": projection.weight.detach(), "bias": projection.bias.detach()}
    changed = dict(zip(own, module.merge(*own.values()), strict=True))
    for _, p in model.peft["default"].placements:  # what acts elsewhere, as values
        if p.module is not module:
            layer = vp.describe(plain).towers["visual"].layer(p.block, p.site)
            with torch.no_grad():
                weight, bias = p.module.merge(layer.weight_tensor, layer.bias_tensor)
                layer.weight_tensor.copy_(weight)
                if bias is not None:
                    layer.bias_tensor.copy_(bias)
    named = {f"embeds.proj.{name}": tensor for name, tensor in changed.items()}
    written = torch.func.functional_call(plain, named, (images,))
    parameters = [*module.parameters()]
    expected = torch.autograd.grad(written.square().sum(), parameters)
    gradients = torch.autograd.grad(model(images).square().sum(), parameters)
    for gradient, own in zip(gradients, expected, strict=True):
        assert own.any()
        assert torch.allclose(gradient, own, rtol=1e-8, atol=1e-12)
