"""Protocols: tables whose every number is a training run with its own directory.

A protocol is a list of command lines of `visionpeft.fit`. So this package stands above `cli.py`, which builds what a
command line names, and `fit.py`, which trains it, and below the entry points `protocol.py` and `evaluate.py`.
"""

from visionpeft.protocols.evaluation import evaluate_run
from visionpeft.protocols.learner_protocols import base_to_new, cross_dataset, domain_shift, few_shot
from visionpeft.protocols.method_protocols import fgvc, vtab1k

__all__ = ["base_to_new", "cross_dataset", "domain_shift", "evaluate_run", "few_shot", "fgvc", "vtab1k"]
