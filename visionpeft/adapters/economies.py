"""Exact economies of the forward and backward pass that a user may choose."""

from dataclasses import dataclass
from typing import Literal

from visionpeft.adapters.key_prompts import Acting
from visionpeft.backbones.tower import ENTERING, Tower
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.sites import TOKEN_SITES, ClassTokenOnly, Order, Sites, order_of


@dataclass(frozen=True)
class Economies:
    """What `visionpeft.economise` was asked for.

    Args:
        class_token_only: follow only the class token after the attention of the last block.
        recompute: what is computed again in the backward pass instead of being kept: "mlp", "block" or None.
    """

    class_token_only: bool = False
    recompute: Literal["mlp", "block"] | None = None

    def __post_init__(self):
        if self.recompute not in (None, "mlp", "block"):
            raise ConfigurationError(f"recompute must be 'mlp', 'block' or None, not {self.recompute!r}")

    def check(self, towers: dict[str, Tower]) -> None:
        """Refuse what the model does not allow.

        Raises:
            UnsupportedError: `class_token_only` for a model that reads other tokens after its last block, or
                `recompute` of MLPs that are not sited.
        """
        if self.recompute == "mlp" and any(tower.layers_only is not None for tower in towers.values()):
            raise UnsupportedError("recompute='mlp' needs sited blocks; this model has layer sites only")
        if self.class_token_only and not may_narrow(towers):
            raise UnsupportedError(
                "class_token_only is for image towers that read nothing but the class token after the last block; "
                "this one pools its tokens in another way"
            )

    def narrows(self, tower: Tower) -> bool:
        """Whether the last block of a tower gives its class token alone."""
        return self.class_token_only and tower.name == "visual"

    def need(self, tower: Tower, index: int) -> bool:
        """Whether the sited form of a block is needed, whether or not something acts in it."""
        return self.recompute is not None or (self.narrows(tower) and index == tower.depth - 1)

    def apply(self, sites: Sites, tower: Tower, index: int, acting: Acting | None) -> None:
        """Set up the sites of a block.

        `class_token_only` stands aside if what acts reads other tokens after the attention, or is routed (None).
        """
        sites.recompute_mlp = self.recompute == "mlp"
        last = self.narrows(tower) and index == tower.depth - 1
        if last and acting is not None and _treats_class_token_alone(acting):
            norms = [tower.layers[site].owner for site in tower.final_norms if site in tower.layers]
            sites.class_token_only = ClassTokenOnly(tower.module, tower.blocks[index].module, norms)


def may_narrow(towers: dict[str, Tower]) -> bool:
    """Whether nothing but the class token of the image tower is read after its last block."""
    tower = towers.get("visual")
    return tower is not None and tower.pools_class_token


def _treats_class_token_alone(acting: Acting) -> bool:
    """Whether after the attention every token is treated by itself."""
    for (site, add), modules in acting.items():
        for module in modules:
            leaving = order_of(module) in (Order.LEAVE, Order.LEAVE_SPAN) and getattr(module, "tokenwise", True)
            if add is not None:
                alone = site not in ENTERING and getattr(module, "tokenwise", False)
            elif site in ENTERING or site == "kv" or leaving:
                alone = True
            else:
                alone = getattr(module, "tokenwise", site not in TOKEN_SITES)
            if not alone:
                return False
    return True
