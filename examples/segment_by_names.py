"""How well a CLIP that has seen no mask says the class of every pixel, with four ways of computing its last block.

    python examples/segment_by_names.py                                           # the embedded scenes, nano_clip
    python examples/segment_by_names.py --clip open_clip/ViT-B-16-quickgelu/openai --size 336 --data VOC_ROOT

VOC_ROOT holds VOCdevkit/VOC2012. Images are seen in windows of the size that the CLIP takes, which overlap by half, and
mean IoU is over all pixels of the test split together. On the scenes the background is what has none of the names.
"""

import argparse

import torch

import visionpeft as vp
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.data import ComposedScenes, VOCSegmentation
from visionpeft.tasks.segmentation_objective import ClassOfPixels

TEMPLATES = ["a photo of a {}.", "a drawing of a {}.", "art of the {}.", "a {} in the scene."]
WAYS = {
    "CLIP as it is": {"attention": "plain", "residual": True, "mlp": True},
    "MaskCLIP": {"attention": "value", "residual": True, "mlp": True},
    "SCLIP": {"attention": "query_key", "residual": True, "mlp": True},
    "ClearCLIP": {},
}
NAMES = {"background": ["background", "texture", "pattern"], "thing": ["object", "tool", "food"]}


def main(clip: str, data: str | None, size: int, images: int | None, threshold: float) -> None:
    model, tokenizer = vp.create_clip(clip)
    side = min(model.visual.image_size)
    options = {"size": size, "test_samples": images, "seed": 0, "test_batch_size": 1}
    masks = VOCSegmentation(data, **options) if data else ComposedScenes(train=1, val=0, side=size, **options)
    masks.preprocessing = preprocessing_of(model)
    masks.setup("test")
    classes = {name: NAMES.get(name, [name]) for name in masks.class_names}
    learner = vp.ZeroShot(model, tokenizer, [name for names in classes.values() for name in names], TEMPLATES)
    print("| last block | mIoU | accuracy of pixels |\n| --- | ---: | ---: |")
    for way, options in WAYS.items():
        dense = vp.OpenVocabulary(learner, classes, threshold=threshold, **options)
        metrics = ClassOfPixels(len(classes)).metrics("test")
        for pixels, labels in masks.test_dataloader():
            found = vp.predict_masks(dense, pixels, window=side, stride=side // 2, size=tuple(labels.shape[-2:]))
            for metric in metrics.values():
                metric.update(found, labels)
        scores = [f"{100 * metrics[name].compute().item():.1f}" for name in ("miou", "pixel_accuracy")]
        print(f"| {way} | {' | '.join(scores)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", default="nano_clip")
    parser.add_argument("--data", help="folder of Pascal VOC; the embedded scenes when absent")
    parser.add_argument("--size", type=int, default=128, help="pixels of the shorter side")
    parser.add_argument("--images", type=int, help="test so many images only")
    parser.add_argument("--threshold", type=float, default=0.1, help="less probable pixels are background")
    with torch.no_grad():
        main(**vars(parser.parse_args()))
