"""The adapters of a fleet as the rest of it sees them: ids, factors, and what else they hold.

Every adapter is brought into one form, layer by layer and lazily:

    ΔW = B A        A [r, d_in], B [d_out, r], float32, the scaling s folded into B

so that ranks, alphas, rank-stabilised scalings, storage dtypes and sets of layers may differ
within a fleet. What an initialisation took over (s (B A − B0 A0)) is stacked to rank 2r. Of
DoRA these are the factors of its low-rank part; its magnitudes, like modules_to_save and a
LoRA on an embedding, are not ΔW = B A of a linear layer and stand in ``rest``, in the dtype
and bit for bit as they are stored. :func:`rebuild` puts both together again into a directory
that PEFT loads: configuration, scaling and ``rest`` are those of the original.

Which adapters are refused, with the reason (``UnsupportedFeatureError``):

* those whose change is not B A and that are not DoRA (IA3, OFT, LoHa, …): ``lorasmith
  convert`` makes a LoRA of them. Families with exact factors (VeRA, LoRA-XS, MiSS, DeLoRA)
  are members, and come back from :func:`rebuild` as plain LoRA;
* those with PEFT's features that lorasmith does not have (lora_bias, bias="all", aLoRA, …);
* files of PEFT whose ``init_lora_weights`` (pissa, olora, corda, loftq, lora_ga) makes PEFT
  take a part out of the base weights when it loads them: their ΔW is not in the file;
* those that hold tensors which nothing explains.

Adapters of different base models are refused (``BaseMismatchError``): by fingerprint where
both have one, else by the base's name where both have one, and always by the sizes of the
layers that they share. Where there is nothing of the kind to compare, there is a warning.

Ids are names, not paths: any non-empty text of at most 255 characters without control
characters. By default the directory's name, or as much of the path as tells it from the others.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import unicodedata
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lorasmith.core.config import AdapterConfig
from lorasmith.core.patterns import value_for
from lorasmith.core.registry import config_from_dict
from lorasmith.core.variant import Factors
from lorasmith.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    LorasmithError,
    UnknownNameError,
    UnsupportedFeatureError,
)
from lorasmith.io import peft
from lorasmith.io.files import read_adapter
from lorasmith.io.fingerprint import Fingerprint
from lorasmith.io.hub import adapters_below, is_url, release
from lorasmith.io.tensors import MemoryTensors
from lorasmith.io.weights import AdapterWeights, BaseModel, reason_for

__all__ = [
    "BaseCheck",
    "LayerFactors",
    "Member",
    "MemberRecord",
    "Source",
    "check_id",
    "check_known",
    "expand",
    "open_members",
    "rebuild",
    "unknown_id",
]

#: What an adapter of a fleet can be given as.
Source: TypeAlias = "str | os.PathLike[str] | AdapterWeights | Member"

#: Longest id, in characters.
MAX_ID = 255
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

    Made by :func:`open_members`.

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
        """What :func:`rebuild` needs beside factors and ``rest``."""
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


# Opening -------------------------------------------------------------------------------------


def open_members(
    sources: Source | Sequence[Source] | Mapping[str, Source],
    ids: Sequence[str] | None = None,
    *,
    allow_base_mismatch: bool = False,
    needs: Literal["factors", "delta"] = "factors",
) -> list[Member]:
    """Opens adapters as the members of a fleet.

    Args:
        sources: Directories (one that holds adapters in its subdirectories stands for all of
            them), hub ids, URLs (``s3://…``), adapters that have been read; or a mapping of
            ids to these, each of which is one adapter then.
        ids: One for each adapter, in order; by default names made of their paths.
        allow_base_mismatch: Whether they may name, or have the fingerprint of, different base
            models. Layers of the same name must have the same sizes all the same.
        needs: ``"delta"`` also admits adapters whose change is not B A, for what works on
            effective deltas (``Member.delta`` with the base weight).

    Raises:
        AdapterFileError: If one cannot be read, or there is none.
        BaseMismatchError: If two were made for different base models.
        UnsupportedFeatureError: If one cannot be part of a fleet; see the module.
        ConfigError: If ids are not usable, not unique, or of another number.
    """
    if isinstance(sources, Mapping):
        if ids is not None:
            raise ConfigError("A mapping brings its own ids.", fix="leave ids out", key="ids")
        given = list(sources.values())
        names: list[str] | None = list(sources)
    else:
        given = expand(sources)
        names = None if ids is None else list(ids)
    if not given:
        raise AdapterFileError("There is no adapter.", expected="at least one", key="sources")
    if names is None:
        names = default_ids(given)
    if len(names) != len(given):
        raise ConfigError(
            "There are not as many ids as adapters.",
            expected=f"{len(given)} ids",
            got=len(names),
            key="ids",
        )
    for name in names:
        check_id(name)
    twice = [n for n, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            "Two adapters have the same id.", expected="unique ids", got=repr(twice[0]), key="ids"
        )
    members = [_open(n, source, needs) for n, source in zip(names, given, strict=True)]
    check = BaseCheck(allow_base_mismatch=allow_base_mismatch)
    for member in members:
        check.add(member)
    if not all(isinstance(source, Member) for source in given):  # those were opened before
        check.warn()
    return members


def expand(sources: Source | Iterable[Source]) -> list[Source]:
    """The single adapters that are meant: directories of adapters become what they hold.

    A directory, local or a URL, that holds no ``adapter_config.json`` and whose
    subdirectories do stands for all of those, sorted by name. Everything else is left as it is.
    """
    single = isinstance(sources, str | os.PathLike | AdapterWeights | Member)
    items: list[Source] = [sources] if single else list(sources)  # type: ignore[list-item, arg-type]
    found: list[Source] = []
    for item in items:
        below = None
        if isinstance(item, str | os.PathLike):
            below = adapters_below(item)
        found.extend(below or [item])
    return found


def check_id(name: object) -> str:
    """The id, if it is one.

    Raises:
        ConfigError: If it is not a non-empty text of at most 255 characters without control
            characters.
    """
    # Cc: control characters; Cs: lone surrogates, which no file can hold.
    if (
        isinstance(name, str)
        and 0 < len(name) <= MAX_ID
        and not any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
    ):
        return name
    raise ConfigError(
        "That cannot be the id of an adapter.",
        expected=f"1 to {MAX_ID} characters, none of them a control character",
        got=repr(name)[:80],
        key="ids",
    )


def unknown_id(
    what: str,
    id: str,  # noqa: A002 - its name
    ids: Sequence[str],
    *,
    key: str | None = None,
) -> UnknownNameError:
    """The error for an id that no adapter has, with those that are spelt alike.

    Args:
        what: What went wrong, a sentence.
        id: The id.
        ids: Those that there are.
        key: The argument that it was given as.
    """
    plain = {name.casefold(): name for name in reversed(ids)}
    near = difflib.get_close_matches(str(id).casefold(), plain, n=3)
    return UnknownNameError(
        what,
        expected=", ".join(map(repr, ids[:6])) + (f", … ({len(ids)})" if len(ids) > 6 else "")
        if ids
        else "there is none",
        got=repr(id),
        fix=f"did you mean {' or '.join(repr(plain[n]) for n in near)}?" if near else None,
        key=key,
    )


def default_ids(sources: Sequence[Source]) -> list[str]:
    """A unique id for each source: the last part of its path, and more of it where needed."""
    parts = [_path_parts(source) for source in sources]
    lengths = dict.fromkeys(parts, 1)
    while True:
        # The same path twice cannot be told apart by more of it.
        counts = Counter("/".join(p[-n:]) for p, n in lengths.items())
        longer = [p for p, n in lengths.items() if counts["/".join(p[-n:])] > 1 and n < len(p)]
        if not longer:
            break
        for path in longer:
            lengths[path] += 1
    names = ["/".join(p[-lengths[p] :]) for p in parts]
    # The same path again is another adapter of the fleet, e.g. in a merge of copies.
    seen: Counter[str] = Counter()
    taken, unique = set(names), []
    for name in names:
        seen[name] += 1
        if seen[name] == 1:
            unique.append(name)
            continue
        number = seen[name]
        while f"{name}#{number}" in taken:
            number += 1
        taken.add(f"{name}#{number}")
        unique.append(f"{name}#{number}")
    return unique


def _path_parts(source: Source) -> tuple[str, ...]:
    if isinstance(source, Member):
        return (source.id,)
    if isinstance(source, AdapterWeights):
        if source.path is None:
            return ("adapter",)
        text = os.fspath(source.path)
    else:
        text = os.fspath(source)
    if is_url(text):
        text = text.split("://", 1)[1]
    elif Path(text).expanduser().exists():
        text = os.fspath(Path(text).expanduser().resolve())
    parts = [p for p in text.replace("\\", "/").split("/") if p not in ("", ".")]
    clean = ["".join(c for c in p if unicodedata.category(c) not in ("Cc", "Cs")) for p in parts]
    return tuple(c for c in clean if c) or ("adapter",)


def _open(name: str, source: Source, needs: str) -> Member:
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


class BaseCheck:
    """Whether adapters, shown one after the other, were made for one base model.

    Args:
        allow_base_mismatch: Compare nothing but the sizes of layers.
    """

    def __init__(self, *, allow_base_mismatch: bool = False) -> None:
        self._allow = allow_base_mismatch
        self._first: Member | None = None
        self._printed: Member | None = None
        #: Whether it has a fingerprint → the first one with a name.
        self._named: dict[bool, Member] = {}
        self._sizes: dict[str, tuple[tuple[int, int], Member]] = {}
        #: What ties adapters together (a fingerprint, a name, layers) → one of its group.
        self._tied: dict[object, object] = {}
        self._groups: dict[object, str] = {}

    @property
    def base(self) -> BaseModel:
        """What is known of the base model, from the adapter that tells most."""
        named = next(iter(self._named.values()), self._first)
        telling = self._printed or named
        return BaseModel() if telling is None else telling.weights.base

    def add(self, member: Member) -> None:
        """Takes one more.

        Raises:
            BaseMismatchError: It was made for another base model than those before.
        """
        base = member.weights.base
        if not self._allow:
            printed = self._printed
            if base.fingerprint is not None and printed is not None:
                assert printed.weights.base.fingerprint is not None
                difference = printed.weights.base.fingerprint.compare(base.fingerprint)
                if not difference.same:
                    raise _mismatch(printed, member, str(difference))
            # Names count where there is no fingerprint on one side or the other.
            for having, other in self._named.items() if base.name is not None else ():
                both = having and base.fingerprint is not None
                if not both and other.weights.base.name != base.name:
                    raise _mismatch(other, member, "by their names")
        sizes = member.sizes
        for module, size in sizes.items():
            known, other = self._sizes.get(module, (size, member))
            if any(a and b and a != b for a, b in zip(known, size, strict=True)):
                raise BaseMismatchError(
                    f"The adapters {other.id!r} and {member.id!r} were made for different base "
                    "models: a layer has other sizes.",
                    file=member.weights.path,
                    key=module,
                    expected=f"{known[0]} → {known[1]}",
                    got=f"{size[0]} → {size[1]}",
                    fix="take adapters of one base model",
                )
        # It is of the same base, as far as anything tells.
        self._first = self._first or member
        if base.fingerprint is not None:
            self._printed = self._printed or member
        if base.name is not None:
            self._named.setdefault(base.fingerprint is not None, member)
        for module, size in sizes.items():
            if module not in self._sizes or not all(self._sizes[module][0]):
                self._sizes[module] = (size, member)
        self._tie(member)

    def _tie(self, member: Member) -> None:
        base, tied = member.weights.base, self._tied

        def root(mark: object) -> object:
            while tied.setdefault(mark, mark) != mark:
                mark = tied[mark]
            return mark

        marks: list[object] = [member.modules]
        if member.modules not in tied:
            marks += member.modules
        if base.fingerprint is not None:
            marks.append(("fingerprint",))
        if base.name is not None:
            marks.append(("name", base.name))
        roots = dict.fromkeys(root(m) for m in marks)
        top = next(iter(roots))
        name = next((self._groups[r] for r in roots if r in self._groups), member.id)
        for other in roots:
            tied[other] = top
            self._groups.pop(other, None)
        self._groups[top] = name

    def warn(self) -> None:
        """Warns (``UserWarning``) if nothing tells that all of them are of one base model.

        That is where two have neither fingerprints nor names to compare, nor a layer that
        both adapt, themselves or by way of others.
        """
        if self._allow or len(self._groups) < 2:
            return
        first, second = list(self._groups.values())[:2]
        _warn_unknown(f"the adapters {first!r} and {second!r}")


def _warn_unknown(who: str) -> None:
    warnings.warn(
        f"Nothing tells whether {who} were made for one base model: they have neither "
        "fingerprints nor names of it in common, nor a layer. Make sure that they were, and pass "
        "allow_base_mismatch=True (--allow-base-mismatch) to say so.",
        UserWarning,
        stacklevel=4,
    )


def check_known(member: Member, base: BaseModel, modules: Iterable[str]) -> None:
    """Warns (``UserWarning``) if nothing tells that an adapter belongs to a fleet that is there.

    Args:
        member: The adapter.
        base: What is known of the fleet's base model.
        modules: Layers of the fleet; without any there is nothing to compare.
    """
    theirs, known = member.weights.base, set(modules)
    if (
        (base.fingerprint is None or theirs.fingerprint is None)
        and (base.name is None or theirs.name is None)
        and known
        and known.isdisjoint(member.modules)
    ):
        _warn_unknown(f"the adapter {member.id!r} and those of the fleet")


def _mismatch(first: Member, second: Member, how: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"The adapters {first.id!r} and {second.id!r} were made for different base models ({how}).",
        file=second.weights.path,
        expected=first.weights.base.name,
        got=second.weights.base.name,
        fix="take adapters of one base model, or pass allow_base_mismatch=True "
        "(--allow-base-mismatch) if the two are the same",
    )


# Records and rebuilding ------------------------------------------------------------------------


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
        member = _open("adapter", member, "factors") if not isinstance(member, Member) else member
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
            _dtype(record.dtype)
            for module, size in record.sizes.items():
                # What is rebuilt is filled up to its old rank: an impossible one takes all memory.
                if min(size) < 0 or max(size) >= 2**31:
                    raise ValueError(f"{module} cannot have the sizes {size}")
                if not 0 <= record.ranks.get(module, 0) <= max(256, 2 * max(size)):
                    raise ValueError(f"{module} cannot have the rank {record.ranks[module]}")
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            reason = error.what if isinstance(error, LorasmithError) else repr(error)
            raise AdapterFileError(
                f"The record of an adapter cannot be read: {reason}.", key="record"
            ) from error
        return record


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
        member = like if isinstance(like, Member) else _open("adapter", like, "factors")
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
    kind = _dtype(record.dtype) if dtype is None else dtype
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
        rank_pattern=_pattern(ranks, r),
        alpha_pattern=_pattern({m: float(k) for m, k in ranks.items()}, float(r)),
    )
    own = weights.variant.peft_fields
    kept = {k: v for k, v in weights.peft.items() if k in peft.COMMON_FIELDS or k not in own}
    fields = {**kept, **weights.variant.to_peft(weights.config, weights.layers)}
    fields = {k: v for k, v in fields.items() if k in peft.COMMON_FIELDS}
    from lorasmith.core.registry import variant_of

    made = variant_of(config)
    fields |= made.to_peft(config, weights.layers)
    fields["peft_type"] = made.peft_type
    return config, fields, ranks


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
            rank_pattern=_pattern(wanted, r),
            alpha_pattern=_pattern(alphas, usual),
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


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
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


def _tidy(value: float) -> float:
    """An alpha without the last digits that √r · √r leaves."""
    near = round(value, 9)
    return near if math.isclose(near, value, rel_tol=1e-12) else value


def _whole(value: float) -> float | int:
    """16.0 → 16: PEFT and vLLM declare alpha as an integer."""
    return int(value) if float(value).is_integer() else value


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise AdapterFileError("That is not a dtype of factors.", got=name, key="dtype")
    return found
