"""LoRA adapters as GGUF files, which llama.cpp and Ollama load beside a base model's.

Source: llama.cpp, ``convert_lora_to_gguf.py`` for what is written and ``src/llama-adapter.cpp`` for
what is read (both MIT; as of 2026). A file holds

    general.type = "adapter"     adapter.type = "lora"     general.architecture = the base's
    adapter.lora.alpha = α, one for the file, float32
    <name>.lora_a [r, d_in] and <name>.lora_b [d_out, r] for each adapted matrix

and what acts is

    y += (α / r) B A x        r = the columns of that matrix's own B.

So ranks may differ from layer to layer as they are; where s_m r_m is not the α of the file (other
alphas, rank-stabilised scaling), B is multiplied by s_m r_m / α. α is what most layers have.

* **Rows of q and k in Llama files** are in another order (``lorasmith.export.layout``): the rows
  of their B are reordered likewise; A meets the input, which is the same. llama.cpp's converter
  does this, too.
* **GPT-2**: a GGUF file holds W [d_out, d_in], and PEFT's factors are those of that matrix, so that
  they are written as they are. (llama.cpp's converter transposes them with W, which fails.)
* **Names and shapes are checked before anything is written**: against the base's GGUF file if it
  is given, else against its class. llama.cpp checks fewer of them, and refuses at load time only.

Numbers: float32, float16, bfloat16, or blocks of 8 bits (Q8_0, 32 numbers along a row). As in
llama.cpp's converter, matrices whose rows are no multiple of 32 (B, at usual ranks) are float16
then. The error ‖ΔW − ΔW'‖ / ‖ΔW‖ of what is stored is measured and reported.

Limits: the architectures of ``lorasmith.export.layout``; no experts in a stack; no embeddings. An
adapter on the output head is written only where the base has a head of its own: with tied
embeddings llama.cpp has no such matrix, and refuses the file.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorasmith.errors import AdapterFileError, BaseMismatchError, ConfigError
from lorasmith.export.layout import Layout, Place, reordered
from lorasmith.export.plain import Progress, commonest, fold, pair_rank, pairs
from lorasmith.io.weights import AdapterWeights

__all__ = ["FILE", "KINDS", "Plan", "Written", "plan_gguf", "write_gguf"]

#: Name of the file in the directory that is written.
FILE = "adapter.gguf"
#: What the user says → ggml's name of the numbers.
KINDS: Mapping[str, str] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "q8_0": "Q8_0",
    "f32": "F32",
    "f16": "F16",
    "bf16": "BF16",
}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


#: (module, name in the file, shape, ggml type)
_Entry = tuple[str, str, tuple[int, int], str]


@dataclass(frozen=True)
class Plan:
    """What is going to be written, before any of it is.

    Attributes:
        architecture: ``general.architecture``.
        kind: ggml's name of the numbers.
        alpha: ``adapter.lora.alpha``, representable in float32.
        places: Module → the base's matrix that it is.
        ranks: Module → rank of its pair.
    """

    architecture: str
    kind: str
    alpha: float
    places: Mapping[str, Place]
    ranks: Mapping[str, int]

    def tensors(self) -> list[_Entry]:
        """(module, name in the file, shape, ggml type), in the order of the file."""
        found = []
        for module, place in self.places.items():
            for letter, shape in (
                ("a", (self.ranks[module], place.columns)),
                ("b", (place.rows, self.ranks[module])),
            ):
                kind = self.kind
                if kind == "Q8_0" and shape[1] % 32:
                    kind = "F16"
                found.append((module, f"{place.name}.lora_{letter}", shape, kind))
        return found


@dataclass(frozen=True)
class Written:
    """What was lost by writing.

    Attributes:
        rounding: √(Σ ‖ΔW − ΔW'‖² / Σ ‖ΔW‖²) of the numbers in the file.
        size: Bytes of the file.
    """

    rounding: float
    size: int


def plan_gguf(weights: AdapterWeights, layout: Layout, dtype: str = "float32") -> Plan:
    """Checks a plain LoRA against a base model, and says what to write.

    Args:
        weights: The adapter, of the variant LoRA.
        layout: The base model.
        dtype: One of :data:`KINDS`, or ``"auto"`` for the numbers that the adapter has.

    Raises:
        ConfigError: There are no such numbers.
        AdapterFileError: The adapter has a layer that llama.cpp cannot adapt.
        BaseMismatchError: A layer of it does not fit the base model.
    """
    if dtype not in (*KINDS, "auto"):
        raise ConfigError(
            "A GGUF file has no such numbers.",
            expected="auto, float32, float16, bfloat16, q8_0",
            got=dtype,
            key="dtype",
        )
    kind = KINDS[dtype] if dtype != "auto" else _STORED.get(weights.dtype, "F32")
    places, ranks, alphas = {}, {}, {}
    for module in weights.modules:
        found = weights.factors[module]
        place = _place(module, layout, weights)
        rows, columns = found.B.shape[0], found.A.shape[1]
        if (rows, columns) != (place.rows, place.columns):
            raise BaseMismatchError(
                "A layer of the adapter does not fit the base model.",
                file=weights.path,
                key=module,
                expected=f"{place.columns} → {place.rows}, as {place.name} of "
                f"{layout.file or layout.base.name}",
                got=f"{columns} → {rows}",
                fix="give the base model that the adapter was made for",
            )
        if place.heads and rows % (2 * place.heads):
            raise BaseMismatchError(
                "The rows of a matrix do not divide into the base model's heads.",
                file=weights.path,
                key=module,
                expected=f"a multiple of {2 * place.heads}",
                got=rows,
            )
        places[module] = place
        ranks[module] = pair_rank(found)
        alphas[module] = found.scaling * ranks[module]
    alpha = float(np.float32(commonest(alphas)))
    if alpha == 0 or not math.isfinite(alpha):
        raise AdapterFileError(
            "The scaling of the adapter cannot be written.", file=weights.path, got=alpha
        )
    return Plan(layout.architecture, kind, alpha, places, ranks)


def _place(module: str, layout: Layout, weights: AdapterWeights) -> Place:
    place = layout.places.get(module)
    if place is None and module.rpartition(".")[2] in ("lm_head", "embed_out") and layout.tied:
        place = Place("output.weight", 0, 0)
    if place is not None and place.name == "output.weight" and layout.tied:
        raise AdapterFileError(
            "The adapter adapts the output head, which the base model has in common with its "
            "embedding: in a GGUF file there is no such matrix, and llama.cpp refuses the adapter.",
            file=weights.path,
            key=module,
            fix="train without the head, or fuse the adapter (lorasmith fuse) and convert the full "
            "model with llama.cpp",
        )
    if place is None:
        raise BaseMismatchError(
            "The adapter has a layer that the base model does not have under any name that "
            "llama.cpp knows.",
            file=weights.path,
            key=module,
            expected=", ".join(list(layout.places)[:4]) + ", …",
            got=f"{layout.architecture}: {layout.file or layout.base.name}",
            fix="give the base model that the adapter was made for",
        )
    return place


def write_gguf(
    weights: AdapterWeights,
    plan: Plan,
    path: Path,
    *,
    name: str,
    base: str | None = None,
    progress: Progress | None = None,
) -> Written:
    """Writes the file, one layer in memory at a time, and reads its table back.

    Args:
        weights: The adapter.
        plan: What :func:`plan_gguf` said.
        path: Of the file; it must not exist.
        name: ``general.name``.
        base: Hub id or name of the base model, for ``general.base_model``.
        progress: Called with (phase, done, total).

    Raises:
        AdapterFileError: A value is not finite, or too large for the numbers chosen.
    """
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    if base is not None:
        writer.add_base_model_count(1)
        organisation, _, title = base.rpartition("/")
        writer.add_base_model_name(0, title)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            writer.add_base_model_organization(0, organisation)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_file_type(_FILE_TYPES[plan.kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, plan.alpha)
    tensors = plan.tensors()
    for _, label, shape, kind in tensors:
        stored = gguf.GGMLQuantizationType[kind]
        size = math.prod(shape) * gguf.GGML_QUANT_SIZES[stored][1]
        size //= gguf.GGML_QUANT_SIZES[stored][0]
        writer.add_tensor_info(label, shape, np.dtype(np.float32), size, raw_dtype=stored)
    lost = change = 0.0
    # The package prints a line for each step.
    with contextlib.redirect_stdout(io.StringIO()):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    kinds = {label: kind for _, label, _, kind in tensors}
    try:
        for done, pair in enumerate(pairs(weights), 1):
            place = plan.places[pair.name]
            own = {letter: kinds[f"{place.name}.lora_{letter.lower()}"] for letter in "AB"}
            there = replace(pair, B=reordered(pair.B, place.heads))
            folded = fold(there, plan.alpha / pair.rank, pair.rank, _stored_as(own))
            change += folded.change**2
            lost += folded.lost**2
            writer.write_tensor_data(folded.A)
            writer.write_tensor_data(folded.B)
            if progress is not None:
                progress("writing", done, len(plan.places))
    finally:
        writer.close()
    _check(path, plan, tensors)
    rounding = math.sqrt(lost / change) if change else 0.0
    return Written(rounding, path.stat().st_size)


def _stored_as(kinds: Mapping[str, str]) -> Callable[[str, Tensor], tuple[Any, Tensor]]:
    """Stores A and B in the given ggml types, and says what the stored values are."""
    import gguf

    def store(letter: str, value: Tensor) -> tuple[Any, Tensor]:
        kind = gguf.GGMLQuantizationType[kinds[letter]]
        with np.errstate(over="ignore"):  # what becomes infinite is refused by name
            narrow = np.ascontiguousarray(value.float().numpy())
            held = np.ascontiguousarray(gguf.quantize(narrow, kind))
        seen = held if held.dtype == np.float32 else gguf.dequantize(held, kind)
        return held, torch.from_numpy(np.asarray(seen, dtype=np.float32))

    return store


def _check(path: Path, plan: Plan, tensors: Sequence[_Entry]) -> None:
    """Reads the table of the file back: what was written must be what was planned."""
    import gguf

    reader = gguf.GGUFReader(path)
    found = {
        t.name: (tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name)
        for t in reader.tensors
    }
    wanted = {label: (shape, kind) for _, label, shape, kind in tensors}
    field = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    alpha = None if field is None else field.contents()
    if found != wanted or alpha != plan.alpha:
        wrong = next((n for n in wanted if found.get(n) != wanted[n]), None)
        raise AdapterFileError(
            "The file that was written is not the one that was planned; it is discarded.",
            file=path,
            key=wrong,
            expected=wanted.get(wrong or "", plan.alpha),
            got=found.get(wrong or "", alpha),
        )
