"""RPO against all tokens run together under a mask, in float64, and what its economy keeps."""

import functools

import pytest
import torch
from clip_reference import NAMES, WordTokenizer, clip_model, cross_entropy, images, lively_, tokenizer
from reference import prompted_clip

import visionpeft as vp
from visionpeft.clip import read_only
from visionpeft.clip.learners import RPO
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.errors import ConfigurationError, UnsupportedError

LABELS = torch.tensor([0, 2, 3])
TEMPLATE = "art of the {}."
PAIRS = 3


@functools.cache
def plain():
    """The CLIP of all tests here, which no learner changes."""
    return clip_model("quick")


def rpo(clip=None, **options):
    torch.manual_seed(0)
    return lively_(RPO(clip or plain(), tokenizer(), NAMES, **({"num_pairs": PAIRS, "template": TEMPLATE} | options)))


def unit_rows(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def through(weights, name, layers, x, mask):
    for index in range(layers):
        x = prompted_clip.block(weights, f"{name}transformer.resblocks.{index}", x, 2, prompted_clip.quick_gelu, mask)
    return x


def texts_by_hand(learner, names=NAMES):
    """(classes, pairs, e), of all 77 positions, where the pairs stand after the end token, under the authors' mask."""
    weights = dict(learner.clip.state_dict())
    ids = tokenizer()([TEMPLATE.format(name.replace("_", " ")) for name in names])
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    rows = []
    for own, end in zip(x, ids.argmax(-1).tolist(), strict=True):
        own = torch.cat((own[: end + 1], learner.text_tokens, own[end + 1 + PAIRS :]))
        hidden = torch.ones(77, 77, dtype=torch.bool).triu(1)
        hidden[:, end + 1 :] = True
        out = through(weights, "", 3, own[None], hidden)
        out = prompted_clip.norm(weights, "ln_final", out)[0, end + 1 : end + 1 + PAIRS]
        rows.append(out @ weights["text_projection"])
    return unit_rows(torch.stack(rows))


def images_by_hand(learner, pictures):
    """(batch, pairs, e), of the image tokens and the pairs after them."""
    weights = dict(learner.clip.state_dict())
    patches = pictures.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ weights["visual.conv1.weight"].flatten(1).T
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = x + weights["visual.positional_embedding"]
    x = torch.cat((x, learner.image_tokens.expand(len(x), -1, -1)), 1)
    hidden = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    hidden[:, -PAIRS:] = True
    x = through(weights, "visual.", 2, prompted_clip.norm(weights, "visual.ln_pre", x), hidden)
    x = prompted_clip.norm(weights, "visual.ln_post", x[:, -PAIRS:]) @ weights["visual.proj"]
    return unit_rows(x)


def logits_by_hand(learner, pictures):
    f, t = images_by_hand(learner, pictures), texts_by_hand(learner)
    by_pair = [f[:, i] @ t[:, i].T for i in range(PAIRS)]
    return learner.clip.logit_scale.detach().exp() * sum(by_pair) / PAIRS


def gradients(loss, learner):
    return torch.autograd.grad(loss, learner.trainable_parameters())


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_rpo_is_all_tokens_under_a_mask(chunk_size):
    learner = rpo()
    learner.chunk_size = chunk_size
    expected = logits_by_hand(learner, images())
    loss, logits = learner.loss(images(), LABELS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    kept_loss, _ = learner.loss(None, LABELS, learner.image_keys(images()))
    torch.testing.assert_close(kept_loss, loss, rtol=0, atol=1e-11)
    wanted = gradients(cross_entropy(expected, LABELS), learner)
    for found, from_kept, right in zip(gradients(loss, learner), gradients(kept_loss, learner), wanted, strict=True):
        assert right.abs().max() > 1e-4
        torch.testing.assert_close(found, right, rtol=0, atol=1e-9)
        torch.testing.assert_close(from_kept, right, rtol=0, atol=1e-9)
    # The comparison notices tokens that read one key less.
    f, kept = learner.image_features(images()), learner.image_keys(images())
    fewer = read_only.read(
        plain().visual.transformer.resblocks,
        plain().visual.ln_pre(learner.image_tokens)[None],
        [pair[..., 1:, :].unbind(1) for pair in kept.unbind(1)],
    )
    fewer = unit_rows(plain().visual.ln_post(fewer) @ plain().visual.proj).flatten(1) / PAIRS**0.5
    assert (fewer - f).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["custom", "siglip"])
def test_other_towers_give_what_the_library_gives_of_a_token_that_only_it_reads(kind):
    """The class token alone, as the only read-only token, is read as the tower itself reads it but for its own key."""
    clip = clip_model(kind)
    words = WordTokenizer() if kind == "siglip" else tokenizer()
    learner = RPO(clip, words, ["dog", "red kite"], num_pairs=1, template="a {}.")
    text = learner.text.module
    with torch.no_grad():
        found = learner.text_features()
        # The library's tower over the same tokens, the read-only token last and hidden from all.
        ids = words(["a dog.", "a red kite."], context_length=12 if kind == "siglip" else 77)
        for row, feature in zip(ids, found, strict=True):
            length = 12 if kind == "siglip" else int(row.argmax()) + 1
            x = text.token_embedding(row[:length]) + text.positional_embedding[:length]
            x = torch.cat((x, learner.text_tokens))[None]
            mask = torch.zeros(length + 1, length + 1, dtype=torch.float64)
            if kind != "siglip":
                mask = torch.full_like(mask, float("-inf")).triu_(1)
            mask[:, length] = float("-inf")
            for block in text.transformer.resblocks:
                x = block(x, attn_mask=mask)
            x = text.ln_final(x[0, -1])
            x = text.text_projection(x) if callable(text.text_projection) else x @ text.text_projection
            torch.testing.assert_close(feature, x / x.norm(), rtol=0, atol=1e-9)


def test_pairs_know_nothing_of_each_other_and_the_frozen_towers_nothing_of_them():
    learner = rpo()
    before = plain().encode_image(images())
    f, t = learner.image_features(images()).unflatten(1, (PAIRS, -1)), learner.encode_text().unflatten(1, (PAIRS, -1))
    assert torch.equal(plain().encode_image(images()), before)
    logits = learner(images())
    with torch.no_grad():
        learner.image_tokens[1].add_(torch.randn(32, dtype=torch.float64))
        learner.text_tokens[1].add_(torch.randn(32, dtype=torch.float64))
        moved = learner.image_features(images()).unflatten(1, (PAIRS, -1))
        torch.testing.assert_close(moved[:, [0, 2]], f[:, [0, 2]], rtol=0, atol=1e-14)
        assert (moved[:, 1] - f[:, 1]).abs().max() > 1e-3
        of_texts = learner.encode_text().unflatten(1, (PAIRS, -1))
        torch.testing.assert_close(of_texts[:, [0, 2]], t[:, [0, 2]], rtol=0, atol=1e-14)
        changed = learner(images())
        assert (changed - logits).abs().max() > 1e-3
        for tokens in (learner.image_tokens, learner.text_tokens):
            tokens.copy_(tokens[[2, 0, 1]])
        torch.testing.assert_close(learner(images()), changed, rtol=0, atol=1e-10)


def test_the_tokens_start_near_the_end_token_and_the_class_token():
    learner = RPO(plain(), tokenizer(), NAMES)
    for tokens, start in (
        (learner.text_tokens, plain().token_embedding.weight[49407]),
        (learner.image_tokens, plain().visual.class_embedding),
    ):
        noise = tokens - start
        assert noise.shape == (24, 32)
        torch.testing.assert_close(noise.norm(dim=1), torch.full((24,), 0.1, dtype=torch.float64), rtol=0, atol=1e-6)
        assert (noise[0] - noise[1]).norm() > 0.05


def test_texts_are_run_once_and_images_keep_nothing_but_keys(monkeypatch):
    learner = rpo()
    ran = []
    own = read_only.ordinary
    monkeypatch.setattr(read_only, "ordinary", lambda *given: ran.append(len(given[1])) or own(*given))
    learner.loss(images(), LABELS)
    assert ran == [4]  # the texts; of the images the learner has the name itself
    for _ in range(2):
        learner.loss(images(), LABELS)[0].backward()
    learner.set_class_names(["heron", "owl"])
    learner.loss(images(), LABELS % 2)
    assert ran == [4, 2]
    keys = learner.image_keys(images())
    frozen = storages(learner) | {keys.untyped_storage().data_ptr()}
    together, _ = saved_bytes(lambda: learner.image_features(images()), frozen)
    apart, _ = saved_bytes(lambda: learner._read_images(pair.unbind(1) for pair in keys.unbind(1)), frozen)
    # All that a step from images keeps for the image side besides is the keys and values.
    assert 0 < together - apart <= keys.nbytes + 3 * PAIRS * 64 * 8 * 4


def test_new_names_and_saved_pairs(tmp_path):
    learner, others = rpo().eval(), ["heron", "passion flower"]
    with torch.no_grad():
        save_learner(learner, tmp_path)
        loaded = load_learner(tmp_path, clip_model("quick"), tokenizer(), others)
        learner.set_class_names(others)
        expected = texts_by_hand(learner, others).flatten(1) / PAIRS**0.5
        torch.testing.assert_close(learner.text_features(), expected, rtol=0, atol=1e-10)
        assert torch.equal(loaded(images()), learner(images()))


def test_refusals():
    with pytest.raises(ConfigurationError, match="integer of at least 1, not 0"):
        rpo(num_pairs=0)
    with pytest.raises(ConfigurationError, match="one template, not 2"):
        rpo(template=["a {}.", "the {}."])
    with pytest.raises(UnsupportedError, match="a ViT of OpenCLIP's own"):
        rpo(clip_model("resnet"))
    clip = vp.attach(clip_model(), vp.LoRA(towers=["text"]))
    with pytest.raises(UnsupportedError, match="adapters act on this CLIP"):
        rpo(clip)
