"""Every ConvNeXt, Swin, SwinV2 and Hiera of timm, SAM 2's trunk, and every OpenCLIP configuration with such an image
tower: exact and live.

By default one architecture of each kind runs; all of them by

    pytest -m walk_all tests/backbones/test_walk_of_stages.py
"""

import open_clip
import pytest
import timm
import torch

import visionpeft as vp

SMALL = {
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "swin_transformer": {"depths": (2, 2), "embed_dim": 8, "num_heads": (2, 4), "img_size": 64},
    "swin_transformer_v2": {"depths": (2, 2), "embed_dim": 8, "num_heads": (2, 4), "img_size": 64},
    "hiera": {"stages": (1, 2, 2, 1), "embed_dim": 8, "num_heads": 1, "img_size": 64},
    "hieradet_sam2": {"stages": (1, 2, 2, 2), "embed_dim": 8, "num_heads": 1, "global_att_blocks": (4,)},
}
POOLING = ("hiera", "hieradet_sam2")
# linear layers, convolutions of single pixels, and both with GRN; overlapping stems; norms without a shift; windows of
# another size in each stage; positions of windows, streams widened without a layer, layer scales
ONE_OF_A_KIND = {
    *("convnext_base", "convnext_atto_ols", "convnext_tiny_hnf", "convnext_zepto_rms_ols", "convnextv2_femto"),
    *("convnextv2_base", "swin_base_patch4_window7_224", "swin_s3_base_224", "swinv2_base_window12to16_192to256"),
    *("hiera_base_224", "hiera_base_abswin_256", "hiera_small_abswin_256", "sam2_hiera_large", "hieradet_small"),
}
NAMES = [(module, name) for module in SMALL for name in timm.list_models(module=module)]


def test_how_many_there_are():
    """As many as the census says of timm 1.0.31, and all kinds among them."""
    assert [len(timm.list_models(module=module)) for module in SMALL] == [31, 9, 12, 8, 5]
    assert {name for _, name in NAMES} >= ONE_OF_A_KIND


@pytest.mark.parametrize(
    ("module", "name"),
    [pytest.param(*each, marks=[pytest.mark.walk_all] * (each[1] not in ONE_OF_A_KIND), id=each[1]) for each in NAMES],
)
def test_exact_and_live(module, name):
    torch.manual_seed(0)
    small = SMALL[module]
    if "s3" in name:  # which has a window for each of four stages
        small = small | {"depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "img_size": 96}
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.0, **small).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    side = small.get("img_size", 64)
    images = torch.randn(2, 3, side, side)
    attention = ("q", "k", "v", "proj") if module != "convnext" else ()
    between = ("reduction",) if module not in POOLING else ("expand",) * any(b.proj is not None for b in model.blocks)
    with torch.no_grad():
        base = model(images)
        vp.attach(model, [vp.LoRA(rank=2, targets=(*attention, "fc1", "fc2", *between)), vp.BitFit()], head=False)
        # in mask units the attention is computed in another order
        assert torch.allclose(model(images), base, rtol=1e-4 * (module == "hiera"), atol=1e-5 * (module == "hiera"))
        vp.attach(
            model, [vp.SSF(), vp.Mona(bottleneck=4), *[vp.VPT(num_tokens=2)] * bool(attention)], "more", head=False
        )
        for parameter in model.peft.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.double()
    grads = torch.autograd.grad(model(images.double()).square().sum(), list(model.peft.parameters()))
    assert all(bool(grad.any()) for grad in grads)
    vp.detach(model)
    with torch.no_grad():
        assert torch.equal(model.float()(images), base)


def clips():
    """OpenCLIP's configurations with an image tower of timm's in stages."""
    for name in open_clip.list_models():
        trunk = open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name", "")
        if trunk.startswith(("convnext", "swin")):
            yield name, trunk


def test_image_towers_of_open_clip():
    """Their trunks are among those above, and a CLIP of each kind takes adapters; the weights are on no device."""
    found = dict(clips())
    assert len(found) == 12
    assert set(found.values()) <= {name for _, name in NAMES}
    for name in ("convnext_base", "swin_base_patch4_window7_224"):
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta")
        vp.attach(model, vp.SSF(towers="visual"))
        assert {name.split(".")[3] for name, _ in model.peft.named_parameters()} >= {"0", "23", "norm", "downsample"}
