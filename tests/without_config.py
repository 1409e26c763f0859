"""Methods without a configuration of their own: nobody has published a recipe for ViTs on images."""

from visionpeft.methods.parts.base import snake_case

# over the adapters of others, which only a configuration of the user's own can name
OVER_OTHERS = ("AdapterFusion", "MoA", "MoLE")
# these go by the default of the benchmark's folder
BY_DEFAULT = (
    *("AdaMix", "APT", "CIAT", "CoDA", "DecomposedPromptTuning", "HyperFormer", "IDPG", "LPT", "MixLoRA", "MOELoRA"),
    *("MoLORA", "Mona", "MoV", "PixelPrompt", "PrefixPropagation", "PTuning", "SMoP"),
)
VTAB_BY_DEFAULT = {f"vtab_{snake_case(name)}.yaml" for name in BY_DEFAULT}
