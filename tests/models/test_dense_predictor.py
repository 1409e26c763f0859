"""A backbone with a head on its maps: against plain torch, transcriptions, and the library's own functions."""

from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F

import visionpeft as vp
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.models import dense_predictor, strips
from visionpeft.models.windows import window_logits

SIZE = (48, 64)


def backbone(dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "depth": 3, "dynamic_img_size": True} | options
    made = timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=48, num_heads=3, **options)
    return made.to(dtype)


def predictor(method=None, head=None, dtype=torch.float32, **options):
    head = head or vp.LinearSegmentation(layers=2, dropout=0.0)
    return vp.DensePredictor(backbone(dtype), head, classes=["sky", "sea", "sand"], method=method, **options)


def images(*size, dtype=torch.float32):
    return torch.randn(2, 3, *(size or SIZE), generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("sizes", [(6, 48), (6, 45), (7, 7), (9, 4)])
def test_interpolation_is_torchs(sizes):
    small, large = sizes
    matrix = strips.interpolation(small, large)
    values = torch.randn(1, 1, small, dtype=torch.float64)
    expected = F.interpolate(values, size=large, mode="linear", align_corners=False)
    assert torch.allclose(values @ matrix.T, expected, atol=1e-12)
    corners = F.interpolate(values, size=large, mode="linear", align_corners=True)
    assert small == large or not torch.allclose(values @ matrix.T, corners, atol=1e-3)


def test_strips_are_the_whole(monkeypatch):
    """Loss, classes and gradient of many strips, of a part of the logits' extent, with ignored pixels."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 3 * 2 * 4 * 30 * 8)
    torch.manual_seed(0)  # with 2.6 % of seeds, ignored pixels change the mean loss by less than is asked below
    coarse = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 4, (2, 37, 30))
    assert len(list(strips._ranges(coarse, 37, 30))) == 13
    loss, found = strips.cross_entropy(coarse, labels, -1, (37 / 40, 30 / 32))
    whole = F.interpolate(coarse, size=(40, 32), mode="bilinear")[:, :, :37, :30]
    expected = F.cross_entropy(whole, labels, ignore_index=-1)
    assert torch.allclose(loss, expected, atol=1e-12)
    assert torch.equal(found, whole.argmax(1))
    assert torch.equal(strips.classes_of(coarse, (37, 30), (37 / 40, 30 / 32)), found)
    ours, theirs = (torch.autograd.grad(value, coarse, retain_graph=True)[0] for value in (loss, expected))
    assert torch.allclose(ours, theirs, atol=1e-12)
    counted = F.cross_entropy(whole, labels.clamp(min=0))
    assert not torch.allclose(loss, counted, atol=1e-3)  # ignored pixels would show


def test_without_labelled_pixels_the_loss_is_zero():
    coarse = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss, _ = strips.cross_entropy(coarse, torch.full((1, 8, 8), -1), -1)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(coarse.grad, torch.zeros_like(coarse))


def with_prompts(model, pixels, prompts, first, last):
    """Tokens after each block, with prompts after the class token from block `first` to block `last`."""
    inside = model.backbone
    x = inside._pos_embed(inside.patch_embed(pixels))
    after = []
    for index, block in enumerate(inside.blocks):
        if index == first:
            x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        x = timm.models.vision_transformer.Block.forward(block, x)
        if index == last:
            x = torch.cat([x[:, :1], x[:, 1 + prompts.shape[-2] :]], dim=1)
        after.append(x[:, -(SIZE[0] // 8) * (SIZE[1] // 8) :])
    return torch.stack([inside.norm(tokens) for tokens in after[1:]], dim=1)


def test_maps_are_the_patches_without_travelling_prompts():
    model = predictor(vp.VPT(num_tokens=3, deep=False), dtype=torch.float64).eval()
    (prompts,) = [p for n, p in model.peft.default.vpt.named_parameters() if p.shape[-1] == 48]
    prompts.data.normal_()
    pixels = images(dtype=torch.float64)
    maps = vp.feature_maps(model.backbone, pixels, (1, 2))
    with vp.use(model, None):
        plain = vp.feature_maps(model.backbone, pixels, (1, 2))
        expected = with_prompts(model, pixels, prompts, 0, 2)
        library = model.backbone.forward_intermediates(pixels, indices=[1, 2], norm=True, intermediates_only=True)
    rows = expected.reshape(2, 2, 6, 8, 48).permute(0, 1, 4, 2, 3)
    assert maps.shape == (2, 2, 48, 6, 8)
    assert torch.allclose(maps, rows, atol=1e-10)
    assert torch.equal(plain, torch.stack(library, dim=1))
    assert not torch.allclose(maps, plain, atol=1e-3)


@pytest.mark.parametrize("method", [vp.LoRA(rank=2), vp.VPT(num_tokens=2), vp.AdaptFormer(bottleneck=4)])
def test_methods_change_maps_and_learn(method):
    model = predictor(method)
    before = model(images())
    for parameter in model.peft.default.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    after = model(images())
    after.square().mean().backward()
    assert not torch.allclose(before, after, atol=1e-3)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vp.trainable_parameters(model))


def test_images_are_filled_up_to_whole_patches():
    model = predictor().eval()
    pixels = images(45, 58)
    coarse = model.head(vp.feature_maps(model.backbone, F.pad(pixels, (0, 6, 0, 3)), (1, 2)))
    expected = F.interpolate(coarse, size=(48, 64), mode="bilinear")[:, :, :45, :58]
    assert torch.allclose(model(pixels), expected, atol=1e-5)
    assert torch.equal(vp.predict_masks(model, pixels), expected.argmax(1))


def trained_once(**options):
    torch.manual_seed(3)
    model = predictor(vp.LoRA(rank=2), vp.LinearSegmentation(layers=2, dropout=0.5), **options)
    model.peft.train()
    labels = torch.randint(3, (2, *SIZE), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(4)
    strips.cross_entropy(model.coarse_logits(images()), labels, -1)[0].backward()
    return [p.grad for p in vp.trainable_parameters(model)], list(model.peft.default.head.buffers())


def test_computing_the_head_again_changes_nothing(monkeypatch):
    """Gradients, with dropout, and running statistics, which a second pass would move again."""
    kept, buffers = trained_once(recompute_head=False)
    again, after = trained_once()
    assert all(map(torch.equal, kept, again))
    assert all(map(torch.equal, buffers, after))
    monkeypatch.setattr(dense_predictor, "_statistics_kept", lambda model: nullcontext())
    assert not all(map(torch.equal, buffers, trained_once()[1]))


def test_less_is_kept_for_the_backward_pass():
    labels = torch.randint(3, (2, *SIZE))

    def kept(**options):
        model = predictor(vp.LoRA(rank=2), **options)
        step = (
            (lambda: strips.cross_entropy(model.coarse_logits(images()), labels, -1)[0])
            if model.recompute_head
            else (lambda: F.cross_entropy(F.interpolate(model.coarse_logits(images()), size=SIZE), labels))
        )
        return saved_bytes(step, storages(model))[0]

    logits = 2 * 3 * SIZE[0] * SIZE[1] * 4
    assert kept() < kept(recompute_head=False) - logits


@pytest.mark.parametrize(
    "head",
    [
        vp.LinearSegmentation(layers="quarters"),
        vp.SETR(width=8),
        vp.Segmenter(depth=1),
        vp.DPT(width=8),
        vp.UPerNet(width=8),
        vp.PMT(queries=3, depth=1, upscale=0),
    ],
)
def test_heads_are_saved_with_the_adapter(head, tmp_path):
    made = [vp.DensePredictor(backbone(depth=4), head, classes=3) for _ in range(2)]
    vp.attach(made[0], vp.LoRA(rank=2))
    for tensor in made[0].peft.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    vp.save(made[0], tmp_path / "adapter", class_names=["a", "b", "c"])
    vp.load(made[1], tmp_path / "adapter")
    with torch.no_grad():
        expected, found = (model.eval()(images()) for model in made)
    assert torch.equal(expected, found)


def test_a_damaged_description_of_a_head_is_refused():
    from visionpeft.adapters.head_layout import head_from_layout

    layout = dict(vp.LinearSegmentation().make(8, 1, 2).layout)
    assert head_from_layout(layout, predictor(), "head")(torch.zeros(1, 1, 8, 2, 2)).shape == (1, 2, 2, 2)
    for damaged in ({"class": "Elsewhere"}, {"fields": {"dropout": 2}}, {"fields": {"width": 2}}, {"arguments": {}}):
        with pytest.raises(vp.StorageError, match="can build"):
            head_from_layout(layout | damaged, predictor(), "head")


def test_a_saved_head_that_reads_other_blocks_is_refused(tmp_path):
    """What the shapes let through would be computed from other maps in silence."""
    four = vp.LinearSegmentation(layers="quarters", dropout=0.0)
    first_and_last = vp.LinearSegmentation(layers=[0, 3], dropout=0.0)
    eomt = vp.EoMT(queries=3, depth=2, upscale=0)
    saved = {"four": four, "first": first_and_last, "eomt": eomt, "setr": vp.SETR(width=8)}
    for name, head in saved.items():
        vp.save(vp.DensePredictor(backbone(depth=4), head, 3, vp.LoRA(rank=2)), tmp_path / name)
    for own, name, message in (
        (vp.LinearSegmentation(layers=2), "first", "reads blocks 0, 3, and this model gives its head blocks 2, 3"),
        (vp.LinearSegmentation(), "four", "reads blocks 0, 1, 2, 3, and this model gives its head block 3; make a Den"),
        (eomt, "four", r"LinearSegmentation reads .* with LinearSegmentation\(layers='quarters'"),
        (vp.SETR(width=8), "eomt", "blocks the last 2 compute queries of the saved head EoMT, and none those of this"),
        (eomt, "setr", "blocks none compute queries of the saved head SETR, and the last 2 those of this model's head"),
        (vp.EoMT(queries=3, depth=1, upscale=0), "eomt", "the last 2 compute queries .* and the last 1 those"),
    ):
        model = vp.DensePredictor(backbone(depth=4), own, 2)
        with pytest.raises(vp.StorageError, match=message):
            vp.load(model, tmp_path / name)
        assert not hasattr(model, "peft")
    for own, name in ((vp.LinearSegmentation(layers=[0, 3]), "first"), (vp.Segmenter(depth=1), "setr")):
        model = vp.DensePredictor(backbone(depth=4), own, 2)
        vp.load(model, tmp_path / name)
        assert model.eval()(images()).shape == (2, 3, *SIZE)
        assert model.num_classes == 3
        vp.disable(model)
        assert model.num_classes == 2


def test_rows_of_a_routed_batch_are_those_of_each_adapter():
    model = predictor(vp.LoRA(rank=2)).eval()
    vp.attach(model, vp.AdaptFormer(bottleneck=4), name="other")
    for parameter in model.peft.other.parameters():
        parameter.data.normal_(std=0.1)
    pixels = images()
    with torch.no_grad():
        with vp.route(model, ["default", "other"]):
            rows = model(pixels)
        for row, name in enumerate(("default", "other")):
            with vp.use(model, name):
                assert torch.allclose(rows[row], model(pixels)[row], atol=1e-5)
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)


def test_windows_are_averaged_where_they_overlap():
    model = predictor().eval()
    pixels = images(32, 40)
    with torch.no_grad():
        logits, shares = window_logits(model, pixels, 32, 8)
        first, second = model(pixels[..., :32]), model(pixels[..., 8:])
        whole, _ = window_logits(model, pixels, 64, None)
        assert torch.allclose(whole, model(pixels), atol=1e-5)
    assert shares == (1, 1)
    assert torch.allclose(logits[..., :8], first[..., :8], atol=1e-5)
    assert torch.allclose(logits[..., 32:], second[..., 24:], atol=1e-5)
    assert torch.allclose(logits[..., 8:32], (first[..., 8:] + second[..., :24]) / 2, atol=1e-5)
    assert not torch.allclose(logits, whole, atol=1e-3)
    with torch.no_grad():  # a last window that ends with the image: columns 0 to 32, 24 to 56, 28 to 60
        logits, _ = window_logits(model, images(32, 60), 32, 24)
        assert torch.allclose(logits[..., 56:], model(images(32, 60)[..., 28:])[..., 28:], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vp.DensePredictor(backbone(), classes=1), "at least two"),
        (lambda: vp.DensePredictor(backbone(), "linear", classes=2), "must be a head"),
        (lambda: vp.DensePredictor(backbone(), vp.LinearSegmentation(layers=4)), "a backbone that has 3"),
        (lambda: vp.DensePredictor(backbone(), vp.LinearSegmentation(layers=[0, 1])), "never learn"),
        (lambda: vp.DensePredictor(backbone(), vp.LinearSegmentation(layers=[0, 7])), "0 to 2"),
        (lambda: vp.DensePredictor(backbone(), vp.SETR(layers=2)), "reads 1 blocks"),
        (lambda: vp.LinearSegmentation(layers="halves"), "layers must be"),
        (lambda: vp.LinearSegmentation(dropout=1.0), r"in \[0, 1\)"),
        (lambda: vp.SETR(width=0), "at least 1"),
        (lambda: predictor()(images()[0]), "batch, channels, height, width"),
        (lambda: vp.DensePredictor(backbone(dynamic_img_size=False))(images(40, 48)), "dynamic_img_size=True"),
        (lambda: window_logits(predictor(), images(), 16, 20), "stride 20 must be from 1"),
        (lambda: vp.DensePredictor(timm.create_model("resnet18")), "needs sited blocks; ResNet has"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(vp.UserError, match=message):
        make()


FAMILIES = {
    "vit_small_patch16_dinov3": ({"img_size": 32, "dynamic_img_size": True}, (32, 48)),
    "beit_base_patch16_224": ({"img_size": 32}, (32, 32)),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 28, "dynamic_img_size": True}, (28, 42)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Rotary and relative positions, registers: maps are the library's, and change with what acts.

    With layer scales of 1, as the libraries' first ones of 1e-5 hide every effect.
    """
    options, size = FAMILIES[name]
    inside = timm.create_model(name, depth=2, embed_dim=48, num_heads=3, num_classes=0, init_values=1.0, **options)
    model = vp.DensePredictor(inside, vp.LinearSegmentation(layers=2), 3, vp.LoRA(rank=2)).eval()
    pixels = images(*size)
    with torch.no_grad():
        maps = vp.feature_maps(inside, pixels, (0, 1))
        expected = inside.forward_intermediates(pixels, indices=2, norm=True, intermediates_only=True)
        assert torch.equal(maps, torch.stack(expected, dim=1))
        for parameter in model.peft.default.lora.parameters():
            parameter.normal_()
        assert not torch.allclose(vp.feature_maps(inside, pixels, (0, 1)), maps, atol=1e-2)
    assert model(pixels).shape == (2, 3, *size)


def test_autocast_leaves_the_resizing_in_single_precision():
    model = predictor().eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        coarse = model.coarse_logits(images())
        assert coarse.dtype == torch.bfloat16
        logits = model(images())
    expected = F.interpolate(coarse.float(), size=SIZE, mode="bilinear")
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, expected, atol=1e-5)


def test_the_class_token_alone_is_no_economy_here():
    with pytest.raises(vp.UnsupportedError, match="class_token_only"):
        vp.economise(predictor(vp.LoRA(rank=2)), class_token_only=True)
