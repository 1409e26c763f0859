"""One configuration of OpenCLIP of each mechanism: learners are exact there, or refuse with one sentence.

All configurations and all learners are walked by `python benchmarks/clip_configurations.py`.
"""

import importlib.util
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from visionpeft.clip import learners
from visionpeft.errors import ConfigurationError, UnsupportedError

PATH = Path(__file__).parents[2] / "benchmarks" / "clip_configurations.py"


@pytest.fixture(scope="module")
def walk():
    sys.path.insert(0, str(PATH.parent))  # for what the benchmarks share
    try:
        spec = importlib.util.spec_from_file_location("clip_configurations", PATH)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(PATH.parent))
    return module


def small(walk, name):
    return walk.small(open_clip.get_model_config(name))


# What is special about each -> a configuration, and learners on which it may tell.
EXACT = {
    "padding is masked, a class token after the text": ("coca_ViT-B-32", ("ZeroShot", "CoOp", "MaPLe", "CLIPAdapter")),
    "not causal, last token, bias": ("ViT-B-16-SigLIP2", ("ZeroShot", "CoOp", "MaPLe", "TPT")),
    "not causal, last token, no end": ("ViT-H-14-CLIPA", ("CoOp",)),
    "end by its id": ("ViT-H-14-worldwide", ("ZeroShot", "CoOp", "MaPLe")),
    "the end is where the free id might be": ("ViT-L-14-worldwide", ("CoOp",)),
    "not causal, convolutions": ("MobileCLIP2-S0", ("ZeroShot", "CoOp")),
    "pooled by attention, rotated": ("PE-Core-B-16", ("ZeroShot", "MaPLe")),
    "a ResNet with an attention pool": ("RN50", ("TipAdapter", "PLOT", "TunedCLIP")),
    "convolutional stem, gated MLPs with a norm": ("ViTamin-B-LTT", ("ZeroShot", "MaPLe")),
}


@pytest.mark.parametrize("mechanism", EXACT)
def test_learners_are_exact(walk, mechanism):
    name, of_learners = EXACT[mechanism]
    config = small(walk, name)
    assert {learner: walk.verdict(learner, config) for learner in of_learners} == dict.fromkeys(of_learners, "exact")


@pytest.mark.parametrize("name", ["roberta-ViT-B-32", "nllb-clip-base-siglip"])
def test_text_towers_of_hugging_face_are_refused(walk, name):
    config = small(walk, name)
    clip, tokenizer = walk.build(config), walk.tokenizer_of(config)
    with pytest.raises(UnsupportedError, match="text tower of OpenCLIP's own, not HFTextEncoder"):
        learners.CoOp(clip, tokenizer, walk.NAMES)
    assert all(parameter.requires_grad for parameter in clip.parameters())  # nothing was changed


@pytest.mark.parametrize(
    ("name", "other", "where"),
    [
        ("ViT-B-16", "ViT-H-14-worldwide", "token of the largest id"),
        ("ViT-L-14-worldwide", "ViT-H-14-worldwide", "token 1"),
    ],
)
def test_tokenizers_of_other_models_are_refused(walk, name, other, where):
    """Otherwise the end of a text would be read nowhere, or in its middle."""
    clip, tokenizer = walk.build(small(walk, name)), walk.tokenizer_of(small(walk, other))
    with pytest.raises(
        ConfigurationError, match=f"reads a text at its first {where}, and the tokenizer ends .* token 2;"
    ):
        learners.ZeroShot(clip, tokenizer, walk.NAMES)
    assert all(parameter.requires_grad for parameter in clip.parameters())  # nothing was changed


def test_the_walk_notices_what_is_not_exact(walk, monkeypatch):
    """Its negative controls: slots that a mask takes for padding, features of another length, a wrong scale."""
    config = small(walk, "coca_ViT-B-32")
    encode = open_clip.CoCa.encode_text
    with monkeypatch.context() as patch:
        as_padding = lambda clip, ids, **options: encode(clip, torch.where(ids == 1, 0, ids), **options)  # noqa: E731
        patch.setattr(open_clip.CoCa, "encode_text", as_padding)
        assert walk.verdict("CoOp", config) == "WRONG: text features, fast"
    with monkeypatch.context() as patch:
        of_units = lambda learner, images: learner.clip.encode_image(images)  # noqa: E731
        patch.setattr(learners.Learner, "run_image_tower", of_units)
        assert walk.verdict("CLIPAdapter", config) == "WRONG: image features"
    with monkeypatch.context() as patch:
        patch.setattr(learners.Learner, "scale", torch.tensor(3.0, dtype=torch.float64))
        assert walk.verdict("ZeroShot", small(walk, "ViT-B-16-SigLIP")) == "WRONG: logits of zero-shot"
