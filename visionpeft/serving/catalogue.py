"""What may be served: the runs and saved folders that were named, and those below a folder that was named."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visionpeft.errors import ConfigurationError, StorageError
from visionpeft.sharing.adapter_pool import is_name
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import stem_of


@dataclass(frozen=True)
class Saved:
    """Something that was trained.

    Args:
        name: how it is asked for.
        folder: what `save` or `save_learner` wrote.
        stem: "adapter" or "learner".
        run: the run it belongs to, if any.
    """

    name: str
    folder: Path
    stem: str
    run: RunDirectory | None


class Catalogue(Mapping[str, Path]):
    """Folders by name. A name is one part of a path, and never leads out of the folders that were named.

    Args:
        places: run directories, folders that `save` or `save_learner` wrote, or folders of such; in the last, what is
            added later is found, too.

    Raises:
        ConfigurationError: a place does not exist, or two things have one name.
    """

    def __init__(self, places: Sequence[str | Path]):
        self._named: dict[str, Saved] = {}
        self._roots: list[Path] = []
        for place in map(Path, places):
            if not place.is_dir():
                raise ConfigurationError(f"{place} is no folder; name runs, folders of adapters, or folders of these")
            found = saved_at(place)
            if found is None:
                self._roots.append(place.resolve())
                continue
            if not is_name(found.name):
                raise ConfigurationError(f"{place} cannot be served: its name is not made of letters, digits, . + - _")
            if found.name in self._named:
                raise ConfigurationError(f"{place} and {self._named[found.name].folder} have the same name; rename one")
            self._named[found.name] = found
        listed = [name for root in self._roots for name in _names_in(root)]
        listed += self._named
        if twice := next((name for name in listed if listed.count(name) > 1), None):
            raise ConfigurationError(f"two of the folders hold something called {twice!r}; rename one")

    def find(self, name: str) -> Saved | None:
        """What has this name, if anything."""
        if name in self._named:
            return self._named[name]
        if not is_name(name):
            return None
        for root in self._roots:
            place = root / name
            # A link may lead anywhere; what it leads to must lie below the folder, too.
            if place.is_dir() and place.resolve().is_relative_to(root) and (found := saved_at(place)):
                return found
        return None

    def __getitem__(self, name: str) -> Path:
        found = self.find(name)
        if found is None:
            raise KeyError(name)
        return found.folder

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._named, *(name for root in self._roots for name in _names_in(root))))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def saved_at(place: Path) -> Saved | None:
    """What a run directory or a folder holds, if it holds something trained."""
    name = place.resolve().name
    run = RunDirectory(place)
    if run.config.is_file():
        folder = run.learner if run.learner.is_dir() else run.adapter
    else:
        run, folder = None, place
    try:
        return Saved(name, folder, stem_of(folder), run)
    except StorageError:
        return None


def _names_in(root: Path) -> list[str]:
    places = sorted(path for path in root.iterdir() if path.is_dir() and is_name(path.name))
    return [place.name for place in places if place.resolve().is_relative_to(root) and saved_at(place)]
