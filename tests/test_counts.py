"""Trainable parameters: the published numbers on ViT-B/16, and closed forms on every host."""

import open_clip
import pytest
import timm
from conftest import CASES, TRAINED_ALONE, attach, cells
from reference import addresses_of, shapes_of

import visionpeft as vp
from visionpeft.errors import ConfigurationError

D, L = 768, 12
BLOCK = 12 * D * D + 13 * D

PUBLISHED = [
    (vp.LinearProbe(), 0),
    (vp.BitFit(key_bias=True), 102_912),
    (vp.VPT(num_tokens=10, deep=True), 92_160),
    (vp.VPT(num_tokens=50, deep=True), 460_800),
    (vp.VPT(num_tokens=100, deep=False), 76_800),
    (vp.VPT(num_tokens=10, deep=True, projection=64), 57_600),
    (vp.Adapter(bottleneck=8, placement="houlsby"), 313_536),
    (vp.Adapter(bottleneck=8, placement="pfeiffer"), 156_768),
    (vp.Adapter(bottleneck=8, placement="adapter_plus"), 165_984),
    (vp.AdaptFormer(bottleneck=64), 1_189_632),
    (vp.AdaptFormer(bottleneck=8), 156_768),
    (vp.LoRA(rank=8, targets=("q", "v")), 294_912),
    (vp.LoRA(rank=8, targets=("q", "k", "v")), 442_368),
    (vp.SSF(), 205_824),
    (vp.PrefixTuning(num_tokens=10), 2 * L * 10 * D),
    (vp.LastBlocks(2), 2 * BLOCK + 2 * D),
]


def timm_vit_b16():
    """timm ViT-B/16 with a head of 100 classes."""
    return timm.create_model("vit_base_patch16_224", num_classes=100)


def open_clip_vit_b16():
    """The visual tower of OpenCLIP's ViT-B-16."""
    return open_clip.create_model("ViT-B-16").visual


@pytest.fixture(scope="module", params=[timm_vit_b16, open_clip_vit_b16], ids=["timm", "open_clip"])
def vit_b16(request):
    """A ViT-B/16 to attach to and detach from."""
    return request.param()


@pytest.mark.parametrize(("method", "count"), PUBLISHED, ids=repr)
def test_published_counts(vit_b16, method, count):
    """Without the head, exactly the number in the papers."""
    if isinstance(method, vp.LinearProbe) and not hasattr(vit_b16, "head"):
        with pytest.raises(ConfigurationError):
            vp.attach(vit_b16, method)
        return
    vp.attach(vit_b16, method)
    try:
        head = {id(p) for n, p in vit_b16.peft["default"].named_parameters() if n.startswith("head.")}
        assert sum(p.numel() for p in vp.trainable_parameters(vit_b16) if id(p) not in head) == count
        assert vp.summary(vit_b16).adapter == count
    finally:
        vp.detach(vit_b16)


def test_full_fine_tuning_trains_everything(vit_b16):
    """All parameters: 85,798,656 in timm's ViT-B/16 without head, 86,192,640 in the CLIP tower with its projection."""
    backbone = sum(p.numel() for n, p in vit_b16.named_parameters() if not n.startswith("head."))
    assert backbone in (85_798_656, 86_192_640)
    vp.attach(vit_b16, vp.FullFineTuning())
    try:
        assert vp.summary(vit_b16).adapter == backbone
    finally:
        vp.detach(vit_b16)


BLOCK_SITES = ("norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc1_g", "fc1_x", "fc2")
ADAPTER_SITES = {
    "houlsby": ("attn_out", "mlp_out"),
    "pfeiffer": ("mlp_out",),
    "parallel": ("stream_mid",),
    "pre": ("stream_mid",),
    "adapter_plus": ("stream_out",),
}


def bottleneck_shapes(method, width):
    """Tensors of one bottleneck; its scale is one number, one for each channel, or not trained."""
    inner = method.bottleneck
    shapes = {"down.weight": (inner, width), "down.bias": (inner,), "up.weight": (width, inner), "up.bias": (width,)}
    scale = "channel" if getattr(method, "placement", None) == "adapter_plus" else method.scale
    return shapes | {"learned": {"scale": (1,)}, "channel": {"scale": (width,)}}.get(scale, {})


def tower_shapes(method, tower, weights, sites, shape):
    """{name of a tensor: shape} of one method on one tower, from the state_dict of the plain model."""
    name, found = method.name, {}
    blocks = range(shape["depth"])
    read = {key: address.read(weights) for key, address in sites.items() if address.weight in weights}
    width = read[0, "proj"][0].shape[0]
    acting = [(None, "patch_embed"), *((i, s) for i in blocks for s in BLOCK_SITES), (None, "norm"), (None, "fc_norm")]
    acting = [key for key in acting if key in read]

    def enter(key, parameters):
        path = [name, tower, *(str(part) for part in key if part is not None)]
        found.update({".".join([*path, p]): size for p, size in parameters.items()})

    if name == "lora":
        targets = {"fc1": ("fc1", "fc1_g", "fc1_x")}
        for key in acting:
            if any(key[1] in targets.get(target, (target,)) for target in method.targets):
                rows, columns = read[key][0].flatten(1).shape
                enter(key, {"A": (method.rank, columns), "B": (rows, method.rank)})
    elif name == "ssf":
        for key in acting:
            rows = read[key][0].shape[0]
            enter(key, {"scale": (rows,), "shift": (rows,)})
    elif name == "bit_fit":
        for key in read:
            if read[key][1] is not None and (key[1] != "k" or method.key_bias):
                enter(key, {"shift": tuple(read[key][1].shape)})
        # biases behind the blocks, in the pooling and the projection, are trained themselves
        own = "attn_pool." if tower == "visual" else "text_projection."
        found.update({f"trained.{n}": tuple(w.shape) for n, w in weights.items() if own in n and n.endswith(".bias")})
    elif name == "vpt":
        first = shape["depth"] - int(method.blocks.removeprefix("last:")) if method.blocks != "all" else 0
        for index in blocks[first:] if method.deep else blocks[:1]:
            enter((index, "stream_in"), {"prompts": (method.num_tokens, method.projection or width)})
        if method.projection:
            enter((None, "projection"), {"weight": (width, method.projection), "bias": (width,)})
    elif name == "prefix_tuning":
        for index in blocks:
            kept = (method.num_tokens, read[index, "k"][0].shape[0])
            enter((index, "kv"), {"keys": kept, "values": kept})
    else:
        places = ADAPTER_SITES[method.placement] if name == "adapter" else ("stream_mid",)
        for index in blocks:
            for site in places:
                enter((index, site), bottleneck_shapes(method, width))
    return found


@cells(cases=[c for c in CASES if c.name not in (*TRAINED_ALONE, "prefix_mlp")])
def test_names_and_shapes(host, case):
    """The tensors of an adapter have the published names and the shapes of the closed form, none more."""
    plain = host.build()
    weights, expected = plain.state_dict(), {}
    for tower in host.towers:
        if tower == "visual" or host.takes != "images":
            sites = addresses_of(plain, tower)
            expected |= tower_shapes(case.on(host), tower, weights, sites, shapes_of(plain)[tower])
    model = attach(host.build(), host, case)
    head = {n: p for n, p in model.peft["default"].named_parameters() if n.startswith("head.")}
    found = {n: tuple(p.shape) for n, p in model.peft["default"].named_parameters() if n not in head}
    assert found == expected
    trainable = vp.trainable_parameters(model)
    assert sum(p.numel() for p in trainable) == sum(p.numel() for p in model.peft["default"].parameters())
    assert vp.summary(model).trainable == sum(p.numel() for p in trainable)
    assert {id(p) for p in trainable} == {id(p) for p in model.parameters() if p.requires_grad}
