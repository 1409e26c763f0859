"""Two processes whose shares of an epoch are not of one size train as one does: classes, labels, numbers, averages."""

import math
from types import SimpleNamespace

import pytest
import small_label_runs
import torch
from process_runs import alone, furthest, results, together
from small_runs import arguments, draw_splits

from visionpeft import fit
from visionpeft.data.dataset import Part
from visionpeft.data.ordering import BalancedSampler, EpochSampler, SceneSampler
from visionpeft.tasks import ImageTask
from visionpeft.tasks.objectives import OneClass

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
# 21 images in global batches of 4: in the last step the first process has one image, and the second has none.
FOUR = ["--global_batch", "4"]
SGD = ["--model.optimisation.optimizer", "sgd", "--model.optimisation.lr", "0.05"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_splits(tmp_path_factory.mktemp("images"), train=7, val=1, test=3)


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Options of data with several labels, and with numbers."""
    folder = tmp_path_factory.mktemp("lists")
    rows = small_label_runs.draw(folder)
    rows["train"] = rows["train"][:21]
    return {labels: small_label_runs.write_lists(folder, rows, labels) for labels in ("several", "number")}


EMA = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.8"]
SWA = ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.005"]
SWA += ["--trainer.callbacks.swa_epoch_start=1", "--trainer.callbacks.annealing_epochs=1"]
CASES = {
    "weights of classes": lambda images, lists: arguments(images, "--model.class_weights", "[1.0, 2.0, 5.0]", epochs=1),
    "balanced, averaged over steps": lambda images, lists: arguments(images, "--data.balanced", "true", *EMA, epochs=2),
    "several labels": lambda images, lists: small_label_runs.arguments(lists["several"], epochs=1),
    "numbers, averaged over epochs": lambda images, lists: small_label_runs.arguments(lists["number"], *SWA, epochs=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_as_one(tmp_path, images, lists, case):
    given = [*CASES[case](images, lists), *FOUR, *SGD]
    one = alone(tmp_path / "one", given)
    # The numbers are years, which float32 holds to 1e-4.
    assert furthest(together(tmp_path / "two", given), one) < (3e-5 if "numbers" in case else 1e-6)
    assert results(one)["data"]["sizes"]["train"] == 21
    if case == "weights of classes":  # the negative control: as DistributedDataParallel averages by itself
        other = together(tmp_path / "other", given, function=fit_by_processes)
        assert furthest(other, one) > 1e-3


def fit_by_processes(given):
    ImageTask._share_of_step = lambda self, labels, part=None: (None, None)
    return fit.main(given)


@pytest.mark.parametrize("sampler", ["samples", "classes", "scenes"])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_what_is_no_repeat_is_seen_once(sampler, processes):
    """Without the repeats, the processes have each sample once, and all know how many the others have."""
    labels = [index // 2 for index in range(14)]
    kind = {"samples": EpochSampler, "classes": BalancedSampler, "scenes": SceneSampler}[sampler]
    seen, whole = [], []
    batches = math.ceil(len(kind(labels, num_replicas=processes, rank=0)) / 2)
    together_by_batch = [set() for _ in range(batches)]
    own_by_batch = [0] * batches
    for rank in range(processes):
        mine = list(kind(labels, num_replicas=processes, rank=rank, seed=3))
        whole += mine
        for batch in range(batches):
            own, together = kind(labels, num_replicas=processes, rank=rank, seed=3).fresh(2 * batch, 2 * batch + 2)
            seen += mine[2 * batch : 2 * batch + own]
            together_by_batch[batch].add(together)
            own_by_batch[batch] += own
    assert together_by_batch == [{own} for own in own_by_batch]
    expected = sorted(kind(labels, num_replicas=1, rank=0, seed=3))
    assert sorted(seen) == expected
    if processes > 2:  # the negative control: there are repeats
        assert len(whole) > len(expected)


def test_weight_of_a_batch():
    """Cross-entropy with weights w is sum_i w_i l_i / sum_i w_i."""
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 2, 2, 1, 0, 2])
    objective = OneClass(3, weights=[1.0, 2.0, 5.0])
    losses = [objective.loss(logits[part], labels[part]) for part in (slice(0, 4), slice(4, 6))]
    weights = [objective.loss_weight(labels[part]) for part in (slice(0, 4), slice(4, 6))]
    assert [weight.item() for weight in weights] == [13, 6]
    joined = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    torch.testing.assert_close(joined, objective.loss(logits, labels))
    assert OneClass(3).loss_weight(labels) is None


def test_share_without_weights():
    """By numbers of samples: 1 of 3 images of a step."""

    class Two:
        loss_weight = staticmethod(lambda labels: None)
        _trainer = trainer = SimpleNamespace(world_size=2)

    assert ImageTask._share_of_step(Two(), torch.zeros(1), Part(1, 3)) == (1 / 3, Part(1, 3))
