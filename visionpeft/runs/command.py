"""How a command of `python -m visionpeft` is run: errors become one line, and libraries' remarks are left out."""

import argparse
import errno
import gc
import importlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from visionpeft.errors import ConfigurationError, UserError
from visionpeft.runs.launchers import refuse_several


class Options(argparse.ArgumentParser):
    """The options of a command that reads no configuration; `prog` is how it is called.

    An option may be written with `_` for `-` and the other way round, because configurations have `skip_corrupt`.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Take every option by the name that this parser has for it."""
        names = {name.replace("_", "-"): name for name in self._option_string_actions}
        parts = [each.partition("=") for each in (sys.argv[1:] if args is None else args)]
        known = [(names.get(name.replace("_", "-"), name), *rest) for name, *rest in parts]
        return super().parse_known_args(["".join(each) for each in known], namespace)

    def error(self, message: str):
        """Raise what the user can act on."""
        raise ConfigurationError(f"{message}; see {self.prog} --help")


# What a process of `fit` that starts others tells them, and where PyTorch's elastic agent wants to read their errors.
RUN = "VISIONPEFT_RUN_DIRECTORY"
ERRORS = "TORCHELASTIC_ERROR_FILE"


class PeerLost(UserError):
    """Another process of a training does not answer any more."""


class Interrupted(Exception):
    """The user pressed Ctrl-C; the message says how to go on."""


def command(
    function: str,
    arguments: list[str] | None = None,
    at_once: Callable[[list[str]], bool] = lambda arguments: False,
    of_several: Callable[[], None] = refuse_several,
) -> int:
    """Run a command; what the user can act on becomes one line on stderr and exit code 2, Ctrl-C 130.

    Args:
        function: "module:name" of what takes the command line without the program's name. It is imported here, so that
            a command costs the imports that it needs.
        arguments: that command line; by default this process's.
        at_once: called with it before the import; true if the command has been answered.
        of_several: called before the import; makes of this process what one of several is that a launcher has started.
    """
    module, _, name = function.partition(":")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if at_once(arguments):
            return 0
        of_several()
        run = getattr(_imported(module), name)
        silence()  # after the imports, because libraries set the levels of their loggers then
        run(arguments)
    except Interrupted as error:
        return said(str(error), 130)
    except KeyboardInterrupt:
        return said("interrupted before training began", 130)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return said("no space is left on the device; what was saved before is intact", 2)
    except PeerLost as error:
        # The process that started this one knows better which one ended, and why.
        return 2 if is_started() else said(str(error), 2)
    except (UserError, *_errors_of_lightning()) as error:
        return said(str(error), 2)
    return 0


def _imported(name: str) -> ModuleType:
    """A module, with the first of whose imports come half a million objects that stay to the end.

    To look for garbage among them, again and again as they become more, takes a tenth of the time of the imports. So
    nothing looks for any until they are done, and then they count as old at once.
    """
    if name in sys.modules:
        return sys.modules[name]
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if not gc.get_freeze_count():  # else another one keeps objects frozen, which must stay so
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if collects:
            gc.enable()


def _errors_of_lightning() -> tuple[type[Exception], ...]:
    """The error of Lightning's that says what a user can change, if Lightning has been imported."""
    exceptions = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return () if exceptions is None else (exceptions.MisconfigurationException,)


def is_started() -> bool:
    """Whether another process of `fit` has started this one."""
    return RUN in os.environ and ERRORS in os.environ


def said(message: str, code: int) -> int:
    """Say what is wrong, in one line on stderr or to the process that started this one; returns the exit code."""
    message = " ".join(message.split())
    if is_started():  # it says what the first of us has said
        Path(os.environ[ERRORS]).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    else:
        print(f"error: {message}", file=sys.stderr)
    return code


def silence() -> None:
    """Leave out the libraries' remarks that a user of this command line cannot act on; others take one line."""
    warnings.formatwarning = lambda message, *where, **line: f"warning: {message}\n"
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "jsonargparse"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(lambda record: "No pretrained weights loaded" not in record.getMessage())
    for message in (
        r".*does not have many workers.*",
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*GPU available but not used.*",
        r".*`srun` command is available on your system but is not used.*",  # processes start without it, too
        r".*LeafSpec.*",
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*Experiment logs directory .* exists.*",
        r".*Total length of `list` across ranks is zero.*",  # no validation split
        r".*You defined a `validation_step` but have no `val_dataloader`.*",
        r".*configure_optimizers` returned `None`.*",  # nothing is trained
        r".*in eval mode at the start of training.*",  # they are frozen
        r".*SWA is currently only supported every epoch.*",  # its rate takes the place of that of every step
        r".*the hooks will not be called on every batch.*",  # they are about steps
        r".*Glyph .* missing from .*font.*",  # names of classes in letters that matplotlib's font does not have
        r".*No positive samples found in target.*",  # labels that do not occur, which results count
    ):
        warnings.filterwarnings("ignore", message=message)
