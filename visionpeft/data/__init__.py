"""Lightning data modules: benchmarks, people's own images and videos, and the embedded sets."""

from visionpeft.data.detection.coco import CocoDetection
from visionpeft.data.detection.module import DetectionDataModule
from visionpeft.data.detection.scenes import ComposedObjects
from visionpeft.data.detection.yolo import YoloFolder
from visionpeft.data.few_shot.module import FewShot
from visionpeft.data.few_shot.templates import dataset_template
from visionpeft.data.fgvc import FGVC
from visionpeft.data.image_folder import ImageFolder
from visionpeft.data.image_list import ClipArt, ImageList
from visionpeft.data.module import ImageDataModule
from visionpeft.data.multi_task import MultiTask
from visionpeft.data.segmentation.benchmarks import ADE20K, Cityscapes, VOCSegmentation
from visionpeft.data.segmentation.folder import MaskFolder
from visionpeft.data.segmentation.module import SegmentationDataModule
from visionpeft.data.segmentation.scenes import ComposedScenes
from visionpeft.data.streaming.module import StreamedImages
from visionpeft.data.unlabelled import files_dataloader, find_images
from visionpeft.data.video.benchmarks import HMDB51, UCF101, Kinetics, SomethingSomethingV2
from visionpeft.data.video.folder import VideoFolder, VideoList
from visionpeft.data.video.module import VideoDataModule
from visionpeft.data.video.motion import Motion
from visionpeft.data.video.transforms import ClipAugmentation
from visionpeft.data.video.unlabelled import find_videos, videos_dataloader
from visionpeft.data.vtab import VTAB1k
from visionpeft.models.video_sampling import FrameSampling

__all__ = [
    "ADE20K",
    "FGVC",
    "HMDB51",
    "UCF101",
    "Cityscapes",
    "ClipArt",
    "ClipAugmentation",
    "CocoDetection",
    "ComposedObjects",
    "ComposedScenes",
    "DetectionDataModule",
    "FewShot",
    "FrameSampling",
    "ImageDataModule",
    "ImageFolder",
    "ImageList",
    "Kinetics",
    "MaskFolder",
    "Motion",
    "MultiTask",
    "SegmentationDataModule",
    "SomethingSomethingV2",
    "StreamedImages",
    "VOCSegmentation",
    "VTAB1k",
    "VideoDataModule",
    "VideoFolder",
    "VideoList",
    "YoloFolder",
    "dataset_template",
    "files_dataloader",
    "find_images",
    "find_videos",
    "videos_dataloader",
]
