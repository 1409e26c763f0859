"""Where the files shipped with the package are: `configs` and `datasets`."""

from pathlib import Path

from visionpeft.errors import ConfigurationError


def shipped(kind: str) -> Path:
    """Folder `kind` ("configs" or "datasets") inside the installed package, or beside it in an editable install.

    Raises:
        ConfigurationError: neither place has the folder.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise ConfigurationError(f"the folder '{kind}' shipped with visionpeft is missing under {package}; reinstall it")
