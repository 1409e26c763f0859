"""Heads of queries: their formulas in float64, matching by trying all, and the loss of Hugging Face transformers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

import visionpeft as vp
from visionpeft.heads import mask_loss
from visionpeft.heads.mask_classification import MaskPredictions, attention_mask, rotations, scores_of, share_masked

POINTS = vp.MaskLoss(points=40)


def lattice(*shape, device=None):
    """Points that depend on their number alone, in the place of drawn ones."""
    count = math.prod(shape[-2:])
    return ((torch.arange(count) * 0.618034) % 1).reshape(1, *shape[-2:]).expand(shape).clone()


@pytest.fixture
def without_chance(monkeypatch):
    monkeypatch.setattr(torch, "rand", lattice)


def predicted(queries=5, classes=4, dtype=torch.float64, predictions=1):
    generator = torch.Generator().manual_seed(0)
    masks = [torch.randn(2, queries, 6, 8, generator=generator, dtype=dtype) * 2 for _ in range(predictions)]
    logits = [torch.randn(2, queries, classes + 1, generator=generator, dtype=dtype) for _ in range(predictions)]
    return MaskPredictions([each.requires_grad_() for each in masks], logits)


def labelled(ignored=0):
    labels = torch.randint(3, (2, 12, 16), generator=torch.Generator().manual_seed(1))
    labels[0, :, :9] = 3
    labels[:, 12 - ignored :] = -1
    return labels


def bilinear(values, x, y, fades=True):
    """One value of a list of rows between the centres of pixels; outside of them it fades to 0 or stays as it is."""
    rows, columns = len(values), len(values[0])
    x, y = x * columns - 0.5, y * rows - 0.5
    if not fades:
        x, y = min(max(x, 0), columns - 1), min(max(y, 0), rows - 1)
    left, top = math.floor(x), math.floor(y)
    total = 0.0
    for row, column in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= row < rows and 0 <= column < columns:
            total += values[row][column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return total


def compared(logits, target, valid, points, shares=(1.0, 1.0)):
    """Binary cross-entropy and dice of one mask and one class, at points."""
    bce = weight = overlap = sums = 0.0
    for x, y in points:
        v, t = bilinear(valid, x, y, fades=False), bilinear(target, x, y)
        logit = bilinear(logits, x * shares[1], y * shares[0])
        s = 1 / (1 + math.exp(-logit))
        bce -= v * (t * math.log(s) + (1 - t) * math.log(1 - s))
        weight, overlap, sums = weight + v, overlap + v * s * t, sums + v * (s + t)
    return bce / max(weight, 1), 1 - (2 * overlap + 1) / (sums + 1)


def expected_loss(predictions, labels, shares=(1.0, 1.0), weights=POINTS):
    """The loss with the best of all assignments."""
    total = 0.0
    drawn = [tuple(p) for p in lattice(1, weights.points, 2)[0].tolist()]
    many = [tuple(p) for p in lattice(1, int(weights.points * weights.oversample), 2)[0].tolist()]
    important = int(weights.points * weights.important)
    anew = [tuple(p) for p in lattice(1, weights.points - important, 2)[0].tolist()]
    for masks, classes in zip(predictions.masks, predictions.classes, strict=True):
        entropies, weighted, pairs, number = 0.0, 0.0, 0.0, 0
        for i, label in enumerate(labels):
            present = sorted(set(label.flatten().tolist()) - {-1})
            number += len(present)
            valid = (label != -1).double().tolist()
            targets = [(label == c).double().tolist() for c in present]
            probabilities = classes[i].softmax(-1).tolist()
            cost = {}
            for q, (j, c) in itertools.product(range(len(classes[i])), enumerate(present)):
                bce, dice = compared(masks[i, q].tolist(), targets[j], valid, drawn, shares)
                cost[q, j] = 5 * bce + 5 * dice - 2 * probabilities[q][c]
            chosen = min(
                itertools.permutations(range(len(classes[i])), len(present)),
                key=lambda queries: sum(cost[q, j] for j, q in enumerate(queries)),
            )
            wanted = {q: present[j] for j, q in enumerate(chosen)}
            for q, row in enumerate(probabilities):
                weight = 1.0 if q in wanted else 0.1
                entropies -= weight * math.log(row[wanted.get(q, -1)])
                weighted += weight
            for j, q in enumerate(chosen):
                logits = masks[i, q].tolist()
                by_doubt = sorted(many, key=lambda p: abs(bilinear(logits, p[0] * shares[1], p[1] * shares[0])))
                bce, dice = compared(logits, targets[j], valid, [*by_doubt[:important], *anew], shares)
                pairs += 5 * bce + 5 * dice
        total += 2 * entropies / weighted + pairs / number
    return total


@pytest.mark.usefixtures("without_chance")
@pytest.mark.parametrize(("ignored", "shares"), [(0, (1.0, 1.0)), (5, (0.75, 0.9))])
def test_loss_by_its_formula(ignored, shares):
    predictions, labels = predicted(queries=4, predictions=1 + (ignored > 0)), labelled(ignored)
    found = vp.mask_classification_loss(predictions, labels, -1, shares, POINTS)
    assert found.item() == pytest.approx(expected_loss(predictions, labels, shares), rel=1e-6)
    outside = vp.mask_classification_loss(predictions, labels.clamp(min=0), -1, shares, POINTS)
    assert ignored == 0 or abs(outside.item() - found.item()) > 1e-3  # pixels that are ignored would show
    assert abs(found.item() - expected_loss(predictions, labels.flip(2), shares)) > 1e-3


@pytest.mark.usefixtures("without_chance")
def test_loss_is_that_of_transformers():
    from transformers import EomtConfig
    from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentation, EomtLoss

    config = EomtConfig(num_labels=4)
    config.train_num_points = POINTS.points
    weights = {"loss_cross_entropy": config.class_weight, "loss_mask": config.mask_weight}
    theirs = EomtLoss(config, weights | {"loss_dice": config.dice_weight})
    theirs.weight_dict["loss_dice"] = config.dice_weight
    predictions, labels = predicted(dtype=torch.float32), labelled()
    classes = [label.unique() for label in labels]
    masks = [(label == c[:, None, None]).float() for label, c in zip(labels, classes, strict=True)]
    stand_in = type("StandIn", (), {"criterion": theirs, "weight_dict": theirs.weight_dict})()
    terms = EomtForUniversalSegmentation.get_loss_dict(
        stand_in, predictions.masks[0], predictions.classes[0], masks, classes, None
    )
    ours = vp.mask_classification_loss(predictions, labels, weights=POINTS)
    assert ours.item() == pytest.approx(sum(terms.values()).item(), rel=1e-5)
    mine, other = (torch.autograd.grad(x, predictions.masks[0])[0] for x in (ours, sum(terms.values())))
    assert torch.allclose(mine, other, atol=1e-7)
    assert mine.abs().sum() > 0


def test_loss_without_a_labelled_pixel_and_with_more_classes_than_queries():
    predictions = predicted(queries=2)
    nothing = torch.full((2, 12, 16), -1)
    alone = vp.mask_classification_loss(predictions, nothing, weights=POINTS)
    entropy = -predictions.classes[0].log_softmax(-1)[..., -1].mean()
    assert alone.item() == pytest.approx(2 * entropy.item())
    one = labelled()
    one[1] = -1  # of two images one
    for labels in (one, labelled()):
        loss = vp.mask_classification_loss(predictions, labels, weights=POINTS)
        (gradient,) = torch.autograd.grad(loss, predictions.masks[0])
        assert gradient.isfinite().all()
        assert bool(gradient[1].abs().sum() > 0) == bool((labels[1] >= 0).any())


def test_of_a_diverged_model_it_is_the_loss_that_tells():
    predictions = predicted()
    with torch.no_grad():
        predictions.masks[0].fill_(math.nan)
    assert vp.mask_classification_loss(predictions, labelled(), weights=POINTS).isnan()


@pytest.mark.parametrize("options", [{"points": 0}, {"dice": -1.0}, {"important": 1.5}, {"oversample": 0.5}])
def test_weights_that_make_no_loss_are_refused(options):
    with pytest.raises(vp.ConfigurationError, match="must"):
        vp.MaskLoss(**options)


def test_masks_are_lost_as_published():
    """On Cityscapes three blocks lose theirs at these of 107 x 186 steps, on COCO four at sixths (recalled)."""
    steps = 107 * 186
    for index, (first, last) in enumerate(zip([3317, 8292, 13268], [6634, 11609, 16585], strict=True)):
        assert share_masked((first - 1) / steps, index, 3) == 1
        assert share_masked((last + 1) / steps, index, 3) == 0
        assert share_masked((first + last) / 2 / steps, index, 3) == pytest.approx(0.5**0.9, abs=1e-3)
    assert [share_masked(0.25, index, 4) < 1 for index in range(4)] == [True, False, False, False]
    assert [share_masked(0.75, index, 4) > 0 for index in range(4)] == [False, False, False, True]


def test_rotations_are_those_of_dinov3():
    theirs = RotaryEmbeddingDinoV3(16).eval().get_embed([5, 7])
    assert torch.equal(rotations((5, 7), 16, torch.zeros(1)), theirs)
    assert not torch.equal(rotations((5, 7), 16, torch.zeros(1)), rotations((7, 5), 16, torch.zeros(1)))


def test_only_queries_are_masked():
    seen = torch.tensor([[[True, False, False], [False, True, True]]])
    mask = attention_mask(seen, before=1)
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].long().tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 1],
        *[[1, 1, 1, 1, 1, 1]] * 3,
    ]


def test_scores():
    predictions = predicted()
    masks, classes = predictions.masks[-1], predictions.classes[-1]
    expected = sum(
        classes[:, q].softmax(-1)[:, :-1, None, None] * masks[:, q, None].sigmoid() for q in range(masks.shape[1])
    )
    assert torch.allclose(predictions.scores, expected, atol=1e-12)
    assert predictions.scores.shape == (2, 4, 6, 8)


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def layer_norm(p, name, x, eps=1e-5):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def reading(p, tokens, queries, size):
    """Masks and classes of tokens, queries first."""
    q = tokens[:, :queries]
    vector = linear(p, "mask.4", F.gelu(linear(p, "mask.2", F.gelu(linear(p, "mask.0", q)))))
    x = tokens[:, queries:].transpose(1, 2).unflatten(2, size)
    x = F.gelu(F.conv_transpose2d(x, p["upscale.0.0.weight"], p["upscale.0.0.bias"], stride=2))
    x = F.conv2d(x, p["upscale.0.2.weight"], padding=1, groups=x.shape[1])
    x = layer_norm(p, "upscale.0.3", x.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)
    return torch.einsum("bqd,bdhw->bqhw", vector, x), linear(p, "classify", q)


@pytest.mark.parametrize("training", [True, False])
def test_pmt(training):
    torch.manual_seed(0)
    module = vp.PMT(queries=3, depth=2, hidden=10, upscale=1).make(8, 4, 2).double().train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    maps = torch.randn(2, 4, 8, 3, 5, dtype=torch.float64)
    p, size = dict(module.named_parameters()), (3, 5)
    x = 0
    for index in range(4):
        z = maps[:, index]
        mean, variance = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), unbiased=False, keepdim=True)
        z = (z - mean) / (variance + 1e-5).sqrt() * p[f"norms.{index}.weight"][:, None, None]
        z = (z + p[f"norms.{index}.bias"][:, None, None]).flatten(2).transpose(1, 2)
        z = z + linear(p, f"lateral.{index}.2", F.gelu(linear(p, f"lateral.{index}.0", z)))
        x = x + p["scales"][index] * z
    x = torch.cat([p["queries"].expand(2, -1, -1), x], dim=1)
    rope = rotations(size, 8, x)
    sin, cos = rope.chunk(2, dim=-1)
    expected = []
    for index in range(2):
        name = f"blocks.{index}"
        mask = torch.ones(2, 18, 18, dtype=torch.bool)
        if training:
            expected.append(reading(p, layer_norm(p, "norm", x), 3, size))
            mask[:, :3, 3:] = F.interpolate(expected[-1][0], size=size, mode="bilinear").flatten(2) > 0
        h = layer_norm(p, f"{name}.norm1", x)
        q, k, v = (h @ p[f"{name}.attn.qkv.weight"].T).chunk(3, dim=-1)
        q, v = q + p[f"{name}.attn.q_bias"], v + p[f"{name}.attn.v_bias"]

        def rotated(tokens):
            patches = tokens[:, 3:]
            turned = torch.cat([-patches[..., 4:], patches[..., :4]], dim=-1)
            return torch.cat([tokens[:, :3], patches * cos + turned * sin], dim=1)

        weights = (rotated(q) @ rotated(k).mT / 8**0.5).masked_fill(~mask, -math.inf).softmax(-1)
        x = x + p[f"{name}.gamma_1"] * linear(p, f"{name}.attn.proj", weights @ v)
        h = F.gelu(linear(p, f"{name}.mlp.fc1", layer_norm(p, f"{name}.norm2", x)))
        x = x + p[f"{name}.gamma_2"] * linear(p, f"{name}.mlp.fc2", h)
    expected.append(reading(p, layer_norm(p, "norm", x), 3, size))
    if training:
        found = module(maps)
        assert len(found.masks) == 3
        for ours, theirs in zip(zip(found.masks, found.classes, strict=True), expected, strict=True):
            assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(ours, theirs, strict=True))
        module.progress = 1.0  # nothing is masked any more
        assert not torch.allclose(module(maps).masks[-1], expected[-1][0], atol=1e-3)
    else:
        for norm in module.norms:
            norm.train()
            norm.momentum = 1.0
        module(maps)  # running statistics are those of these maps now, but for Bessel's correction
        for norm in module.norms:
            norm.running_var *= 29 / 30
        assert torch.allclose(module.eval()(maps), scores_of(*expected[-1]), atol=1e-8)


def test_counts():
    width, classes = 768, 150
    head = 100 * width + width * (classes + 1) + classes + 1 + 3 * (width**2 + width) + 2 * (4 * width**2 + 12 * width)
    assert head == 6_701_719  # what EoMT adds to ViT-B
    lateral = 4 * (width**2 + width // 2 + width) + 12 * width
    for hidden, printed in ((1024, 32.7), (None, 51.6)):
        wide = hidden or 4 * width
        blocks = 6 * (4 * width**2 + 2 * width * wide + wide + 10 * width)
        module = vp.PMT(hidden=hidden).make(width, 4, classes)
        count = sum(parameter.numel() for parameter in module.parameters())
        assert count == head + lateral + blocks + 2 * width
        assert round(count / 1e6, 1) == printed


@pytest.mark.parametrize(
    "options", [{"queries": 0}, {"upscale": -1}, {"depth": 0}, {"hidden": 0}, {"layers": 2}, {"masked": "no"}]
)
def test_what_makes_no_head_is_refused(options):
    with pytest.raises(vp.ConfigurationError):
        vp.PMT(**options).blocks(12)


def test_one_query_of_two_is_left_without_a_mask():
    """In a block that loses its masks, queries are drawn that see all; the others go on seeing theirs."""
    module = vp.PMT(queries=400, depth=1, upscale=0).make(4, 4, 2)
    module.progress = 0.25  # the only block loses its masks from 1/6 to 1/3
    masks = torch.full((1, 400, 4, 4), -1.0)
    seen = module.open(masks, (4, 4), 0, 1)
    assert seen.all(2).float().mean().item() == pytest.approx(1 - 0.5**0.9, abs=0.08)
    assert (seen.all(2) | ~seen.any(2)).all()


def test_scipy_is_asked_for(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(vp.ConfigurationError, match="pip install scipy"):
        mask_loss.mask_classification_loss(predicted(), labelled(), weights=POINTS)
