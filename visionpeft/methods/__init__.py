"""What acts: one file for each method."""

from visionpeft.methods.adalora import AdaLoRA
from visionpeft.methods.adamix import AdaMix
from visionpeft.methods.adapter import Adapter
from visionpeft.methods.adapter_fusion import AdapterFusion
from visionpeft.methods.adaptformer import AdaptFormer
from visionpeft.methods.aim import AIM
from visionpeft.methods.bitfit import BitFit
from visionpeft.methods.child_tuning import ChildTuning
from visionpeft.methods.compacter import Compacter
from visionpeft.methods.convpass import Convpass
from visionpeft.methods.dora import DoRA
from visionpeft.methods.fact import FacT
from visionpeft.methods.fish_mask import FishMask
from visionpeft.methods.full_fine_tuning import FullFineTuning
from visionpeft.methods.gated_vpt import GatedVPT
from visionpeft.methods.ia3 import IA3
from visionpeft.methods.kadaptation import KAdaptation
from visionpeft.methods.krona import KronA
from visionpeft.methods.last_blocks import LastBlocks
from visionpeft.methods.layer_norm_tuning import LayerNormTuning
from visionpeft.methods.linear_probe import LinearProbe
from visionpeft.methods.lora import LoRA
from visionpeft.methods.mam import MAM
from visionpeft.methods.mixlora import MixLoRA
from visionpeft.methods.mole import MoLE
from visionpeft.methods.molora import MoLORA
from visionpeft.methods.mov import MoV
from visionpeft.methods.pafi import PaFi
from visionpeft.methods.parts.base import Method
from visionpeft.methods.prefix_tuning import PrefixTuning
from visionpeft.methods.rep_adapter import RepAdapter
from visionpeft.methods.spt import SPT
from visionpeft.methods.ssf import SSF
from visionpeft.methods.st_adapter import STAdapter
from visionpeft.methods.unipelt import UniPELT
from visionpeft.methods.vera import VeRA
from visionpeft.methods.vpt import VPT

__all__ = [
    "AIM",
    "IA3",
    "MAM",
    "SPT",
    "SSF",
    "VPT",
    "AdaLoRA",
    "AdaMix",
    "AdaptFormer",
    "Adapter",
    "AdapterFusion",
    "BitFit",
    "ChildTuning",
    "Compacter",
    "Convpass",
    "DoRA",
    "FacT",
    "FishMask",
    "FullFineTuning",
    "GatedVPT",
    "KAdaptation",
    "KronA",
    "LastBlocks",
    "LayerNormTuning",
    "LinearProbe",
    "LoRA",
    "Method",
    "MixLoRA",
    "MoLE",
    "MoLORA",
    "MoV",
    "PaFi",
    "PrefixTuning",
    "RepAdapter",
    "STAdapter",
    "UniPELT",
    "VeRA",
]
