"""Predictions of files, as the terminal, a CSV and a JSON file show them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

# How the CSV files written here begin.
CSV_BEGINS = (b"path,class_1,probability_1", b"path,labels,probability of ", b"path,predicted_number\r\n")


class Predictions(ABC):
    """What is predicted of each of some files.

    Attributes:
        files: the files, (n,).
        columns: of the table in the terminal, after the file.
        header: of the CSV file.
    """

    files: list[Path]
    columns: tuple[str, ...]
    header: Sequence[str]

    @abstractmethod
    def cells(self) -> Iterator[list[str]]:
        """Rows of the table in the terminal."""

    @abstractmethod
    def lines(self) -> Iterator[list]:
        """Rows of the CSV file."""

    @abstractmethod
    def objects(self) -> Iterator[dict]:
        """Entries of the JSON file."""


class PredictedClasses(Predictions):
    """The most probable classes.

    Args:
        files: the files.
        probabilities: of the classes, (n, classes).
        class_names: their names.
        top_k: how many of them.
    """

    columns = ("class", "probability", "then")

    def __init__(self, files: list[Path], probabilities: torch.Tensor, class_names: list[str], top_k: int):
        self.files = files
        values, indices = probabilities.topk(min(top_k, len(class_names)), dim=-1)
        self.names = [[class_names[index] for index in row] for row in indices.tolist()]
        self.probabilities = _rounded(values)
        ranks = range(1, values.shape[1] + 1)
        self.header = ["path", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))]

    def cells(self) -> Iterator[list[str]]:
        """The first class, and the others in one cell."""
        for file, (first, *others), (probability, *rest) in self._rows():
            then = ", ".join(f"{name} {_percent(value)}" for name, value in zip(others, rest, strict=True))
            yield [str(file), first, _percent(probability), then]

    def lines(self) -> Iterator[list]:
        """Each class and its probability."""
        for file, names, probabilities in self._rows():
            yield [str(file), *(value for pair in zip(names, probabilities, strict=True) for value in pair)]

    def objects(self) -> Iterator[dict]:
        """Classes and probabilities."""
        for file, names, probabilities in self._rows():
            yield {"path": str(file), "classes": names, "probabilities": probabilities}

    def _rows(self) -> Iterator[tuple[Path, list[str], list[float]]]:
        return zip(self.files, self.names, self.probabilities, strict=True)


class PredictedLabels(Predictions):
    """The labels that apply, and the probability of each.

    Args:
        files: the files.
        probabilities: of the labels, (n, labels).
        class_names: their names.
        threshold: the probability above which a label applies.
    """

    columns = ("labels", "the most probable")

    def __init__(self, files: list[Path], probabilities: torch.Tensor, class_names: list[str], threshold: float):
        self.files = files
        self.class_names = class_names
        self.probabilities = _rounded(probabilities)
        self.applies = (probabilities > threshold).tolist()
        self.header = ["path", "labels", *(f"probability of {name}" for name in class_names)]

    def cells(self) -> Iterator[list[str]]:
        """The labels that apply, and the five most probable ones."""
        for file, labels, probabilities in self._rows():
            first = sorted(zip(probabilities, self.class_names, strict=True), key=lambda pair: -pair[0])[:5]
            yield [str(file), ", ".join(labels), ", ".join(f"{name} {_percent(value)}" for value, name in first)]

    def lines(self) -> Iterator[list]:
        """The labels that apply, separated as in a list to train on, and all probabilities."""
        for file, labels, probabilities in self._rows():
            yield [str(file), ";".join(labels), *probabilities]

    def objects(self) -> Iterator[dict]:
        """The labels that apply, and all probabilities by label."""
        for file, labels, probabilities in self._rows():
            by_label = dict(zip(self.class_names, probabilities, strict=True))
            yield {"path": str(file), "labels": labels, "probabilities": by_label}

    def _rows(self) -> Iterator[tuple[Path, list[str], list[float]]]:
        for file, applies, probabilities in zip(self.files, self.applies, self.probabilities, strict=True):
            yield file, [name for name, one in zip(self.class_names, applies, strict=True) if one], probabilities


class PredictedNumbers(Predictions):
    """A number for each file.

    Args:
        files: the files.
        numbers: in the unit of the training labels, (n,).
    """

    columns = ("number",)
    header = ("path", "predicted_number")

    def __init__(self, files: list[Path], numbers: torch.Tensor):
        self.files = files
        self.numbers = [float(f"{number:.7g}") for number in numbers.tolist()]  # single precision has no more digits

    def cells(self) -> Iterator[list[str]]:
        """The number, in four digits."""
        for file, number in zip(self.files, self.numbers, strict=True):
            yield [str(file), f"{number:.4g}"]

    def lines(self) -> Iterator[list]:
        """The number."""
        for file, number in zip(self.files, self.numbers, strict=True):
            yield [str(file), number]

    def objects(self) -> Iterator[dict]:
        """The number."""
        for file, number in zip(self.files, self.numbers, strict=True):
            yield {"path": str(file), "predicted_number": number}


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in values.tolist()]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
