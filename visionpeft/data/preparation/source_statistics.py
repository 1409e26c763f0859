"""`python -m visionpeft.prepare statistics`: what `PromptAlign` needs of the source of its prompts."""

from collections.abc import Sequence
from pathlib import Path

from visionpeft.clip.learners import MaPLe
from visionpeft.clip.source_statistics import save_moments, source_moments
from visionpeft.data.unlabelled import files_dataloader, find_images
from visionpeft.errors import ConfigurationError
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import open_run


def prepare_statistics(run: Path, images: Sequence[Path], output: Path, batch_size: int = 64) -> int:
    """Write the mean and variance of the tokens of images in the blocks with prompts of a trained `MaPLe`.

    Args:
        run: directory of its run.
        images: files and folders of images, prepared as in its test.
        output: folder to write to.
        batch_size: images in a batch.

    Returns:
        The number of images.

    Raises:
        ConfigurationError: the run is not of MaPLe.
        StorageError: the run has not finished, or its files are damaged.
        DataError: there are no images, or one cannot be read.
    """
    trained = open_run(RunDirectory(run))
    learner = trained.model
    if type(learner) is not MaPLe:
        raise ConfigurationError(
            f"source statistics are of the prompts of MaPLe, and {run} has trained a {type(learner).__name__}"
        )
    files = find_images(images)
    batches, _ = files_dataloader(files, trained.preprocessing, resize=trained.resize, batch_size=batch_size)
    moments, count = source_moments(learner, (batch for batch, _ in batches))
    save_moments(output, learner, moments, {"images": count, "from": [str(path) for path in images]})
    return count
