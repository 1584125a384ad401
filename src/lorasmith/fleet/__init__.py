"""Many adapters of one base model: read, compare, compress, merge and serve them.

``members`` is how the rest sees an adapter; ``similarity`` and ``analysis`` compare adapters
without regard to how each of them factored its ΔW, ``differences`` two of them layer by layer;
``covering`` says how much of one a subspace holds; ``plots`` draws that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# At once, and not on first use as the others: whoever imports the module of the same name, as
# ``analysis`` does, puts that in the place of the function.
from lorasmith.fleet.similarity import similarity as similarity

#: Name → module that defines it; loaded on first use (PEP 562).
_EXPORTS = {
    "SharedSubspace": "lorasmith.fleet.subspace",
    "BudgetWarning": "lorasmith.fleet.records",
    "SubspaceTrainer": "lorasmith.fleet.trainable",
    "redundancy": "lorasmith.fleet.analysis",
    "outliers": "lorasmith.fleet.analysis",
    "factor_gram": "lorasmith.fleet.similarity",
    "embedding": "lorasmith.fleet.analysis",
    "diff": "lorasmith.fleet.differences",
    "coverage": "lorasmith.fleet.covering",
    "clusters": "lorasmith.fleet.analysis",
    "SimilarityMatrix": "lorasmith.fleet.similarity",
    "Outliers": "lorasmith.fleet.analysis",
    "Embedding": "lorasmith.fleet.analysis",
    "Diff": "lorasmith.fleet.differences",
    "Coverage": "lorasmith.fleet.covering",
    "Clusters": "lorasmith.fleet.analysis",
    "LayerFactors": "lorasmith.fleet.members",
    "Member": "lorasmith.fleet.members",
    "MemberRecord": "lorasmith.fleet.members",
    "MultiTaskModel": "lorasmith.fleet.multitask",
    "TaskRouter": "lorasmith.fleet.router",
    "expand": "lorasmith.fleet.members",
    "open_members": "lorasmith.fleet.members",
    "rebuild": "lorasmith.fleet.members",
}

if TYPE_CHECKING:
    from lorasmith.fleet.analysis import Clusters as Clusters
    from lorasmith.fleet.analysis import Embedding as Embedding
    from lorasmith.fleet.analysis import Outliers as Outliers
    from lorasmith.fleet.analysis import clusters as clusters
    from lorasmith.fleet.analysis import embedding as embedding
    from lorasmith.fleet.analysis import outliers as outliers
    from lorasmith.fleet.analysis import redundancy as redundancy
    from lorasmith.fleet.covering import Coverage as Coverage
    from lorasmith.fleet.covering import coverage as coverage
    from lorasmith.fleet.differences import Diff as Diff
    from lorasmith.fleet.differences import diff as diff
    from lorasmith.fleet.members import LayerFactors as LayerFactors
    from lorasmith.fleet.members import Member as Member
    from lorasmith.fleet.members import MemberRecord as MemberRecord
    from lorasmith.fleet.members import expand as expand
    from lorasmith.fleet.members import open_members as open_members
    from lorasmith.fleet.members import rebuild as rebuild
    from lorasmith.fleet.multitask import MultiTaskModel as MultiTaskModel
    from lorasmith.fleet.records import BudgetWarning as BudgetWarning
    from lorasmith.fleet.router import TaskRouter as TaskRouter
    from lorasmith.fleet.similarity import SimilarityMatrix as SimilarityMatrix
    from lorasmith.fleet.similarity import factor_gram as factor_gram
    from lorasmith.fleet.subspace import SharedSubspace as SharedSubspace
    from lorasmith.fleet.trainable import SubspaceTrainer as SubspaceTrainer

__all__ = ["similarity", *sorted(_EXPORTS)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lorasmith.fleet' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
