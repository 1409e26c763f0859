"""Share an adapter or a learner on the Hugging Face Hub, with a model card, and load it from there."""

import hashlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.nn as nn
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from visionpeft.adapters.described_tensors import copy_described, read_described, write_described
from visionpeft.adapters.storage import save
from visionpeft.backbones.preprocessing import Preprocessing
from visionpeft.errors import ConfigurationError, one_line
from visionpeft.files import write_whole
from visionpeft.models.network import offline_if_unreachable
from visionpeft.sharing.described_backbone import without_folders
from visionpeft.sharing.model_card import model_card
from visionpeft.sharing.run_directory import RunDirectory
from visionpeft.sharing.trained_model import TrainedModel, open_saved, read_description, stem_of

# The last line of a model card, which Markdown does not show: by it a card that nobody has changed is known.
SEAL = b"\n<!-- written by visionpeft, SHA-256 of the above: %s -->\n"

# Exactly what is read; anything else in a repository is never downloaded.
FILES = ["adapter.safetensors", "adapter.json", "learner.safetensors", "learner.json"]


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    metadata: Mapping | None = None,
) -> None:
    """Write what `visionpeft.save` or `save_learner` writes, and a model card.

    A README.md that was written or changed by hand stays as it is, with a warning.

    Args:
        model: a model with adapters, or a learner.
        folder: where to write.
        name: which adapter; may be left out if there is only one.
        repo_id: name of the repository the card is for; by default the folder's.
        class_names: names of the classes, in the order of the logits; a learner knows its own.
        preprocessing: how images were prepared.
        metadata: anything else that JSON can hold, such as data set and result.

    Raises:
        ConfigurationError: it is not said which adapter; a name or class names for a learner; or what is said about it
            cannot be written.
        StorageError: the folder cannot be written, or has files of these names that something else wrote.
    """
    if _is_learner(model):
        from visionpeft.clip.storage import save_learner  # a CLIP is touched, so OpenCLIP is there

        if name is not None or class_names is not None:
            raise ConfigurationError("a learner is saved whole and knows its class names; leave name= and class_names=")
        save_learner(model, folder, preprocessing=preprocessing, metadata=metadata)
    else:
        save(model, folder, name, class_names=class_names, preprocessing=preprocessing, metadata=metadata)
    _write_card(Path(folder), repo_id or Path(folder).resolve().name, None)


def from_pretrained(
    source: str | Path,
    model: nn.Module | None = None,
    tokenizer: Callable | None = None,
    *,
    class_names: Sequence[str] | None = None,
    task: str | None = None,
    checkpoint: str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> TrainedModel:
    """Load an adapter or a learner, with its backbone, from a folder or a repository of the Hub.

    Only the four files that `save` and `save_learner` write are downloaded. Of the backbone their description chooses
    what the model is, never what is loaded or where from: `checkpoint` and other paths in it are refused, in a download
    and in a folder alike, because a folder may have been somebody else's before.

    Args:
        source: a folder that `save_pretrained`, `save` or `save_learner` wrote, or `user/name` on the Hub.
        model: the backbone, or CLIP, if it is already there; by default it is made as the description says.
        tokenizer: that of the CLIP, if `model` is one.
        class_names: other classes, for a learner that takes any.
        task: of the images, for what was trained on several.
        checkpoint: a file with the weights of the backbone, which the description names otherwise or leaves to a
            download; other weights than those of the training are refused.
        revision: branch, tag or commit of the repository.
        cache_dir: folder of downloads; by default the Hub's own.
        token: of the Hub; by default the one that was logged in with.
        local_files_only: use what has been downloaded before.

    Returns:
        The model in evaluation mode, with its class names and preprocessing.

    Raises:
        ConfigurationError: there is neither such a folder nor such a repository, or the backbone cannot be made.
        StorageError: the files are damaged or belong to another backbone.
    """
    folder = Path(source)
    if not folder.is_dir():
        options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        folder = download(str(source), **options)
    return open_saved(folder, class_names, model, tokenizer, checkpoint=checkpoint, task=task)


def push_to_hub(
    source: nn.Module | str | Path,
    repo_id: str,
    *,
    name: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with visionpeft",
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    metadata: Mapping | None = None,
) -> str:
    """Upload what was trained, never the backbone, in one commit; the repository is made if it does not exist.

    Of a file of weights and of a local folder of the backbone the name alone is uploaded, not where it lies.

    Args:
        source: a model with adapters, a learner, the directory of a finished run (its results go into the card), or a
            folder that `save_pretrained`, `save` or `save_learner` wrote.
        repo_id: `user/name` on the Hub.
        name: which adapter of a model; may be left out if there is only one.
        private: whether a new repository is private.
        token: of the Hub; by default the one that was logged in with.
        revision: branch to which to upload.
        commit_message: message of the commit.
        class_names: of a model, as for `save_pretrained`.
        preprocessing: of a model, as for `save_pretrained`.
        metadata: of a model, as for `save_pretrained`.

    Returns:
        The address of the commit.

    Raises:
        ConfigurationError: the Hub refuses, or cannot be reached; nothing is uploaded.
        StorageError: the folder holds nothing that was trained.
    """
    with TemporaryDirectory() as temporary:
        staged = Path(temporary)
        about = {"class_names": class_names, "preprocessing": preprocessing, "metadata": metadata}
        if isinstance(source, nn.Module):
            save_pretrained(source, staged, name=name, repo_id=repo_id, **about)
        else:
            given = [key for key, value in (about | {"name": name}).items() if value is not None]
            if given:
                raise ConfigurationError(f"{given[0]}= belongs to a model; the files in {source} say it already")
            _stage(Path(source), staged, repo_id)
        _leave_folders_out(staged)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            info = api.upload_folder(
                repo_id=repo_id, folder_path=staged, revision=revision, commit_message=commit_message
            )
        except Exception as error:  # the errors of a network that fails are those of whatever client the Hub's has
            raise ConfigurationError(
                f"{repo_id} could not be uploaded to the Hub ({one_line(error)}); check the name user/name, "
                "your login (hf auth login, or token=) and the network"
            ) from error
    return info.commit_url


def _is_learner(model: nn.Module) -> bool:
    """Whether a model is a learner; where the module of learners is not imported, there is none."""
    learner = sys.modules.get("visionpeft.clip.learner")
    return learner is not None and isinstance(model, learner.Learner)


def _stage(source: Path, staged: Path, repo_id: str) -> None:
    """Copy what was trained out of a run or a folder, with a card."""
    results, folder = None, source
    if (source / "config.yaml").is_file():
        run = RunDirectory.existing(source)
        results = run.read_results()
        folder = run.learner if run.learner.is_dir() else run.adapter
    copy_described(folder, staged, stem_of(folder))
    _write_card(staged, repo_id, results)


def _leave_folders_out(staged: Path) -> None:
    """Write what is to be uploaded again if its description says where on this machine the backbone's weights lie."""
    description, tensors = read_described(staged, stem_of(staged), lambda description, path: None)
    shared = without_folders(description)
    if shared != description:
        write_described(staged, stem_of(staged), tensors, shared)


def _write_card(folder: Path, repo_id: str, results: Mapping | None) -> None:
    """Write README.md, unless it is there and is not exactly what this wrote before: a page of the user's stays."""
    path = folder / "README.md"
    if path.exists() and not _is_our_card(path.read_bytes()):
        warnings.warn(
            f"{path} was written or changed by hand and stays as it is; remove it to get a new model card", stacklevel=3
        )
        return
    text = model_card(without_folders(read_description(folder)), results, repo_id).content.encode()
    write_whole(path, text + SEAL % hashlib.sha256(text).hexdigest().encode())


def _is_our_card(content: bytes) -> bool:
    text, seal, _ = content.rpartition(SEAL.partition(b"%s")[0])
    return bool(seal) and content == text + SEAL % hashlib.sha256(text).hexdigest().encode()


def download(repo_id: str, *, local_files_only: bool = False, **options) -> Path:
    """The folder with the files of an adapter or a learner of the Hub; exactly those four are downloaded.

    Args:
        repo_id: `user/name` on the Hub.
        local_files_only: use what has been downloaded before.
        **options: `revision`, `cache_dir` and `token`, as for `from_pretrained`.

    Raises:
        ConfigurationError: there is no such repository, or it cannot be reached.
    """
    with offline_if_unreachable() as offline:
        options["local_files_only"] = local_files_only or offline
        try:
            return Path(snapshot_download(repo_id, allow_patterns=FILES, **options))
        except LocalEntryNotFoundError as error:
            why = (
                "no network, and it has not been downloaded before" if offline else "it has not been downloaded before"
            )
            raise ConfigurationError(f"{repo_id!r} is no folder, and not to be had from the Hub ({why})") from error
        except HFValidationError as error:
            raise ConfigurationError(
                f"{repo_id!r} is neither a folder nor a repository user/name of the Hub"
            ) from error
        except (RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
            raise ConfigurationError(
                f"{repo_id!r} is no folder, and not to be had from the Hub ({one_line(error)})"
            ) from error
