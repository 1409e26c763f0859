"""PromptAlign against a float64 loop over images written out here, and the statistics of its source."""

import copy
import functools
import json

import pytest
import torch
from clip_reference import NAMES, clip_model, images, lively_, tokenizer
from PIL import Image

from visionpeft import prepare
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.clip.learners import CoOp, MaPLe, PromptAlign
from visionpeft.clip.source_statistics import read_moments, save_moments, source_moments
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.models.create_clip import create_clip


@functools.cache
def trained():
    """A MaPLe whose prompts stand anywhere; not to be changed."""
    torch.manual_seed(3)
    return lively_(MaPLe(clip_model(), tokenizer(), NAMES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved MaPLe, and the statistics of ten images."""
    place = tmp_path_factory.mktemp("source")
    save_learner(trained(), place / "maple")
    moments, count = source_moments(trained(), images(10, seed=9).split(4))
    save_moments(place / "statistics", trained(), moments, {"images": count})
    return place


def build(folders, **options):
    options = {"maple": str(folders / "maple"), "statistics": str(folders / "statistics")} | options
    return PromptAlign(clip_model(), tokenizer(), NAMES, selection=0.3, **options)


def views(batch=2, count=7):
    return images(batch * count, seed=5).unflatten(0, (batch, count))


def tokens_of(learner, x):
    """Tokens (blocks, images, tokens, width) that enter each block, the block's prompts last.

    Written out with the library's own stem and blocks, the prompts standing among the tokens.
    """
    visual, prompts = learner.clip.visual, learner.clip.peft["maple"].coupled_prompts
    texts = [prompts.text["context"].prompts, prompts.text["1"].stream_in.prompts]
    maps = [prompts.visual[str(index)].stream_in.projection for index in range(2)]
    stream = visual.conv1(x).flatten(2).mT
    stream = torch.cat((visual.class_embedding.expand(len(x), 1, -1), stream), 1) + visual.positional_embedding
    stream, seen = visual.ln_pre(stream), []
    blocks = [copy.deepcopy(plain) for plain in clip_model().visual.transformer.resblocks]
    for index, block in enumerate(blocks):
        own = texts[index] @ maps[index].weight.T + maps[index].bias
        own = visual.ln_pre(own) if index == 0 else own
        seen.append(torch.cat((stream, own.expand(len(x), -1, -1)), 1))
        stream = block(seen[-1])[:, : stream.shape[1]]
    return torch.stack(seen)


def loss_by_hand(learner, kept, weight, source):
    features = learner.clip.encode_image(kept)
    texts = learner.encode_text()
    logits = learner.clip.logit_scale.exp() * features / features.norm(dim=1, keepdim=True) @ texts.T
    mean = logits.softmax(1).mean(0)
    distance = 0
    for tokens, s, u in zip(tokens_of(learner, kept), *source, strict=True):
        m = sum(tokens) / len(tokens)
        v = sum((one - m) ** 2 for one in tokens) / len(tokens)
        distance = distance + ((m - s).abs().mean() + (v - u).abs().mean()) / 2
    return -(mean * mean.log()).sum() + weight * distance / 2


@pytest.mark.parametrize(("weight", "steps"), [(100.0, 1), (100.0, 2), (0.0, 1)])
def test_each_image_is_tuned_as_the_formula_says(folders, weight, steps):
    learner = build(folders, weight=weight, steps=steps, lr=0.01)
    before = {name: value.clone() for name, value in learner.trained_state().items()}
    tuned = list(learner.clip.peft["maple"].parameters())
    source_tokens = tokens_of(learner, images(10, seed=9)).detach()
    source = source_tokens.mean(1), source_tokens.var(1, unbiased=False)
    source[0][:, -2:] = source_tokens[:, 0, -2:]  # the prompts, of which a mean of ten differs by rounding
    x = views()
    found = learner(x)
    for own, pictures in zip(found, x, strict=True):
        logits = learner.unadapted(learner.image_features(pictures[None]))  # of view 0, to compare with
        each = torch.cat([learner.unadapted(learner.image_features(one[None, None])) for one in pictures])
        p = each.softmax(1)
        kept = pictures[(-(p * p.log()).sum(1)).argsort()[:2]]
        first, second = ([torch.zeros_like(value) for value in tuned] for _ in range(2))
        for step in range(1, steps + 1):
            gradients = torch.autograd.grad(loss_by_hand(learner, kept, weight, source), tuned)
            with torch.no_grad():
                for value, gradient, m, v in zip(tuned, gradients, first, second, strict=True):
                    m.mul_(0.9).add_(0.1 * gradient)
                    v.mul_(0.999).add_(0.001 * gradient**2)
                    rate = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                    value.mul_(1 - 0.01 * 0.01).sub_(0.01 * rate)
        expected = learner.unadapted(learner.image_features(pictures[None]))[0]
        learner.load_trained_state(before, "the start")
        # The first step goes by the signs of gradients, some of which are 0 but for rounding: they move nothing.
        torch.testing.assert_close(own, expected, rtol=0, atol=2e-5)
        assert (own - logits[0]).abs().max() > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in learner.trained_state().items())


def test_moments_are_those_of_all_images_and_of_the_views(folders):
    learner = build(folders)
    tokens = tokens_of(learner, images(10, seed=9)).detach()
    torch.testing.assert_close(learner.source_mean, tokens.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(learner.source_variance, tokens.var(1, unbiased=False), rtol=0, atol=1e-5)
    # of the very images of the source nothing is left to align, in whichever order
    x = images(10, seed=9)
    texts = learner.encode_text()
    for order in (range(10), range(9, -1, -1)):
        aligned, _ = learner.objective(x[list(order)], texts)
        learner.weight = 0
        assert abs((aligned - learner.objective(x, texts)[0]).item()) < 1e-3
        learner.weight = 100.0
    assert (learner.objective(images(10), texts)[0] - learner.objective(x, texts)[0]).item() > 1


def test_images_do_not_see_each_other_and_are_kept_with_the_learner(folders, tmp_path):
    learner = build(folders)
    x = views(3)
    together = learner(x)
    assert torch.equal(learner(x[[2, 0, 1]]), together[[2, 0, 1]])
    save_learner(learner, tmp_path)
    loaded = load_learner(tmp_path, clip_model(), tokenizer())
    with torch.inference_mode():
        assert torch.equal(loaded(x.clone()), together)
    assert loaded.options == learner.options
    assert (learner.trainable_parameters(), learner.depth) == ([], 2)
    torch.manual_seed(0)
    assert learner(images(1)).shape == (1, 4)  # views are drawn
    loss, logits = learner.loss(x, torch.arange(3))
    assert torch.equal(logits, together)
    assert not loss.requires_grad


def test_command(tmp_path, capsys):
    """It reads a run and a folder of images as predictions do, and says how its result is used."""
    clip, words = create_clip("nano_clip")
    torch.manual_seed(0)
    learner, size = MaPLe(clip, words, NAMES), clip.visual.image_size[0]
    metadata = {"data": {"resize": "crop"}}
    save_learner(learner, tmp_path / "run/learner", preprocessing=preprocessing_of(clip), metadata=metadata)
    (tmp_path / "run" / "results.json").write_text(json.dumps({"seed": 1}))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(3):
        pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=torch.manual_seed(index))
        Image.fromarray(pixels.numpy()).save(pictures / f"{index}.png")
    arguments = ["statistics", "--run", str(tmp_path / "run"), "--images", str(pictures)]
    assert prepare.main([*arguments, "--output", str(tmp_path / "made"), "--batch-size", "2"]) == 0
    assert "statistics of 3 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "made" / "statistics.json").read_text())["record"]["images"] == 3
    made = PromptAlign(
        *create_clip("nano_clip"), NAMES, maple=str(tmp_path / "run/learner"), statistics=str(tmp_path / "made")
    )
    assert made.source_mean.shape[0] == learner.depth
    assert made(torch.zeros(1, 3, 3, size, size)).shape == (1, 4)
    assert prepare.main([*arguments, "--output", str(tmp_path / "other"), "--images", str(pictures / "0.png")]) == 2
    assert "at least two images, and here are 1" in capsys.readouterr().err


def test_refusals(folders, tmp_path):
    with pytest.raises(ConfigurationError, match="prepare statistics --run RUN --images FOLDER"):
        build(folders, statistics=None)(views())
    with pytest.raises(StorageError, match="are of other prompts than those this learner starts from"):
        build(folders, maple=None)
    with pytest.raises(ConfigurationError, match="cannot classify features that were computed before"):
        build(folders).classify(torch.zeros(1, 4, 64))
    with pytest.raises(ConfigurationError, match="must not be negative"):
        build(folders, weight=-1.0)
    with pytest.raises(ConfigurationError, match="at least two images, and here are 1"):
        source_moments(trained(), [images(1)])
    with pytest.raises(StorageError, match="holds no statistics"):
        read_moments(tmp_path, trained())
    save_learner(CoOp(clip_model(), tokenizer(), NAMES), tmp_path)
    with pytest.raises(StorageError, match="can start from a MaPLe learner, and in"):
        build(folders, maple=str(tmp_path))
