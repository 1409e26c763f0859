"""How many training clips a second can be decoded and prepared, against the number of worker processes.

    python benchmarks/video_decoding.py --workers 0 1 2 4

Without `--video`, a test video like those of Kinetics is written first: 10 seconds of a moving texture, 340 x 256 at 30
frames a second, H.264 with a keyframe every 250 frames at most. Rates are of the wall clock, after one warm-up pass;
without workers, the processor time of a clip is given, too, which other programs on the machine do not disturb.
"""

import argparse
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from torch.utils.data import DataLoader

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data.dataset import as_batch
from visionpeft.data.video.dataset import VideoDataset
from visionpeft.data.video.files import VideoFiles
from visionpeft.data.video.transforms import ClipAugmentation, ClipTransform
from visionpeft.models.video_sampling import FrameSampling


def write_test_video(path: Path, size: tuple[int, int], seconds: int, rate: int = 30) -> None:
    """A texture that moves, with some noise, so that it costs about as much as a real scene."""
    width, height = size
    noise = np.random.default_rng(0)
    texture = noise.integers(0, 256, (height // 8, width // 8 + rate * seconds // 8 + 1, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "fast", "crf": "26"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(rate * seconds):
            picture = texture[:height, number : number + width] // 2 + noise.integers(
                0, 24, (1, width, 1), dtype=np.uint8
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))


def speed(dataset: VideoDataset, workers: int, batch_size: int) -> tuple[float, float]:
    """Training clips a second, and milliseconds of this process for each."""
    loader = DataLoader(
        dataset, batch_size, num_workers=workers, collate_fn=as_batch, persistent_workers=workers > 0, shuffle=False
    )
    for _ in loader:  # starts the processes and indexes the files
        pass
    start, used = time.perf_counter(), time.process_time()
    delivered = sum(len(labels) for _, labels in loader)
    return delivered / (time.perf_counter() - start), 1000 * (time.process_time() - used) / delivered


def main() -> None:
    """Print one row for each sampling and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="a video of your own")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--clips", type=int, default=64, help="in one pass")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(340, 256), help="width and height of the test video")
    parser.add_argument("--seconds", type=int, default=10)
    args = parser.parse_args()
    preprocessing = Preprocessing((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    samplings = {
        "uniform": FrameSampling("uniform", args.frames),
        "dense, stride 16": FrameSampling("dense", args.frames, 16),
        "dense, stride 4": FrameSampling("dense", args.frames, 4),
    }
    with tempfile.TemporaryDirectory() as folder:
        video = args.video or Path(folder) / "video.mp4"
        if args.video is None:
            write_test_video(video, tuple(args.size), args.seconds)
        source = VideoFiles([video] * args.clips, [0] * args.clips)
        print("| frames | workers | clips/s | CPU ms a clip |\n| --- | ---: | ---: | ---: |")
        for name, sampling in samplings.items():
            for workers in args.workers:
                dataset = VideoDataset(source, sampling, ClipTransform(preprocessing, ClipAugmentation(flip=True)))
                rate, used = speed(dataset, workers, args.batch_size)
                own = f"{used:.0f}" if workers == 0 else ""
                print(f"| {args.frames} {name} | {workers} | {rate:.1f} | {own} |", flush=True)


if __name__ == "__main__":
    main()
