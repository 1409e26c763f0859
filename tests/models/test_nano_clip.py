"""The embedded CLIP: its files, its loader, and how well it names drawings without training."""

import csv
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from visionpeft.clip.text import TextEncoder
from visionpeft.models.nano_clip import NANO_CLIP, load_nano_clip

DATASETS = Path(__file__).parents[2] / "datasets"


@pytest.fixture(scope="module")
def clip():
    return load_nano_clip()


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.tokenizer.SimpleTokenizer()


def test_files_are_small():
    assert sum(path.stat().st_size for path in NANO_CLIP.iterdir()) <= 12_000_000


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


def test_words_never_seen_have_no_embedding(clip, tokenizer):
    stored = set(load_file(NANO_CLIP / "model.safetensors")["token_embedding.ids"].tolist())
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


@pytest.mark.parametrize(("name", "bar"), [("clipart", 0.18), ("drawings", 0.28)])
def test_names_drawings_without_training(clip, tokenizer, name, bar):
    images, labels, names = drawings(name, "test", 350)
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[key]) for key in ("mean", "std"))
    x = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        image = clip.encode_image(x, normalize=True)
        text = clip.encode_text(
            tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in names]), normalize=True
        )
    assert ((image @ text.T).argmax(1) == labels).float().mean() > bar
