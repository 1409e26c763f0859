"""Videos whose class is a motion that no single frame shows: sprites that move, grow, shrink or turn, as H.264 files.

The state of a sprite is a point on a torus, (x, y, log size, angle), each in [0, 1): a sprite that leaves the picture
on one side enters on the other, and one that has grown to the largest size goes on from the smallest. It starts
anywhere, uniformly, and one of the four numbers changes at a constant speed; which one and in which direction is the
class. At every time the state is therefore uniform on the torus whatever the class is, so that a frame tells nothing
about it, and a video of one class played backwards is one of the opposite class. Each scene (sprite and background) is
filmed once for each class, so that content tells nothing either.
"""

import json
import math
import shutil
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image

from visionpeft.data.cut_out import cut_out
from visionpeft.data.ordering import mix, permutation
from visionpeft.errors import DataError
from visionpeft.files import cache_folder, shipped

VERSION = 2
SIDE = 64
FRAMES = 16
RATE = 8
X, Y, SIZE, ANGLE = range(4)
# Number of the state that changes, and the sign; y grows downwards and the angle clockwise.
CLASSES = {
    "moving left": (X, -1),
    "moving right": (X, 1),
    "moving up": (Y, -1),
    "moving down": (Y, 1),
    "growing": (SIZE, 1),
    "shrinking": (SIZE, -1),
    "turning clockwise": (ANGLE, 1),
    "turning counter-clockwise": (ANGLE, -1),
}
SPEED = 0.08  # of the whole range, per frame
SIZES = (18.0, 42.0)  # pixels, smallest and largest
CONTRAST = 0.3  # of the background
SCENES = {"train": 180, "val": 30, "test": 40}
SUPERSAMPLED = 2
# With macroblock trees x264 writes slightly different files each time when frames are as small as these.
ENCODER = {"crf": "18", "preset": "fast", "threads": "1", "x264-params": "mbtree=0"}


def states(label: int, start: np.ndarray, frames: int = FRAMES) -> np.ndarray:
    """States of a sprite, (frames, 4) in [0, 1): `start` and one number that changes by +-SPEED a frame, modulo 1."""
    number, sign = list(CLASSES.values())[label]
    path = np.tile(np.asarray(start, np.float64), (frames, 1))
    path[:, number] += sign * SPEED * np.arange(frames)
    return path % 1.0


def background(seed: int, scene: int) -> np.ndarray:
    """Faint coloured noise of three grain sizes around grey: float (64, 64, 3) in 0 to 255."""
    picture = np.zeros((SIDE, SIDE, 3))
    for level, (cells, weight) in enumerate(((3, 0.55), (8, 0.3), (24, 0.15))):
        draws = (mix(seed, scene, level, np.arange(cells * cells * 3)) >> np.uint64(56)).astype(np.uint8)
        noise = Image.fromarray(draws.reshape(cells, cells, 3)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture += weight * np.asarray(noise, np.float64)
    return 127.5 + CONTRAST * (picture - 127.5)


def render(sprite: Image.Image, scenery: np.ndarray, state: np.ndarray) -> np.ndarray:
    """One frame: the sprite at a state over the background, uint8 (64, 64, 3)."""
    canvas = SIDE * SUPERSAMPLED
    x, y = state[X] * canvas, state[Y] * canvas
    size = SIZES[0] * (SIZES[1] / SIZES[0]) ** state[SIZE] * SUPERSAMPLED
    turn, scale = 2 * math.pi * state[ANGLE], size / max(sprite.size)
    # From canvas to sprite; the sprite is drawn around the middle, off by a fraction of a pixel, and rolled from there.
    cosine, sine = math.cos(turn) / scale, math.sin(turn) / scale
    middle_x, middle_y = canvas / 2 + x % 1, canvas / 2 + y % 1
    matrix = (
        cosine,
        sine,
        sprite.width / 2 - cosine * middle_x - sine * middle_y,
        -sine,
        cosine,
        sprite.height / 2 + sine * middle_x - cosine * middle_y,
    )
    drawn = sprite.convert("RGBa").transform(
        (canvas, canvas), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    rolled = np.roll(
        np.frombuffer(drawn.tobytes(), np.uint8).reshape(canvas, canvas, 4),
        (math.floor(y) - canvas // 2, math.floor(x) - canvas // 2),
        (0, 1),
    )
    corners = [(row, column) for row in range(SUPERSAMPLED) for column in range(SUPERSAMPLED)]
    small = sum(rolled[row::SUPERSAMPLED, column::SUPERSAMPLED].astype(np.float64) for row, column in corners)
    small /= SUPERSAMPLED**2
    return np.rint(small[..., :3] + (1 - small[..., 3:] / 255) * scenery).clip(0, 255).astype(np.uint8)


def sprites(split: str) -> list[Path]:
    """The drawings used in a split, of which no two splits share one (datasets/motion)."""
    names = json.loads((shipped("datasets") / "motion" / "sprites.json").read_text(encoding="utf-8"))[split]
    return [shipped("datasets") / "clipart" / name for name in names]


def film(split: str, scene: int, seed: int = 0) -> np.ndarray:
    """A scene in every class before it is encoded: uint8 (8, 16, 64, 64, 3)."""
    number = list(SCENES).index(split)
    drawings = sprites(split)
    scene_seed = int(mix(seed, number)[0])
    drawing = drawings[permutation(len(drawings), scene_seed)[scene % len(drawings)]]
    sprite, scenery = cut_out(Image.open(drawing)), background(scene_seed, scene)
    paths = (states(label, _draws(4, scene_seed, scene, 1 + label)) for label in range(len(CLASSES)))
    return np.stack([[render(sprite, scenery, state) for state in path] for path in paths])


def write_video(path: Path, frames: np.ndarray, rate: int = RATE) -> None:
    """Encode frames, uint8 (n, height, width, 3), as H.264 in an MP4 file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=ENCODER)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = RATE
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def files(folder: Path, split: str, scene: int) -> list[Path]:
    """The videos of a scene in the order of the classes: `folder/<split>/<class>/<scene>.mp4`."""
    return [folder / split / name.replace(" ", "_") / f"{scene:03d}.mp4" for name in CLASSES]


def motion_folder(seed: int = 0) -> Path:
    """Where the videos are kept unless told otherwise: `visionpeft/motion-...` in the user's cache folder."""
    return cache_folder() / f"motion-{VERSION}-seed{seed}"


def write_motion(folder: Path, seed: int = 0, scenes: dict[str, int] | None = None) -> None:
    """Write all videos, unless the folder is there already; it appears when it is complete.

    Several processes may do this at the same time; one of them wins.

    Raises:
        DataError: the folder cannot be written.
    """
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise DataError(f"the videos cannot be written to {folder}: {error.strerror}; set another root") from error
    try:
        for split, count in (scenes or SCENES).items():
            for scene in range(count):
                for path, frames in zip(files(partial, split, scene), film(split, scene, seed), strict=True):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_video(path, frames)
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise DataError(f"the videos cannot be written to {folder}: {error}; set another root") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _draws(count: int, *seeds: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on the seeds alone."""
    return (mix(*seeds, np.arange(count)) >> np.uint64(11)) / 2.0**53
