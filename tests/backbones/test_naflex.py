"""NaFlexVit with several image sizes in one batch: what adapters do is that of each image alone.

Its architectures are walked in `test_walk.py`.
"""

import copy

import pytest
import timm
import torch

import visionpeft as vp

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
