"""Batches whose images go through adapters of their own, and the text side of CLIP learners against the usual way."""

import argparse
import statistics
import time
from functools import partial

import timm
import torch
from text_tower import coop, make_cases, measure
from torch.nn.functional import normalize as unit

import visionpeft as vp
from visionpeft.models.create_clip import create_clip

from .exactness import NAMES
from .running import Cell, Setting, Wrong, distance

ADAPTERS = 4
EVERY_MATRIX = ("q", "k", "v", "proj", "fc1", "fc2")
TEXT = ("coop", "maple", "cocoop", "epoch")


def cells(setting: Setting) -> list[Cell]:
    """A routed batch, and one cell for each text case."""
    text = TEXT[:1] if setting.tiny else TEXT
    return [
        Cell("mixed batch", "mixed", mixed),
        *(Cell(f"text: {name}", "text", partial(text_case, name)) for name in text),
    ]


def mixed(setting: Setting) -> dict:
    """A batch whose images are dealt to several LoRAs, against the same batch through one, and one after another.

    Raises:
        Wrong: a row is not what its adapter alone gives.
    """
    name, batch = ("test_vit", 4) if setting.tiny else ("vit_base_patch16_224", 64)
    with torch.device(setting.device):
        model = timm.create_model(name, num_classes=100).eval()
        for index in range(ADAPTERS):
            vp.attach(model, vp.LoRA(rank=8, targets=EVERY_MATRIX), f"adapter {index}")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.peft.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = torch.randn(batch, *timm.get_pretrained_cfg(name).input_size, device=setting.device)
    names = [f"adapter {index % ADAPTERS}" for index in range(batch)]

    def routed() -> torch.Tensor:
        with vp.route(model, names):
            return model(images)

    def alone() -> torch.Tensor:
        with vp.use(model, "adapter 0"):
            return model(images)

    def in_turn() -> torch.Tensor:
        found = torch.empty(batch, 100, device=setting.device)
        for index in range(ADAPTERS):
            with vp.use(model, f"adapter {index}"):
                found[index::ADAPTERS] = model(images[index::ADAPTERS])
        return found

    seconds: dict[str, list[float]] = {"routed": [], "one adapter": [], "one after another": []}
    with torch.no_grad():
        far = distance(routed(), in_turn())
        for turn in range((1 if setting.tiny else setting.rounds) + 1):
            for words, run in zip(seconds, (routed, alone, in_turn), strict=True):
                setting.wait()
                before = time.perf_counter()
                run()
                setting.wait()
                if turn:
                    seconds[words].append(time.perf_counter() - before)
    row = {"batch": f"{batch} images, {ADAPTERS} LoRAs, {name}"}
    row |= {words: statistics.median(each) for words, each in seconds.items()}
    row["largest difference"] = far
    if not far <= 1e-3:
        raise Wrong(f"rows of the mixed batch differ by {far:.1e} from what their adapters give alone", row)
    return row


def text_case(name: str, setting: Setting) -> dict:
    """A step of a learner's text side, ours and straightforward, as `text_tower.py` measures it.

    Raises:
        Wrong: gradients differ.
    """
    torch.manual_seed(0)
    if setting.tiny:
        clip, tokenizer = create_clip("nano_clip")
        few = unit(torch.randn(2, clip.text_projection.shape[1]), dim=-1)
        case = coop(clip.requires_grad_(False), tokenizer, NAMES, few, torch.arange(2))
    else:
        clip, tokenizer = create_clip("open_clip/ViT-B-16", pretrained=False)
        clip = clip.to(setting.device).requires_grad_(False)
        case = make_cases(argparse.Namespace(device=setting.device), clip, tokenizer)[name]()
    measure(case, clip, 1 if setting.tiny else setting.rounds, setting.device)
    slow, fast = (statistics.median(case.times[side]) for side in ("straightforward", "ours"))
    row = {
        "step": case.name,
        "straightforward": slow,
        "ours": fast,
        "kept, straightforward": case.saved["straightforward"],
        "kept, ours": case.saved["ours"],
        "difference": case.difference,
    }
    if not case.difference <= 1e-2:
        raise Wrong(f"the gradients differ by {case.difference:.1e}", row)
    return row
