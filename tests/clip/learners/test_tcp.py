"""TCP: tokens of each class's own inside the text tower, by a float64 formula; the fast path shares the rest."""

import functools

import pytest
import torch
from clip_reference import (
    NAMES,
    clip_model,
    cross_entropy,
    image_features,
    images,
    lively_,
    plain_features,
    prompt_features,
    scaled,
    text_feature,
    tokenizer,
)

from visionpeft.clip import packing
from visionpeft.clip.learners import TCP, CoOp
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError

LABELS = torch.tensor([0, 2, 3])
TEMPLATE = "art of the {}."


@functools.cache
def plain():
    """The CLIP of all tests here, which no learner changes."""
    return clip_model()


def tcp(clip=None, **options):
    torch.manual_seed(0)
    return lively_(TCP(clip or plain(), tokenizer(), NAMES, template=TEMPLATE, **({"layer": 1} | options)))


def class_tokens(learner, names):
    """P (classes, 4, d), and the unit text features (classes, e) of the template."""
    z = plain_features(learner.clip, [TEMPLATE.format(name.replace("_", " ")) for name in names]).detach()
    (w1, b1), (w2, b2) = ((learner.meta_net[i].weight, learner.meta_net[i].bias) for i in (0, 2))
    h = z @ w1.T + b1
    return ((h / (1 + torch.exp(-1.702 * h))) @ w2.T + b2).reshape(len(names), 4, 32), z


def by_hand(learner, names=NAMES):
    """Unit text features (classes, e) and those of the template, one text at a time."""
    p, z = class_tokens(learner, names)
    return prompt_features(learner.clip, names, learner.vectors, overwritten=(learner.layer, p)), z


def gradients(loss, learner):
    return torch.autograd.grad(loss, learner.trainable_parameters())


@pytest.mark.parametrize("layer", [1, 2])  # of three blocks
def test_tcp_is_the_formula(layer):
    learner = tcp(layer=layer, weight=5.0)
    t, z = by_hand(learner)
    expected = scaled(plain(), image_features(plain(), images()), t)
    wanted = cross_entropy(expected, LABELS) + 5 * (1 - (t * z).sum(1).mean())
    assert learner.text.why_in_full(learner.layout) is None
    loss, logits = learner.loss(images(), LABELS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)
    for found, right in zip(gradients(loss, learner), gradients(wanted, learner), strict=True):
        assert right.abs().max() > 1e-4
        torch.testing.assert_close(found, right, rtol=0, atol=1e-9)
    # Without its own tokens it would be CoOp, which is something else.
    with torch.no_grad():
        assert (prompt_features(plain(), NAMES, learner.vectors) - t).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["plain", "custom"])
@pytest.mark.parametrize(("layer", "chunk_size"), [(1, None), (1, 3), (2, 2)])
def test_the_fast_path_is_exact(kind, layer, chunk_size, monkeypatch):
    """Features and gradients are those of the library's tower, with the tokens overwritten in it."""
    learner = tcp(clip_model(kind) if kind != "plain" else None, layer=layer)
    direction = torch.randn(4, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def step(fast):
        learner.fast_text, learner.chunk_size = fast, chunk_size
        features = learner.text_features()
        return features.detach(), gradients((features * direction).sum(), learner)

    (fast, fast_gradients), (full, full_gradients) = step(True), step(False)
    torch.testing.assert_close(fast, full, rtol=0, atol=1e-10)
    for found, wanted in zip(fast_gradients, full_gradients, strict=True):
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    # The comparison notices a fast path that leaves the shared tokens in their place.
    monkeypatch.setattr(packing.Chunk, "with_own", lambda self, x, own: (x, self.buckets, self.ends))
    learner.fast_text = True
    with torch.no_grad():
        assert (learner.encode_text() - full).abs().max() > 1e-3


def test_shared_tokens_are_run_once_and_no_further_than_they_are_read(monkeypatch):
    """Rows of each block: start, context and names, and from the block of the own tokens on these and no context."""
    learner, rows = tcp(), {}
    hooks = [
        block.mlp.c_fc.register_forward_hook(lambda m, i, o, at=at: rows.setdefault(at, []).append(o.shape[1]))
        for at, block in enumerate(plain().transformer.resblocks)
    ]
    with torch.no_grad():
        learner.template_features()
        rows.clear()
        learner.encode_text()
    for hook in hooks:
        hook.remove()
    names = sum(len(text) - 5 for text in learner.layout.texts)  # with the full stop and the end
    assert rows == {0: [5, names], 1: [1, names + 4 * 4], 2: [4]}


def test_new_names_need_only_their_template(tmp_path):
    learner = tcp().eval()
    others = ["heron", "passion flower", "dog"]
    with torch.no_grad():
        save_learner(learner, tmp_path)
        loaded = load_learner(tmp_path, clip_model(), tokenizer(), others)
        learner.set_class_names(others)
        torch.testing.assert_close(learner.text_features(), by_hand(learner, others)[0], rtol=0, atol=1e-10)
        assert torch.equal(loaded(images()), learner(images()))


def test_what_overwrites_decides_and_the_context_only_through_other_tokens():
    """With zeros from the two layers all classes get the same tokens; the context acts through the name alone."""
    learner = tcp()
    with torch.no_grad():
        for parameter in learner.meta_net.parameters():
            parameter.zero_()
        assert learner.class_tokens().abs().max() == 0
        zeros = learner.encode_text()
        coop = CoOp(plain(), tokenizer(), NAMES, context_length=4)
        coop.vectors.copy_(learner.vectors)
        assert (zeros - coop.encode_text()).abs().max() > 1e-3
        learner.layer = 0  # overwritten before anything has seen them
        before = learner.encode_text()
        learner.vectors.add_(torch.randn(4, 32, dtype=torch.float64))
        torch.testing.assert_close(learner.encode_text(), before, rtol=0, atol=1e-12)
        learner.layer = 1
        assert (learner.encode_text() - zeros).abs().max() > 1e-3


@pytest.mark.parametrize("words", ["{}, a type of pet.", "person doing {}.", "{} texture"])
def test_other_words_after_the_context(words, tmp_path):
    """As the authors have for each data set: they stay, and only the context is overwritten."""
    learner = tcp(words=words).eval()
    p, _ = class_tokens(learner, NAMES)
    rows = []
    for name, own in zip(NAMES, p, strict=True):
        ids = tokenizer()(["X X X X " + words.format(name.replace("_", " "))])[0]
        embedded = plain().token_embedding.weight[ids]
        embedded = torch.cat((embedded[:1], learner.vectors, embedded[5:]))
        rows.append(text_feature(plain(), embedded, int(ids.argmax()), (learner.layer, own)))
    with torch.no_grad():
        torch.testing.assert_close(learner.text_features(), torch.stack(rows), rtol=0, atol=1e-10)
        assert (learner.text_features() - by_hand(learner)[0]).abs().max() > 1e-2
        save_learner(learner, tmp_path)
        loaded = load_learner(tmp_path, clip_model(), tokenizer())
        assert torch.equal(loaded(images()), learner(images()))


def test_words_of_the_data_set_are_taken_where_none_are_given(tmp_path):
    """They go with what is saved, and back where another data set has none; words that were given stay."""
    pets = {"tcp": {"words": "{}, a type of pet."}, "tip_adapter": {"alpha": 3}}
    learner, given = tcp(words=None).eval(), tcp(words="{} texture.")
    told = tcp(words="{}, a type of pet.").eval()
    before = learner.text_features()
    assert (learner.words, learner.taken()) == ("{}.", {})
    learner.set_published(pets)
    assert learner.taken() == {"tcp": {"words": "{}, a type of pet."}}
    with torch.no_grad():
        assert torch.equal(learner.text_features(), told.text_features())
    save_learner(learner, tmp_path)
    loaded = load_learner(tmp_path, clip_model(), tokenizer())
    assert loaded.words == "{}, a type of pet."
    assert torch.equal(loaded(images()), learner(images()))
    with pytest.raises(ConfigurationError):
        learner.set_published({"tcp": {"words": "{} " + "very " * 90}})
    with torch.no_grad():
        assert torch.equal(learner.text_features(), told.text_features())
    learner.set_published({})
    assert torch.equal(learner.text_features(), before)
    given.set_published(pets)
    assert (given.words, given.taken()) == ("{} texture.", {})


REFUSED = {
    "words": ({"words": "a pet"}, "words 'a pet' must hold {} exactly once"),
    "weight": ({"weight": -1}, "finite number that is not negative"),
    "layer": ({"layer": 3}, "1 to 2, not 3"),
    "no vectors": ({"context_length": 0}, "integer of at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_clear_sentence(case):
    options, message = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        tcp(**options)
    assert message in str(caught.value)
