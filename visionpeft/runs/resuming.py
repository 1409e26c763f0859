"""What a run is resumed with: the data and the options that it was begun with, but for what may change."""

import json
from collections.abc import Iterator, Mapping

from jsonargparse import Namespace

from visionpeft.data import ImageDataModule
from visionpeft.errors import ConfigurationError
from visionpeft.files import replacing
from visionpeft.runs.agreement import about_data
from visionpeft.runs.carried import as_carried
from visionpeft.runs.cli import CLI, PLACES, without_module
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks.adapted_task import first_difference

# What may change, of the model and of the data: what is trained stays the same, or is compared by the record.
MODEL = {
    *("optimisation.lr", "optimisation.head_lr"),  # of a training that diverged
    *("checkpoint", "cache", "cache_mib", "cache_features", "chunk_size", "class_token_only", "compile", "recompute"),
}
LOADING = {"batch_size", "test_batch_size", "num_workers", "cache_in_memory", "skip_corrupt"}
NAMES = {"class_names", "classes"}  # which may be in a file; the names themselves are compared
NESTING = ("init_args", "class_path")
OF_THE_RUN = {"report", "test", "figures", "global_batch", "stage_epochs", "calibration_bins"}


def data_record(datamodule: ImageDataModule, kind: str) -> dict:
    """By what data are known again: their class names, and numbers, labels and names of their files.

    Args:
        datamodule: the data, before damaged files are left out.
        kind: what they are called, "images" or "videos".
    """
    return {"class_names": list(datamodule.class_names), "splits": about_data(datamodule, kind)}


def check_resumed(cli: CLI, run: RunDirectory, record: Mapping) -> None:
    """Refuse to resume a run with other data or with options that change what is trained, before anything is written.

    A run of an earlier version has no record of its data; where it has finished, its classes are known all the same.

    Args:
        cli: the command line that resumes it.
        run: its directory.
        record: the `data_record` of the data that it would go on with.

    Raises:
        ConfigurationError: the data are others, or an option is.
    """
    anew = f"start a new run: python -m visionpeft.fit --config {run.config} ..."
    names, splits = _begun_with(run, cli.model.folder)
    if names is not None and names != record["class_names"]:
        raise ConfigurationError(
            f"{run.path} tells other classes apart than the data has ({first_difference(names, record['class_names'])}"
            f"); what it has learnt knows them by their order, so resume it with the same names in the same order, or "
            f"{anew}"
        )
    for what in dict.fromkeys([*splits, *record["splits"]]) if splits else ():
        before, now = splits.get(what), record["splits"].get(what)
        if before != now:
            numbers = f" ({before or 'none'}, not {now or 'none'})" if what.startswith("the number") else ""
            raise ConfigurationError(
                f"{run.path} was begun with other data, which differ in {what}{numbers}; resume it with its own, from "
                f"wherever they lie now (--data.root), or {anew}"
            )
    for path, before, now in changes(cli, run):
        if not _may_change(path):
            raise ConfigurationError(
                f"--{'.'.join(path)} {shown(now)} cannot be changed while {run.path} goes on, which was begun with "
                f"{shown(before)}; leave it out, or {anew}"
            )


def note_changes(cli: CLI, run: RunDirectory) -> None:
    """Let the configuration of a resumed run say with what it goes on."""
    if any(changes(cli, run)):
        text = as_carried(cli.config_text(), run.carried)
        with replacing(run.config) as partial:
            partial.write_text(text, encoding="utf-8")


def changes(cli: CLI, run: RunDirectory) -> Iterator[tuple[tuple[str, ...], object, object]]:
    """Options by their names, with what the configuration of a run says and what a command line that starts from it."""
    before, now = cli.parsed(["--config", str(run.config)]), cli.config
    for path, *values in _differences((), before, now):
        if path[0] not in ("config", "resume"):
            yield tuple(part for part in path if part not in NESTING), *values


def _differences(path: tuple[str, ...], before: object, now: object) -> Iterator[tuple]:
    """What differs, as deep as it can be told; a list of one class is the class, as where methods are given."""
    before, now = _alone(before), _alone(now)
    if _classes(before) and _classes(before) == _classes(now):
        before, now = ({str(number): each for number, each in enumerate(value)} for value in (before, now))
    if isinstance(now, Namespace | dict) and isinstance(before, Namespace | dict):
        before, now = (vars(value) if isinstance(value, Namespace) else value for value in (before, now))
        for name in dict.fromkeys([*now, *before]):
            yield from _differences((*path, str(name)), before.get(name), now.get(name))
    elif _meant(before) != _meant(now):
        yield path, before, now


def _alone(value: object) -> object:
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Namespace) else value


def _classes(value: object) -> list[str]:
    """Names of the classes in a list of nothing else."""
    if isinstance(value, list) and all(isinstance(each, Namespace) and "class_path" in each for each in value):
        return [without_module(each.class_path) for each in value]
    return []


def _meant(value: object) -> object:
    """What is compared of a value: a class of ours may be named by any module that has it."""
    return without_module(value) if isinstance(value, str) else value


def _may_change(path: tuple[str, ...]) -> bool:
    section, *parts = path
    if section == "data":
        return bool(parts) and parts[-1] in LOADING | PLACES | NAMES
    return section == "trainer" or section in OF_THE_RUN or (section == "model" and ".".join(parts) in MODEL)


def shown(value: object) -> str:
    """A value as it may be given; a class by its name."""
    if isinstance(value, Namespace) and "class_path" in value:
        return shown(value.class_path)
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, str) and value.startswith("visionpeft."):
        return value.rpartition(".")[2]
    return "null" if value is None else str(value)


def _begun_with(run: RunDirectory, folder: str) -> tuple[list[str] | None, dict[str, str]]:
    """Class names of a run, None if they are not known, and what is known of its splits."""
    for file in (run.data, run.path / folder / f"{folder}.json"):
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            return known.get("class_names"), known.get("splits", {})
    return None, {}
