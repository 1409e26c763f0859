"""Trainable parameters: the published numbers on ViT-B/16, and closed forms on every host."""

import copy
import math

import open_clip
import pytest
import timm
import torch
from conftest import CASES, TRAINED_ALONE, every_pair
from reference import addresses_of, shapes_of
from reference.counts import PUBLISHED, D, L
from reference.prompts import PROMPT_SHAPES
from reference.weight_changes import SHAPES, SHARED_SHAPES
from shared_cells import plain, shared

import visionpeft as vp
from visionpeft.errors import UserError


def timm_vit_b16():
    """timm ViT-B/16 with a head of 100 classes."""
    return timm.create_model("vit_base_patch16_224", num_classes=100)


def open_clip_vit_b16():
    """The visual tower of OpenCLIP's ViT-B-16."""
    return open_clip.CLIP(**open_clip.get_model_config("ViT-B-16")).visual


@pytest.fixture(scope="module", params=[timm_vit_b16, open_clip_vit_b16], ids=["timm", "open_clip"])
def vit_b16(request):
    """A ViT-B/16 without values to attach to and detach from."""
    with torch.device("meta"):
        return request.param()


@pytest.mark.parametrize(("method", "count"), PUBLISHED, ids=repr)
def test_published_counts(vit_b16, method, count):
    """Without the head, exactly the number in the papers."""
    if isinstance(method, vp.LinearProbe | vp.VQT) and not hasattr(vit_b16, "head"):
        with pytest.raises(UserError, match="head"):
            vp.attach(vit_b16, method)
        return
    if isinstance(method, vp.PaFi):  # which looks at the weights; any will do
        vit_b16 = copy.deepcopy(vit_b16).to_empty(device="cpu")
        for parameter in vit_b16.parameters():
            torch.nn.init.ones_(parameter)
    vp.attach(vit_b16, method)
    try:
        if isinstance(method, vp.VQT):
            assert vp.summary(vit_b16).trainable - count == 100 * (D * (1 + L) + 1)
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


def test_norms_of_vit_b16(vit_b16):
    """Scales and shifts of two norms per block and of the last, and in the CLIP tower of one in front of the blocks."""
    vp.attach(vit_b16, vp.LayerNormTuning())
    try:
        outside = 1 if hasattr(vit_b16, "norm") else 2
        assert vp.summary(vit_b16).adapter == 4 * D * L + outside * 2 * D
        trained = {name.rpartition(".")[0] for name in vit_b16.peft["default"].trained_names}
        assert len(trained) == 2 * L + outside
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
    scale = "channel" if getattr(method, "placement", None) == "adapter_plus" else getattr(method, "scale", 1.0)
    return shapes | {"learned": {"scale": (1,)}, "channel": {"scale": (width,)}}.get(scale, {})


def nearest_divisor(width):
    """The divisor next to the square root."""
    return min((abs(n - width**0.5), n) for n in range(1, width + 1) if width % n == 0)[1]


def changed_weight_shapes(method, key, rows, columns):
    """Tensors of one layer whose weight a method changes."""
    name = method.name
    if name == "dora":
        return {"A": (method.rank, columns), "B": (rows, method.rank), "magnitude": (rows,)}
    if name == "vera":
        return {"d": (method.rank,), "b": (rows,)}
    if name == "ada_lora":
        rank = method.initial_rank
        return {"P": (rows, rank), "values": (rank,), "Q": (rank, columns)}
    if name == "krona":
        a1, a2 = method.shape or (nearest_divisor(rows), nearest_divisor(columns))
        return {"A": (a1, a2), "B": (rows // a1, columns // a2)}
    if name == "kadaptation":
        terms, rank = method.terms, method.rank
        return {"u": (terms, rank, rows // terms), "v": (terms, rank, columns // terms)}
    if name in SHAPES:
        return SHAPES[name](method, rows, columns)
    if name == "mole":
        return {"router.weight": (2, 2 * rows)}
    if name == "moa":
        return {"router.weight": (2, columns)}
    if name == "mix_lora":
        pair = {"A": (method.rank, columns), "B": (rows, method.rank)}
        several = key[1].startswith("fc")
        return {part: (method.experts, *size) if several else size for part, size in pair.items()}
    if name == "molora":
        experts, rank = method.experts, method.rank
        return {"A": (experts, rank, columns), "B": (experts, rows, rank), "router.weight": (experts, columns)}
    if name == "moelora":
        experts, rank = method.experts, method.rank // method.experts
        own = {"A": (experts, rank, columns), "B": (experts, rows, rank)}
        return own | {"embedding": (1, 64), "router.weight": (experts, 64)}
    assert name == "unipelt"
    own = {"low_rank.A": (method.rank, columns), "low_rank.B": (rows, method.rank)}
    return own | gate_shapes(columns)


def gate_shapes(width):
    """Tensors of one gate of UniPELT."""
    return {"gate.linear.weight": (1, width), "gate.linear.bias": (1,)}


def compact_shapes(method, width):
    """Tensors of one adapter of Compacter."""
    terms, rank, inner = method.terms, method.rank, method.bottleneck
    wide, narrow = (terms, rank, width // terms), (terms, rank, inner // terms)
    down = {"down.u": narrow, "down.v": wide, "down.bias": (inner,)}
    return down | {"up.u": wide, "up.v": narrow, "up.bias": (width,)}


CHANGING_WEIGHTS = (
    *("dora", "vera", "ada_lora", "krona", "kadaptation", "unipelt", "molora", "moelora", "mix_lora", "mole", "moa"),
    *SHAPES,
)
SHARING_A_RULE = ("kadaptation", "compacter")


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

    if name in SHARING_A_RULE:
        enter((None, "rule"), {"A": (method.terms,) * 3})
    if name in SHARED_SHAPES:
        owner, shapes = SHARED_SHAPES[name]
        enter((None, owner), shapes(method, sum(site in method.targets for _, site in acting)))
    if name in CHANGING_WEIGHTS:
        for key in acting:
            targets = ("q", "v") if name in ("mole", "moa") else method.targets
            if {"fc1_g": "fc1", "fc1_x": "fc1"}.get(key[1], key[1]) in targets:
                enter(key, changed_weight_shapes(method, key, *read[key][0].shape))
    if name == "mix_lora":
        for index in blocks:
            enter((index, "mlp_in"), {"router.weight": (method.experts, width)})
    if name in ("mam", "unipelt"):
        prefix = "prefix." if name == "unipelt" else ""
        for index in blocks:
            inner = read[index, "k"][0].shape[0]
            kept = {f"{prefix}{each}": (method.num_tokens, inner) for each in ("keys", "values")}
            adapter = bottleneck_shapes(method, width)
            if name == "unipelt":
                kept |= gate_shapes(width if method.prefix_gate == "input" else inner)
                adapter = {f"bottleneck.{each}": size for each, size in adapter.items()} | gate_shapes(width)
            enter((index, "kv"), kept)
            enter((index, "stream_mid" if name == "mam" else "mlp_out"), adapter)
    elif name in PROMPT_SHAPES:
        for key, shapes in PROMPT_SHAPES[name](method, shape, width).items():
            enter(key, shapes)
    elif name == "compacter":
        for index in blocks:
            for site in ADAPTER_SITES[method.placement]:
                enter((index, site), compact_shapes(method, width))
    elif name in CHANGING_WEIGHTS:
        pass
    elif name == "lora":
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
    elif name == "pa_fi":
        sizes = {}
        for (index, site), (weight, bias) in read.items():
            if index in blocks and not site.endswith(("norm", "norm1", "norm2")):
                sizes[index, site, "weight"] = weight.abs()
                if bias is not None and site != "k":
                    sizes[index, site, "bias"] = bias.abs()
        every = torch.cat([size.flatten() for size in sizes.values()])
        limit = every.sort().values[round(method.density * len(every)) - 1]
        for (index, site, part), size in sizes.items():
            if number := int((size <= limit).sum()):
                enter((index, site), {part: (number,)})
    elif name == "neuro_ada":
        for (index, site), (weight, _) in read.items():
            if index in blocks and not site.endswith(("norm", "norm1", "norm2")):
                enter((index, site), {"weight": (method.per_row * len(weight),)})
    elif name == "vpt":
        first = shape["depth"] - int(method.blocks.removeprefix("last:")) if method.blocks != "all" else 0
        for index in blocks[first:] if method.deep else blocks[:1]:
            enter((index, "stream_in"), {"prompts": (method.num_tokens, method.projection or width)})
        if method.projection:
            enter((None, "projection"), {"weight": (width, method.projection), "bias": (width,)})
    elif name == "gated_vpt":
        last = (shape["depth"] if method.blocks == "all" else int(method.blocks.removeprefix("first:"))) - 1
        enter((0, "stream_in"), {"prompts": (method.num_tokens, width)})
        for index in range(last + 1):
            enter((index, "kv"), {"temperature": (1,)})
            if index < last:
                enter((index, "gate"), {"logit": (1,)})
    elif name == "ia3":
        for index in blocks:
            for site in ("k", "v"):
                enter((index, site), {"scale": (read[index, site][0].shape[0],)})
            enter((index, "hidden"), {"scale": (read[index, "fc2"][0].shape[1],)})
    elif name == "adapter_fusion":
        square = {f"{part}.weight": (width, width) for part in ("query", "key", "value")}
        for index in blocks:
            enter((index, "mlp_out"), square | {"query.bias": (width,), "key.bias": (width,)})
    elif name == "ada_mix":
        experts, inner = method.experts, method.bottleneck
        shapes = {"down_weight": (inner, width), "down_bias": (inner,), "up_weight": (width, inner)}
        shapes |= {"up_bias": (width,)}
        for index in blocks:
            enter((index, "mlp_out"), {part: (experts, *size) for part, size in shapes.items()})
    elif name == "hyper_former":
        inner, size = method.bottleneck, method.embedding
        shapes = {"tasks": (1, size), "layers": (len(blocks), size), "positions": (2, size)}
        shapes |= {"project.0.weight": (size, 3 * size), "project.2.weight": (size, size)}
        shapes |= {f"project.{number}.bias": (size,) for number in (0, 2)}
        shapes |= {"down": (inner, width, size), "up": (width, inner, size)}
        enter((None, "network"), shapes | {part: (width, size) for part in ("scale", "shift")})
    elif name == "dtl":
        for index in blocks:
            enter((index, "stream_in"), {"A": (method.rank, width), "B": (width, method.rank)})
        if method.convolution:
            enter((None, "convolution"), {"conv.weight": (width, 1, 3, 3)})
    elif name == "lst":
        narrow = width // method.ratio
        line = {"weight": (narrow, width), "bias": (narrow,)}
        hidden = read[0, "fc2"][0].shape[1] * narrow // width
        outputs = {"attn.qkv": 3 * narrow, "attn.proj": narrow, "mlp.fc1": hidden}
        side = {f"block.{layer}.weight": (number, narrow) for layer, number in outputs.items()}
        side |= {f"block.{layer}.bias": (number,) for layer, number in outputs.items()}
        side |= {"block.mlp.fc2.weight": (narrow, hidden), "block.mlp.fc2.bias": (narrow,), "gate": (1,)}
        side |= {f"block.norm{n}.{part}": (narrow,) for n in (1, 2) for part in ("weight", "bias")}
        side |= {f"down.{part}": size for part, size in line.items()}
        for index in blocks:
            enter((index, "stream_in"), {} if index in method.dropped else side)
        enter((0, "stream_in"), {f"start.{part}": size for part, size in line.items()})
        last = {"norm.weight": (narrow,), "norm.bias": (narrow,), "up.weight": (width, narrow), "up.bias": (width,)}
        enter((shape["depth"] - 1, "stream_in"), last)
    elif name == "vqt":
        for index in blocks:
            enter((index, "kv"), {"prompts": (method.num_tokens, width)})
    elif name == "mov":
        for index in blocks:
            for site, matrix, axis in (("k", "k", 0), ("v", "v", 0), ("hidden", "fc2", 1)):
                channels = read[index, matrix][0].shape[axis]
                read_by_router = channels if site == "hidden" else read[index, "q"][0].shape[0] // shape["heads"]
                shapes = {"scales": (method.experts, channels), "router.weight": (method.experts, read_by_router)}
                enter((index, site), shapes)
    elif name in ("rep_adapter", "convpass"):
        inner = method.bottleneck
        shapes = {"down.weight": (inner, width), "down.bias": (inner,), "up.bias": (width,)}
        if name == "convpass":
            shapes |= {"conv.weight": (inner, inner, 3, 3), "conv.bias": (inner,), "up.weight": (width, inner)}
        else:
            shapes |= {"up.weight": (width, inner // method.groups)}
        for index in blocks:
            for position in method.positions:
                enter((index, {"attention": "attn_in", "mlp": "mlp_in"}[position]), shapes)
    elif name == "fact":
        rank, tucker = method.rank, method.decomposition == "tk"
        factors = {"U": (rank, width), "V": (width, rank)} | ({"core": (rank, rank, rank)} if tucker else {})
        enter((None, "factors"), factors)
        for key in acting:
            if key[0] is not None and key[1].split("_")[0] in method.targets:
                rows, columns = (math.ceil(size / width) for size in read[key][0].shape)
                enter(key, {"P": (rank, rows * columns)} if tucker else {"S": (rows * rank, columns * rank)})
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


NAMED = [c for c in CASES if c.name not in (*TRAINED_ALONE, "prefix_mlp")]
NAMED = [c for c in NAMED if not c.method.pending and not c.method.stages_after]


@shared(every_pair(cases=NAMED), torch.float64)
def test_names_and_shapes(cell):
    """The tensors of an adapter have the published names and the shapes of the closed form, none more."""
    host, case, model, expected = cell.host, cell.case, cell.model, {}
    unchanged = plain(host, torch.float64)
    weights = unchanged.state_dict()
    for tower in host.towers:
        if tower == "visual" or (host.takes != "images" and not case.image_only):
            sites = addresses_of(unchanged, tower)
            expected |= tower_shapes(case.on(host), tower, weights, sites, shapes_of(unchanged)[tower])
    head = {n: p for n, p in model.peft["default"].named_parameters() if n.startswith("head.")}
    found = {n: tuple(p.shape) for n, p in model.peft["default"].named_parameters() if n not in head}
    assert found == expected
    trainable = vp.trainable_parameters(model)
    assert sum(p.numel() for p in trainable) == sum(p.numel() for p in model.peft["default"].parameters())
    assert vp.summary(model).trainable == sum(p.numel() for p in trainable)
    assert {id(p) for p in trainable} == {id(p) for p in model.parameters() if p.requires_grad}
