"""ClearCLIP and what it is compared with: by their formulas in float64, from the weights of a CLIP alone."""

import pytest
import torch
import torch.nn.functional as F
from clip_reference import clip_model, images, layer_norm, tokenizer

import visionpeft as vp
from visionpeft.clip.local_features import with_local_features
from visionpeft.models.windows import window_logits

NAMES = ["sky", "wall", "cat", "red kite"]
CLASSES = {"background": ["sky", "wall"], "animal": ["cat", "red kite"]}
PLAIN = {"attention": "plain", "residual": True, "mlp": True}
TEMPLATES = ["a photo of a {}.", "art of the {}."]


def learner(clip=None, kind="plain"):
    return vp.ZeroShot(clip_model(kind) if clip is None else clip, tokenizer(), NAMES, TEMPLATES)


def tokens_before_the_last_block(visual, pixels):
    """By OpenCLIP's own blocks."""
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    return x


def expected(clip, pixels, texts, attention, residual, mlp):
    """Logits (batch, names, rows, columns), head by head."""
    visual = clip.visual
    block = visual.transformer.resblocks[-1]
    x = tokens_before_the_last_block(visual, pixels)
    h = layer_norm(x, block.ln_1)
    q, k, v = (h @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=-1)
    size = q.shape[-1] // block.attn.num_heads
    heads = []
    for i in range(block.attn.num_heads):
        a, b, c = (each[..., i * size : (i + 1) * size] for each in (q, k, v))
        weights = {
            "query": (a @ a.mT / size**0.5).softmax(-1),
            "query_key": (a @ a.mT / size**0.5).softmax(-1) + (b @ b.mT / size**0.5).softmax(-1),
            "value": torch.eye(a.shape[1], dtype=a.dtype),
            "plain": (a @ b.mT / size**0.5).softmax(-1),
        }[attention]
        heads.append(weights @ c)
    y = torch.cat(heads, -1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    y = x + y if residual else y
    if mlp:
        inner = layer_norm(y, block.ln_2) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
        y = y + F.gelu(inner) @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
    y = layer_norm(y[:, 1:], visual.ln_post) @ visual.proj
    cosines = y / y.norm(dim=-1, keepdim=True) @ texts.T
    return (clip.logit_scale.exp() * cosines).transpose(1, 2).unflatten(2, visual.grid_size)


@pytest.mark.parametrize(
    "options",
    [{}, {"attention": "query_key", "residual": True, "mlp": True}, {"attention": "value", "residual": True}, PLAIN],
    ids=str,
)
def test_by_its_formula(options):
    base = learner()
    model = vp.OpenVocabulary(base, **options)
    filled = {"attention": "query", "residual": False, "mlp": False} | options
    with torch.no_grad():
        texts = base.text_features()
        found = model.coarse_logits(images())
        assert torch.allclose(found, expected(base.clip, images(), texts, **filled), atol=1e-9)
        whole = vp.OpenVocabulary(base, **PLAIN).coarse_logits(images())
        local = F.normalize(with_local_features(base.clip, images())[:, 1:], dim=-1)
        assert torch.allclose(whole, base.logits(local, texts).transpose(1, 2).unflatten(2, (2, 2)), atol=1e-9)
        assert (options == PLAIN) == torch.allclose(found, whole, atol=1e-2)  # CLIP's own last block is another


def test_custom_attention_and_its_scale():
    base = learner(kind="custom")
    with torch.no_grad():
        plain = vp.OpenVocabulary(base, **PLAIN, scale=7.0).coarse_logits(images())
        local = F.normalize(with_local_features(base.clip, images())[:, 1:], dim=-1)
        cosines = local @ base.text_features().T
    assert torch.allclose(plain, 7 * cosines.transpose(1, 2).unflatten(2, (2, 2)), atol=1e-9)


def test_classes_of_several_names_and_the_background():
    model = vp.OpenVocabulary(learner(), CLASSES, threshold=0.45)
    assert model.class_names == ["background", "animal"]
    probabilities = torch.tensor([[0.3, 0.2, 0.4, 0.1], [0.1, 0.2, 0.1, 0.6], [0.5, 0.2, 0.2, 0.1]])
    logits = probabilities.log().T[None, :, None]
    assert model.decide(logits).tolist() == [[[0, 1, 0]]]
    model.threshold = 0.0
    assert model.decide(logits).tolist() == [[[1, 1, 0]]]
    assert vp.OpenVocabulary(learner()).decide(logits).tolist() == [[[2, 3, 0]]]


def test_windows_and_smaller_images():
    model = vp.OpenVocabulary(learner(clip_model(dtype=torch.float32)))
    pixels = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        logits, shares = window_logits(model, pixels, 32, 16)
        first, second = (model(pixels[..., begin : begin + 32]) for begin in (0, 16))
        assert torch.allclose(logits[..., 16:32], (first[..., 16:] + second[..., :16]) / 2, atol=1e-4)
        filled = F.pad(pixels[..., :20], (0, 12))
        assert torch.equal(model(pixels[..., :20]), model(filled)[..., :20])
    assert shares == (1, 1)
    assert vp.predict_masks(model, pixels, window=32, stride=16, size=(64, 96)).shape == (1, 64, 96)
    with pytest.raises(vp.ConfigurationError, match=r"32 x 48, and this CLIP takes 32 x 32; use windows \(window=32\)"):
        vp.predict_masks(model, pixels)


def test_adapters_act_in_the_last_block_where_it_is_computed():
    clip = clip_model(dtype=torch.float32)
    vp.attach(clip, vp.LoRA(rank=2, blocks="last:1", towers="visual"))
    model = vp.OpenVocabulary(learner(clip))
    pixels = images(dtype=torch.float32)
    with torch.no_grad():
        before = model.coarse_logits(pixels)
        for parameter in clip.peft.parameters():
            parameter.normal_()
        assert not torch.allclose(model.coarse_logits(pixels), before, atol=1e-2)
    for method in (vp.VPT(num_tokens=2), vp.AdaptFormer(bottleneck=2), vp.PrefixTuning(num_tokens=2)):
        clip = clip_model(dtype=torch.float32)
        vp.attach(clip, method)
        with pytest.raises(vp.UnsupportedError, match="on the tokens of the last block"):
            vp.OpenVocabulary(learner(clip)).coarse_logits(pixels)
    clip = clip_model(dtype=torch.float32)
    vp.attach(clip, vp.VPT(num_tokens=2, blocks=[0], towers="visual"))
    assert vp.OpenVocabulary(learner(clip)).coarse_logits(pixels).shape == (3, 4, 2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vp.OpenVocabulary(learner(kind="resnet")), "image tower of OpenCLIP's own with at least two"),
        (lambda: vp.OpenVocabulary(learner(), attention="key"), "attention must be one of"),
        (lambda: vp.OpenVocabulary(learner(), threshold=1.0), r"must be in \[0, 1\)"),
        (lambda: vp.OpenVocabulary(learner(), scale=0.0), "scale 0.0 positive"),
        (lambda: vp.OpenVocabulary(learner(), {"a": ["sky"]}), "each name of the learner one class"),
        (lambda: vp.OpenVocabulary(learner(), CLASSES | {"more": ["dog"]}), "look at 'dog'"),
        (lambda: vp.OpenVocabulary(vp.TPT(clip_model(), tokenizer(), NAMES)), "adapts to whole test images"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(vp.UserError, match=message):
        make()
