"""Configurations: where the shipped ones lie, and the one that stands for a method without a recipe of its own."""

from pathlib import Path

import yaml

from visionpeft.errors import ConfigurationError, did_you_mean
from visionpeft.files import shipped

# Shipped configurations have a bare name, `vtab_vpt.yaml`, and lie in a folder, `vtab/vpt.yaml`; both may be given.
FOLDERS = {
    **{"vtab": "vtab", "fgvc": "fgvc", "images": "images", "video": "video", "scenes": "scenes"},
    **{"fewshot": "few_shot", "base_to_new": "base_to_new", "cross_dataset": "cross_dataset"},
    **{"multi_task": "multi_task", "objects": "objects"},
}
DEFAULT = "default.yaml"  # in a folder: for methods without a configuration there


def find_config(name: str) -> Path:
    """The file of a configuration; a file in the working directory wins.

    A name such as `vtab_krona.yaml` of a method that has no configuration there stands for the folder's default, with
    that method and its default values; `config_content` fills it in.

    Raises:
        ConfigurationError: there is no such file, here or among the shipped ones.
    """
    folder = shipped("configs")
    bare = _in_folder(name.removesuffix(".yaml"))
    for path in (Path(name), folder / name, folder / f"{name}.yaml", folder / f"{bare}.yaml"):
        if path.is_file():
            return path
    default = folder / Path(bare).parent / DEFAULT
    if _method_of(bare) and default.is_file():
        return default
    raise ConfigurationError(f"there is no configuration {name!r}{did_you_mean(name, shipped_configs())}")


def config_content(name: str) -> object:
    """What a configuration says; a default says it of the method in the name.

    Raises:
        ConfigurationError: there is no such file, or it is not YAML.
    """
    path = find_config(name)
    try:
        content = parsed(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        said = "it is empty" if content is None else f"it says {str(content)[:40]!r} alone"
        raise ConfigurationError(
            f"{path} is no configuration: {said}; model, data and trainer stand in it, as in vtab_vpt.yaml"
        )
    if path.name == DEFAULT and (method := _method_of(_in_folder(name.removesuffix(".yaml")))):
        content["model"]["init_args"]["method"] = {"class_path": method}
    return content


def parsed(text: str) -> object:
    """YAML as plain values; by libyaml where PyYAML has it, in a tenth of the time.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def config_name(name: str) -> str:
    """The bare name of a configuration without its ending: "vtab_vpt" for `vtab/vpt.yaml`, a file's own elsewhere."""
    path, folder = Path(name), shipped("configs")
    if path.is_relative_to(folder):
        return _bare(path.relative_to(folder))
    return path.stem if path.is_file() else _bare(path)


def shipped_configs(prefix: str = "") -> list[str]:
    """Bare names of the shipped configurations of a benchmark, such as "vtab_", or of all; overlays by their path."""
    folder = shipped("configs")
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*.yaml"))]
    kept = [path for path in found if "recipes" not in path.parts and path.name != DEFAULT]
    return sorted(name for name in (f"{_bare(path)}.yaml" for path in kept) if name.startswith(prefix))


def _in_folder(name: str) -> str:
    """`vtab/vpt` for the bare name `vtab_vpt`; other names as they are."""
    for prefix, folder in FOLDERS.items():
        if name.startswith(f"{prefix}_"):
            return f"{folder}/{name.removeprefix(f'{prefix}_')}"
    return name


def _bare(path: Path) -> str:
    """The reverse of `_in_folder`, for a path inside `configs`."""
    for prefix, folder in FOLDERS.items():
        if path.parent == Path(folder):
            return f"{prefix}_{path.stem}"
    return path.with_suffix("").as_posix()


def _method_of(name: str) -> str | None:
    """Class of the method that a configuration such as `vtab/krona` is named after."""
    from visionpeft import methods  # here, because few configurations need it and it costs torch and timm

    plain = Path(name).name.replace("_", "")
    return next((cls for cls in methods.__all__ if cls.lower() == plain and cls != "Method"), None)
