"""Lightning data modules: benchmarks, people's own images and the embedded set."""

from visionpeft.data.few_shot import FewShot
from visionpeft.data.fgvc import FGVC
from visionpeft.data.image_folder import ImageFolder
from visionpeft.data.image_list import ClipArt, ImageList
from visionpeft.data.module import ImageDataModule
from visionpeft.data.templates import dataset_template
from visionpeft.data.unlabelled import files_dataloader, find_images
from visionpeft.data.vtab import VTAB1k

__all__ = [
    "FGVC",
    "ClipArt",
    "FewShot",
    "ImageDataModule",
    "ImageFolder",
    "ImageList",
    "VTAB1k",
    "dataset_template",
    "files_dataloader",
    "find_images",
]
