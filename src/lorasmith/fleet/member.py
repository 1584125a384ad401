"""One adapter of a fleet: its id, its factors, what else it holds, and the record of all that.

Every adapter is brought into one form, layer by layer and lazily:

    ΔW = B A        A [r, d_in], B [d_out, r], float32, the scaling s folded into B

so that ranks, alphas, rank-stabilised scalings, storage dtypes and sets of layers may differ
within a fleet. What an initialisation took over (s (B A − B0 A0)) is stacked to rank 2r. Of
DoRA these are the factors of its low-rank part; its magnitudes, like modules_to_save and a
LoRA on an embedding, are not ΔW = B A of a linear layer and stand in ``rest``, in the dtype
and bit for bit as they are stored. :func:`~lorasmith.fleet.rebuild` puts both together again
into a directory that PEFT loads: configuration, scaling and ``rest`` are those of the original.

Which adapters are refused, with the reason (``UnsupportedFeatureError``):

* those whose change is not B A and that are not DoRA (IA3, OFT, LoHa, …): ``lorasmith
  convert`` makes a LoRA of them. Families with exact factors (VeRA, LoRA-XS, MiSS, DeLoRA)
  are members, and come back from :func:`~lorasmith.fleet.rebuild` as plain LoRA;
* those with PEFT's features that lorasmith does not have (lora_bias, bias="all", aLoRA, …);
* files of PEFT whose ``init_lora_weights`` (pissa, olora, corda, loftq, lora_ga) makes PEFT
  take a part out of the base weights when it loads them: their ΔW is not in the file;
* those that hold tensors which nothing explains.
"""

from __future__ import annotations

import math
import os
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lorasmith.core.patterns import one_operation, value_for
from lorasmith.core.registry import config_from_dict, variant_of
from lorasmith.core.variant import Factors
from lorasmith.errors import (
    AdapterFileError,
    ConfigError,
    LorasmithError,
    UnknownNameError,
    UnsupportedFeatureError,
)
from lorasmith.io import peft
from lorasmith.io.files import read_adapter
from lorasmith.io.fingerprint import Fingerprint
from lorasmith.io.hub import is_url, release
from lorasmith.io.weights import AdapterWeights, BaseModel, reason_for

__all__ = [
    "LayerFactors",
    "Member",
    "MemberRecord",
    "Source",
    "admit",
    "dtype_of",
    "pattern_of",
]

#: What an adapter of a fleet can be given as.
Source: TypeAlias = "str | os.PathLike[str] | AdapterWeights | Member"
#: Initialisations for which PEFT changes the base weights when it loads the adapter.
_TAKES_OVER = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Families whose files are PEFT's LORA and that ``rebuild`` gives back as what they were.
_NATIVE = ("lora", "dora")
_EMBEDDING = re.compile(r"\.lora_embedding_[AB]$")


@dataclass(frozen=True)
class LayerFactors:
    """ΔW = B A of one layer, with the scaling folded into B.

    Attributes:
        A: [r, d_in], float32.
        B: [d_out, r], float32.
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.A.shape[0]

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW [d_out, d_in]."""
        return self.B.to(dtype) @ self.A.to(dtype)


class Member:
    """One adapter of a fleet. Nothing is read before it is asked for, nothing is kept.

    Made by :func:`~lorasmith.fleet.members.open_members`.

    Attributes:
        id: Its name in the fleet.
        weights: The adapter as a value.
        modules: Names of the adapted linear layers.
    """

    def __init__(self, id: str, weights: AdapterWeights) -> None:  # noqa: A002 - its name
        self.id = id
        self.weights = weights
        self.modules: tuple[str, ...] = weights.modules
        self._layers = weights.layers
        self._ranks: dict[str, int] = {}

    @property
    def dora(self) -> bool:
        """Whether W + B A is rescaled row by row afterwards (DoRA)."""
        return self.weights.variant.name == "dora"

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Module name → (d_in, d_out); 0 where the files do not tell."""
        return {m: (i.d_in, i.d_out) for m, i in self._layers.items()}

    def sizes_of(self, module: str) -> tuple[int, int]:
        """(d_in, d_out) of one layer; 0 where the files do not tell."""
        info = self._layers[module]
        return info.d_in, info.d_out

    @cached_property
    def _factors(self) -> Mapping[str, Factors]:
        # Finding out which layers have factors goes through all of them: once is enough.
        return self.weights.factors

    def factors(self, module: str) -> LayerFactors:
        """A and B of one layer, scaling folded into B.

        Raises:
            UnknownNameError: If it does not adapt that layer.
            UnsupportedFeatureError: If its change of that layer is not B A.
            AdapterFileError: If a value is not finite.
        """
        if module not in self.modules:
            raise UnknownNameError(
                f"The adapter {self.id!r} does not adapt that layer.",
                expected=", ".join(self.modules[:4]),
                got=module,
                key=module,
            )
        try:
            found = self._factors[module]
        except KeyError:
            raise _not_low_rank(self.id, self.weights) from None
        A, B = found.stacked()
        return LayerFactors(A.float(), (B * found.scaling).float())

    def low_rank(self, module: str) -> bool:
        """Whether it has factors of that layer (of DoRA those of its low-rank part)."""
        return module in self._factors

    def rank(self, module: str) -> int:
        """Rank of the factors of one layer, without reading values where the files tell it."""
        if module not in self._ranks:
            native = self.weights.variant.name in _NATIVE
            self._ranks[module] = (
                _file_config(self.weights).rank_of(module) if native else self.factors(module).rank
            )
        return self._ranks[module]

    def delta(
        self, module: str, weight: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Effective ΔW [d_out, d_in], of DoRA and the like too; see ``AdapterWeights.delta``."""
        return self.weights.delta(module, weight, dtype=dtype)

    @property
    def rest(self) -> Mapping[str, Tensor]:
        """All that is not factors: ``"<module>.<tensor>"`` → value as stored, read on access.

        DoRA's magnitudes, ``modules_to_save``, the LoRA of an embedding, and copies of base
        weights that PEFT asks for. Not what a family other than LoRA and DoRA makes its
        factors of.
        """
        extras = self.weights.extras
        if self.weights.variant.name in _NATIVE:
            return extras
        kept = {f"{m}.{leaf}" for m, ls in self.weights.saved_modules.items() for leaf in ls}
        return _Part(extras, [k for k in extras if k in kept or k in self.weights.padding])

    @property
    def record(self) -> MemberRecord:
        """What :func:`~lorasmith.fleet.rebuild` needs beside factors and ``rest``."""
        return MemberRecord.of(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        tensors = self.weights.tensors
        return sum(math.prod(tensors.shape(k)) * tensors.dtype(k).itemsize for k in tensors)

    def __repr__(self) -> str:
        return f"Member({self.id!r}, {self.weights!r})"


class _Part(Mapping[str, Tensor]):
    """Some entries of a lazy mapping."""

    def __init__(self, whole: Mapping[str, Tensor], keys: Iterable[str]) -> None:
        self._whole, self._keys = whole, dict.fromkeys(keys)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._whole[key]

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Any:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True)
class MemberRecord:
    """All of an adapter but its numbers, in types that JSON can hold.

    Attributes:
        config: Fields of its ``LoRAConfig`` or ``DoRAConfig``, as ``to_dict`` gives them.
        peft: Fields of PEFT's ``adapter_config.json``.
        base: The model it was made for.
        dtype: The dtype in which its factors are stored, e.g. ``"bfloat16"``.
        ranks: Module name → rank.
        sizes: Module name → (d_in, d_out).
        rest: Names of the tensors beside the factors, and their shapes.
        padding: Those of them that are plain copies of base weights.
        conv1d: Modules that store their weight transposed.
    """

    config: Mapping[str, Any]
    peft: Mapping[str, Any]
    base: BaseModel
    dtype: str
    ranks: Mapping[str, int]
    sizes: Mapping[str, tuple[int, int]]
    rest: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    padding: tuple[str, ...] = ()
    conv1d: tuple[str, ...] = ()

    @classmethod
    def of(cls, member: Member | AdapterWeights) -> MemberRecord:
        """The record of an adapter.

        Raises:
            UnsupportedFeatureError: If it cannot be part of a fleet.
        """
        member = admit("adapter", member, "factors") if not isinstance(member, Member) else member
        weights = member.weights
        rest = member.rest
        shapes = {k: tuple(weights.tensors.shape(_stored(weights, k))) for k in rest}
        fields = dict(weights.peft)
        if weights.variant.name in _NATIVE:
            config = _file_config(weights)
            if weights.frozen:
                # How it would start anew: there is nothing any more that was taken over.
                config = replace(config, init="kaiming", init_options={})
            ranks = {m: config.rank_of(m) for m in member.modules}
        else:
            config, fields, ranks = _as_lora(member)
        if "init_lora_weights" in fields:
            fields["init_lora_weights"] = True
        return cls(
            config=config.to_dict(),
            peft=fields,
            base=weights.base,
            dtype=str(weights.dtype).removeprefix("torch."),
            ranks=ranks,
            sizes=member.sizes,
            rest=shapes,
            padding=weights.padding,
            conv1d=tuple(m for m, info in weights.layers.items() if info.kind == "conv1d"),
        )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self.ranks)

    @property
    def dora(self) -> bool:
        """Whether it is a DoRA."""
        return bool(self.config["variant"] == "dora")

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        values = {k: v for k, v in asdict(replace(self, base=BaseModel())).items() if k != "base"}
        printed = self.base.fingerprint
        return {
            **values,
            "sizes": {m: list(s) for m, s in self.sizes.items()},
            "rest": {k: list(s) for k, s in self.rest.items()},
            "padding": list(self.padding),
            "conv1d": list(self.conv1d),
            "base": {
                "name": self.base.name,
                "fingerprint": None if printed is None else printed.to_dict(),
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemberRecord:
        """The inverse of :meth:`to_dict`.

        Raises:
            AdapterFileError: If ``values`` is not such a record.
        """
        try:
            base = values["base"]
            printed = base["fingerprint"]
            record = cls(
                config=dict(values["config"]),
                peft=dict(values["peft"]),
                base=BaseModel(
                    base["name"], None if printed is None else Fingerprint.from_dict(printed)
                ),
                dtype=str(values["dtype"]),
                ranks={str(m): int(r) for m, r in values["ranks"].items()},
                sizes={str(m): (int(s[0]), int(s[1])) for m, s in values["sizes"].items()},
                rest={str(k): tuple(map(int, s)) for k, s in values["rest"].items()},
                padding=tuple(map(str, values["padding"])),
                conv1d=tuple(map(str, values["conv1d"])),
            )
            config_from_dict(record.config)
            dtype_of(record.dtype)
            saved = record.peft.get("modules_to_save")
            if saved is not None and not all(isinstance(name, str) for name in list(saved)):
                raise TypeError(f"modules_to_save cannot be {saved!r}"[:200])
            for module, size in record.sizes.items():
                # What is rebuilt is filled up to its old rank: an impossible one takes all memory.
                if min(size) < 0 or max(size) >= 2**31:
                    raise ValueError(f"{module} cannot have the sizes {size}")
                if not 1 <= record.ranks.get(module, 1) <= max(256, 2 * max(size)):
                    raise ValueError(f"{module} cannot have the rank {record.ranks[module]}")
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            reason = error.what if isinstance(error, LorasmithError) else repr(error)
            raise AdapterFileError(
                f"The record of an adapter cannot be read: {reason}.", key="record"
            ) from error
        return record


def _stored(weights: AdapterWeights, key: str) -> str:
    """The name in the file of an entry of ``rest``."""
    full = f"{peft.PREFIX}{key}"
    return full if full in weights.tensors else key


def _file_config(weights: AdapterWeights) -> Any:
    """The configuration that describes the factors of the file (rank 2r with a frozen part)."""
    return weights.variant.file_config(weights.config, weights.frozen)


def _as_lora(member: Member) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """Configuration, PEFT's fields and ranks of the plain LoRA that has a member's factors."""
    from lorasmith.adapters.lora import LoRAConfig

    weights = member.weights
    ranks = {m: member.rank(m) for m in member.modules}
    r = Counter(ranks.values()).most_common(1)[0][0]
    config = LoRAConfig(
        targets=weights.config.targets,
        modules_to_save=weights.config.modules_to_save,
        exclude=weights.config.exclude,
        layers=weights.config.layers,
        dropout=getattr(weights.config, "dropout", 0.0),
        r=r,
        alpha=r,
        rank_pattern=pattern_of(ranks, r),
        alpha_pattern=pattern_of({m: float(k) for m, k in ranks.items()}, float(r)),
    )
    own = weights.variant.peft_fields
    kept = {k: v for k, v in weights.peft.items() if k in peft.COMMON_FIELDS or k not in own}
    fields = {**kept, **weights.variant.to_peft(weights.config, weights.layers)}
    fields = {k: v for k, v in fields.items() if k in peft.COMMON_FIELDS}
    made = variant_of(config)
    fields |= made.to_peft(config, weights.layers)
    fields["peft_type"] = made.peft_type
    return config, fields, ranks


@one_operation()
def admit(name: str, source: Source, needs: str) -> Member:
    """An adapter as a member of that name, read if need be.

    Raises:
        AdapterFileError: If it cannot be read.
        UnsupportedFeatureError: If it cannot be part of a fleet; see the module.
    """
    if isinstance(source, Member):
        weights = source.weights
    elif isinstance(source, AdapterWeights):
        weights = source
    else:
        weights = read_adapter(source)
        if is_url(source) and weights.path is not None:
            # A fleet has many: its copy goes when nothing is left that could read from it.
            weakref.finalize(weights.tensors, release, Path(weights.path)).atexit = False
    _refuse_unsupported(name, weights)
    low_rank = weights.variant.name in _NATIVE
    if not low_rank and needs == "factors":
        having = weights.factors
        if set(having) != set(weights.modules) or not having[weights.modules[0]].exact:
            raise _not_low_rank(name, weights)
    return Member(name, weights)


def _refuse_unsupported(name: str, weights: AdapterWeights) -> None:
    def refused(reason: str, key: str | None, fix: str) -> UnsupportedFeatureError:
        return UnsupportedFeatureError(
            f"The adapter {name!r} cannot be part of a fleet: {reason}.",
            file=weights.path,
            key=key,
            fix=fix,
        )

    if weights.unsupported is not None:
        raise refused(weights.unsupported.rstrip("."), None, "leave it out; PEFT can load it")
    start = weights.peft.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_TAKES_OVER):
        raise refused(
            f"PEFT takes a part out of the base weights when it loads it "
            f"(init_lora_weights = {start!r}), so that its change of them is not in the file",
            "init_lora_weights",
            "load it with PEFT and save it with path_initial_model_for_weight_conversion=…",
        )
    for key in weights.unexpected:
        copy = key.endswith((".weight", ".bias")) and "lora_" not in key
        if not (copy or _EMBEDDING.search(key)):
            raise refused(
                f"it holds a tensor that cannot be carried: {reason_for(key)}",
                key,
                "leave it out, or save it without that tensor",
            )


def _not_low_rank(name: str, weights: AdapterWeights) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"The adapter {name!r} is of the family {weights.variant.name!r}, whose change of the "
        "weights has no low-rank factors that are all it does.",
        file=weights.path,
        expected="LoRA, DoRA, or a family with exact factors",
        got=weights.variant.name,
        fix="make a LoRA of it first: lorasmith convert ADAPTER -o OUTPUT --r N --model BASE",
    )


def pattern_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A ``rank_pattern`` or ``alpha_pattern`` that gives every module its value.

    By the last part of the names where that tells, else by whole names, else by whole names
    with every character of them meant literally.
    """
    if all(v == default for v in values.values()):
        return {}
    leaves: dict[str, set[Any]] = {}
    for module, value in values.items():
        leaves.setdefault(module.rpartition(".")[2], set()).add(value)
    longest = sorted(values, key=lambda m: (-len(m), m))
    forms: list[dict[str, Any]] = []
    if all(len(found) == 1 for found in leaves.values()):
        short = {leaf: found.pop() for leaf, found in leaves.items()}
        forms.append({k: v for k, v in short.items() if v != default})
    forms.append({m: values[m] for m in longest if values[m] != default})
    forms.append({re.escape(m): values[m] for m in longest})
    for form in forms:
        if all(value_for(form, m, default) == v for m, v in values.items()):
            return form
    raise ConfigError(
        "The names of the layers cannot be told apart by patterns.", got=longest[0], key="factors"
    )


def dtype_of(name: str) -> torch.dtype:
    """The dtype of factors with that name; an AdapterFileError if there is none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise AdapterFileError("That is not a dtype of factors.", got=name, key="dtype")
    return found
