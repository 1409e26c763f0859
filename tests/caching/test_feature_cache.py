"""Kept image features: right whenever they are given out, never stale, bounded."""

import open_clip
import pytest
import torch
from small_learner_runs import CLIP

from visionpeft.adapters.attach import attach
from visionpeft.adapters.switch import disable
from visionpeft.caching.content_cache import arithmetic
from visionpeft.caching.feature_cache import FeatureCache
from visionpeft.clip.learners import ZeroShot
from visionpeft.methods import LoRA
from visionpeft.models.open_clip import create_open_clip

FEATURE_BYTES = 4 * 32


@pytest.fixture
def learner():
    torch.manual_seed(0)
    clip = create_open_clip(CLIP[1], False, None)
    return ZeroShot(clip, open_clip.get_tokenizer("tiny_clip"), ["a", "b"])


@pytest.fixture
def rows(learner, monkeypatch):
    """Numbers of images that went through the image tower."""
    seen = []
    encode = learner.clip.encode_image

    def count(images, *args, **kwargs):
        seen.append(len(images))
        return encode(images, *args, **kwargs)

    monkeypatch.setattr(learner.clip, "encode_image", count)
    return seen


def pictures(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def expected(learner, images):
    with torch.no_grad():
        features = learner.clip.visual(images)
    return features / features.norm(dim=1, keepdim=True)


def test_each_image_goes_through_the_tower_once(learner, rows):
    cache, images = FeatureCache(), pictures(5)
    first = cache.image_features(learner, images[:3])
    mixed = cache.image_features(learner, images[[4, 1, 0, 3, 1]])
    assert rows == [3, 2]
    assert torch.allclose(first, expected(learner, images[:3]), atol=1e-6)
    assert torch.allclose(mixed, expected(learner, images[[4, 1, 0, 3, 1]]), atol=1e-6)
    assert torch.equal(mixed[1], first[1])
    assert not mixed.requires_grad


def test_a_changed_image_is_another_one(learner, rows):
    cache, images = FeatureCache(), pictures(1)
    cache.image_features(learner, images)
    images[0, 2, 31, 31] += 1e-6  # in place, in one pixel
    found = cache.image_features(learner, images)
    assert rows == [1, 1]
    assert torch.equal(found, expected(learner, images))
    other_shape = images.transpose(2, 3).contiguous().view(1, 3, 32, 32)
    cache.image_features(learner, other_shape)
    assert rows == [1, 1, 1]


@pytest.mark.parametrize("change", ["in place", "loaded", "replaced", "buffer"])
def test_a_changed_tower_gives_new_features(learner, change):
    if change == "buffer":
        learner.clip.visual.register_buffer("noise", torch.zeros(1))
    cache, images = FeatureCache(), pictures(2)
    before = cache.image_features(learner, images)
    visual = learner.clip.visual
    with torch.no_grad():
        if change == "in place":
            visual.proj.mul_(-1)
        elif change == "loaded":
            visual.load_state_dict(
                {name: -value if name == "proj" else value for name, value in visual.state_dict().items()}
            )
        elif change == "replaced":
            visual.proj = torch.nn.Parameter(-visual.proj)
        else:
            visual.noise += 1
    kept = len(cache.kept)
    after = cache.image_features(learner, images)
    assert len(cache.kept) == kept + 2
    assert torch.equal(after, before if change == "buffer" else expected(learner, images))


def test_an_adapter_of_the_tower_is_part_of_the_key(learner):
    attach(learner.clip, LoRA(rank=1, towers=["visual"]), "own", head=False)
    learner = ZeroShot(learner.clip, open_clip.get_tokenizer("tiny_clip"), ["a", "b"])
    cache, images = FeatureCache(), pictures(2)
    before = cache.image_features(learner, images)
    with torch.no_grad():
        for parameter in learner.clip.peft.parameters():
            parameter.normal_()
    after = cache.image_features(learner, images)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, learner.image_features(images))
    disable(learner.clip)
    plain = ZeroShot(learner.clip, open_clip.get_tokenizer("tiny_clip"), ["a", "b"])
    torch.testing.assert_close(cache.image_features(plain, images), before)


def test_a_change_that_tensors_do_not_tell_is_seen_when_hashed_again(learner):
    cache, images = FeatureCache(), pictures(2)
    before = cache.image_features(learner, images)
    learner.clip.visual.proj.data.numpy()[:] *= -1
    cache.hash_again()
    assert torch.allclose(cache.image_features(learner, images), -before, atol=1e-6)


def test_precision_is_part_of_the_key(learner):
    cache, images = FeatureCache(), pictures(2)
    full = cache.image_features(learner, images)
    with torch.autocast("cpu", torch.bfloat16):
        half = cache.image_features(learner, images)
        direct = learner.image_features(images)
    assert torch.equal(half, direct)
    assert not torch.equal(half, full)
    assert torch.equal(cache.image_features(learner, images), full)


@pytest.mark.parametrize("choose", ["high", "medium", "of the backend"])
def test_products_of_float32_in_another_precision_are_other_rows(learner, choose):
    """As PyTorch is told for all of a process, by either of its ways; its own choice is what it was."""
    cache, images = FeatureCache(), pictures(2)
    full, cpu = cache.image_features(learner, images), torch.device("cpu")
    assert arithmetic(cpu) == "cpu None"
    matmul = torch.backends.mkldnn.matmul
    try:
        if choose == "of the backend":
            matmul.fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision(choose)
        assert arithmetic(cpu) == f"cpu None matmul in {'tf32' if choose == 'high' else 'bf16'}"
        assert not cache.known_images(learner, cpu)
        cache.image_features(learner, images)
        assert len(cache.kept) == 4
        torch.set_float32_matmul_precision("highest")
        assert len(cache.known_images(learner, cpu)) == 2
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"
    assert arithmetic(cpu) == "cpu None"
    assert torch.equal(cache.image_features(learner, images), full)


def test_another_way_to_features_has_its_own(learner, rows):
    class Doubled(ZeroShot):
        def image_features(self, images):
            return 2 * super().image_features(images)

    cache, images = FeatureCache(), pictures(2)
    first = cache.image_features(learner, images)
    doubled = Doubled(learner.clip, open_clip.get_tokenizer("tiny_clip"), ["a", "b"])
    assert torch.equal(cache.image_features(doubled, images), 2 * first)


def test_memory_is_bounded(learner, rows):
    cache = FeatureCache(max_bytes=3 * FEATURE_BYTES)
    images = pictures(5)
    for _ in range(2):
        assert torch.allclose(cache.image_features(learner, images), expected(learner, images), atol=1e-6)
    assert cache.full
    assert cache.bytes == sum(value.nbytes for value in cache.kept.values()) == 3 * FEATURE_BYTES
    assert rows == [5, 2]  # three were kept
    assert all(value.untyped_storage().nbytes() == FEATURE_BYTES for value in cache.kept.values())


def test_features_of_another_tower_make_room(learner):
    cache = FeatureCache(max_bytes=3 * FEATURE_BYTES)
    cache.image_features(learner, pictures(3))
    with torch.no_grad():
        learner.clip.visual.proj.mul_(2)
    cache.image_features(learner, pictures(3, seed=1))
    assert not cache.full
    assert cache.bytes == 3 * FEATURE_BYTES


def test_features_from_inference_mode_can_be_trained_on(learner):
    cache, images = FeatureCache(), pictures(2)
    with torch.inference_mode():
        cache.image_features(learner, images)
    weight = torch.ones(32, requires_grad=True)
    (cache.image_features(learner, images) * weight).sum().backward()
    assert weight.grad is not None
