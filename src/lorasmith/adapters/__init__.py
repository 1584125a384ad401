"""The adapter variants, one file each; importing this package registers them.

A new one is a file here and a line below.
"""

from __future__ import annotations

from lorasmith.adapters.antipasto import AntiPaSTO, AntiPaSTOConfig
from lorasmith.adapters.antipasto_ablate import AntiPaSTOAblate, AntiPaSTOAblateConfig
from lorasmith.adapters.antipasto_arrow import AntiPaSTOArrow, AntiPaSTOArrowConfig
from lorasmith.adapters.antipasto_corda import AntiPaSTOCorDA, AntiPaSTOCorDAConfig
from lorasmith.adapters.antipasto_rot import AntiPaSTORot, AntiPaSTORotConfig
from lorasmith.adapters.delora import DeLoRA, DeLoRAConfig
from lorasmith.adapters.dora import DoRA, DoRAConfig
from lorasmith.adapters.hra import HRA, HRAConfig
from lorasmith.adapters.ia3 import IA3, IA3Config
from lorasmith.adapters.ia3_ff import IA3FF, IA3FFConfig
from lorasmith.adapters.loha import LoHa, LoHaConfig
from lorasmith.adapters.lokr import LoKr, LoKrConfig
from lorasmith.adapters.lora import LoRA, LoRAConfig
from lorasmith.adapters.lora_xs import LoRAXS, LoRAXSConfig
from lorasmith.adapters.miss import MiSS, MiSSConfig
from lorasmith.adapters.oft import OFT, OFTConfig
from lorasmith.adapters.road import RoAd, RoAdConfig
from lorasmith.adapters.subspace import Subspace, SubspaceConfig
from lorasmith.adapters.vera import VeRA, VeRAConfig
from lorasmith.core.registry import register

__all__ = [
    "AntiPaSTOAblateConfig",
    "AntiPaSTOArrowConfig",
    "AntiPaSTOConfig",
    "AntiPaSTOCorDAConfig",
    "AntiPaSTORotConfig",
    "DeLoRAConfig",
    "DoRAConfig",
    "HRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoRAConfig",
    "LoRAXSConfig",
    "MiSSConfig",
    "OFTConfig",
    "RoAdConfig",
    "SubspaceConfig",
    "VeRAConfig",
]


for _variant in (
    LoRA(),
    DoRA(),
    DeLoRA(),
    HRA(),
    RoAd(),
    IA3(),
    IA3FF(),
    LoRAXS(),
    VeRA(),
    Subspace(),
    LoHa(),
    LoKr(),
    OFT(),
    MiSS(),
    AntiPaSTO(),
    AntiPaSTOCorDA(),
    AntiPaSTORot(),
    AntiPaSTOAblate(),
    AntiPaSTOArrow(),
):
    register(_variant)
