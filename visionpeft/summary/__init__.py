"""What a choice of method costs: counted on a model that has it, or measured before training."""

from visionpeft.summary.counts import Summary, summary

__all__ = ["Summary", "summary"]
