"""What loggers of Lightning are told of a run: its configuration, in one table of names and values."""

import re
from collections.abc import Iterator, Sequence

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger

# A logger is told nothing of the loggers, whose options are those of somebody's account, and nothing of where a run is
# written, which is no property of it.
NOT_LOGGED = ("trainer.logger", "trainer.default_root_dir", "output")
_SECRET = re.compile(r"(^|[._])(api_?key|access_key|auth|password|secret|token)$", re.IGNORECASE)
_USER = re.compile(r"^([\w+.-]+://)[^/@]*@")
_SIGNATURE = re.compile(r"^(https?://[^?#]*)[?#].*$", re.DOTALL)  # elsewhere a question mark stands for any letter


def hyper_parameters(content: dict) -> dict[str, object]:
    """The options of a run by the names that they have on the command line, such as `model.method.rank`.

    A class stands under the name of what it is given for (`model.method: LoRA`), members of a list of classes have
    their number (`model.method.0`). Left out are options of the Trainer that are null, as it has some thirty of them,
    texts under the name of a secret, and of an address where keys stand: the user before an @ and, of one of the web,
    what follows a question mark.

    Args:
        content: the configuration of a run, as plain values.
    """
    found = {}
    for name, value in _leaves(content, ""):
        if any(name == each or name.startswith(f"{each}.") for each in NOT_LOGGED):
            continue
        if (value is None and name.startswith("trainer.")) or (isinstance(value, str) and _SECRET.search(name)):
            continue
        found[name] = _without_user(value)
    return found


def log_hyper_parameters(loggers: Sequence[Logger], content: dict) -> None:
    """Tell loggers with what a run is made; in the process that writes, before it trains.

    Args:
        loggers: of a Trainer.
        content: the configuration of the run, as plain values.
    """
    for logger in loggers:
        logger.log_hyperparams(hyper_parameters(content))


def log_outcome(trainer: pl.Trainer, monitored: str) -> None:
    """Give TensorBoard the number beside which it lists hyper-parameters: that of the test by which epochs are chosen.

    Lightning writes `hp_metric`, -1, when hyper-parameters are logged, and the last value of that name counts.

    Args:
        trainer: it has tested.
        monitored: name of the metric.
    """
    value = trainer.callback_metrics.get(f"test/{monitored}")
    for logger in trainer.loggers:
        if value is not None and isinstance(logger, TensorBoardLogger) and logger._default_hp_metric:
            logger.log_metrics({"hp_metric": float(value)}, trainer.global_step)
            logger.save()


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Options by their names, with those of a class directly under the name of what the class is given for."""
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        yield name, value["class_path"].rpartition(".")[2]
        yield from _leaves(value.get("init_args") or {}, name)
    elif isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for number, each in enumerate(value):
            yield from _leaves(each, f"{name}.{number}")
    elif name and value != {}:
        yield name, value


def _without_user(value: object) -> object:
    """An address without the user, the password and the signature that it may hold; another value as it is."""
    if isinstance(value, list):
        return [_without_user(each) for each in value]
    return _SIGNATURE.sub(r"\1", _USER.sub(r"\1", value)) if isinstance(value, str) else value
