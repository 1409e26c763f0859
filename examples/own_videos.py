"""Your own videos, one folder per class, from Python. The same from the command line:

python -m visionpeft.fit --config video_st_adapter.yaml --data VideoFolder --data.root clips/
python -m visionpeft.predict runs/clips-STAdapter-1 new_clips/

python examples/own_videos.py clips/ --method AIM --epochs 10 --predict new_clips/
"""

import argparse

import lightning
import torch

import visionpeft as vp
from visionpeft.data import ClipAugmentation, FrameSampling, VideoFolder, find_videos, videos_dataloader
from visionpeft.models.video_views import over_views
from visionpeft.tasks import VideoClassification
from visionpeft.tasks.optimisation import Optimisation


def main(
    root: str, method: str, num_frames: int, epochs: int, backbone: str, output: str, predict: str | None
) -> float:
    lightning.seed_everything(0, verbose=False)
    methods = {"STAdapter": vp.STAdapter(bottleneck=96), "AIM": vp.AIM(num_frames=num_frames), "LoRA": vp.LoRA(rank=8)}
    sampling = FrameSampling("uniform", num_frames)  # spread over the whole video
    data = VideoFolder(root, sampling=sampling, augmentation=ClipAugmentation(area=(0.6, 1.0)), batch_size=8)
    task = VideoClassification(
        methods[method],
        class_names=data.class_names,
        backbone=backbone,
        num_frames=num_frames,
        optimisation=Optimisation(lr=2e-3, head_lr=1e-3, warmup_epochs=1),
    )
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, log_every_n_steps=1)
    trainer.fit(task, data)
    trainer.test(task, data)
    vp.save(task.model, output, class_names=data.class_names, preprocessing=task.preprocessing)

    model = task.model.eval()
    loader, files = videos_dataloader(find_videos([predict or root]), task.preprocessing, sampling)
    with torch.no_grad():
        probabilities = torch.cat([over_views(model, views).exp() for views, _ in loader])
    for file, row in list(zip(files, probabilities, strict=True))[:20]:
        print(f"{file}: {data.class_names[row.argmax()]} {row.max():.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder with one folder of videos for each class")
    parser.add_argument("--method", choices=("STAdapter", "AIM", "LoRA"), default="STAdapter")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--backbone", default="nano_vit", help="or open_clip/ViT-B-16-quickgelu/openai")
    parser.add_argument("--output", default="adapter")
    parser.add_argument("--predict", help="videos to classify; by default those of the root")
    main(**vars(parser.parse_args()))
