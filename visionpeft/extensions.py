"""Methods and learners from outside the package, which saved files name by their class."""

from collections.abc import Iterable, Iterator


def classes_by_name(base: type, own: Iterable[type]) -> dict[str, type]:
    """The package's own classes and the subclasses of `base` that were imported from elsewhere, by class name.

    The package's come first; of two classes from elsewhere with one name, the one that was defined last.
    """
    elsewhere = {cls.__name__: cls for cls in _below(base) if cls.__module__.partition(".")[0] != "visionpeft"}
    return elsewhere | {cls.__name__: cls for cls in own}


def _below(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _below(cls)
