"""Tables of results for the terminal."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from visionpeft.sharing.run_directory import tested_images


def print_results(results: dict, title: str = "") -> None:
    """Print the numbers of a results.json."""
    test, parameters, data = results.get("test", {}), results["parameters"], results["data"]
    table = Table(title=title or None, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for label, value in _tested(results):
        table.add_row(label, value)
    if test:
        table.add_row(f"test {counted(data)}", test_size(results))
    if "test_views" in data and "sampling" in data:
        table.add_row("views of each", f"{data['test_views']} of {data['sampling']['num_frames']} frames")
    table.add_row("reported", results["reported"])
    table.add_row("trainable parameters", f"{parameters['trainable']:,} ({percent(parameters['share'])} of all)")
    if "adapter" in parameters:
        table.add_row("of them outside the head", f"{parameters['adapter']:,}")
    if results.get("template"):
        table.add_row("template", _shortened(results["template"]))
    if results.get("chosen"):
        table.add_row(
            "chosen on validation", ", ".join(f"{key} {value:.4g}" for key, value in results["chosen"].items())
        )
    table.add_row("training time", duration(results["training_seconds"]))
    table.add_row("peak memory", f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB ({results['memory_kind']})")
    table.add_row("run directory", results["run_directory"])
    Console().print(table, highlight=False)


def _tested(results: dict) -> Iterator[tuple[str, str]]:
    """The numbers of a test in words, the most important one first."""
    test = results.get("test", {})
    if "mae" in test:
        yield "test mean absolute error", f"[bold]{test['mae']:.4g}[/bold]"
        yield "test R2", "not defined: all labels are the same" if test["r2"] is None else f"{test['r2']:.4f}"
    elif "miou" in test:
        tested = results["classes_tested"]
        yield (
            f"test mean IoU over {tested['averaged']:,} of {tested['of']:,} classes",
            f"[bold]{percent(test['miou'])}[/bold]",
        )
        yield "test accuracy of pixels", percent(test["pixel_accuracy"])
        if test["mean_accuracy"] is not None:
            yield f"mean over {tested['occurring']:,} classes tested", percent(test["mean_accuracy"])
    elif "ap" in test:
        tested = results["classes_tested"]
        yield (
            f"test AP of boxes over {tested['averaged']:,} of {tested['of']:,} classes",
            f"[bold]{percent(test['ap'])}[/bold]",
        )
        yield "test AP50, AP75", f"{percent(test['ap50'])}, {percent(test['ap75'])}"
        if "mask_ap" in test:
            yield "test AP of masks", f"[bold]{percent(test['mask_ap'])}[/bold]"
            yield "test AP50, AP75 of masks", f"{percent(test['mask_ap50'])}, {percent(test['mask_ap75'])}"
    elif "map" in test:
        labels = results["labels_tested"]
        yield (
            f"test mAP over {labels['occurring']:,} of {labels['of']:,} labels",
            "not defined" if test["map"] is None else f"[bold]{percent(test['map'])}[/bold]",
        )
        yield "test F1, mean over these labels", "not defined" if test["f1"] is None else percent(test["f1"])
        yield "test F1 of all labels together", percent(test["micro_f1"])
    elif test:
        yield "test top-1 accuracy", f"[bold]{percent(test['top1'])}[/bold]"
        for task in results["data"].get("tasks", ()):
            yield f"  {task}", percent(test[f"{task}/top1"])
        if "mean_top1" in test:
            yield "mean of the tasks", percent(test["mean_top1"])
        if "top5" in test:
            yield "test top-5 accuracy", percent(test["top5"])
        tested = results.get("classes_tested")
        over = f"mean over {tested['occurring']:,} classes tested" if tested else "mean over classes tested"
        yield over, percent(test["mean_per_class"])
    if "ece" in test:
        yield "expected calibration error", percent(test["ece"])
    if without := results.get("without_adaptation"):
        yield "top-1 without adapting to the test", percent(without["top1"])
        yield "its expected calibration error", percent(without["ece"])


def print_setting(setting: dict, run_directory: Path) -> None:
    """Print what is about to be trained, on what, and where the results will be."""
    parameters, data = setting["parameters"], setting["data"]
    trained = " + ".join(_in_code(part) for part in _parts(setting))
    outside = f", {parameters['adapter']:,} of them outside the head" if "adapter" in parameters else ""
    if parameters.get("waiting"):
        outside = ", and what the method will choose by the data"
    sizes = ", ".join(f"{number(size)} {split}" for split, size in data["sizes"].items())
    console = Console()
    for line in (
        f"[bold]{trained}[/bold] on {setting['backbone']['name']}: {parameters['trainable']:,} of "
        f"{parameters['total']:,} parameters are trained ({percent(parameters['share'])}){outside}",
        f"{data['dataset']} {data['task']}: {sizes} {counted(data)}, {_learnt(data)}",
        *(f"note: {note}" for note in data.get("notes", ())),
        f"run directory {run_directory}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def print_stage(number: int, count: int, parameters: dict) -> None:
    """Print that the training of a stage begins, and how much it trains."""
    text = f"[bold]stage {number} of {count}[/bold]: {parameters['trainable']:,} of {parameters['total']:,} parameters"
    Console().print(text, highlight=False, soft_wrap=True)


def _learnt(data: dict) -> str:
    """What is learnt of each image."""
    labels = data.get("labels", "classes")
    if labels == "masks":
        return f"{data['classes']} classes of pixels"
    if labels == "objects":
        return f"objects of {data['classes']} classes"
    return "a number each" if labels == "number" else f"{data['classes']} {'labels' if labels == 'several' else labels}"


def _parts(setting: dict) -> list[dict]:
    """The methods, or the learner, as class and fields."""
    if "method" in setting:
        return setting["method"]
    learner = setting["learner"]
    parts = [{"class": learner["class"], "fields": learner["options"]}]
    if of_pixels := setting.get("open_vocabulary"):
        fields = {name: value for name, value in of_pixels.items() if name != "classes"}
        parts.append({"class": "OpenVocabulary", "fields": fields})
    return parts


def _in_code(part: dict) -> str:
    given = {key: value for key, value in part["fields"].items() if value not in (None, {}, "all")}
    return f"{part['class']}({', '.join(f'{key}={value!r}' for key, value in given.items())})"


def _shortened(templates: list[str]) -> str:
    more = f" and {len(templates) - 1} more" if len(templates) > 1 else ""
    return f"{templates[0]}{more}"


def counted(data: dict) -> str:
    """What was counted: images or videos."""
    return "videos" if "sampling" in data else "images"


def test_size(results: dict) -> str:
    """How many images were scored, and whether they are all of the test split."""
    size, subset = results["data"]["sizes"]["test"], results["data"].get("test_subset")
    tested = tested_images(results)
    if size is not None and tested < size:
        return f"{number(tested)} of {number(size)} (--trainer.limit_test_batches)"
    if size is None:
        return number(tested)
    if subset:
        return f"{number(size)} (a fixed random subset of {subset['of']:,}; all with --data.test_samples null)"
    return number(size)


def number(size: int | None) -> str:
    """How many images a split has, as far as a stream says it."""
    return "an unknown number of" if size is None else f"{size:,}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
