"""One class of K, found by judging each pair of an image and a class by itself."""

from torch import Tensor

from visionpeft.clip.class_loss import class_loss, class_probabilities
from visionpeft.tasks.objectives import OneClass


class ClassPairs(OneClass):
    """One class of K: SigLIP's loss, a yes or no for each class; the one with the largest logit is the class found.

    Probabilities of an image do not sum to 1. Its confidence is that of the pair of the image and the class found, and
    calibration errors compare it with how often that class is right.
    """

    loss_name = "sigmoid"

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-1/B sum_i sum_k log sigmoid(z_ik l_ik) of class indices (batch,); see `class_loss`."""
        return class_loss("sigmoid", logits, labels)

    measured_loss = loss

    def answers(self, logits: Tensor) -> Tensor:
        """The probability of each class by itself (batch, classes)."""
        return class_probabilities("sigmoid", logits)
