"""Videos whose class is a motion that no single frame shows: sprites that move, grow, shrink or turn, as H.264 files.

The state of a sprite is a point on a torus, (x, y, log size, angle), each in [0, 1): a sprite that leaves the picture
on one side enters on the other, and one that has grown to the largest size goes on from the smallest. It starts
anywhere, uniformly, and one of the four numbers changes at a constant speed; which one and in which direction is the
class. At every time the state is therefore uniform on the torus whatever the class is, so that a frame tells nothing
about it, and a video of one class played backwards is one of the opposite class. Each scene (sprite, background and
speed) is filmed once for each class, so that content tells nothing either.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from visionpeft.data.ordering import mix, permutation
from visionpeft.errors import DataError
from visionpeft.resources import shipped

VERSION = 1
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
SPEEDS = (0.035, 0.055)  # of the whole range, per frame
SIZES = (18.0, 42.0)  # pixels, smallest and largest
SCENES = {"train": 50, "val": 10, "test": 30}
SUPERSAMPLED = 2
WHITE_TOLERANCE = 24
# With macroblock trees x264 writes slightly different files each time when frames are as small as these.
ENCODER = {"crf": "10", "preset": "fast", "threads": "1", "x264-params": "mbtree=0"}


def states(label: int, start: np.ndarray, speed: float, frames: int = FRAMES) -> np.ndarray:
    """States of a sprite, (frames, 4) in [0, 1): `start` and one number that changes by +-speed a frame, modulo 1."""
    number, sign = list(CLASSES.values())[label]
    path = np.tile(np.asarray(start, np.float64), (frames, 1))
    path[:, number] += sign * speed * np.arange(frames)
    return path % 1.0


def cut_out(drawing: Image.Image) -> Image.Image:
    """A drawing on white as RGBA, transparent where white reaches in from the border."""
    width, height = drawing.size
    framed = Image.new("RGB", (width + 2, height + 2), "white")
    framed.paste(drawing.convert("RGB"), (1, 1))
    mark = (255, 0, 255)
    ImageDraw.floodfill(framed, (0, 0), mark, thresh=WHITE_TOLERANCE)
    opaque = (np.asarray(framed)[1:-1, 1:-1] != mark).any(-1)
    return Image.fromarray(np.dstack([np.asarray(drawing.convert("RGB")), opaque * np.uint8(255)]))


def background(seed: int, scene: int) -> np.ndarray:
    """Coloured noise of three grain sizes: float (64, 64, 3) in 0 to 255."""
    picture = np.zeros((SIDE, SIDE, 3))
    for level, (cells, weight) in enumerate(((3, 0.55), (8, 0.3), (24, 0.15))):
        draws = (mix(seed, scene, level, np.arange(cells * cells * 3)) >> np.uint64(56)).astype(np.uint8)
        noise = Image.fromarray(draws.reshape(cells, cells, 3)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture += weight * np.asarray(noise, np.float64)
    return picture


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
    small = rolled.reshape(SIDE, SUPERSAMPLED, SIDE, SUPERSAMPLED, 4).mean((1, 3))
    return np.rint(small[..., :3] + (1 - small[..., 3:] / 255) * scenery).clip(0, 255).astype(np.uint8)


def sprites(split: str) -> list[Path]:
    """The drawings used in a split, of which no two splits share one (datasets/motion)."""
    names = json.loads((shipped("datasets") / "motion" / "sprites.json").read_text(encoding="utf-8"))[split]
    return [shipped("datasets") / "clipart" / name for name in names]


def film(split: str, scene: int, label: int, seed: int = 0) -> np.ndarray:
    """The frames of a video before they are encoded: uint8 (16, 64, 64, 3)."""
    number = list(SCENES).index(split)
    drawings = sprites(split)
    scene_seed = int(mix(seed, number)[0])
    drawing = drawings[permutation(len(drawings), scene_seed)[scene % len(drawings)]]
    sprite, scenery = cut_out(Image.open(drawing)), background(scene_seed, scene)
    speed = SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * _draws(1, scene_seed, scene)[0]
    start = _draws(4, scene_seed, scene, 1 + label)
    return np.stack([render(sprite, scenery, state) for state in states(label, start, speed)])


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


def files(folder: Path, scenes: dict[str, int] | None = None) -> Iterator[tuple[str, int, int, Path]]:
    """Split, scene, label and path of every video: `folder/<split>/<class>/<scene>.mp4`."""
    for split, count in (scenes or SCENES).items():
        for label, name in enumerate(CLASSES):
            for scene in range(count):
                yield split, scene, label, folder / split / name.replace(" ", "_") / f"{scene:03d}.mp4"


def motion_folder(seed: int = 0) -> Path:
    """Where the videos are kept unless told otherwise: `visionpeft/motion-...` in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "visionpeft" / f"motion-{VERSION}-seed{seed}"


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
        for split, scene, label, path in files(partial, scenes):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, film(split, scene, label, seed))
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
