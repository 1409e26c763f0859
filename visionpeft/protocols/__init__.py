"""Protocols of prompt learning on CLIP: tables whose every number is a training run with its own directory."""

from visionpeft.protocols.benchmarks import base_to_new, cross_dataset, domain_shift, few_shot
from visionpeft.protocols.evaluation import evaluate_run

__all__ = ["base_to_new", "cross_dataset", "domain_shift", "evaluate_run", "few_shot"]
