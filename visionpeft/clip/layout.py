"""Token layouts: texts of which some tokens are slots for learned context vectors."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from visionpeft.errors import ConfigurationError

# Unicode categories of what nobody sees: separators, control and format characters, surrogates, marks on nothing.
INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Mn", "Me")

# A token id, or for the slot of context vector c the number -1 - c.
Tokens = tuple[int, ...]

FULL_LENGTH = 1024  # longer than any prompt, so that a tokenizer cuts nothing off unnoticed
ALLOW_DUPLICATES = "accept both with allow_duplicates=True (--model.learner.allow_duplicates true)"


def slots(count: int, first: int = 0) -> Tokens:
    """Slots for the context vectors first, first + 1, ..."""
    return tuple(-1 - index for index in range(first, first + count))


@dataclass(eq=False)
class Layout:
    """Token layouts of several texts, each from its start token to its end token, without padding.

    Args:
        texts: tokens of each text.
        pad: token id after the end.
        length: number of tokens the text tower reads.
        packings: what the text encoder computes from the layout on a device, kept with it.
    """

    texts: tuple[Tokens, ...]
    pad: int
    length: int
    packings: dict = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.texts)


class Tokenizer:
    """An OpenCLIP tokenizer, taken apart: start token, content, end token.

    Args:
        tokenize: what `open_clip.get_tokenizer` returns.
        length: number of tokens the text tower reads.

    Raises:
        ConfigurationError: `tokenize` is no such tokenizer.
    """

    def __init__(self, tokenize: Callable, length: int):
        if tokenize is None or not callable(tokenize) or isinstance(tokenize, type):
            raise ConfigurationError(
                "a learner needs the tokenizer of its CLIP; pass open_clip.get_tokenizer(<name of the model>), "
                f"not {tokenize!r}"
            )
        self.tokenize = tokenize
        self.length = length
        empty, word = self._rows(["", "a"])
        shared = next(index for index, (left, right) in enumerate(zip(empty, word, strict=True)) if left != right)
        self.start: Tokens = tuple(empty[:shared])
        self.end, self.pad = empty[shared], empty[shared + 1]
        # One of Hugging Face has a token for all that it does not know; some give a token with another use for it.
        unknown = getattr(getattr(tokenize, "tokenizer", None), "unk_token_id", None)
        self.unknown: int | None = None if unknown in (*self.start, self.end, self.pad) else unknown

    def _rows(self, texts: list[str]) -> list[list[int]]:
        try:
            rows = torch.as_tensor(self.tokenize(texts, context_length=FULL_LENGTH)).tolist()
            return [[int(token) for token in row] for row in rows]
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ConfigurationError(
                f"{type(self.tokenize).__name__} is not a tokenizer of OpenCLIP ({error}); pass what "
                "open_clip.get_tokenizer returns"
            ) from error

    def contents(self, texts: Iterable[str]) -> list[Tokens]:
        """Tokens of each text without start, end and padding."""
        texts = list(texts)
        contents = []
        for row in self._rows(texts) if texts else []:
            # The end token may also be the padding, or stand inside a text as <end_of_text>.
            last = len(row)
            while last > 0 and row[last - 1] == self.pad:
                last -= 1
            inside = row[len(self.start) : last]
            contents.append(tuple(inside[:-1] if inside and inside[-1] == self.end else inside))
        return contents

    def following(self, texts: Iterable[str]) -> list[Tokens]:
        """As `contents`, of texts that stand after another word.

        Of SigLIP 2's tokenizer, Gemma's, a word is another token there than at the start of a text: "▁dog", not "dog".
        Of most others it is the same.
        """
        texts = list(texts)
        (word,) = self.contents(["a"])
        return [
            after[len(word) :] if after[: len(word)] == word else alone
            for after, alone in zip(self.contents(f"a {text}" for text in texts), self.contents(texts), strict=True)
        ]

    def layout(self, contents: Sequence[Tokens], names: Sequence[str]) -> Layout:
        """Texts with these contents.

        Args:
            contents: tokens and slots between start and end.
            names: what each text is called in an error.

        Raises:
            ConfigurationError: a text is longer than the text tower reads.
        """
        texts = tuple((*self.start, *content, self.end) for content in contents)
        for text, name in zip(texts, names, strict=True):
            if len(text) > self.length:
                learned = sum(token < 0 for token in text)
                context = f", {learned} of them learned context," if learned else ""
                raise ConfigurationError(
                    f"the prompt of class {name!r} has {len(text)} tokens{context} and this CLIP reads {self.length}; "
                    "shorten the class name" + (" or the context" if learned else " or the template")
                )
        return Layout(texts, self.pad, self.length)


def clean_class_names(class_names: Sequence[str], allow_duplicates: bool = False) -> list[str]:
    """Class names as they stand in a prompt: underscores become spaces, and runs of white space one space.

    Args:
        class_names: the names, in the order of the labels.
        allow_duplicates: accept two classes of one name, as ImageNet's published list has.

    Raises:
        ConfigurationError: no names, a name that is empty or no text, or the same name twice.
    """
    if isinstance(class_names, str):
        raise ConfigurationError(f"class names must be a list of names, not the one text {class_names!r}")
    names = [] if class_names is None else list(class_names)
    if not names:
        raise ConfigurationError("no class names were given; give at least one")
    cleaned: list[str] = []
    for index, name in enumerate(names):
        if not isinstance(name, str) or not any(map(_is_visible, name)):
            raise ConfigurationError(f"class name {index} is {name!r}; every class needs a name of at least one letter")
        cleaned.append(" ".join(name.replace("_", " ").split()))
    if not allow_duplicates:
        first: dict[str, int] = {}
        for index, name in enumerate(cleaned):
            earlier = first.setdefault(name.lower(), index)
            if earlier != index:
                raise ConfigurationError(
                    f"class names {earlier} and {index} are both {name!r}, so that no prompt tells them apart; rename "
                    f"one, or {ALLOW_DUPLICATES}"
                )
    return cleaned


def places_among(names: Sequence[str], trained: Sequence[str]) -> list[int | None]:
    """Where each class stands among the trained ones, None for one that was not trained.

    Names are the same if they differ in upper and lower case alone, as where two of one name are refused. Of two
    trained classes of one name the first comes first.

    Args:
        names: cleaned names of classes.
        trained: cleaned names of the trained ones.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(trained):
        places.setdefault(name.lower(), []).append(place)
    return [places[name.lower()].pop(0) if places.get(name.lower()) else None for name in names]


def _is_visible(character: str) -> bool:
    """Whether it shows: no separator or underscore, and nothing like a zero-width space or a lone combining mark."""
    return character != "_" and unicodedata.category(character) not in INVISIBLE


def check_read(tokenizer: Tokenizer, names: Sequence[str], allow_duplicates: bool = False) -> None:
    """Refuse names that are read as nothing, or as others are that are written otherwise, as "a & b" and "a &amp; b".

    Args:
        tokenizer: what reads them; that of SigLIP leaves out all punctuation.
        names: the names.
        allow_duplicates: accept two that are read as the same tokens.

    Raises:
        ConfigurationError: there are such names.
    """
    first: dict[Tokens, str] = {}
    for name, tokens in zip(names, tokenizer.contents(names), strict=True):
        if not tokens:
            raise ConfigurationError(
                f"the tokenizer of this CLIP reads nothing of the class name {name!r}; write it in words"
            )
        if allow_duplicates:
            continue
        earlier = first.setdefault(tokens, name)
        if earlier is not name:
            raise ConfigurationError(
                f"the CLIP reads the class names {earlier!r} and {name!r} as the same tokens; rename one, or "
                f"{ALLOW_DUPLICATES}"
            )
