"""What holds for every learner in the list, whatever it learns."""

import functools
import inspect
import math
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from clip_reference import NAMES, clip_model, images, lively_, tokenizer

import visionpeft as vp
from visionpeft.clip import learners
from visionpeft.clip.learners import TPT, CoOp, DePT, MaPLe, PromptAlign, TunedCLIP, TwoStageFewShot, ZeroShot
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.errors import ConfigurationError, StorageError, UserError
from visionpeft.methods.parts.field_types import UNIONS

EVERY = [name for name in learners.__all__ if name != "Learner"]

TAKES = {name: set(inspect.signature(getattr(learners, name)).parameters) for name in EVERY}


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


NONE = type(None)
WRONG = {  # by annotation
    int: (2.5, True, "2", math.nan),
    float: ("0.5", math.nan, math.inf, True),
    bool: (1, "yes"),
    str: (3, ["a"]),
}


def arguments(name):
    """Names and types of a learner's own arguments, of which None is one where it may be."""
    types = get_type_hints(getattr(learners, name).__init__)
    given = [*inspect.signature(getattr(learners, name)).parameters][3:]
    return {argument: types[argument] for argument in given}


@pytest.mark.parametrize("name", EVERY)
def test_an_argument_of_another_type_is_refused_in_one_sentence(name):
    clip, refused = clip_model(), 0
    for argument, kind in arguments(name).items():
        wanted, *others = [part for part in (get_args(kind) if get_origin(kind) in UNIONS else [kind]) if part != NONE]
        for value in () if others else WRONG.get(wanted, ()):
            with pytest.raises(ConfigurationError) as caught:
                build(name, clip, **{argument: value})
            assert str(caught.value).startswith(f"{name}: {argument} must be ")
            assert repr(value) in str(caught.value)
            assert "\n" not in str(caught.value)
            refused += 1
    assert refused  # each has at least allow_duplicates
    defaults = {each.name: each.default for each in inspect.signature(getattr(learners, name)).parameters.values()}
    own = {argument: defaults[argument] for argument in arguments(name)}
    build(name, clip, **own | ({"weight": 0} if name == "PromptAlign" else {}))  # all defaults fit


def unit_features(count, learner):
    return F.normalize(torch.randn(count, learner.text.num_features, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("name", ["CLIPLinearProbe", "TipAdapter", "CLAP", "LPPlusPlus", "DAPT"])
def test_features_of_no_image_or_no_class_are_refused_before_anything_is_fitted(name):
    learner = build(name)
    good = unit_features(4, learner), torch.arange(4)
    outside, empty = (good[0], torch.tensor([0, 1, 2, 7])), (good[0][:0], good[1][:0])
    below = (good[0], torch.tensor([0, 1, 2, -1]))
    before = {key: value.clone() for key, value in learner.trained_state().items()}
    for train in (outside, below, empty):
        with pytest.raises(ConfigurationError, match="needs training images"):
            learner.fit_features(train)
    for validation in (outside, empty) if name in ("CLIPLinearProbe", "TipAdapter", "LPPlusPlus") else ():
        with pytest.raises(ConfigurationError, match="needs validation images with labels 0 to 3 for its 4 class"):
            learner.fit_features(good, validation)
    assert all(torch.equal(value, before[key]) for key, value in learner.trained_state().items())
    learner.fit_features(good, good)


OUT_OF_RANGE = {
    "method": (lambda: TunedCLIP(clip_model(), tokenizer(), NAMES, method={"x": 1}), "method must be a method such as"),
    "iterations": (lambda: build("CLIPLinearProbe", max_iterations=0), "max_iterations must be at least 1, not 0"),
    "text": (lambda: build("PromptSRC", text_weight=-1), "must not be negative, not -1, 10.0 and 1.0"),
    "window": (lambda: build("TDA", entropy_window=0.5), "entropy_window must be a list of 2 numbers, not 0.5"),
    "words": (lambda: build("ZeroShot", template=3), "template must be"),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_what_was_accepted_or_an_error_of_python_is_refused(case):
    act, message = OUT_OF_RANGE[case]
    with pytest.raises(ConfigurationError) as caught:
        act()
    assert message in str(caught.value)


def test_saved_learners_are_found_by_paths_and_by_words(tmp_path):
    context = CoOp(clip_model(), tokenizer(), NAMES, init="a photo of a")
    save_learner(lively_(context), tmp_path / "coop")
    prompts = lively_(MaPLe(clip_model(), tokenizer(), NAMES))
    save_learner(prompts, tmp_path / "maple")
    for kind in (str, Path):
        tuned = TPT(clip_model(), tokenizer(), NAMES, context=kind(tmp_path / "coop"))
        assert torch.equal(tuned.vectors, context.vectors)
        aligned = PromptAlign(clip_model(), tokenizer(), NAMES, maple=kind(tmp_path / "maple"), weight=0.0)
        assert torch.equal(aligned.context(), prompts.context())


def test_one_matrix_may_be_named_by_a_word():
    by_word, by_list = (build("CLIPLoRA", targets=targets) for targets in ("proj", ["proj"]))
    assert by_word.options == by_list.options
    assert by_word.trained_state().keys() == by_list.trained_state().keys()


NOT_PREPARED = {
    "bytes": (images(4, torch.float32).mul(50).clamp(0, 255).byte(), r"not a tensor of torch.uint8"),
    "integers": (images(4).long(), "not a tensor of torch.int64"),
    "list": (list(images(4)), "not list"),
    "array": (images(4).numpy(), "not ndarray"),
    "none": (None, "not NoneType"),
    "one image": (images(4)[0], r"\(3, 32, 32\)"),
}


@pytest.mark.parametrize("name", EVERY)
def test_images_that_were_not_prepared_are_refused(name):
    """Bytes would be taken for numbers up to 255, of which OpenCLIP itself computes nothing."""
    learner = build(name)
    for given, said in NOT_PREPARED.values():
        with pytest.raises(ConfigurationError, match=said):
            learner(given)
    if learner.online:
        learner.reset()


FROM_VIEWS = {name for name in EVERY if "num_views" in TAKES[name]} - {"PromptAlign"}
FROM_FEATURES = [name for name in EVERY if getattr(learners, name).frozen_images or name in FROM_VIEWS]


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FROM_FEATURES)
def test_features_that_were_kept_in_another_precision(name, kept):
    """Logits have the higher precision of features and texts, and are those of the features as they were kept."""
    clip = clip_model(dtype=torch.float32)
    learner = lively_(build(name, clip, **({"num_views": 3} if name in FROM_VIEWS else {}))).eval()
    generator = torch.Generator().manual_seed(0)
    views = (3,) if name in FROM_VIEWS or name == "PLOT" else ()
    features = F.normalize(torch.randn(4, *views, 64, generator=generator, dtype=torch.float64), dim=-1)
    labels = torch.arange(4)
    if name in ("CLAP", "TipAdapter", "LPPlusPlus"):
        learner.fit_features((features.float(), labels))
    kept = features.to(kept)
    expected = learner.classify(kept.float()).detach()
    if learner.online:
        learner.reset()
    logits = learner.classify(kept).detach()
    own = {"CLIPAdapter", "CLIPLinearProbe", "LPPlusPlus", "TDA", "TipAdapter"}  # compute in what they have learnt
    assert logits.dtype == (torch.float64 if kept.dtype == torch.float64 and name not in own else torch.float32)
    if name == "ZERO":  # logarithms of votes, of which none is the least number of each precision
        logits, expected = logits.exp(), expected.exp()
    torch.testing.assert_close(logits.float(), expected, rtol=1e-4, atol=1e-4)


def test_rpo_learns_from_keys_alone():
    with pytest.raises(ConfigurationError, match="image_keys"):
        build("RPO").loss(None, torch.arange(3), torch.randn(3, 64, dtype=torch.float64))
