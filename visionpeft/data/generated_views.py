"""Images that a user has generated from each test image, as further views of it."""

from pathlib import Path

import torch

from visionpeft.data.dataset import ImageDataset
from visionpeft.data.images import list_images, open_image
from visionpeft.data.records import ImageFiles, Source
from visionpeft.errors import ConfigurationError, DataError


def check_generated_views(test_views: int | None, source: Source | None) -> None:
    """Refuse generated views where nothing could be done with them.

    Args:
        test_views: the other views of a test image.
        source: the test images, None if there are none.

    Raises:
        ConfigurationError: there are no other views, no test images, or they are no files.
    """
    if test_views is None:
        raise ConfigurationError("generated_views come beside other views of test images; set test_views, too")
    if getattr(type(source), "image", None) is not ImageFiles.image:
        raise ConfigurationError(
            "generated_views are found by the path of each test image, and this data set has no such files"
        )


class GeneratedViews:
    """Generated images by the test image they were made from: `root/<its folder>/<its name without ending>/`.

    Args:
        root: the folder.
        source: the test images, which are files.

    Raises:
        DataError: a test image without generated images, or with another number of them than the first; two test images
            of one name in folders of one name.
    """

    def __init__(self, root: str | Path, source: ImageFiles):
        self.files: list[list[Path]] = []
        owners: dict[Path, Path] = {}
        for path in source.paths:
            folder = Path(root) / path.parent.name / path.stem
            if (other := owners.setdefault(folder, path)) != path:
                raise DataError(
                    f"the test images {other} and {path} would both have their generated images in {folder}"
                )
            found = sorted(list_images(folder)) if folder.is_dir() else []
            if not found:
                raise DataError(f"{folder} should hold images generated from the test image {path}, and holds none")
            if self.files and len(found) != len(self.files[0]):
                raise DataError(
                    f"{folder} holds {len(found)} generated images, and that of the first test image "
                    f"{len(self.files[0])}; every test image needs as many"
                )
            self.files.append(found)

    @property
    def count(self) -> int:
        """Generated images of each test image."""
        return len(self.files[0])


class WithGeneratedViews(ImageDataset):
    """Images (V + G, 3, H, W): V views that `ImageViews` makes, then G generated ones, prepared as view 0 is.

    Args:
        generated: the generated images.
        *args: for `ImageDataset`, as are the further ones.
    """

    def __init__(self, generated: GeneratedViews, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generated = generated

    def _named_input(self, index: int, epoch: int) -> tuple[torch.Tensor, bytes | None]:
        views, _ = super()._named_input(index, epoch)
        plain = self.transform.plain
        made = [plain.prepare(open_image(file)).float() for file in self.generated.files[index]]
        return torch.cat((views, torch.stack(made))), None
