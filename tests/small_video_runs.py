"""Training runs on videos that take seconds: a tiny untrained backbone on clips of three colours."""

from pathlib import Path

import numpy as np
from small_runs import BACKBONE, COLOURS

from visionpeft import fit
from visionpeft.data.video.motion_scenes import write_video


def draw_videos(folder: Path, per_class: int = 7, frames: int = 8) -> Path:
    """Noisy clips of three colours in a folder for each class; each grows darker."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            light = np.linspace(0.9, 0.6, frames)[:, None, None, None] * np.array(colour)
            noise = generator.integers(-20, 20, (frames, 32, 32, 3))
            write_video(folder / name / f"{index}.mp4", np.clip(light + 30 + noise, 0, 255).astype(np.uint8))
    return folder


def video_arguments(videos: Path, *more: str, epochs: int = 2, figures: bool = False) -> list[str]:
    """Command line of a run of ST-Adapter on such videos, three frames a clip and two test clips."""
    return [
        *("--config", "video_st_adapter.yaml", *BACKBONE, "--model.num_frames", "3", "--model.method.bottleneck", "8"),
        *("--data", "VideoFolder", "--data.root", str(videos), "--data.batch_size", "4"),
        *("--data.sampling", "{kind: dense, num_frames: 3, stride: 2, test_clips: 2}"),
        *("--data.augmentation", "{crop: jitter}", "--model.optimisation.warmup_epochs", "1"),
        *("--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu"),
        *("--figures", str(figures).lower()),
        *more,
    ]


def run_videos(folder: Path, videos: Path, *more: str, epochs: int = 2, figures: bool = False) -> Path:
    """Train in this process and return the new run directory."""
    before = set(folder.glob("*"))
    assert fit.main([*video_arguments(videos, *more, epochs=epochs, figures=figures), "--output", str(folder)]) == 0
    (made,) = set(folder.glob("*")) - before
    return made
