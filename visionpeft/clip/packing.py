"""How the texts of all classes are laid out in memory: what they share once, the rest one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch

from visionpeft.clip.layout import Layout, Tokens


@dataclass(frozen=True)
class Bucket:
    """Texts whose remaining tokens are equally many: rows `start` to `start + count * length`.

    Args:
        length: tokens of each text after the shared ones.
        count: number of texts.
        start: row of the first token.
    """

    length: int
    count: int
    start: int


@dataclass(frozen=True)
class OwnTokens:
    """Tokens that each text has for itself from a block on: before it, they overwrite what is there in every text.

    Args:
        tokens: (texts, tokens, width).
        first: place of the first of them in a text.
        block: index of the block.
    """

    tokens: torch.Tensor
    first: int
    block: int

    @property
    def stop(self) -> int:
        """Place after the last of them."""
        return self.first + self.tokens.shape[1]

    def of(self, texts: torch.Tensor) -> "OwnTokens":
        """Those of the texts of these indices."""
        return replace(self, tokens=self.tokens[texts])


class Rows:
    """Tokens one after the other, as index tensors.

    Args:
        tokens: token ids and slots, (rows,).
        positions: position of each token in its text, (rows,).
        device: where the index tensors live.
    """

    def __init__(self, tokens: Sequence[int], positions: Sequence[int], device: torch.device):
        learned = [(row, -1 - token) for row, token in enumerate(tokens) if token < 0]
        self.ids = torch.tensor([max(token, 0) for token in tokens], dtype=torch.long, device=device)
        self.positions = torch.tensor(list(positions), dtype=torch.long, device=device)
        self.learned_rows = torch.tensor([row for row, _ in learned], dtype=torch.long, device=device)
        self.learned_vectors = torch.tensor([vector for _, vector in learned], dtype=torch.long, device=device)


class Chunk(Rows):
    """The remaining tokens of some texts, sorted by their number.

    Args:
        texts: tokens of each text, sorted by length.
        shared: number of tokens that all texts share and that are left out here.
        device: where the index tensors live.
    """

    def __init__(self, texts: Sequence[Tokens], shared: int, device: torch.device):
        tokens = [token for text in texts for token in text[shared:]]
        positions = [position for text in texts for position in range(shared, len(text))]
        super().__init__(tokens, positions, device)
        self.buckets: list[Bucket] = []
        start = 0
        for length, group in groupby(len(text) - shared for text in texts):
            count = sum(1 for _ in group)
            self.buckets.append(Bucket(length, count, start))
            start += count * length
        ends = [b.start + (index + 1) * b.length - 1 for b in self.buckets for index in range(b.count)]
        self.ends = torch.tensor(ends, dtype=torch.long, device=device)

    def with_own(self, x: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, list[Bucket], torch.Tensor]:
        """Rows x (groups, rows, width) with own tokens (texts, tokens, width) before those of each text.

        Returns:
            The rows, how they are laid out now, and the row of each end token.
        """
        number = own.shape[1]
        buckets = [Bucket(b.length + number, b.count, 0) for b in self.buckets]
        starts = accumulate((b.count * b.length for b in buckets), initial=0)
        buckets = [replace(bucket, start=start) for bucket, start in zip(buckets, starts, strict=False)]
        texts = own.split([b.count for b in buckets])
        rows = x.split([b.count * b.length for b in self.buckets], dim=1)
        joined = []
        for bucket, part, before in zip(self.buckets, rows, texts, strict=True):
            part = part.unflatten(1, (bucket.count, bucket.length))
            joined.append(torch.cat((before.to(x.dtype).expand(len(x), -1, -1, -1), part), dim=2).flatten(1, 2))
        # The end token of text i has moved by the tokens of texts 0 to i.
        moved = number * torch.arange(1, len(own) + 1, device=self.ends.device)
        return torch.cat(joined, dim=1), buckets, self.ends + moved


class Packing:
    """The tokens of a layout: those that all texts begin with, then the rest of each text in chunks.

    Args:
        layout: the texts.
        share: keep the common beginning apart; otherwise every text stands whole in its chunk.
        chunk_size: most texts in a chunk, None for all in one.
        device: where the index tensors live.
        most: keep no more than so many tokens apart, None for all that are common.
    """

    def __init__(
        self, layout: Layout, share: bool, chunk_size: int | None, device: torch.device, most: int | None = None
    ):
        shared = common_length(layout.texts) if share else 0
        shared = shared if most is None else min(shared, most)
        self.shared = Rows(layout.texts[0][:shared], range(shared), device)
        self.num_shared = shared
        order = sorted(range(len(layout)), key=lambda index: len(layout.texts[index]))
        size = chunk_size or len(layout)
        parts = [order[first : first + size] for first in range(0, len(order), size)]
        self.chunks = [Chunk([layout.texts[index] for index in part], shared, device) for part in parts]
        self.texts = torch.tensor(order, dtype=torch.long, device=device).split(size)
        self.restore = torch.cat(self.texts).argsort()

    @classmethod
    def of(
        cls, layout: Layout, share: bool, chunk_size: int | None, device: torch.device, most: int | None = None
    ) -> "Packing":
        """The packing of a layout, computed once and kept with it."""
        key = (share, chunk_size, str(device), most)
        if key not in layout.packings and torch.compiler.is_exporting():
            return cls(layout, share, chunk_size, device, most)  # its tensors are the exporter's, and nothing to keep
        if key not in layout.packings:
            # Lightning validates in inference mode before it trains, and inference tensors allow no gradient later.
            with torch.inference_mode(False):
                layout.packings[key] = cls(layout, share, chunk_size, device, most)
        return layout.packings[key]


def padded(layout: Layout, chunk_size: int | None, device: torch.device) -> list[torch.Tensor]:
    """Token ids and slots (texts, length) of all texts with their padding, in chunks; made once and kept with it."""
    size = chunk_size or len(layout)
    key = ("padded", size, str(device))
    if key not in layout.packings:
        rows = [(*text, *[layout.pad] * (layout.length - len(text))) for text in layout.texts]
        with torch.inference_mode(False):
            tokens = torch.tensor(rows, dtype=torch.long, device=device)
        layout.packings[key] = list(tokens.split(size))
    return layout.packings[key]


def common_length(texts: Sequence[Tokens]) -> int:
    """How many tokens all texts begin with; each keeps at least its last."""
    shortest, first = min(map(len, texts)), texts[0]
    for length in range(shortest - 1):
        if any(text[length] != first[length] for text in texts):
            return length
    return shortest - 1
