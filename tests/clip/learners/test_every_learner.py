"""What holds for every learner in the list, whatever it learns."""

import pytest
import torch
from clip_reference import NAMES, clip_model, tokenizer

from visionpeft.clip import learners

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
