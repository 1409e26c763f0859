"""Mean and variance of the tokens that enter the image blocks with prompts: what `PromptAlign` aligns test images with.

They are of the images of a source, on which the prompts were trained, and depend on the prompts: their tokens are among
those that are counted. `python -m visionpeft.prepare statistics` computes them from a run of `MaPLe`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from visionpeft.adapters.described_tensors import check_entries, read_described, write_described
from visionpeft.adapters.storage import backbone_record, check_backbone, package_versions
from visionpeft.adapters.switch import plain
from visionpeft.backbones.whole_model import describe
from visionpeft.clip.learner import Learner
from visionpeft.errors import ConfigurationError, StorageError

FORMAT = 1
STEM = "statistics"


@dataclass
class Moments:
    """Mean and variance over images of every token of every channel, for each block with prompts of its own.

    Args:
        mean: (blocks, tokens, width): the tokens of the backbone as they enter the block, then its prompts.
        variance: the same shape, divided by the number of images; 0 for the prompts, which all images share.
    """

    mean: torch.Tensor
    variance: torch.Tensor

    def distance(self, other: "Moments") -> torch.Tensor:
        """Mean over blocks, tokens and channels of |mean - mean'| / 2 + |variance - variance'| / 2."""
        means, variances = self.mean - other.mean, self.variance - other.variance
        return means.abs().mean() / 2 + variances.abs().mean() / 2


@contextmanager
def watched_blocks(learner: Learner) -> Iterator[list[torch.Tensor]]:
    """Within the context, the image tower leaves the tokens that enter the blocks with prompts, in their order."""
    entered: list[torch.Tensor] = []
    with plain(learner.clip):
        blocks = describe(learner.clip).towers["visual"].blocks[: learner.depth]
    handles = [
        block.module.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0])) for block in blocks
    ]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def image_prompts(learner: Learner, like: torch.Tensor) -> torch.Tensor:
    """The prompts (blocks, prompts, width) that enter each block with its own, in the precision of `like`."""
    visual = learner.clip.peft[learner.adapter_name].coupled_prompts.visual
    return torch.cat([visual[str(index)].stream_in.prompts_for(like) for index in range(learner.depth)])


def moments_of(learner: Learner, entered: list[torch.Tensor]) -> Moments:
    """Moments over the images of one pass, with a graph if there is one.

    Args:
        learner: whose prompts enter.
        entered: tokens (images, tokens, width) that entered each block, from `watched_blocks`.
    """
    prompts = image_prompts(learner, entered[0])
    mean = torch.stack([tokens.mean(dim=0) for tokens in entered])
    variance = torch.stack([tokens.var(dim=0, unbiased=False) for tokens in entered])
    return Moments(torch.cat((mean, prompts), dim=1), torch.cat((variance, torch.zeros_like(prompts)), dim=1))


@torch.no_grad()
def source_moments(learner: Learner, batches: Iterable[torch.Tensor]) -> tuple[Moments, int]:
    """Moments over all images of batches (batch, 3, height, width), and the number of images.

    Raises:
        ConfigurationError: fewer than two images.
    """
    count, total, squares, prompts = 0, 0.0, 0.0, None
    learner.eval()
    for images in batches:
        with watched_blocks(learner) as entered:
            learner.encode_images(images)
        tokens = torch.stack(entered).double()
        count, total, squares = count + len(images), total + tokens.sum(dim=1), squares + tokens.square().sum(dim=1)
        prompts = image_prompts(learner, entered[0]).double()
    if count < 2:
        raise ConfigurationError(f"source statistics need at least two images, and here are {count}")
    mean = total / count
    # Rounding may leave a variance just below 0 where all images have one value.
    variance = (squares / count - mean.square()).clamp(min=0)
    return Moments(torch.cat((mean, prompts), 1), torch.cat((variance, torch.zeros_like(prompts)), 1)), count


def save_moments(folder: str | Path, learner: Learner, moments: Moments, record: Mapping) -> None:
    """Write moments as `statistics.safetensors`, with the CLIP that they belong to and a record of the images.

    Args:
        folder: where.
        learner: of whose prompts they are.
        moments: of the source.
        record: anything that JSON can hold: how many images, and which.
    """
    description = {
        "format": FORMAT,
        "backbone": backbone_record(learner.clip),
        "record": dict(record),
        "versions": package_versions(),
    }
    tensors = {"mean": moments.mean.float(), "variance": moments.variance.float()}
    write_described(folder, STEM, tensors, description)


def read_moments(folder: str | Path, learner: Learner) -> Moments:
    """What `save_moments` wrote, for a learner with the same CLIP and prompts.

    Raises:
        StorageError: the files are missing or damaged, or belong to another CLIP or other prompts.
    """
    description, tensors = read_described(folder, STEM, _check_description)
    what = f"the source statistics in {folder}"
    check_backbone(learner.clip, description["backbone"], backbone_record(learner.clip), what)
    found = Moments(tensors["mean"], tensors["variance"])
    with torch.no_grad():
        prompts = image_prompts(learner, learner.text.embed([0]))
    theirs = found.mean[:, -prompts.shape[1] :].to(prompts)
    # Computed on another device, they may differ by rounding.
    if theirs.shape != prompts.shape or (theirs - prompts).abs().max() > 1e-3 * prompts.abs().max():
        raise StorageError(
            f"{what} are of other prompts than those this learner starts from; compute them from the run of MaPLe that "
            "it starts from"
        )
    return found


def _check_description(description: object, path: Path) -> None:
    types = {"backbone": dict, "record": dict}
    check_entries(description, path, FORMAT, types)
