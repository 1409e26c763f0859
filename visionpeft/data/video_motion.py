"""The embedded video set."""

from pathlib import Path

from visionpeft.data.motion import CLASSES, SCENES, files, motion_folder, write_motion
from visionpeft.data.video_files import VideoFiles
from visionpeft.data.video_module import VideoDataModule, video_set
from visionpeft.data.video_sampling import FrameSampling
from visionpeft.data.video_transforms import ClipAugmentation

SAMPLING = FrameSampling()
AUGMENTATION = ClipAugmentation(area=(0.6, 1.0))


class Motion(VideoDataModule):
    """The embedded set: sprites that move, grow, shrink or turn, in 8 classes that no single frame tells apart.

    400, 80 and 240 videos of 16 frames, 64 x 64, are written as H.264 files when they are needed first (motion.py);
    the splits have different sprites.

    Args:
        root: Folder of the videos; one in the user's cache folder when absent.
        video_seed: Seed of the videos themselves.
        sampling: Which frames make a clip.
        augmentation: Of training clips; never mirrored, which would exchange classes.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        video_seed: int = 0,
        sampling: FrameSampling = SAMPLING,
        augmentation: ClipAugmentation = AUGMENTATION,
        **kwargs,
    ):
        self.root = motion_folder(video_seed) if root is None else Path(root)
        self.video_seed = video_seed
        found = list(files(self.root))
        sources = {
            split: VideoFiles(
                [path for part, _, _, path in found if part == split],
                [label for part, _, label, _ in found if part == split],
            )
            for split in SCENES
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
