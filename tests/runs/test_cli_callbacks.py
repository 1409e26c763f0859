"""Lightning's callbacks named on the command line: tested and saved is what they promise, and a run can be resumed."""

import pytest
import torch
from small_learner_runs import learner_arguments
from small_runs import arguments, copied_in, draw_images, results

from visionpeft import fit, predict
from visionpeft.runs.history import read_history

AVERAGE = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.8"]
EQUAL = ["--trainer.callbacks+=WeightAveraging"]
SWA = [
    "--trainer.callbacks+=StochasticWeightAveraging",
    "--trainer.callbacks.swa_lrs=0.005",
    "--trainer.callbacks.swa_epoch_start=2",
    "--trainer.callbacks.annealing_epochs=2",
]
ACCUMULATE = ["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2, 1: 1}"]
STOP = [
    "--trainer.callbacks+=EarlyStopping",
    *("--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.min_delta=1000", "--trainer.callbacks.patience=3"),
    *("--data.val_fraction", "0.2"),
]
TIMER = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration={hours: 1}"]
RATES = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=step"]
STATS = ["--trainer.callbacks+=DeviceStatsMonitor", "--trainer.callbacks.cpu_stats=false"]
ADALORA = ["--model.method", "AdaLoRA", "--model.method.interval", "2"]
NORMALISED = ["--model.head", "batchnorm_linear"]
DROPOUT = ["--model.method", "VPT", "--model.method.num_tokens", "2", "--model.method.dropout", "0.3"]
RUNS = {
    "average": AVERAGE,
    "average with dropout, of the best epoch": [*AVERAGE, *DROPOUT, "--data.val_fraction", "0.2", "--report", "best"],
    "equal weights": EQUAL,
    "stochastic": SWA,
    "stochastic with batch normalisation": [*SWA, *NORMALISED],
    "accumulation": [*ACCUMULATE, *ADALORA],
    "early stopping of averages": [*STOP, *AVERAGE],
    "watching": [*TIMER, *RATES, *STATS],
}
# of which what is saved is not what is trained last
PREDICTING = ("average", "stochastic with batch normalisation")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("data") / "squares")


def interrupted_and_resumed(folder, command):
    """Run directories of a whole run, and of one that is killed in the third epoch and resumed."""
    part = folder / "part"
    with copied_in(2, part):
        assert fit.main([*command, "--output", str(folder / "whole")]) == 0
    (whole,) = (folder / "whole").iterdir()
    assert not (part / "results.json").exists()
    assert fit.main(["--resume", str(part)]) == 0
    return whole, part


def without_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def assert_same_run(part, whole):
    assert without_seconds(read_history(part / "metrics.csv")) == without_seconds(read_history(whole / "metrics.csv"))
    assert results(part)["test"] == results(whole)["test"]
    assert results(part)["reported"] == results(whole)["reported"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_callbacks_is_resumed(tmp_path, images, name):
    """Interrupted or finished, it gives the numbers of the whole run; its checkpoints hold no backbone."""
    whole, part = interrupted_and_resumed(tmp_path, arguments(images, *RUNS[name], epochs=5))
    assert_same_run(part, whole)
    before = results(whole)
    assert fit.main(["--resume", str(whole)]) == 0
    assert_same_run(whole, part)
    assert results(whole)["test"] == before["test"]
    assert (whole / "checkpoints" / "last.ckpt").stat().st_size < 300_000  # the backbone has 540,000 bytes
    if name in PREDICTING:
        assert predict.main([str(whole), str(images / "red")]) == 0


def test_what_is_saved_is_the_average(tmp_path, images):
    """The adapter and the last checkpoint hold the average, the checkpoint beside it what is trained."""
    from safetensors.torch import load_file

    assert fit.main([*arguments(images, *AVERAGE, "--report", "last"), "--output", str(tmp_path)]) == 0
    (made,) = tmp_path.iterdir()
    saved = load_file(made / "adapter" / "adapter.safetensors")
    checkpoint = torch.load(made / "checkpoints" / "last.ckpt", weights_only=True)
    average, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    compared = 0
    for key, value in saved.items():
        (name,) = [each for each in average if each.endswith(f"default.{key}")]
        torch.testing.assert_close(value, average[name], rtol=0, atol=0)
        compared += not torch.equal(value, current[name])
    assert compared


LEARNERS = {
    "average": ("CoOp", AVERAGE),
    "stochastic": ("CoOp", SWA),
    "accumulation": ("CoOp", ACCUMULATE),
    # Fitted before they are trained, after the callback has copied the task.
    "average of a filled cache": ("TipAdapter", [*AVERAGE, "--model.learner.train_keys", "true"]),
    "stochastic with fitted strengths": ("CLAP", SWA),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_with_callbacks_is_resumed(tmp_path, images, name):
    learner, more = LEARNERS[name]
    whole, part = interrupted_and_resumed(tmp_path, learner_arguments(images, *more, learner=learner, epochs=4))
    assert_same_run(part, whole)


REFUSED = {
    "LearningRateFinder": "give it as --model.optimisation.lr",
    "BatchSizeFinder": "give it as --data.batch_size",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_is_trained_as_its_configuration_says(tmp_path, images, capsys, name):
    given = f"--trainer.callbacks+={name}"
    assert fit.main([*arguments(images, given), "--output", str(tmp_path / "runs")]) == 2
    assert REFUSED[name] in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_learner_that_averages_is_refused_before_there_is_a_run(tmp_path, images, capsys):
    command = learner_arguments(images, *AVERAGE, learner="PromptSRC")
    assert fit.main([*command, "--output", str(tmp_path / "runs")]) == 2
    assert "set average_mean to null" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
