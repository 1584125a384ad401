"""How near a fused model is to base + adapter, in logits on prompts.

Three models see the same tokens, one after the other (the first two are one where the fused
model is float32):

    exact      base + attached adapter, computed in float32
    attached   base + attached adapter, loaded and computed in the fused model's dtype
    fused      what was written, as ``from_pretrained`` loads it

    drift            fused against attached: what fusing changes for who served the adapter
    fused_error      fused against exact
    attached_error   attached against exact: what the dtype costs without any fusing

Of each: max and mean |Δ logit| over all positions and tokens, KL(reference ‖ other) a position in
nats (mean and max), and the share of positions whose most probable token is the same. In 16 bit
``drift`` is never 0: both sides round their activations, differently. Where ``fused_error`` is of
``attached_error``'s size, fusing has cost nothing beyond the dtype itself; fused weights are
often the nearer ones, for the adapter's product is not rounded apart.

:data:`BOUNDS` say which mean KL of ``drift`` passes without a warning.

The adapter acts through lorasmith's engine. What that has no name for acts directly: a LoRA on
an embedding as a hook that adds s A[:, ids]ᵀ Bᵀ, an embedding or a head that stands beside an
adapter as values written into the model, a resized vocabulary by ``resize_token_embeddings``.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.attach import use
from lorasmith.errors import ConfigError, FuseError, ModelError, first_line
from lorasmith.io.files import load
from lorasmith.io.models import (
    ResolvedModel,
    dequantised,
    explained,
    quiet,
    remote_code,
    transformers_module,
)
from lorasmith.io.tensors import TensorSource
from lorasmith.io.weights import AdapterWeights

__all__ = [
    "BOUNDS",
    "PROMPTS",
    "Drift",
    "Parity",
    "Trial",
    "compare",
    "measure",
    "refuse_too_large",
]

#: dtype → mean KL a position, in nats, up to which ``drift`` is no news.
BOUNDS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 2e-2}
_BOUND = 1e-3

#: What is measured on where nothing else is given.
PROMPTS = (
    "The quick brown fox jumps over the lazy dog because",
    "Question: What is the capital of France?\nAnswer:",
    "Translate to German: I would like a cup of coffee and two slices of bread, please.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "On 14 March 1879 Albert Einstein was born in Ulm, a city on the river",
    'Extract the date as JSON: "We met on the third of May, 2021." ->',
)
#: Tokens of one prompt, and of all, that are looked at.
_LENGTH = 128
_TOTAL = 512
#: Stand-ins where there is no tokenizer: (prompts, tokens).
_RANDOM = (4, 16)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Drift:
    """How far one model's logits are from another's.

    Attributes:
        max: Largest |Δ logit|.
        mean: Mean |Δ logit|.
        kl: Mean KL(reference ‖ other) a position, in nats.
        max_kl: Largest.
        agreement: Share of positions with the same most probable token.
    """

    max: float
    mean: float
    kl: float
    max_kl: float
    agreement: float


@dataclass(frozen=True)
class Parity:
    """The parity of a fused model.

    Attributes:
        dtype: Of the fused model.
        prompts: Number of prompts.
        tokens: Number of positions.
        source: ``"built-in"``, ``"given"``, or ``"random tokens"`` (there is no tokenizer).
        drift: Fused against attached.
        fused_error: Fused against exact.
        attached_error: Attached against exact.
        bound: The mean KL up to which ``drift`` is no news.
    """

    dtype: str
    prompts: int
    tokens: int
    source: str
    drift: Drift
    fused_error: Drift
    attached_error: Drift
    bound: float

    @property
    def within(self) -> bool:
        """Whether ``drift.kl`` is within the bound."""
        return self.drift.kl <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return {**asdict(self), "within": self.within}

    def __str__(self) -> str:
        drift = self.drift
        return (
            f"logits within {drift.max:.2e} (mean {drift.mean:.2e}) of base + adapter, KL "
            f"{drift.kl:.2e} nats a token, {drift.agreement:.1%} same first choice"
        )


@dataclass(frozen=True)
class Trial:
    """What base + adapter is, for loading it.

    Attributes:
        resolved: The base.
        kind: Its class.
        adapters: (as read, without what lorasmith does not load, weight) of each adapter.
        untied: Whether head and embedding come apart.
        vocabulary: (rows before, rows now) if they differ.
        values: Parameter → (tensors, name there) of what is written into the model.
        embedded: Embedding → (A [r, vocabulary], B [d, r], scaling) of each LoRA on it.
        quantised: Whether the base's layers are.
    """

    resolved: ResolvedModel
    kind: type[nn.Module]
    adapters: Sequence[tuple[AdapterWeights, AdapterWeights, float]]
    untied: bool
    vocabulary: tuple[int, int] | None
    values: Mapping[str, tuple[TensorSource, str]]
    embedded: Mapping[str, Sequence[tuple[Tensor, Tensor, float]]]
    quantised: bool


def compare(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Drift:
    """Logits [positions, vocabulary] of each prompt → how far the others are.

    Raises:
        FuseError: If a logit is not finite.
    """
    largest = total = divergence = most = 0.0
    same = positions = numbers = 0
    for one, two in zip(reference, other, strict=True):
        # A row more or less of padding is no difference between models.
        width = min(one.shape[-1], two.shape[-1])
        a, b = (t[..., :width].to(torch.float64) for t in (one, two))
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise FuseError(
                "A logit is not finite.",
                fix="check base and adapter in this dtype: lorasmith eval MODEL --adapter PATH",
            )
        gap = (a - b).abs()
        largest, total = max(largest, float(gap.max())), total + float(gap.sum())
        p, q = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
        kl = (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
        divergence, most = divergence + float(kl.sum()), max(most, float(kl.max()))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        positions, numbers = positions + a.shape[0], numbers + a.numel()
    return Drift(largest, total / numbers, divergence / positions, most, same / positions)


def refuse_too_large(parameters: int, device: str) -> None:
    """Raises a ``ConfigError`` if a model of so many numbers does not fit into memory as float32.

    Only where the package psutil says how much there is, and on the CPU.
    """
    try:
        import psutil
    except ImportError:
        return
    free = int(psutil.virtual_memory().available)
    if device == "cpu" and 4 * parameters > free:
        raise ConfigError(
            "The model does not fit into memory for the parity report.",
            expected=f"{4 * parameters / 1e9:.3g} GB (float32)",
            got=f"{free / 1e9:.3g} GB free",
            fix="verify=False (--no-verify): fusing itself needs little",
            key="verify",
        )


@torch.no_grad()
def measure(
    trial: Trial,
    fused: Path,
    dtype: str,
    *,
    prompts: Sequence[str] | None,
    device: str,
    progress: Progress | None = None,
) -> Parity:
    """Runs prompts through base + adapter and through the fused model.

    Args:
        trial: The base and the adapters.
        fused: Directory of the fused model.
        dtype: Of its numbers.
        prompts: Texts; :data:`PROMPTS` by default.
        device: Where to run.
        progress: Called with (what is done, runs done, runs in all).

    Raises:
        FuseError: The fused model does not load as it should, or gives no numbers.
        ModelError: The base cannot be loaded, or has no logits.
    """
    kind = getattr(torch, dtype)
    batches, source = _tokens(fused, prompts, trial)
    steps = ["base + adapter, float32", f"base + adapter, {dtype}", "fused"]

    def step(done: int) -> None:
        if progress is not None:
            progress("comparing", done, len(steps))

    step(0)
    exact = _attached(trial, torch.float32, batches, device)
    step(1)
    attached = exact if kind == torch.float32 else _attached(trial, kind, batches, device)
    step(2)
    ours = _fused(trial, fused, kind, batches, device)
    step(3)
    return Parity(
        dtype,
        len(batches),
        sum(len(b) for b in batches),
        source,
        compare(attached, ours),
        compare(exact, ours),
        compare(exact, attached),
        BOUNDS.get(dtype, _BOUND),
    )


def _tokens(folder: Path, prompts: Sequence[str] | None, trial: Trial) -> tuple[list[Tensor], str]:
    """Token ids of each prompt."""
    transformers = transformers_module()
    tokenizer = None
    if any((folder / n).is_file() for n in ("tokenizer_config.json", "tokenizer.json")):
        with quiet():
            tokenizer = explained(
                lambda: transformers.AutoTokenizer.from_pretrained(
                    os.fspath(folder), local_files_only=True, **remote_code(False)
                ),
                trial.resolved.name,
            )
    if tokenizer is None:
        if prompts is not None:
            raise ConfigError(
                "There is no tokenizer to read the prompts with.",
                file=folder,
                fix="leave prompts out: random tokens are taken then",
                key="prompts",
            )
        config = transformers.AutoConfig.from_pretrained(
            os.fspath(folder), local_files_only=True, **remote_code(False)
        )
        rows = int(config.get_text_config().vocab_size)
        made = torch.randint(0, rows, _RANDOM, generator=torch.Generator().manual_seed(0))
        return list(made), "random tokens"
    found: list[Tensor] = []
    left = _TOTAL
    for text in PROMPTS if prompts is None else prompts:
        ids = torch.tensor(tokenizer(text)["input_ids"][: min(_LENGTH, left)], dtype=torch.long)
        if len(ids):
            found.append(ids)
            left -= len(ids)
    if not found:
        raise ConfigError("There is no prompt.", expected="texts of a token or more", key="prompts")
    return found, "built-in" if prompts is None else "given"


def _logits(model: Any, batches: Sequence[Tensor], device: str) -> list[Tensor]:
    found = []
    for ids in batches:
        output = model(input_ids=ids[None].to(device))
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise ModelError(
                "The model gives no logits for each token, so that parity is not measured.",
                got=type(model).__name__,
                fix="verify=False (--no-verify)",
            )
        found.append(logits[0].to("cpu", torch.float32))
    return found


def _attached(
    trial: Trial, dtype: torch.dtype, batches: Sequence[Tensor], device: str
) -> list[Tensor]:
    transformers = transformers_module()
    resolved = trial.resolved
    arguments: dict[str, Any] = remote_code(False)
    if resolved.gguf_file is not None:
        arguments |= {"gguf_file": resolved.gguf_file, **dequantised(transformers)}
    with quiet():
        model: Any = explained(
            lambda: trial.kind.from_pretrained(  # type: ignore[attr-defined]
                resolved.path,
                revision=resolved.revision,
                local_files_only=resolved.offline,
                dtype=dtype,
                **arguments,
            ),
            resolved.name,
        )
    model = (model if trial.quantised else model.to(device)).eval()
    with quiet(), _acting(model, trial):
        found = _logits(model, batches, device)
    del model
    gc.collect()
    return found


@contextmanager
def _acting(model: Any, trial: Trial) -> Iterator[None]:
    """The model with the adapters on it."""
    resolved_name = trial.resolved.base_name
    if trial.vocabulary is not None:
        model.resize_token_embeddings(trial.vocabulary[1], mean_resizing=False)
    if trial.untied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for name, (source, key) in trial.values.items():
        model.get_parameter(name).data.copy_(source[key])
    hooks = []
    for module, found in trial.embedded.items():
        layer = model.get_submodule(module)
        moved = [(A.to(layer.weight), B.to(layer.weight), s) for A, B, s in found]
        hooks.append(layer.register_forward_hook(_embedding_hook(moved)))
    mix = {}
    with tempfile.TemporaryDirectory(prefix="lorasmith-") as scratch:
        for i, (weights, core, weight) in enumerate(trial.adapters):
            path = weights.path
            if path is None or core is not weights:
                path = core.save(Path(scratch) / str(i))
            # Whether it is the right base has been looked at already.
            model.config._name_or_path = weights.base.name or resolved_name
            handle = load(
                model,
                path,
                name=f"part{i}",
                allow_base_mismatch=True,
                dequantize=trial.quantised,
            )
            mix[handle.name] = weight
        if mix and (len(mix) > 1 or set(mix.values()) != {1.0}):
            use(model, mix)
        yield
    for hook in hooks:
        hook.remove()


def _embedding_hook(
    found: Sequence[tuple[Tensor, Tensor, float]],
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        (ids,) = given
        for A, B, scaling in found:
            output = output + scaling * (A.T[ids] @ B.T)
        return output

    return add


def _fused(
    trial: Trial, folder: Path, dtype: torch.dtype, batches: Sequence[Tensor], device: str
) -> list[Tensor]:
    with quiet():
        try:
            model, report = trial.kind.from_pretrained(  # type: ignore[attr-defined]
                os.fspath(folder), local_files_only=True, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
            raise FuseError(
                "Transformers does not load what was written.", got=first_line(error)
            ) from error
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(key):
            raise FuseError(
                "Transformers does not load all that was written.",
                got=f"{key}: {', '.join(sorted(map(str, report[key]))[:3])}",
                fix="verify=False (--no-verify) writes it all the same",
            )
    model = model.to(device).eval()
    found = _logits(model, batches, device)
    del model
    gc.collect()
    return found
