"""First commands work as they are written, and what can be known before training is refused before it."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
from small_learner_runs import learner_arguments
from small_object_runs import as_coco, object_arguments
from small_runs import BACKBONE, COLOURS, arguments, draw_images, results

from visionpeft import fit
from visionpeft.data import ImageFolder
from visionpeft.errors import ConfigurationError
from visionpeft.methods import LoRA
from visionpeft.runs.before_training import check_before_training
from visionpeft.runs.cli import CLI
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks import ImageClassification

QUICK = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--model.optimisation.warmup_epochs", "0"]
PAGE = Path(__file__).parents[2] / "docs" / "protocols.md"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture
def lists(images, tmp_path, monkeypatch):
    """train.csv, val.csv and test.csv in the working directory, with the images beside them."""
    (tmp_path / "squares").symlink_to(images)
    for name, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 10))):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            rows = [(f"squares/{colour}/{number}.png", colour) for colour in COLOURS for number in numbers]
            csv.writer(file).writerows([("path", "label"), *rows])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *command, output):
    """What is said; nothing has been trained or made."""
    assert fit.main([*command, "--output", str(output)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert not output.exists()
    return said.err


def test_the_command_for_lists_in_the_documentation(lists, capsys):
    """As it is written, and without a list to select on as the sentence beside it says."""
    (command,) = re.findall(r"^python -m visionpeft\.fit (.*ImageList.*test\.csv)$", PAGE.read_text(), re.MULTILINE)
    assert fit.main([*command.split(), *BACKBONE, *QUICK]) == 0
    (run,) = (lists / "runs").iterdir()
    assert results(run)["data"]["sizes"] == {"train": 18, "val": 6, "test": 6}
    assert results(run)["reported"].startswith("epoch 1")
    without = command.replace(" --data.val val.csv", "").split()
    said = refused(capsys, *without, *BACKBONE, *QUICK, output=lists / "other")
    assert "--data.val val.csv" in said
    assert "--report last" in said
    assert fit.main([*without, "--report", "last", *BACKBONE, *QUICK, "--output", str(lists / "other")]) == 0


def test_no_test_split_is_noticed_before_training(lists, capsys):
    command = [
        "--config",
        "images_lora.yaml",
        "--data",
        "ImageList",
        "--data.root",
        "auto",
        "--data.train",
        "train.csv",
    ]
    command += ["--data.val", "val.csv", *BACKBONE, *QUICK]
    said = refused(capsys, *command, output=lists / "out")
    assert "no test split" in said
    assert "--data.test test.csv" in said
    assert "--test false" in said
    assert fit.main([*command, "--test", "false", "--output", str(lists / "out")]) == 0
    (run,) = (lists / "out").iterdir()
    assert "test" not in results(run)


def test_a_root_that_is_not_there_is_named(lists, capsys):
    """The folder of images_lora.yaml stays where only the class of the data is changed."""
    command = ["--config", "images_lora.yaml", "--data", "ImageList", "--data.train", "train.csv"]
    command += ["--data.val", "val.csv", "--data.test", "test.csv", *BACKBONE, *QUICK]
    assert "--data.root auto" in refused(capsys, *command, output=lists / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.val_fraction", "0"], "ImageFolder has none here: give a folder val/"),
        (["--data.test_fraction", "0"], "ImageFolder has no test split here"),
        (["--trainer.max_epochs", "0"], "max_epochs 0 leaves no epoch"),
        (["--trainer.check_val_every_n_epoch", "4"], "check_val_every_n_epoch 4 with 3 epochs"),
        (["--trainer.limit_val_batches", "0"], "limit_val_batches 0 leaves no epoch"),
        (["--trainer.val_check_interval", "0"], "val_check_interval 0 is no interval of validation"),
        (["--trainer.val_check_interval", "0.0"], "val_check_interval 0.0 is no interval of validation"),
        (["--trainer.check_val_every_n_epoch", "0"], "check_val_every_n_epoch 0 is no interval of validation"),
        (["--trainer.val_check_interval", "4"], "val_check_interval 4 is more than the 3 batches of an epoch"),
        (
            ["--trainer.val_check_interval", "3", "--trainer.limit_train_batches", "0.7"],
            "val_check_interval 3 is more than the 2 batches of an epoch",
        ),
        (["--trainer.limit_train_batches", "0"], "limit_train_batches 0 leaves nothing to train on"),
        (["--trainer.limit_test_batches", "0"], "limit_test_batches 0 leaves nothing to test"),
        (["--model.backbone_kwargs", "{img_size: 32, in_chans: 1}"], "does not take colour images of 32 x 32 pixels"),
        (
            ["--model.head", "batchnorm_linear", "--data.batch_size", "5"],
            "21 training images in batches of 5 leave",
        ),
        (["--model.head", "batchnorm_linear", "--data.batch_size", "1"], "leave one alone in a batch"),
    ],
)
def test_what_would_fail_later_is_refused_first(options, said, images, tmp_path, capsys):
    assert said in refused(capsys, *arguments(images, *options), output=tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        ["--model.head", "batchnorm_linear", "--data.batch_size", "5", "--data.drop_last", "true"],
        ["--model.head", "batchnorm_linear", "--data.batch_size", "6"],
        ["--data.batch_size", "5"],
        ["--trainer.limit_val_batches", "0", "--report", "last"],
        ["--trainer.limit_val_batches", "0", "--report", "last", "--trainer.val_check_interval", "4"],
        ["--trainer.val_check_interval", "3"],
    ],
)
def test_what_is_near_to_it_is_trained(options, images, tmp_path):
    assert fit.main([*arguments(images, *options, epochs=1), "--output", str(tmp_path / "out")]) == 0


def test_a_look_at_the_model_changes_nothing(images):
    """The check before training moves neither weights, nor statistics, nor the generator."""
    data = ImageFolder(images)
    task = ImageClassification(
        LoRA(2), data.class_names, backbone="test_vit", pretrained=False, backbone_kwargs={"img_size": 32, "depth": 2},
        head="batchnorm_linear",
    )  # fmt: skip
    task.connect(data)
    before, state = {key: value.clone() for key, value in task.state_dict().items()}, torch.get_rng_state()
    task.check_before_training(data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    task.preprocessing = task.preprocessing.__class__(**(vars(task.preprocessing) | {"input_size": (40, 40)}))
    with pytest.raises(ConfigurationError, match="40 x 40"):
        task.check_before_training(data)


def test_an_output_that_is_a_file(images, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "runs"):
        assert fit.main([*arguments(images), "--output", str(output)]) == 2
        assert "no run directory can be made" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
    assert RunDirectory.create(tmp_path / "new", "a b").path.name == "a_b-1"


def test_skipping_damaged_images_can_leave_no_batch(images, tmp_path):
    folder = draw_images(tmp_path / "squares")
    for path in sorted(folder.glob("*/*.png"))[::2]:
        path.write_bytes(b"damaged")
    data = ImageFolder(folder, skip_corrupt=True, batch_size=16, drop_last=True)
    with pytest.raises(ConfigurationError, match="drop_last leaves no batch"):
        data.setup()


def test_what_is_looked_at_before_training_changes_nothing():
    """The model is shown an input in evaluation mode; the dropout of an adapter acts in the training all the same."""
    command = ["--config", "vtab_vpt.yaml", *BACKBONE, "--model.method.dropout", "0.5", "--trainer.accelerator", "cpu"]
    cli = CLI(command)
    cli.datamodule.setup()
    drops = [module for module in cli.model.modules() if isinstance(module, torch.nn.Dropout) and module.p == 0.5]
    before = {name: module.training for name, module in cli.model.named_modules()}
    assert all(drop.training for drop in drops)
    assert drops
    state = torch.get_rng_state()
    cli.model.check_before_training(cli.datamodule)
    assert {name: module.training for name, module in cli.model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("option", ["val_fraction", "test_fraction", "split_seed"])
def test_shares_of_a_folder_that_is_divided_already_are_refused(images, tmp_path, capsys, option):
    folder = tmp_path / "divided"
    for split in ("train", "val", "test"):
        shutil.copytree(images, folder / split)
    given = arguments(folder, f"--data.{option}", "0" if option == "split_seed" else "0.1")
    assert "has folders of splits (train, val, test)" in refused(capsys, *given, output=tmp_path / "runs")
    CLI(arguments(folder))  # without it
    CLI(arguments(images, f"--data.{option}", "0"))  # where it acts


def test_shares_of_files_of_splits_are_refused(tmp_path, capsys):
    share = ("--data.val_fraction", "0.3")
    said = refused(capsys, *object_arguments(*share, data=as_coco(tmp_path / "coco")), output=tmp_path / "runs")
    assert "has files of splits (train, val, test), which are taken as they are; leave it out, or add a file" in said
    few_shot = [*learner_arguments(tmp_path), "--data.dataset", "clipart", *share]
    assert "'clipart' has splits of its own" in refused(capsys, *few_shot, output=tmp_path / "runs")


def test_an_epoch_is_not_chosen_where_the_mean_over_epochs_is_what_is_learnt(images, tmp_path, capsys):
    """PromptSRC's validated prompts are those of an epoch, and the best of them took the place of its mean."""
    given = learner_arguments(images, "--report", "best", "--data.val_fraction", "0.3", learner="PromptSRC")
    said = refused(capsys, *given, output=tmp_path / "runs")
    assert "PromptSRC ends with the mean of its prompts over the epochs; set average_mean to null, or use" in said
    cli = CLI([*given, "--model.learner.average_mean", "null"])
    cli.datamodule.setup()
    check_before_training(cli.model, cli.datamodule, cli.config_init.trainer, "best", tests=True)


def test_what_the_data_says_may_be_said_of_the_model_as_well(images):
    named = ["--model.labels", "classes", "--model.class_names", f"[{', '.join(sorted(COLOURS))}]", "--model.seed", "0"]
    assert CLI(arguments(images, *named)).model.class_names == sorted(COLOURS)


def test_a_file_is_no_folder_of_images(images, tmp_path, capsys):
    said = refused(capsys, *arguments(images / "red" / "0.png"), output=tmp_path / "runs")
    assert "0.png is a file; give the folder that holds the images" in said


def test_a_class_that_is_named_twice(lists, capsys):
    named = ["--data.class_names", "[blue, green, red, blue]", "--data.root", "auto"]
    given = [*("--config", "images_lora.yaml", "--data", "ImageList", "--data.train", "train.csv"), *named]
    assert "class 'blue' is named twice in class_names" in refused(capsys, *given, output=lists / "runs")
