"""The model card of an adapter or a learner: what was trained, on which backbone and data, with which result."""

from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from visionpeft.models.embedded import NANO_VITS
from visionpeft.sharing.trained_model import learnt_objective

TASKS = {"adapter": "image-classification", "learner": "zero-shot-image-classification"}


def model_card(description: Mapping, results: Mapping | None, repo_id: str) -> ModelCard:
    """Card with the method, the backbone, the protocol and the result, as far as they are known.

    Args:
        description: what `visionpeft.save` or `save_learner` wrote, without the folders of this machine.
        results: the results.json of the run it comes from, or None.
        repo_id: name of the repository, `user/name`; shown in the example.
    """
    task = TASKS["learner" if "learner" in description else "adapter"]
    data = (results or {}).get("data") or description["metadata"].get("data") or {}
    if "sampling" in data:
        task = "video-classification"
    labels = learnt_objective(description, repo_id)["labels"]
    task = {"masks": "image-segmentation", "objects": "object-detection"}.get(labels, task)
    front = ModelCardData(
        library_name="visionpeft",
        pipeline_tag=task,
        tags=["visionpeft", "parameter-efficient-fine-tuning", *(name.lower() for name, _ in _trained(description))],
        base_model=_base_model(description["backbone"]["source"]),
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=_evaluation(task, data, results) if results else None,
    )
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n{_body(description, data, results, repo_id)}")


def _trained(description: Mapping) -> list[tuple[str, Mapping]]:
    """Class and hyper-parameters of each method, or of the learner."""
    if "learner" in description:
        learner = description["learner"]
        return [(learner["class"], learner["options"])]
    return [(entry["class"], entry["fields"]) for entry in description["methods"]]


def _base_model(source: Mapping) -> str | None:
    """The Hub's name of a timm backbone; None where it cannot be known, or is not there, as the embedded ones."""
    tagged = source["library"] == "timm" and source.get("pretrained", True) and "." in source["name"]
    tagged = tagged and source["name"] not in NANO_VITS
    return f"timm/{source['name']}" if tagged and source.get("checkpoint") is None else None


def _evaluation(task: str, data: Mapping, results: Mapping) -> list[EvalResult]:
    if "test" not in results:  # trained with --test false
        return []
    name = str(data.get("task") or "own images")
    test = results["test"]
    if "mae" in test:
        return [EvalResult(task, name, name, "mae", test["mae"], metric_name="mean absolute error of the test split")]
    if "miou" in test:
        value = round(100 * test["miou"], 2)
        return [EvalResult(task, name, name, "mean_iou", value, metric_name="mean IoU of the test split, %")]
    if "ap" in test:
        value = round(100 * test["ap"], 2)
        return [EvalResult(task, name, name, "ap", value, metric_name="box AP of the test split, %")]
    if "map" in test:
        if test["map"] is None:
            return []
        value = round(100 * test["map"], 2)
        return [EvalResult(task, name, name, "map", value, metric_name="mean average precision of the test split, %")]
    value = round(100 * test["top1"], 2)
    return [EvalResult(task, name, name, "accuracy", value, metric_name="top-1 accuracy of the test split, %")]


def _body(description: Mapping, data: Mapping, results: Mapping | None, repo_id: str) -> str:
    methods = _trained(description)
    source, names = description["backbone"]["source"], description.get("class_names") or []
    weights = source.get("checkpoint") or ("pretrained" if source.get("pretrained", True) else "random weights")
    sections = [
        f"# {repo_id.rpartition('/')[2]}",
        f"{' and '.join(name for name, _ in methods)} on {source['name']}, trained with visionpeft. This repository "
        "holds what was trained, not the backbone.",
        _table("method", [(name, _values(fields)) for name, fields in methods]),
        _table(
            "backbone",
            [
                ("name", source["name"]),
                ("library", source["library"]),
                ("weights", weights),
                ("fingerprint", description["backbone"]["fingerprint"]),
            ],
        ),
    ]
    dense = [layout for layout in (description.get("heads") or {}).values() if "fields" in layout]
    sections += [_table("head", [(layout["class"], _values(layout["fields"]))]) for layout in dense]
    if data:
        used = ("task", "split", "train_on", "shots", "sizes", "test_subset", "resize", "size", "test_size")
        used += ("augmentation", "normalisation")
        sections.append(_table("data and protocol", [(key, data[key]) for key in used if data.get(key) is not None]))
    if results:
        test = results.get("test", {})
        rows = [(f"test {name}", f"{value:.4f}") for name, value in test.items() if value is not None]
        rows += [("reported epoch", results["reported"]), ("seed", results["seed"])]
        if "parameters" in results:
            rows.append(("trained parameters", f"{results['parameters']['trainable']:,}"))
        sections.append(_table("result of one run", rows))
    if names:
        shown = ", ".join(names[:50]) + (f" and {len(names) - 50} more" if len(names) > 50 else "")
        sections.append(f"Classes: {shown}.")
    given = f', checkpoint="{source["checkpoint"]}"' if source.get("checkpoint") else ""
    load = (
        f'import visionpeft as vp\n\ntrained = vp.from_pretrained("{repo_id}"{given})\nlogits = trained.model(images)'
    )
    labels = learnt_objective(description, repo_id)["labels"]
    if labels != "classes" or description.get("loss") == "sigmoid":
        meaning = {
            "classes": "whether each class fits, judged by itself",
            "several": "the probability of each label",
            "number": "the number of each image",
            "masks": "the class of each pixel",
            "objects": "of each image boxes, scores and labels",
        }[labels]
        load += f"\nanswers = trained.answers(logits)  # {meaning}"
    sections.append(f"```python\n{load}\n```")
    versions = ", ".join(f"{package} {version}" for package, version in description["versions"].items())
    return "\n\n".join([*sections, f"Made with {versions}."]) + "\n"


def _table(title: str, rows: list[tuple[str, object]]) -> str:
    lines = [f"| {title} | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in rows)]
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = _values(value) if isinstance(value, Mapping) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _values(fields: Mapping) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
