"""Heads on backbones in stages: Hugging Face transformers' models, torchvision's pyramids, adapters by other ways."""

import functools
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from away_from_start import shaken
from reference.prompts import depthwise
from timm.layers import LayerNorm2d
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import visionpeft as vp
from visionpeft.errors import ConfigurationError
from visionpeft.heads.pyramids import StagePyramid
from visionpeft.models.create import create_dense_backbone
from visionpeft.models.windows import window_logits

SWIN = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4, "img_size": 64}
ANY_SIZE = {"dynamic_img_size": True, "always_partition": True}
CONV = {"dims": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "conv_mlp": False}
WIDTHS = {"swin": [8, 16, 32, 64], "convnext": [8, 12, 16, 20]}


def backbone(name="swin", dtype=torch.float64, **options):
    """With weights that show every effect: layer scales of ConvNeXt and norms of SwinV2 start near zero."""
    torch.manual_seed(0)
    if name == "convnext":
        made = timm.create_model("convnext_atto", num_classes=0, **CONV | options)
    else:
        kind = {"swin": "swin_tiny_patch4_window7_224", "swin_v2": "swinv2_tiny_window8_256"}[name]
        made = timm.create_model(
            kind, num_classes=0, **{"dynamic_img_size": True, "always_partition": True} | SWIN | options
        )
    return shaken(made).to(dtype).eval()


def images(*size, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *(size or (64, 96)), dtype=torch.float64, generator=generator)


def stages_of(model):
    return model.stages if hasattr(model, "stages") else model.layers


def hooked_maps(model, pixels):
    """What each stage gives in the model's own forward, (batch, channels, rows, columns)."""
    found = []

    def keep(stage, given, output):
        found.append(output if hasattr(model, "stages") else output.permute(0, 3, 1, 2))

    handles = [stage.register_forward_hook(keep) for stage in stages_of(model)]
    model.forward_features(pixels)
    for handle in handles:
        handle.remove()
    return found


def close(one, other):
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "swin_v2", "convnext"])
def test_maps_are_what_the_stages_give(name):
    model = backbone(name)
    maps, expected = vp.feature_maps(model, images(), (0, 1, 2, 3)), hooked_maps(model, images())
    assert [each.shape[-2:] for each in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert all(map(torch.equal, maps, expected))
    (last,) = vp.feature_maps(model, images(), (3,))
    assert torch.equal(last, expected[3])
    vp.attach(model, vp.LoRA(rank=2, targets=("fc1", "fc2"), blocks="stage:0"))
    for parameter in model.peft.parameters():
        parameter.normal_(std=0.3)
    after = vp.feature_maps(model, images(), range(4))
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in zip(maps, after, strict=True))


HIERA = {
    "hiera_tiny_224": {"img_size": (64, 64), "mask_unit_size": (8, 8), "mask_unit_attn": (True, True, False, False)},
    "sam2_hiera_tiny": {"window_spec": (4, 2, 2, 2), "global_att_blocks": (3,)},
}
OF_HIERA = {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 2, 1), "q_pool": 3}


@pytest.mark.parametrize("name", HIERA)
def test_heads_on_hiera(name):
    """Whose tokens do not lie row by row; all that is trained learns but the norm that nothing reads."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **OF_HIERA, **HIERA[name]).double().eval()
    pixels = images(64, 64)
    shaken(model)
    with torch.no_grad():
        expected = model.forward_intermediates(pixels, intermediates_only=True)
        maps = vp.feature_maps(model, pixels, (0, 1, 2, 3))
    assert [tuple(each.shape[1:]) for each in maps] == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    assert all(map(torch.equal, maps, expected))
    dense = vp.DensePredictor(model, PLAIN, 3, vp.FullFineTuning())
    assert close(dense.coarse_logits(pixels), logits_of(maps, dense.head))
    assert dense(pixels).shape == (2, 3, 64, 64)
    dense.coarse_logits(pixels).square().mean().backward()
    trained = dict(dense.peft.default.trained_parameters())
    assert all(p.grad is not None and p.grad.any() for path, p in trained.items())
    untrained = {path for path, _ in dense.backbone.named_parameters() if f"backbone.{path}" not in trained}
    assert untrained == {"head.norm.weight", "head.norm.bias"}
    if name == "hiera_tiny_224":
        with pytest.raises(
            ConfigurationError, match=r"takes images of 64 x 64 pixels, not 64 x 96; make it with img_size"
        ):
            dense(images())
    else:
        assert dense(images()).shape == (2, 3, 64, 96)


# transformers


def upernet_of_transformers(name):
    from transformers import ConvNextConfig, SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    read = [f"stage{number}" for number in (1, 2, 3, 4)]
    if name == "swin":
        heads, depths = list(SWIN["num_heads"]), list(SWIN["depths"])
        inside = SwinConfig(
            image_size=64, embed_dim=8, depths=depths, num_heads=heads, window_size=4, out_features=read
        )
    else:
        inside = ConvNextConfig(hidden_sizes=list(CONV["dims"]), depths=list(CONV["depths"]), out_features=read)
    config = UperNetConfig(backbone_config=inside, hidden_size=6, num_labels=3, use_auxiliary_head=False)
    torch.manual_seed(1)
    theirs = UperNetForSemanticSegmentation(config).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for norm in theirs.backbone.hidden_states_norms.values():
        if name == "swin":
            norm.eps = 1e-6  # which is ConvNeXt's; Swin's is 1e-5
    return theirs


HEAD = [
    (r"^backbone.hidden_states_norms.stage(\d)", lambda m: f"neck.{int(m[1]) - 1}"),
    (r"^decode_head.classifier", "classify"),
    (r"^decode_head.psp_modules.(\d).1", r"pools.\1"),
    (r"^decode_head.bottleneck", "pooled"),
    (r"^decode_head.fpn_bottleneck", "fuse"),
    (r"^decode_head.lateral_convs", "lateral"),
    (r"^decode_head.fpn_convs", "smooth"),
    (r"\.conv\.", ".0."),
    (r"\.batch_norm\.", ".1."),
]
BACKBONES = {
    "swin": [
        (r"^backbone.swin.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        (r"^backbone.swin.embeddings.norm", "patch_embed.norm"),
        (r"^backbone.swin.layernorm", "norm"),
        (r"^backbone.swin.encoder.layers.(\d).downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample"),
        (r"^backbone.swin.encoder.", ""),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"attention.o_proj", "attn.proj"),
        (r"attention.relative_position_bias.", "attn."),
    ],
    "convnext": [
        (r"^backbone.embeddings.patch_embeddings", "stem.0"),
        (r"^backbone.embeddings.layernorm", "stem.1"),
        (r"^backbone.encoder.", ""),
        (r"downsampling_layer", "downsample"),
        (r"\.layers\.", ".blocks."),
        (r"layer_scale_parameter", "gamma"),
        (r"dwconv", "conv_dw"),
        (r"layernorm", "norm"),
        (r"pwconv", "mlp.fc"),
    ],
}


def renamed(state, rules):
    def new(name):
        return functools.reduce(lambda key, rule: re.sub(*rule, key), rules, name)

    parts = {name: value for name, value in state.items() if "attention.q_proj" in name}
    made = {new(name): value for name, value in state.items() if not re.search(r"attention\.[qkv]_proj", name)}
    for name in parts:
        fused = torch.cat([state[name.replace("q_proj", f"{site}_proj")] for site in "qkv"])
        made[new(name.replace("attention.q_proj", "attn.qkv"))] = fused
    return made


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_upernet_is_that_of_transformers(name):
    """Logits at the head's resolution, and as many values; with the library's blocks, and with sited ones."""
    theirs, inside = upernet_of_transformers(name), backbone(name)
    state = theirs.state_dict()
    ours = {key for key in state if key.startswith(("decode_head", "backbone.hidden_states_norms"))}
    kept = inside.load_state_dict(renamed({k: v for k, v in state.items() if k not in ours}, BACKBONES[name]), False)
    assert not kept.unexpected_keys
    assert {key.rpartition(".")[0] for key in kept.missing_keys} <= {"head.norm"}  # which is not computed
    model = vp.DensePredictor(inside, vp.UPerNet(width=6), 3).eval()
    model.head.load_state_dict(renamed({key: state[key] for key in ours}, HEAD))
    of_head = sum(value.numel() for key, value in state.items() if key in ours and "num_batches" not in key)
    assert of_head == sum(t.numel() for k, t in model.head.state_dict().items() if "num_batches" not in k)
    expected = theirs(images()).logits
    for attached in (False, True):
        if attached:
            vp.attach(model, vp.LoRA(rank=2, targets=("fc1", "fc2")))  # which changes nothing yet
        coarse = model.coarse_logits(images())
        assert coarse.shape[-2:] == (16, 24)
        assert close(F.interpolate(coarse, size=(64, 96), mode="bilinear"), expected)
    if name == "swin":  # maps of the model's own size that fit into one window would not be shifted
        for stage in inside.layers:
            for block in stage.blocks:
                block.shift_size = (0, 0) if block.input_resolution[0] <= 4 else block.shift_size
        assert not torch.allclose(model.coarse_logits(images()), coarse, atol=1e-3)


def test_counts_on_swin_b():
    """That of mmsegmentation's UPerNet without its auxiliary head, with the norms, which are the backbone's there."""
    widths = [128, 256, 512, 1024]

    def count(head, **more):
        with torch.device("meta"):
            return sum(p.numel() for p in head.make(widths, 4, 150, **more).parameters())

    c, total = 512, sum(widths)
    assert count(vp.UPerNet(width=c)) == 2 * total + c * (total + 12 * 1024 + 99 * c + 24) + 150 * (c + 1)
    assert count(vp.UPerNet(width=c)) == 2 * total + 33_315_990
    assert count(vp.LinearSegmentation(layers="quarters")) == 2 * total + total * (150 + 2) + 150
    fused = 7 * (2 * 9 * 256**2 + 4 * 256) + 4 * (256**2 + 256)  # the coarsest has one residual unit
    assert count(vp.DPT()) == 9 * 256 * total + fused + 9 * 256**2 + 2 * 256 + 150 * 257


@torch.no_grad()
def test_dpt_is_that_of_transformers():
    from transformers import DPTConfig, Swinv2Config
    from transformers.models.dpt.modeling_dpt import DPTNeck, DPTSemanticSegmentationHead

    inside = Swinv2Config(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = DPTConfig(
        backbone_config=inside, neck_hidden_sizes=WIDTHS["swin"], fusion_hidden_size=8, num_labels=3,
        use_batch_norm_in_fusion_residual=True, use_bias_in_fusion_residual=False, head_in_index=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = torch.nn.ModuleDict({"neck": DPTNeck(config), "head": DPTSemanticSegmentationHead(config)}).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rules = [
        (r"^neck.convs", "level"),
        (r"^neck.fusion_stage.layers.(\d)", lambda m: f"fusion.{3 - int(m[1])}"),
        (r"residual_layer1", "of_level"),
        (r"residual_layer2", "of_sum"),
        (r"projection", "out"),
        *((rf"{kind}{n}", str(3 * n - 3 + at)) for kind, at in (("convolution", 1), ("batch_norm", 2)) for n in (1, 2)),
        (r"^head.head.4", "classify"),
        (r"^head.head", "before"),
    ]
    module = vp.DPT(width=8).make(WIDTHS["swin"], 4, 3).double().eval()
    state = renamed(theirs.state_dict(), rules)
    unused = {key for key in state if key.startswith("fusion.3.of_level")}  # the coarsest has nothing to add to
    module.load_state_dict({key: value for key, value in state.items() if key not in unused})
    maps = vp.feature_maps(backbone(), images(), range(4))
    expected = theirs["head"](theirs["neck"](maps))
    found = F.interpolate(module(maps), scale_factor=2, mode="bilinear", align_corners=True)
    assert close(found, expected)
    assert not torch.allclose(module([maps[0], *(each.flip(-1) for each in maps[1:])]), module(maps), atol=1e-3)


# methods by other ways

PLAIN = vp.LinearSegmentation(layers="quarters", batch_norm=False, dropout=0.0)
METHODS = {
    "lora": vp.LoRA(rank=2, alpha=4.0, targets=("fc1", "fc2")),
    "ssf": vp.SSF(),
    "bit_fit": vp.BitFit(),
    "mona": vp.Mona(bottleneck=4, dropout=0.0),
}
OUTSIDE = {"patch_embed.proj": "patch_embed", "stem.0": "patch_embed"}
OUTSIDE |= {"patch_embed.norm": "patch_embed_norm", "stem.1": "patch_embed_norm"}
BETWEEN = {"norm": "norm", "0": "norm", "reduction": "reduction", "1": "reduction"}
CONV_NORM = {"norm": "norm2"}


def places_of(model):
    """Module -> the name below which an adapter keeps what acts on it, with the part of its output."""
    blocks = [block for stage in stages_of(model) for block in stage.blocks]
    names = {id(module): path for path, module in model.named_modules()}
    inside = {f"{names[id(block)]}.": number for number, block in enumerate(blocks)}
    for path, module in model.named_modules():
        between = re.fullmatch(r"(?:layers|stages)\.(\d)\.downsample\.(\w+)", path)
        own = next((start for start in inside if path.startswith(start)), None)
        if path in OUTSIDE:
            yield module, OUTSIDE[path], 1, 0
        elif between:
            yield module, f"downsample.{between[1]}/{BETWEEN[between[2]]}", 1, 0
        elif own is not None and path.endswith("attn.qkv"):
            yield from ((module, f"{inside[own]}.{site}", 3, part) for part, site in enumerate("qkv"))
        elif own is not None:
            site = path.removeprefix(own)
            yield module, f"{inside[own]}.{CONV_NORM.get(site, site.rpartition('.')[2])}", 1, 0


def change_by_hook(kind, values, name, parts, part):
    """What a method does to an output, or to a third of it."""
    found = {path.removeprefix(f"{name}."): value for path, value in values.items() if path.startswith(f"{name}.")}

    def hook(module, given, output):
        if not found:
            return None
        first = isinstance(module, torch.nn.Conv2d | LayerNorm2d)
        pieces = list((output.movedim(1, -1) if first else output).chunk(parts, dim=-1))
        if kind == "lora":
            pieces[part] = pieces[part] + 2.0 * (given[0] @ found["A"].T @ found["B"].T)
        else:
            pieces[part] = pieces[part] * found.get("scale", 1.0) + found["shift"]
        y = torch.cat(pieces, dim=-1)
        return y.movedim(-1, 1) if first else y

    return hook


def mona(x, values, name):
    """Mona of a map (batch, rows, columns, channels)."""
    f = {path.removeprefix(f"{name}."): value for path, value in values.items() if path.startswith(f"{name}.")}
    normed = F.layer_norm(x, x.shape[-1:], f["norm.weight"], f["norm.bias"])
    h = (f["norm_scale"] * normed + f["scale"] * x) @ f["down.weight"].T + f["down.bias"]
    h = h + sum(depthwise(h, f[f"depthwise.{i}.weight"], f[f"depthwise.{i}.bias"]) for i in range(3)) / 3
    h = h + h @ f["pointwise.weight"].T + f["pointwise.bias"]
    return x + F.gelu(h) @ f["up.weight"].T + f["up.bias"]


def block_with_mona(block, number, values, x):
    at = {site: f"{number}.{site}" for site in ("stream_mid", "stream_out")}
    if not hasattr(block, "attn"):
        return mona(type(block).forward(block, x).movedim(1, -1), values, at["stream_out"]).movedim(-1, 1)
    x = mona(x + block._attn(block.norm1(x)), values, at["stream_mid"])
    return mona(x + block.mlp(block.norm2(x)), values, at["stream_out"])


def changed(model, kind, values):
    """A plain backbone that computes what a method would, by hooks of torch."""
    if kind == "mona":
        for number, block in enumerate(block for stage in stages_of(model) for block in stage.blocks):
            block.forward = functools.partial(block_with_mona, block, number, values)
        return model
    for module, name, parts, part in places_of(model):
        module.register_forward_hook(change_by_hook(kind, values, name, parts, part))
    return model


def logits_of(maps, head):
    """The linear head on four stages by its formula."""
    normed = []
    for x, norm in zip(maps, head.norms, strict=True):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
        normed.append(F.interpolate(x, size=maps[0].shape[-2:], mode="bilinear"))
    return F.conv2d(torch.cat(normed, dim=1), head.classify.weight, head.classify.bias)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_methods_and_their_gradients_are_those_of_hooks(name, kind):
    """Of every value of the adapter, its head among them; the norm after the last stage has none, as nothing reads it.

    Key shifts of Swin change nothing, and have a gradient of nothing but rounding.
    """
    model = vp.DensePredictor(backbone(name), PLAIN, 3, METHODS[kind]).eval()
    part = model.peft.default
    torch.manual_seed(3)
    with torch.no_grad():
        base = model.coarse_logits(images())
        for parameter in part.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    values = dict(part.named_parameters())
    inside = {path.removeprefix(f"{kind}.visual."): value for path, value in values.items()}
    assert "norm.shift" not in inside
    plain = changed(backbone(name), kind, inside)
    expected = logits_of(hooked_maps(plain, images()), part.head)
    found = model.coarse_logits(images())
    assert close(found, expected)
    assert not torch.allclose(found, base, atol=1e-2)
    ours, theirs = (torch.autograd.grad(y.square().mean(), list(values.values())) for y in (found, expected))
    for path, one, other in zip(values, ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-10), path
        assert path.endswith(".k.shift") or one.abs().max() > 1e-7, path


# what is predicted


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "convnext"])
def test_images_of_any_size_in_whole_and_in_windows(name):
    """Filled up to the stride of the last stage; windows are images of their own."""
    model = vp.DensePredictor(backbone(name, torch.float32), vp.LinearSegmentation(layers="quarters"), 3).eval()
    pixels = images(50, 76).float()
    coarse = model.head(hooked_maps(model.backbone, F.pad(pixels, (0, 20, 0, 14))))
    expected = F.interpolate(coarse, size=(64, 96), mode="bilinear")[:, :, :50, :76]
    assert torch.allclose(model(pixels), expected, atol=1e-4)
    assert torch.equal(vp.predict_masks(model, pixels), model(pixels).argmax(1))
    logits, _ = window_logits(model, pixels, 40, 36)
    corner = model(pixels[..., 10:, 36:])
    assert torch.allclose(logits[..., 40:, 40:], corner[..., 30:, 4:], atol=1e-4)
    assert not torch.allclose(logits, model(pixels), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("head", [vp.SETR(width=4), vp.Segmenter(depth=1)], ids=["setr", "segmenter"])
def test_heads_of_one_map_read_the_last_stage(head):
    model = vp.DensePredictor(backbone(), head, 3).eval()
    assert model.blocks == (3,)
    last = hooked_maps(model.backbone, images())[3]
    normed = F.layer_norm(last.movedim(1, -1), (64,), eps=1e-6).movedim(-1, 1)
    torch.nn.init.zeros_(model.head.norm.bias)
    assert close(model.coarse_logits(images()), model.head.head(normed[:, None]))


def test_all_is_trained_but_the_norm_that_nothing_reads():
    for name, norm in (("swin", "norm."), ("convnext", "head.norm.")):
        model = vp.DensePredictor(backbone(name), PLAIN, 3, vp.FullFineTuning())
        assert any(path.startswith(norm) for path, _ in model.backbone.named_parameters())
        model.coarse_logits(images()).square().mean().backward()
        trained = {path: p for path, p in model.peft.default.trained_parameters()}
        assert all(p.grad is not None and p.grad.any() for path, p in trained.items() if "k.bias" not in path)
        assert not any(path.startswith(f"backbone.{norm}") for path in trained)
        untrained = {path for path, _ in model.backbone.named_parameters() if f"backbone.{path}" not in trained}
        assert untrained == {f"{norm}weight", f"{norm}bias"}


def test_saved_and_routed(tmp_path):
    """The head comes back from its description; each row of a batch has the logits of its adapter alone."""
    made = [vp.DensePredictor(backbone("convnext", torch.float32), vp.UPerNet(width=6), 3).eval() for _ in range(2)]
    lora, mona = vp.LoRA(rank=2, targets=("fc1", "fc2")), vp.Mona(bottleneck=2, dropout=0.0)
    for name, method in (("default", lora), ("other", mona)):
        vp.attach(made[0], method, name=name)
    for tensor in made[0].peft.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 0.5)
    for name in ("default", "other"):
        vp.save(made[0], tmp_path / name, name=name, class_names=["a", "b", "c"])
        vp.load(made[1], tmp_path / name, name=name)
    pixels = images().float()
    with torch.no_grad():
        alone = []
        for name in ("default", "other"):
            for model in made:
                with vp.use(model, name):
                    alone.append(model(pixels))
        assert torch.equal(alone[0], alone[1])
        assert torch.equal(alone[2], alone[3])
        with vp.route(made[0], ["other", "default"]):
            rows = made[0](pixels)
    assert torch.allclose(rows[0], alone[2][0], atol=1e-4)
    assert torch.allclose(rows[1], alone[0][1], atol=1e-4)
    assert not torch.allclose(rows[0], alone[0][0], atol=1e-2)


def test_a_saved_head_that_reads_other_stages_is_refused(tmp_path):
    boxes = vp.ObjectDetector(backbone(dtype=torch.float32), vp.FCOS(width=64, convs=0), 2, vp.LoRA(rank=2))
    vp.save(boxes, tmp_path)
    regions = vp.FasterRCNN(width=16, hidden=16)
    with pytest.raises(vp.StorageError, match="FCOS reads stages 1, 2, 3, and this model gives its head stages 0, 1"):
        vp.load(vp.ObjectDetector(backbone(dtype=torch.float32), regions, 3), tmp_path)
    same = vp.ObjectDetector(backbone(dtype=torch.float32), vp.FasterRCNN(width=16, hidden=16, finest=2), 3)
    vp.load(same, tmp_path)
    assert same.num_classes == 2


def test_a_backbone_in_half_precision_under_a_head_in_single():
    model = vp.DensePredictor(backbone(dtype=torch.float32), PLAIN, 3, vp.LoRA(rank=2)).eval()
    with torch.no_grad():
        expected = model(images().float())
        model.backbone.bfloat16()
        assert model.peft.default.head.classify.weight.dtype == torch.float32
        found = model(images().bfloat16()).float()
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vp.DensePredictor(backbone(), vp.PMT()), "PMT takes maps of one width and resolution"),
        (lambda: vp.DensePredictor(backbone(), vp.EoMT(depth=1)), "a backbone in stages does not have; use UPerNet"),
        (lambda: vp.DensePredictor(backbone(), vp.UPerNet(layers=2)), "UPerNet reads 4 stages, not 2"),
        (lambda: vp.DensePredictor(backbone(), vp.LinearSegmentation(layers=5)), "last 5 stages of a backbone that"),
        (lambda: vp.DensePredictor(backbone(), vp.LinearSegmentation(layers=[0])), r"the last one \(3\) among them"),
        (lambda: vp.ObjectDetector(backbone(), vp.FCOS(layers=1)), "by its field finest; leave layers out"),
        (lambda: vp.ObjectDetector(backbone("convnext", output_stride=16)), "not of 8, 16, 16 pixels"),
        (
            lambda: vp.DensePredictor(backbone(dynamic_img_size=False), PLAIN)(images(128, 128)),
            "made with dynamic_img_size=True takes images of any size",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(vp.UserError, match=message):
        make()


# objects


@torch.no_grad()
@pytest.mark.parametrize("convolved", [False, True])
def test_the_pyramid_is_torchvisions(convolved):
    """With the levels that its Faster R-CNN and its FCOS add, on normalised maps."""
    channels = WIDTHS["swin"][1:] if convolved else WIDTHS["swin"]
    more = LastLevelP6P7(6, 6) if convolved else LastLevelMaxPool()
    theirs = FeaturePyramidNetwork(channels, 6, more).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = StagePyramid(channels, 6, 2 if convolved else 4, convolved).double()
    state = theirs.state_dict()
    inside = {f"pyramid.{key}": value for key, value in state.items() if "extra" not in key}
    for number, level in enumerate(("p6", "p7") if convolved else ()):
        inside |= {f"coarser.{number}.{kind}": state[f"extra_blocks.{level}.{kind}"] for kind in ("weight", "bias")}
    norms = {key: value for key, value in ours.state_dict().items() if key.startswith("norms")}
    ours.load_state_dict(inside | norms)
    maps = vp.feature_maps(backbone(), images(), range(4 - len(channels), 4))
    normed = [F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=1e-6).movedim(-1, 1) for x in maps]
    expected = list(theirs({str(number): x for number, x in enumerate(normed)}).values())
    found = list(ours(maps).values())
    assert len(found) == 5
    assert all(close(*pair) for pair in zip(found, expected, strict=True))
    assert ours.strides(16) == ([8, 16, 32, 64, 128] if convolved else [4, 8, 16, 32, 64])
    total = sum(channels)
    values = 2 * total + 6 * total + len(channels) * (9 * 36 + 12) + (2 * (9 * 36 + 6) if convolved else 0)
    assert sum(p.numel() for p in ours.parameters()) == values


@pytest.mark.parametrize(
    ("name", "head", "read"),
    [
        ("swin", vp.FCOS(width=64, convs=0, score_threshold=0.0), (1, 2, 3)),
        ("convnext", vp.MaskRCNN(width=8, hidden=8, mask_width=4, score_threshold=0.0), (0, 1, 2, 3)),
    ],
)
def test_objects_on_stages_are_learnt_found_and_saved(name, head, read, tmp_path):
    made = [vp.ObjectDetector(backbone(name, torch.float32), head, 2) for _ in range(2)]
    model = vp.attach(made[0], vp.LoRA(rank=2, targets=("fc1", "fc2")))
    assert model.blocks == read
    box = torch.tensor([[4.0, 6.0, 40.0, 38.0]])
    target = {"boxes": box, "labels": torch.tensor([1]), "masks": torch.zeros(1, 50, 76, dtype=torch.uint8)}
    target["masks"][:, 6:38, 4:40] = 1
    optimiser = torch.optim.AdamW(vp.trainable_parameters(model), lr=1e-3)
    pixels, losses = images(50, 76).float(), []
    for _ in range(4):
        losses.append(sum(model.losses(pixels, [target] * 2).values()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in vp.trainable_parameters(model))
    vp.save(model, tmp_path / "adapter", class_names=["a", "b"])
    vp.load(made[1], tmp_path / "adapter")
    with torch.no_grad():
        found, again = (each.eval()(pixels)[0] for each in made)
    assert torch.equal(found["boxes"], again["boxes"])
    assert len(found["boxes"])
    assert found["boxes"][:, 2].max() <= 76


def test_a_swin_made_for_dense_heads_keeps_its_windows_at_every_size():
    """Also where maps of its own size fit into one window; SwinV2 keeps those that its bias was learnt in."""
    made = create_dense_backbone("swin_tiny_patch4_window7_224", pretrained=False, **SWIN)
    assert [stage.blocks[-1].window_size for stage in made.layers] == [(4, 4)] * 4
    assert made.layers[2].blocks[1].shift_size == (2, 2)
    own = create_dense_backbone("swin_tiny_patch4_window7_224", pretrained=False, always_partition=False, **SWIN)
    assert own.layers[2].blocks[1].shift_size == (0, 0)
    second = create_dense_backbone("swinv2_tiny_window8_256", pretrained=False, **SWIN)
    assert second.layers[3].blocks[0].window_size == (2, 2)
    assert made.dynamic_img_size
    assert second.dynamic_img_size
