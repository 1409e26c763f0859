"""What every learner is: a CLIP with class names, and how it learns."""

from collections.abc import Mapping

import torch
import torch.nn as nn

from visionpeft.clip.class_loss import ClassLoss, check_class_loss, class_loss
from visionpeft.clip.prompted_clip import PromptedCLIP


class Learner(PromptedCLIP):
    """Base of all learners: a `PromptedCLIP`, its loss, and what else training and testing ask of it.

    A learner implements `prompts` and, as it needs, `context`, `text_features`, `classify` or `loss`. One that also
    needs the frozen text features of hand-written templates, as a teacher or as its classifier, passes `templates` and
    has an option `template`, which is None where a run is to use the data set's own.

    Attributes:
        features_suffice: `loss` needs nothing of images whose features are given; of a loss of its own a class says so
            itself, else images are there for it.
        averages: how it averages its trained values itself, and what to do if another average is wanted; None if it
            does not.
        by_gradient: an optimiser has something to train; otherwise `fit_features` or nothing at all does the learning.
        adapts_while_testing: test images change how it classifies; a run also records what `unadapted` says.
        online: what it predicts depends on the images before; see `reset`.
        fits_raw_features: `fit_features` takes image features that are not normalised.
        started_from: options that say where first values lie; what is saved holds the values, and is read without them.
        fitted_views: augmentations of each training image for `fit_features`, where the data leaves their number open.
        template_style: which of a data set's own templates it takes; see `visionpeft.data.dataset_template`.
        loss_name: how an image is compared with the classes; see `set_loss`.
        compares_pairs: it can learn with "sigmoid", because its own `loss` leaves the comparison to `class_loss`; None
            where it can unless it has a loss of its own, is fitted, or adapts while testing.
    """

    features_suffice = True
    averages: str | None = None
    by_gradient = True
    adapts_while_testing = False
    online = False
    fits_raw_features = False
    started_from: tuple[str, ...] = ()
    fitted_views = 1
    template_style = "zero_shot"
    loss_name: ClassLoss = "cross_entropy"
    compares_pairs: bool | None = None

    # Training

    def set_published(self, values: Mapping[str, Mapping[str, float | str]]) -> None:
        """Take what was published for the data set, by learner, where none was given; most learners have nothing."""

    def taken(self) -> dict[str, dict[str, str]]:
        """What it has by `set_published` that is no tensor, in the same form; it is saved with what is learnt."""
        return {}

    def set_loss(self, loss: ClassLoss) -> None:
        """Compare images with classes by this loss from now on; it also says what the logits mean.

        With "cross_entropy" an image has one class of all, softmax(logits). It is the default on SigLIP, too: papers
        train and measure so, and the bias, equal for all classes, changes nothing. With "sigmoid", SigLIP's own loss,
        each pair of an image and a class is judged by itself, sigmoid(logits), which says "none of them" where all are
        small and does not depend on the other classes. See `class_loss`.

        Raises:
            ConfigurationError: an unknown loss, or "sigmoid" where the learner has no form with it or the CLIP no bias.
        """
        pairs = self.compares_pairs
        if pairs is None:
            kind = type(self)
            own = kind.loss is not Learner.loss or kind.fit_features is not Learner.fit_features
            pairs = not own and not self.adapts_while_testing
        check_class_loss(loss, self.clip, pairs, type(self).__name__)
        self.loss_name = loss

    def loss(
        self, images: torch.Tensor | None, labels: torch.Tensor, features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Training loss and logits (batch, classes).

        Args:
            images: (batch, 3, height, width); may be None if `features` are given and the images are not needed.
            labels: (batch,).
            features: unit image features (batch, features), if they have been kept.
        """
        logits = self.classify(self.image_features(images) if features is None else features)
        return self.class_loss(logits, labels), logits

    def trains_on_features(self) -> bool:
        """Whether `loss` needs nothing of images whose features are given, by the class that says what the loss is."""
        own = next(cls for cls in type(self).__mro__ if {"loss", "features_suffice"} & vars(cls).keys())
        return vars(own).get("features_suffice", False)

    def class_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss () of logits (batch, classes) and labels (batch,), as `set_loss` says."""
        return class_loss(self.loss_name, logits, labels)

    def text_penalty(self, texts: torch.Tensor) -> torch.Tensor | float:
        """What the loss adds to the cross-entropy for unit text features (classes, features)."""
        return 0.0

    def fit_features(
        self,
        train: tuple[torch.Tensor, torch.Tensor],
        validation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict:
        """Learn what is computed from (features (images, features), labels) and not by gradient steps.

        Args:
            train: unit image features (images, features), or (images, views, features) of several augmented views, by
                the CLIP without the learner's own adapter; labels (images,). Not normalised where `fits_raw_features`.
            validation: unit image features (images, features) and labels (images,).

        Returns:
            What was chosen on the validation split, for the record of a run.
        """
        return {}

    def begin_training(self) -> None:
        """Called before a training, also a further one of the same learner, and before a checkpoint is loaded."""

    def end_epoch(self, epoch: int, num_epochs: int) -> None:
        """Called after training epoch `epoch` of 0 .. num_epochs - 1."""

    def end_training(self) -> dict:
        """Called after the last epoch.

        Returns:
            What was chosen on the validation split, for the record of a run.
        """
        return self.choose()

    def choose(self) -> dict:
        """Choose on the validation split what depends on the trained values as they are now.

        Called after the last epoch, and again where another epoch than the last is reported and has been loaded.

        Returns:
            What was chosen, for the record of a run.
        """
        return {}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimiser has to train."""
        return [each for each in self.own_parameters().values() if each.requires_grad and self.by_gradient]

    def head_parameters(self) -> list[nn.Parameter]:
        """Those of them that a run trains at the rate `head_lr`."""
        return []

    # While testing

    def reset(self) -> None:
        """Begin a new stream: forget the images that an online learner has seen; others have nothing to forget."""

    def seen(self, images: torch.Tensor) -> torch.Tensor:
        """What a learner that adapts while testing looks at of images: they themselves, or views drawn from them."""
        return images

    def classify_seen(self, images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of what was `seen` and its features; most learners need the features alone."""
        return self.classify(features)

    def unadapted(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of a learner that adapts while testing, as they would be if it did not.

        Args:
            features: unit features (batch, features), or (batch, views, features) of views, of which the first counts.
        """
        return self.logits(features if features.ndim == 2 else features[:, 0], self.text_features())
