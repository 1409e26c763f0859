"""A backbone with a head that finds objects: sizes, masks in whole images, saving, and what reaches the backbone."""

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F

import visionpeft as vp
from visionpeft.models.object_detector import at_size

HEAD = vp.FCOS(width=64, convs=0, score_threshold=0.0, detections=20)


def detector(method=None, head=HEAD):
    torch.manual_seed(0)
    backbone = vp.create_backbone("test_vit", pretrained=False, num_classes=0, img_size=32, dynamic_img_size=True)
    return vp.ObjectDetector(backbone, head, ["cat", "dog"], method).eval()


@torch.no_grad()
def test_an_image_of_any_size_and_the_pixels_it_had():
    model = detector()
    patch = model.patch
    images = torch.randn(2, 3, 2 * patch + 5, 3 * patch)
    found = model(images, [(4 * patch + 10, 6 * patch), tuple(images.shape[-2:])])
    plain = model(images)
    assert torch.allclose(found[0]["boxes"], 2 * plain[0]["boxes"])
    assert torch.equal(found[1]["boxes"], plain[1]["boxes"])
    assert found[0]["boxes"].shape == (20, 4)
    assert all(image["boxes"][:, 3].max() <= 2 * patch + 5 for image in plain)  # not into what was filled up
    assert (plain[0]["scores"].diff() <= 0).all()
    filled = F.pad(images, (0, 0, 0, patch - 5))
    alone = vp.feature_maps(model.backbone, filled, model.blocks)
    assert torch.equal(model.maps(images), alone)


def test_masks_lie_in_their_boxes():
    """The left half of a box, in an image that is twice as wide and as high as the tensor."""
    mask = torch.zeros(1, 1, 28, 28)
    mask[..., :14] = 1
    found = {"boxes": torch.tensor([[4.0, 2.0, 12.0, 10.0]]), "masks": mask}
    found |= {"scores": torch.ones(1), "labels": torch.zeros(1, dtype=torch.long)}
    whole = at_size(found, (16, 20), (32, 40))
    assert whole["boxes"].tolist() == [[8, 4, 24, 20]]
    expected = torch.zeros(32, 40, dtype=torch.bool)
    expected[4:20, 8:16] = True
    assert whole["masks"].shape == (1, 32, 40)
    # torchvision draws the border of a mask of 28 x 28 to within a pixel
    assert (whole["masks"][0] ^ expected).sum() <= 16 + 2 * 16 + 2 * 8
    assert whole["masks"][0, 6:18, 10:14].all()


def test_whole_masks_are_drawn_one_by_one(monkeypatch):
    """100 masks of a photograph of 12 million pixels, drawn at once, were 9 GiB for an answer of 1.1."""
    from visionpeft.models import object_detector

    drawn, draw = [], object_detector.paste_masks_in_image
    monkeypatch.setattr(
        object_detector, "paste_masks_in_image", lambda masks, *more: drawn.append(len(masks)) or draw(masks, *more)
    )
    generator = torch.Generator().manual_seed(0)
    corners = 30 * torch.rand(5, 2, generator=generator) - 4
    found = {
        "boxes": torch.cat([corners, corners + 1 + 9 * torch.rand(5, 2, generator=generator)], dim=1),
        "masks": torch.rand(5, 1, 28, 28, generator=generator),
        "scores": torch.ones(5),
        "labels": torch.zeros(5, dtype=torch.long),
    }
    whole = at_size(found, (30, 30), (45, 60))
    assert drawn == [1] * 5
    assert torch.equal(whole["masks"], draw(found["masks"], whole["boxes"], (45, 60))[:, 0] > 0.5)
    nothing = {name: value[:0] for name, value in found.items()}
    assert at_size(nothing, (30, 30), (45, 60))["masks"].shape == (0, 45, 60)


def test_method_and_head_learn_and_are_saved_together(tmp_path):
    model = detector([vp.LoRA(rank=2), vp.VPT(num_tokens=2, deep=True)]).train()
    images = torch.randn(2, 3, 32, 48)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 30.0, 28.0]]), "labels": torch.tensor([1])}] * 2
    base = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimiser = torch.optim.AdamW(vp.trainable_parameters(model), lr=1e-2)
    for _ in range(2):  # LoRA's A has no gradient while B is zero
        optimiser.zero_grad()
        sum(model.losses(images, targets).values()).backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vp.trainable_parameters(model))
    assert all(torch.equal(value, base[name]) for name, value in model.backbone.state_dict().items() if name in base)
    vp.save(model, tmp_path / "adapter", class_names=["cat", "dog"])
    other = detector()
    with torch.no_grad():
        before, (expected, _) = other(images)[0]["boxes"], model.eval()(images)
        vp.load(other, tmp_path / "adapter")
        assert torch.equal(other(images)[0]["boxes"], expected["boxes"])
        assert not torch.equal(before, expected["boxes"])
        vp.disable(other)
        assert not torch.equal(other(images)[0]["scores"], expected["scores"])
    assert vp.read_metadata(tmp_path / "adapter")["heads"]["head"]["class"] == "FCOS"


@torch.no_grad()
def test_images_of_a_routed_batch_are_those_of_each_adapter():
    """Each by the adapter and the head of its row, and after the route as before; losses are those of one head."""
    model = detector(vp.LoRA(rank=2))
    vp.attach(model, vp.AdaptFormer(bottleneck=4), name="other")
    for parameter in model.peft.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    images, names = torch.randn(3, 3, 32, 40), ["other", "default", "other"]
    alone = {}
    for name in ("default", "other"):
        with vp.use(model, name):
            alone[name] = model(images)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 30.0, 28.0]]), "labels": torch.tensor([1])}] * 3
    with vp.route(model, names):
        found = model(images)
        with pytest.raises(vp.UnsupportedError, match="train one adapter at a time"):
            model.losses(images, targets)
    for row, name in enumerate(names):
        assert torch.allclose(found[row]["boxes"], alone[name][row]["boxes"], atol=1e-3)
        assert torch.equal(found[row]["labels"], alone[name][row]["labels"])
    assert not torch.allclose(found[0]["scores"], alone["default"][0]["scores"], atol=1e-4)
    with vp.use(model, "default"):
        assert torch.equal(model(images)[0]["boxes"], alone["default"][0]["boxes"])


@torch.no_grad()
@pytest.mark.parametrize("head", [HEAD, vp.FasterRCNN(width=8, hidden=8)], ids=["fcos", "faster_rcnn"])
def test_boxes_are_computed_in_single_precision(head):
    """The backbone may be in half, and Autocast on; a head in half precision is told how to come back."""
    model = detector(vp.LoRA(rank=2), head)
    images = torch.randn(1, 3, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images)[0]["boxes"].dtype == torch.float32
    model.backbone.bfloat16()
    (expected,) = model(images.bfloat16())
    model.bfloat16()
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 30.0, 28.0]]), "labels": torch.tensor([1])}]
    for compute in (lambda: model(images.bfloat16()), lambda: model.losses(images.bfloat16(), targets)):
        with pytest.raises(vp.ConfigurationError, match=r"single precision, not in torch.bfloat16; put model.backbone"):
            compute()
    model.peft.float()
    assert model(images.bfloat16())[0]["boxes"].shape == expected["boxes"].shape


def test_what_does_not_fit_is_refused():
    with pytest.raises(vp.UnsupportedError, match="class_token_only"):
        vp.economise(detector(vp.LoRA(rank=2)), class_token_only=True)
    with pytest.raises(vp.ConfigurationError, match=r"images \(batch, channels, height, width\)"):
        detector()(torch.zeros(3, 32, 32))
    with pytest.raises(vp.ConfigurationError, match="list of names, or their number"):
        vp.ObjectDetector("test_vit", HEAD, [])
    with pytest.raises(vp.UnsupportedError, match="an ObjectDetector needs sited blocks; ResNet has no sited blocks"):
        vp.ObjectDetector(timm.create_model("test_resnet"), HEAD)
    with pytest.raises(vp.UnsupportedError, match="an ObjectDetector takes a model of images alone, not a CLIP"):
        vp.ObjectDetector(open_clip.model.CLIP(8, {"layers": 1, "width": 64, "image_size": 32}, {"layers": 1}), HEAD)
