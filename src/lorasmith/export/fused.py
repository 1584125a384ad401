"""Fusing adapters into a checkpoint on disk: a full model for whoever loads no adapters.

    made = ls.fuse_checkpoint("base", "my-adapter", "fused", dtype="bfloat16")
    AutoModelForCausalLM.from_pretrained("fused")      # no lorasmith, no PEFT

:func:`lorasmith.fuse` does it to a model in memory, and can take it back. Here no model is
built: the checkpoint's tensors are read block by block, changed where an adapter says so, and
written on.

    what an adapter has for a tensor            what is written
    nothing                                     its bytes as they are (or cast to ``dtype``)
    low-rank factors that are all it does       W + Σ w s B A, a block of rows at a time
    anything else (DoRA, IA3, HRA, OFT, …)      W + Σ w (effective weight − W), one whole W
    a bias that it changes (IA3, RoAd)          b + Σ w (effective bias − b)
    a LoRA on the input embedding               E + w s (B A)ᵀ, a block of rows at a time
    a copy of the module (``modules_to_save``)  the copy
    the embedding or head itself, as PEFT       that
    saves it beside a resized vocabulary

W [d_out, d_in] also where Transposed is stored (GPT-2's ``Conv1D``); several adapters with
weights w add up as in :func:`lorasmith.use`. Computed in float64 where what is read or written
is float32, in float32 otherwise, and rounded once.

**Tied embeddings.** If the head is the embedding once more, and the adapter changes one of the
two, or both differently, they are written apart and ``tie_word_embeddings`` becomes false: the
model grows by one matrix, and acts as it did with the adapter attached. Adapters trained with
PEFT's ``ensure_weight_tying`` are refused where that makes a difference. **Vocabulary.** If the
adapter's embedding has more (or fewer) rows than the checkpoint's, its head must have them as
well; ``vocab_size`` follows. The tokenizer is the adapter's where its directory holds one.

**Memory**: a few blocks of 2 MB, and for adapters without exact factors 8 × the largest adapted
matrix in 16 bit (4 × in 32 bit: it is float64 then); never a shard, and never the model. A
quantised checkpoint is refused, or with ``dequantize`` loaded whole. **Disk**: the directory is
written beside its final place and renamed, whole or not at all; room is checked first.

**Parity.** Prompts run through base + adapter and through the written files; see
``lorasmith.export.parity``. Both models are loaded for it, one after the other.

GGUF files are read by ``lorasmith.io.gguf`` and written as safetensors with the configuration and
tokenizer that Transformers makes of them; what is quantised in them becomes bfloat16 unless
``dtype`` says otherwise.

Limits: safetensors only; causal language models for the parity report; adapters on what a
checkpoint stores under another name or in one tensor with others (stacked experts) are refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from lorasmith import __version__
from lorasmith.core.layers import LayerInfo, describe
from lorasmith.core.variant import Variant
from lorasmith.errors import (
    AdapterFileError,
    ConfigError,
    FuseError,
    LorasmithError,
    ModelError,
)
from lorasmith.export.parity import Parity, Trial, measure, refuse_too_large
from lorasmith.export.shards import KINDS, Piece, parse_size, plan_shards, write_shards
from lorasmith.io import peft
from lorasmith.io.atomic import replace_files
from lorasmith.io.files import check_targets, layers_on, read_adapter
from lorasmith.io.gguf import GgufTensor
from lorasmith.io.models import (
    ResolvedModel,
    explained,
    quiet,
    remote_code,
    resolve_model,
    snapshot,
    transformers_module,
)
from lorasmith.io.sources import (
    CheckpointFile,
    CheckpointWeights,
    GgufWeights,
    Matrix,
    ModelWeights,
    WeightSource,
)
from lorasmith.io.strict import parse_object
from lorasmith.io.tensors import TensorSource
from lorasmith.io.weights import AdapterWeights, FileState, check_finite, reason_for

__all__ = ["DTYPES", "REPORT", "FusedModel", "FusedWeight", "fuse_checkpoint"]

#: The report beside the model; also the sign that a directory may be overwritten.
REPORT = "fuse_report.json"
#: What ``dtype`` may be, beside ``"auto"``.
DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: Numbers that are read and computed at a time.
_BLOCK = 2**19
#: Bytes that must be free beyond those of the model.
_SPARE = 2**24
#: Rounding's share of the change above which a warning says so.
_LOST = 0.5

_CONFIGS = ("generation_config.json",)
_TOKENIZER = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r".*\.model|.*\.tiktoken|chat_template\.(jinja|json)|(pre)?processor_config\.json"
)
#: Files that make a directory one with a tokenizer of its own.
_CORE = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_FETCH = ("*.txt", "*.model", "*.jinja", "*.tiktoken")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FusedWeight:
    """What fusing did to one matrix.

    Attributes:
        name: Name of its layer.
        delta_norm: ‖ΔW‖, Frobenius norm of the change.
        weight_norm: ‖W‖ before.
        rounding_error: ‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖ (0 where nothing changed).
        unmoved: Share of the entries with ΔW ≠ 0 that are, once rounded, what W rounds to:
            there the change is lost.
    """

    name: str
    delta_norm: float
    weight_norm: float
    rounding_error: float
    unmoved: float


@dataclass(frozen=True)
class FusedModel:
    """A checkpoint that was written, and what it is made of.

    Attributes:
        path: The directory.
        model: The base, as it was named.
        adapters: (path, weight) of each adapter.
        variants: Names of their variants.
        dtype: Of most of the numbers written.
        nbytes: Bytes of all tensors.
        parameters: Numbers in them.
        files: Names of all files, those of the tensors first.
        shards: How many hold tensors.
        layers: One record for each matrix that an adapter changes.
        replaced: Tensors that are the adapter's own, by name.
        untied: Whether head and embedding are apart that were one.
        vocabulary: (rows before, rows now) of the embedding, or ``None`` if they are the same.
        tokenizer: ``"base"``, ``"adapter"`` or ``"none"``.
        seconds: Wall time of reading and writing.
        parity: How near it is to base + adapter, or ``None`` if that was not measured.
    """

    path: Path
    model: str
    adapters: tuple[tuple[str, float], ...]
    variants: tuple[str, ...]
    dtype: str
    nbytes: int
    parameters: int
    files: tuple[str, ...]
    shards: int
    layers: tuple[FusedWeight, ...]
    replaced: tuple[str, ...]
    untied: bool
    vocabulary: tuple[int, int] | None
    tokenizer: str
    seconds: float
    parity: Parity | None = None

    @property
    def rounding_error(self) -> float:
        """Rounding's share of the change over all layers, √(Σ error² / Σ ‖ΔW‖²)."""
        total = math.fsum(layer.delta_norm**2 for layer in self.layers)
        lost = math.fsum((layer.rounding_error * layer.delta_norm) ** 2 for layer in self.layers)
        return math.sqrt(lost / total) if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return {
            "version": __version__,
            "model": self.model,
            "adapters": [{"path": path, "weight": weight} for path, weight in self.adapters],
            "variants": list(self.variants),
            "path": os.fspath(self.path),
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "parameters": self.parameters,
            "shards": self.shards,
            "files": list(self.files),
            "replaced": list(self.replaced),
            "untied": self.untied,
            "vocabulary": None if self.vocabulary is None else list(self.vocabulary),
            "tokenizer": self.tokenizer,
            "seconds": self.seconds,
            "rounding_error": self.rounding_error,
            "parity": None if self.parity is None else self.parity.to_dict(),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        return (
            f"fused {len(self.layers)} layers into {os.fspath(self.path)} ({self.dtype}, "
            f"{self.nbytes / 1e9:.3g} GB): rounding error {self.rounding_error:.2e} of the change"
            + (f"; {self.parity}" if self.parity is not None else "")
        )


@torch.no_grad()
def fuse_checkpoint(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | AdapterWeights | Mapping[str, float],
    output: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    verify: bool = True,
    prompts: Sequence[str] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    revision: str | None = None,
    allow_base_mismatch: bool = False,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> FusedModel:
    """Writes a base model with an adapter fused into its weights as a checkpoint of its own.

    Args:
        model: Directory of safetensors, GGUF file, alias, or hub id.
        adapter: Directory, hub id, URL, what :func:`~lorasmith.read_adapter` gave, or a mapping
            of several to weights w: W + Σ w (W_i − W). A weight of 0 is as if it were not there.
        output: The new directory; its parents are made.
        dtype: ``"auto"`` (each tensor keeps its own), ``"float32"``, ``"bfloat16"`` or
            ``"float16"``.
        max_shard_size: Of one file of tensors: ``"5GB"``, ``"500MiB"``, or bytes.
        verify: Whether to load base + adapter and what was written, and to measure how far
            apart their logits are. Needs the memory of one of them in float32.
        prompts: What to measure on; a few built-in sentences by default.
        device: Where to run them.
        overwrite: Whether to replace what an earlier call wrote there.
        revision: Branch, tag or commit of ``model`` on the hub.
        allow_base_mismatch: Whether the adapter may have been made for other weights.
        dequantize: Whether to unpack a quantised checkpoint (loaded whole, in memory).
        progress: Called with (what is done, bytes done, bytes in all).

    Returns:
        What was done; also in ``fuse_report.json`` beside the model.

    Raises:
        FuseError: The adapter depends on its input, or the result could not be a model of this
            class; or it is too large for the disk.
        ModelError: There is no such model, or it cannot be read.
        AdapterFileError: The adapter cannot be read, or does not fit.
        BaseMismatchError: It was made for another base.
        ConfigError: An argument makes no sense.

    On any error there is nothing at ``output`` that was not there before.
    """
    start = time.perf_counter()
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(
            "That dtype is not written.",
            expected=", ".join(("auto", *DTYPES)),
            got=repr(dtype),
            key="dtype",
        )
    limit = parse_size(max_shard_size)
    target = Path(output).expanduser()
    parts = _open_adapters(adapter)
    base = _open_base(model, revision, dequantize)
    _check_target(target, overwrite, base, parts)
    for part in parts:
        base.source.check_adapter(part.weights, allow_base_mismatch)
    if verify and base.skeleton is None:
        raise ConfigError(
            "Without the model's class there is nothing to run, so that parity is not measured.",
            fix="verify=False (--no-verify)",
            key="verify",
        )
    wanted = None if dtype == "auto" else DTYPES[dtype]
    plan = _Plan(base, parts, wanted)
    shards = plan_shards(plan.pieces, limit)
    nbytes = sum(piece.nbytes for piece in plan.pieces)
    copies, origin = _copies(base, parts)
    _check_tokenizer(plan, origin, copies)
    extra = sum(path.stat().st_size for path in copies.values())
    if verify:
        refuse_too_large(sum(_count(p.shape) for p in plan.pieces), device)
    _check_space(target, nbytes + extra + _SPARE)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("writing", done, nbytes)

    result: list[FusedModel] = []

    def write(stage: Path) -> None:
        # Once more under the lock: another process may have written there meanwhile.
        _check_target(target, overwrite, base, parts)
        write_shards(stage, shards, advance)
        for name, path in copies.items():
            shutil.copyfile(path, stage / name)
        saved = base.save_rest(stage)
        text = json.dumps(plan.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (stage / "config.json").write_text(text, encoding="utf-8")
        names = sorted(e.name for e in stage.iterdir())
        made = FusedModel(
            path=target,
            model=base.source.label,
            adapters=tuple((part.label, part.weight) for part in parts),
            variants=tuple(part.weights.variant.name for part in parts),
            dtype=plan.main_dtype,
            nbytes=nbytes,
            parameters=sum(_count(p.shape) for p in plan.pieces),
            files=(*names, REPORT),
            shards=len(shards),
            layers=tuple(m.record() for m in plan.measured.values()),
            replaced=tuple(plan.replaced),
            untied=plan.untied,
            vocabulary=plan.vocabulary,
            tokenizer=saved or origin,
            seconds=time.perf_counter() - start,
        )
        if verify and base.skeleton is not None:
            trial = Trial(
                base.resolved,
                type(base.skeleton),
                [(p.weights, p.core, p.weight) for p in parts if p.weight],
                plan.untied,
                plan.vocabulary,
                plan.written_directly(),
                plan.embedded,
                base.quantised,
            )
            found = measure(
                trial, stage, made.dtype, prompts=prompts, device=device, progress=progress
            )
            made = replace(made, parity=found)
        report = json.dumps(made.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        (stage / REPORT).write_text(report + "\n", encoding="utf-8")
        result.append(made)

    owned = {name for name, _ in shards} | set(copies) | set(base.rest_names)
    owned |= {"config.json", "model.safetensors.index.json", REPORT, *_written_before(target)}
    try:
        replace_files(target, owned, write)
    except OSError as error:
        raise FuseError(
            f"The model could not be written: {error}.",
            file=target,
            fix="check free space and permissions of the directory above",
        ) from error
    (made,) = result
    _warn(made)
    return made


# Arguments --------------------------------------------------------------------------------------


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
class _Part:
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


def _open_adapters(
    given: str | os.PathLike[str] | AdapterWeights | Mapping[str, float],
) -> list[_Part]:
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
        if weights.unsupported is not None:
            raise AdapterFileError(
                weights.unsupported,
                file=weights.path and weights.path / peft.CONFIG,
                fix="merge it with PEFT: model.merge_and_unload().save_pretrained(…)",
            )
        if not weights.variant.fusable:
            raise FuseError(
                f"What {weights.variant.name} does depends on the input: there is no weight "
                "that acts like the adapted layer.",
                file=weights.path,
                fix="serve it as an adapter; or train a variant that fuses "
                "(lorasmith variants lists them)",
            )
        parts.append(_Part(weights, float(weight)))
    return parts


def _check_target(target: Path, overwrite: bool, base: _Base, parts: Sequence[_Part]) -> None:
    real = Path(os.path.realpath(target))
    taken = [base.folder, *(p.weights.path for p in parts)]
    if any(path is not None and Path(os.path.realpath(path)) == real for path in taken):
        raise ConfigError(
            "The model would take the place of what it is made from.",
            got=target,
            fix="choose another directory",
            key="output",
        )
    if real.is_file() or (target.is_symlink() and not target.exists()):
        raise ConfigError(
            "A model is a directory, and there is a file under that path.", got=target, key="output"
        )
    if not real.is_dir() or not any(real.iterdir()):
        return
    if not (real / REPORT).is_file():
        raise ConfigError(
            "The directory holds something that no earlier fusing wrote; it is not touched.",
            got=", ".join(sorted(e.name for e in real.iterdir())[:4]),
            fix="choose a new or empty directory",
            file=target,
            key="output",
        )
    if not overwrite:
        raise ConfigError(
            "There is a fused model in that directory.",
            fix="choose another one, or replace it with overwrite=True (--overwrite)",
            file=target,
            key="output",
        )


def _written_before(target: Path) -> list[str]:
    """The files of the earlier generation; plain names alone, whatever the report says."""
    file = target / REPORT
    try:
        names = parse_object(file.read_bytes(), file).get("files")
    except (OSError, LorasmithError):
        return []
    found = names if isinstance(names, list) else []
    return [n for n in found if isinstance(n, str) and n and Path(n).name == n]


def _check_space(target: Path, wanted: int) -> None:
    above = Path(os.path.realpath(target)).parent
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    if free < wanted:
        raise FuseError(
            "There is not enough room on the disk for the model.",
            expected=f"{wanted / 1e9:.3g} GB free",
            got=f"{free / 1e9:.3g} GB",
            fix="free some, choose another disk, or a smaller dtype",
            file=above,
        )


# The base ---------------------------------------------------------------------------------------


class _Stored(ABC):
    """One tensor of the base, in the layout in which it will be written.

    Attributes:
        shape: Its shape.
        dtype: Of what is read, or ``None`` where PyTorch has no dtype for it.
        kind: The format's name of the dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes as it is stored."""
        assert self.dtype is not None
        return _count(self.shape) * self.dtype.itemsize

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """Consecutive blocks of its rows; each good until the next."""

    @property
    def rows(self) -> int:
        """Rows a block."""
        return max(1, _BLOCK // max(1, _count(self.shape[1:])))


class _FromFile(_Stored):
    """Of a safetensors file."""

    def __init__(self, file: CheckpointFile, key: str) -> None:
        self._file, self._key = file, key
        self._first, self._last, self.kind = file.place(key)
        self.shape = file.tensors.shape(key)
        try:
            self.dtype = file.tensors.dtype(key)
        except AdapterFileError:
            self.dtype = None

    @property
    def nbytes(self) -> int:
        return self._last - self._first

    def blocks(self) -> Iterator[Tensor]:
        if self.dtype is None:
            yield from self._bytes()
            return
        count = self.shape[0] if self.shape else 1
        buffer = torch.empty((min(self.rows, count), *self.shape[1:]), dtype=self.dtype)
        for first in range(0, count, self.rows):
            block = buffer[: min(self.rows, count - first)]
            self._file.read(self._key, first, block)
            yield block

    def _bytes(self) -> Iterator[Tensor]:
        with self._file.path.open("rb") as stream:
            stream.seek(self._first)
            left = self.nbytes
            while left:
                data = stream.read(min(left, 4 * _BLOCK))
                if not data:
                    raise ModelError("The file ends too early.", file=self._file.path)
                left -= len(data)
                yield torch.frombuffer(bytearray(data), dtype=torch.uint8)


class _FromMatrix(_Stored):
    """Of anything that gives W [d_out, d_in]: a matrix of a GGUF file, a quantised layer."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self.shape = matrix.stored_shape
        self.dtype = matrix.dtype
        self.kind = KINDS[self.dtype]

    def blocks(self) -> Iterator[Tensor]:
        yield from self._matrix.blocks(self.rows)


class _FromGguf(_Stored):
    """A matrix of a GGUF file that is no layer's, as it is there: an embedding."""

    def __init__(self, tensor: GgufTensor) -> None:
        self._tensor = tensor
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.kind = KINDS[self.dtype]

    def blocks(self) -> Iterator[Tensor]:
        buffer = torch.empty((min(self.rows, self.shape[0]), self.shape[1]), dtype=self.dtype)
        for first in range(0, self.shape[0], self.rows):
            block = buffer[: min(self.rows, self.shape[0] - first)]
            self._tensor.read(first, block)
            yield block


class _FromCall(_Stored):
    """Made when it is asked for: an adapter's tensor, a vector."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, get: Callable[[], Tensor]
    ) -> None:
        self.shape, self.dtype, self.kind = tuple(shape), dtype, KINDS[dtype]
        self._get = get

    def blocks(self) -> Iterator[Tensor]:
        value = self._get().contiguous()
        if value.dim() == 0:
            yield value.view(1)
        else:
            yield from torch.split(value, self.rows)


@dataclass
class _Base:
    """What is fused into.

    Attributes:
        resolved: Where it is.
        source: Its layers.
        stored: Name in the files → tensor, in their order.
        skeleton: Its class without values (with values where it was quantised), or ``None``.
        config: ``config.json``.
        folder: Its directory, where the rest is copied from; ``None`` for GGUF files.
        dtype: In which tensors are written that say nothing themselves.
        quantised: Whether it was unpacked.
    """

    resolved: ResolvedModel
    source: WeightSource
    stored: dict[str, _Stored]
    skeleton: nn.Module | None
    config: dict[str, Any]
    folder: Path | None
    dtype: torch.dtype | None = None
    quantised: bool = False
    rest_names: tuple[str, ...] = ()

    def key_of(self, parameter: str) -> str | None:
        """The name in the files of a parameter of the class."""
        if isinstance(self.source, CheckpointWeights):
            return self.source.key_of(parameter)
        return parameter if parameter in self.stored else None

    def save_rest(self, stage: Path) -> str | None:
        """Writes what is not copied (GGUF); gives where the tokenizer is from, if there is one."""
        if self.folder is not None or self.resolved.gguf_file is None:
            return None
        transformers = transformers_module()
        try:
            with quiet():
                tokenizer = explained(
                    lambda: transformers.AutoTokenizer.from_pretrained(
                        self.resolved.path,
                        gguf_file=self.resolved.gguf_file,
                        **remote_code(False),
                    ),
                    self.resolved.name,
                )
        except LorasmithError as error:
            warnings.warn(
                f"The GGUF file gives no tokenizer that Transformers reads ({error.got}): the "
                "model is written without one.",
                UserWarning,
                stacklevel=2,
            )
            return None
        tokenizer.save_pretrained(stage)
        return "base"


def _open_base(given: str | os.PathLike[str], revision: str | None, dequantize: bool) -> _Base:
    if not isinstance(given, str | os.PathLike):
        raise ConfigError(
            "Checkpoints on disk are fused here.",
            expected="a directory, a GGUF file, an alias or a hub id",
            got=type(given).__name__,
            fix="lorasmith.fuse(model) fuses into a model in memory",
            key="model",
        )
    label = os.fspath(given)
    resolved = resolve_model(label, revision=revision)
    if resolved.gguf_file is not None:
        return _open_gguf(resolved, label)
    folder = snapshot(resolved, also=_FETCH)
    config = parse_object((folder / "config.json").read_bytes(), folder / "config.json")
    stored_as = config.get("quantization_config")
    if stored_as and not dequantize:
        method = stored_as.get("quant_method") if isinstance(stored_as, dict) else stored_as
        raise ModelError(
            "The checkpoint is quantised: what an adapter adds would be rounded to its few steps.",
            expected="a checkpoint in floating-point numbers",
            got=str(method or "quantised"),
            fix="name the full-precision checkpoint that it was made from (an adapter trained on "
            "the quantised one works there); or unpack this one with dequantize=True "
            "(--dequantize)",
            file=folder,
        )
    if stored_as:
        return _open_quantised(resolved, folder, config)
    source = CheckpointWeights(folder, label, resolved.base_name)
    stored: dict[str, _Stored] = {}
    for file in dict.fromkeys(source.places.values()):
        for key in sorted(file.tensors, key=lambda k: file.place(k)[0]):
            stored[key] = _FromFile(file, key)
    return _Base(resolved, source, stored, source.skeleton, config, folder)


def _open_gguf(resolved: ResolvedModel, label: str) -> _Base:
    source = GgufWeights(resolved, label)
    model, skeleton = source.model, source.skeleton
    assert skeleton is not None
    stored: dict[str, _Stored] = {}
    seen: set[int] = set()
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        layer = name.removesuffix(".weight")
        if name in model.tensors and layer in source.layers:
            stored[name] = _FromMatrix(source.layers[layer])
        elif name in model.tensors:
            stored[name] = _FromGguf(model.tensors[name])
        elif name in model.vectors:
            shape = (model.vectors[name].shape[1],)
            stored[name] = _FromCall(shape, model.vectors[name].dtype, partial(model.vector, name))
        found = stored.get(name)
        if found is None or found.shape != tuple(parameter.shape):
            raise ModelError(
                "The GGUF file does not hold the whole model, as far as it is understood here.",
                expected=f"{name} {list(parameter.shape)}",
                got="nothing" if found is None else list(found.shape),
                fix="fuse into the checkpoint that it was converted from",
                file=model.path,
                key=name,
            )
    config = {**model.config.to_dict(), "architectures": [type(skeleton).__name__]}
    plain = json.loads(model.config.__class__(**config).to_json_string(use_diff=False))
    kinds = [t.dtype for t in model.tensors.values() if not t.quantised]
    dtype = torch.bfloat16 if source.quantised else (kinds[0] if kinds else torch.float32)
    plain["dtype"] = str(dtype).removeprefix("torch.")
    return _Base(resolved, source, stored, skeleton, plain, None, dtype)


def _open_quantised(resolved: ResolvedModel, folder: Path, config: dict[str, Any]) -> _Base:
    transformers = transformers_module()
    with quiet():
        model: nn.Module = explained(
            lambda: transformers.AutoModelForCausalLM.from_pretrained(
                os.fspath(folder), local_files_only=True, dtype="auto", **remote_code(False)
            ),
            resolved.name,
        )
    source = ModelWeights(model)
    source.label = resolved.name
    packed = {name for name, module in model.named_modules() if _is_packed(describe(module, name))}
    stored: dict[str, _Stored] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if name in packed:
            stored[f"{name}.weight"] = _FromMatrix(source.layers[name])
        elif any(name.startswith(f"{p}.") for p in packed):
            continue
        for leaf, value in module.named_parameters(recurse=False):
            if (leaf == "weight" and name in packed) or id(value) in seen:
                continue
            seen.add(id(value))
            stored[f"{name}.{leaf}"] = _FromCall(
                tuple(value.shape), value.dtype, value.detach().cpu
            )
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    return _Base(resolved, source, stored, model, plain, folder, quantised=True)


def _is_packed(info: LayerInfo | None) -> bool:
    return info is not None and info.kind == "opaque"


# The plan ---------------------------------------------------------------------------------------


class _Measured:
    """Sums over the blocks of one matrix."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.change = self.weight = self.lost = 0.0
        self.moved = self.stuck = 0

    def add(self, before: Tensor, wanted: Tensor, out: Tensor) -> None:
        """Counts a block: W and W + ΔW in the dtype of computing, and what is written."""
        delta = wanted - before
        moved = delta != 0
        self.change += _square(delta)
        self.weight += _square(before)
        self.stuck += int((moved & (out == before.to(out.dtype))).sum())
        self.moved += int(moved.sum())
        self.lost += _square(torch.sub(out.to(wanted.dtype), wanted, out=delta))

    def record(self) -> FusedWeight:
        """The figures."""
        change = math.sqrt(self.change)
        return FusedWeight(
            self.name,
            change,
            math.sqrt(self.weight),
            math.sqrt(self.lost) / change if change else 0.0,
            self.stuck / self.moved if self.moved else 0.0,
        )


def _square(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2


def _count(shape: Sequence[int]) -> int:
    return math.prod(shape)


#: (A [r, vocabulary], B [d, r], scaling) of a LoRA on an embedding.
_Embedding = tuple[Tensor, Tensor, float]


class _Plan:
    """What is to be written, tensor by tensor; nothing of the base's values is read yet.

    Attributes:
        pieces: The tensors.
        config: The new ``config.json``.
        measured: Layer → sums, filled while the pieces are written.
        replaced: Names of the tensors that are an adapter's own.
        replacements: The same → (adapter's tensors, name there).
        embedded: Embedding → LoRAs on it.
        untied: Whether head and embedding come apart.
        vocabulary: (rows before, rows now) if they differ.
        main_dtype: The dtype of most numbers.
    """

    def __init__(self, base: _Base, parts: Sequence[_Part], dtype: torch.dtype | None) -> None:
        self._base, self._dtype = base, dtype
        self._parts = [part for part in parts if part.weight]
        self.measured: dict[str, _Measured] = {}
        self.replacements: dict[str, tuple[TensorSource, str]] = {}
        self.embedded: dict[str, list[_Embedding]] = {}
        self._layers: dict[str, list[_Part]] = {}
        self._owners = _owners(base.skeleton)
        for part in parts:
            # Also those of weight 0: what does not fit is an error whatever its weight.
            self._collect(part)
        self.untied, self._names = self._ties()
        self.vocabulary = self._vocabulary()
        for part in parts:
            self._check_layers(part)
        self.replaced = list(self.replacements)
        self.pieces = self._pieces()
        totals: dict[str, int] = {}
        for piece in self.pieces:
            totals[piece.kind] = totals.get(piece.kind, 0) + piece.nbytes
        main = max(totals, key=lambda k: totals[k])
        known = {kind: d for d, kind in KINDS.items()}
        self.main_dtype = str(known.get(main, main)).removeprefix("torch.")
        self.config = self._new_config()

    # -- what the adapters change --------------------------------------------------------

    def _collect(self, part: _Part) -> None:
        base, weights, file = self._base, part.weights, part.file
        if base.skeleton is not None:
            part.infos = layers_on(base.skeleton, part.core, file or Path(peft.WEIGHTS))
            check_targets(base.skeleton, part.core, file or Path(peft.WEIGHTS))
        else:
            for module in part.core.modules:
                if module not in base.source.layers:
                    raise AdapterFileError(
                        "The adapter has tensors for a layer that the checkpoint does not have.",
                        file=file,
                        key=module,
                    )
            part.infos = {m: base.source.layers[m].info for m in part.core.modules}
        for module in part.infos:
            if part.weight:
                self._layers.setdefault(module, []).append(part)
            if module not in base.source.layers:
                problem = base.source.problems.get(module)
                raise ModelError(
                    "A layer of the adapter cannot be read from the checkpoint.",
                    got=problem.message if problem is not None else "it is not there",
                    file=base.folder,
                    key=module,
                )
        for module, leaves in weights.saved_modules.items():
            self._check_saved(part, module, leaves)
            for leaf in leaves:
                self._replace(part, f"{module}.{leaf}")
        self._take_others(part)

    def _check_saved(self, part: _Part, module: str, leaves: Sequence[str]) -> None:
        skeleton = self._base.skeleton
        if skeleton is None:
            return
        try:
            wanted = set(skeleton.get_submodule(module).state_dict())
        except AttributeError as error:
            raise AdapterFileError(
                "The adapter has a copy of a module that the model does not have.",
                file=part.file,
                key=module,
                got=type(skeleton).__name__,
                fix="name a base of the class that it was trained on",
            ) from error
        for leaf in sorted(wanted ^ set(leaves)):
            raise AdapterFileError(
                "A tensor is missing." if leaf in wanted else "A tensor is not the module's.",
                file=part.file,
                key=f"{peft.PREFIX}{module}.{leaf}",
            )

    def _take_others(self, part: _Part) -> None:
        """LoRAs on embeddings; embeddings and head that PEFT saves beside adapters."""
        halves: dict[str, dict[str, str]] = {}
        for name in part.others:
            module, _, leaf = name.rpartition(".")
            if leaf in ("lora_embedding_A", "lora_embedding_B") and module in self._embeddings():
                halves.setdefault(module, {})[leaf[-1]] = name
                continue
            plain = name.replace(".base_layer.", ".")
            ends = {f"{m}.weight" for m in self._embeddings()} | {
                f"{h}.{t}" for h in self._base.source.heads for t in ("weight", "bias")
            }
            if plain in ends:
                self._replace(part, plain, name)
                continue
            raise AdapterFileError(
                f"The file holds a tensor that cannot be fused: {reason_for(name)}.",
                file=part.file,
                key=name,
                got=f"{len(part.others)} tensors beside the adapter's own",
                fix="merge it with PEFT: model.merge_and_unload().save_pretrained(…)",
            )
        for module, found in halves.items():
            self._embed(part, module, found)

    def _embed(self, part: _Part, module: str, found: Mapping[str, str]) -> None:
        weights = part.weights
        if set(found) != {"A", "B"}:
            missing = f"{module}.lora_embedding_{'B' if 'A' in found else 'A'}"
            raise AdapterFileError("A tensor is missing.", file=part.file, key=missing)
        if weights.variant.name != "lora":
            raise AdapterFileError(
                f"What {weights.variant.name} does to an embedding is not fused.",
                file=part.file,
                key=module,
                fix="merge it with PEFT: model.merge_and_unload().save_pretrained(…)",
            )
        config: Any = weights.config
        A, B = (weights.tensors[f"{peft.PREFIX}{found[h]}"].to(torch.float32) for h in "AB")
        for half, value in (("A", A), ("B", B)):
            check_finite(value, found[half], part.file)
        rows, columns = self._shape(f"{module}.weight")
        rank = config.rank_of(module)
        if A.shape != (rank, rows) or B.shape != (columns, rank):
            raise AdapterFileError(
                "A LoRA on an embedding has other shapes than it and the configuration ask for.",
                file=part.file,
                key=module,
                expected=f"A [{rank}, {rows}], B [{columns}, {rank}]",
                got=f"A {list(A.shape)}, B {list(B.shape)}",
            )
        if part.weight:
            scaling = config.scaling_of(module) * part.weight
            self.embedded.setdefault(module, []).append((A, B, scaling))

    def _replace(self, part: _Part, name: str, key: str | None = None) -> None:
        """Takes a whole tensor from an adapter, unless it is the base's own."""
        source, key = part.weights.tensors, f"{peft.PREFIX}{key or name}"
        check_finite(value := source[key], key, part.file)
        shape, mine = tuple(value.shape), self._start(name)
        if mine is not None and mine.shape == shape and _equal(mine, value):
            return
        old = self._shape(name)
        ends = {f"{m}.weight" for m in self._embeddings()}
        ends |= {f"{h}.{leaf}" for h in self._base.source.heads for leaf in ("weight", "bias")}
        resized = name in ends and len(shape) == len(old) and shape[1:] == old[1:]
        if shape != old and not resized:
            raise AdapterFileError(
                "A tensor does not fit the module that it is a copy of.",
                file=part.file,
                key=key,
                expected=list(old),
                got=list(shape),
                fix="is it the right base model?",
            )
        if not part.weight:
            return
        if part.weight != 1.0 or len(self._parts) > 1:
            raise FuseError(
                "An adapter with modules_to_save, or with an embedding of its own, has whole "
                "tensors, which are not mixed.",
                file=part.file,
                key=name,
                expected="that adapter alone, with weight 1",
                fix="lorasmith merge makes one adapter of several",
            )
        self.replacements[name] = (source, key)

    # -- ends of the model ---------------------------------------------------------------

    def _embeddings(self) -> list[str]:
        """The module that is the input embedding, if the class says so."""
        skeleton = self._base.skeleton
        get = getattr(skeleton, "get_input_embeddings", None)
        try:
            found = get() if callable(get) else None
        except (AttributeError, NotImplementedError):
            found = None
        if skeleton is None or found is None:
            return []
        return [n for n, m in skeleton.named_modules() if m is found]

    def written_directly(self) -> dict[str, tuple[TensorSource, str]]:
        """Those of ``replacements`` that are no adapter's ``modules_to_save``."""
        saved = {
            f"{module}.{leaf}"
            for part in self._parts
            for module, leaves in part.weights.saved_modules.items()
            for leaf in leaves
        }
        return {n: found for n, found in self.replacements.items() if n not in saved}

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the checkpoint's embedding, where it is known."""
        return next((self._shape(f"{m}.weight")[0] for m in self._embeddings()), None)

    def _start(self, name: str) -> _Stored | None:
        """What the base has for a parameter, be it under the name of one tied to it."""
        for each in (name, *self._owners.get(name, ())):
            key = self._base.key_of(each)
            if key is not None:
                return self._base.stored[key]
        return None

    def _shape(self, name: str) -> tuple[int, ...]:
        found = self._start(name)
        if found is None:
            raise ModelError("The checkpoint has no such tensor.", file=self._base.folder, key=name)
        return found.shape

    def _changes(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        if name in self.replacements:
            return True
        return leaf == "weight" and (module in self.embedded or module in self._layers)

    def _ties(self) -> tuple[bool, dict[str, str]]:
        """Whether tied weights come apart; new name in the files → parameter, of new tensors."""
        added: dict[str, str] = {}
        untied = False
        heads = self._base.source.heads
        for group in {tuple(g) for g in self._owners.values()}:
            if not any(self._changes(n) for n in group):
                continue
            self._refuse_tying(group)
            whole = [self.replacements.get(n) for n in group]
            acted = any(
                (m := n.rpartition(".")[0]) in self.embedded or m in self._layers for n in group
            )
            if not acted and all(whole) and _all_equal([s[k] for s, k in whole if s]):  # type: ignore[misc]
                for name in group[1:]:
                    del self.replacements[name]
                first = next(n for n in group if self._base.key_of(n) is not None)
                self.replacements[first] = self.replacements.pop(group[0])
                continue
            ends = {f"{m}.weight" for m in (*self._embeddings(), *heads)}
            if set(group) - ends:
                raise FuseError(
                    "The adapter changes a weight that several modules share, and the model's "
                    "class has no way to keep them apart.",
                    got=" and ".join(group),
                    fix="keep the adapter attached",
                    key=group[0],
                )
            untied = True
            added |= {name: name for name in group if self._base.key_of(name) is None}
        return untied, added

    def _refuse_tying(self, group: Sequence[str]) -> None:
        for part in self._parts:
            if part.weights.peft.get("ensure_weight_tying"):
                raise FuseError(
                    "The adapter was trained with ensure_weight_tying: its change is meant for "
                    "the embedding and the head at once, and its files do not say how.",
                    got=" and ".join(group),
                    file=part.file,
                    fix="merge it with PEFT: model.merge_and_unload().save_pretrained(…)",
                )

    def _vocabulary(self) -> tuple[int, int] | None:
        rows = {}
        for module in self._embeddings():
            name = f"{module}.weight"
            before = self._shape(name)[0]
            new = self.replacements.get(name)
            now = before if new is None else new[0].shape(new[1])[0]
            rows[module] = now
            for head in self._base.source.heads:
                end = f"{head}.weight"
                if self._start(end) is None:
                    continue
                other = self.replacements.get(end)
                tied = name in self._owners.get(end, ()) and not self.untied
                size = now if tied else self._shape(end)[0]
                size = size if other is None else other[0].shape(other[1])[0]
                bias = self._start(f"{head}.bias")
                changed = self.replacements.get(f"{head}.bias")
                if size == now and bias is not None and changed is None and bias.shape[0] != now:
                    size = bias.shape[0]
                if size != now:
                    raise FuseError(
                        "The vocabulary is resized in one end of the model and not in the other: "
                        "the rows that the other would need are in none of the files.",
                        expected=f"{now:,} rows in {head}, as in {module}",
                        got=f"{size:,}",
                        fix="save the adapter again with both (PEFT: "
                        "save_embedding_layers=True, or both in modules_to_save)",
                        key=head,
                    )
            if now != before:
                return before, now
        return None

    def _check_layers(self, part: _Part) -> None:
        """Shapes of the adapter's tensors against the layers, resized ones included."""
        for module, info in part.infos.items():
            new = self.replacements.get(f"{module}.weight")
            if new is not None:
                d_out = new[0].shape(new[1])[0]
                part.infos[module] = info = replace(info, d_out=d_out)
            part.core.check_shapes(info)
        infos = list(part.infos.values())
        part.core.check_shared(infos)
        part.shared = part.core.shared_tensors(infos)

    # -- pieces --------------------------------------------------------------------------

    def _pieces(self) -> list[Piece]:
        base = self._base
        parameters: dict[str, str] = {}
        touched = set(self.replacements)
        touched |= {f"{m}.weight" for m in (*self._layers, *self.embedded)}
        touched |= {f"{m}.bias" for m in self._layers}
        for name in touched:
            key = base.key_of(name)
            if key is not None:
                parameters[key] = name
            elif not name.endswith(".bias") and name not in self._names:
                raise ModelError("The checkpoint has no such tensor.", file=base.folder, key=name)
        renamed = self._renamed() if self._names else {}
        pieces = []
        for key, stored in base.stored.items():
            changed = parameters.get(key)
            made = stored if changed is None else self._made(changed, stored)
            pieces.append(self._piece(renamed.get(key, key), stored, made))
        for name in self._names:
            start = self._start(name)
            assert start is not None
            pieces.append(self._piece(name, start, self._made(name, start)))
        return pieces

    def _renamed(self) -> dict[str, str]:
        """Name in the files → name in the class, if they differ by a prefix.

        A checkpoint of the model without its head must not get a head beside such names.
        """
        skeleton = self._base.skeleton
        if skeleton is None:
            return {}
        found = {}
        for name in skeleton.state_dict():
            key = self._base.key_of(name)
            if key is not None and key != name and key not in found:
                found[key] = name
        return found

    def _piece(self, key: str, stored: _Stored, made: _Stored) -> Piece:
        floating = made.dtype is not None and made.dtype.is_floating_point
        if not floating:
            return Piece(key, made.kind, made.shape, made.nbytes, made.blocks)
        dtype = self._out(stored)
        nbytes = _count(made.shape) * dtype.itemsize

        def blocks() -> Iterator[Tensor]:
            for block in made.blocks():
                yield _narrowed(block, dtype, key)

        return Piece(key, KINDS[dtype], made.shape, nbytes, blocks)

    def _out(self, stored: _Stored) -> torch.dtype:
        """The dtype in which a tensor of the base is written."""
        assert stored.dtype is not None
        return self._dtype or self._base.dtype or stored.dtype

    def _made(self, name: str, stored: _Stored) -> _Stored:
        """A tensor with everything done to it; in its final dtype where an adapter acts."""
        module, _, leaf = name.rpartition(".")
        out = self._out(stored)
        new = self.replacements.get(name)
        start: _Stored = stored
        if new is not None:
            source, key = new
            start = _FromCall(source.shape(key), source.dtype(key), lambda: source[key])
        acting = self._layers.get(module, [])
        wide = torch.float64 if _is_wide(start.dtype) or _is_wide(out) else torch.float32
        if leaf == "weight" and (acting or module in self.embedded):
            sums = self.measured.setdefault(module, _Measured(module))
            return _Fused(self, module, start, acting, out, wide, sums)
        if leaf == "bias" and acting:
            own = [p for p in acting if _moves_bias(p.weights.variant)]
            if own:
                return _FromCall(start.shape, out, lambda: self._bias(module, start, own, wide))
        return start

    def _bias(
        self, module: str, start: _Stored, acting: Sequence[_Part], wide: torch.dtype
    ) -> Tensor:
        bias = torch.cat([b.to(wide) for b in start.blocks()])
        total = bias.clone()
        for part in acting:
            state = part.state(module, wide)
            total += part.weight * (part.weights.variant.effective_bias(state, bias) - bias)
        return _finite(total, f"{module}.bias")

    # -- configuration -------------------------------------------------------------------

    def _new_config(self) -> dict[str, Any]:
        config = dict(self._base.config)
        inner = config.get("text_config")
        levels = [config]
        if isinstance(inner, dict):
            config["text_config"] = inner = dict(inner)
            levels.append(inner)
        if self._dtype is not None:
            name = str(self._dtype).removeprefix("torch.")
            for level in levels:
                for key in ("dtype", "torch_dtype"):
                    if key in level:
                        level[key] = name
            if not {"dtype", "torch_dtype"} & set(config):
                config["torch_dtype"] = name
        if self.untied:
            config["tie_word_embeddings"] = False
            if inner is not None and "tie_word_embeddings" in inner:
                inner["tie_word_embeddings"] = False
        if self.vocabulary is not None:
            for level in levels:
                if "vocab_size" in level:
                    level["vocab_size"] = self.vocabulary[1]
            if all("vocab_size" not in level for level in levels):
                config["vocab_size"] = self.vocabulary[1]
        return config


class _Fused(_Stored):
    """A matrix of the base with adapters in it, given in the dtype that is written."""

    def __init__(
        self,
        plan: _Plan,
        module: str,
        start: _Stored,
        acting: Sequence[_Part],
        out: torch.dtype,
        wide: torch.dtype,
        sums: _Measured,
    ) -> None:
        self.shape, self.dtype, self.kind = start.shape, out, KINDS[out]
        self._plan, self._module, self._start = plan, module, start
        self._acting, self._wide, self._sums = acting, wide, sums

    def blocks(self) -> Iterator[Tensor]:
        low = self._low_rank()
        if low is None:
            yield from self._whole()
            return
        left, right = low
        first = 0
        for block in self._start.blocks():
            before = block.to(self._wide)
            rows = left[first : first + block.shape[0]]
            wanted = torch.addmm(before, rows, right)
            yield self._written(before, wanted)
            first += block.shape[0]

    def _low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(L, R) with ΔW = L R in the layout that is stored; ``None`` if it is not all."""
        wide = self._wide
        lefts, rights = [], []
        for A, B, scaling in self._plan.embedded.get(self._module, ()):
            # E [vocabulary, d] is stored as a Conv1D's weight is.
            lefts.append(A.to(wide).T * scaling)
            rights.append(B.to(wide).T)
        for part in self._acting:
            state = part.state(self._module, wide)
            found = part.weights.variant.factors(state)
            if found is None or not found.exact:
                return None
            A, B = found.stacked()
            B = B * (found.scaling * part.weight)
            transposed = state.info.kind == "conv1d"
            lefts.append(A.T if transposed else B)
            rights.append(B.T if transposed else A)
        return torch.cat(lefts, dim=1).contiguous(), torch.cat(rights).contiguous()

    def _whole(self) -> Iterator[Tensor]:
        stored = torch.empty(self.shape, dtype=self._wide)
        first = 0
        for block in self._start.blocks():
            stored[first : first + block.shape[0]].copy_(block)
            first += block.shape[0]
        transposed = self._acting[0].infos[self._module].kind == "conv1d"
        weight = stored.T if transposed else stored
        wanted: Tensor | None = None
        for part in self._acting:
            state = part.state(self._module, self._wide)
            made = part.weights.variant.effective_weight(state, weight)
            if len(self._acting) == 1 and part.weight == 1.0:
                wanted = made
            else:
                change = made.sub(weight).mul_(part.weight)
                wanted = weight + change if wanted is None else wanted.add_(change)
        assert wanted is not None
        wanted = wanted.T if transposed else wanted
        for before, after in zip(
            torch.split(stored, self.rows), torch.split(wanted, self.rows), strict=True
        ):
            yield self._written(before, after)

    def _written(self, before: Tensor, wanted: Tensor) -> Tensor:
        _finite(wanted, self._module)
        assert self.dtype is not None
        out = _narrowed(wanted, self.dtype, self._module)
        self._sums.add(before, wanted, out)
        return out


def _is_wide(dtype: torch.dtype | None) -> bool:
    return dtype in (torch.float32, torch.float64)


def _moves_bias(variant: Variant) -> bool:
    return type(variant).effective_bias is not Variant.effective_bias


def _finite(value: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise FuseError(
            f"Fusing into {name} gives a weight that is not finite.",
            fix="check the adapter: lorasmith info PATH",
            key=name,
        )
    return value


def _narrowed(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A cast that makes no infinity of a number."""
    if value.dtype == dtype:
        return value.contiguous()
    out = value.to(dtype).contiguous()
    if dtype == torch.float16 and bool((torch.isinf(out) & torch.isfinite(value)).any()):
        raise FuseError(
            "A weight is too large for float16, which ends at 65504.",
            key=name,
            fix='dtype="bfloat16", or "auto"',
        )
    return out


def _equal(stored: _Stored, value: Tensor) -> bool:
    """Whether an adapter's copy of a tensor is the base's own, as far as its dtype tells."""
    if stored.dtype is None:
        return False
    first = 0
    for block in stored.blocks():
        mine = value.reshape(stored.shape or (1,))[first : first + block.shape[0]]
        if not torch.equal(block.to(value.dtype), mine):
            return False
        first += block.shape[0]
    return True


def _all_equal(values: Sequence[Tensor]) -> bool:
    return all(v.shape == values[0].shape and torch.equal(v, values[0]) for v in values[1:])


def _owners(skeleton: nn.Module | None) -> dict[str, list[str]]:
    """Parameter → all names of what it is one with, of those that have several."""
    found: dict[int, list[str]] = {}
    if skeleton is not None:
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            found.setdefault(id(parameter), []).append(name)
    return {n: names for names in found.values() if len(names) > 1 for n in names}


# What is copied ---------------------------------------------------------------------------------


def _copies(base: _Base, parts: Sequence[_Part]) -> tuple[dict[str, Path], str]:
    """Name → file of what stands beside the weights, and whose tokenizer it is."""
    found: dict[str, Path] = {}
    origin = "none"
    if base.folder is not None:
        found = {n: base.folder / n for n in _CONFIGS if (base.folder / n).is_file()}
        tokenizer = _tokenizer_files(base.folder)
        found |= tokenizer
        origin = "base" if set(tokenizer) & set(_CORE) else "none"
        if base.config.get("auto_map"):
            # Copied, and not run.
            found |= {p.name: p for p in base.folder.glob("*.py") if p.is_file()}
    (part, *more) = parts
    folder = part.weights.path
    if folder is not None and not more:
        own = _tokenizer_files(folder)
        if set(own) & set(_CORE):
            found = {n: p for n, p in found.items() if _TOKENIZER.fullmatch(n) is None} | own
            origin = "adapter"
    return found, origin


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    return {
        entry.name: entry
        for entry in sorted(folder.iterdir())
        if _TOKENIZER.fullmatch(entry.name) is not None and entry.is_file()
    }


def _check_tokenizer(plan: _Plan, origin: str, copies: Mapping[str, Path]) -> None:
    """The adapter's tokenizer must not know more tokens than there are rows."""
    file = copies.get("tokenizer.json")
    if origin != "adapter" or file is None or plan.vocabulary is not None:
        return
    fields = parse_object(file.read_bytes(), file)
    added = fields.get("added_tokens")
    ids = [t.get("id") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    most = max((i for i in ids if type(i) is int), default=-1)
    rows = plan.embedding_rows
    if rows is not None and most >= rows:
        raise FuseError(
            "The adapter's tokenizer has tokens that the model has no embedding for.",
            expected=f"ids below {rows:,}",
            got=f"{most:,}",
            fix="save the adapter again with its embedding and head (PEFT: "
            "save_embedding_layers=True)",
            file=file,
        )


def _warn(made: FusedModel) -> None:
    """Says what rounding and the dtype have left of the change."""
    if made.rounding_error > _LOST:
        warnings.warn(
            f"Rounding to {made.dtype} has moved the weights by {made.rounding_error:.0%} of what "
            'the adapter moves them; dtype="float32" keeps all of it.',
            UserWarning,
            stacklevel=3,
        )
    parity = made.parity
    if parity is not None and not parity.within:
        warnings.warn(
            f"The fused model is further from base + adapter than {made.dtype} explains: KL "
            f"{parity.drift.kl:.2e} nats a token, where {parity.bound:.0e} is the bound. "
            "Look at parity in the report.",
            UserWarning,
            stacklevel=3,
        )
