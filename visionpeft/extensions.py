"""Methods and learners from outside the package's own lists, which saved files name by their class."""

from collections.abc import Iterable, Iterator

# Rooms whose classes no list has, because they are of use there alone.
UNLISTED = ("visionpeft.searching.",)


def classes_by_name(base: type, own: Iterable[type]) -> dict[str, type]:
    """The package's own classes and the subclasses of `base` imported from elsewhere or of a search, by class name.

    The package's come first; of two classes from elsewhere with one name, the one that was defined last.
    """
    elsewhere = {cls.__name__: cls for cls in _below(base) if _is_elsewhere(cls.__module__)}
    return elsewhere | {cls.__name__: cls for cls in own}


def _is_elsewhere(module: str) -> bool:
    return module.partition(".")[0] != "visionpeft" or module.startswith(UNLISTED)


def _below(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _below(cls)
