"""What `fit` answers before it imports torch: the help page, and options that no class has."""

import inspect
import subprocess
import sys

import lightning.pytorch as pl
import pytest

from visionpeft.errors import ConfigurationError
from visionpeft.heads import DenseHead, DetectionHead
from visionpeft.methods import Method
from visionpeft.runs.cli import CLASSES, CLI
from visionpeft.runs.command import Options
from visionpeft.runs.config_files import shipped_configs
from visionpeft.runs.options import OPTIONS, TASKS, answer_at_once, help_page
from visionpeft.runs.signatures import parameters, trainer_parameters

CONFIG = ["--config", "vtab_vpt.yaml"]
OWN = [
    cls for cls in dict.fromkeys(CLASSES) if cls.__module__.partition(".")[0] == "visionpeft"
]  # the rest: Lightning's
NAMED = [cls for cls in OWN if cls not in (Method, DenseHead, DetectionHead)]


def accepted(cls):
    """What a constructor accepts, by `inspect`; its **kwargs go to the next class."""
    found = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            own = list(inspect.signature(base.__init__).parameters.values())[1:]
            found |= {each.name for each in own if each.kind is not each.VAR_KEYWORD}
            if all(each.kind is not each.VAR_KEYWORD for each in own):
                break
    return found


@pytest.mark.parametrize("cls", NAMED, ids=lambda cls: cls.__name__)
def test_the_source_says_what_the_constructor_takes(cls):
    assert set(parameters(cls.__name__)) == accepted(cls)


def test_the_source_says_what_the_trainer_takes():
    assert set(trainer_parameters()) == accepted(pl.Trainer)


@pytest.mark.parametrize("name", ["offset.Offset", "torch.nn.Linear", "NoSuchClass", '{"class_path": "LoRA"}'])
def test_classes_from_elsewhere_are_not_judged(name):
    assert parameters(name) is None
    assert answer_at_once([*CONFIG, "--model.method", name, "--model.method.nonsense", "1"]) is False


WRONG = {
    "top": ["--nonsense", "1"],
    "trainer": ["--trainer.max_epoch", "1"],
    "task": ["--model.nonsense", "1"],
    "init_args": ["--model.init_args.nonsense=1"],
    "field of a dataclass": ["--model.optimisation.lrr", "1"],
    "meant in a dataclass": ["--model.lr", "1"],
    "method": ["--model.method.rank", "1"],
    "method of the command line": ["--model.method", "LoRA", "--model.method.nonsense", "1"],
    "data": ["--data.rot", "x"],
    "data of the command line": ["--data", "ImageList", "--data.tasks", "x"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_the_sentence_is_that_of_the_parser(arguments):
    with pytest.raises(ConfigurationError) as at_once:
        answer_at_once([*CONFIG, *arguments])
    with pytest.raises(ConfigurationError) as parsed:
        CLI([*CONFIG, *arguments])
    assert str(at_once.value) == str(parsed.value)


RIGHT = [
    ["--model.method", "LoRA", "--model.method.rank", "4"],
    ["--model.method.init_args.num_tokens=4", "--trainer.callbacks+=Timer", "--trainer.max_epochs", "-1"],
    ["--model.optimisation.lr", "1e-3", "--data.task=dsprites_ori", "--seed_everything", "3", "--figures", "false"],
    ["-c", "backbones/nano_vit.yaml", "--print_config"],
    ["--data", "mine.Data", "--data.folder", "x"],
    ["--model.help", "ImageClassification"],
]


@pytest.mark.parametrize("arguments", RIGHT, ids=" ".join)
def test_right_options_go_on_to_the_parser(arguments):
    assert answer_at_once([*CONFIG, *arguments]) is False


@pytest.mark.parametrize("config", shipped_configs())
def test_shipped_configurations_go_on_to_the_parser(config):
    trained = config != "scenes_open_vocabulary.yaml"
    option = ("--model.optimisation.lr", "1") if trained else ("--model.threshold", "0")
    assert answer_at_once(["--config", config, "--model.backbone", "nano_vit", *option]) is False


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(["--help"], 0, "usage: python -m visionpeft.fit"), ([*CONFIG, "--model.lr", "1"], 2, "mean optimisation.lr?")],
    ids=["help", "wrong option"],
)
def test_it_costs_no_import(arguments, code, said, tmp_path):
    """In a process of its own, nothing but the standard library and YAML is imported."""
    script = (
        "import sys; from visionpeft.fit import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'lightning', 'timm', 'jsonargparse', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == code, result.stderr
    assert said in result.stdout + result.stderr


def test_the_help_page_names_what_can_be_set():
    page = help_page().split()
    for option in OPTIONS:
        assert f"--{option.name}:" in page
    for task in TASKS:
        assert all(f"--model.{name}" in page for name in parameters(task))
    assert all(f"--trainer.{name}" in page for name in accepted(pl.Trainer))


def test_the_whole_page_has_types_and_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        CLI(["--help", "all"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m visionpeft.fit")
    assert "(type: str, default: runs)" in " ".join(printed.split())


def test_words_of_an_option_are_joined_by_either_sign():
    """As in a configuration, or as in the help; what is no option stays as it is written."""
    options = Options("made here")
    options.add_argument("files", nargs="+")
    options.add_argument("--skip-corrupt", action="store_true")
    options.add_argument("--top-k", type=int)
    options.add_argument("--learning_rates", type=float)
    for words in (
        ["--skip_corrupt", "--top_k", "3", "--learning-rates=2"],
        ["--skip-corrupt", "--top-k=3", "--learning_rates", "2"],
    ):
        found = options.parse_args(["a_b-c.jpg", *words])
        assert vars(found) == {"files": ["a_b-c.jpg"], "skip_corrupt": True, "top_k": 3, "learning_rates": 2.0}
    with pytest.raises(ConfigurationError, match="unrecognized arguments: --skip_all; see made here --help"):
        options.parse_args(["a.jpg", "--skip_all"])
