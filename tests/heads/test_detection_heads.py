"""Heads that find objects: counts in closed form, the pyramid in float64, places of anchors and regions."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

import visionpeft as vp
from visionpeft.heads.detection import ExactAnchors
from visionpeft.heads.pyramids import SimplePyramid

WHOLE_PYRAMID = 5_560_000  # of 768 channels, as ViTDet has it


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def made(head, classes):
    with torch.device("meta"):
        return count(head.make(768, 1, classes, patch=16))


def test_counts_are_those_of_vitdet_and_torchvision():
    with torch.device("meta"):
        assert count(SimplePyramid(768, 256, 4)) == WHOLE_PYRAMID
        finest = 4 * 768 * 384 + 3 * 384 + 4 * 384 * 192 + 192 + 256 * (192 + 9 * 256 + 4)
        assert count(SimplePyramid(768, 256, 2)) == WHOLE_PYRAMID - finest
    proposals, regions, masks = 593_935, 14_362_055, 2_646_107  # of torchvision with 90 classes and the background
    assert made(vp.FasterRCNN(), 90) == WHOLE_PYRAMID + proposals + regions
    assert made(vp.MaskRCNN(), 90) == WHOLE_PYRAMID + proposals + regions + masks
    # 91 outputs without a background, which torchvision's count has as a label that is never trained
    assert made(vp.FCOS(), 91) == WHOLE_PYRAMID - finest + 4_946_016
    w, c, k = 256, 4, 91
    assert 2 * c * (9 * w**2 + 3 * w) + 9 * w * (k + 5) + k + 5 == 4_946_016


def test_pyramid():
    torch.manual_seed(0)
    pyramid = SimplePyramid(8, 4, 4).double()
    for parameter in pyramid.parameters():
        torch.nn.init.normal_(parameter)
    p, maps = dict(pyramid.named_parameters()), torch.randn(2, 8, 3, 5, dtype=torch.float64)

    def norm(name, x):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def twice(name, x):
        """Each place becomes 2 x 2, whatever its neighbours are."""
        y = torch.einsum("bchw,cdij->bdhiwj", x, p[f"{name}.weight"]).flatten(4, 5).flatten(2, 3)
        return y + p[f"{name}.bias"][:, None, None]

    def level(index, x):
        x = norm(f"levels.{index}.1", torch.einsum("bchw,dc->bdhw", x, p[f"levels.{index}.0.weight"][:, :, 0, 0]))
        return norm(f"levels.{index}.3", F.conv2d(x, p[f"levels.{index}.2.weight"], padding=1))

    x = norm("resample.0.1", twice("resample.0.0", maps))
    x = twice("resample.0.3", x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    filled = F.pad(maps, (0, 1, 0, 1), value=float("-inf"))  # odd sides: the last place stands alone
    halved = filled.unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax((3, 5))
    expected = [level(0, x), level(1, twice("resample.1", maps)), level(2, maps), level(3, halved)]
    expected.append(expected[3][:, :, ::2, ::2])
    found = pyramid(maps)
    assert list(found) == ["0", "1", "2", "3", "4"]
    for one, other in zip(found.values(), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    assert pyramid.strides(14) == [3.5, 7, 14, 28, 56]


def test_anchors_lie_where_patches_are():
    """Of patches of 14 pixels the finest stride is 3.5, which torchvision's own anchors take for 3."""
    levels = [torch.zeros(1, 1, 148, 148), torch.zeros(1, 1, 37, 37)]
    images = ImageList(torch.zeros(1, 3, 518, 518), [(518, 518)])
    (exact,) = ExactAnchors([4, 8], (1.0,), [3.5, 14])(images, levels)
    last = 147 * 3.5
    assert exact[148 * 148 - 1].tolist() == [last - 2, last - 2, last + 2, last + 2]
    assert exact[-1].tolist() == [36 * 14 - 4, 36 * 14 - 4, 36 * 14 + 4, 36 * 14 + 4]
    (rounded,) = AnchorGenerator(((4,), (8,)), ((1.0,),) * 2)(images, levels)
    assert rounded[148 * 148 - 1, 2].item() == 147 * 3 + 2


def test_regions_are_read_where_they_lie():
    """A map whose value is the column in pixels gives the columns of a region, also with patches of 14 pixels."""
    for patch in (14, 16):
        head = vp.FasterRCNN(width=4, hidden=4).make(8, 1, 2, patch=patch)
        align = head.detector.roi_heads.box_roi_pool
        sides = {"0": 4, "1": 2, "2": 1, "3": 0.5}
        columns = {
            name: ((torch.arange(int(40 * scale)) + 0.5) * patch / scale).expand(1, 1, int(40 * scale), -1).contiguous()
            for name, scale in sides.items()
        }
        box = torch.tensor([[100.0, 120.0, 170.0, 190.0]])
        for factor in (0.2, 1.0, 3.0):  # regions of several levels
            region = box * factor
            found = align(columns, [region], [(40 * patch, 40 * patch)])[0, 0, 0]
            width = region[0, 2] - region[0, 0]
            # torchvision samples half a place further to the right than pixels are counted here
            shift = found - (region[0, 0] + width * (torch.arange(7) + 0.5) / 7)
            assert (shift - shift.mean()).abs().max() < 1e-2
            assert 0 < shift.mean() <= patch * 2 / 2 + 1e-3


def scene():
    """A map of noise, two objects in its first image, none in its second."""
    torch.manual_seed(0)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 36.0], [20.0, 8.0, 64.0, 44.0]])
    masks = torch.zeros(2, 48, 64, dtype=torch.uint8)
    masks[0, 4:36, 4:40], masks[1, 8:44, 20:64] = 1, 1
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 0]), "masks": masks},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.long), "masks": masks[:0]},
    ]
    return torch.randn(2, 1, 8, 6, 8), targets


def test_a_head_learns_boxes_and_says_what_it_finds():
    """Losses and detections do not depend on the mode, and labels come back as they went in."""
    maps, targets = scene()
    module = vp.FCOS(width=64, convs=1).make(8, 1, 2, patch=8)
    assert {"channels", "maps", "num_classes", "patch"} == set(module.layout["arguments"])
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(40):
        loss = sum(module(maps, (48, 64), targets).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        first, second = module.eval()(maps, (48, 64))
        assert torch.equal(module.train()(maps, (48, 64))[0]["boxes"], first["boxes"])
    for label, box in zip(targets[0]["labels"], targets[0]["boxes"], strict=True):
        best = first["boxes"][first["labels"] == label][0]
        assert (best - box).abs().max() < 8
        assert first["scores"][first["labels"] == label][0] > 0.3
    assert not len(second["scores"]) or second["scores"].max() < 0.3


@torch.no_grad()
def test_labels_of_regions_count_no_background():
    """An output after the background's is the first class, in what is learnt and in what is found."""
    maps, targets = scene()
    module = vp.MaskRCNN(width=16, hidden=16, mask_width=8).make(8, 1, 2, patch=8)
    bias = module.detector.roi_heads.box_predictor.cls_score.bias
    losses = {}
    for output in (1, 2):
        bias.zero_()
        bias[output] = 9.0
        found = module(maps, (48, 64))[0]
        assert set(found["labels"][:5].tolist()) == {output - 1}
        assert found["masks"].shape[1:] == (1, 28, 28)
        seconds = [target | {"labels": torch.full_like(target["labels"], 1)} for target in targets]
        torch.manual_seed(0)
        losses[output] = module(maps, (48, 64), seconds)
    assert set(losses[1]) > {"loss_mask", "loss_objectness"}
    assert losses[2]["loss_classifier"] < losses[1]["loss_classifier"] - 0.1


def test_what_makes_no_head_is_refused():
    for make, told in (
        (lambda: vp.FCOS(width=48), "multiple of 32 from 64"),
        (lambda: vp.FCOS(finest=3), "finest must be 1, 2 or 4"),
        (lambda: vp.MaskRCNN(mask_width=0), "mask_width must be at least 1"),
        (lambda: vp.FasterRCNN(score_threshold=2.0), "score_threshold must be from 0 to 1"),
        (lambda: vp.FCOS(layers=4).blocks(12), "reads 1 blocks, not 4"),
        (lambda: vp.DensePredictor("test_vit", vp.FCOS()), "head must be a head such as LinearSegmentation"),
        (lambda: vp.ObjectDetector("test_vit", vp.LinearSegmentation()), "head that finds objects"),
    ):
        with pytest.raises(vp.ConfigurationError, match=told):
            make()
