"""DePT: its second head by a float64 formula, around each host; with weight 0 it is the host."""

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
    raw_text_feature,
    scaled,
    tokenizer,
)

from visionpeft.clip.learners import CoCoOp, CoOp, DePT, KgCoOp, MaPLe
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError

LABELS = torch.tensor([0, 2, 3])
HOSTS = {
    "CoOp": functools.partial(CoOp, context_length=3),
    "KgCoOp": KgCoOp,
    "CoCoOp": CoCoOp,
    "MaPLe": functools.partial(MaPLe, depth=2),
}


def dept(host="CoOp", **options):
    torch.manual_seed(0)
    own = HOSTS[host].keywords if isinstance(HOSTS[host], functools.partial) else None
    return lively_(DePT(clip_model(), tokenizer(), NAMES, host=host, host_options=own, **options))


def second_head(learner, features, part):
    return (part.scale * features + part.shift) @ learner.head.weight.T + learner.head.bias


def test_dept_around_coop_is_the_formula():
    learner = dept(weight=0.4)
    f = learner.clip.encode_image(images()).detach()
    raw = prompt_features(learner.clip, NAMES, learner.host.vectors, feature=raw_text_feature)
    assert (f.norm(dim=1) - 1).abs().min() > 0.5  # lengths matter
    similar = scaled(learner.clip, image_features(learner.clip, images()), raw / raw.norm(dim=1, keepdim=True))
    on_images = second_head(learner, f, learner.on_images)
    on_texts = second_head(learner, raw[LABELS], learner.on_texts)
    second = (cross_entropy(on_images, LABELS) + cross_entropy(on_texts, LABELS)) / 2
    expected = 0.6 * cross_entropy(similar, LABELS) + 0.4 * second
    loss, logits = learner.loss(images(), LABELS)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits, 0.6 * similar + 0.4 * on_images, rtol=0, atol=1e-9)
    torch.testing.assert_close(learner(images()), logits, rtol=0, atol=1e-9)
    parameters = learner.trainable_parameters()
    wanted = torch.autograd.grad(expected, parameters)
    for found, right in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        assert right.abs().max() > 1e-4
        torch.testing.assert_close(found, right, rtol=0, atol=1e-8)
    kept, _ = learner.loss(None, LABELS, learner.image_features(images()))
    torch.testing.assert_close(kept, loss, rtol=0, atol=1e-11)
    rates = {id(p) for p in learner.head_parameters()}
    assert rates == {id(p) for p in parameters} - {id(learner.host.vectors)}
    assert sum(p.numel() for p in learner.head_parameters()) == 4 * 64 + 4 * 65


def test_what_holds_the_texts_of_kgcoop_keeps_its_weight():
    """As in the authors' code: (1 - weight) is a share of the two cross-entropies alone."""
    learner = dept("KgCoOp", weight=0.4)
    learner.host.weight = 3.0
    f = learner.clip.encode_image(images()).detach()
    raw = prompt_features(learner.clip, NAMES, learner.host.vectors, feature=raw_text_feature)
    t = raw / raw.norm(dim=1, keepdim=True)
    z = plain_features(learner.clip, [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]).detach()
    on_images = second_head(learner, f, learner.on_images)
    on_texts = second_head(learner, raw[LABELS], learner.on_texts)
    second = (cross_entropy(on_images, LABELS) + cross_entropy(on_texts, LABELS)) / 2
    first = cross_entropy(scaled(learner.clip, image_features(learner.clip, images()), t), LABELS)
    away = 1 - (t * z).sum(1).mean()
    assert away > 0.1
    expected = 0.6 * first + 0.4 * second + 3 * away
    loss, _ = learner.loss(images(), LABELS)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    (found,), (wanted,) = (torch.autograd.grad(each, [learner.host.vectors]) for each in (loss, expected))
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("host", HOSTS)
def test_with_weight_0_it_is_the_host_and_new_names_ask_the_host_alone(host, tmp_path):
    learner = dept(host, weight=0.0)
    alone = HOSTS[host](clip_model(), tokenizer(), NAMES)
    own = {name.removeprefix("host."): tensor for name, tensor in learner.trained_state().items()}
    alone.load_trained_state({name: own[name] for name in alone.trained_state()}, "the host")
    loss, logits = learner.loss(images(), LABELS)
    host_loss, host_logits = alone.loss(images(), LABELS)
    torch.testing.assert_close(loss, host_loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits, host_logits, rtol=0, atol=1e-10)
    learner.weight = learner.options["weight"] = 0.7
    with torch.no_grad():
        mixed = learner(images())
        assert (mixed - logits).abs().max() > 1e-2
        if host == "MaPLe":
            f = learner.clip.encode_image(images())
            expected = 0.3 * host_logits + 0.7 * second_head(learner, f, learner.on_images)
            torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-9)
        others = ["heron", "owl"]
        for each in (learner, alone):
            each.set_class_names(others)
        torch.testing.assert_close(learner(images()), alone(images()), rtol=0, atol=1e-10)
        save_learner(learner, tmp_path)
        loaded = load_learner(tmp_path, clip_model(), tokenizer())
        torch.testing.assert_close(loaded(images()), learner(images()), rtol=0, atol=1e-12)
        loaded.set_class_names(NAMES)
        torch.testing.assert_close(loaded(images()), mixed, rtol=0, atol=1e-12)
    with pytest.raises(ConfigurationError, match="learns its own classes alone"):
        learner.loss(images(), LABELS)


@pytest.mark.parametrize("host", HOSTS)
def test_a_learner_with_other_names_shares_what_was_learnt_and_changes_no_other(host):
    learner = dept(host)
    first, second = (learner.with_class_names(names) for names in (["heron", "owl"], ["oak", "elm", "ash"]))
    assert [len(each.class_names) for each in (learner, first, second)] == [4, 2, 3]
    with torch.no_grad():
        own = learner(images())
        for view in (first, second):
            again = dept(host)
            again.set_class_names(view.class_names)
            torch.testing.assert_close(view(images()), again(images()), rtol=0, atol=1e-11)
        assert torch.equal(learner(images()), own)
        other = first(images())
        learner.host.trainable_parameters()[0].neg_()
        assert not torch.allclose(first(images()), other)
    ours, theirs = ({id(each) for each in (*m.parameters(), *m.buffers())} for m in (learner, first))
    assert ours == theirs


def test_trained_names_ask_both_heads_in_any_order_and_some_of_them_alone():
    learner = dept()
    with torch.no_grad():
        own, alone = learner(images()), learner.host(images())
        for places, names in {
            (2, 0, 3, 1): [NAMES[place] for place in (2, 0, 3, 1)],
            (0, 1, 2, 3): [name.upper() for name in NAMES],
            (1, 3): [NAMES[1], NAMES[3]],
        }.items():
            found = learner.with_class_names(names)(images())
            torch.testing.assert_close(found, own[:, places], rtol=0, atol=1e-11)
            assert (found - alone[:, places]).abs().max() > 1e-2
        mixed = learner.with_class_names([*NAMES, "heron"])(images())
        torch.testing.assert_close(mixed[:, :4], alone, rtol=0, atol=1e-11)


REFUSED = {
    "host": ({"host": "IVLP"}, "host must be one of CoOp, CoCoOp, KgCoOp, MaPLe, not 'IVLP'"),
    "weight": ({"weight": 1.0}, "less than 1, not 1.0"),
    "options": ({"host_options": {"depth": 3}}, "host_options do not fit CoOp"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_clear_sentence(case):
    options, message = REFUSED[case]
    with pytest.raises(ConfigurationError) as caught:
        DePT(clip_model(), tokenizer(), NAMES, **options)
    assert message in str(caught.value)
