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

The parts, in ``lorasmith.export``:

    fuse_adapters, fuse_base     what is fused, and into what
    fuse_changes, fuse_plan      what is to be written, decided before a byte is
    fuse_tensors, fuse_matrix    the numbers, a block at a time, and what rounding costs
    fuse_output                  where they may go, and what stands beside them
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from lorasmith import __version__
from lorasmith.errors import ConfigError, FuseError, in_file
from lorasmith.export.fuse_adapters import open_adapters
from lorasmith.export.fuse_base import open_base
from lorasmith.export.fuse_matrix import FusedWeight
from lorasmith.export.fuse_output import (
    REPORT,
    check_space,
    check_target,
    check_tokenizer,
    copies_beside,
    written_before,
)
from lorasmith.export.fuse_plan import Plan
from lorasmith.export.parity import Parity, Trial, measure, refuse_too_large
from lorasmith.export.shards import parse_size, plan_shards, write_shards
from lorasmith.io.atomic import explained_failure, replace_files
from lorasmith.io.weights import AdapterWeights

__all__ = ["DTYPES", "REPORT", "FusedModel", "FusedWeight", "fuse_checkpoint"]

#: What ``dtype`` may be, beside ``"auto"``.
DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: Bytes that must be free beyond those of the model.
_SPARE = 2**24
#: Rounding's share of the change above which a warning says so.
_LOST = 0.5

Progress = Callable[[str, int, int], None]


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
    parts = open_adapters(adapter)
    base = open_base(model, revision, dequantize)
    check_target(target, overwrite, base, parts)
    for part in parts:
        base.source.check_adapter(part.weights, allow_base_mismatch)
    if verify and base.skeleton is None:
        raise ConfigError(
            "Without the model's class there is nothing to run, so that parity is not measured.",
            fix="verify=False (--no-verify)",
            key="verify",
        )
    wanted = None if dtype == "auto" else DTYPES[dtype]
    plan = Plan(base, parts, wanted)
    shards = plan_shards(plan.pieces, limit)
    nbytes = sum(piece.nbytes for piece in plan.pieces)
    copies, origin = copies_beside(base, parts)
    check_tokenizer(plan, origin, copies)
    extra = sum(path.stat().st_size for path in copies.values())
    if verify:
        refuse_too_large(sum(math.prod(p.shape) for p in plan.pieces), device)
    check_space(target, nbytes + extra + _SPARE)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("writing", done, nbytes)

    result: list[FusedModel] = []

    def write(stage: Path) -> None:
        # Once more under the lock: another process may have written there meanwhile.
        check_target(target, overwrite, base, parts)
        try:
            write_shards(stage, shards, advance)
        except FuseError as error:
            if error.file is not None:
                raise
            raise in_file(error, base.resolved.path, FuseError) from error
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
            parameters=sum(math.prod(p.shape) for p in plan.pieces),
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
                plan.changes.written_directly(),
                plan.changes.embedded,
                base.quantised,
            )
            found = measure(
                trial, stage, made.dtype, prompts=prompts, device=device, progress=progress
            )
            made = replace(made, parity=found)
        report = json.dumps(made.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        (stage / REPORT).write_text(report + "\n", encoding="utf-8")
        result.append(made)

    owned = {name for name, _ in shards} | set(copies)
    owned |= {"config.json", "model.safetensors.index.json", REPORT, *written_before(target)}
    with explained_failure("The model", target, FuseError):
        replace_files(target, owned, write)
    (made,) = result
    _warn(made)
    return made


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
