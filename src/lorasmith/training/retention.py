"""What a tuned model still knows, measured: perplexity, KL divergence and agreement.

Weights that turned by some angle may or may not have forgotten something; this asks the model.
On text that it was not tuned on, with p_t the base's and q_t the tuned model's distribution of
token t given the tokens before it, and n tokens x_t,

    perplexity   exp(−1/n Σ_t log p_t(x_t)),   exp(−1/n Σ_t log q_t(x_t))
    KL           1/n Σ_t Σ_v p_tv (log p_tv − log q_tv)          nats a token
    agreement    1/n #{t : argmax p_t = argmax q_t}

Perplexity sees only the tokens of the text; KL and agreement see every change of what the
model would say, and need no gold text: any English will do. KL(base ‖ tuned) is the direction
that is large where the tuned model has become unable to say what the base would.

The text is read through overlapping windows as in ``training.evaluate.perplexity``, whose
figures these are. Both bodies run over a window, and both output heads then over a few rows of
their hidden states at a time (float64 sums), so that logits of a whole window are never held.
Where the head of a model cannot be reached, its own logits of one window are (with a warning).

With an adapter it is one model in memory: the adapter is switched off and on
(``core.attach.use``, or PEFT's ``disable_adapter``).

Limits: both must have the same tokens. A text in the training data says nothing about
retention, and a figure on one text says nothing about another kind of text.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lorasmith.core.adapter import activate, attached, get_adapter, state_of, unwrap
from lorasmith.core.attach import detach, use
from lorasmith.core.mixing import Plan, names_in, plan_of
from lorasmith.diagnostics.records import Retention
from lorasmith.errors import AdapterFileError, ConfigError, DataError, ModelError, UnknownNameError
from lorasmith.io.files import load
from lorasmith.io.hub import locate
from lorasmith.training.evaluate import evaluating, exp_or_inf, general_text
from lorasmith.training.loss import head_input

__all__ = ["GENERAL_CHARACTERS", "Text", "divergence", "read_text", "retention"]

#: A text, several that have nothing to do with each other, a file, or None for the built-in one.
Text: TypeAlias = str | Sequence[str] | os.PathLike[str] | None

#: Length of the built-in text.
GENERAL_CHARACTERS = 12_000

#: Logits of one model held at a time, in elements: 32 MiB in float64.
_CHUNK_ELEMENTS = 2**22

_Progress = Callable[[str, int, int], None]


def divergence(before: Tensor, after: Tensor, targets: Tensor) -> tuple[float, float, float, int]:
    """Sums over n positions: −log p(x), −log q(x), KL(p ‖ q), and how often the modes agree.

    Args:
        before: Logits of p, [n, vocab].
        after: Logits of q, [n, vocab].
        targets: The tokens x, [n].
    """
    p, q = before.log_softmax(dim=-1), after.log_softmax(dim=-1)
    column = targets.unsqueeze(-1)
    # What p rules out counts nothing, also where both have logits of −∞.
    terms = torch.where(p > -math.inf, p.exp() * (p - q), 0.0)
    return (
        -float(p.gather(-1, column).sum()),
        -float(q.gather(-1, column).sum()),
        # Rounding alone can make a row of equal distributions negative.
        float(terms.sum(dim=-1).clamp_min(0.0).sum()),
        int((before.argmax(dim=-1) == after.argmax(dim=-1)).sum()),
    )


def read_text(text: Text) -> tuple[str, list[str]]:
    """What it is called, and the documents.

    Args:
        text: A text, several of them, the path of a file in UTF-8 (a ``Path``: a string is a
            text), or None for English prose from Python's own language reference.

    Raises:
        DataError: There is no such file, it is not text, or there is nothing in it.
    """
    if text is None:
        return "builtin", [general_text(GENERAL_CHARACTERS)]
    if isinstance(text, os.PathLike):
        path = Path(text).expanduser()
        try:
            name, found = str(path), [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                "The text cannot be read.",
                expected="a text file in UTF-8",
                got=error,
                fix="check the path, or save it as UTF-8",
                file=path,
                key="text",
            ) from error
    elif isinstance(text, str):
        name, found = "given text", [text]
    else:
        name, found = f"{len(text)} given texts", list(text)
    if not any(part.strip() for part in found):
        raise DataError(
            "The text is empty.",
            expected="at least two tokens",
            got=name,
            fix="give a text with something in it",
            file=text if isinstance(text, os.PathLike) else None,
            key="text",
        )
    return name, found


@torch.no_grad()
def retention(
    model: Any,
    text: Text = None,
    *,
    adapter: Any = None,
    tuned: nn.Module | None = None,
    against: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    window: int = 1024,
    stride: int = 512,
    allow_base_mismatch: bool = False,
    dequantize: bool = False,
    progress: _Progress | None = None,
) -> Retention:
    """Compares what a model says before and after fine-tuning, on text.

        ls.retention("smollm2", adapter="runs/dates")
        ls.retention(model, Path("held-out.txt"), tokenizer=tokenizer)     # the attached adapter
        ls.retention(base, tuned=model, tokenizer=tokenizer)

    Args:
        model: A Transformers causal language model, a ``PeftModel``, or what ``load_model``
            takes (an alias, a hub id, a path).
        text: A text, several texts, a file (as a ``Path``), or None for 12,000 characters of
            English prose from Python's own language reference.
        adapter: What is measured: the name of an adapter on the model, a mix of them (name →
            weight), or a directory or hub id to load for the time. Default: what acts on the
            model at the moment, else the only adapter that is on it.
        tuned: A second model, instead of an adapter.
        against: The adapter that acts in the base, if one does: a name, directory or hub id.
        tokenizer: The model's tokenizer. Default: that of the model's name or path.
        window: Tokens that the models see at a time; no more than they have places for.
        stride: Tokens by which the window moves on.
        allow_base_mismatch: Whether an adapter that is loaded may be one for another base.
        dequantize: Whether an adapter that is loaded may dequantise layers.
        progress: Called with ``"retention"``, tokens done and tokens in all.

    Returns:
        The figures. Model, adapters and every module's training flag are as they were.

    Raises:
        DataError: There is no text, or too little.
        ConfigError: The windows cannot be used, or there is nothing to compare.
        ModelError: The two models have different vocabularies.
    """
    if not 1 <= stride < window:
        raise ConfigError(
            "The window cannot move like that.",
            expected="1 <= stride < window",
            got=f"window {window}, stride {stride}",
            key="stride",
        )
    if tuned is not None and (adapter is not None or against is not None):
        raise ConfigError(
            "adapter and tuned are two ways to say what is measured.",
            fix="leave one of them out",
            key="tuned",
        )
    name, documents = read_text(text)
    if not isinstance(model, nn.Module):
        from lorasmith.training.models import load_model

        model, own = load_model(model)
        tokenizer = own if tokenizer is None else tokenizer
    elif tokenizer is None:
        tokenizer = _tokenizer_of(model)
    # verbose: that a text is longer than the model's context is meant.
    tokens = [list(tokenizer(part, verbose=False)["input_ids"]) for part in documents]
    total = sum(max(0, len(ids) - 1) for ids in tokens)
    if total < 1:
        raise DataError("The text is too short.", expected="at least two tokens", got=name)
    sums = [0.0, 0.0, 0.0, 0]
    with contextlib.ExitStack() as stack:
        for one in (model,) if tuned is None else (model, tuned):
            stack.enter_context(evaluating(one))
        pair = stack.enter_context(
            _sides(
                model,
                tuned,
                adapter,
                against,
                {"allow_base_mismatch": allow_base_mismatch, "dequantize": dequantize},
            )
        )
        room = min(_places(side.model, window) for side in pair)
        if room < window:
            window, stride = room, max(1, min(stride, room // 2))
        done = 0
        for ids in tokens:
            for start, first, end in _windows(len(ids), window, stride):
                for i, found in enumerate(_compared(pair, ids[start:end], first - start)):
                    sums[i] += found
                done += end - first
                if progress is not None:
                    progress("retention", done, total)
    before, after, kl, agreed = sums
    return Retention(
        name,
        total,
        exp_or_inf(before / total),
        exp_or_inf(after / total),
        kl / total,
        agreed / total,
    )


def _windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start, first token that is scored, and end of each window; token 0 is never scored."""
    scored = 1
    for start in range(0, count, stride):
        end = min(start + window, count)
        if end > scored:
            yield start, scored, end
        scored = end
        if end == count:
            return


def _places(model: nn.Module, window: int) -> int:
    """How many tokens the model takes at most."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return max(2, found) if isinstance(found, int) and found > 0 else window


def _tokenizer_of(model: nn.Module) -> Any:
    from lorasmith.training.models import load_tokenizer, resolve_model

    name = getattr(model, "name_or_path", None) or getattr(unwrap(model), "name_or_path", None)
    if not name:
        raise ConfigError(
            "Which tokenizer belongs to the model is not known.",
            fix="pass tokenizer=",
            key="tokenizer",
        )
    return load_tokenizer(resolve_model(name))


# The two sides -------------------------------------------------------------------------------

_Acting = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class _Side:
    """A model, and the context in which it is the one that is meant."""

    model: nn.Module
    acting: _Acting


@contextlib.contextmanager
def _sides(
    model: nn.Module,
    tuned: nn.Module | None,
    adapter: Any,
    against: str | os.PathLike[str] | None,
    options: Mapping[str, bool],
) -> Iterator[tuple[_Side, _Side]]:
    if tuned is not None:
        yield _Side(model, _without_adapters(model)), _Side(tuned, contextlib.nullcontext)
        return
    root = unwrap(model)
    if hasattr(root, "peft_config"):
        with _flags_kept(root):
            yield (
                _Side(model, _peft(root, against)),
                _Side(model, _peft(root, adapter, default=True)),
            )
        return
    loaded: list[str] = []
    state = state_of(root)
    active = None if state is None else state.active
    # Leaving it brings back what acts now; entering it refuses an adapter that is fused.
    with use(root, None):
        try:
            plan: Plan = active
            if adapter is not None:
                plan = _plan(root, adapter, options, loaded)
            elif active is None:
                plan = get_adapter(root, None).name  # the only one; says so if there is none
            base = None if against is None else _plan(root, against, options, loaded)
            yield (
                _Side(model, lambda: _acting(root, base)),
                _Side(model, lambda: _acting(root, plan)),
            )
        finally:
            for name in loaded:
                detach(root, name)


def _without_adapters(model: nn.Module) -> _Acting:
    """A model beside a second one is taken without the adapters that it carries."""
    root = unwrap(model)
    if hasattr(root, "peft_config"):
        return _peft(root, None)
    return (lambda: use(root, None)) if attached(root) else contextlib.nullcontext


@contextlib.contextmanager
def _acting(root: nn.Module, plan: Plan) -> Iterator[None]:
    state = state_of(root)
    if state is None:
        yield
        return
    before = state.active
    activate(root, state, plan)
    try:
        yield
    finally:
        activate(root, state, before)


def _plan(root: nn.Module, adapter: Any, options: Mapping[str, bool], loaded: list[str]) -> Plan:
    """What acts for a name or a mix. A directory or hub id is loaded, and its name noted."""
    present = attached(root)
    if isinstance(adapter, Mapping) or adapter in present:
        plan = plan_of(adapter)
        for name in names_in(plan):
            get_adapter(root, name)
        return plan
    try:
        found = locate(adapter)
    except AdapterFileError as error:
        if not present or "/" in os.fspath(adapter):
            raise
        raise UnknownNameError(
            f"The model has no adapter named {adapter!r}, and there is none at that path.",
            expected=f"{', '.join(present)}, a directory or a hub id",
            key="adapter",
        ) from error
    name = next(n for i in itertools.count() if (n := f"measured_{i}") not in present)
    load(root, found, name=name, **options)
    loaded.append(name)
    return name


@contextlib.contextmanager
def _flags_kept(root: nn.Module) -> Iterator[None]:
    """PEFT's switches set ``requires_grad``; afterwards every parameter has its own again."""
    flags = {parameter: parameter.requires_grad for parameter in root.parameters()}
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _peft(root: Any, name: Any, *, default: bool = False) -> _Acting:
    """One adapter of PEFT's, the active ones (``default``), or none at all."""
    if name is None:
        return contextlib.nullcontext if default else lambda: _peft_off(root)
    if name not in root.peft_config:
        raise UnknownNameError(
            f"The model has no adapter named {name!r}.",
            expected=", ".join(root.peft_config),
            key="adapter",
        )
    return lambda: _peft_on(root, name)


@contextlib.contextmanager
def _peft_off(root: Any) -> Iterator[None]:
    if hasattr(root, "disable_adapter"):
        with root.disable_adapter():
            yield
        return
    root.disable_adapters()  # a Transformers model that PEFT's layers were put into
    try:
        yield
    finally:
        root.enable_adapters()


@contextlib.contextmanager
def _peft_on(root: Any, name: str) -> Iterator[None]:
    found = root.active_adapters
    before = found() if callable(found) else found
    root.set_adapter(name)
    try:
        yield
    finally:
        root.set_adapter(before[0] if len(before) == 1 else before)


# One window ----------------------------------------------------------------------------------


def _compared(
    pair: tuple[_Side, _Side], ids: Sequence[int], first: int
) -> tuple[float, float, float, int]:
    """The sums of :func:`divergence` over the tokens of a window from ``first`` on."""
    rows = slice(first - 1, len(ids) - 1)
    before, after = (_some_logits(side, ids, rows) for side in pair)
    vocabulary, other = before(0, 1).shape[-1], after(0, 1).shape[-1]
    if vocabulary != other:
        raise ModelError(
            "The two models have different vocabularies, so that what they say cannot be compared.",
            expected=f"{vocabulary} tokens",
            got=f"{other} tokens",
            fix="give the base model the tuned one's vocabulary (resize_token_embeddings)",
        )
    step = max(16, _CHUNK_ELEMENTS // vocabulary)
    sums = (0.0, 0.0, 0.0, 0)
    for start in range(0, len(ids) - first, step):
        end = min(start + step, len(ids) - first)
        p = before(start, end)
        q = after(start, end).to(p.device)
        targets = torch.tensor(ids[first + start : first + end], device=p.device)
        a, b, c, d = divergence(p, q, targets)
        sums = (sums[0] + a, sums[1] + b, sums[2] + c, sums[3] + d)
    return sums


def _some_logits(side: _Side, ids: Sequence[int], rows: slice) -> Callable[[int, int], Tensor]:
    """What gives the logits of some of the rows, once the body has run over the window."""
    model = side.model
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.tensor([list(ids)], device=device)}
    with side.acting():
        found = head_input(model, inputs)
        if isinstance(found, str):
            warnings.warn(
                f"{type(unwrap(model)).__name__}: the full logits of a window are held, which "
                f"takes more memory, because {found}.",
                stacklevel=2,
            )
            # From the end: PEFT's virtual tokens come before the text's.
            whole = model(**inputs, use_cache=False).logits[0, -len(ids) :][rows]
            return lambda start, end: _wide(whole[start:end])
    hidden, head = found.hidden[0, rows], found

    def some(start: int, end: int) -> Tensor:
        # An adapter may be on the head, too.
        with side.acting():
            return _wide(head.logits(hidden[start:end]))

    return some


def _wide(logits: Tensor) -> Tensor:
    """In float64; Apple's GPUs have none."""
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
