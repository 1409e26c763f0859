"""Few-shot learning and open-vocabulary classification with a CLIP and a learner on it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler

from visionpeft.adapters.adapters import has_adapters
from visionpeft.adapters.attach import detach
from visionpeft.adapters.economise import economise
from visionpeft.backbones.preprocessing import preprocessing_of
from visionpeft.caching.feature_cache import FeatureCache
from visionpeft.clip.class_loss import ClassLoss
from visionpeft.clip.learner import Learner
from visionpeft.clip.stages import InTwoStages
from visionpeft.clip.storage import load_learner, save_learner
from visionpeft.clip.unprompted import unprompted
from visionpeft.data.dataset import ImageDataset
from visionpeft.data.labels import Labels
from visionpeft.data.transforms import ImageTransform
from visionpeft.errors import ConfigurationError
from visionpeft.models.create_clip import create_clip
from visionpeft.tasks.averaging import copy_again
from visionpeft.tasks.class_pairs import ClassPairs
from visionpeft.tasks.optimisation import Optimisation
from visionpeft.tasks.passes import in_order, keep_all
from visionpeft.tasks.task import ImageTask

DRAWING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

PROMPT_RECIPE = Optimisation(
    optimizer="sgd", lr=0.002, weight_decay=5e-4, decay_all=True, schedule="epoch_cosine", warmup_epochs=1
)


class PromptLearning(ImageTask):
    """The loss of a learner on a frozen CLIP; a learner without trained parameters is only fitted and tested.

    Features of images whose tower is not trained are kept, for training if the data shows a fixed number of views of
    each image. Batches are (images (batch, 3, height, width), labels (batch,)); for the test the images may come in
    several views, (batch, views, 3, height, width).

    Args:
        learner: the learner; CLIP, tokenizer and class names are given to it by the task.
        class_names: one name for each class; taken from the data.
        backbone: `nano_clip`, or `open_clip/<model>/<tag>` such as `open_clip/ViT-B-16-quickgelu/openai`.
        pretrained: load the CLIP's published weights.
        checkpoint: a local file with the CLIP's weights.
        backbone_kwargs: further arguments of `open_clip.create_model`.
        labels: what a label is, taken from the data; only "classes", whose names an image is compared with.
        loss: "cross_entropy", as papers train on any CLIP; or "sigmoid", SigLIP's own, for learners that can take it:
            each class is then judged by itself, and probabilities, confidence and calibration are those of sigmoids.
        cache_features: keep image features that cannot change.
        chunk_size: most classes whose text is encoded at a time; less memory, the same gradient. None takes all.
        compile: refused: features of a frozen image tower are kept, and texts are computed in packs of their own sizes.
        optimisation: optimiser, learning rates and schedule; by default those of CoOp.
        seed: of the initial values, and with the epoch of all randomness in it.
    """

    folder = "learner"

    def __init__(
        self,
        learner: Callable[[nn.Module, Callable, list[str]], Learner],
        class_names: list[str],
        backbone: str = "nano_clip",
        pretrained: bool = True,
        checkpoint: str | None = None,
        backbone_kwargs: dict | None = None,
        labels: Labels = "classes",
        loss: ClassLoss = "cross_entropy",
        cache_features: bool = True,
        chunk_size: int | None = None,
        compile: bool = False,
        optimisation: Optimisation = PROMPT_RECIPE,
        seed: int = 0,
    ):
        if labels != "classes":
            raise ConfigurationError(
                f"a learner on a CLIP tells which one of the class names fits an image, and labels {labels!r} are not "
                "that; train an adapter on its image tower (--config images_lora.yaml --model.backbone open_clip/...)"
            )
        if compile:
            raise ConfigurationError(
                "a learner is not compiled: features of an image tower that is not trained are kept, and texts are "
                "computed in packs whose sizes follow the class names, of which each would be compiled anew; leave out "
                "compile"
            )
        objective = ClassPairs(len(class_names)) if loss == "sigmoid" else None
        super().__init__(class_names, optimisation, seed, objective)
        if chunk_size is not None and chunk_size < 1:
            raise ConfigurationError(
                f"chunk_size must be at least 1, or null for all classes at once, not {chunk_size}"
            )
        self.backbone_name = backbone
        self.chunk_size = chunk_size
        torch.manual_seed(seed)  # a CLIP without pretrained weights is drawn
        clip, self.tokenizer = create_clip(
            backbone, pretrained=pretrained, checkpoint=checkpoint, **(backbone_kwargs or {})
        )
        self.preprocessing = preprocessing_of(clip)
        torch.manual_seed(seed)
        self.learner = learner(clip, self.tokenizer, self.class_names)
        self.learner.set_loss(loss)
        self.learner.chunk_size = chunk_size
        self._economise()
        self.fixed_views: int | None = None
        self.chosen: dict = {}
        self.unadapted: Tensor | None = None
        self.order: str | None = None  # of the test images; the data says it
        self.cache = FeatureCache() if cache_features else None

    @property
    def label(self) -> str:
        """Name of the learner."""
        return type(self.learner).__name__

    def describe(self) -> dict:
        """Learner, its templates if it has any, CLIP and parameter counts."""
        learner = self.learner
        trainable = sum(parameter.numel() for parameter in learner.trainable_parameters())
        total = sum(parameter.numel() for parameter in learner.parameters())
        return {
            "learner": {"class": type(learner).__name__, "options": learner.options},
            "template": list(learner.templates) or None,
            **({"published": learner.taken()} if learner.taken() else {}),
            **({} if learner.loss_name == "cross_entropy" else {"loss": learner.loss_name}),
            "backbone": learner.clip.backbone_source,
            "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
            **({"chosen": self.chosen} if self.chosen else {}),
            **({"stream": {"order": self.order}} if learner.online else {}),
        }

    def connect(self, datamodule: pl.LightningDataModule) -> None:
        """Tell the data how the CLIP wants its images, and the learner the data set's template."""
        super().connect(datamodule)
        self.order = getattr(datamodule, "test_order", None)
        # In how many ways the data shows each training image, None if their number is not bounded.
        self.fixed_views = getattr(datamodule, "deterministic_views", None)
        if hasattr(datamodule, "template_for"):
            self.learner.set_template(datamodule.template_for(self.learner.template_style))
        if hasattr(datamodule, "published"):  # other data has nothing to say, also of what is taken already
            self.learner.set_published(datamodule.published)

    def check_before_training(self, datamodule: pl.LightningDataModule, processes: int = 1) -> None:
        """Refuse a learner that is fitted on all images where they are only read in order, or stages in processes.

        Raises:
            ConfigurationError: so it is; or several processes train a learner in two stages.
        """
        if processes > 1 and isinstance(self.learner, InTwoStages):
            raise ConfigurationError(
                f"each stage of {self.label} trains some of its parameters and not the others, and {processes} "
                "processes wait for the gradients of all; take one device (--trainer.devices 1)"
            )
        if getattr(datamodule, "streams", False) and type(self.learner).fit_features is not Learner.fit_features:
            raise ConfigurationError(
                f"{self.label} is fitted on the features of all images before training, and a stream is only read in "
                "order; use a data set that is fetched as a whole (--data.source hfds/...), or ImageFolder"
            )

    def setup(self, stage: str) -> None:
        """Connect task and data; before training, fit what is not learnt by gradient steps."""
        super().setup(stage)
        if self.cache is not None:
            self.cache.hash_again()
        if stage == "fit":
            self.learner.begin_training()  # which decides what is trained, and with it what is kept
            self._fit_features()
            if not self.trained_parameters():
                self.trainer.fit_loop.max_epochs = self.trainer.limit_train_batches = 0
            elif self._keeps_features and self.fixed_views is not None:
                keep_all(self, min(self.fixed_views, self.num_epochs), self._encode(), self.cache)
            self.train()  # features were computed in evaluation mode

    def on_test_start(self) -> None:
        """Refuse an order of the images that could not be repeated where the learner depends on it.

        Raises:
            ConfigurationError: the loader shuffles, or several devices share the images.
        """
        self._check_order(self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        """As `on_test_start`.

        Raises:
            ConfigurationError: the loader shuffles, or several devices share the images.
        """
        self._check_order(self.trainer.predict_dataloaders)

    def _check_order(self, loaders) -> None:
        if not self.learner.online:
            return
        if self.trainer.world_size > 1:
            raise ConfigurationError(
                f"what {self.label} predicts depends on the images before, and each of {self.trainer.world_size} "
                "devices would see its share of them alone; take one device (--trainer.devices 1)"
            )
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            # For predictions Lightning wraps the sampler in that of batches.
            samplers = (loader, getattr(loader, "batch_sampler", None))
            if any(draws(getattr(each, "sampler", None)) for each in samplers):
                raise ConfigurationError(
                    f"what {self.label} predicts depends on the images before, and this loader shuffles them in a way "
                    "that is not recorded; give a loader without shuffle, or data with test_order='shuffled'"
                )
            if getattr(loader, "num_workers", 0) and not getattr(loader, "in_order", True):
                raise ConfigurationError(
                    f"what {self.label} predicts depends on the images before, and this loader gives batches as its "
                    "workers are ready; leave out in_order=False"
                )

    def on_validation_epoch_start(self) -> None:
        """Begin a new stream of images."""
        self.learner.reset()

    def on_test_epoch_start(self) -> None:
        """Seed the test, and begin a new stream of images."""
        super().on_test_epoch_start()
        self.learner.reset()

    def on_predict_epoch_start(self) -> None:
        """Begin a new stream of images."""
        self.learner.reset()

    def configure_optimizers(self) -> dict | None:
        """SGD or AdamW over what is trained; nothing if nothing is."""
        return super().configure_optimizers() if self.trained_parameters() else None

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        if self._keeps_features and not self.training and images.ndim == 4:
            return self._classify(self.cache.image_features(self.learner, images))
        with_gradients = torch.is_grad_enabled()
        # Learners that tune at test time need gradients, which inference mode cannot give.
        with torch.inference_mode(False), torch.set_grad_enabled(with_gradients):
            images = images.clone() if images.is_inference() else images
            if self.learner.adapts_while_testing:
                seen = self.learner.seen(images)
                return self._classify(self.learner.image_features(seen), seen)
            return self.learner(images)

    def _classify(self, features: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits of the learner; in a test of one that adapts, those without adapting are kept for the record.

        Args:
            features: of the images, or of their views.
            seen: what they are the features of, None if only they are kept.
        """
        if self.learner.adapts_while_testing and self._trainer is not None and self.trainer.testing:
            with torch.no_grad():
                self.unadapted = self.learner.unadapted(features)
        return self.learner.classify(features) if seen is None else self.learner.classify_seen(seen, features)

    def training_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the learner and logits."""
        features = None
        if self._keeps_features and self.fixed_views is not None:
            features = self.cache.image_features(self.learner, images)
        return self.learner.loss(images, labels, features)

    def on_train_start(self) -> None:
        """Let images of which the features are kept not be read and augmented again, if nothing else needs them."""
        super().on_train_start()
        known = frozenset()
        if self._needs_no_pixels():
            with self.trainer.precision_plugin.forward_context():
                known = self.cache.known_images(self.learner, self.trainer.strategy.root_device)
        self._withhold(known)

    def on_train_end(self) -> None:
        """Give pixels again to whoever reads the images after training."""
        self._withhold(frozenset())

    def _withhold(self, names: frozenset[bytes]) -> None:
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        if isinstance(dataset, ImageDataset):
            dataset.withheld = names

    def _needs_no_pixels(self) -> bool:
        """Whether what is trained on is the features of images that are found again by their names."""
        dataset, precision = getattr(self.trainer.train_dataloader, "dataset", None), self.trainer.precision_plugin
        return (
            self._keeps_features
            and self.fixed_views is not None
            and self.learner.trains_on_features()
            and type(self).training_loss is PromptLearning.training_loss
            and type(self).training_step is PromptLearning.training_step
            and type(dataset) is ImageDataset
            and type(dataset.transform) is ImageTransform
            and self.trainer.world_size == 1  # batches of several processes may be cut, and then have no names
            and type(precision).convert_input is Precision.convert_input  # nor have those that it converts
        )

    def on_train_epoch_end(self) -> None:
        """Tell the learner."""
        self.learner.end_epoch(self.current_epoch, self.num_epochs)

    def on_fit_end(self) -> None:
        """Tell the learner; also when a run that had finished was resumed."""
        super().on_fit_end()
        if self.trained_parameters():
            self.chosen = self.learner.end_training() or self.chosen

    def choose(self) -> None:
        """Let the learner choose for the epoch that is reported."""
        self.chosen = self.learner.choose() or self.chosen

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the learner trains."""
        return self.learner.trainable_parameters()

    def head_parameters(self) -> list[nn.Parameter]:
        """What the learner calls its head."""
        return self.learner.head_parameters()

    def trained_keys(self) -> set[str]:
        """What the learner trains, and its own buffers."""
        trained = self.learner.own_parameters().keys()
        buffers = {name for name, _ in self.learner.named_buffers()}
        own = {name for name in buffers if not name.startswith("clip.") or name.startswith("clip.peft.")}
        return {f"learner.{name}" for name in trained | own} & self.state_dict().keys()

    def not_averaged(self) -> str | None:
        """Why an average over steps would not be what is tested: nothing is trained, or the learner has its own."""
        if not self.trained_parameters():
            return f"{self.label} trains nothing by gradient steps"
        return self.reports_mean()

    def reports_mean(self) -> str | None:
        """That of the learner, if it has one."""
        return self.learner.averages and f"{self.label} {self.learner.averages}"

    def save(self, folder: Path, datamodule: pl.LightningDataModule) -> None:
        """Write the learner, as `visionpeft.load_learner` reads it."""
        save_learner(
            self.learner,
            folder,
            preprocessing=datamodule.preprocessing,
            metadata={"data": datamodule.description()},
        )

    def load(self, folder: Path) -> None:
        """Read a learner in the place of the present one, for this task's classes."""
        clip = self.learner.clip
        if has_adapters(clip):
            detach(clip)
        self.learner = load_learner(folder, clip, self.tokenizer, self.class_names)
        self.learner.chunk_size = self.chunk_size
        self._economise()

    def _economise(self) -> None:
        """Follow the class token alone in the last block of an adapted image tower, where it is all that is read."""
        if has_adapters(self.learner.clip):
            economise(self.learner.clip, class_token_only=None)

    @property
    def _keeps_features(self) -> bool:
        """Whether features are kept: the image tower is not trained, and they are all that the learner needs."""
        return self.cache is not None and self.learner.frozen_images and type(self.learner).forward is Learner.forward

    def _fit_features(self) -> None:
        """Let the learner fit what it computes from the features of all images."""
        if type(self.learner).fit_features is Learner.fit_features:
            return
        datamodule = self.trainer.datamodule
        if datamodule is None:
            raise ConfigurationError(f"{self.label} is fitted on the features of all images; give a data module to fit")
        if self.fixed_views is None:
            # Views that are not seen again in training, whose epochs come first.
            first = self.num_epochs if self.trained_parameters() else 0
            views = range(first, first + self.learner.fitted_views)
        else:
            views = range(self.fixed_views)
        with unprompted(self.learner):  # a learner that changes the towers is fitted on features that stay
            train = self._features("train", views, raw=self.learner.fits_raw_features)
            validation = self._features("val", range(1)) if "val" in datamodule.sources else None
        self.chosen = self.learner.fit_features(train, validation)
        if self.trained_parameters():  # callbacks that average weights have copied what was there before
            copy_again(self.trainer.callbacks, self.trainer, self)

    def _features(self, split: str, views: range, raw: bool = False) -> tuple[Tensor, Tensor]:
        """Features (images, features), or of several views (images, views, features), and labels of a split."""
        by_view = []
        for view in views:
            features, labels = zip(*in_order(self, split, view, self._encode(raw)), strict=True)
            by_view.append(torch.cat(features))
        return by_view[0] if len(views) == 1 else torch.stack(by_view, dim=1), torch.cat(labels)

    def _encode(self, raw: bool = False) -> Callable[[Tensor], Tensor]:
        """What maps images to features, and keeps them where they are kept; raw ones are not normalised, nor kept."""
        if raw:
            return self.learner.encode_images
        return partial(self.cache.image_features, self.learner) if self._keeps_features else self.learner.image_features


def draws(sampler: Sampler | None) -> bool:
    """Whether a sampler of PyTorch takes the images in an order by chance."""
    return isinstance(sampler, DRAWING) or (isinstance(sampler, DistributedSampler) and sampler.shuffle)
