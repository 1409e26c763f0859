"""Wrong command lines: one line on stderr that names the nearest valid names, exit code 2, no traceback."""

import subprocess
import sys

import pytest
import torch

from visionpeft import evaluate, fit
from visionpeft.errors import ConfigurationError
from visionpeft.runs.cli import CLI
from visionpeft.runs.config_files import find_config
from visionpeft.summary import main as summarise

VPT = ["--config", "vtab_vpt.yaml"]
IMAGES = ["--config", "images_lora.yaml"]

CASES = {
    "configuration": (["--config", "vtab_vtp.yaml"], "no configuration 'vtab_vtp.yaml'; did you mean vtab_vpt.yaml"),
    "no configuration": ([], "name a configuration, such as --config vtab_vpt.yaml"),
    "method": ([*VPT, "--model.method", "Lora"], "no class 'Lora'; did you mean LoRA"),
    "method field": ([*VPT, "--model.method.num_token", "3"], "VPT has no option 'num_token'; did you mean num_tokens"),
    "method value": ([*VPT, "--model.method.num_tokens", "x"], "num_tokens takes a whole number, not 'x'"),
    "blocks": ([*VPT, "--model.method.blocks", "last:99"], "a tower of 6 blocks"),
    "target": ([*VPT, "--model.method", "LoRA", "--model.method.targets", "[qq]"], "target 'qq'"),
    "model field": (
        [*VPT, "--model.bakbone", "x"],
        "ImageClassification has no option 'bakbone'; did you mean backbone",
    ),
    "nested field": ([*VPT, "--model.lr", "1"], "has no option 'lr'; did you mean optimisation.lr?"),
    "dataclass field": ([*VPT, "--model.optimisation.lrr", "1"], "optimisation has no option 'lrr'; did you mean lr"),
    "choice": ([*VPT, "--model.optimisation.optimizer", "adam"], "optimizer takes one of adamw, sgd, not 'adam'"),
    "range": ([*VPT, "--model.optimisation.lr", "-1"], "must not be negative"),
    "trained parameter": ([*VPT, "--model.train", "[cls_tokn]"], "cls_token"),
    "data class": ([*VPT, "--data", "VTABk"], "no class 'VTABk'; did you mean VTAB1k"),
    "data field": ([*VPT, "--data.tsak", "3"], "VTAB1k has no option 'tsak'; did you mean task"),
    "task": ([*VPT, "--data.task", "cifa"], "did you mean cifar"),
    "task without root": ([*VPT, "--data.task", "cifar"], "needs root"),
    "root": (["--config", "images_lora.yaml", "--data.root", "nope"], "image folder nope does not exist"),
    "root of what is in the package": (
        ["--config", "fewshot_coop.yaml", "--data.root", "photos/"],
        "--data.root photos/ would not be read: the configuration has the embedded data set 'clipart'; for images of",
    ),
    "no value": ([*IMAGES, "--data.root"], "option --data.root needs a value after it"),
    "no value before an option": ([*IMAGES, "--data.root", "--test", "false"], "option --data.root needs a value"),
    "data without a configuration": (
        ["--data.root", "photos/"],
        "--data.root: name a configuration, such as --config images_lora.yaml",
    ),
    "option of the trainer": (
        [*VPT, "--max_epochs", "3"],
        "option 'max_epochs'; did you mean --trainer.max_epochs?",
    ),
    "by another name": ([*VPT, "--epochs", "3"], "no option 'epochs'; did you mean --trainer.max_epochs?"),
    "option of the data": ([*VPT, "--batch_size", "4"], "did you mean --data.batch_size?"),
    "option of the model": ([*VPT, "--labels", "several"], "did you mean --model.labels?"),
    "option of the optimiser": ([*VPT, "--lr", "0.1"], "did you mean --model.optimisation.lr?"),
    "option of the method": ([*VPT, "--num_tokens", "8"], "did you mean --model.method.num_tokens?"),
    "list": ([*IMAGES, "--model.method.targets", "q"], "targets takes a list, such as '[q]', not 'q'"),
    "labels": ([*IMAGES, "--data.labels", "masks"], "labels takes one of classes, several, number, not 'masks'"),
    "labels of the model": (
        [*VPT, "--model.labels", "several"],
        "--model.labels several comes from the data, which has classes: give --data.labels several",
    ),
    "classes of the model": (
        [*VPT, "--model.class_names", "[a, b]"],
        "--model.class_names '[a, b]' comes from the data, which has [",
    ),
    "seed of the model": ([*VPT, "--model.seed", "5"], "--model.seed is that of the run: give --seed_everything 5"),
    "seed": ([*VPT, "--seed_everything", "4294967296"], "must be from 0 to 4294967295"),
    "negative seed": ([*VPT, "--seed_everything=-1"], "must be from 0 to 4294967295"),
    "backbone": (
        [*VPT, "--model.backbone", "nano_vitt"],
        "no backbone 'nano_vitt'; did you mean nano_vit or nano_vit.distilled?",
    ),
    "weights": ([*VPT, "--model.backbone", "vit_base_patch16_224.orig"], "no weights 'orig'; it has"),
    "convolutional backbone": (
        [*VPT, "--model.backbone", "convnext_atto", "--model.pretrained", "false"],
        "VPT adds tokens, which blocks of class ConvNeXtBlock would never see",
    ),
    "data without its root": ([*VPT, "--data", "ImageFolder"], "ImageFolder needs root; give --data.root ..."),
    "data without two options": (
        [*VPT, "--data", "FGVC"],
        "needs dataset and root; give --data.dataset ... --data.root",
    ),
    "logger": ([*VPT, "--trainer.logger", "CsvLogger"], "no class 'CsvLogger'; did you mean CSVLogger"),
    "callback": ([*VPT, "--trainer.callbacks+=EarlyStoping"], "no class 'EarlyStoping'; did you mean EarlyStopping?"),
    "value of a callback": (
        [*VPT, "--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval", "x"],
        "option logging_interval takes one of step, epoch or null, not 'x'",
    ),
    "value that a callback refuses": (
        [*VPT, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=a", "--trainer.callbacks.mode=up"],
        "EarlyStopping: `mode` can be min, max, got up",
    ),
    "logger for a callback": (
        [*VPT, "--trainer.callbacks+=CSVLogger"],
        "no class 'CSVLogger'; it can be BackboneFinetuning, BaseFinetuning, ",
    ),
    "callback without an option": (
        [*VPT, "--trainer.callbacks+=EarlyStopping"],
        "EarlyStopping needs monitor; give --trainer.callbacks.monitor ...",
    ),
    "logger without an option": (
        [*VPT, "--trainer.logger", "CSVLogger"],
        "CSVLogger needs save_dir; give --trainer.logger.save_dir ...",
    ),
    "trainer field": ([*VPT, "--trainer.max_epoch", "3"], "trainer has no option 'max_epoch'; did you mean max_epochs"),
    "trainer value": ([*VPT, "--trainer.max_epochs", "x"], "max_epochs takes a whole number or null, not 'x'"),
    "accelerator": ([*VPT, "--trainer.accelerator", "gpuu"], "Available names are"),
    "devices": ([*VPT, "--trainer.devices", "999", "--trainer.accelerator", "cpu"], "CPU cores"),
    "option": ([*VPT, "--modle.backbone", "x"], "no option 'modle.backbone'; did you mean model"),
    "stray word": ([*VPT, "extra"], "no option 'extra'"),
    "report": ([*VPT, "--report", "best"], "needs a validation split"),
    "resume": (["--resume", "nowhere"], "nowhere is not a run directory"),
    "names that YAML reads as something else": (
        ["--config", "fewshot_coop.yaml", "--data.class_names", "[no, yes]"],
        "option class_names takes texts, and False in [False, True] is none",
    ),
    "a list that is none": ([*VPT, "--model.train", "5"], "option train takes a list or null, not '5'"),
    "a dictionary that is none": (
        ["--config", "scenes_open_vocabulary.yaml", "--model.names", "3"],
        "option names takes a dictionary or null, not '3'",
    ),
}


@pytest.mark.parametrize(("arguments", "said"), CASES.values(), ids=list(CASES))
def test_wrong_command_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize("named", [["folder"], ["clipart"], ["Drawings"]])
def test_a_root_is_taken_where_the_data_set_is_named(named, monkeypatch):
    """A protocol gives one root to all its data sets, of which some may be in the package."""
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)
    cli = CLI(["--config", "fewshot_coop.yaml", "--data.root", "photos/", "--data.dataset", *named])
    assert (str(cli.config.data.init_args.root), [cli.config.data.init_args.dataset]) == ("photos/", named)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("num_tokens:", "num_token:", "VPT has no option 'num_token'; did you mean num_tokens"),
        ("class_path: VPT", "class_path: VTP", "no class 'VTP'; did you mean VPT"),
        ("max_epochs", "max_epoch", "trainer has no option 'max_epoch'"),
        ("\ndata:", "\ndat:", "no option 'dat.init_args.task'; did you mean data"),
        ("trainer:", "trainer: [", "is not valid YAML"),
    ],
)
def test_wrong_configuration_file(old, new, said, capsys, tmp_path):
    text = find_config("vtab_vpt.yaml").read_text()
    assert old in text
    path = tmp_path / "wrong.yaml"
    path.write_text(text.replace(old, new))
    assert fit.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpu_asked_for_and_absent(capsys):
    assert fit.main([*VPT, "--trainer.accelerator", "gpu"]) == 2
    assert "no usable CUDA GPU" in capsys.readouterr().err


def test_evaluate_needs_a_run(capsys):
    assert evaluate.main(["--data.task", "cifar"]) == 2
    assert "name the run directory first" in capsys.readouterr().err


def test_local_configuration_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("vtab_vpt.yaml").parent != tmp_path
    assert find_config("vtab_vpt") == find_config("vtab_vpt.yaml")
    (tmp_path / "vtab_vpt.yaml").write_text("{}")
    assert find_config("vtab_vpt.yaml").resolve().parent == tmp_path
    with pytest.raises(ConfigurationError, match="vit_b16_in21k"):
        find_config("backbones/vit_b16_in21.yaml")


@pytest.mark.slow
def test_error_of_a_process(tmp_path):
    command = [sys.executable, "-m", "visionpeft.fit", "--config", "vtab_vpt.yaml", "--model.method", "Lora"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: there is no class 'Lora'; did you mean LoRA?\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("text", "said"), [("", "it is empty"), ("# nothing\n", "it is empty"), ("hello", "it says 'hello'")]
)
def test_a_file_that_configures_nothing(text, said, capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    for configs in (["--config", str(path)], [*VPT, "--config", str(path)]):
        assert fit.main(configs) == 2
        assert f"error: {path} is no configuration: {said}" in capsys.readouterr().err


def test_values_that_a_method_refuses_in_a_summary(capsys):
    assert summarise(["--backbone", "nano_vit", "--method", "LoRA", "--method.rank", "0"]) == 2
    assert capsys.readouterr().err == "error: LoRA: rank must be a positive integer\n"
