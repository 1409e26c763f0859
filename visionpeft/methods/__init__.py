"""What acts: one file for each method."""

from visionpeft.methods.adalora import AdaLoRA
from visionpeft.methods.adamix import AdaMix
from visionpeft.methods.adapter import Adapter
from visionpeft.methods.adapter_fusion import AdapterFusion
from visionpeft.methods.adaptformer import AdaptFormer
from visionpeft.methods.aim import AIM
from visionpeft.methods.apt import APT
from visionpeft.methods.auto_lora import AutoLoRA
from visionpeft.methods.binary_mask import BinaryMask
from visionpeft.methods.bitfit import BitFit
from visionpeft.methods.boft import BOFT
from visionpeft.methods.capaboost import CapaBoost
from visionpeft.methods.child_tuning import ChildTuning
from visionpeft.methods.ciat import CIAT
from visionpeft.methods.coda import CoDA
from visionpeft.methods.compacter import Compacter
from visionpeft.methods.convpass import Convpass
from visionpeft.methods.decomposed_prompt_tuning import DecomposedPromptTuning
from visionpeft.methods.diff_pruning import DiffPruning
from visionpeft.methods.dora import DoRA
from visionpeft.methods.dtl import DTL
from visionpeft.methods.dylora import DyLoRA
from visionpeft.methods.e2vpt import E2VPT
from visionpeft.methods.eva import EVA
from visionpeft.methods.fact import FacT
from visionpeft.methods.far import FAR
from visionpeft.methods.fish_dip import FishDip
from visionpeft.methods.fish_mask import FishMask
from visionpeft.methods.fourierft import FourierFT
from visionpeft.methods.full_fine_tuning import FullFineTuning
from visionpeft.methods.gated_vpt import GatedVPT
from visionpeft.methods.gps import GPS
from visionpeft.methods.gralora import GraLoRA
from visionpeft.methods.hira import HiRA
from visionpeft.methods.hiwi import HiWi
from visionpeft.methods.hyperformer import HyperFormer
from visionpeft.methods.ia3 import IA3
from visionpeft.methods.idpg import IDPG
from visionpeft.methods.kadaptation import KAdaptation
from visionpeft.methods.krona import KronA
from visionpeft.methods.last_blocks import LastBlocks
from visionpeft.methods.layer_norm_tuning import LayerNormTuning
from visionpeft.methods.linear_probe import LinearProbe
from visionpeft.methods.lora import LoRA
from visionpeft.methods.lora_dropout import LoRADropout
from visionpeft.methods.lora_ga import LoRAGA
from visionpeft.methods.lpt import LPT
from visionpeft.methods.lst import LST
from visionpeft.methods.ltsft import LTSFT
from visionpeft.methods.mam import MAM
from visionpeft.methods.miss import MiSS
from visionpeft.methods.mixlora import MixLoRA
from visionpeft.methods.moa import MoA
from visionpeft.methods.moelora import MOELoRA
from visionpeft.methods.mole import MoLE
from visionpeft.methods.molora import MoLORA
from visionpeft.methods.mona import Mona
from visionpeft.methods.moslora import MoSLoRA
from visionpeft.methods.mov import MoV
from visionpeft.methods.neuro_ada import NeuroAda
from visionpeft.methods.oft import OFT
from visionpeft.methods.olora import OLoRA
from visionpeft.methods.pafi import PaFi
from visionpeft.methods.parts.base import Method
from visionpeft.methods.periodic_lora import PeriodicLoRA
from visionpeft.methods.pissa import PiSSA
from visionpeft.methods.pixel_prompt import PixelPrompt
from visionpeft.methods.prefix_propagation import PrefixPropagation
from visionpeft.methods.prefix_tuning import PrefixTuning
from visionpeft.methods.pruned_bitfit import PrunedBitFit
from visionpeft.methods.ptuning import PTuning
from visionpeft.methods.randlora import RandLoRA
from visionpeft.methods.relora import ReLoRA
from visionpeft.methods.rep_adapter import RepAdapter
from visionpeft.methods.said import SAID
from visionpeft.methods.sct import SCT
from visionpeft.methods.second_order import SecondOrder
from visionpeft.methods.selective_prompts import SelectivePrompts
from visionpeft.methods.smop import SMoP
from visionpeft.methods.sora import SoRA
from visionpeft.methods.spt import SPT
from visionpeft.methods.ssf import SSF
from visionpeft.methods.st_adapter import STAdapter
from visionpeft.methods.unipelt import UniPELT
from visionpeft.methods.vblora import VBLoRA
from visionpeft.methods.vera import VeRA
from visionpeft.methods.vpt import VPT
from visionpeft.methods.vqt import VQT
from visionpeft.methods.waveft import WaveFT
from visionpeft.methods.xprompt import XPrompt

__all__ = [
    "AIM",
    "APT",
    "BOFT",
    "CIAT",
    "DTL",
    "E2VPT",
    "EVA",
    "FAR",
    "GPS",
    "IA3",
    "IDPG",
    "LPT",
    "LST",
    "LTSFT",
    "MAM",
    "OFT",
    "SAID",
    "SCT",
    "SPT",
    "SSF",
    "VPT",
    "VQT",
    "AdaLoRA",
    "AdaMix",
    "AdaptFormer",
    "Adapter",
    "AdapterFusion",
    "AutoLoRA",
    "BinaryMask",
    "BitFit",
    "CapaBoost",
    "ChildTuning",
    "CoDA",
    "Compacter",
    "Convpass",
    "DecomposedPromptTuning",
    "DiffPruning",
    "DoRA",
    "DyLoRA",
    "FacT",
    "FishDip",
    "FishMask",
    "FourierFT",
    "FullFineTuning",
    "GatedVPT",
    "GraLoRA",
    "HiRA",
    "HiWi",
    "HyperFormer",
    "KAdaptation",
    "KronA",
    "LastBlocks",
    "LayerNormTuning",
    "LinearProbe",
    "LoRA",
    "LoRADropout",
    "LoRAGA",
    "MOELoRA",
    "Method",
    "MiSS",
    "MixLoRA",
    "MoA",
    "MoLE",
    "MoLORA",
    "MoSLoRA",
    "MoV",
    "Mona",
    "NeuroAda",
    "OLoRA",
    "PTuning",
    "PaFi",
    "PeriodicLoRA",
    "PiSSA",
    "PixelPrompt",
    "PrefixPropagation",
    "PrefixTuning",
    "PrunedBitFit",
    "RandLoRA",
    "ReLoRA",
    "RepAdapter",
    "SMoP",
    "STAdapter",
    "SecondOrder",
    "SelectivePrompts",
    "SoRA",
    "UniPELT",
    "VBLoRA",
    "VeRA",
    "WaveFT",
    "XPrompt",
]
