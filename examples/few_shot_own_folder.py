"""A few labelled images of each class, a frozen CLIP and a learned prompt; then the prompt with classes it never saw.

python examples/few_shot_own_folder.py photos/ --new-names "red kite,buzzard,heron" --predict new_photos/

`photos/` has one folder of images for each class. The same from the command line:

python -m visionpeft.fit --config fewshot_coop.yaml --data.dataset folder --data.root photos/
python -m visionpeft.predict runs/folder-CoOp-1 new_photos/ --class-names "red kite,buzzard,heron"
"""

import argparse

import torch

import visionpeft as vp
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.data import FewShot, files_dataloader, find_images


def main(root: str, shots: int, epochs: int, backbone: str, output: str, new_names: str | None, predict: str | None):
    torch.manual_seed(0)
    clip, tokenizer = vp.create_clip(backbone)  # or open_clip.create_model_and_transforms(...)
    data = FewShot("folder", root, shots=shots, augmentation="none", batch_size=32)
    data.preprocessing = preprocessing_of(clip)
    data.setup()

    learner = vp.CoOp(clip, tokenizer, data.class_names, init="a photo of a")
    optimizer = torch.optim.SGD(learner.trainable_parameters(), lr=0.002, momentum=0.9)
    batches = data.train_dataloader()
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        losses = []
        for images, labels in batches:
            loss, _ = learner.loss(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")
    vp.save_learner(learner, output, preprocessing=data.preprocessing)  # a few kilobytes

    names = [name.strip() for name in new_names.split(",")] if new_names else None
    learner = vp.load_learner(output, clip, tokenizer, class_names=names)
    loader, files = files_dataloader(find_images([predict or root]), data.preprocessing, resize="crop")
    with torch.no_grad():
        probabilities = torch.cat([learner(images).softmax(dim=1) for images, _ in loader])
    for file, row in list(zip(files, probabilities, strict=True))[:20]:
        print(f"{file}: {learner.class_names[row.argmax()]} {row.max():.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder with one folder of images for each class")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--backbone", default="nano_clip.distilled", help="or open_clip/ViT-B-16-quickgelu/openai")
    parser.add_argument("--output", default="prompt")
    parser.add_argument("--new-names", help="classes to tell apart afterwards, separated by commas")
    parser.add_argument("--predict", help="images to classify; by default those of the root")
    main(**vars(parser.parse_args()))
