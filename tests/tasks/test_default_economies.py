"""The exact economies that need no choice, each seen at work in a task as `fit` makes it with nothing said.

What a block computes is watched in the linear layers, by the shapes that pass; what is kept for the backward pass by
autograd's own hooks. The plain formula is the same model with the economy taken off.
"""

import functools

import pytest
import torch

import visionpeft as vp
from visionpeft.clip import learners
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.tasks import ImageClassification, PromptLearning, VideoClassification

NAMES = ["a", "b", "c"]
SMALL = {"img_size": 32, "depth": 3, "embed_dim": 16, "num_heads": 2}
OPTIONS = {"backbone": "vit_tiny_patch16_224", "pretrained": False}
TOKENS = 5
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make(method, task=ImageClassification, more=None, **options):
    return task(method, NAMES, backbone_kwargs=SMALL | (more or {}), **OPTIONS | options).train()


def rows(model, inputs, name="mlp.fc1", blocks="blocks"):
    """How many tokens pass a layer of each block."""
    seen = []
    original = torch.nn.functional.linear  # a hook on the block would see all tokens, so they would all be there
    weights = {id(b.get_submodule(name).weight) for b in model.get_submodule(blocks)}

    def linear(x, weight, bias=None):
        if id(weight) in weights:
            seen.append(x.shape[1])
        return original(x, weight, bias)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", linear)
        model(inputs)
    return seen


@pytest.mark.parametrize("method", [vp.VPT(num_tokens=2), vp.AdaptFormer(bottleneck=4), vp.LinearProbe()], ids=repr)
def test_the_last_block_follows_the_class_token(method):
    """And all tokens where it was switched off, or where they are averaged at the end."""
    task = make(method)
    assert rows(task.model, IMAGES) == [TOKENS, TOKENS, 1]
    all_tokens = make(method, class_token_only=False)
    assert rows(all_tokens.model, IMAGES) == [TOKENS] * 3
    all_tokens.load_state_dict(task.state_dict())
    torch.testing.assert_close(task(IMAGES), all_tokens(IMAGES), atol=1e-6, rtol=1e-5)
    averaged = make(method, more={"global_pool": "avg"})
    assert rows(averaged.model, IMAGES) == [TOKENS] * 3
    assert not averaged.model.peft.economies.class_token_only


def test_a_block_of_another_library_keeps_all_tokens(monkeypatch):
    """A probe needs no sited form, so that one that does not compute the same is no reason to refuse it."""

    def refuse(_, blocks):
        if blocks:
            raise vp.UnsupportedError("it computes something else")

    monkeypatch.setattr("visionpeft.adapters.economise.check_tower", refuse)
    task = make(vp.LinearProbe())
    assert rows(task.model, IMAGES) == [TOKENS] * 3
    with pytest.raises(vp.UnsupportedError):
        make(vp.LinearProbe(), class_token_only=True)


def test_videos_and_learners_follow_it_too():
    clips = torch.randn(2, 3, 2, 32, 32)
    video = make(vp.AIM(num_frames=2), VideoClassification, num_frames=2)
    assert rows(video.model, clips, blocks="backbone.blocks") == [TOKENS, TOKENS, 1]
    video.eval()
    found = video(clips)
    vp.economise(video.model)
    torch.testing.assert_close(video(clips), found, atol=1e-6, rtol=1e-5)
    learner = PromptLearning(functools.partial(learners.CLIPLoRA, rank=2), NAMES).learner
    assert learner.clip.peft.economies.class_token_only
    with_all = vp.economise(learner.clip, class_token_only=False)
    images = torch.randn(2, 3, 64, 64)
    expected = with_all.encode_image(images)
    torch.testing.assert_close(
        vp.economise(learner.clip, class_token_only=None).encode_image(images), expected, atol=1e-5, rtol=1e-4
    )
    assert not PromptLearning(learners.CoOp, NAMES).learner.clip.__dict__["_modules"].get("peft")


def test_prompts_are_keys_and_values_alone():
    """No token of the stream, so that no MLP sees them; shallow ones, which go on to the next block, are."""
    assert rows(make(vp.VPT(num_tokens=7)).model, IMAGES) == [TOKENS, TOKENS, 1]
    shallow = make(vp.VPT(num_tokens=7, deep=False), class_token_only=False)
    assert rows(shallow.model, IMAGES) == [TOKENS + 7] * 3


@pytest.mark.parametrize("first", [0, 1, 2])
def test_nothing_is_kept_below_the_first_trained_block(first):
    """What is kept grows with the blocks from there on, and not with those before."""

    def kept(depth, blocks):
        task = make(vp.LoRA(rank=2, blocks=blocks), more={"depth": depth}, class_token_only=False)
        given = storages(task) | {IMAGES.untyped_storage().data_ptr()}
        return saved_bytes(lambda: task(IMAGES).sum(), given)[0]

    last = f"last:{3 - first}"
    assert kept(3, last) == kept(5, last)
    assert kept(3, last) < kept(4, f"last:{4 - first}")
