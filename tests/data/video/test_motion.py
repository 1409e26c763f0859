"""The embedded video set: no frame tells the class, opposite classes are each other backwards, files are real video."""

import json

import av
import numpy as np
import pytest
import torch
from data_layouts import SMALL
from PIL import Image

from visionpeft.data import ClipAugmentation, Motion, VideoFolder
from visionpeft.data.video import motion_scenes as motion
from visionpeft.data.video.dataset import uniform_draws
from visionpeft.data.video.reading import open_video
from visionpeft.errors import ConfigurationError, DataError

OPPOSITES = [(0, 1), (2, 3), (4, 5), (6, 7)]
FEW = {"train": 2, "val": 1, "test": 1}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "motion"
    motion.write_motion(folder, 0, FEW)
    return folder


@pytest.mark.parametrize("label", range(8))
@pytest.mark.parametrize("time", [0, 7, 15])
def test_states_are_uniform_at_every_time_in_every_class(label, time):
    starts = uniform_draws(4 * 4000, label).reshape(4000, 4)
    states = np.array([motion.states(label, start)[time] for start in starts])
    for number in range(4):
        # Kolmogorov-Smirnov: the 99.9 % bound of 4000 uniform draws is 1.95 / sqrt(4000).
        distance = np.abs(np.sort(states[:, number]) - (np.arange(4000) + 0.5) / 4000).max()
        assert distance < 1.95 / 4000**0.5
    assert np.abs(np.corrcoef(states.T) - np.eye(4)).max() < 0.07


@pytest.mark.parametrize(("label", "opposite"), OPPOSITES)
def test_a_video_backwards_is_one_of_the_opposite_class(label, opposite):
    forwards = motion.states(label, np.array([0.31, 0.82, 0.43, 0.94]))
    backwards = motion.states(opposite, forwards[-1])
    distance = np.abs(forwards[::-1] - backwards)
    assert np.minimum(distance, 1 - distance).max() < 1e-12
    sprite = motion.cut_out(Image.open(motion.sprites("train")[0]))
    scenery = motion.background(0, 0)
    first, second = ([motion.render(sprite, scenery, state) for state in path] for path in (forwards, backwards[::-1]))
    # Rounding may move an edge by a shade.
    assert np.abs(np.stack(first).astype(int) - np.stack(second)).max() <= 2


def test_the_motions_are_what_they_are_called():
    # An L of three cells, red on the outer corner.
    cells = np.zeros((64, 64, 4), np.uint8)
    cells[8:56, 8:24] = cells[40:56, 8:56] = (255, 255, 255, 255)
    cells[8:24, 8:24] = (255, 0, 0, 255)
    sprite, scenery = Image.fromarray(cells), np.zeros((64, 64, 3))

    def look(name, start):
        path = motion.states(list(motion.CLASSES).index(name), np.array(start), 3)
        frames = [motion.render(sprite, scenery, state).astype(float) for state in path]
        masks = [frame.sum(-1) for frame in frames]
        rows, columns = np.mgrid[:64, :64]
        centres = np.array([[(m * columns).sum(), (m * rows).sum()] / m.sum() for m in masks])
        red = [np.clip(frame[..., 0] - frame[..., 1], 0, None) for frame in frames]
        corner = np.array([[(r * columns).sum(), (r * rows).sum()] / r.sum() for r in red])
        return np.diff(centres, axis=0), [mask.sum() for mask in masks], corner - centres

    middle = (0.5, 0.5, 0.5, 0.0)
    for name, expected in {
        "moving left": (-5.12, 0),
        "moving right": (5.12, 0),
        "moving up": (0, -5.12),
        "moving down": (0, 5.12),
    }.items():
        steps, areas, _ = look(name, middle)
        assert steps == pytest.approx(np.array([expected, expected]), abs=0.1)
        assert areas[0] == pytest.approx(areas[2], rel=0.02)
    _, areas, _ = look("growing", middle)
    assert areas[0] < areas[1] < areas[2]
    _, areas, _ = look("shrinking", middle)
    assert areas[0] > areas[1] > areas[2]
    for name, sign in {"turning clockwise": 1, "turning counter-clockwise": -1}.items():
        _, areas, arms = look(name, middle)
        # With y downwards, a positive cross product is a clockwise turn.
        cross = arms[:-1, 0] * arms[1:, 1] - arms[:-1, 1] * arms[1:, 0]
        angles = np.degrees(np.arcsin(cross / (np.linalg.norm(arms[:-1], axis=1) * np.linalg.norm(arms[1:], axis=1))))
        assert angles == pytest.approx([28.8 * sign] * 2, abs=2)
        assert areas[0] == pytest.approx(areas[2], rel=0.03)


def test_sprites_wrap_around():
    sprite = motion.cut_out(Image.open(motion.sprites("val")[0]))
    scenery = np.full((64, 64, 3), 128.0)
    here, there = (motion.render(sprite, scenery, np.array([x, y, 0.5, 0.2])) for x, y in ((0.5, 0.5), (0.0, 0.75)))
    assert (np.roll(here, (16, -32), (0, 1)) == there).all()


def test_a_scene_is_filmed_once_for_each_class():
    films = motion.film("train", 1)
    assert films.shape == (8, 16, 64, 64, 3)
    assert len({film.tobytes() for film in films}) == 8
    scenery = motion.background(int(motion.mix(0, 0)[0]), 1)
    for film in films:
        shown = np.abs(film - scenery[None]).max(-1) <= 0.5
        assert shown.mean() > 0.4
    assert not np.array_equal(films, motion.film("train", 1, seed=1))
    assert np.array_equal(motion.film("train", 1), films)


def test_splits_share_no_sprite():
    splits = [set(motion.sprites(split)) for split in ("train", "val", "test")]
    assert [len(sprites) for sprites in splits] == [200, 80, 240]
    assert all(path.is_file() for sprites in splits for path in sprites)
    assert len(set().union(*splits)) == 520
    for split, sprites in zip(("train", "val", "test"), splits, strict=True):
        assert len(sprites) >= motion.SCENES[split]


def test_files_are_h264_and_show_what_was_filmed(written):
    path = written / "train/turning_clockwise/001.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert "mp4" in container.format.name
        assert stream.average_rate == 8
    video = open_video(path)
    assert len(video) == 16
    decoded = np.stack(list(video.read(range(16), np.asarray).values())).astype(float)
    errors = ((decoded - motion.film("train", 1)[6]) ** 2).mean((1, 2, 3))
    assert errors.max() < 60
    # Encoded equally well at all times, so that the quality does not tell where in the video a frame is from.
    assert errors.max() < 2.5 * errors.min()


def test_writing_is_deterministic_and_whole(written, tmp_path):
    motion.write_motion(tmp_path / "again", 0, FEW)
    for path in written.rglob("*.mp4"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(written)).read_bytes()
    assert len(list(written.rglob("*.mp4"))) == 8 * 4
    motion.write_motion(tmp_path / "other", 1, FEW)
    other = tmp_path / "other/train/growing/000.mp4"
    assert other.read_bytes() != (written / "train/growing/000.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(path, frames):
        raise KeyboardInterrupt

    monkeypatch.setattr(motion, "write_video", interrupt)
    with pytest.raises(KeyboardInterrupt):
        motion.write_motion(tmp_path / "motion", 0, FEW)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        motion.write_motion(tmp_path / "file" / "motion", 0, FEW)


def test_another_process_may_write_the_same(tmp_path, monkeypatch):
    def slow(path, frames):
        (tmp_path / "motion").mkdir(exist_ok=True)  # the other process finishes first
        (tmp_path / "motion" / "theirs").write_text("")

    monkeypatch.setattr(motion, "write_video", slow)
    motion.write_motion(tmp_path / "motion", 0, FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["motion"]
    assert [path.name for path in (tmp_path / "motion").iterdir()] == ["theirs"]


def test_data_module(written, monkeypatch):
    monkeypatch.setattr("visionpeft.data.video.motion.SCENES", FEW)
    monkeypatch.setattr(motion, "SCENES", FEW)
    data = Motion(written, batch_size=16, seed=0)
    data.preprocessing = SMALL
    data.setup()
    assert data.class_names == list(motion.CLASSES)
    record = data.description()
    assert record["sizes"] == {"train": 16, "val": 8, "test": 8}
    assert json.loads(json.dumps(record)) == record
    assert record["sampling"]["num_frames"] == 8
    clips, labels = next(iter(data.train_dataloader()))
    assert clips.shape == (16, 3, 8, 16, 16)
    assert torch.bincount(labels).tolist() == [2] * 8
    views, _ = next(iter(data.test_dataloader()))
    assert views.shape == (8, 1, 3, 8, 16, 16)
    with pytest.raises(ConfigurationError, match="flip changes labels of Motion"):
        Motion(written, augmentation=ClipAugmentation(flip=True))


def test_the_folder_is_one_that_people_can_use(written):
    data = VideoFolder(written)
    assert data.class_names == sorted(name.replace(" ", "_") for name in motion.CLASSES)
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 16, "val": 8, "test": 8}


def test_default_place_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Motion().root == tmp_path / "visionpeft" / "motion-2-seed0"
    assert {split: len(source) for split, source in Motion().sources.items()} == {
        "train": 1440,
        "val": 240,
        "test": 320,
    }
    assert Motion(video_seed=3).root.name == "motion-2-seed3"
    assert list(tmp_path.iterdir()) == []
