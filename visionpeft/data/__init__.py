"""Lightning data modules: benchmarks, people's own images and the embedded set."""

from visionpeft.data.fgvc import FGVC
from visionpeft.data.image_folder import ImageFolder
from visionpeft.data.image_list import ClipArt, ImageList
from visionpeft.data.module import ImageDataModule
from visionpeft.data.unlabelled import files_dataloader, find_images
from visionpeft.data.vtab import VTAB1k

__all__ = [
    "FGVC",
    "ClipArt",
    "ImageDataModule",
    "ImageFolder",
    "ImageList",
    "VTAB1k",
    "files_dataloader",
    "find_images",
]
