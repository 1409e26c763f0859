"""What a run is resumed with: the data and the options that it was begun with, but for what may change."""

import json
from collections.abc import Mapping

from visionpeft.data import ImageDataModule
from visionpeft.errors import ConfigurationError
from visionpeft.runs.agreement import about_data
from visionpeft.runs.cli import CLI
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.tasks.adapted_task import first_difference


def data_record(datamodule: ImageDataModule, kind: str) -> dict:
    """By what data are known again: their class names, and numbers, labels and names of their files.

    Args:
        datamodule: the data, before damaged files are left out.
        kind: what they are called, "images" or "videos".
    """
    return {"class_names": list(datamodule.class_names), "splits": about_data(datamodule, kind)}


def check_resumed(cli: CLI, run: RunDirectory, record: Mapping) -> None:
    """Refuse to resume a run with other data, before anything is written.

    A run of an earlier version has no record of its data; where it has finished, its classes are known all the same.

    Args:
        cli: the command line that resumes it.
        run: its directory.
        record: the `data_record` of the data that it would go on with.

    Raises:
        ConfigurationError: the data are others.
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


def _begun_with(run: RunDirectory, folder: str) -> tuple[list[str] | None, dict[str, str]]:
    """Class names of a run, None if they are not known, and what is known of its splits."""
    for file in (run.data, run.path / folder / f"{folder}.json"):
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            return known.get("class_names"), known.get("splits", {})
    return None, {}
