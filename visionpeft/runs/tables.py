"""Tables of results for the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table


def print_results(results: dict, title: str = "") -> None:
    """Print the numbers of a results.json."""
    test, parameters, data = results.get("test", {}), results["parameters"], results["data"]
    table = Table(title=title or None, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, label in (("top1", "test top-1 accuracy"), ("top5", "test top-5 accuracy")):
        if name in test:
            table.add_row(label, f"[bold]{percent(test[name])}[/bold]" if name == "top1" else percent(test[name]))
    if test:
        tested = results.get("classes_tested")
        over = f"mean over {tested['occurring']:,} classes tested" if tested else "mean over classes tested"
        table.add_row(over, percent(test["mean_per_class"]))
        table.add_row(f"test {counted(data)}", test_size(data))
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


def print_setting(setting: dict, run_directory: Path) -> None:
    """Print what is about to be trained, on what, and where the results will be."""
    parameters, data = setting["parameters"], setting["data"]
    trained = " + ".join(_in_code(part) for part in _parts(setting))
    outside = f", {parameters['adapter']:,} of them outside the head" if "adapter" in parameters else ""
    if parameters.get("waiting"):
        outside = ", and what the method will choose by the data"
    sizes = ", ".join(f"{size:,} {split}" for split, size in data["sizes"].items())
    console = Console()
    for line in (
        f"[bold]{trained}[/bold] on {setting['backbone']['name']}: {parameters['trainable']:,} of "
        f"{parameters['total']:,} parameters are trained ({percent(parameters['share'])}){outside}",
        f"{data['dataset']} {data['task']}: {sizes} {counted(data)}, {data['classes']} classes",
        *(f"note: {note}" for note in data.get("notes", ())),
        f"run directory {run_directory}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _parts(setting: dict) -> list[dict]:
    """The methods, or the learner, as class and fields."""
    if "method" in setting:
        return setting["method"]
    learner = setting["learner"]
    return [{"class": learner["class"], "fields": learner["options"]}]


def _in_code(part: dict) -> str:
    given = {key: value for key, value in part["fields"].items() if value not in (None, {}, "all")}
    return f"{part['class']}({', '.join(f'{key}={value!r}' for key, value in given.items())})"


def _shortened(templates: list[str]) -> str:
    more = f" and {len(templates) - 1} more" if len(templates) > 1 else ""
    return f"{templates[0]}{more}"


def counted(data: dict) -> str:
    """What was counted: images or videos."""
    return "videos" if "sampling" in data else "images"


def test_size(data: dict) -> str:
    """How many images were scored, and whether they are all of the test split."""
    size, subset = data["sizes"]["test"], data.get("test_subset")
    if subset:
        return f"{size:,} (a fixed random subset of {subset['of']:,}; all with --data.test_samples null)"
    return f"{size:,}"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
