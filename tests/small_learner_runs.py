"""Runs of learners that take a second: a tiny CLIP with random weights, which OpenCLIP knows by name, on squares."""

from pathlib import Path

import open_clip

from visionpeft import fit

open_clip.add_model_config(Path(__file__).parent / "clip_configs")
CLIP = ["--model.backbone", "open_clip/tiny_clip", "--model.pretrained", "false"]


def learner_arguments(
    images: Path, *more: str, learner: str = "CoOp", epochs: int = 3, figures: bool = False
) -> list[str]:
    """Command line of a run of a learner on such images; figures take longer than the run."""
    return [
        *("--model", "PromptLearning", "--model.learner", learner, *CLIP, "--model.optimisation.lr", "0.05"),
        *("--data", "FewShot", "--data.dataset", "folder", "--data.root", str(images), "--data.shots", "4"),
        *("--data.batch_size", "4", "--data.views", "2", "--data.augmentation", "crop_flip"),
        *("--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu", "--seed_everything", "1"),
        *("--figures", str(figures).lower()),
        *more,
    ]


def run_learner(
    folder: Path, images: Path, *more: str, learner: str = "CoOp", epochs: int = 3, figures: bool = False
) -> Path:
    """Train in this process and return the new run directory."""
    before = set(folder.glob("*"))
    arguments = learner_arguments(images, *more, learner=learner, epochs=epochs, figures=figures)
    assert fit.main([*arguments, "--output", str(folder)]) == 0
    (made,) = set(folder.glob("*")) - before
    return made
