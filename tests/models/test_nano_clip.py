"""The embedded CLIPs: their files, their loader, and how well they name drawings without training."""

import csv
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from visionpeft.clip.text import TextEncoder
from visionpeft.errors import ConfigurationError
from visionpeft.models.create_clip import create_clip
from visionpeft.models.embedded import NANO_CLIPS
from visionpeft.models.nano_clip import load_nano_clip

DATASETS = Path(__file__).parents[2] / "datasets"


@pytest.fixture(scope="module", params=NANO_CLIPS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def clip(name):
    return load_nano_clip(name)


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.tokenizer.SimpleTokenizer()


def test_files_are_small(name):
    assert sum(path.stat().st_size for path in NANO_CLIPS[name].iterdir()) <= 12_000_000


def test_created_by_name(name):
    clip, _ = create_clip(name)
    assert clip.backbone_source["name"] == name
    state = load_file(NANO_CLIPS[name] / "model.safetensors")
    assert torch.equal(clip.visual.proj, state["visual.proj"].float())
    with pytest.raises(ConfigurationError, match=f"{name} takes no further arguments"):
        create_clip(name, pretrained=False)


def test_the_weights_differ():
    first, distilled = (load_nano_clip(name).visual.proj for name in NANO_CLIPS)
    assert not torch.equal(first, distilled)


def test_a_name_that_is_nearly_right():
    with pytest.raises(
        ConfigurationError, match=r"no CLIP model 'nano_clip\.destilled'; did you mean nano_clip\.distilled"
    ):
        create_clip("nano_clip.destilled")


def test_is_a_plain_open_clip_model(clip, tokenizer):
    assert type(clip) is open_clip.CLIP
    assert not clip.training
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}
    with torch.no_grad():
        image = clip.encode_image(torch.zeros(2, 3, 64, 64))
        text = clip.encode_text(tokenizer(["a photo of a bird.", "birds", ""]))
    assert image.shape[0] == 2
    assert text.shape == (3, image.shape[1])
    assert clip.token_embedding.weight.shape[0] == tokenizer.vocab_size == 49408
    assert clip.context_length == 77
    assert 1 <= clip.logit_scale.exp() <= 100.5


def test_preprocessing_is_known_to_open_clip(clip):
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False
    )
    image = transform(Image.new("L", (90, 70), 255))
    assert image.shape == (3, 64, 64)
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[name]) for name in ("mean", "std"))
    torch.testing.assert_close(image[:, 32, 32], (1 - mean) / std)


def test_words_never_seen_have_no_embedding(name, clip, tokenizer):
    stored = set(load_file(NANO_CLIPS[name] / "model.safetensors")["token_embedding.ids"].tolist())
    zero = (clip.token_embedding.weight == 0).all(1)
    assert set(torch.nonzero(~zero).flatten().tolist()) == stored
    assert {tokenizer.sot_token_id, tokenizer.eot_token_id} <= stored
    seen, unseen = tokenizer.encode("a photo of a bird."), [min(set(range(49408)) - stored)]
    text = TextEncoder(clip)
    assert not text.unseen(seen)
    assert text.unseen([*seen, *unseen])


def drawings(name, split, size):
    with (DATASETS / name / f"{split}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (DATASETS / name / "train.csv").open(newline="") as file:
        names = sorted({row["label"] for row in csv.DictReader(file)})
    rows = rows[:: max(1, len(rows) // size)]
    images = np.stack([np.asarray(Image.open(DATASETS / name / row["path"])) for row in rows])
    return torch.from_numpy(images), torch.tensor([names.index(row["label"]) for row in rows]), names


@pytest.mark.parametrize("dataset", ["clipart", "drawings"])
def test_names_drawings_without_training(name, clip, tokenizer, dataset):
    bars = {
        "nano_clip": {"clipart": 0.18, "drawings": 0.28},
        "nano_clip.distilled": {"clipart": 0.26, "drawings": 0.45},
    }
    images, labels, names = drawings(dataset, "test", 350)
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[key]) for key in ("mean", "std"))
    x = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        image = clip.encode_image(x, normalize=True)
        text = clip.encode_text(
            tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in names]), normalize=True
        )
    assert ((image @ text.T).argmax(1) == labels).float().mean() > bars[name][dataset]
