"""Video batches: order and resuming, test views, damaged videos, the written record; own videos."""

import json

import lightning
import numpy as np
import pytest
import torch
from data_layouts import SMALL, truncate
from PIL import Image
from video_files import number_of, write_audio, write_frames, write_video

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data import ClipAugmentation, FrameSampling, VideoFolder, VideoList, find_videos, videos_dataloader
from visionpeft.data.ordering import SceneSampler
from visionpeft.data.video.dataset import VideoDataset
from visionpeft.data.video.files import VideoFiles
from visionpeft.data.video.module import VideoDataModule, video_set
from visionpeft.data.video.reading import open_video
from visionpeft.data.video.transforms import ClipTransform
from visionpeft.errors import ConfigurationError, DataError

DENSE = FrameSampling("dense", 4, stride=2, test_clips=2)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """`{train,val,test}/{a,b}/`, with 5, 1 and 2 videos of each class."""
    root = tmp_path_factory.mktemp("videos")
    for split, count in {"train": 5, "val": 1, "test": 2}.items():
        for position, name in enumerate("ab"):
            for number in range(count):
                path = root / split / name / f"{number}.mp4"
                write_video(path, 10 + 3 * number + position, size=(32, 24), options={"preset": "ultrafast"})
    return root


@pytest.fixture
def folders(shared, tmp_path):
    """A copy that a test may damage."""
    for path in shared.rglob("*.mp4"):
        copy = tmp_path / path.relative_to(shared)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path


def module(root, **options):
    data = VideoFolder(root, **{"batch_size": 3, "seed": 5, "sampling": DENSE, **options})
    data.preprocessing = SMALL
    data.setup()
    return data


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return torch.cat([clips for clips, _ in loader])


class Recorder(lightning.LightningModule):
    """Trains one number and records the clips it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        clips, _ = batch
        self.seen.append((self.current_epoch, clips))
        return (self.weight - clips.mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(data, folder, epochs, *, stop_after=None, resume=None):
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        max_steps=stop_after or -1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)],
    )
    trainer.fit(recorder, data, ckpt_path=resume)
    return recorder.seen, recorder.weight.item()


def test_batches(shared):
    data = module(shared, drop_last=True, test_crops=3, test_batch_size=2)
    batches = list(data.train_dataloader())
    assert [tuple(clips.shape) for clips, _ in batches] == [(3, 3, 4, 16, 16)] * 3
    assert batches[0][0].dtype == torch.float32
    assert batches[0][1].dtype == torch.int64
    assert [tuple(clips.shape) for clips, _ in data.val_dataloader()] == [(2, 3, 4, 16, 16)]
    tested = list(data.test_dataloader())
    assert [tuple(views.shape) for views, _ in tested] == [(2, 6, 3, 4, 16, 16)] * 2
    assert torch.cat([labels for _, labels in tested]).tolist() == [0, 0, 1, 1]
    assert data.class_names == ["a", "b"]
    assert data.deterministic_views is None
    clip, label = data.dataset("val")[1]
    assert clip.shape == (3, 4, 16, 16)
    assert label == 1


def test_views_are_the_clips_and_crops_asked_for(tmp_path):
    """Against frames read and cut in the test itself."""
    for number in range(2):
        for name in "ab":
            write_frames(tmp_path / "train" / name / str(number), 12, (40, 16))
            write_frames(tmp_path / "test" / name / str(number), 12, (40, 16))
    data = module(tmp_path, test_crops=3, normalisation="none")
    views = data.dataset("test")[0][0]
    frames = [np.asarray(frame) for frame in _images(tmp_path / "test/a/0")]
    # 12 frames, stride 2, 4 frames: a window of 7, so clips start at 0 and 5; 40 x 16 leaves crops at 0, 12 and 24.
    expected = [
        [[frames[start + 2 * step][:, left : left + 16] for step in range(4)] for left in (0, 12, 24)]
        for start in (0, 5)
    ]
    expected = torch.tensor(np.array(expected)).reshape(6, 4, 16, 16, 3).permute(0, 4, 1, 2, 3) / 255
    torch.testing.assert_close(views, expected, rtol=0, atol=1e-6)
    single = data.dataset("test")
    single.crops = None
    assert torch.equal(single[0][0], _normalised(frames, (2, 4, 6, 8), 12))


def _images(folder):
    from PIL import Image

    return [Image.open(folder / f"img_{number}.png") for number in range(1, 13)]


def _normalised(frames, indices, left):
    clip = np.stack([frames[index][:, left : left + 16] for index in indices])
    return torch.tensor(clip).permute(3, 0, 1, 2) / 255


VARYING = np.cumsum([0, *np.random.default_rng(1).integers(40, 400, 29)]).tolist()  # milliseconds
WHOLE_FRAMES = Preprocessing((48, 64), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")


def numbers_of(views):
    """The numbers that the frames of views (..., 3, T, H, W) show."""
    frames = (views.movedim(-4, -1).flatten(0, -4) * 255).to(torch.uint8).numpy()
    return [number_of(Image.fromarray(frame)) for frame in frames]


@pytest.mark.parametrize(
    ("name", "options"),
    [("b_frames.mp4", {}), ("fragmented.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}})],
)
@pytest.mark.parametrize("kind", ["dense", "uniform"])
def test_frames_by_time_are_those_that_a_player_shows(tmp_path, name, options, kind):
    """A varying rate with B-frames, whose average and guessed rates mislead; the numbers are read off the pictures."""
    path = write_video(tmp_path / name, 30, times=VARYING, **options)
    shown = (np.array(VARYING) - VARYING[0]) / 1000

    def player(time):
        return max(number for number, begins in enumerate(shown) if begins <= time)

    dense = FrameSampling("dense", 5, test_clips=3, by="time", seconds=2.0)
    sampling = dense if kind == "dense" else FrameSampling("uniform", 5, by="time")
    dataset = VideoDataset(VideoFiles([path], [0]), sampling, ClipTransform(WHOLE_FRAMES), crops=1)
    length = open_video(path).length
    assert shown[-1] < length <= shown[-1] + 0.4
    if kind == "dense":
        expected = [start + 0.4 * step for start in np.linspace(0, length - 2, 3) for step in range(5)]
    else:
        expected = [length * part / 5 for part in (0.5, 1.5, 2.5, 3.5, 4.5)]
    assert numbers_of(dataset[0][0]) == [player(time) for time in expected]
    # The negative control: by index, at the average rate, a clip holds other frames.
    rate = len(shown) / length
    counted = FrameSampling("dense", 5, stride=round(0.4 * rate), test_clips=3)
    counted = counted if kind == "dense" else FrameSampling("uniform", 5)
    by_index = VideoDataset(VideoFiles([path], [0]), counted, ClipTransform(WHOLE_FRAMES), crops=1)
    assert numbers_of(by_index[0][0]) != numbers_of(dataset[0][0])


def test_training_frames_by_time(tmp_path):
    """From a start anywhere that a clip fits, the frames that a player shows; the same for one seed and epoch."""
    path = write_video(tmp_path / "varying.mp4", 30, times=VARYING)
    shown = (np.array(VARYING) - VARYING[0]) / 1000
    sampling = FrameSampling("dense", 5, by="time", seconds=2.0)
    transform = ClipTransform(WHOLE_FRAMES, ClipAugmentation("centre"))
    dataset = VideoDataset(VideoFiles([path], [0]), sampling, transform)
    clips = [numbers_of(dataset[(0, epoch)][0]) for epoch in range(12)]
    assert clips == [numbers_of(dataset[(0, epoch)][0]) for epoch in range(12)]
    possible = {
        tuple(int(np.searchsorted(shown, start + 0.4 * step, side="right")) - 1 for step in range(5))
        for start in np.arange(0, open_video(path).length - 2, 0.0005)
    }
    assert set(map(tuple, clips)) <= possible
    assert len(set(map(tuple, clips))) > 6


def test_videos_of_two_rates_show_the_same_moments(tmp_path):
    """One film at 10 and at 30 frames a second: by time both clips span one second, by index only one does."""
    sampling = FrameSampling("dense", 5, by="time", seconds=1.0)
    for by_time in (True, False):
        clips = {}
        for rate in (10, 30):
            path = write_video(tmp_path / f"{rate}.mp4", 2 * rate, rate=rate)
            chosen = sampling if by_time else FrameSampling("dense", 5, stride=2)
            dataset = VideoDataset(VideoFiles([path], [0]), chosen, ClipTransform(WHOLE_FRAMES), crops=1)
            clips[rate] = np.array(numbers_of(dataset[0][0])) / rate
        assert np.allclose(np.diff(clips[10]), 0.2)
        assert np.allclose(np.diff(clips[30]), 0.2) == by_time


@pytest.mark.parametrize("name", ["raw.h264", "frames"])
def test_what_has_no_times_is_refused_by_time(tmp_path, name):
    path = write_frames(tmp_path / name, 12) if name == "frames" else write_video(tmp_path / name, 12)
    dataset = VideoDataset(VideoFiles([path], [0]), FrameSampling(by="time"), ClipTransform(WHOLE_FRAMES), crops=1)
    with pytest.raises(DataError, match="by index"):
        dataset[0]
    by_index = VideoDataset(VideoFiles([path], [0]), FrameSampling(num_frames=3), ClipTransform(WHOLE_FRAMES), crops=1)
    assert numbers_of(by_index[0][0]) == [2, 5, 9]  # bounds 0 4 7 11


def test_evaluation_is_deterministic(shared):
    data = module(shared, augmentation=ClipAugmentation(randaugment=2))
    for loader in (data.val_dataloader(), data.test_dataloader()):
        first, again = (torch.cat([clips for clips, _ in loader]) for _ in range(2))
        assert torch.equal(first, again)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_frames_and_augmentation_depend_on_seed_and_epoch_only(shared, workers):
    data = module(shared, num_workers=workers)
    loader = data.train_dataloader()
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert not torch.equal(first, second)
    assert torch.equal(epoch_of(module(shared).train_dataloader(), 1), second)
    assert not torch.equal(epoch_of(module(shared, seed=6).train_dataloader(), 0), first)


def test_frames_differ_between_epochs_without_augmentation(shared):
    data = module(shared, augmentation=ClipAugmentation("centre"), sampling=FrameSampling("uniform", 3))
    dataset = data.dataset("train")
    clips = [dataset[(4, epoch)][0] for epoch in range(6)]
    assert len({clip.numpy().tobytes() for clip in clips}) > 2


def test_loading_does_not_draw_from_the_global_generator(shared):
    data = module(shared)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("steps", [4, 6], ids=["at the end of an epoch", "inside an epoch"])
def test_resumed_training_sees_what_the_uninterrupted_one_saw(shared, tmp_path, steps):
    # 10 videos in batches of 3: 4 batches an epoch.
    whole, weight = train(module(shared), tmp_path / "whole", 3)
    cut, _ = train(module(shared), tmp_path / "cut", 3, stop_after=steps)
    saved = next((tmp_path / "cut").glob(f"*step={steps}.ckpt"))
    rest, resumed_weight = train(module(shared), tmp_path / "rest", 3, resume=saved)
    assert [epoch for epoch, _ in cut + rest] == [epoch for epoch, _ in whole]
    assert all(torch.equal(ours[1], theirs[1]) for ours, theirs in zip(cut + rest, whole, strict=True))
    assert resumed_weight == weight


def in_scenes(root, **options):
    """Training videos in five scenes, each filmed in both classes."""
    paths = {split: [root / split / name / "0.mp4" for name in "ab"] for split in ("val", "test")}
    train = [root / "train" / name / f"{number}.mp4" for name in "ab" for number in range(5)]
    sources = {
        "train": VideoFiles(train, [0] * 5 + [1] * 5, [*range(5)] * 2),
        **{split: VideoFiles(videos, [0, 1]) for split, videos in paths.items()},
    }
    options = {"batch_size": 4, "batches": "scene", "seed": 5, "sampling": DENSE, **options}
    data = VideoDataModule(video_set(sources, ["a", "b"], {"dataset": "Scenes"}), **options)
    data.preprocessing = SMALL
    data.setup()
    return data


def scenes_of(sampler, epoch):
    """Scenes in the order of an epoch, after checking that the two videos of each follow each other."""
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert len(keys) == len(sampler)
    assert {seen for _, seen in keys} == {epoch}
    first, second = np.array([index for index, _ in keys]).reshape(-1, 2).T
    assert (first + 5 == second).all()
    return first.tolist()


def test_batches_of_whole_scenes(shared):
    loader = in_scenes(shared).train_dataloader()
    assert [labels.tolist() for _, labels in loader] == [[0, 1, 0, 1], [0, 1, 0, 1], [0, 1]]
    orders = [scenes_of(loader.sampler, epoch) for epoch in range(4)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len(set(map(tuple, orders))) > 1
    again = in_scenes(shared).train_dataloader().sampler
    assert scenes_of(again, 2) == orders[2]
    assert [scenes_of(in_scenes(shared, seed=6).train_dataloader().sampler, epoch) for epoch in range(4)] != orders
    assert [len(labels) for _, labels in in_scenes(shared, drop_last=True).train_dataloader()] == [4, 4]
    record = in_scenes(shared).description()
    assert record["batches"] == "scene"


def test_devices_share_whole_scenes():
    scenes = [*range(5)] * 2
    samplers = [SceneSampler(scenes, num_replicas=2, rank=rank, seed=7) for rank in range(2)]
    first, second = (scenes_of(sampler, 3) for sampler in samplers)
    assert len(first) == len(second) == 3
    assert set(first) | set(second) == set(range(5))
    whole = scenes_of(SceneSampler(scenes, num_replicas=1, rank=0, seed=7), 3)
    assert [scene for pair in zip(first, second, strict=True) for scene in pair][:5] == whole


def test_resumed_scenes_are_those_of_the_uninterrupted_training(shared, tmp_path):
    # 10 videos in batches of 4: 3 batches an epoch.
    whole, weight = train(in_scenes(shared), tmp_path / "whole", 3)
    train(in_scenes(shared), tmp_path / "cut", 3, stop_after=4)
    saved = next((tmp_path / "cut").glob("*step=4.ckpt"))
    rest, resumed_weight = train(in_scenes(shared), tmp_path / "rest", 3, resume=saved)
    assert len(rest) == 5
    assert all(torch.equal(ours[1], theirs[1]) for ours, theirs in zip(rest, whole[4:], strict=True))
    assert resumed_weight == weight


def test_scenes_that_cannot_fill_batches(shared, folders):
    with pytest.raises(ConfigurationError, match="batch_size 3 must be a multiple of the 2 videos of a scene"):
        in_scenes(shared, batch_size=3)
    truncate(folders / "train/b/4.mp4")
    data = in_scenes(folders, skip_corrupt=True)
    with pytest.raises(DataError, match="these have 1 to 2 samples; use batches 'random'"):
        data.train_dataloader()


def test_shuffled_test_frames(shared):
    plain, shuffled = (
        module(shared, shuffle_test_frames=on, test_crops=3).dataset("test")[3][0] for on in (False, True)
    )
    assert not torch.equal(plain, shuffled)
    # All views of a video have one order, and hold the frames of the plain ones.
    order = [next(t for t in range(4) if torch.equal(plain[0, :, t], shuffled[0, :, s])) for s in range(4)]
    assert sorted(order) == [0, 1, 2, 3]
    assert torch.equal(plain[:, :, order], shuffled)
    assert torch.equal(shuffled, module(shared, shuffle_test_frames=True, test_crops=3).dataset("test")[3][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_video_is_named_in_one_sentence(folders, workers):
    truncate(folders / "train/b/4.mp4")
    with pytest.raises(DataError) as caught:
        list(module(folders, num_workers=workers).train_dataloader())
    assert str(caught.value).startswith(f"video file {folders}/train/b/4.mp4 cannot be read (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_videos_are_left_out_and_counted_when_asked(folders, workers):
    truncate(folders / "train/b/4.mp4")
    write_audio(folders / "train/a/1.mp4")
    (folders / "test/a/0.mp4").write_bytes(b"")
    data = module(folders, skip_corrupt=True, num_workers=workers)
    assert data.description()["sizes"] == {"train": 8, "val": 2, "test": 3}
    assert data.description()["skipped_videos"] == {"train": 2, "val": 0, "test": 1}
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 8


@pytest.mark.parametrize("kind", ["stream", "frames"])
@pytest.mark.parametrize("resizing", ["pillow", "tensor"])
def test_frames_of_several_sizes_are_refused_or_left_out(folders, kind, resizing):
    """As joined streams and recorded calls have them."""
    sizes = (32, 24), (24, 32)
    if kind == "stream":
        path = folders / "train/b/4.ts"
        parts = [write_video(folders.parent / f"{width}.ts", 12, size=(width, height)) for width, height in sizes]
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
    else:
        path = folders / "train/b/4"
        for number, size in enumerate(sizes):
            (written,) = write_frames(folders.parent / f"{number}", 1, size).iterdir()
            path.mkdir(exist_ok=True)
            written.rename(path / f"{number}.png")
    (folders / "train/b/4.mp4").unlink()
    sampling = FrameSampling(num_frames=4)
    with pytest.raises(DataError, match=f"the frames of video {path} are not of one size; write it again"):
        list(module(folders, sampling=sampling, resizing=resizing).train_dataloader())
    data = module(folders, sampling=sampling, resizing=resizing, skip_corrupt=True)
    assert data.skipped == {"train": 1, "val": 0, "test": 0}
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 9


def test_a_class_without_readable_videos(folders):
    for number in range(5):
        (folders / f"train/b/{number}.mp4").write_bytes(b"")
    with pytest.raises(DataError, match="class 'b' is in the val split and has no video in the train split"):
        module(folders, skip_corrupt=True)


def test_description_is_complete_and_json(shared):
    record = module(shared, normalisation="imagenet", test_samples=3).description()
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "dataset": "VideoFolder",
        "task": shared.name,
        "trained_on": "train",
        "selected_on": "val",
        "split": "folders",
        "labels": "classes",
        "classes": 2,
        "sizes": {"train": 10, "val": 2, "test": 3},
        "test_subset": {"samples": 3, "of": 4, "seed": 0},
        "skipped_videos": {"train": 0, "val": 0, "test": 0},
        "input_size": [16, 16],
        "interpolation": "bicubic",
        "resizing": "pillow",
        "batches": "random",
        "sampling": {
            "kind": "dense",
            "num_frames": 4,
            "stride": 2,
            "test_clips": 2,
            "placement": "ends",
            "too_short": "repeat",
            "by": "index",
            "seconds": None,
        },
        "test_views": 2,
        "test_crops": 1,
        "shuffle_test_frames": False,
        "augmentation": {
            "crop": "random_resized_crop",
            "jitter": 1.15,
            "area": [0.08, 1.0],
            "flip": False,
            "randaugment": 0,
            "magnitude": 7,
            "erasing": 0.0,
            "policy": None,
        },
        "normalisation": {"source": "imagenet", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "notes": [],
    }


def test_index_cache_is_bounded(shared):
    dataset = module(shared).dataset("train")
    dataset[0]
    assert list(dataset.indices) == [0]
    dataset.free_bytes = 0
    dataset[1]
    assert list(dataset.indices) == [0]


def test_wrong_options(shared):
    with pytest.raises(ConfigurationError, match="test_crops 2 must be 1 or 3"):
        module(shared, test_crops=2)
    with pytest.raises(ConfigurationError, match="unknown resizing 'cv2' of frames: choose pillow or tensor"):
        module(shared, resizing="cv2")
    with pytest.raises(ConfigurationError, match="VideoFolder does not say which videos show the same scene"):
        module(shared, batches="scene")
    with pytest.raises(ConfigurationError, match="unknown batches 'class': choose random or scene"):
        module(shared, batches="class")
    with pytest.raises(ConfigurationError, match="flip changes labels of VideoFolder"):
        module(shared, mirrored=False, augmentation=ClipAugmentation(flip=True))
    with pytest.raises(ConfigurationError, match="set the data module's `preprocessing`"):
        VideoFolder(shared).train_dataloader()
    with pytest.raises(DataError, match="does not exist"):
        VideoFolder(shared / "nothing")


def test_one_folder_for_each_class_is_split(tmp_path):
    for name in "ab":
        for number in range(8):
            write_frames(tmp_path / name / f"video_{number}", 1)
    (tmp_path / "a" / "video_8.mp4").write_bytes(b"")
    data = VideoFolder(tmp_path, val_fraction=0.25, test_fraction=0.25)
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 9, "val": 4, "test": 4}
    names = [source.name(i) for source in data.sources.values() for i in range(len(source))]
    assert len(set(names)) == 17
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="holds no videos"):
        VideoFolder(tmp_path)


def test_lists_as_mmaction_writes_them(shared, tmp_path):
    (tmp_path / "train.txt").write_text("train/a/0.mp4 0\n\ntrain/b/0.mp4 1\ntrain/b/1.mp4  1\n")
    (tmp_path / "test.csv").write_text("test/a/0.mp4,0\ntest/b/0.mp4,1\n")
    data = VideoList(tmp_path / "train.txt", test=tmp_path / "test.csv", root=shared, class_names=["left", "right"])
    assert data.class_names == ["left", "right"]
    assert data.sources["train"].labels == [0, 1, 1]
    assert data.sources["test"].paths == [shared / "test/a/0.mp4", shared / "test/b/0.mp4"]
    data.setup()
    for text in ("path,label\ntrain/a/0.mp4,x\ntrain/b/0.mp4,y\n",):
        (tmp_path / "named.csv").write_text(text)
        assert VideoList(tmp_path / "named.csv", root=shared).class_names == ["x", "y"]
    (tmp_path / "train.json").write_text(json.dumps({"train/a/0.mp4": "x", "train/b/0.mp4": "y"}))
    assert VideoList(tmp_path / "train.json", root=shared).class_names == ["x", "y"]


def test_paths_with_spaces_in_lists(tmp_path):
    (tmp_path / "train.txt").write_text("my videos/a b.mp4 0\nmy videos/c.mp4, 1\n")
    assert [path.name for path in VideoList(tmp_path / "train.txt").sources["train"].paths] == ["a b.mp4", "c.mp4"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.mp4 0\nb.mp4\n", "line 2: expected a video path and an integer label, found 'b.mp4'"),
        ("a.mp4 0\na.mp4 1\n", "line 2: video 'a.mp4' has label '1' here and '0'"),
        ("../a.mp4 0\nb.mp4 1\n", "leaves the video folder"),
        ("a.mp4 0\nb.mp4 0\n", "at least two classes"),
        ("\n", "is empty"),
    ],
)
def test_bad_lists(tmp_path, lines, message):
    (tmp_path / "train.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        VideoList(tmp_path / "train.txt")


def test_missing_video_is_named_before_training(tmp_path):
    (tmp_path / "train.txt").write_text("a.mp4 0\nb.mp4 1\n")
    with pytest.raises(DataError, match=f"video {tmp_path}/a.mp4 does not exist"):
        VideoList(tmp_path / "train.txt").setup()


def test_videos_to_predict(shared, tmp_path):
    frames = write_frames(tmp_path / "frames", 5)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"")
    files = find_videos([shared / "test/b/1.mp4", shared / "test/a", frames, broken])
    assert [path.name for path in files] == ["1.mp4", "0.mp4", "1.mp4", "frames", "broken.mp4"]
    with pytest.raises(DataError, match="is empty"):
        list(videos_dataloader(files, SMALL, DENSE)[0])
    loader, used = videos_dataloader(files, SMALL, DENSE, crops=3, batch_size=3, skip_corrupt=True)
    assert used == files[:4]
    assert [tuple(views.shape) for views, _ in loader] == [(3, 6, 3, 4, 16, 16), (1, 6, 3, 4, 16, 16)]
    expected = module(shared, test_crops=3).dataset("test")[3][0]
    assert torch.equal(next(iter(loader))[0][0], expected)
    with pytest.raises(DataError, match="no videos to predict"):
        find_videos([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no videos"):
        find_videos([tmp_path / "empty"])
