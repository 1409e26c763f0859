"""Views: fixed augmentations that come round again, and the views of a test image."""

import numpy as np
import pytest
import torch
from data_layouts import SMALL, write_class_folders
from PIL import Image

from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.data import FewShot, ImageFolder
from visionpeft.data.transforms import ImageTransform
from visionpeft.data.views import OPERATIONS, ImageViews
from visionpeft.errors import ConfigurationError, DataError


@pytest.fixture
def folders(tmp_path):
    tmp_path = tmp_path / "photos"
    for split, count in {"train": 4, "val": 2, "test": 3}.items():
        write_class_folders(tmp_path / split, {"a": count, "b": count})
    return tmp_path


def module(root, **options):
    data = ImageFolder(root, **{"batch_size": 4, "seed": 5, "augmentation": "random_resized_crop", **options})
    data.preprocessing = SMALL
    data.setup()
    return data


def picture(width=48, height=36):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((4 * width, 4 * height), Image.Resampling.BICUBIC)


def test_views_come_round_again(folders):
    dataset = module(folders, views=3).dataset("train")
    seen = [dataset[(2, epoch)][0] for epoch in range(7)]
    for epoch in range(7):
        assert torch.equal(seen[epoch], seen[epoch % 3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    # the first ones are those of a run that never repeats
    endless = module(folders).dataset("train")
    assert all(torch.equal(endless[(2, epoch)][0], seen[epoch]) for epoch in range(3))
    assert not torch.equal(endless[(2, 3)][0], seen[3])


def test_deterministic_views(folders):
    assert module(folders).deterministic_views is None
    assert module(folders, views=4).deterministic_views == 4
    assert module(folders, augmentation="none").deterministic_views == 1
    assert module(folders, augmentation="none", views=4).deterministic_views == 1
    assert module(folders, views=4).description()["views"] == 4
    assert "views" not in module(folders).description()


def test_test_batches_of_views(folders):
    data = module(folders, test_views=5)
    batches = list(data.test_dataloader())
    assert [tuple(images.shape) for images, _ in batches] == [(4, 5, 3, 16, 16), (2, 5, 3, 16, 16)]
    images = torch.cat([images for images, _ in batches])
    plain = torch.cat([images for images, _ in module(folders).test_dataloader()])
    assert torch.equal(images[:, 0], plain)
    assert all(not torch.equal(images[:, 0], images[:, view]) for view in range(1, 5))
    assert len({tuple(view.flatten().tolist()) for view in images[0]}) == 5
    # of the other splits nothing changes
    assert next(iter(data.val_dataloader()))[0].shape == (4, 3, 16, 16)
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 16, 16)
    record = data.description()
    assert (record["test_views"], record["augmix"]) == (5, False)


@pytest.mark.parametrize("augmix", [False, True])
def test_views_depend_on_seed_and_index_alone(folders, augmix):
    data = module(folders, test_views=4, augmix=augmix)
    first = data.dataset("test")
    state = torch.get_rng_state()
    backwards = {index: first[index][0] for index in reversed(range(6))}
    assert torch.equal(torch.get_rng_state(), state)
    second = module(folders, test_views=4, augmix=augmix, num_workers=1, batch_size=5)
    images = torch.cat([images for images, _ in second.test_dataloader()])
    assert all(torch.equal(images[index], backwards[index]) for index in range(6))
    other = module(folders, test_views=4, augmix=augmix, seed=6).dataset("test")[0][0]
    assert torch.equal(other[0], images[0, 0])
    assert not torch.equal(other[1], images[0, 1])


def test_fewer_views_are_the_first_ones():
    many, few = (ImageViews(SMALL, "crop", views) for views in (6, 3))
    image = many.prepare(picture())
    assert torch.equal(many.augment(image, 1, 0, 2)[:3], few.augment(image, 1, 0, 2))


def test_random_views_are_cut_from_the_original_image():
    # Left half black, right half white: the evaluation crop of a wide image never sees its ends, a random cut does.
    wide = np.zeros((40, 400, 3), np.uint8)
    wide[:, 390:] = 255
    views = ImageViews(Preprocessing((16, 16), (0.0,) * 3, (1.0,) * 3), "crop", 300)
    made = views.augment(views.prepare(Image.fromarray(wide)), 3)
    assert made[0].max() == 0
    assert made[1:].max() > 200


def test_normalised_as_other_images():
    views = ImageViews(SMALL, "crop", 3)
    made = views.augment(views.prepare(picture()), 1)
    assert made.shape == (3, 3, 16, 16)
    assert made.min() >= 0
    assert made.max() <= 255
    expected = (made.double() / 255 - 0.5) / 0.5
    torch.testing.assert_close(views.normalise(made).double(), expected, atol=1e-5, rtol=0)


def test_augmix_mixes_the_cut_view():
    size = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)
    mixed = ImageViews(size, "crop", 9, augmix=True)
    image = mixed.prepare(picture())
    made = mixed.augment(image, 7)
    plain = ImageViews(size, "crop", 9).augment(image, 7)
    assert torch.equal(made[0], plain[0])
    # nothing is drawn before the first cut, so it is the same with and without mixing: similar, but not equal
    assert not torch.equal(made[1], plain[1])
    assert torch.corrcoef(torch.stack([made[1].flatten(), plain[1].flatten()]))[0, 1] > 0.3
    assert made.min() >= 0
    assert made.max() <= 255
    assert not torch.equal(made[1], made[1].round())  # a mixture, not one of the copies


def test_augmix_operations_are_mild():
    image = Image.fromarray(np.full((224, 224, 3), 100, np.uint8))
    torch.manual_seed(0)
    shapes = {operation(image, 0.999).size for operation in OPERATIONS}
    assert shapes == {(224, 224)}
    marked = np.zeros((224, 224, 3), np.uint8)
    marked[112, 112] = 255
    moved = []
    for operation in OPERATIONS[5:]:  # shears and translations
        for _ in range(4):
            pixels = np.asarray(operation(Image.fromarray(marked), 0.999)).astype(float)[..., 0]
            if pixels.sum() > 0:
                rows, columns = np.nonzero(pixels)
                moved.append(max(abs(rows - 112).max(), abs(columns - 112).max()))
    assert 0 < max(moved) <= 8  # 7 pixels of translation, 0.03 * 112 of shear
    dark = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    assert np.asarray(OPERATIONS[4](dark, 0.999)).max() == 200  # solarizes from 231 on
    bright = Image.fromarray(np.full((8, 8, 3), 255, np.uint8))
    assert np.asarray(OPERATIONS[4](bright, 0.1)).max() == 0
    assert np.asarray(OPERATIONS[2](Image.fromarray(np.full((2, 2, 3), 0xAB, np.uint8)), 0.5)).max() == 0xA0


def test_test_batch_size(folders):
    data = module(folders, batch_size=1, test_batch_size=4)
    assert [len(labels) for _, labels in data.train_dataloader()] == [1] * 8
    assert [len(labels) for _, labels in data.val_dataloader()] == [4]
    assert [len(labels) for _, labels in data.test_dataloader()] == [4, 2]


def test_works_with_few_shot():
    data = FewShot("clipart", shots=1, test_views=3, augmix=True, test_samples=4, batch_size=2)
    data.preprocessing = SMALL
    data.setup()
    assert next(iter(data.test_dataloader()))[0].shape == (2, 3, 3, 16, 16)


def generate(folders, counts=(2, 2, 2)):
    """Pictures made from each test image, all of one value by image and picture."""
    for label in "ab":
        for index, image in enumerate(sorted((folders / "test" / label).iterdir())):
            made = folders.with_name("made") / label / image.stem
            made.mkdir(parents=True)
            for picture in range(counts[index]):
                Image.new("RGB", (20, 16), (40 * index + picture,) * 3).save(made / f"{picture}.png")
    return folders.with_name("made")


def test_generated_views_come_after_the_others(folders):
    data = module(folders, test_views=3, generated_views=generate(folders), normalisation="none", test_batch_size=6)
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (6, 5, 3, 16, 16)
    without, _ = next(iter(module(folders, test_views=3, normalisation="none", test_batch_size=6).test_dataloader()))
    assert torch.equal(images[:, :3], without)
    for row, image in enumerate(images):
        for picture in (0, 1):
            expected = torch.full((3, 16, 16), (40 * (row % 3) + picture) / 255)
            torch.testing.assert_close(image[3 + picture], expected)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.description()["generated_views"] == 2
    # of the test images in another order, and of a part of them, each has its own
    shuffled = module(
        folders, test_views=3, generated_views=folders.with_name("made"), test_order="shuffled", test_samples=4
    )
    for index, path in enumerate(shuffled.sources["test"].paths):
        assert {file.parent.name for file in shuffled.generated.files[index]} == {path.stem}
    with pytest.raises(DataError, match="should hold images generated from the test image"):
        module(folders, test_views=3, generated_views=folders / "nowhere")


def test_generated_views_are_refused(folders):
    made = generate(folders, counts=(2, 2, 1))
    with pytest.raises(DataError, match="holds 1 generated images, and that of the first test image 2"):
        module(folders, test_views=3, generated_views=made)
    with pytest.raises(ConfigurationError, match="beside other views of test images; set test_views"):
        module(folders, generated_views=made)
    with pytest.raises(ConfigurationError, match="this data set has no such files"):
        FewShot(
            "folder",
            folders / "train",
            shots=1,
            val_fraction=0.0,
            test_fraction=0.0,
            test_views=2,
            generated_views=made,
        )


def test_refusals(folders):
    with pytest.raises(ConfigurationError, match="views 0 must be 1 or more, or absent"):
        module(folders, views=0)
    with pytest.raises(ConfigurationError, match="test_views -1 must be 1 or more, or absent"):
        module(folders, test_views=-1)
    with pytest.raises(ConfigurationError, match="augmix mixes the random views of test images; set test_views"):
        module(folders, augmix=True)
    with pytest.raises(ConfigurationError, match="unknown resize"):
        ImageTransform(SMALL, "fit")
