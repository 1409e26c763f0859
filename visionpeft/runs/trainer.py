"""Lightning's Trainer, as the command line reads its options."""

from datetime import timedelta

import lightning.pytorch as pl
from jsonargparse.typing import register_type


class Batches(int):
    """A number of batches.

    A type of its own, because no other library has put it into a union in another order, and because jsonargparse's
    numbers take 1.0, the share of all batches, for 1, one batch.
    """


def _batches(value: object) -> Batches:
    """A number of batches out of a configuration or the command line.

    Raises:
        ValueError: it is none, such as a share.
    """
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{value!r} is no number of batches")
    return Batches(number)


def _written(value: object) -> int:
    """A number of batches in a configuration.

    Raises:
        ValueError: it is none. The first member of a union that writes a value does so, and 0.5 as an int is 0.
    """
    return int(_batches(value))


register_type(Batches, serializer=_written, deserializer=_batches)
Share = Batches | float | None


class Trainer(pl.Trainer):
    """Lightning's Trainer. A whole number of an option below is a number of batches, one with a point a share of them.

    Lightning annotates them as `Optional[Union[int, float]]`. The `typing` module keeps what it has made and finds
    `Union[float, int]` equal to `Union[int, float]`, so if any library has made the other one before, that is what the
    annotation is, and jsonargparse reads `1`, one batch, as `1.0`, all batches.

    Args:
        limit_train_batches: of an epoch of training.
        limit_val_batches: of a validation.
        limit_test_batches: of a test.
        limit_predict_batches: of a prediction.
        overfit_batches: of the training data, on which alone it trains.
        val_check_interval: batches or share of an epoch after which it validates, or a time.
        options: all others of Lightning's.
    """

    def __init__(
        self,
        *,
        limit_train_batches: Share = None,
        limit_val_batches: Share = None,
        limit_test_batches: Share = None,
        limit_predict_batches: Share = None,
        overfit_batches: Batches | float = 0.0,
        val_check_interval: Batches | float | str | timedelta | dict[str, int] | None = None,
        **options,
    ):
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **options,
        )
