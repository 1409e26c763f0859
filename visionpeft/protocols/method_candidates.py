"""The methods of a table: found by configuration or name, and built once before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from visionpeft import methods
from visionpeft.adapters.allocate import allocate
from visionpeft.costs.saved_bytes import saved_bytes, storages
from visionpeft.errors import ConfigurationError, did_you_mean
from visionpeft.methods.parts.base import snake_case
from visionpeft.methods.parts.frozen_sources import OverAdapters
from visionpeft.runs.before_training import check_judged
from visionpeft.runs.cli import CLI
from visionpeft.runs.config_files import config_content, config_name, find_config, shipped_configs

MEASURED_IMAGES = 2


@dataclass(frozen=True)
class MethodCandidate:
    """A configuration that is compared.

    Args:
        name: in tables and folders: the configuration's, without the benchmark.
        config: the configuration.
        data: name of its data module.
    """

    name: str
    config: str
    data: str

    @property
    def path(self) -> Path:
        """The configuration's file."""
        return find_config(self.config)


def configs_of_methods(names: Sequence[str], prefix: str) -> list[str]:
    """Shipped configurations of methods, named as their file without the benchmark or as their class; "all" is all.

    Args:
        names: such as "vpt_shallow", "VPT" or "LoRA".
        prefix: of the benchmark's configurations, such as "vtab_".

    Raises:
        ConfigurationError: there is none of that name.
    """
    known = {name.removeprefix(prefix).removesuffix(".yaml"): name for name in shipped_configs(prefix)}
    by_class: dict[str, list[str]] = {}
    for config in known.values():
        by_class.setdefault(_plain(_method_class(config)), []).append(config)
    of_clips = {_plain(_method_class(config)) for config in shipped_configs("video_")}
    for method in methods.__all__:  # those without a configuration take the benchmark's default
        if method == "Method" or issubclass(getattr(methods, method), OverAdapters):
            continue  # over which adapters, only a configuration of the user's own says
        if _plain(method) not in by_class.keys() | of_clips:
            config = f"{prefix}{snake_case(method)}.yaml"
            known[snake_case(method)] = config
            by_class[_plain(method)] = [config]
    if list(names) == ["all"]:
        return list(known.values())
    by_name = {_plain(name): config for name, config in known.items()}
    found = []
    for name in names:
        if _plain(name) in by_name:
            found.append(by_name[_plain(name)])
        elif _plain(name) in by_class:
            found += by_class[_plain(name)]
        else:
            raise ConfigurationError(f"there is no configuration of {name!r} here{did_you_mean(name, known)}")
    return list(dict.fromkeys(found))


def method_candidates(configs: Sequence[str], prefix: str, data: Sequence[str]) -> list[MethodCandidate]:
    """The candidates of some configurations.

    Args:
        configs: names or paths.
        prefix: of the benchmark's configurations.
        data: names of the data modules they may have.

    Raises:
        ConfigurationError: no configuration, one given twice, or one of another task or other data.
    """
    if not configs:
        raise ConfigurationError("name at least one configuration (--configs) or method (--method)")
    found = []
    for config in configs:
        content = config_content(config)
        model, module = (_class(content, part) for part in ("model", "data"))
        if model != "ImageClassification" or module not in data:
            raise ConfigurationError(
                f"{config} trains {model} on {module}, and this protocol compares methods of ImageClassification on "
                f"{' or '.join(data)}; name such configurations, as {prefix}lora.yaml is"
            )
        found.append(MethodCandidate(config_name(config).removeprefix(prefix), config, module))
    names = [candidate.name for candidate in found]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"each configuration needs a name of its own, but got {', '.join(configs)}")
    return found


@dataclass(frozen=True)
class Measured:
    """What is known of a training before it begins.

    Args:
        saved_bytes: kept for the backward pass for each image, in float32.
        optimiser: what a learning rate is one of: "sgd, times batch size / 256".
    """

    saved_bytes: int
    optimiser: str


def measure(arguments: Sequence[str], judged: bool = False) -> Measured:
    """Build task and data of a command line, which refuses what is wrong with it.

    Args:
        arguments: the command line.
        judged: whether trainings with these options of the trainer are judged on validation.
    """
    cli = CLI(list(arguments))
    if judged:
        check_judged(cli.config_init.trainer, "a trial")
    cli.datamodule.setup()
    task = cli.model
    images = torch.randn(MEASURED_IMAGES, 3, *task.preprocessing.input_size)
    labels = torch.arange(MEASURED_IMAGES)
    if task.adapter.pending:  # it chooses what it trains by the data
        allocate(task.model, [(images, labels)], name=task.adapter_name)
    task.train()
    kept, _ = saved_bytes(lambda: task.training_loss(images, labels)[0], storages(task))
    optimiser, reference = task.optimisation.optimizer, task.optimisation.scale_lr_by_batch
    return Measured(kept // MEASURED_IMAGES, f"{optimiser}, times batch size / {reference}" if reference else optimiser)


def _class(content: object, part: str) -> str:
    try:
        return content[part]["class_path"].rpartition(".")[2]
    except (KeyError, TypeError, AttributeError):
        return f"no {part}"


def _method_class(config: str) -> str:
    method = config_content(config)["model"]["init_args"]["method"]
    return method["class_path"] if isinstance(method, dict) else ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
