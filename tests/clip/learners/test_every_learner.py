"""What holds for every learner in the list, whatever it learns."""

import functools

import pytest
import torch
from clip_reference import NAMES, clip_model, images, lively_, tokenizer

import visionpeft as vp
from visionpeft.clip import learners
from visionpeft.clip.learners import DePT, MaPLe, PromptAlign, TwoStageFewShot, ZeroShot
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError, StorageError, UserError

EVERY = [name for name in learners.__all__ if name != "Learner"]


def build(name, clip=None, **options):
    """The learner of this name with its defaults; one that aligns with a source has none here to align with."""
    options = {"weight": 0.0} | options if name == "PromptAlign" else options
    return getattr(learners, name)(clip_model() if clip is None else clip, tokenizer(), NAMES, **options)


def shadowing(module):
    """Names of what an instance holds in the place of a method of its class."""
    held = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    return {name for name in held if callable(getattr(type(module), name, None))}


@pytest.mark.parametrize("name", EVERY)
def test_nothing_that_a_learner_holds_takes_the_place_of_a_method(name):
    learner = build(name)
    assert shadowing(learner) == set()
    learner.seen = torch.zeros(())  # a method, which whoever classifies views calls
    assert shadowing(learner) == {"seen"}


def state_of(clip):
    """Classes, modes and parameters of a CLIP, what of it is trained, which adapters act, and what it computes."""
    with torch.no_grad():
        features = [clip.encode_image(images()).tolist(), clip.encode_text(tokenizer()(NAMES)).tolist()]
    modules = [(name, type(module), module.training) for name, module in clip.named_modules()]
    parameters = [(name, id(parameter), parameter.requires_grad) for name, parameter in clip.named_parameters()]
    return modules, parameters, clip.peft.active if hasattr(clip, "peft") else (), features


def used_clip():
    """A CLIP in training mode of which somebody trains one tensor, and an adapter with dropout."""
    torch.manual_seed(0)
    clip = vp.attach(clip_model(), vp.LoRA(rank=2, dropout=0.5, towers=["visual", "text"]), "drawings", head=False)
    lively_(clip.peft["drawings"])
    clip.logit_scale.requires_grad_(True)
    clip.train()
    clip.peft.eval()  # so that it computes the same twice
    clip.visual.ln_post.eval()
    return clip


@pytest.mark.parametrize("make_clip", [clip_model, used_clip])
@pytest.mark.parametrize("name", EVERY)
def test_a_learner_that_is_refused_leaves_the_clip_as_it_was(name, make_clip):
    class Late(getattr(learners, name)):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            assert changed(), "nothing to put back"
            raise ConfigurationError("refused at the end")

    def changed():
        return state_of(clip) != before

    options, clip = {"weight": 0.0} if name == "PromptAlign" else {}, make_clip()
    before = state_of(clip)
    refusal = "adapters act" if name == "RPO" and make_clip is used_clip else "refused at the end"
    with pytest.raises(UserError, match=refusal):
        Late(clip, tokenizer(), NAMES, **options)
    assert not changed()
    if refusal == "refused at the end":
        build(name, clip)  # again, and not refused for what the first one left
        assert changed()


TWICE = ["dog", "dog"]
REFUSED = {
    "depth": (functools.partial(MaPLe, depth=99), NAMES, ConfigurationError),
    "statistics": (functools.partial(PromptAlign, statistics="/nonexistent"), NAMES, StorageError),
    "second head": (functools.partial(DePT, host="MaPLe", trained_names=NAMES), TWICE, ConfigurationError),
    "rows": (functools.partial(TwoStageFewShot, trained_names=NAMES), TWICE, ConfigurationError),
    "no class": (functools.partial(MaPLe), [], ConfigurationError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_can_be_followed_by_the_right_call(case):
    make, names, error = REFUSED[case]
    clip = clip_model()
    before = state_of(clip)
    with pytest.raises(error):
        make(clip, tokenizer(), names)
    assert state_of(clip) == before
    assert all(parameter.requires_grad for parameter in clip.parameters())
    make.func(clip, tokenizer(), NAMES)
    assert not any(p.requires_grad for name, p in clip.named_parameters() if not name.startswith("peft."))


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("MaPLe", "PromptAlign", "RPO")])
def test_a_second_learner_on_a_clip_leaves_the_first_what_it_has_learnt(name, tmp_path):
    """Those left out are refused on a CLIP with such an adapter."""
    first = lively_(MaPLe(clip_model(), tokenizer(), NAMES)).train()
    before, trained = {key: value.clone() for key, value in first.trained_state().items()}, first.trainable_parameters()
    assert len(before) == len(trained) == 6
    second = build(name, first.clip)
    assert first.clip.peft["maple"].training
    assert first.trained_state().keys() == before.keys()
    assert [*map(id, first.trainable_parameters())] == [*map(id, trained)]
    assert {*map(id, second.trained_state().values())}.isdisjoint(map(id, trained))
    assert {*map(id, second.trainable_parameters())}.isdisjoint(map(id, trained))
    own = [p for key, p in first.clip.named_parameters() if not key.startswith("peft.")]
    assert not any(p.requires_grad for p in own)
    with vp.use(first.clip, "maple"):
        first.loss(images(), torch.tensor([0, 1, 2]))[0].backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
        save_learner(first, tmp_path)
        loaded = load_learner(tmp_path, clip_model(), tokenizer())
        with torch.no_grad():
            torch.testing.assert_close(loaded(images()), first.eval()(images()), rtol=0, atol=1e-10)


def test_what_is_saved_does_not_depend_on_what_acts(tmp_path):
    learner = lively_(MaPLe(clip_model(), tokenizer(), NAMES))
    expected = learner.trained_state()
    with pytest.raises(ConfigurationError, match="an adapter 'maple' is already attached"):
        MaPLe(learner.clip, tokenizer(), NAMES)
    vp.disable(learner.clip)
    assert learner.trainable_parameters() == []  # an optimiser has nothing to train now
    assert learner.trained_state().keys() == expected.keys()
    save_learner(learner, tmp_path)
    loaded = load_learner(tmp_path, clip_model(), tokenizer())
    assert all(torch.equal(value, expected[key]) for key, value in loaded.trained_state().items())
    vp.detach(learner.clip)
    with pytest.raises(ConfigurationError, match="no adapter is attached"):
        save_learner(learner, tmp_path)
    assert ZeroShot(learner.clip, tokenizer(), NAMES).trained_state() == {}
