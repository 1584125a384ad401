"""lorasmith: train, diagnose, manage and serve LoRA-family adapters.

    import lorasmith as ls

    adapter = ls.attach(model, ls.LoRAConfig(r=16))
    ...                               # any loop, HF Trainer, TRL
    ls.save(model, "my-adapter")      # a PEFT directory

Names are loaded on first use (PEP 562), so that ``import lorasmith`` and
``lorasmith --help`` do not wait for PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name → module that defines it: the one list of what is exported.
_EXPORTS = {
    "Adapter": "lorasmith.core.adapter",
    "AdapterConfig": "lorasmith.core.config",
    "AdapterWeights": "lorasmith.io",
    "Conversion": "lorasmith.io.convert",
    "AntiPaSTOAblateConfig": "lorasmith.adapters",
    "AntiPaSTOArrowConfig": "lorasmith.adapters",
    "AntiPaSTOConfig": "lorasmith.adapters",
    "AntiPaSTOCorDAConfig": "lorasmith.adapters",
    "AntiPaSTORotConfig": "lorasmith.adapters",
    "DeLoRAConfig": "lorasmith.adapters",
    "DoRAConfig": "lorasmith.adapters",
    "Dynamic": "lorasmith.dynamics.protocol",
    "Dynamics": "lorasmith.dynamics.driver",
    "DynamicsCallback": "lorasmith.dynamics.callback",
    "EntropyGovernor": "lorasmith.dynamics.entropy",
    "Export": "lorasmith.export.exporting",
    "Factors": "lorasmith.core.variant",
    "FuseReport": "lorasmith.core.fusing",
    "FusedModel": "lorasmith.export.fused",
    "GaugeProjectedOptimizer": "lorasmith.dynamics.gauge",
    "GaugeProjection": "lorasmith.dynamics.gauge",
    "HRAConfig": "lorasmith.adapters",
    "IA3Config": "lorasmith.adapters",
    "IA3FFConfig": "lorasmith.adapters",
    "LoHaConfig": "lorasmith.adapters",
    "LoKrConfig": "lorasmith.adapters",
    "LoRAConfig": "lorasmith.adapters",
    "MiSSConfig": "lorasmith.adapters",
    "MultiTaskModel": "lorasmith.fleet.multitask",
    "OFTConfig": "lorasmith.adapters",
    "LoRAXSConfig": "lorasmith.adapters",
    "LorasmithError": "lorasmith.errors",
    "MergeReport": "lorasmith.fleet.merge",
    "Merged": "lorasmith.fleet.merge",
    "OrthogonalityPenalty": "lorasmith.dynamics.orthogonality",
    "Pushed": "lorasmith.io.push",
    "RoAdConfig": "lorasmith.adapters",
    "RotationBudget": "lorasmith.dynamics.rotation_budget",
    "RotationReport": "lorasmith.diagnostics.records",
    "SharedSubspace": "lorasmith.fleet.subspace",
    "SimilarityMatrix": "lorasmith.fleet.similarity",
    "StressController": "lorasmith.dynamics.stress",
    "SubspaceConfig": "lorasmith.adapters",
    "SubspaceTrainer": "lorasmith.fleet.trainable",
    "TaskRouter": "lorasmith.fleet.router",
    "Variant": "lorasmith.core.variant",
    "VeRAConfig": "lorasmith.adapters",
    "attach": "lorasmith.core.attach",
    "attached": "lorasmith.core.adapter",
    "config_from_dict": "lorasmith.core.registry",
    "convert": "lorasmith.io.convert",
    "detach": "lorasmith.core.attach",
    "diagnose": "lorasmith.diagnostics.rotation",
    "export_adapter": "lorasmith.export.exporting",
    "factors": "lorasmith.io",
    "fuse": "lorasmith.core.fusing",
    "fuse_checkpoint": "lorasmith.export.fused",
    "load": "lorasmith.io",
    "merge": "lorasmith.fleet.merge",
    "param_groups": "lorasmith.core.optim",
    "project_gauge_": "lorasmith.dynamics.gauge",
    "push": "lorasmith.io.push",
    "push_to_hub": "lorasmith.io.push",
    "read_adapter": "lorasmith.io",
    "register": "lorasmith.core.registry",
    "register_dynamic": "lorasmith.dynamics.registry",
    "retention": "lorasmith.training.retention",
    "save": "lorasmith.io",
    "similarity": "lorasmith.fleet.similarity",
    "unfuse": "lorasmith.core.fusing",
    "use": "lorasmith.core.attach",
    "variants": "lorasmith.core.registry",
}

if TYPE_CHECKING:
    from lorasmith.adapters import AntiPaSTOAblateConfig as AntiPaSTOAblateConfig
    from lorasmith.adapters import AntiPaSTOArrowConfig as AntiPaSTOArrowConfig
    from lorasmith.adapters import AntiPaSTOConfig as AntiPaSTOConfig
    from lorasmith.adapters import AntiPaSTOCorDAConfig as AntiPaSTOCorDAConfig
    from lorasmith.adapters import AntiPaSTORotConfig as AntiPaSTORotConfig
    from lorasmith.adapters import DeLoRAConfig as DeLoRAConfig
    from lorasmith.adapters import DoRAConfig as DoRAConfig
    from lorasmith.adapters import HRAConfig as HRAConfig
    from lorasmith.adapters import IA3Config as IA3Config
    from lorasmith.adapters import IA3FFConfig as IA3FFConfig
    from lorasmith.adapters import LoHaConfig as LoHaConfig
    from lorasmith.adapters import LoKrConfig as LoKrConfig
    from lorasmith.adapters import LoRAConfig as LoRAConfig
    from lorasmith.adapters import LoRAXSConfig as LoRAXSConfig
    from lorasmith.adapters import MiSSConfig as MiSSConfig
    from lorasmith.adapters import OFTConfig as OFTConfig
    from lorasmith.adapters import RoAdConfig as RoAdConfig
    from lorasmith.adapters import SubspaceConfig as SubspaceConfig
    from lorasmith.adapters import VeRAConfig as VeRAConfig
    from lorasmith.core.adapter import Adapter as Adapter
    from lorasmith.core.adapter import attached as attached
    from lorasmith.core.attach import attach as attach
    from lorasmith.core.attach import detach as detach
    from lorasmith.core.attach import use as use
    from lorasmith.core.config import AdapterConfig as AdapterConfig
    from lorasmith.core.fusing import FuseReport as FuseReport
    from lorasmith.core.fusing import fuse as fuse
    from lorasmith.core.fusing import unfuse as unfuse
    from lorasmith.core.optim import param_groups as param_groups
    from lorasmith.core.registry import config_from_dict as config_from_dict
    from lorasmith.core.registry import register as register
    from lorasmith.core.registry import variants as variants
    from lorasmith.core.variant import Factors as Factors
    from lorasmith.core.variant import Variant as Variant
    from lorasmith.diagnostics.records import RotationReport as RotationReport
    from lorasmith.diagnostics.rotation import diagnose as diagnose
    from lorasmith.dynamics.callback import DynamicsCallback as DynamicsCallback
    from lorasmith.dynamics.driver import Dynamics as Dynamics
    from lorasmith.dynamics.entropy import EntropyGovernor as EntropyGovernor
    from lorasmith.dynamics.gauge import GaugeProjectedOptimizer as GaugeProjectedOptimizer
    from lorasmith.dynamics.gauge import GaugeProjection as GaugeProjection
    from lorasmith.dynamics.gauge import project_gauge_ as project_gauge_
    from lorasmith.dynamics.orthogonality import OrthogonalityPenalty as OrthogonalityPenalty
    from lorasmith.dynamics.protocol import Dynamic as Dynamic
    from lorasmith.dynamics.registry import register_dynamic as register_dynamic
    from lorasmith.dynamics.rotation_budget import RotationBudget as RotationBudget
    from lorasmith.dynamics.stress import StressController as StressController
    from lorasmith.errors import LorasmithError as LorasmithError
    from lorasmith.export.exporting import Export as Export
    from lorasmith.export.exporting import export_adapter as export_adapter
    from lorasmith.export.fused import FusedModel as FusedModel
    from lorasmith.export.fused import fuse_checkpoint as fuse_checkpoint
    from lorasmith.fleet.merge import Merged as Merged
    from lorasmith.fleet.merge import MergeReport as MergeReport
    from lorasmith.fleet.merge import merge as merge
    from lorasmith.fleet.multitask import MultiTaskModel as MultiTaskModel
    from lorasmith.fleet.router import TaskRouter as TaskRouter
    from lorasmith.fleet.similarity import SimilarityMatrix as SimilarityMatrix
    from lorasmith.fleet.similarity import similarity as similarity
    from lorasmith.fleet.subspace import SharedSubspace as SharedSubspace
    from lorasmith.fleet.trainable import SubspaceTrainer as SubspaceTrainer
    from lorasmith.io import AdapterWeights as AdapterWeights
    from lorasmith.io import factors as factors
    from lorasmith.io import load as load
    from lorasmith.io import read_adapter as read_adapter
    from lorasmith.io import save as save
    from lorasmith.io.convert import Conversion as Conversion
    from lorasmith.io.convert import convert as convert
    from lorasmith.io.push import Pushed as Pushed
    from lorasmith.io.push import push as push
    from lorasmith.io.push import push_to_hub as push_to_hub
    from lorasmith.training.retention import retention as retention

__all__ = ["__version__", *sorted(_EXPORTS)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lorasmith' has no attribute {name!r}")
    from importlib import import_module

    # The variants register themselves; whoever asks for anything may meet one.
    import_module("lorasmith.adapters")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
