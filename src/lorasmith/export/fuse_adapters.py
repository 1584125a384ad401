"""The adapters that are fused: read, refused where no weight acts like them, and taken apart.

What PEFT writes beside an adapter's factors (an embedding, a head, a LoRA on an embedding) has no
name in lorasmith's engine. A :class:`Part` keeps it apart, so that the rest can be computed with
as any adapter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.layers import LayerInfo
from lorasmith.errors import ConfigError
from lorasmith.io import peft
from lorasmith.io.files import check_fusable, read_adapter
from lorasmith.io.tensors import TensorSource
from lorasmith.io.weights import AdapterWeights, FileState

__all__ = ["Part", "open_adapters"]


class _Without(TensorSource):
    """The tensors of another source but for some."""

    def __init__(self, source: TensorSource, left_out: set[str]) -> None:
        self._source = source
        self._keys = [k for k in source if k not in left_out]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._source.dtype(key)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._source[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass
class Part:
    """One adapter, its weight, and what is found out about it.

    Attributes:
        weights: As it was read.
        weight: The factor on its change.
        core: Without the tensors of ``others``.
        others: Tensors that are neither factors nor ``modules_to_save``, without PEFT's prefix.
        infos: Layer → as the base has it.
        shared: What its layers share.
    """

    weights: AdapterWeights
    weight: float
    core: AdapterWeights = field(init=False)
    others: tuple[str, ...] = field(init=False)
    infos: dict[str, LayerInfo] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weights = self.weights
        self.others = weights.unexpected
        if not self.others:
            self.core = weights
            return
        fields = {**weights.peft, "target_modules": list(weights.modules), "exclude_modules": None}
        self.core = AdapterWeights(
            weights.config,
            fields,
            _Without(weights.tensors, {f"{peft.PREFIX}{k}" for k in self.others}),
            base=weights.base,
            frozen=weights.frozen,
            padding=weights.padding,
            sizes={m: (i.d_in, i.d_out) for m, i in weights.layers.items()},
            path=weights.path,
        )

    @property
    def label(self) -> str:
        """What it is, for people."""
        path = self.weights.path
        return self.weights.variant.name if path is None else os.fspath(path)

    @property
    def file(self) -> Path | None:
        """Its weights file."""
        return self.weights.path and self.weights.path / peft.WEIGHTS

    def state(self, module: str, dtype: torch.dtype) -> FileState:
        """Its tensors on a layer, in ``dtype``."""
        info = self.infos[module]
        new = self.core.new_tensors(module, info)
        values = {**self.shared, **dict(new.trainable), **dict(new.frozen)}
        return FileState(self.core.config, info, {n: t.to(dtype) for n, t in values.items()})


def open_adapters(
    given: str | os.PathLike[str] | AdapterWeights | Mapping[str, float],
) -> list[Part]:
    """One part for each adapter, in the order in which they are given.

    Raises:
        ConfigError: There is none, or a weight is not a finite number.
        AdapterFileError: An adapter cannot be read, or is one that only PEFT knows.
        FuseError: What it does depends on its input.
    """
    if isinstance(given, Mapping):
        pairs: list[tuple[Any, float]] = list(given.items())
        if not pairs:
            raise ConfigError("There is no adapter to fuse.", key="adapter")
    else:
        pairs = [(given, 1.0)]
    parts = []
    for one, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError("A weight is not a number.", got=repr(weight), key=str(one))
        if not math.isfinite(weight):
            raise ConfigError("A weight is not finite.", got=weight, key=str(one))
        weights = one if isinstance(one, AdapterWeights) else read_adapter(one)
        check_fusable(
            weights,
            unsupported="merge it with PEFT: model.merge_and_unload().save_pretrained(…)",
            dependent="serve it as an adapter; or train a variant that fuses "
            "(lorasmith variants lists them)",
        )
        parts.append(Part(weights, float(weight)))
    return parts
