"""The learners of a table, checked before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from visionpeft import tasks
from visionpeft.clip.learner import Learner
from visionpeft.clip.learners.zero_shot import ZeroShot
from visionpeft.data.few_shot.definitions import find_few_shot
from visionpeft.data.few_shot.module import OWN
from visionpeft.errors import ConfigurationError
from visionpeft.protocols.further_arguments import refuse_replaced
from visionpeft.runs.cli import CLI
from visionpeft.runs.config_files import config_content, config_name
from visionpeft.tasks import PromptLearning

# Options of the data that are about one data set, and what they are where nothing is given.
OF_ONE_DATASET = {
    **dict.fromkeys(("class_names", "template", "folder", "image_folder", "split_file"), "null"),
    "split": "published",
}


@dataclass(frozen=True)
class LearnerCandidate:
    """A learner that is compared.

    Args:
        name: in tables.
        config: its configuration.
        class_bound: it can be tested on no other classes.
        uses_images: it learns from training images; one that does not has 0 shots.
        uses_chance: its result depends on the seed.
    """

    name: str
    config: str
    class_bound: bool = False
    uses_images: bool = True
    uses_chance: bool = True


def on(dataset: str, classes: str) -> list[str]:
    """Arguments for some classes ("all", "base" or "new") of a data set."""
    return ["--data.dataset", dataset, "--data.classes", classes]


def only_test(dataset: str, classes: str, *, elsewhere: bool = False) -> list[str]:
    """Arguments for the test split alone, in which a stored draw of the training has no part.

    Args:
        dataset: the data set.
        classes: "all", "base" or "new".
        elsewhere: it is another one than that of the training, whose class names, template, folders and split would
            be wrong.
    """
    reset = [part for option, value in OF_ONE_DATASET.items() for part in (f"--data.{option}", value)]
    return [*on(dataset, classes), "--data.shots", "0", "--data.store", "null", *(reset if elsewhere else ())]


def dataset_keys(datasets: Sequence[str]) -> list[str]:
    """Keys of data sets named by key, title or alias, so that none counts twice and no source as its own target.

    Raises:
        ConfigurationError: an unknown data set.
    """
    return [find_few_shot(dataset, OWN) for dataset in datasets]


def candidates(
    configs: Sequence[str], trained: Sequence[str], classes: str, elsewhere: Sequence[list[str]], given: Sequence[str]
) -> list[LearnerCandidate]:
    """Build every learner and every data set once, so that a mistake shows before hours of training.

    Args:
        configs: a configuration for each learner.
        trained: data sets on which they are trained,
        classes: and on which of their classes.
        elsewhere: arguments of each further test.
        given: further arguments of the command line.

    Raises:
        ConfigurationError: no configuration, one given twice, one that trains no learner, or a learner that knows only
            the classes it was trained on where others are tested.
        DataError: a data set that cannot be read.
    """
    refuse_replaced("learner", given, "--configs with a configuration for each learner")
    if not configs:
        raise ConfigurationError("name at least one configuration of a learner, such as fewshot_coop.yaml")
    stems = [config_name(config) for config in configs]
    if len(set(stems)) < len(stems):
        raise ConfigurationError(f"each configuration needs a name of its own, but got {', '.join(configs)}")
    for config in configs:
        _check_trains_learner(config)
    found = []
    for config in configs:
        cli = _build([*("--config", config, *given, *on(trained[0], classes))])
        found.append(_describe(config, cli.model.learner))
    known = cli.datamodule.class_names
    for dataset in trained[1:]:
        _build(["--config", configs[0], *given, *on(dataset, classes)])
    for place in elsewhere:
        if _build(["--config", configs[0], *given, *place]).datamodule.class_names != known:
            _refuse_class_bound(found)
    names = [candidate.name for candidate in found]
    return [
        candidate if names.count(candidate.name) == 1 else replace(candidate, name=stem)
        for candidate, stem in zip(found, stems, strict=True)
    ]


def _check_trains_learner(config: str) -> None:
    """Refuse the configuration of another task, to whose data the options of a protocol would mean nothing."""
    match config_content(config):
        case {"model": {"class_path": str(path)}}:
            task = getattr(tasks, path.rpartition(".")[2], PromptLearning)
            if not issubclass(task, PromptLearning):
                raise _trains_no_learner(config)


def _trains_no_learner(config: str) -> ConfigurationError:
    return ConfigurationError(
        f"{config} trains no learner on CLIP, and this protocol compares learners; name configurations of learners, "
        "such as fewshot_coop.yaml"
    )


def _build(arguments: list[str]) -> CLI:
    cli = CLI(arguments)
    if not isinstance(cli.model, PromptLearning):
        raise _trains_no_learner(arguments[1])
    cli.datamodule.setup()
    return cli


def _describe(config: str, learner: Learner) -> LearnerCandidate:
    fits_features = type(learner).fit_features is not Learner.fit_features
    return LearnerCandidate(
        type(learner).__name__,
        config,
        class_bound=learner.class_bound,
        uses_images=fits_features or bool(learner.trainable_parameters()),
        uses_chance=not isinstance(learner, ZeroShot),
    )


def _refuse_class_bound(found: Sequence[LearnerCandidate]) -> None:
    for candidate in found:
        if candidate.class_bound:
            raise ConfigurationError(
                f"{candidate.name} of {candidate.config} knows only the classes it was trained on and cannot be tested "
                "on others; leave it out of this protocol"
            )
