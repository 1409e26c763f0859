"""Whatever the value of a field of a method, the method is made, attached and run, or refused in one sentence."""

import dataclasses
from typing import Literal

import numpy as np
import pytest
import timm
import torch
from conftest import CASES

import visionpeft as vp
from visionpeft import methods
from visionpeft.errors import ConfigurationError, UserError
from visionpeft.methods.parts.deep_prompts import DeepPrompts

NAMES = [name for name in methods.__all__ if name != "Method"]
FIELDS = [(name, field.name) for name in NAMES for field in dataclasses.fields(getattr(methods, name))]
ON_CLIPS = ("AIM", "STAdapter")

# no size is in between: the memory of the largest ones is refused at once
VALUES = [
    None, True, 0, 3, -7, -0.5, float("nan"), float("inf"), 1e300, 2**62, 10**40, "", "x", "1:2:3:4", b"x",
    [], ["x"], ["visual", "visual"], [0, 0], [[]], [None], ["q", 3], [2.0, 2.0], (), (1, 1), (3, 3, 3), (0, 0),
    {}, {"x": 1}, {"all": -1}, {"all": 2**62}, {"all": "x"}, {1: 1}, {0, 1}, object(),
]  # fmt: skip

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hosts():
    """A classifier of images and one of clips."""
    options = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    image, frame = (timm.create_model("vit_tiny_patch16_224", **options).train() for _ in range(2))
    return {False: image, True: vp.VideoClassifier(frame, num_frames=2, num_classes=3).train()}


@pytest.mark.parametrize(("name", "field"), FIELDS)
@torch.no_grad()
def test_any_value_is_used_or_refused(name, field, hosts):
    model = hosts[name in ON_CLIPS]
    inputs = IMAGES[:, None].expand(-1, 2, -1, -1, -1) if name in ON_CLIPS else IMAGES
    refusals = []
    for value in VALUES:
        try:
            vp.attach(model, getattr(methods, name)(**{field: value}))
            if not model.peft["default"].pending:
                model(inputs)
        except UserError as error:
            refusals.append(str(error))
        if hasattr(model, "peft"):
            vp.detach(model)
    assert refusals  # at least of what is of no type at all
    assert all(len(sentence.strip().splitlines()) == 1 for sentence in refusals)


@pytest.mark.parametrize("counts", [{"num_text": -1}, {"num_visual": -1}, {"num_text": 0, "num_visual": 0}], ids=repr)
def test_deep_prompts_are_counted_from_zero(counts):
    """One of the towers may have none, but not fewer, and not both none."""
    with pytest.raises(ConfigurationError, match=r"^DeepPrompts: num_text and num_visual"):
        DeepPrompts(**counts)
    assert DeepPrompts(num_text=0).towers == ["visual"]


@pytest.mark.parametrize("cls", [*(getattr(methods, name) for name in NAMES), DeepPrompts], ids=lambda c: c.__name__)
def test_methods_are_values(cls):
    """What several models were attached with is not changed afterwards; a copy is equal."""
    method = next((case.method for case in CASES if type(case.method) is cls), None) or cls()
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, getattr(method, field.name))
    assert method == dataclasses.replace(method)


@pytest.mark.parametrize(
    ("method", "field", "value", "words"),
    [
        ("KronA", "shape", 3, "a list of 2 integers or None"),
        ("KronA", "shape", (2, 2, 2), "a list of 2 integers or None"),
        ("Convpass", "grid", 3, "a list of 2 integers or None"),
        ("LoRA", "rank", "8", "an integer"),
        ("LoRA", "rank", True, "an integer"),
        ("LoRA", "targets", "q", "a list of words"),
        ("LoRA", "overrides", ["q"], "a dictionary from words to integers"),
        ("LoRA", "blocks", 1.5, "a word or an integer or a list of integers"),
        ("VPT", "deep", 1, "True or False"),
        ("SSF", "std", float("nan"), "a number"),
        ("SPT", "structure", "vera", "'lora' or 'adapter'"),
    ],
)
def test_the_sentence(method, field, value, words):
    with pytest.raises(ConfigurationError) as refused:
        getattr(methods, method)(**{field: value})
    assert str(refused.value) == f"{method}: {field} must be {words}, not {value!r}"


def test_every_method_checks_its_fields():
    """Also those that check more themselves."""
    for case in CASES:
        for field in dataclasses.fields(case.method):
            with pytest.raises(ConfigurationError, match=f"^{type(case.method).__name__}: {field.name} must be"):
                dataclasses.replace(case.method, **{field.name: object()})


def test_a_factor_of_nothing_is_refused():
    """With a scale of 0 what is trained has no effect and no gradient, and a run would learn its head alone."""
    seen = 0
    for case in CASES:
        for name in ("alpha", "scale"):
            if name in {field.name for field in dataclasses.fields(case.method)}:
                seen += 1
                for value in (0, 0.0):
                    with pytest.raises(ConfigurationError, match=f"{name} must not be 0, or what it scales"):
                        dataclasses.replace(case.method, **{name: value})
    assert seen > 20


@pytest.mark.parametrize(
    "method", [vp.ReLoRA(restarted=1), vp.PeriodicLoRA(restarted=1), vp.PrunedBitFit(pruned=1), vp.FishDip(renewed=1)]
)
def test_what_is_counted_after_a_stage_is_not_given(method, hosts):
    """A training that is said to have restarted already would have fewer stages than it was asked for."""
    with pytest.raises(ConfigurationError, match="are found, not given"):
        vp.attach(hosts[False], method)


def test_a_tower_named_twice_is_one(hosts):
    once, twice = (vp.attach(hosts[False], vp.LoRA(towers=["visual"] * n), f"n{n}").peft[f"n{n}"] for n in (1, 2))
    vp.detach(hosts[False])
    assert len(once.placements) == len(twice.placements)


@dataclasses.dataclass(frozen=True)
class Own(methods.Method):
    count: "int" = 1  # a string, as all annotations are behind from __future__ import annotations
    anything: torch.dtype | None = None
    choice: Literal[1, 2, None, "x"] = None
    pair: tuple[int, str] = (1, "x")


def test_what_a_method_of_ones_own_says_of_its_fields_is_checked():
    """Annotations of other types are left to the method."""
    assert Own(anything=torch.float16, choice=2, pair=[2, "y"]).count == 1
    for given, words in (
        ({"count": "1"}, "count must be an integer, not '1'"),
        ({"choice": True}, "choice must be 1 or 2 or None or 'x', not True"),
        ({"pair": ("x", 1)}, r"pair must be a list of an integer, a word, not \('x', 1\)"),
        ({"pair": (1, "x", "y")}, "pair must be"),
    ):
        with pytest.raises(ConfigurationError, match=f"Own: {words}"):
            Own(**given)


def test_numbers_of_numpy_are_those_of_python(hosts, tmp_path):
    """As an array of hyper-parameters gives them; they are kept as Python's, which JSON and checkpoints can write."""
    given = vp.LoRA(
        rank=np.int64(2), alpha=np.float32(0.1), rank_stabilised=np.bool_(True), overrides={"q": np.int32(1)},
        blocks=np.arange(1),
    )  # fmt: skip
    plain = vp.LoRA(rank=2, alpha=float(np.float32(0.1)), rank_stabilised=True, overrides={"q": 1}, blocks=[0])
    assert given == plain
    assert [type(value) for value in vars(given).values()] == [type(value) for value in vars(plain).values()]
    model = vp.attach(hosts[False], given, "numpy")
    vp.save(model, tmp_path, "numpy")
    vp.detach(model)
    for value, words in ((np.float32(2.5), "an integer, not 2.5"), (np.float64("nan"), "an integer, not nan")):
        with pytest.raises(ConfigurationError, match=f"rank must be {words}"):
            vp.LoRA(rank=value)
    assert vp.LinearSegmentation(layers=np.array([0, 1])) == vp.LinearSegmentation(layers=(0, 1))
    assert vp.DensePredictor("nano_vit", vp.SETR(width=np.int64(8)), np.int64(3)).num_classes == 3


def test_annotations_that_cannot_be_read_are_left_to_the_method():
    class Local:
        pass

    @dataclasses.dataclass(frozen=True)
    class Mine(methods.Method):
        thing: "Local | None" = None

    assert Mine(thing=Local()).thing is not None
