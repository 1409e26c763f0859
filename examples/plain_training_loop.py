"""A timm model, an adapter, and a training loop of your own.

    python examples/plain_training_loop.py --epochs 10

Trains LoRA on the clip-art images in the package, tests it, merges it, and saves a plain timm checkpoint.
"""

import argparse

import torch
import torch.nn.functional as F

import visionpeft as vp
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.data import ClipArt


def main(epochs: int, output: str | None) -> float:
    torch.manual_seed(0)
    data = ClipArt(augmentation="crop_flip")
    model = vp.create_backbone("nano_vit", num_classes=len(data.class_names))  # or timm.create_model(...)
    data.preprocessing = preprocessing_of(model)
    data.setup()

    vp.attach(model, vp.LoRA(rank=8, targets=("q", "v")))
    print(vp.summary(model))
    optimizer = torch.optim.AdamW(vp.trainable_parameters(model), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    batches = data.train_dataloader()  # or any loader of (images, labels)
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        model.train()
        losses = []
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")

    vp.merge(model)  # now a plain timm model, at no extra cost
    accuracy = test(model, data)
    print(f"test accuracy {accuracy:.1%}")
    if output:
        torch.save(model.state_dict(), output)
    return accuracy


@torch.no_grad()
def test(model: torch.nn.Module, data: ClipArt) -> float:
    model.eval()
    correct = [model(images).argmax(dim=1) == labels for images, labels in data.test_dataloader()]
    return torch.cat(correct).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", help="where to save the merged model's state_dict")
    options = parser.parse_args()
    main(options.epochs, options.output)
