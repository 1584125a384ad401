"""Merging adapters in delta space.

    made = lorasmith.merge(["a", "b"], "ties", density=0.2)

``sums``, ``sphere``, ``sparse``, ``consensus``, ``dropping`` and ``aligned`` hold the methods, one
pure function each; ``registry`` knows them by name, yours too; ``merging`` reads the adapters, runs
a method layer by layer and writes a plain LoRA; ``search`` looks for weights.
"""

from __future__ import annotations

from lorasmith.fleet.merge.aligned import knots
from lorasmith.fleet.merge.consensus import sce, ties
from lorasmith.fleet.merge.dropping import dare, dare_ties, della
from lorasmith.fleet.merge.merging import merge
from lorasmith.fleet.merge.registry import (
    MergeMethod,
    MergeOption,
    get_method,
    methods,
    register,
)
from lorasmith.fleet.merge.report import Merged, MergedLayer, MergeReport
from lorasmith.fleet.merge.search import Trial, search_weights
from lorasmith.fleet.merge.sparse import breadcrumbs, magnitude_prune
from lorasmith.fleet.merge.sphere import karcher, slerp
from lorasmith.fleet.merge.sums import concatenation, linear, svd, task_arithmetic

__all__ = [
    "MergeMethod",
    "MergeOption",
    "MergeReport",
    "Merged",
    "MergedLayer",
    "Trial",
    "breadcrumbs",
    "concatenation",
    "dare",
    "dare_ties",
    "della",
    "get_method",
    "karcher",
    "knots",
    "linear",
    "magnitude_prune",
    "merge",
    "methods",
    "register",
    "sce",
    "search_weights",
    "slerp",
    "svd",
    "task_arithmetic",
    "ties",
]
