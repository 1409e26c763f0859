"""Several adapters on one backbone, served together in one batch.

    python examples/serve_many_adapters.py

Two adapters are saved as small folders and loaded onto one backbone. In a mixed batch every image goes through its own
adapter, and gets exactly what that adapter alone would give it.
"""

import tempfile
from pathlib import Path

import torch

import visionpeft as vp


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, method in (("pets", vp.LoRA(rank=4)), ("cars", vp.AdaptFormer(bottleneck=8))):
            make_adapter(method, Path(folder) / name)

        model = vp.create_backbone("nano_vit", num_classes=5).eval()
        for name in ("pets", "cars"):
            vp.load(model, Path(folder) / name, name=name)
            size = sum(file.stat().st_size for file in (Path(folder) / name).iterdir())
            print(f"{name}: {size / 1024:.0f} KiB on disk")

    images = torch.randn(6, 3, 64, 64)
    wanted = ["pets", "cars", None, "cars", "pets", None]  # None: the plain backbone
    with torch.no_grad(), vp.route(model, wanted):
        mixed = model(images)

    for row, name in enumerate(wanted):
        with torch.no_grad(), vp.use(model, name):
            alone = model(images[row : row + 1])
        difference = (mixed[row] - alone[0]).abs().max().item()
        print(f"sample {row} through {name}: differs from {name} alone by {difference:.1e}")
        assert difference < 1e-5


def make_adapter(method: vp.Method, folder: Path) -> None:
    """Stands in for training: an adapter with random weights."""
    model = vp.create_backbone("nano_vit", num_classes=5)
    vp.attach(model, method)
    with torch.no_grad():
        for parameter in vp.trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    vp.save(model, folder, class_names=["a", "b", "c", "d", "e"])


if __name__ == "__main__":
    main()
