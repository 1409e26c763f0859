"""Your own images, one folder per class, from Python. The same from the command line:

python -m visionpeft.fit --config images_lora.yaml --data.root photos/

python examples/own_dataset.py photos/ --method VPT --epochs 10
"""

import argparse

import lightning

import visionpeft as vp
from visionpeft.data import ImageFolder
from visionpeft.tasks import ImageClassification
from visionpeft.tasks.optimisation import Optimisation


def main(root: str, method: str, epochs: int, backbone: str, output: str) -> float:
    lightning.seed_everything(0, verbose=False)
    data = ImageFolder(root, batch_size=32, augmentation="crop_flip")
    task = ImageClassification(
        getattr(vp, method)(),
        class_names=data.class_names,
        backbone=backbone,
        optimisation=Optimisation(lr=1e-3, warmup_epochs=1),
    )
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, log_every_n_steps=1)
    trainer.fit(task, data)
    (result,) = trainer.test(task, data)
    vp.save(task.model, output, class_names=data.class_names, preprocessing=task.preprocessing)
    return result["test/top1"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder with one folder of images for each class")
    parser.add_argument("--method", default="LoRA")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--backbone", default="nano_vit.distilled")
    parser.add_argument("--output", default="adapter")
    main(**vars(parser.parse_args()))
