"""The small models whose weights are in the package, each name with its folder.

A name keeps its weights for ever: adapters, learners and runs name the model they were made with. Better weights get a
name of their own.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent.parent / "weights"
NANO_VITS = {"nano_vit": WEIGHTS / "nano_vit", "nano_vit.distilled": WEIGHTS / "nano_vit_distilled"}
NANO_CLIPS = {"nano_clip": WEIGHTS / "nano_clip", "nano_clip.distilled": WEIGHTS / "nano_clip_distilled"}
