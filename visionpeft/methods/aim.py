"""AIM: Adapting Image Models for Efficient Video Action Recognition (Yang et al., 2023).

https://arxiv.org/abs/2302.03024
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath

from visionpeft.backbones.frames import Frames
from visionpeft.backbones.tower import Tower
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.methods.parts.addressing import Blocks
from visionpeft.methods.parts.base import Method, blocks_of, frames_of, require
from visionpeft.methods.parts.bottleneck import Bottleneck
from visionpeft.sites import Placement


class DropClips(DropPath):
    """Drops its input for all frames of a clip at once while training, with probability `drop_prob`."""

    def __init__(self, drop_prob: float, frames: Frames):
        super().__init__(drop_prob)
        self.frames = frames

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (clips * frames, tokens, width) to the same shape."""
        return super().forward(self.frames.split(x)).flatten(0, 1)


class TemporalEmbedding(nn.Module):
    """Adds the vector of a frame's time to all of its tokens; (num_frames, width), zero at the start."""

    stackable = True

    def __init__(self, num_frames: int, width: int, frames: Frames):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(num_frames, width))
        self.frames = frames

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (clips * frames, tokens, width) to the same shape."""
        embedding = self.embedding
        if self.frames.number != len(embedding):
            check_frames(len(embedding), self.frames)
            embedding = F.interpolate(embedding.t()[None], size=self.frames.number, mode="linear")[0].t()
        return (self.frames.split(x) + embedding[:, None].to(x.dtype)).flatten(0, 1)


class TemporalAttention(nn.Module):
    """x + A(attend(inner(normalise(x)))), where tokens of equal index in the frames of a clip attend to each other.

    attend and normalise are the block's own attention and the norm before it.

    Args:
        block: the block of the backbone.
        inner: what acts on the normalised tokens, if anything.
        adapter: A, without a skip connection.
        frames: how clips lie in the batch.
    """

    stackable = True

    def __init__(self, block: nn.Module, inner: nn.Module | None, adapter: nn.Module, frames: Frames):
        super().__init__()
        self.inner = nn.Identity() if inner is None else inner
        self.adapter = adapter
        self.frames = frames
        self._block = (block,)  # in a tuple, because it belongs to the backbone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (clips * frames, tokens, width) to the same shape."""
        (block,) = self._block
        h = self.frames.split(self.inner(block.attention_input(x)))
        clips, frames, tokens, width = h.shape
        h = block.attend(h.transpose(1, 2).reshape(clips * tokens, frames, width))
        h = h.view(clips, tokens, frames, width).transpose(1, 2).reshape(x.shape)
        return x + self.adapter(h)


@dataclass(frozen=True)
class AIM(Method):
    """The frozen attention of every block used a second time, over the frames of a clip, with bottleneck adapters.

    With the stream x of a block, adapters A(u) = up(gelu(down(u))) and tokens of equal index attending in time:
    x = x + T(attn(norm1 x)) over time; x = x + (u + S(u)) with u = attn(norm1 x) in each frame;
    x = x + mlp(norm2 x) + scale * J(norm2 x). A vector for the time of a frame is added to all its tokens before
    the first block and of a norm there. Clips are dropped from T and J while training, with a probability that rises
    linearly from 0 in the first block of the tower to drop_path in its last; all frames of a clip at once. (In the
    authors' code tokens lead, so that it drops one token position in all clips of a batch and keeps the others.)
    down is normal with standard deviation 0.02, everything else zero: no change at the start. The final norm is
    trained, too. In time the attention has no positions: a rotation of query and key by one and the same position
    cancels, and so does one and the same relative position in a softmax. What other methods add in the attention acts
    in each frame only, not over time; parameters they train themselves act in both. Not mergeable: it is not linear.
    For a `VideoClassifier`.
    Trainable on L blocks of width D with h = ratio D: 3 L (2 D h + h + D) + num_frames D + 2 D, 4 L instead of 3 L with
    two temporal adapters; on ViT-B/16 with 8 frames 10,659,072 and 14,209,536.
    Source: Yang et al., AIM: Adapting Image Models for Efficient Video Action Recognition, 2023.

    Args:
        ratio: width of the bottlenecks as a part of the token width.
        num_temporal: adapters around the attention in time; 2 for one more before it, u + A(u), as the paper has
            for Something-Something.
        scale: factor of the adapter beside the MLP; the paper has 0.5, and 1 for Something-Something.
        drop_path: probability of dropping the temporal and the joint branch for a clip in the last block.
        num_frames: frames of the clips it is trained on.
        blocks: which blocks, such as "all", "last:4", "3:9" or a list of indices.
        towers: which towers; by default the image tower.
    """

    ratio: float = 0.25
    num_temporal: int = 1
    scale: float = 0.5
    drop_path: float = 0.2
    num_frames: int = 8
    blocks: Blocks = "all"
    towers: str | list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.ratio > 0, self, f"ratio must be positive, not {self.ratio}")
        require(self.num_temporal in (1, 2), self, f"num_temporal must be 1 or 2, not {self.num_temporal!r}")
        require(0 <= self.drop_path < 1, self, f"drop_path must be in [0, 1), not {self.drop_path}")
        require(self.num_frames > 0, self, f"num_frames must be a positive integer, not {self.num_frames!r}")

    def place(self, tower: Tower) -> Iterator[Placement]:
        """The embedding of time, and per block the temporal pass and the adapters in space and beside the MLP."""
        frames = frames_of(self, tower)
        check_frames(self.num_frames, frames)
        yield Placement(tower.name, None, "tokens", TemporalEmbedding(self.num_frames, tower.width, frames))
        for index in blocks_of(self, tower):
            block = tower.blocks[index]
            drop_path = self.drop_path * index / max(1, tower.depth - 1)
            for sited in filter(None, (block.sited_class, block.sited_attention_class)):
                if not hasattr(sited, "attend"):
                    raise UnsupportedError(
                        f"AIM uses the attention of a block twice, but {sited.__name__} does not offer attend"
                    )
            inner = self._adapter(tower.width, serial=True) if self.num_temporal == 2 else None
            temporal = self._adapter(tower.width, dropped=DropClips(drop_path, frames))
            attention = TemporalAttention(block.module, inner, temporal, frames)
            yield Placement(tower.name, index, "stream_in", attention)
            yield Placement(tower.name, index, "attn_out", self._adapter(tower.width, serial=True))
            joint = self._adapter(tower.width, scale=self.scale, dropped=DropClips(drop_path, frames))
            yield Placement(tower.name, index, "mlp_in", joint, add="stream_out")

    def trains(self, tower: Tower) -> Iterator[str]:
        """The final norms."""
        norms = [tower.layers[site].owner for site in tower.final_norms if site in tower.layers]
        wanted = {id(parameter) for norm in norms for parameter in norm.parameters()}
        for name in tower.parameter_names():
            if id(tower.module.get_parameter(name)) in wanted:
                yield name

    def _adapter(
        self, width: int, serial: bool = False, scale: float = 1.0, dropped: DropClips | None = None
    ) -> Bottleneck:
        hidden = max(1, int(width * self.ratio))
        adapter = Bottleneck(
            width, hidden, activation="gelu", scale=scale, dropout=0.0, drop_path=0.0, init="lora", serial=serial
        )
        nn.init.trunc_normal_(adapter.down.weight, std=0.02)
        if dropped is not None:
            adapter.drop_path = dropped
        return adapter


def check_frames(trained: int, frames: Frames) -> None:
    """Refuse clips of another number of frames than the embedding of time has, unless it is to be interpolated.

    Raises:
        ConfigurationError: if the numbers differ.
    """
    if frames.number != trained and not frames.interpolate:
        raise ConfigurationError(
            f"AIM(num_frames={trained}) has no embedding of time for clips of {frames.number} frames; use {trained} "
            f"frames, or set_num_frames({frames.number}, interpolate=True) of the VideoClassifier"
        )
