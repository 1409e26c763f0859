"""Figures of a run with names of classes in any letters."""

import warnings

import torch

from visionpeft.runs.command import silence
from visionpeft.runs.figures import draw_confusion, draw_mistakes
from visionpeft.runs.mistake import Mistake


def test_letters_that_the_font_does_not_have_are_no_warning(tmp_path):
    names = ["犬", "고양이"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        silence()
        draw_confusion(torch.ones(2, 2, dtype=torch.long), names, tmp_path / "confusion.png")
        draw_mistakes([Mistake(0.9, 0, 0, 1, torch.zeros(3, 4, 4))], names, tmp_path / "mistakes.png")
        warnings.warn("another one is shown", stacklevel=1)
    assert [str(each.message) for each in said] == ["another one is shown"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("confusion", "mistakes"))
