"""Options of Lightning's Trainer: a whole number stays one, whatever other libraries have annotated before."""

import pytest
from forked import start, wait

SCRIPT = """
import typing
from typing import Optional, Union

from jsonargparse import ArgumentParser
from visionpeft.runs.trainer import Trainer

for forget in typing._cleanups:  # Lightning has just made its own; 128 types later they are forgotten
    forget()
Optional[Union[float, int]], Union[float, int], Optional[Union[float, int, str]]  # what another library may say


class AsLightning:
    def __init__(
        self, limit_val_batches: Optional[Union[int, float]] = None, overfit_batches: Union[int, float] = 0.0,
        limit_test_batches: Optional[Union[int, float]] = None,
    ):
        pass


for trainer in (AsLightning, Trainer):
    parser = ArgumentParser()
    parser.add_class_arguments(trainer, "trainer")
    given = ["--trainer.limit_val_batches=1", "--trainer.overfit_batches=2", "--trainer.limit_test_batches=0.5"]
    options = parser.parse_args(given).trainer
    print(*map(repr, (options.limit_val_batches, options.overfit_batches, options.limit_test_batches)))
"""


def script():
    exec(SCRIPT, {})
    return 0


@pytest.mark.usefixtures("one_thread")
def test_one_batch_is_not_all_batches(tmp_path):
    """Lightning 2.6.6 annotates like the first class; what jsonargparse 4.53 reads is another library's order."""
    printed = tmp_path / "printed.txt"
    assert wait(start(script, output=printed)) == 0, printed.read_text()
    as_lightning, ours = printed.read_text().splitlines()
    assert as_lightning.split()[0] == "1.0"  # the fault is there, so that this test can fail
    assert ours.split() == ["1", "2", "0.5"]
