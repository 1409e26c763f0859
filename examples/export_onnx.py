"""An adapted model as an ONNX file, for images of its size in batches of any size.

    pip install onnx onnxscript onnxruntime
    python examples/export_onnx.py [a folder that vp.save wrote] --output model.onnx

A method that can be merged is merged first, so that the file is as large and as fast as that of the plain backbone;
any other is exported as it is attached. Without a folder, an adapter with random weights stands in for a trained one.
"""

import argparse
from pathlib import Path

import onnxruntime
import torch

import visionpeft as vp


def main(folder: str | None, output: str) -> None:
    model = vp.create_backbone("nano_vit", num_classes=5).eval()
    if folder is None:
        vp.attach(model, vp.LoRA(rank=4))
        with torch.no_grad():
            for parameter in vp.trainable_parameters(model):
                parameter.add_(0.05 * torch.randn_like(parameter))
    else:
        vp.load(model, folder)
    model.eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
    try:
        vp.merge(model)
    except vp.UnsupportedError as error:
        print(error)
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(model, (images[:2],), output, dynamo=True, dynamic_shapes=(batch,), verbose=False)

    session = onnxruntime.InferenceSession(output)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    difference = (torch.from_numpy(logits) - expected).abs().max().item()
    print(f"{output}: {Path(output).stat().st_size / 1024:.0f} KiB, logits differ by {difference:.1e}")
    assert difference < 1e-3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--output", default="model.onnx")
    main(**vars(parser.parse_args()))
