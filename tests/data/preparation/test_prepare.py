"""`python -m visionpeft.prepare few_shot`: splits of our own, labelled as such."""

import json
from collections import Counter

import pytest
from data_layouts import write_class_folders, write_image

from visionpeft import prepare
from visionpeft.data import FewShot
from visionpeft.data.few_shot.definitions import few_shot_class_names

EUROSAT = ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial")
EUROSAT += ("Pasture", "PermanentCrop", "Residential", "River", "SeaLake")


def run(*arguments):
    return prepare.main(["few_shot", *map(str, arguments)])


def content_of(file):
    return json.loads(file.read_text())


def counts(items):
    return Counter(label for _, label, _ in items)


def test_class_folders(tmp_path, capsys):
    write_class_folders(tmp_path / "eurosat/2750", dict.fromkeys(EUROSAT, 10))
    assert run("--dataset", "EuroSAT", "--root", tmp_path) == 0
    file = tmp_path / "eurosat/split_visionpeft_EuroSAT.json"
    said = capsys.readouterr().out
    assert str(file) in said
    assert "our own, not the published one" in said
    content = content_of(file)
    for split, count in {"train": 5, "val": 2, "test": 3}.items():
        assert counts(content[split]) == dict.fromkeys(range(10), count)
    assert content["about"]["made_by"] == "visionpeft"
    assert len({path for split in ("train", "val", "test") for path, _, _ in content[split]}) == 100
    data = FewShot("eurosat", tmp_path, shots=2, split="own")
    data.setup()
    assert data.class_names == few_shot_class_names("eurosat")
    assert data.description()["split"] == "our own"
    assert data.sources["train"].paths[0].parent.name == "AnnualCrop"
    # it is never taken for the published one
    assert not list((tmp_path / "eurosat").glob("split_zhou*"))
    with pytest.raises(Exception, match=r"split_zhou_EuroSAT\.json of EuroSAT does not exist"):
        FewShot("eurosat", tmp_path)


def test_existing_files_stay(tmp_path, capsys):
    write_class_folders(tmp_path / "dtd/images", {"banded": 10, "woven": 10})
    assert run("--dataset", "dtd", "--root", tmp_path) == 0
    file = tmp_path / "dtd/split_visionpeft_DescribableTextures.json"
    before = file.read_bytes()
    assert run("--dataset", "dtd", "--root", tmp_path, "--seed", 2) == 2
    assert "exists; remove it to build the split again" in capsys.readouterr().err
    assert file.read_bytes() == before
    file.unlink()
    assert run("--dataset", "dtd", "--root", tmp_path) == 0
    assert file.read_bytes() == before
    file.unlink()
    assert run("--dataset", "dtd", "--root", tmp_path, "--seed", 2) == 0
    assert file.read_bytes() != before


def test_caltech_leaves_two_folders_out(tmp_path):
    folders = ["BACKGROUND_Google", "Faces_easy", "Faces", "Leopards", "Motorbikes", "accordion", "airplanes"]
    write_class_folders(tmp_path / "caltech-101/101_ObjectCategories", dict.fromkeys(folders, 10))
    assert run("--dataset", "caltech101", "--root", tmp_path) == 0
    content = content_of(tmp_path / "caltech-101/split_visionpeft_Caltech101.json")
    names = {label: name for _, label, name in content["train"]}
    assert names == {0: "face", 1: "leopard", 2: "motorbike", 3: "accordion", 4: "airplane"}


def test_pets(tmp_path):
    folder = tmp_path / "oxford_pets"
    lines = {"trainval": ["# comment"], "test": []}
    for label, breed in ((1, "Abyssinian"), (2, "american_bulldog")):
        for number in range(12):
            split = "trainval" if number < 10 else "test"
            write_image(folder / f"images/{breed}_{number}.jpg", number)
            lines[split].append(f"{breed}_{number} {label} 1 1")
    (folder / "annotations").mkdir()
    for split, content in lines.items():
        (folder / f"annotations/{split}.txt").write_text("\n".join(content))
    assert run("--dataset", "pets", "--root", tmp_path) == 0
    content = content_of(folder / "split_visionpeft_OxfordPets.json")
    assert {split: counts(content[split]) for split in ("train", "val", "test")} == {
        "train": {0: 8, 1: 8},
        "val": {0: 2, 1: 2},
        "test": {0: 2, 1: 2},
    }
    assert content["test"][-1] == ["american_bulldog_11.jpg", 1, "american_bulldog"]
    assert FewShot("pets", tmp_path, split="own", shots=1).class_names == ["abyssinian", "american bulldog"]


def test_sun(tmp_path):
    folder = tmp_path / "sun397"
    classes = ["/a/abbey", "/a/apse/indoor"]
    for name in classes:
        for number in range(7):
            write_image(folder / f"SUN397{name}/sun_{number}.jpg", number)
    folder.joinpath("ClassName.txt").write_text("\n".join(classes))
    for file, numbers in (("Training_01.txt", range(5)), ("Testing_01.txt", range(5, 7))):
        folder.joinpath(file).write_text("\n".join(f"{name}/sun_{n}.jpg" for name in classes for n in numbers))
    assert run("--dataset", "sun397", "--root", tmp_path) == 0
    content = content_of(folder / "split_visionpeft_SUN397.json")
    assert content["test"][-1] == ["a/apse/indoor/sun_6.jpg", 1, "indoor apse"]
    assert (len(content["train"]), len(content["val"])) == (8, 2)


def test_ucf(tmp_path):
    folder = tmp_path / "ucf101"
    lists = folder / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    for file, numbers in (("trainlist01.txt", range(5)), ("testlist01.txt", range(5, 6))):
        lines = []
        for label, (action, name) in enumerate(
            {"ApplyEyeMakeup": "Apply_Eye_Makeup", "YoYo": "Yo_Yo"}.items(), start=1
        ):
            for number in numbers:
                write_image(folder / f"UCF-101-midframes/{name}/v_{action}_g0{number}_c01.jpg", number)
                lines.append(f"{action}/v_{action}_g0{number}_c01.avi {label}")
        (lists / file).write_text("\n".join(lines))
    assert run("--dataset", "ucf101", "--root", tmp_path) == 0
    content = content_of(folder / "split_visionpeft_UCF101.json")
    assert content["test"] == [
        ["Apply_Eye_Makeup/v_ApplyEyeMakeup_g05_c01.jpg", 0, "Apply_Eye_Makeup"],
        ["Yo_Yo/v_YoYo_g05_c01.jpg", 1, "Yo_Yo"],
    ]
    assert FewShot("ucf101", tmp_path, split="own", shots=1).class_names == ["Apply Eye Makeup", "Yo Yo"]
    (folder / "UCF-101-midframes/Yo_Yo/v_YoYo_g05_c01.jpg").unlink()
    (folder / "split_visionpeft_UCF101.json").unlink()
    assert run("--dataset", "ucf101", "--root", tmp_path) == 2
    assert not (folder / "split_visionpeft_UCF101.json").exists()


def test_flowers_and_cars(tmp_path):
    io = pytest.importorskip("scipy.io")
    numpy = pytest.importorskip("numpy")
    flowers = tmp_path / "oxford_flowers"
    for number in range(1, 21):
        write_image(flowers / f"jpg/image_{number:05d}.jpg", number)
    io.savemat(flowers / "imagelabels.mat", {"labels": numpy.array([[77] * 10 + [1] * 10], numpy.uint8)})
    assert run("--dataset", "flowers", "--root", tmp_path) == 0
    content = content_of(flowers / "split_visionpeft_OxfordFlowers.json")
    names = {label: name for split in ("train", "val", "test") for _, label, name in content[split]}
    assert names == {0: "pink primrose", 76: "passion flower"}
    cars = tmp_path / "stanford_cars"
    (cars / "devkit").mkdir(parents=True)
    kind = numpy.dtype([("class", object), ("fname", object)])
    for split, file, count in (
        ("cars_train", "devkit/cars_train_annos.mat", 10),
        ("cars_test", "cars_test_annos_withlabels.mat", 2),
    ):
        entries = numpy.empty((1, count), kind)
        for number in range(count):
            write_image(cars / split / f"{number:05d}.jpg", number)
            entries[0, number] = (1 if number % 2 else 14, f"{number:05d}.jpg")
        io.savemat(cars / file, {"annotations": entries})
    assert run("--dataset", "cars", "--root", tmp_path) == 0
    content = content_of(cars / "split_visionpeft_StanfordCars.json")
    assert sorted(content["test"]) == [
        ["cars_test/00000.jpg", 13, "2012 Audi TTS Coupe"],
        ["cars_test/00001.jpg", 0, "2000 AM General Hummer SUV"],
    ]
    assert (len(content["train"]), len(content["val"])) == (8, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "imagenet", "--root", "."], "ImageNet has an official split; there is nothing to build"),
        (["--dataset", "eurosta", "--root", "."], "unknown few-shot data set 'eurosta': did you mean eurosat"),
        (["--dataset", "eurosat", "--root", "nowhere"], "EuroSAT is not under nowhere: expected nowhere/eurosat/2750"),
        (["--dataset", "eurosat"], "the following arguments are required: --root; see python -m visionpeft.prepare"),
        (["--dataset", "eurosat", "--root", ".", "--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_wrong_command_lines(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_classes(tmp_path, capsys):
    (tmp_path / "dtd/images").mkdir(parents=True)
    assert run("--dataset", "dtd", "--root", tmp_path) == 2
    assert "holds fewer than two classes of images" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "dtd").iterdir()] == ["images"]


def test_too_few_images(tmp_path, capsys):
    write_class_folders(tmp_path / "dtd/images", {"banded": 10, "woven": 2})
    assert run("--dataset", "dtd", "--root", tmp_path) == 2
    assert "class 'woven' has 2 images, too few for train, val and test" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "dtd").iterdir()] == ["images"]
