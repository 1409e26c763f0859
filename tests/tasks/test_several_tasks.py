"""Training on several tasks: what a label is judged among, what is measured, and runs from beginning to end."""

import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from small_runs import draw_images, results

import visionpeft as vp
from visionpeft import evaluate, fit, predict
from visionpeft.data import ImageFolder, MultiTask
from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.runs.history import EpochHistory, read_history
from visionpeft.sharing.one_task import learnt_tasks, treatment
from visionpeft.tasks import ImageClassification
from visionpeft.tasks.several_tasks import OneClassOfTask

TASKS = {"a": 2, "b": 3}
LABELS = torch.tensor([0, 4, 1, 2, 3])
TASKS_OF_RUN = ("small", "large")  # not in the order of the alphabet, which a configuration must keep


def logits():
    return torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def own_slices(values):
    """Logits of each image's own task, and its label there."""
    firsts = [0 if label < 2 else 2 for label in LABELS]
    ends = [2 if label < 2 else 5 for label in LABELS]
    rows = zip(values, LABELS, firsts, ends, strict=True)
    return [(row[first:end], int(label) - first) for row, label, first, end in rows]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_own_task_alone(smoothing):
    objective, values = OneClassOfTask(TASKS, smoothing), logits().requires_grad_(True)
    loss = objective.loss(values, LABELS)
    each = [F.cross_entropy(own, torch.tensor(label), label_smoothing=smoothing) for own, label in own_slices(values)]
    wanted = torch.stack(each).mean()
    assert torch.allclose(loss, wanted, rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss, values)
    assert torch.allclose(gradient, torch.autograd.grad(wanted, values)[0], atol=1e-14)
    assert not gradient[0, 2:].any()
    assert abs(loss - F.cross_entropy(values, LABELS, label_smoothing=smoothing)) > 0.1
    measured = torch.stack([F.cross_entropy(own, torch.tensor(label)) for own, label in own_slices(values)]).mean()
    assert torch.allclose(objective.measured_loss(values, LABELS), measured, rtol=1e-12)


def test_every_task_has_its_accuracy():
    """A class of another task never counts, however large; the mean is that of the tasks, not of the images."""
    objective, values = OneClassOfTask(TASKS), logits()
    values[:, 2] += 100  # of task b
    metrics = objective.metrics("test")
    assert [*metrics] == ["top1", "mean_top1", "a/top1", "b/top1"]
    for rows in (slice(0, 2), slice(2, 5)):
        for metric in metrics.values():
            objective.measure(metric, values[rows], LABELS[rows])
    right = [int(own.argmax() == label) for own, label in own_slices(values)]
    a, b = (right[0] + right[2]) / 2, (right[1] + right[3] + right[4]) / 3
    assert a != b
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    wanted = {"top1": sum(right) / 5, "mean_top1": (a + b) / 2, "a/top1": a, "b/top1": b}
    assert found == pytest.approx(wanted)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of two small tasks."""
    folder = tmp_path_factory.mktemp("several")
    tasks = {}
    for name, count in (("small", 5), ("large", 10)):
        root = draw_images(folder / name, per_class=count)
        options = {"root": str(root), "augmentation": "none", "val_fraction": 0.2, "test_fraction": 0.2}
        tasks[name] = {"class_path": "ImageFolder", "init_args": options}
    model = {
        "backbone": "test_vit",
        "pretrained": False,
        "backbone_kwargs": {"img_size": 32, "depth": 2},
        "method": {"class_path": "MOELoRA", "init_args": {"experts": 2, "rank": 4}},
        "optimisation": {"lr": 0.01, "warmup_epochs": 0},
    }
    content = {
        "model": {"class_path": "ImageClassification", "init_args": model},
        "data": {"class_path": "MultiTask", "init_args": {"tasks": tasks, "batch_size": 8}},
        "trainer": {"max_epochs": 3, "accelerator": "cpu"},
        "report": "best",
        "figures": False,
    }
    file = folder / "several.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """A run, and one that fails in the third epoch and is resumed."""
    folder = tmp_path_factory.mktemp("runs")
    assert fit.main(["--config", str(config), "--output", str(folder / "whole")]) == 0

    def fail(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise ZeroDivisionError
        return original(self, trainer, pl_module)

    original = EpochHistory.on_train_epoch_end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochHistory, "on_train_epoch_end", fail)
        with pytest.raises(ZeroDivisionError):
            fit.main(["--config", str(config), "--output", str(folder / "part")])
    (whole,), (part,) = (folder / "whole").iterdir(), (folder / "part").iterdir()
    assert fit.main(["--resume", str(part)]) == 0
    return whole, part


def test_a_run_has_a_result_for_each_task_and_is_resumed(runs):
    whole, part = runs
    test = results(whole)["test"]
    assert test["mean_top1"] == pytest.approx((test["small/top1"] + test["large/top1"]) / 2)
    assert results(whole)["method"][0]["fields"]["tasks"] == ["small", "large"]
    assert "best on the validation split" in results(whole)["reported"]
    assert results(part)["test"] == test
    histories = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_history(p / "metrics.csv")] for p in runs
    ]
    assert histories[0] == histories[1]


def test_it_is_evaluated_again(runs, capsys):
    assert evaluate.main([str(runs[0])]) == 0
    printed = capsys.readouterr().out
    assert "  small" in printed
    assert "mean of the tasks" in printed
    assert json.loads((runs[0] / "evaluation.json").read_text())["test"] == results(runs[0])["test"]


def test_it_predicts_for_a_named_task(runs, config, tmp_path, capsys):
    images = config.parent / "large"
    arguments = [str(runs[0]), str(images), "--output", str(tmp_path / "found.json"), "--top-k", "3"]
    assert predict.main(arguments) == 2
    assert "trained on several tasks, small, large; name that of the images" in capsys.readouterr().err
    assert predict.main([*arguments, "--task", "larch"]) == 2
    assert "was not trained on a task 'larch'; did you mean large" in capsys.readouterr().err
    found = {}
    for task in TASKS_OF_RUN:
        assert predict.main([*arguments, "--task", task]) == 0
        found[task] = (tmp_path / "found.json").read_text()
        rows = json.loads(found[task])
        assert {name for row in rows for name in row["classes"]} == {"red", "green", "blue"}
    assert found["small"] != found["large"]


def test_from_python_it_is_opened_for_a_task(runs):
    trained = vp.from_pretrained(runs[0] / "adapter", task="small", model=plain(runs[0]))
    assert trained.class_names == ["blue", "green", "red"]
    assert trained.model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def plain(run):
    torch.manual_seed(0)
    return vp.create_backbone("test_vit", pretrained=False, img_size=32, depth=2, num_classes=6)


def task_of(config, **options):
    folders = {name: ImageFolder(config.parent / name, 0, 0, augmentation="none") for name in TASKS_OF_RUN}
    data = MultiTask(folders)
    fields = {
        "backbone": "test_vit",
        "pretrained": False,
        "backbone_kwargs": {"img_size": 32, "depth": 2},
        "tasks": data.tasks,
    }
    method = options.pop("method", vp.LoRA(rank=2))
    return ImageClassification(method, data.class_names, **(fields | options)), data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": 0.2}, "mixup does not know of several tasks"),
        ({"class_weights": "balanced"}, "class_weights does not know of several tasks"),
        ({"method": vp.MOELoRA(tasks=("x",))}, "tasks are x, but the data has small, large"),
        ({"method": vp.MOELoRA(), "recompute": "block"}, "the backward pass does not know it; leave recompute out"),
        ({"method": vp.MOELoRA(), "compile": True}, "one graph is for one of them; leave compile out"),
        ({"method": vp.AdaMix()}, "AdaMix compares the class probabilities of two passes"),
    ],
)
def test_what_does_not_know_of_tasks_is_refused(config, options, message):
    with pytest.raises(ConfigurationError, match=message):
        task_of(config, **options)


def test_task_and_data_must_have_the_same_tasks(config):
    task, data = task_of(config)
    task.connect(data)
    with pytest.raises(ConfigurationError, match="has small, large to learn here, but the data has one task"):
        task.connect(data.parts["small"])
    alone, _ = task_of(config, tasks=None)
    with pytest.raises(ConfigurationError, match="has one task to learn here, but the data has small, large"):
        alone.connect(data)


def test_a_loop_of_lightnings_predicts_within_of_tasks(config):
    task, _ = task_of(config)
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ConfigurationError, match="acts by the task of an image"):
        task.predict_step(images, 0)
    with vp.of_tasks(["large", "small"]), torch.no_grad():
        found = task.predict_step(images, 0)
    assert torch.allclose(found.sum(dim=1), torch.ones(2))
    assert not found[0, :3].any()
    assert not found[1, 3:].any()


@pytest.mark.parametrize("tasks", [{"a": 2}, {"a": 2, "b": 0}, {"a": "3"}, {}, [3], "a"], ids=repr)
def test_tasks_that_are_not_those_of_the_classes_are_damage(tasks):
    with pytest.raises(StorageError, match="their classes are not those that it names"):
        learnt_tasks({"tasks": tasks}, ["a/x", "a/y", "b/x"], "somewhere")


def test_a_description_that_does_not_say_how_images_were_treated_is_damage():
    for data in ({}, {"tasks": []}, {"tasks": {"a": {"normalisation": {"mean": 3}}}}):
        with pytest.raises(StorageError, match="does not say how the images of task 'a' were treated"):
            treatment(data, "a", "somewhere")
