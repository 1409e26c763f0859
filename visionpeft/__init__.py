"""Parameter-efficient fine-tuning of Vision Transformers and CLIP.

Every public name is here: `import visionpeft as vp`, then `vp.attach(model, vp.LoRA(rank=8))`. A name is imported when
it is first used (PEP 562), so that what acts on timm models costs torch and timm alone: OpenCLIP is imported with the
first learner, and Lightning only by the commands `python -m visionpeft.fit` and its kin.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers; a test compares the two
    from visionpeft.adapters.allocate import allocate as allocate
    from visionpeft.adapters.attach import attach as attach
    from visionpeft.adapters.attach import detach as detach
    from visionpeft.adapters.combine import combine as combine
    from visionpeft.adapters.combine import feature_mean as feature_mean
    from visionpeft.adapters.combine import similar_adapters as similar_adapters
    from visionpeft.adapters.economise import economise as economise
    from visionpeft.adapters.lorahub import lorahub as lorahub
    from visionpeft.adapters.merge import merge as merge
    from visionpeft.adapters.merge import unmerge as unmerge
    from visionpeft.adapters.selection import Selection as Selection
    from visionpeft.adapters.stages import stages as stages
    from visionpeft.adapters.start import prompt_similarity as prompt_similarity
    from visionpeft.adapters.start import start_from as start_from
    from visionpeft.adapters.storage import load as load
    from visionpeft.adapters.storage import read_metadata as read_metadata
    from visionpeft.adapters.storage import save as save
    from visionpeft.adapters.switch import activate as activate
    from visionpeft.adapters.switch import disable as disable
    from visionpeft.adapters.switch import route as route
    from visionpeft.adapters.switch import use as use
    from visionpeft.adapters.trained import trainable_parameters as trainable_parameters
    from visionpeft.adapters.training_hooks import after_step as after_step
    from visionpeft.adapters.training_hooks import penalty as penalty
    from visionpeft.backbones import describe as describe
    from visionpeft.clip.description import read_learner as read_learner
    from visionpeft.clip.learners import *  # noqa: F403
    from visionpeft.clip.storage import load_learner as load_learner
    from visionpeft.clip.storage import save_learner as save_learner
    from visionpeft.costs.counts import summary as summary
    from visionpeft.errors import ConfigurationError as ConfigurationError
    from visionpeft.errors import DataError as DataError
    from visionpeft.errors import StorageError as StorageError
    from visionpeft.errors import UnsupportedError as UnsupportedError
    from visionpeft.errors import UserError as UserError
    from visionpeft.heads import *  # noqa: F403
    from visionpeft.heads.mask_loss import MaskLoss as MaskLoss
    from visionpeft.heads.mask_loss import mask_classification_loss as mask_classification_loss
    from visionpeft.methods import *  # noqa: F403
    from visionpeft.models.create import create_backbone as create_backbone
    from visionpeft.models.create_clip import create_clip as create_clip
    from visionpeft.models.dense_predictor import DensePredictor as DensePredictor
    from visionpeft.models.feature_maps import feature_maps as feature_maps
    from visionpeft.models.object_detector import ObjectDetector as ObjectDetector
    from visionpeft.models.open_vocabulary import OpenVocabulary as OpenVocabulary
    from visionpeft.models.proxy_tuning import ProxyTuned as ProxyTuned
    from visionpeft.models.proxy_tuning import proxy_logits as proxy_logits
    from visionpeft.models.video_classifier import VideoClassifier as VideoClassifier
    from visionpeft.models.windows import predict_masks as predict_masks
    from visionpeft.sharing.adapter_pool import AdapterPool as AdapterPool
    from visionpeft.sharing.hub import from_pretrained as from_pretrained
    from visionpeft.sharing.hub import push_to_hub as push_to_hub
    from visionpeft.sharing.hub import save_pretrained as save_pretrained
    from visionpeft.sharing.peft_export import export_peft as export_peft
    from visionpeft.sharing.peft_import import import_peft as import_peft
    from visionpeft.sites.tasks_of_rows import of_tasks as of_tasks

# Methods, heads and learners are not in this table: the packages that list them are asked.
_HOMES = {
    "visionpeft.adapters.allocate": ("allocate",),
    "visionpeft.adapters.attach": (
        "attach",
        "detach",
    ),
    "visionpeft.adapters.combine": (
        "combine",
        "feature_mean",
        "similar_adapters",
    ),
    "visionpeft.adapters.economise": ("economise",),
    "visionpeft.adapters.lorahub": ("lorahub",),
    "visionpeft.adapters.merge": (
        "merge",
        "unmerge",
    ),
    "visionpeft.adapters.selection": ("Selection",),
    "visionpeft.adapters.stages": ("stages",),
    "visionpeft.adapters.start": (
        "prompt_similarity",
        "start_from",
    ),
    "visionpeft.adapters.storage": (
        "load",
        "read_metadata",
        "save",
    ),
    "visionpeft.adapters.switch": (
        "activate",
        "disable",
        "route",
        "use",
    ),
    "visionpeft.adapters.trained": ("trainable_parameters",),
    "visionpeft.adapters.training_hooks": (
        "after_step",
        "penalty",
    ),
    "visionpeft.backbones": ("describe",),
    "visionpeft.clip.description": ("read_learner",),
    "visionpeft.clip.storage": (
        "load_learner",
        "save_learner",
    ),
    "visionpeft.costs.counts": ("summary",),
    "visionpeft.errors": (
        "ConfigurationError",
        "DataError",
        "StorageError",
        "UnsupportedError",
        "UserError",
    ),
    "visionpeft.heads.mask_loss": (
        "MaskLoss",
        "mask_classification_loss",
    ),
    "visionpeft.models.create": ("create_backbone",),
    "visionpeft.models.create_clip": ("create_clip",),
    "visionpeft.models.dense_predictor": ("DensePredictor",),
    "visionpeft.models.feature_maps": ("feature_maps",),
    "visionpeft.models.object_detector": ("ObjectDetector",),
    "visionpeft.models.open_vocabulary": ("OpenVocabulary",),
    "visionpeft.models.proxy_tuning": (
        "ProxyTuned",
        "proxy_logits",
    ),
    "visionpeft.models.video_classifier": ("VideoClassifier",),
    "visionpeft.models.windows": ("predict_masks",),
    "visionpeft.sharing.adapter_pool": ("AdapterPool",),
    "visionpeft.sharing.hub": (
        "from_pretrained",
        "push_to_hub",
        "save_pretrained",
    ),
    "visionpeft.sharing.peft_export": ("export_peft",),
    "visionpeft.sharing.peft_import": ("import_peft",),
    "visionpeft.sites.tasks_of_rows": ("of_tasks",),
}
_LISTS = ("visionpeft.methods", "visionpeft.heads", "visionpeft.clip.learners")
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str):
    if name == "__all__":
        return __dir__()
    # Methods, heads and learners are classes; other names, as of `from visionpeft import data`, are no names of a list.
    if name not in _HOME and not name[0].isupper():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        package = next((package for package in map(import_module, _LISTS) if name in package.__all__), None)
        if package is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(package, name)
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted({*_HOME, *(name for package in map(import_module, _LISTS) for name in package.__all__)})
