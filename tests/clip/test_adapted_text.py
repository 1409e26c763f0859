"""The fast text path on a text tower that carries adapters: the features and gradients of running it in full."""

import open_clip
import pytest
import torch
from conftest import randomise
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

import visionpeft as vp

NAMES = ["red kite", "buzzard", "2012 Lamborghini Gallardo LP 570-4 Superleggera", "heron"]
TOKENIZER = open_clip.tokenizer.SimpleTokenizer()
METHODS = [
    vp.LoRA(rank=2, targets=("q", "k", "v", "proj", "fc1", "fc2"), towers="text"),
    vp.SSF(towers="text"),
    vp.BitFit(towers="text"),
    vp.PrefixTuning(num_tokens=3, towers="text"),
    vp.Adapter(bottleneck=4, placement="houlsby", towers="text"),
    vp.Adapter(bottleneck=4, placement="adapter_plus", towers="text"),
    vp.AdaptFormer(bottleneck=4, towers="text"),
    vp.DoRA(rank=2, targets=("q", "fc2"), towers="text"),
    vp.KAdaptation(towers="text"),
    vp.Compacter(bottleneck=8, towers="text"),
    vp.MAM(num_tokens=2, bottleneck=4, towers="text"),
    vp.IA3(towers="text"),
    vp.RepAdapter(bottleneck=4, towers="text"),
    vp.FacT(rank=2, towers="text"),
    vp.LayerNormTuning(towers="text"),
    [vp.LoRA(rank=2, towers="text"), vp.PrefixTuning(num_tokens=2, towers="text"), vp.SSF(towers="text")],
]


def adapted(method):
    """A CLIP in float64 whose text tower carries a method, moved off its initial values."""
    torch.manual_seed(0)
    text = CLIPTextCfg(context_length=77, vocab_size=49408, width=32, heads=2, layers=3)
    clip = CLIP(24, CLIPVisionCfg(image_size=16, patch_size=8, width=32, layers=2, head_width=16), text).double()
    vp.attach(clip, method)
    randomise(clip.peft["default"])
    return clip.eval()


def features_and_gradient(learner, fast):
    learner.fast_text = fast
    features = learner.text_features()
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((features * weights).sum(), learner.vectors)
    return features.detach(), gradient


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_adapters_act_the_same_on_packed_texts(method, position):
    learner = vp.CoOp(adapted(method), TOKENIZER, NAMES, context_length=4, position=position)
    assert learner.text.why_in_full(learner.layout) is None
    features, gradient = features_and_gradient(learner, fast=True)
    expected, expected_gradient = features_and_gradient(learner, fast=False)
    assert (features - expected).abs().max() < 1e-10
    assert (gradient - expected_gradient).abs().max() < 1e-10 * expected_gradient.abs().max()


def test_what_acts_on_whole_texts_is_run_in_full():
    learner = vp.CoOp(adapted(vp.VPT(num_tokens=2, init="normal", towers="text")), TOKENIZER, NAMES)
    assert learner.text.why_in_full(learner.layout) == "Prompts acts on whole texts"
    assert torch.equal(features_and_gradient(learner, fast=True)[0], features_and_gradient(learner, fast=False)[0])


@pytest.mark.parametrize(
    ("gate", "reason"),
    [("input", "GatedPrefix acts on the keys of whole texts"), ("values", "GatedBottleneck acts on whole texts")],
)
def test_gates_see_whole_texts(gate, reason):
    method = vp.UniPELT(rank=2, num_tokens=2, bottleneck=4, prefix_gate=gate, towers="text")
    learner = vp.CoOp(adapted(method), TOKENIZER, NAMES)
    assert learner.text.why_in_full(learner.layout) == reason
    assert torch.equal(features_and_gradient(learner, fast=True)[0], features_and_gradient(learner, fast=False)[0])


def test_an_unknown_change_of_keys_is_run_in_full():
    clip = adapted(vp.PrefixTuning(num_tokens=3, towers="text"))
    learner = vp.CoOp(clip, TOKENIZER, NAMES)
    for block in clip.transformer.resblocks:
        for module in block.sites.acting["kv"]:
            del module.num_tokens
    assert learner.text.why_in_full(learner.layout) == "Prefix acts on the keys of whole texts"


@pytest.mark.parametrize("trained", ["adapter", "tower"])
def test_kept_texts_follow_an_optimiser_that_counts_no_versions(trained):
    """PyTorch's fused optimisers: a CLIP is trained by a loop of one's own, and a classifier of its texts measured."""
    clip = adapted(vp.LoRA(rank=2, towers="text"))
    if trained == "tower":
        vp.detach(clip)
    learner = vp.ZeroShot(clip, TOKENIZER, NAMES)
    parameters = [*(clip.peft if trained == "adapter" else clip.transformer).parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    with torch.no_grad():
        before = learner.text_features()
        assert learner.text_features() is before
    clip.encode_text(TOKENIZER(NAMES)).square().sum().backward()
    versions = [parameter._version for parameter in parameters]
    optimizer.step()
    assert versions == [parameter._version for parameter in parameters]
    with torch.no_grad():
        after = learner.text_features()
        assert (after - before).abs().max() > 1e-3
        assert torch.equal(after, learner.encode_text())
        assert learner.text_features() is after
