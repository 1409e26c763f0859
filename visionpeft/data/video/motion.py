"""The embedded video set."""

from pathlib import Path
from typing import Literal

from visionpeft.data.video.files import VideoFiles
from visionpeft.data.video.module import VideoDataModule, video_set
from visionpeft.data.video.motion_scenes import CLASSES, SCENES, files, motion_folder, write_motion
from visionpeft.data.video.transforms import ClipAugmentation
from visionpeft.models.video_sampling import FrameSampling

SAMPLING = FrameSampling()
AUGMENTATION = ClipAugmentation("centre")


class Motion(VideoDataModule):
    """The embedded set: sprites that move, grow, shrink or turn, in 8 classes that no single frame tells apart.

    1,440, 240 and 320 videos of 16 frames, 64 x 64, are written as H.264 files when they are needed first (motion.py).
    The splits have different sprites; every scene is there in all 8 classes.

    Args:
        root: folder of the videos; one in the user's cache folder when absent.
        video_seed: seed of the videos themselves.
        sampling: which frames make a clip.
        augmentation: of training clips; never mirrored, which would exchange classes.
        batches: of "scene": a sprite in all of its motions, so that nothing else tells the classes of a batch apart; or
            of "random" videos.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        video_seed: int = 0,
        sampling: FrameSampling = SAMPLING,
        augmentation: ClipAugmentation = AUGMENTATION,
        batches: Literal["random", "scene"] = "scene",
        **kwargs,
    ):
        self.root = motion_folder(video_seed) if root is None else Path(root)
        self.video_seed = video_seed
        sources = {
            split: VideoFiles(
                [path for scene in range(count) for path in files(self.root, split, scene)],
                [*range(len(CLASSES))] * count,
                [scene for scene in range(count) for _ in CLASSES],
            )
            for split, count in SCENES.items()
        }
        about = {
            "dataset": "Motion",
            "task": "motion",
            "trained_on": "train",
            "selected_on": "val",
            "video_seed": video_seed,
        }
        super().__init__(
            video_set(sources, list(CLASSES), about),
            mirrored=False,
            sampling=sampling,
            augmentation=augmentation,
            batches=batches,
            **kwargs,
        )

    def prepare_data(self) -> None:
        """Write the videos where they are not there yet; Lightning calls this in one process."""
        write_motion(self.root, self.video_seed)

    def setup(self, stage: str | None = None) -> None:
        """Write the videos if nobody has, and check them.

        Raises:
            DataError: the folder cannot be written, or a video is missing.
        """
        self.prepare_data()
        super().setup(stage)
