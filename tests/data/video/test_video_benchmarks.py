"""Kinetics, Something-Something v2, HMDB51 and UCF101 in their published layouts, made of a handful of empty files."""

import json

import pytest
from data_layouts import SMALL
from video_files import write_video

from visionpeft.data import HMDB51, UCF101, ClipAugmentation, Kinetics, SomethingSomethingV2
from visionpeft.errors import ConfigurationError, DataError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def names(data, split):
    source = data.sources[split]
    return [(path.stem, label) for path, label in zip(source.paths, source.labels, strict=True)]


@pytest.fixture
def kinetics(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/train.csv").write_text(
        header + "zumba,-abc_D123,5,15,train\n"
        '"cooking, slowly",xyz,120,130,train\ncooking chicken,aaa,0,10,train\nzumba,bbb,7,17,train\n'
    )
    (tmp_path / "annotations/val.csv").write_text(header + "zumba,ccc,10,20,validate\n")
    touch(tmp_path / "train/-abc_D123_000005_000015.mp4")
    touch(tmp_path / "train/xyz_000120_000130.mkv")
    touch(tmp_path / "train/cooking chicken/aaa_000000_000010.mp4")
    touch(tmp_path / "train/bbb_000007_000017.mp4")
    touch(tmp_path / "replacement/replacement_for_corrupted/bbb_000007_000017.mp4")
    touch(tmp_path / "val/ccc_000010_000020.mp4")
    return tmp_path


def test_kinetics(kinetics):
    data = Kinetics(kinetics)
    assert data.class_names == ["cooking chicken", "cooking, slowly", "zumba"]
    assert names(data, "train") == [
        ("-abc_D123_000005_000015", 2),
        ("xyz_000120_000130", 1),
        ("aaa_000000_000010", 0),
        ("bbb_000007_000017", 2),
    ]
    assert names(data, "test") == [("ccc_000010_000020", 2)]
    assert "replacement" in str(data.sources["train"].paths[3])
    record = data.description()
    assert record["dataset"] == "Kinetics-3"
    assert record["selected_on"] is None
    assert record["missing_videos"] == {"train": 0, "test": 0}


def test_missing_videos_are_an_error_or_counted(kinetics):
    (kinetics / "train/-abc_D123_000005_000015.mp4").unlink()
    with pytest.raises(
        DataError, match=r"1 videos of Kinetics-3 are missing, the first being .*-abc_D123_000005_000015"
    ):
        Kinetics(kinetics)
    data = Kinetics(kinetics, skip_missing=True)
    assert data.description()["missing_videos"] == {"train": 1, "test": 0}
    assert len(data.sources["train"]) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,youtube_id\nzumba,abc\n", "lacks the column time_start"),
        ("label,youtube_id,time_start,time_end\nzumba,abc,x,15\n", "line 2: times must be seconds, found x and 15"),
        ("label,youtube_id,time_start,time_end\n,abc,5,15\n", "line 2 lacks an entry"),
        ("label,youtube_id,time_start,time_end\n", "holds no videos"),
    ],
)
def test_bad_kinetics_annotations(kinetics, text, message):
    (kinetics / "annotations/train.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        Kinetics(kinetics)
    with pytest.raises(DataError, match="the train annotations of Kinetics are missing"):
        Kinetics(kinetics, train="other.csv")


@pytest.fixture
def something(tmp_path):
    labels = {"Pushing something from left to right": "1", "Holding something": "0"}
    entries = {
        "train": [
            {"id": "12", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]},
            {"id": "7", "label": "pushing it", "template": "Pushing [something] from left to right"},
        ],
        "validation": [{"id": "9", "label": "holding it", "template": "Holding [something]"}],
    }
    for name, content in ({"labels": labels} | entries).items():
        (tmp_path / f"something-something-v2-{name}.json").write_text(json.dumps(content))
    for name in ("12", "7", "9"):
        touch(tmp_path / f"20bn-something-something-v2/{name}.webm")
    return tmp_path


def test_something_something(something):
    data = SomethingSomethingV2(something)
    assert data.class_names == ["Holding something", "Pushing something from left to right"]
    assert names(data, "train") == [("12", 0), ("7", 1)]
    assert names(data, "test") == [("9", 0)]
    with pytest.raises(ConfigurationError, match="flip changes labels of Something-Something v2"):
        SomethingSomethingV2(something, augmentation=ClipAugmentation(flip=True))


def test_bad_something_something(something):
    file = something / "something-something-v2-train.json"
    file.write_text(json.dumps([{"id": "12", "template": "Eating [something]"}]))
    with pytest.raises(DataError, match="entry 1: 'Eating something' is not among the 2 classes"):
        SomethingSomethingV2(something)
    file.write_text(json.dumps([{"id": "12"}]))
    with pytest.raises(DataError, match="entry 1: expected an object with id and template"):
        SomethingSomethingV2(something)
    (something / "something-something-v2-labels.json").write_text(json.dumps({"a": "0", "b": "2"}))
    with pytest.raises(DataError, match="must number its classes from 0 without gaps"):
        SomethingSomethingV2(something)
    file.unlink()
    with pytest.raises(DataError, match="train annotations of Something-Something v2 are missing"):
        SomethingSomethingV2(something)


@pytest.fixture
def hmdb(tmp_path):
    uses = {"brush_hair": "1112", "wave": "2110"}
    for name, marks in uses.items():
        for split in (1, 2, 3):
            # Films 0 and 1 have two clips each.
            files = [f"Film_{i // 2}_{name}_h_nm_np1_ba_goo_{i % 2}.avi" for i in range(4)]
            lines = [f"{file} {mark} " for file, mark in zip(files, marks, strict=True)]
            folder = tmp_path / "testTrainMulti_7030_splits"
            folder.mkdir(exist_ok=True)
            (folder / f"{name}_test_split{split}.txt").write_text("\n".join(lines) + "\n")
            for file in files:
                touch(tmp_path / "hmdb51_org" / name / file)
    return tmp_path


def test_hmdb51(hmdb):
    data = HMDB51(hmdb)
    assert data.class_names == ["brush_hair", "wave"]
    assert data.sources["train"].labels == [0, 0, 0, 1, 1]
    assert data.sources["test"].labels == [0, 1]
    assert data.sources["test"].paths[0].name == "Film_1_brush_hair_h_nm_np1_ba_goo_1.avi"
    assert data.description()["split"] == "split 1"
    with pytest.raises(ConfigurationError, match="split 4 must be 1, 2 or 3"):
        HMDB51(hmdb, split=4)
    (hmdb / "testTrainMulti_7030_splits/wave_test_split2.txt").write_text("a.avi 3\n")
    with pytest.raises(DataError, match="expected a file name and 0, 1 or 2"):
        HMDB51(hmdb, split=2)


def test_films_are_not_divided_between_train_and_val(hmdb):
    data = HMDB51(hmdb, val_fraction=0.3)
    films = {
        split: {str(path).rpartition("_h_")[0] for path in data.sources[split].paths} for split in ("train", "val")
    }
    assert not films["train"] & films["val"]
    assert set(data.sources["val"].labels) == {0, 1}
    assert len(data.sources["train"]) + len(data.sources["val"]) == 5
    assert data.description()["selected_on"] == "val"
    again = HMDB51(hmdb, val_fraction=0.3)
    assert again.sources["val"].paths == data.sources["val"].paths


@pytest.fixture
def ucf(tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    trained = [
        f"{c}/v_{c}_g{g:02d}_c{i:02d}.avi" for c in ("ApplyEyeMakeup", "YoYo") for g in (8, 9, 10) for i in (1, 2)
    ]
    tested = [f"{c}/v_{c}_g01_c01.avi" for c in ("YoYo", "ApplyEyeMakeup")]
    (lists / "trainlist01.txt").write_text("\r\n".join(f"{p} {1 + p.startswith('Y')}" for p in trained) + "\r\n")
    (lists / "testlist01.txt").write_text("\n".join(tested) + "\n")
    for path in trained + tested:
        touch(tmp_path / "UCF-101" / path)
    return tmp_path


def test_ucf101(ucf):
    data = UCF101(ucf, val_fraction=0.3)
    assert data.class_names == ["ApplyEyeMakeup", "YoYo"]
    assert data.sources["test"].labels == [1, 0]
    assert data.sources["train"].labels == [0] * 4 + [1] * 4
    groups = {split: {path.stem[:-4] for path in data.sources[split].paths} for split in ("train", "val")}
    assert not groups["train"] & groups["val"]
    (ucf / "ucfTrainTestlist/testlist01.txt").write_text("Yodelling/v_Yodelling_g01_c01.avi\n")
    with pytest.raises(DataError, match=r"testlist01\.txt line 1: class 'Yodelling' is not in classInd\.txt"):
        UCF101(ucf)


def test_a_benchmark_is_decoded(ucf):
    for path in (ucf / "UCF-101").rglob("*.avi"):
        write_video(path, 6, codec="mpeg4", size=(32, 24))
    data = UCF101(ucf, batch_size=5)
    data.preprocessing = SMALL
    data.setup()
    clips, labels = next(iter(data.test_dataloader()))
    assert clips.shape == (2, 1, 3, 8, 16, 16)
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize("benchmark", [Kinetics, SomethingSomethingV2, HMDB51, UCF101])
def test_missing_folders(benchmark, tmp_path):
    with pytest.raises(DataError, match=r"missing|does not exist|cannot read"):
        benchmark(tmp_path / "nothing")
