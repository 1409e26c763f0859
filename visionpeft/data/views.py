"""Views of a test image for test-time methods: the usual one and random crops, as TPT makes them.

Shu et al. 2022, "Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models" (arXiv 2209.07511);
AugMix: Hendrycks et al. 2020, "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty"
(arXiv 1912.02781).
"""

from collections.abc import Callable

import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from visionpeft.backbones.preprocessing import Preprocessing, Resize
from visionpeft.data.ordering import mix
from visionpeft.data.transforms import ImageTransform
from visionpeft.errors import ConfigurationError

CHAINS = 3
LONGEST_CHAIN = 3


class ImageViews:
    """V views of an image, drawn by seeds alone; view 0 is the image as it is evaluated.

    The other views are cut from the original image at random (8 to 100 % of its area, aspect 3/4 to 4/3, resized
    bilinearly to the input size) and half of them flipped. With AugMix a view x becomes m x + (1 - m) sum_i w_i c_i(x)
    with m from Beta(1, 1), w from Dirichlet(1, 1, 1), and c_i a chain of 1 to 3 random operations; mixing pixels or
    normalised values is the same.

    Args:
        preprocessing: input size and normalisation of the backbone.
        resize: how view 0 is made: "squash", or "crop": resize to cover, then cut the centre.
        views: V, view 0 included.
        augmix: mix the random views.

    Raises:
        ConfigurationError: fewer than one view.
    """

    def __init__(self, preprocessing: Preprocessing, resize: Resize, views: int, augmix: bool = False):
        if views < 1:
            raise ConfigurationError(f"test_views {views} must be 1 or more")
        self.plain = ImageTransform(preprocessing, resize, "none")
        self.views = views
        self.augmix = augmix
        self._random = v2.Compose(
            [
                v2.RandomResizedCrop(self.plain.size, interpolation=InterpolationMode.BILINEAR, antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        )

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """The original image: uint8 (3, h, w)."""
        return F.pil_to_tensor(image)

    def augment(self, image: torch.Tensor, *seeds: int) -> torch.Tensor:
        """All views of a prepared image: float32 (V, 3, H, W), in 0 to 255."""
        original = F.to_pil_image(image)
        made = [self.plain.prepare(original).float()]
        with torch.random.fork_rng(devices=[]):
            # The CPU generator only: torch.manual_seed would also reset the accelerator's.
            torch.default_generator.manual_seed(int(mix(*seeds)[0] >> 1))
            for _ in range(self.views - 1):
                view = self._random(original)
                made.append(augmix(view) if self.augmix else F.pil_to_tensor(view).float())
        return torch.stack(made)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) in 0 to 255 -> float32, `(image / 255 - mean) / std`."""
        return images.sub(self.plain.mean).div_(self.plain.std)


def augmix(image: Image.Image) -> torch.Tensor:
    """Mix an RGB image with three augmented copies, drawn from torch's generator: float32 (3, H, W) in 0 to 255."""
    weights = torch.distributions.Dirichlet(torch.ones(CHAINS)).sample()
    share = torch.rand(())  # Beta(1, 1)
    plain = F.pil_to_tensor(image).float()
    mixed = torch.zeros_like(plain)
    for weight in weights:
        copy = image
        for _ in range(_integer(1, LONGEST_CHAIN)):
            operation = OPERATIONS[_integer(0, len(OPERATIONS) - 1)]
            copy = operation(copy, float(torch.empty(()).uniform_(0.1, 1.0)))
        mixed += weight * F.pil_to_tensor(copy)
    return share * plain + (1 - share) * mixed


def _integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def _sign() -> int:
    return 2 * _integer(0, 1) - 1


def _affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)


# Levels lie in 0.1 to 1. Whole degrees, pixels and thresholds are cut off as the reference does, so that rotations stay
# within 2 degrees and translations within 7 of 224 pixels.
OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, level: ImageOps.autocontrast(image),
    lambda image, level: ImageOps.equalize(image),
    lambda image, level: ImageOps.posterize(image, 4),
    lambda image, level: image.rotate(_sign() * int(3 * level), resample=Image.Resampling.BILINEAR),
    lambda image, level: ImageOps.solarize(image, 256 - int(25.6 * level)),
    lambda image, level: _affine(image, 1, _sign() * 0.03 * level, 0, 0, 1, 0),
    lambda image, level: _affine(image, 1, 0, 0, _sign() * 0.03 * level, 1, 0),
    lambda image, level: _affine(image, 1, 0, _sign() * int(level * image.width / 30), 0, 1, 0),
    lambda image, level: _affine(image, 1, 0, 0, 0, 1, _sign() * int(level * image.height / 30)),
)
