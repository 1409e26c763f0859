"""Drawings that ``prepare_emoji.py --icons`` wrote, and plain shapes: their images, and what is known of them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from shapes import shapes
from torch import Tensor

HELD_OUT = {"noto-v1"}  # the design family of datasets/drawings
SHAPES = 2000
UNKNOWN = -100  # what cross-entropy leaves out


def table_of(folder: Path) -> pd.DataFrame:
    """A row for each drawing: emoji without combinations such as families, icons without abstract ones."""
    tables = [pd.read_csv(folder / name, dtype=str, keep_default_na=False) for name in ("emoji.csv", "icons.csv")]
    table = pd.concat(tables, ignore_index=True)
    left_out = table["family"].isin(HELD_OUT) | table["code"].str.contains("-200d-|abstract-")
    return table[~left_out].reset_index(drop=True)


def images_of(folder: Path, table: pd.DataFrame) -> Tensor:
    """Images (drawings, 4, 64, 64) uint8, RGBA, of the rows of a table and, after them, of the plain shapes."""
    images = np.stack([np.array(Image.open(folder / path)) for path in table["path"]])
    return torch.cat([torch.from_numpy(images).permute(0, 3, 1, 2), shapes(SHAPES)])


def numbers(names: pd.Series, known: pd.Series) -> Tensor:
    """A number for each name, `UNKNOWN` where it is not known."""
    codes = names.where(known).astype("category").cat.codes.to_numpy(np.int64, copy=True)
    codes[codes < 0] = UNKNOWN
    return torch.from_numpy(codes)


class Drawings:
    """What is known of all drawings and, after them, of plain shapes: nothing.

    Attributes:
        table: a row for each drawing, without the shapes.
        emoji: number of the emoji (drawings,), the same in all design families; `UNKNOWN` for icons and shapes.
        subgroup: number of the subject (drawings,), or `UNKNOWN`.
        keywords: shares of the keywords (drawings, keywords), which sum to 1, or to 0 where none is known.
        drawn: which (drawings,) are no plain shapes.
        flip: which of them (drawings,) may be mirrored: all but those with a side in their name.

    Args:
        folder: what ``prepare_emoji.py --icons`` wrote.
        min_keyword_count: keywords of fewer things than this are ignored.
    """

    def __init__(self, folder: Path, min_keyword_count: int = 4):
        self.table = table_of(folder)
        nothing = pd.DataFrame("", index=range(SHAPES), columns=self.table.columns)
        table = pd.concat([self.table, nothing], ignore_index=True)
        self.drawn = torch.arange(len(table)) < len(self.table)
        self.flip = torch.from_numpy(~table["name"].str.contains("left|right").to_numpy(bool))
        self.emoji = numbers(table["code"], ~table["code"].str.contains(":") & (table["code"] != ""))
        self.subgroup = numbers(table["subgroup"], table["subgroup"] != "")
        words = table.drop_duplicates("code")["keywords"].str.split(";")
        counts = Counter(word for row in words for word in row if word)
        index = {word: i for i, word in enumerate(sorted(w for w, n in counts.items() if n >= min_keyword_count))}
        self.keywords = torch.zeros(len(table), len(index))
        for row, text in enumerate(table["keywords"]):
            for word in text.split(";"):
                if word in index:
                    self.keywords[row, index[word]] = 1
        self.keywords /= self.keywords.sum(1, keepdim=True).clamp_min(1)
