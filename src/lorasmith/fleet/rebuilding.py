"""An adapter of the same kind as another one, with other factors, as a directory for PEFT.

Where the ranks are others than the original's, ``rank_pattern`` and ``alpha_pattern`` are written
such that every scaling stays what it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lorasmith.core.config import AdapterConfig
from lorasmith.core.registry import config_from_dict
from lorasmith.errors import AdapterFileError, ConfigError
from lorasmith.fleet.member import (
    LayerFactors,
    Member,
    MemberRecord,
    admit,
    dtype_of,
    pattern_of,
)
from lorasmith.io import peft
from lorasmith.io.tensors import MemoryTensors
from lorasmith.io.weights import AdapterWeights

__all__ = ["rebuild"]


def rebuild(
    like: AdapterWeights | Member | MemberRecord,
    factors: Mapping[str, LayerFactors],
    *,
    rest: Mapping[str, Tensor] | None = None,
    rank: Literal["factors", "original"] | int = "factors",
    dtype: torch.dtype | None = None,
) -> AdapterWeights:
    """An adapter of the same kind as another one, with other factors.

    Kind (LoRA or DoRA), scaling of every layer, dropout, task type, targets,
    modules_to_save, base and storage dtype are those of ``like``; ``s · B A`` equals the
    factors given, up to the rounding of the storage dtype. Where ranks differ from the
    original's, ``rank_pattern`` and ``alpha_pattern`` say so, such that every s stays what
    it was.

    Args:
        like: The adapter to take after, or its record.
        factors: Module name → factors.
        rest: The tensors beside the factors, under the names of ``like``'s; those of
            ``like`` itself by default (a record has none).
        rank: ``"factors"``: each layer has the rank of its factors. ``"original"`` or a
            number: that rank, filled up with zeros.
        dtype: In which to store the factors; that of ``like`` by default.

    Raises:
        ConfigError: If factors have a higher rank than ``rank`` allows, or impossible shapes.
        AdapterFileError: If tensors of ``rest`` are missing, unknown, or of another shape.
        UnsupportedFeatureError: If ``like`` cannot be part of a fleet.
    """
    if isinstance(like, MemberRecord):
        record, carried = like, rest
    else:
        member = like if isinstance(like, Member) else admit("adapter", like, "factors")
        record, carried = member.record, member.rest if rest is None else rest
    carried = {} if carried is None else carried
    _check_rest(record, carried)
    modules = sorted(factors, key=_order(record))
    if not modules:
        raise ConfigError("There are no factors.", expected="at least one layer", key="factors")
    ranks = {m: _rank(record, m, factors[m], rank) for m in modules}
    old = config_from_dict(record.config)
    scalings = {m: _scaling(old, m) for m in modules}
    embeddings = _embeddings(record)
    config, fields = _configuration(record, old, ranks, scalings, embeddings)
    kind = dtype_of(record.dtype) if dtype is None else dtype
    tensors: dict[str, Tensor] = {}
    for module in modules:
        A, B = _padded(factors[module], ranks[module])
        tensors[f"{peft.PREFIX}{module}.lora_A.weight"] = A.to(kind)
        tensors[f"{peft.PREFIX}{module}.lora_B.weight"] = (B / scalings[module]).to(kind)
    for key in carried:
        tensors[f"{peft.PREFIX}{key}"] = carried[key].detach().contiguous()
    return AdapterWeights(
        config,
        fields,
        MemoryTensors(tensors),
        base=record.base,
        frozen=() if getattr(config, "train_A", True) else ("A",),
        padding=record.padding,
        conv1d=record.conv1d,
    )


def _check_rest(record: MemberRecord, rest: Mapping[str, Tensor]) -> None:
    for key in sorted(record.rest.keys() ^ set(rest)):
        raise AdapterFileError(
            "A tensor beside the factors is missing, and would be lost."
            if key in record.rest
            else "A tensor beside the factors is not one that the adapter has.",
            key=key,
            expected=f"{len(record.rest)} tensors",
            got=f"{len(rest)} tensors",
            fix="pass rest= with all of Member.rest",
        )
    for key in rest:
        if tuple(rest[key].shape) != tuple(record.rest[key]):
            raise AdapterFileError(
                "A tensor beside the factors has another shape than the adapter's.",
                key=key,
                expected=list(record.rest[key]),
                got=list(rest[key].shape),
            )


def _order(record: MemberRecord) -> Any:
    place = {m: i for i, m in enumerate(record.ranks)}
    return lambda m: (place.get(m, len(place)), m)


def _rank(
    record: MemberRecord,
    module: str,
    factors: LayerFactors,
    wanted: Literal["factors", "original"] | int,
) -> int:
    A, B = factors.A, factors.B
    fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] and A.shape[0] > 0
    d_in, d_out = record.sizes.get(module, (0, 0))
    if not fits or (d_in or A.shape[1], d_out or B.shape[0]) != (A.shape[1], B.shape[0]):
        raise ConfigError(
            "The factors do not fit the layer.",
            expected=f"A [r, {d_in or 'd_in'}] and B [{d_out or 'd_out'}, r]",
            got=f"A {list(A.shape)} and B {list(B.shape)}",
            key=module,
        )
    have = A.shape[0]
    if wanted == "factors":
        return have
    if wanted == "original":
        if module not in record.ranks:
            raise ConfigError(
                "The original has no such layer, and so no rank for it.",
                got=module,
                fix='pass rank="factors" or a number',
                key="rank",
            )
        most = record.ranks[module]
    elif type(wanted) is int and wanted >= 1:
        most = wanted
    else:
        raise ConfigError(
            "rank is not usable.",
            expected='"factors", "original", or an integer of at least 1',
            got=repr(wanted),
            key="rank",
        )
    if have > most:
        raise ConfigError(
            "The factors have a higher rank than the adapter is to have.",
            expected=f"at most {most}",
            got=have,
            fix="truncate them first, or choose a higher rank",
            key=module,
        )
    return most


def _padded(factors: LayerFactors, rank: int) -> tuple[Tensor, Tensor]:
    A, B = factors.A.detach().cpu().float(), factors.B.detach().cpu().float()
    more = rank - A.shape[0]
    if not more:
        return A.contiguous(), B.contiguous()
    return torch.cat((A, A.new_zeros(more, A.shape[1]))), torch.cat(
        (B, B.new_zeros(B.shape[0], more)), dim=1
    )


def _scaling(config: Any, module: str) -> float:
    found: float = config.scaling_of(module)
    # An alpha of 0 (alpha_pattern may say so) can carry nothing: the layer gets s = 1.
    return found or 1.0


def _embeddings(record: MemberRecord) -> dict[str, int]:
    """Module name → rank of the LoRAs on embeddings that are carried."""
    return {
        key[: -len(".lora_embedding_A")]: shape[0]
        for key, shape in record.rest.items()
        if key.endswith(".lora_embedding_A")
    }


def _configuration(
    record: MemberRecord,
    old: Any,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    embeddings: Mapping[str, int],
) -> tuple[AdapterConfig, dict[str, Any]]:
    """Our configuration and PEFT's fields with these ranks and scalings."""
    fields = dict(record.peft)
    same = set(ranks) == set(record.ranks)
    config = old
    if any(old.rank_of(m) != r or old.scaling_of(m) != scalings[m] for m, r in ranks.items()):
        wanted = {**ranks, **embeddings}
        rslora = old.scaling == "rslora"

        def alpha(module: str) -> float:
            r = wanted[module]
            s = scalings[module] if module in ranks else old.scaling_of(module)
            if module in ranks and old.rank_of(module) == r and old.scaling_of(module) == s:
                return float(old.alpha_of(module))
            return _tidy(s * (math.sqrt(r) if rslora else r))

        alphas = {m: alpha(m) for m in wanted}
        r = _common(list(ranks.values()), old.r)
        usual = _common([a for m, a in alphas.items() if a and ranks.get(m) == r], old.alpha)
        config = replace(
            old,
            r=r,
            alpha=usual,
            rank_pattern=pattern_of(wanted, r),
            alpha_pattern=pattern_of(alphas, usual),
        )
        fields["r"] = r
        fields["lora_alpha"] = _whole(usual)
        fields["rank_pattern"] = dict(config.rank_pattern)
        fields["alpha_pattern"] = {k: _whole(v) for k, v in config.alpha_pattern.items()}
    if not same:
        config = replace(config, targets=tuple(ranks), exclude=(), layers=None)
        fields["target_modules"] = [*ranks, *embeddings]
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if fields.get(name) is not None:
                fields[name] = None
    return config, fields


def _common(values: Sequence[Any], preferred: Any) -> Any:
    """The commonest of the values; the preferred one where that is among them."""
    return preferred if preferred in values else Counter(values).most_common(1)[0][0]


def _tidy(value: float) -> float:
    """An alpha without the last digits that √r · √r leaves."""
    near = round(value, 9)
    return near if math.isclose(near, value, rel_tol=1e-12) else value


def _whole(value: float) -> float | int:
    """16.0 → 16: PEFT and vLLM declare alpha as an integer."""
    return int(value) if float(value).is_integer() else value
