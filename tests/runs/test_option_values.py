"""Values on the command line and in configurations: `null` is nothing at every depth, and a template is a text."""

import typing

import pytest
from jsonargparse import Namespace

import visionpeft as vp
from visionpeft.errors import ConfigurationError
from visionpeft.runs.cli import CLI
from visionpeft.runs.option_values import as_meant, refuse_nulls

LORA = ["--config", "vtab_lora.yaml"]
Kind = typing.TypeVar("Kind")
COOP = ["--config", "fewshot_coop.yaml"]
TUNED = ["--config", "fewshot_tuned_clip.yaml", "--model.learner.method", "LoRA"]


def options_of(*arguments):
    return CLI([*arguments, "--trainer.accelerator", "cpu"]).config.model.init_args


@pytest.mark.parametrize("null", ["null", "~", "Null"])
def test_an_option_of_a_method_is_nothing(null):
    method = options_of(
        *LORA, "--model.method.rank", "3", "--model.method.alpha", "7", "--model.method.alpha", null
    ).method
    assert (method.init_args.alpha, method.init_args.rank) == (None, 3)


def test_a_text_is_nothing_and_not_the_word_none():
    words = options_of(*COOP, "--model.learner.init", "a drawing of a", "--model.learner.init=null").learner
    assert words.init_args.init is None
    assert words.init_args.context_length == 16


def test_the_last_one_counts():
    found = options_of(*LORA, "--model.optimisation.head_lr=null", "--model.optimisation.head_lr", "0.5").optimisation
    assert found.head_lr == 0.5
    more = ["--model.optimisation.lr", "0.25", "--model.optimisation.head_lr", "0.5"]
    found = options_of(*LORA, *more, "--model.optimisation.init_args.head_lr", "null").optimisation
    assert (found.head_lr, found.lr) == (None, 0.25)


def test_three_deep():
    rank = ["--model.learner.method.rank", "3", "--model.learner.method.alpha", "5"]
    method = options_of(*TUNED, *rank, "--model.learner.method.alpha", "null").learner.init_args.method
    assert (method.init_args.alpha, method.init_args.rank) == (None, 3)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--model.optimisation.lr", "null"], "optimisation.lr"),
        (["--model.method.rank=null"], "method.rank"),
        (["--model.drop_path", "null"], "drop_path"),
        (["--data.batch_size", "~"], "batch_size"),
    ],
)
def test_refused_where_an_option_takes_none(arguments, name):
    with pytest.raises(ConfigurationError, match=rf"option {name} takes no null; leave it out for its default"):
        CLI([*LORA, *arguments])


def test_refused_in_a_configuration(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {optimisation: {lr: null, head_lr: null}}}")
    with pytest.raises(ConfigurationError, match=r"option optimisation\.lr takes no null"):
        CLI([*LORA, "--config", str(overlay)])
    overlay.write_text("model: {init_args: {optimisation: {head_lr: null}}}")
    assert options_of(*LORA, "--config", str(overlay)).optimisation.head_lr is None


@pytest.mark.parametrize("template", ["{}", "a map: {}", "{} # it", "itap of a {}.", "{}: 'x"])
def test_a_template_is_the_text_as_it_stands(template):
    zero_shot = ["--config", "fewshot_zero_shot.yaml"]
    assert options_of(*zero_shot, "--model.learner.template", template).learner.init_args.template == template
    assert options_of(*zero_shot, f"--model.learner.template={template}").learner.init_args.template == template
    segmentation = ["--config", "scenes_open_vocabulary.yaml", "--model.template", template]
    assert options_of(*segmentation).template == template


def test_several_templates_and_none():
    zero_shot = ["--config", "fewshot_zero_shot.yaml", "--model.learner.template"]
    assert options_of(*zero_shot, '["{}", "a: {}"]').learner.init_args.template == ["{}", "a: {}"]
    assert options_of(*zero_shot, "null").learner.init_args.template is None


class Odd(vp.LoRA):
    """A method whose annotations admit None in odd ways."""

    def __init__(
        self,
        implicit: int = None,  # noqa: RUF013
        choice: int | typing.Literal["a", None] = 2,
        some: typing.Union[int, typing.Any] = 2,  # noqa: UP007
        kind: Kind = 2,
        bare=2,
        **kwargs,
    ):
        super().__init__(**kwargs)


class Unreadable(vp.LoRA):
    """A method whose annotations cannot be evaluated."""

    def __init__(self, nothing: "pytest.nothere.Kind" = 3, **kwargs):
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("cls", "names"), [(Odd, ["implicit", "choice", "some", "kind", "bare"]), (Unreadable, ["nothing"])]
)
def test_annotations_that_admit_none_refuse_nothing(cls, names):
    given = Namespace(class_path=f"{__name__}.{cls.__name__}", init_args=Namespace(**dict.fromkeys(names)))
    refuse_nulls(given)
    given.init_args.rank = None
    with pytest.raises(ConfigurationError, match="option rank takes no null"):
        refuse_nulls(given)


def test_refused_in_a_list_of_methods():
    methods = "[{class_path: VPT}, {class_path: LoRA, init_args: {rank: null}}]"
    with pytest.raises(ConfigurationError, match=r"option method\.rank takes no null"):
        CLI([*LORA, "--model.method", methods])


def test_an_entry_of_a_dictionary_is_not_given_alone():
    with pytest.raises(ConfigurationError, match=r"as a whole: --model\.backbone_kwargs '\{img_size: 32\}'"):
        CLI([*LORA, "--model.backbone_kwargs.img_size", "32"])
    assert options_of(*LORA, "--model.backbone_kwargs", "{img_size: 32}").backbone_kwargs == {"img_size": 32}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.views", "null", "--model.backbone=a=b", "--trainer.callbacks.patience", "null"],
        ["--model.method.path", "null.txt", "--model.method.flag"],
        ["null", "--config", "null"],
        ["--config", "mine.overrides.yaml", "--output", "runs/a.backbone_kwargs.b", "--model", "--data=X"],
        ["--model.backbone_kwargs", "{}", "--model.learner.template", "[a, b]", "--model.learner.template"],
    ],
)
def test_everything_else_is_left(arguments):
    assert as_meant(arguments) == arguments
