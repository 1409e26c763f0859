"""Options of Lightning's Trainer: a whole number stays one, whatever other libraries have annotated before."""

import pytest
import yaml
from forked import start, wait
from small_runs import arguments, draw_images

from visionpeft.runs.cli import CLI

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


def test_all_batches_are_not_one_batch(tmp_path):
    """The numbers of jsonargparse 4.53 take 1.0 for 1 in a configuration, and where they build what they have read."""
    images = draw_images(tmp_path / "images")
    (tmp_path / "shares.yaml").write_text("trainer: {limit_train_batches: 1.0, val_check_interval: 1.0}\n")
    given = ("--config", str(tmp_path / "shares.yaml"), "--trainer.limit_val_batches", "1.0")
    cli = CLI(arguments(images, *given, "--trainer.limit_test_batches", "1"))
    for options in (cli.config.trainer, cli.config_init.trainer):
        taken = options.limit_train_batches, options.val_check_interval, options.limit_val_batches
        assert [repr(value) for value in (*taken, options.limit_test_batches)] == ["1.0", "1.0", "1.0", "1"]
    trainer = cli.build_trainer([], logger=False, enable_checkpointing=False)
    assert isinstance(trainer.limit_val_batches, float)
    assert isinstance(trainer.limit_test_batches, int)


def test_shares_of_batches_are_written_as_they_are(tmp_path):
    """A run of half of its batches wrote 0 into its configuration: resumed or evaluated, it had none."""
    shares = {"limit_train_batches": 0.5, "limit_val_batches": 1.0, "limit_test_batches": 2, "overfit_batches": 0.25}
    shares |= {"limit_predict_batches": 1, "val_check_interval": 0.5}
    given = [word for name, value in shares.items() for word in (f"--trainer.{name}", str(value))]
    text = CLI(arguments(draw_images(tmp_path / "images"), *given)).config_text()
    written = yaml.safe_load(text)["trainer"]
    assert {name: repr(written[name]) for name in shares} == {name: repr(value) for name, value in shares.items()}
