"""What was taken off the runs after they were made: event files, pictures, and the absolute path in checkpoints.

Lightning's ModelCheckpoint writes the absolute path of its folder into each checkpoint; it is made relative to the
folder of the fixtures. Nothing else in a checkpoint is changed.
"""

import shutil
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent.resolve()
MADE_IN = sys.argv[1] if len(sys.argv) > 1 else str(FOLDER)  # where the runs were made


def relative(value):
    """The value without the path of this machine."""
    if isinstance(value, str):
        return value.replace(f"{MADE_IN}/", "")
    if isinstance(value, dict):
        for key in list(value):
            changed = relative(key), relative(value.pop(key))
            value[changed[0]] = changed[1]
        return value
    if isinstance(value, list | tuple):
        return type(value)(relative(each) for each in value)
    return value


for folder in list(FOLDER.rglob("tensorboard")):
    shutil.rmtree(folder)
for picture in (*(FOLDER / "runs").rglob("*.png"), *(FOLDER / "protocol").rglob("*.png")):
    picture.unlink()
for file in (FOLDER / "protocol").rglob("checkpoints"):
    shutil.rmtree(file)
for file in (FOLDER / "runs").rglob("*.ckpt"):
    torch.save(relative(torch.load(file, weights_only=True)), file)
