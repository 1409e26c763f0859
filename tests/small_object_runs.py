"""Runs of detection that take seconds: a tiny untrained backbone on composed scenes."""

from pathlib import Path

from small_runs import BACKBONE

from visionpeft import fit

FCOS = ("--model.head.width", "64", "--model.head.convs", "1")
MASKS = (
    *("--model.masks", "true", "--model.head", "MaskRCNN", "--model.head.width", "16", "--model.head.finest", "2"),
    *("--model.head.hidden", "32", "--model.head.mask_width", "8"),
)


def object_arguments(*more: str, head: tuple[str, ...] = FCOS, epochs: int = 2, figures: bool = False) -> list[str]:
    """Command line of a run of LoRA on scenes of 48 pixels."""
    return [
        *("--config", "objects_detection.yaml", *BACKBONE, "--model.method.rank", "2", *head),
        *("--data.side", "48", "--data.size", "32", "--data.train", "8", "--data.val", "2", "--data.test", "4"),
        *("--data.batch_size", "4", "--data.test_batch_size", "2", "--model.optimisation.lr", "1e-2"),
        *("--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu", "--figures", str(figures).lower()),
        *more,
    ]


def run_objects(output: Path, *more: str, **options) -> Path:
    """Train in this process and return the new run directory."""
    before = set(output.glob("*"))
    assert fit.main([*object_arguments(*more, **options), "--output", str(output)]) == 0
    (made,) = set(output.glob("*")) - before
    return made
