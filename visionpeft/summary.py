"""`python -m visionpeft.summary --backbone vit_base_patch16_224 --method VPT`: what a choice costs, before training."""

import sys
from types import ModuleType

from visionpeft.runs.command import command


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m visionpeft.summary`; returns the exit code."""
    return command("visionpeft.runs.summarise:summarise", arguments)


class _Callable(ModuleType):
    """This module, once imported, hides the function `visionpeft.summary`; so it can be called as that."""

    @property
    def __wrapped__(self):
        """The function, as `inspect.unwrap` and `inspect.signature` look for it."""
        from visionpeft.costs.counts import summary

        return summary

    def __call__(self, model):
        """Count what is trained, site by site; see `visionpeft.costs.counts.summary`."""
        return self.__wrapped__(model)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
