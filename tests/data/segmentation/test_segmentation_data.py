"""Data sets of images with masks: layouts, pairs, splits, and image and mask that are treated alike."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from small_mask_runs import CLASSES, draw_masked

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data import ADE20K, Cityscapes, ComposedScenes, MaskFolder, VOCSegmentation
from visionpeft.data.segmentation.composed_scenes import class_names, compose, compose_objects, drawings
from visionpeft.data.segmentation.transforms import MaskedTransform
from visionpeft.errors import ConfigurationError, DataError

PLAIN = Preprocessing(
    input_size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bilinear", crop_pct=1.0
)


@pytest.fixture
def masked(tmp_path):
    return draw_masked(tmp_path / "squares", count=10)


def module(cls, *arguments, **options):
    made = cls(*arguments, **options)
    made.preprocessing = PLAIN
    made.setup()
    return made


def test_folder_is_divided_by_names(masked):
    data = module(MaskFolder, masked, CLASSES, batch_size=3)
    sizes = {split: len(source) for split, source in data.sources.items()}
    assert sizes == {"train": 7, "val": 1, "test": 2}
    assert len({path for source in data.sources.values() for path in source.paths}) == 10
    again = module(MaskFolder, masked, CLASSES)
    assert again.sources["test"].paths == data.sources["test"].paths
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((3, 3, 32, 32), torch.float32)
    assert (masks.shape, masks.dtype) == ((3, 32, 32), torch.int64)
    assert set(masks.unique().tolist()) <= {-1, 0, 1, 2}


@pytest.mark.parametrize("outside", [True, False])
def test_folders_of_splits(masked, tmp_path, outside):
    for kind in ("images", "masks"):
        for index, path in enumerate(sorted((masked / kind).iterdir())):
            split = ("Train", "val")[index % 2]
            place = tmp_path / "own" / (f"{split}/{kind}" if outside else f"{kind}/{split}")
            place.mkdir(parents=True, exist_ok=True)
            suffix = "_seg" if kind == "masks" else ""
            path.rename(place / f"{path.stem}{suffix}.png")
    data = module(MaskFolder, tmp_path / "own", CLASSES, suffix="_seg")
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 5, "val": 5}
    assert data.sources["val"].mask(0).max() == 2


def test_what_is_wrong_names_the_file(masked, tmp_path):
    def everything(**options):
        data = module(MaskFolder, masked, **options)
        return [list(data.dataset(split)) for split in data.sources]

    def refused(message, kind=DataError, **options):
        with pytest.raises(kind, match=message):
            everything(**{"classes": CLASSES} | options)

    refused(r"0\d.png holds the value 2 in \d+ pixels", classes=CLASSES[:2])
    refused("class 'ground' is named twice", classes=["ground", "ground"])
    refused("neither a list of names nor a text file", classes="nowhere.txt")
    refused("must not be negative and sum below 1", ConfigurationError, val_fraction=0.5, test_fraction=0.5)
    refused("at least 1 pixel", ConfigurationError, size=0)
    refused("two positive factors", ConfigurationError, scale=(2.0, 1.0))
    refused("2 colours for 3 classes", ConfigurationError, palette=[[0, 0, 0], [9, 9, 9]])
    Image.new("L", (31, 32)).save(masked / "masks" / "03.png")
    refused(r"mask .*03.png has 31 x 32 pixels, but its image .*03.png has 32 x 32")
    assert sum(module(MaskFolder, masked, CLASSES, skip_corrupt=True).skipped.values()) == 1
    (masked / "masks" / "03.png").unlink()
    refused(r"image .*images/03.png has no mask .*masks/03.png, nor of another ending; add it, or set skip_corrupt")
    data = MaskFolder(masked, CLASSES, skip_corrupt=True)
    assert sum(len(source) for source in data.sources.values()) == 9
    assert "1 images in " in (note := data.description()["notes"][0])
    assert "left out, as they have no mask: " in note
    assert "03.png" in note
    twice = masked / "images" / "02.bmp"
    Image.open(masked / "images" / "02.png").save(twice)
    refused(r"images .*02.bmp and .*02.png would both have the mask .*masks/02; leave one of them", skip_corrupt=True)
    twice.unlink()
    refused("10 of 10 images have none", skip_corrupt=True, suffix="_elsewhere")
    (masked / "images" / "03.png").unlink()
    Image.new("L", (32, 32)).save(masked / "masks" / "alone.png")
    assert "alone" in str(MaskFolder(masked, CLASSES).description()["notes"])
    refused("has no folder pictures/", images="pictures")


def test_rotated_photographs_have_the_size_they_show(masked):
    image = Image.open(masked / "images" / "00.png").resize((20, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    (masked / "images" / "00.png").unlink()
    image.save(masked / "images" / "00.jpg", exif=exif)
    Image.new("L", (32, 20)).save(masked / "masks" / "00.png")
    data = MaskFolder(masked, CLASSES, val_fraction=0, test_fraction=0)
    assert data.sources["train"].mask(0).shape == (20, 32) == data.sources["train"].image(0).size[::-1]


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("orientation", [2, 3, 4, 6])
def test_a_mask_with_the_flag_of_the_camera_is_turned_as_its_image(tmp_path, orientation, ending):
    """Numbers, a palette and 16 bits, each as a program leaves them that copies the metadata of the photograph."""
    classes = np.zeros((8, 12), np.uint8)
    classes[1:3, 2:9] = 1
    classes[5:, 10:] = 2
    palette = Image.fromarray(classes)
    palette.putpalette([0, 0, 0, 100, 0, 0, 0, 100, 0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    kinds = {"gray": Image.fromarray(classes), "palette": palette, "deep": Image.fromarray(classes.astype(np.uint16))}
    for name, mask in kinds.items():
        Image.fromarray(100 * classes).save(tmp_path / "images" / f"{name}.{ending}", exif=exif)
        mask.save(tmp_path / "masks" / f"{name}.{ending}", exif=exif)
    data = module(MaskFolder, tmp_path, CLASSES, val_fraction=0, test_fraction=0)
    data.setup()
    source = data.sources["train"]
    for index in range(3):
        image = np.asarray(source.image(index).convert("L"))
        assert np.array_equal(source.mask(index), image // 100)
        assert not np.array_equal(image[: len(classes)], 100 * classes[:, : image.shape[1]])


def test_image_and_mask_move_together():
    """A mask that is drawn in the image as its colour stays on it, through scaling, cropping and mirroring."""
    classes = np.zeros((40, 60), np.int64)
    classes[5:30, 8:37] = 1
    image = Image.fromarray((classes[..., None] * np.array([255, 255, 255])).astype(np.uint8))
    transform = MaskedTransform(PLAIN, 32, (0.5, 2.0), flip=True)
    drawn = []
    for seed in range(12):
        pixels, mask = transform.train(image, classes, 0, seed, 0)
        assert pixels.shape == (3, 32, 32)
        labelled = mask >= 0
        agree = ((pixels[0] > 127) == (mask == 1))[labelled].float().mean()
        assert agree > 0.97  # but for rounding at the edges
        assert (pixels[0][~labelled] == 128).all()  # the mean colour where the image is filled up
        drawn.append(mask)
    assert any((mask == -1).any() for mask in drawn)
    again = transform.train(image, classes, 0, 3, 0)[1]
    assert torch.equal(again, drawn[3])
    assert not torch.equal(drawn[3], drawn[4])


def test_a_very_long_image_is_bounded_by_its_longer_side():
    """By its shorter one alone a strip of 20 x 4000 would have 52 million pixels at 512."""
    transform = MaskedTransform(PLAIN, 512)
    assert transform.measure(Image.new("RGB", (20, 4000))).shape == (3, 16 * 512, 40)
    assert transform.measure(Image.new("RGB", (160, 10))).shape == (3, 512, 16 * 512)
    assert transform.measure(Image.new("RGB", (300_000, 1))).shape == (3, 1, 16 * 512)
    pixels, mask = transform.train(Image.new("RGB", (4000, 20), "red"), np.zeros((20, 4000), np.int64), 3)
    assert torch.equal((pixels == torch.tensor([255, 0, 0])[:, None, None]).all(0), mask == 0)
    assert (mask == 0).any()


def test_to_measure_only_the_image_is_resized(masked):
    data = module(MaskFolder, masked, CLASSES, size=16)
    image, mask = data.dataset("test")[0]
    assert image.shape == (3, 16, 16)
    assert np.array_equal(mask, np.asarray(Image.open(data.sources["test"].masks[0])))


def test_images_of_two_sizes_make_no_batch(masked):
    data = module(MaskFolder, masked, CLASSES, test_batch_size=2)
    for folder in (data.sources["test"].paths[0], data.sources["test"].masks[0]):
        Image.open(folder).resize((20, 32), Image.Resampling.NEAREST).save(folder)
    with pytest.raises(DataError, match="test_batch_size 1"):
        list(data.test_dataloader())


def voc(root):
    folder = root / "VOCdevkit" / "VOC2012"
    lists = {"train": ["a", "b"], "val": ["c"]}
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "SegmentationClassAug"):
        (folder / name).mkdir(parents=True)
    for split, names in lists.items():
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    for label, name in enumerate(["a", "b", "c", "d"]):
        Image.new("RGB", (8, 8)).save(folder / "JPEGImages" / f"{name}.jpg")
        Image.new("P", (8, 8), label).save(folder / "SegmentationClass" / f"{name}.png")
        Image.new("L", (8, 8), label + 10).save(folder / "SegmentationClassAug" / f"{name}.png")
    return root


def test_voc(tmp_path):
    root = voc(tmp_path)
    data = module(VOCSegmentation, root, val_fraction=0)
    assert [path.stem for path in data.sources["train"].paths] == ["a", "b"]
    assert [path.stem for path in data.sources["test"].paths] == ["c"]
    assert len(data.class_names) == 21
    assert data.class_names[15] == "person"
    data = module(VOCSegmentation, root, aug=True, val_fraction=0)
    assert [path.stem for path in data.sources["train"].paths] == ["a", "b", "d"]  # c is one to test on
    assert [int(data.sources["train"].mask(index)[0, 0]) for index in range(3)] == [0, 1, 13]
    with pytest.raises(DataError, match=r"no list .*sbd/train.txt"):
        VOCSegmentation(root, aug=True, sbd=tmp_path / "sbd")
    for name in ("img", "cls"):
        (tmp_path / "sbd" / name).mkdir(parents=True)
    classes = np.array([[0, 5], [20, 255]], np.uint8)
    savemat(tmp_path / "sbd" / "cls" / "d.mat", {"GTcls": np.array([(classes,)], [("Segmentation", object)])})
    Image.new("RGB", (2, 2)).save(tmp_path / "sbd" / "img" / "d.jpg")
    for split, names in (("train", "a d"), ("val", "c")):  # a has a mask of VOC, and c is one to test on
        (tmp_path / "sbd" / f"{split}.txt").write_text(names.replace(" ", "\n"))
    data = module(VOCSegmentation, root, aug=True, sbd=tmp_path / "sbd", val_fraction=0)
    assert [path.stem for path in data.sources["train"].paths] == ["a", "b", "d"]
    assert data.sources["train"].mask(2).tolist() == [[0, 5], [20, -1]]
    with pytest.raises(DataError, match="holds no VOCdevkit/VOC2012"):
        VOCSegmentation(tmp_path / "elsewhere")


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / "images" / split / f"{name}.jpg")
        Image.fromarray(np.array([[0, 1], [150, 3]], np.uint8).repeat(2, 0).repeat(2, 1)).save(
            root / "annotations" / split / f"{name}.png"
        )
    with pytest.raises(DataError, match=r"objectInfo150\.txt"):
        ADE20K(tmp_path)
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{i}\t0.1\t1\t1\t0\tname {i}, other" for i in range(1, 151))]
    (root / "objectInfo150.txt").write_text("\n".join(lines))
    data = module(ADE20K, tmp_path, val_fraction=0)
    assert data.class_names[0] == "name 1, other"
    assert data.sources["test"].mask(0)[::2, ::2].tolist() == [[-1, 0], [149, 2]]


def test_cityscapes(tmp_path):
    for split, city, number in (("train", "ulm", 1), ("train", "aachen", 2), ("val", "lindau", 3)):
        stem = f"{city}_00000{number}_000019"
        for kind, name in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            (tmp_path / kind / split / city).mkdir(parents=True)
            pixels = np.full((8, 16, 3), number, np.uint8)
            if kind == "gtFine":
                pixels = np.arange(128, dtype=np.uint8).reshape(8, 16) % 34  # all numbers there are
                Image.fromarray(pixels).save(tmp_path / kind / split / city / f"{stem}_gtFine_instanceIds.png")
            Image.fromarray(pixels).save(tmp_path / kind / split / city / f"{stem}_{name}.png")
    data = module(Cityscapes, tmp_path, val_fraction=0.5, size=4)
    assert {split: len(source) for split, source in data.sources.items()} == {"train": 1, "val": 1, "test": 1}
    names = "road sidewalk building wall fence pole light sign vegetation terrain sky person rider car truck bus train"
    assert [name.split()[-1] for name in data.class_names] == [*names.split(), "motorcycle", "bicycle"]
    assert data.palette[0] == [128, 64, 128]
    # the table of cityscapesScripts: number of the label -> train id
    trained = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    trained |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    expected = [trained.get(number % 34, -1) for number in range(128)]
    assert data.sources["test"].mask(0).flatten().tolist() == expected
    assert data.dataset("train")[0][0].shape == (3, 4, 4)
    assert data.dataset("test")[0][0].shape == (3, 1024, 2048)  # however large a training square is
    assert data.dataset("test")[0][1].shape == (8, 16)
    assert module(Cityscapes, tmp_path, size=4, test_size=None).dataset("test")[0][0].shape == (3, 4, 8)
    ordered = [path.parent.name for path in module(Cityscapes, tmp_path, val_fraction=0).sources["train"].paths]
    assert ordered == ["aachen", "ulm"]
    (tmp_path / "gtFine/val/lindau/lindau_000003_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match=r"lindau_000003_000019_gtFine_labelIds\.png does not exist"):
        module(Cityscapes, tmp_path)
    with pytest.raises(DataError, match=r"no folder .*leftImg8bit/train; root must hold leftImg8bit and gtFine"):
        Cityscapes(tmp_path / "elsewhere")


def test_scenes_are_the_same_again_and_exact():
    assert class_names() == ["background", "animal", "building", "flag", "person", "plant", "vehicle", "thing"]
    image, mask = compose("train", 5, 64, 0)
    compose_objects.cache_clear()
    image_again, mask_again = compose("train", 5, 64, 0)
    assert image.tobytes() == image_again.tobytes()
    assert np.array_equal(mask, mask_again)
    assert not np.array_equal(mask, compose("train", 5, 64, 1)[1])
    paths = [set().union(*map(set, drawings(split).values())) for split in ("train", "val", "test")]
    assert not any(paths[i] & paths[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    data = module(ComposedScenes, train=4, val=0, test=3, side=64, size=64)
    assert set(data.sources) == {"train", "test"}
    images, masks = next(iter(data.test_dataloader()))
    assert images.shape == (3, 3, 64, 64)
    assert np.array_equal(masks[1], compose("test", 1, 64, 0)[1])


def test_what_a_mask_says_is_what_is_drawn():
    """Outside of the mask a scene is its texture, which is smooth; inside it are drawings."""
    differs = []
    for number in range(6):
        image, mask = compose("test", number, 64, 0)
        changes = np.abs(np.diff(np.asarray(image, np.float64), axis=0)).mean(-1)
        inside = mask[1:] > 0
        differs.append((changes[inside].mean(), changes[~inside].mean()))
    assert sum(inside > outside for inside, outside in differs) >= 5
