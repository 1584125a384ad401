"""Adapters in the forms that other programs load: one call for all of them.

    ========  ===================================================================================
    to        what is written
    ========  ===================================================================================
    gguf      ``adapter.gguf`` for llama.cpp and Ollama, and a ``Modelfile`` for the latter
    vllm      a PEFT directory of one rank and one scaling, as vLLM reads it
    sglang    the same for SGLang
    tgi       the same for Text Generation Inference, in which no layer of a kind is left out
    peft      a PEFT directory: variants that PEFT has as they are, others as plain LoRA
    ========  ===================================================================================

Everything is checked before anything is written, and written as a whole or not at all
(``lorasmith.io.atomic``). What a form cannot say is converted, with the error measured, or refused
with the reason; nothing is left out without a word.
"""

from __future__ import annotations

import os
import re
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorasmith.core.adapter import Adapter
from lorasmith.errors import AdapterFileError, ConfigError, ModelError
from lorasmith.export.gguf import FILE, plan_gguf, write_gguf
from lorasmith.export.layout import find_base, layout_of
from lorasmith.export.ollama import MODELFILE, modelfile, tokenizer_format
from lorasmith.export.plain import Progress, as_plain, needs_weights, pair_rank
from lorasmith.export.servers import SERVERS, command, max_lora_rank, served
from lorasmith.io.atomic import explained_failure, replace_files
from lorasmith.io.convert import Conversion
from lorasmith.io.files import read_adapter
from lorasmith.io.models import ResolvedModel, load_config
from lorasmith.io.weights import AdapterWeights, as_path

__all__ = ["PEFT_VARIANTS", "TARGETS", "Export", "export_adapter", "needs_model"]

#: What an adapter can be exported to.
TARGETS = ("gguf", "vllm", "sglang", "tgi", "peft")
#: Variants whose files PEFT 0.21 loads as they are.
PEFT_VARIANTS = frozenset(
    {
        "delora",
        "dora",
        "hra",
        "ia3",
        "ia3_ff",
        "loha",
        "lokr",
        "lora",
        "miss",
        "oft",
        "road",
        "vera",
    }
)
_TITLES = {"gguf": "llama.cpp", "peft": "PEFT"} | {n: s.title for n, s in SERVERS.items()}


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        to: One of :data:`TARGETS`.
        path: The directory.
        files: Names of the files in it.
        source: Variant of the adapter.
        variant: Variant of what was written.
        base: Name of the base model, if it is known.
        layers: Number of adapted layers.
        rank: The highest of a layer, or ``None`` for variants without one.
        conversion: What converting did, where it was no plain LoRA of that rank already.
        rounding: √(Σ ‖ΔW − ΔW'‖² / Σ ‖ΔW‖²) of the numbers in the file, against those of the
            plain LoRA that is written.
        max_lora_rank: What the server's limit on ranks has to be, or ``None``.
        commands: How to use it.
        notes: What else there is to know.
    """

    to: str
    path: Path
    files: tuple[str, ...]
    source: str
    variant: str
    base: str | None
    layers: int
    rank: int | None
    conversion: Conversion | None
    rounding: float
    max_lora_rank: int | None
    commands: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """Relative error of converting, √(Σ ‖ΔW − ΔW_r‖² / Σ ‖ΔW‖²); 0 without."""
        return 0.0 if self.conversion is None else self.conversion.error

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types that JSON can hold."""
        return {
            "to": self.to,
            "output": str(self.path),
            "files": list(self.files),
            "source": self.source,
            "variant": self.variant,
            "base": self.base,
            "layers": self.layers,
            "rank": self.rank,
            "relative_error": self.error,
            "conversion": None if self.conversion is None else self.conversion.to_dict(),
            "rounding": self.rounding,
            "max_lora_rank": self.max_lora_rank,
            "commands": list(self.commands),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        made = f"{self.source} → {self.to}" if self.conversion is None else str(self.conversion)
        return f"{made}; {', '.join(self.files)} in {self.path}"


def needs_model(adapter: str | os.PathLike[str] | AdapterWeights, to: str) -> bool:
    """Whether :func:`export_adapter` needs ``model``: the base weights, to convert with.

    Raises:
        AdapterFileError: The adapter cannot be read.
        ConfigError: There is no such target.
    """
    _check_target(to)
    weights = adapter if isinstance(adapter, AdapterWeights) else read_adapter(adapter)
    if to == "peft" and weights.variant.name in PEFT_VARIANTS:
        return False
    return needs_weights(weights)


def export_adapter(
    adapter: Adapter | AdapterWeights | str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "gguf",
    *,
    base: str | os.PathLike[str] | None = None,
    model: nn.Module | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    name: str | None = None,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Writes an adapter in the form that another program loads.

        ls.export_adapter("runs/dates", "dates-gguf", "gguf", base="SmolLM2-135M.Q4_1.gguf")
        print(ls.export_adapter("runs/dates", "dates-vllm", "vllm").commands[0])

    Args:
        adapter: An attached adapter, one that has been read, a directory, a hub id or a URL.
        out: Directory for it.
        to: ``"gguf"``, ``"vllm"``, ``"sglang"``, ``"tgi"`` or ``"peft"``.
        base: The base model: a directory, a ``.gguf`` file, an alias or a hub id; by default what
            the adapter says. Of it, only names and shapes are read.
        model: The base model itself, where the adapter has to be converted with its weights (DoRA,
            IA3, …) and is not attached to it.
        rank: With servers, of all layers; else the highest of a layer. An adapter of a higher rank,
            or one that is no LoRA, is converted into LoRA of that rank.
        energy: Convert, and keep this share of ‖ΔW‖² on every layer.
        dtype: Of the numbers written: ``"float32"``, ``"float16"``, ``"bfloat16"``, for GGUF
            ``"q8_0"`` as well, or ``"auto"``: as they are, with servers float32 where they have to
            change. The default is float32 for GGUF and auto for servers.
        name: Of the adapter, for servers and in the file; by default that of its directory.
        allow_base_mismatch: Whether ``model`` may be another than the adapter was made for.
        overwrite: Whether what an export has written in ``out`` may be replaced.
        progress: Called with (phase, done, total).

    Raises:
        AdapterFileError: The adapter cannot be read, holds what the form cannot say, or writing
            failed. Nothing is written then, as with all other errors.
        BaseMismatchError: It does not fit the base model.
        ConfigError: An option is wrong or has to be given.
        ModelError: The base model cannot be found or read, or its layout is not known.
        FuseError: The adapter depends on its input, so that no LoRA acts like it.
        MissingDependencyError: A package is not installed.
    """
    _check_target(to)
    weights = _weights(adapter)
    target = as_path(out)
    title = _TITLES[to]
    handle = adapter if isinstance(adapter, Adapter) else weights
    label = _label(weights, name)
    _check_output(target, weights, to, overwrite)
    if to == "peft" and dtype is not None:
        raise ConfigError(
            "A PEFT directory keeps the numbers that the adapter has.",
            fix="leave the dtype out",
            got=dtype,
            key="dtype",
        )
    as_it_is = rank is None and energy is None and weights.variant.name in PEFT_VARIANTS
    if to == "peft" and as_it_is:
        return _as_it_is(weights, target)
    found = None if to == "peft" else _base(base, weights, required=to == "gguf")
    # A base that the adapter does not fit is found before a conversion that may take minutes.
    layout = layout_of(found) if to == "gguf" and found is not None else None
    plain, conversion = as_plain(
        handle,
        weights,
        title,
        rank=rank,
        energy=energy,
        model=model,
        allow_base_mismatch=allow_base_mismatch,
        progress=progress,
    )
    notes = [] if conversion is None else [_about(conversion)]
    if to == "peft":
        assert conversion is not None or rank is not None
        return _peft(plain, weights, target, conversion, notes)
    if layout is not None and found is not None:
        plan = plan_gguf(plain, layout, dtype or "float32")
        chat, end, why = tokenizer_format(found)
        if why is not None:
            notes.append(f"The Modelfile has no TEMPLATE: {why}.")
        text = modelfile(found, FILE, chat, end, beside=target)
        rounding = 0.0

        def write(folder: Path) -> None:
            nonlocal rounding
            title = plain.base.name or found.base_name
            rounding = write_gguf(
                plain, plan, folder / FILE, name=label, base=title, progress=progress
            ).rounding
            (folder / MODELFILE).write_text(text, encoding="utf-8")

        with explained_failure("The export", target):
            replace_files(target, (FILE, MODELFILE), write)
        commands = (
            f"llama-cli -m {_quoted(layout.file or 'BASE.gguf')} --lora {_quoted(target / FILE)}",
            f"ollama create {label} -f {_quoted(target / MODELFILE)}",
        )
        return Export(
            to,
            target,
            (FILE, MODELFILE),
            weights.variant.name,
            "lora",
            plain.base.name or found.base_name,
            len(plan.places),
            max(plan.ranks.values()),
            conversion,
            rounding,
            None,
            commands,
            tuple(notes),
        )
    server = SERVERS[to]
    made = served(
        plain,
        server,
        rank=rank if conversion is None else None,
        dtype=dtype or "auto",
        layers=_count(found) if server.whole else None,
        rows=_rows(found) if server.stacked else None,
        progress=progress,
    )
    if made.padded:
        notes.append(f"{made.padded} layers of lower ranks were padded with zeros, which is exact.")
    if made.folded:
        notes.append(f"{made.folded} layers have their own scaling, which is in B now.")
    if made.added:
        notes.append(
            f"{made.added} layers that the adapter leaves alone got factors of zeros: "
            f"{server.title} "
            + (
                "stacks q, k and v, and gate and up, and takes none of them alone."
                if server.stacked
                else "leaves out kinds of layers of which one is missing."
            )
        )
    if server.whole and found is None:
        notes.append(
            "The base model is not at hand, so that it was not checked that all its layers are "
            f"there; {server.title} leaves out kinds of layers of which one is missing. Give base."
        )
    heads = [m for m in plain.modules if m.rpartition(".")[2] in ("lm_head", "embed_out")]
    if heads:
        notes.append(
            f"{heads[0]} is adapted, which {server.title} takes for some models only, and not "
            "where the head is the embedding once more."
        )
    path = made.weights.save(target)
    title = plain.base.name or "BASE"
    if found is not None and (base is not None or plain.base.name is None):
        title = found.base_name
    return Export(
        to,
        path,
        _files(path),
        weights.variant.name,
        "lora",
        plain.base.name,
        len(made.weights.modules),
        made.rank,
        conversion,
        made.rounding,
        max_lora_rank(server, made.rank),
        (command(server, title, label, str(path), made.rank),),
        tuple(notes),
    )


def _weights(adapter: Adapter | AdapterWeights | str | os.PathLike[str]) -> AdapterWeights:
    if isinstance(adapter, Adapter):
        return AdapterWeights.from_model(adapter.model, adapter.name)
    return adapter if isinstance(adapter, AdapterWeights) else read_adapter(adapter)


def _check_target(to: str) -> None:
    if to not in TARGETS:
        raise ConfigError(
            "There is no export of that name.", expected=", ".join(TARGETS), got=to, key="to"
        )


def _label(weights: AdapterWeights, name: str | None) -> str:
    if name is not None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,127}", name):
            raise ConfigError(
                "That cannot be the name of an adapter.",
                expected="letters, digits, - _ . and at most 128 of them",
                got=name,
                key="name",
            )
        return name
    last = weights.path.name if weights.path is not None else "adapter"
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-._")[:128] or "adapter"


def _check_output(target: Path, weights: AdapterWeights, to: str, overwrite: bool) -> None:
    if target.suffix == ".gguf":
        raise ConfigError(
            "The output is a directory, for the adapter and the files that go with it.",
            expected=str(target.with_suffix("")),
            got=target,
            key="output",
        )
    if target.exists() and not target.is_dir():
        raise AdapterFileError(
            "The output is a directory, and there is a file under that path.",
            file=target,
            fix="choose another path",
        )
    if not target.is_dir() or not any(target.iterdir()):
        return
    if weights.path is not None and target.samefile(weights.path):
        raise ConfigError(
            "The export would take the place of the adapter that it is made from.",
            got=target,
            fix="choose another directory",
            key="output",
        )
    held = {entry.name for entry in target.iterdir()}
    ours = {FILE} if to == "gguf" else {"adapter_config.json"}
    if not held & ours:
        raise AdapterFileError(
            "The directory holds something, but no export of that kind; it is not touched.",
            file=target,
            got=", ".join(sorted(held)[:4]),
            fix="choose a new or empty directory",
        )
    if not overwrite:
        raise ConfigError(
            "There is an export in the output directory already.",
            got=target,
            fix="choose another one, or give --overwrite",
            key="output",
        )


def _base(
    base: str | os.PathLike[str] | None, weights: AdapterWeights, *, required: bool
) -> ResolvedModel | None:
    """The base model that the user or the adapter names; ``None`` if the latter cannot be found."""
    if base is not None:
        return find_base(base)
    if weights.base.name is None:
        if not required:
            return None
        raise ConfigError(
            "The adapter does not say which base model it is for.",
            expected="its directory, hub id or GGUF file",
            fix="give it: --base MODEL",
            key="base",
        )
    try:
        return find_base(weights.base.name)
    except ModelError as error:
        if not required:
            return None
        raise ModelError(
            f"The adapter's base model is needed for its names and shapes. {error.what}",
            got=error.got,
            fix="give it: --base MODEL (a directory, or the GGUF file that it will be used with)",
        ) from error


def _count(base: ResolvedModel | None) -> int | None:
    """Number of layers of the base model, if it is at hand."""
    if base is None:
        return None
    count = getattr(load_config(base).get_text_config(), "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def _rows(base: ResolvedModel | None) -> dict[str, int]:
    """Rows of the base model's q and v, if it is at hand and says so in the usual words."""
    if base is None:
        return {}
    config = load_config(base).get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if type(heads) is not int or type(width) is not int or heads < 1:
        return {}
    size = getattr(config, "head_dim", None) or width // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return {"q_proj": heads * size, "v_proj": keys * size}


def _about(conversion: Conversion) -> str:
    if conversion.error > 0.1:
        warnings.warn(
            f"The plain LoRA is far from the adapter: relative error {conversion.error:.2g}. A "
            "higher rank, or a full model (lorasmith fuse), comes nearer.",
            UserWarning,
            stacklevel=4,
        )
    return f"Converted: {conversion}."


def _as_it_is(weights: AdapterWeights, target: Path) -> Export:
    path = weights.save(target)
    config = weights.config
    factors = weights.factors
    ranks = [pair_rank(factors[m]) for m in factors] if hasattr(config, "r") else []
    return Export(
        "peft",
        path,
        _files(path),
        weights.variant.name,
        weights.variant.name,
        weights.base.name,
        len(weights.modules),
        max(ranks, default=None),
        None,
        0.0,
        None,
        (),
        (),
    )


def _peft(
    plain: AdapterWeights,
    weights: AdapterWeights,
    target: Path,
    conversion: Conversion | None,
    notes: list[str],
) -> Export:
    path = plain.save(target)
    return Export(
        "peft",
        path,
        _files(path),
        weights.variant.name,
        "lora",
        plain.base.name,
        len(plain.modules),
        max(pair_rank(plain.factors[m]) for m in plain.modules),
        conversion,
        0.0,
        None,
        (),
        tuple(notes),
    )


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))


def _files(path: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in path.iterdir() if entry.is_file()))
