"""Small encoded videos whose frames tell their own number, for the tests that read them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 12


def write_video(
    path: Path,
    frames: int = 40,
    *,
    codec: str = "libx264",
    rate: int = 12,
    size: tuple[int, int] = (64, 48),
    times: list[int] | None = None,
    keyframe_every: int = 12,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    audio: bool = False,
    grain: int = 0,
) -> Path:
    """Frame i tells i in `BITS` bars of its lower half; its upper half is white on the left.

    `times` are time stamps in milliseconds; `grain` adds noise, so that the file grows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.gop_size = keyframe_every
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, size, grain), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            write_sound(container, sound, frames / rate)
    return path


def write_audio(path: Path, seconds: float = 1.0) -> Path:
    """A file that holds sound and nothing else."""
    with av.open(str(path), "w") as container:
        write_sound(container, container.add_stream("aac", rate=16000), seconds)
    return path


def write_sound(container, stream, seconds: float) -> None:
    samples = np.zeros((1, int(16000 * seconds)), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def picture(number: int, size: tuple[int, int] = (64, 48), grain: int = 0) -> np.ndarray:
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        bar = slice(bit * width // BITS, (bit + 1) * width // BITS)
        pixels[height // 2 :, bar] = 200 * (number >> bit & 1)
    pixels[: height // 2, : width // 2] = 200
    if grain:
        pixels += np.random.default_rng(number).integers(0, grain, pixels.shape, dtype=np.uint8)
    return pixels


def number_of(image: Image.Image) -> int:
    """The number of a frame."""
    pixels = np.asarray(image).astype(float)
    height, width = pixels.shape[:2]
    bars = [pixels[height * 5 // 8 :, bit * width // BITS : (bit + 1) * width // BITS].mean() for bit in range(BITS)]
    return sum(int(bar > 100) << bit for bit, bar in enumerate(bars))


def write_frames(folder: Path, frames: int, size: tuple[int, int] = (64, 48)) -> Path:
    """A folder of images img_1.png, img_2.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(frames):
        Image.fromarray(picture(number, size)).save(folder / f"img_{number + 1}.png")
    return folder
