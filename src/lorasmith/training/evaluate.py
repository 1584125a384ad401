"""What a model is worth: loss, perplexity, exact match, and text that it writes.

Loss and perplexity are means over supervised tokens, never over rows or batches: with
rows i of n_i supervised tokens,

    loss = Σ_i Σ_t −log p(y_it) / Σ_i n_i  (nats a token)        perplexity = exp(loss)

Exact match asks the model to write the completion itself, greedily, and counts the rows on
which it writes the expected text and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasmith.errors import ConfigError, DataError
from lorasmith.training.data import encode_prompt, tasks_of, tokenise
from lorasmith.training.loss import IGNORE_INDEX, model_loss_output

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "EvalReport",
    "Example",
    "TaskReport",
    "evaluate",
    "general_text",
    "generate",
    "perplexity",
]

Progress = Callable[[str, int, int], None]
"""Called with a phase (``"loss"`` or ``"generate"``), rows done and rows in all."""


@dataclass(frozen=True)
class Example:
    """One row on which the model wrote the completion itself.

    Attributes:
        prompt: The prompt as the model saw it, template included.
        expected: The completion of the row.
        got: What the model wrote.
        match: Whether the two are the same text.
    """

    prompt: str
    expected: str
    got: str
    match: bool


@dataclass(frozen=True)
class TaskReport:
    """What :func:`evaluate` found on the rows of one task; as in :class:`EvalReport`."""

    rows: int
    tokens: int
    loss: float
    perplexity: float
    exact_match: float | None
    matched: int
    generated: int


@dataclass(frozen=True)
class EvalReport:
    """What :func:`evaluate` found.

    Attributes:
        rows: Rows evaluated.
        tokens: Supervised tokens in them.
        loss: Cross-entropy in nats a supervised token.
        perplexity: exp(loss); infinite where that is beyond a float.
        exact_match: Share of rows written exactly, 0 to 1; None if nothing was written.
        matched: Number of rows written exactly.
        generated: Number of rows on which the model wrote.
        seconds: Wall time.
        examples: The rows it wrote on, in the order of the data.
        tasks: Task → the same figures on its rows, where rows have a task.
    """

    rows: int
    tokens: int
    loss: float
    perplexity: float
    exact_match: float | None
    matched: int
    generated: int
    seconds: float
    examples: tuple[Example, ...] = ()
    tasks: dict[str, TaskReport] = field(default_factory=dict)

    def to_dict(self, *, examples: int | None = None) -> dict[str, Any]:
        """All fields, in types that JSON can hold; at most ``examples`` examples."""
        values = dataclasses.asdict(dataclasses.replace(self, examples=self.examples[:examples]))
        for found in (values, *values["tasks"].values()):
            for key in ("perplexity", "loss"):
                found[key] = found[key] if math.isfinite(found[key]) else None
        return values


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: Dataset | Sequence[Mapping[str, Any]],
    *,
    max_length: int = 1024,
    batch_size: int = 16,
    exact_match: bool = True,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
    task_column: str | None = "task",
) -> EvalReport:
    """Measures a model on rows in any of the forms that training takes.

    Args:
        model: A Transformers causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        rows: A ``datasets.Dataset``, or a sequence of mappings (prompt and completion,
            messages, instruction and output, or text).
        max_length: Longest row in tokens; what is longer is cut.
        batch_size: Rows a batch.
        exact_match: Also let the model write the completions. Rows without a prompt (plain
            text) are left out of it. Of a conversation, the last answer is written.
        max_new_tokens: Longest completion. Default: the longest expected one and a few
            tokens more, since a longer one cannot match.
        progress: Called as rows are done.
        task_column: Column with the task of each row; where the rows have it, they are also
            reported task by task.

    Raises:
        DataError: There are no rows, or they have a form that is not known.
    """
    _check_positive("batch_size", batch_size)
    started = time.perf_counter()
    data = _as_dataset(rows)
    column = task_column if task_column in data.column_names else None
    tokens = tokenise(data, tokenizer, max_length=max_length, task_column=column)
    if len(tokens) == 0:
        raise DataError("There are no rows to evaluate on.", expected="at least one row")
    pairs = [(row["input_ids"], row["labels"]) for row in tokens]
    names = tasks_of(tokens)
    groups: dict[str | None, list[int]] = {}
    for i in range(len(pairs)):
        groups.setdefault(None if names is None else names[i], []).append(i)
    with evaluating(model):
        sums = _summed_losses(model, tokenizer, pairs, groups, batch_size, progress)
        found: dict[int, Example] = {}
        if exact_match:
            found = _write_completions(
                model, tokenizer, pairs, batch_size, max_new_tokens, progress
            )
    total = _task_report(range(len(pairs)), _added(sums.values()), found)
    return EvalReport(
        **dataclasses.asdict(total),
        seconds=time.perf_counter() - started,
        examples=tuple(found[i] for i in sorted(found)),
        tasks={
            task: _task_report(members, sums[task], found)
            for task, members in groups.items()
            if task is not None
        },
    )


def _added(sums: Iterable[tuple[float, int]]) -> tuple[float, int]:
    losses, counts = zip(*sums, strict=True)
    return sum(losses), sum(counts)


def _task_report(
    members: Sequence[int], summed: tuple[float, int], found: Mapping[int, Example]
) -> TaskReport:
    """The figures on some of the rows, from their summed loss and what was written."""
    total, count = summed
    loss = total / count
    written = [found[i] for i in members if i in found]
    matched = sum(e.match for e in written)
    return TaskReport(
        rows=len(members),
        tokens=count,
        loss=loss,
        perplexity=exp_or_inf(loss),
        exact_match=matched / len(written) if written else None,
        matched=matched,
        generated=len(written),
    )


def exp_or_inf(loss: float) -> float:
    """exp(loss), or infinity where that is beyond a float; NaN stays NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _as_dataset(rows: Dataset | Sequence[Mapping[str, Any]]) -> Dataset:
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return rows
    if len(rows) == 0:
        raise DataError("There are no rows to evaluate on.", expected="at least one row")
    return Dataset.from_list([dict(row) for row in rows])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own flag comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), contiguous_head_input(model):
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def contiguous_head_input(model: Any) -> Iterator[None]:
    """Lets the output head see contiguous hidden states only.

    Transformers and ``training.loss`` give it a slice, the last position of each row. With a
    frozen weight ``torch.matmul`` does not fold such a slice into a matrix but copies the
    weight once a row: 50 rows × 49,152 × 576 in bfloat16 are 2.6 GiB.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (*(a.contiguous() for a in args),))
    try:
        yield
    finally:
        handle.remove()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of indices, longest rows first, so that too large a batch fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _padded(
    rows: Sequence[Sequence[int]], value: int, device: torch.device, *, left: bool = False
) -> Tensor:
    """[batch, longest], padded with ``value`` on one side."""
    width = max(len(row) for row in rows)
    made = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(0, len(row))
        made[i, place] = torch.tensor(row, dtype=torch.long)
    return made.to(device)


_Pair = tuple[Sequence[int], Sequence[int]]


def _summed_losses(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[_Pair],
    groups: Mapping[str | None, Sequence[int]],
    batch_size: int,
    progress: Progress | None,
) -> dict[str | None, tuple[float, int]]:
    """Group → sum of the cross-entropy over its supervised tokens, and their number."""
    device = _device(model)
    found: dict[str | None, tuple[float, int]] = {}
    done = 0
    for name, members in groups.items():
        total, count = 0.0, 0
        for places in length_batches([len(pairs[i][0]) for i in members], batch_size):
            batch = [members[k] for k in places]
            ids = [pairs[i][0] for i in batch]
            inputs = {
                "input_ids": _padded(ids, int(tokenizer.pad_token_id or 0), device),
                "attention_mask": _padded([[1] * len(row) for row in ids], 0, device),
                "labels": _padded([pairs[i][1] for i in batch], IGNORE_INDEX, device),
            }
            output = model_loss_output(model, inputs)
            total += float(output.loss) * output.count
            count += output.count
            done += len(batch)
            if progress is not None:
                progress("loss", done, len(pairs))
        found[name] = (total, count)
    return found


def _last_answer(labels: Sequence[int]) -> tuple[int, int]:
    """Start and end of the last run of supervised tokens."""
    end = len(labels)
    while end and labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return start, end


# A completion that goes on this much longer than any expected one is wrong already.
_SPARE_TOKENS = 4


def _write_completions(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[_Pair],
    batch_size: int,
    max_new_tokens: int | None,
    progress: Progress | None,
) -> dict[int, Example]:
    """Row → what the model wrote on it, of the rows that have a prompt."""
    spans = [_last_answer(labels) for _, labels in pairs]
    # Plain text is supervised from its second token on, since nothing predicts the first.
    asked = [i for i, (start, end) in enumerate(spans) if 1 < start < end]
    if not asked:
        return {}
    if max_new_tokens is None:
        max_new_tokens = max(spans[i][1] - spans[i][0] for i in asked) + _SPARE_TOKENS
    _check_positive("max_new_tokens", max_new_tokens)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    found: dict[int, Example] = {}
    for batch in length_batches([spans[i][0] for i in asked], batch_size):
        chosen = [asked[k] for k in batch]
        prompts = [list(pairs[i][0][: spans[i][0]]) for i in chosen]
        for i, prompt, written in zip(
            chosen,
            prompts,
            _continue(model, tokenizer, prompts, max_new_tokens=max_new_tokens),
            strict=True,
        ):
            start, end = spans[i]
            expected = decode(pairs[i][0][start:end]).strip()
            got = decode(written).strip()
            found[i] = Example(tokenizer.decode(prompt), expected, got, got == expected)
        if progress is not None:
            progress("generate", len(found), len(asked))
    return found


# Writing -------------------------------------------------------------------------------------


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens at which the model has finished: its own, and the tokenizer's end of text."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {own} if isinstance(own, int) else set(own or ())
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return sorted(found)


def _continue(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: Any = None,
) -> list[list[int]]:
    """The token ids that the model writes after each prompt, without the stop token."""
    import transformers

    from lorasmith.training.models import quiet

    device = _device(model)
    pad = int(tokenizer.pad_token_id or 0)
    stops = stop_tokens(model, tokenizer)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    make_settings: Any = transformers.GenerationConfig  # untyped
    settings = make_settings(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=True,
        **sampling,
    )
    ids = _padded(prompts, pad, device, left=True)
    mask = _padded([[1] * len(row) for row in prompts], 0, device, left=True)
    # Quiet: the model's own sampling defaults, which do not count here, are warned about.
    with quiet(), torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, streamer=streamer
        )
    written = []
    for row in out[:, ids.shape[1] :].tolist():
        ends = [row.index(stop) for stop in stops if stop in row]
        written.append(row[: min(ends)] if ends else row)
    return written


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    system: str | None = None,
    template: bool = True,
    stream: Callable[[str], None] | None = None,
) -> str:
    """What the model answers to a prompt.

    Args:
        model: A Transformers causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        prompt: The user's message.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 for the likeliest token at every place, above 0 to sample.
        top_p: Sample from the likeliest tokens that make up this probability.
        seed: Seed of the sampling; the program's own random numbers are not touched. None
            draws from them.
        system: A system message, for models with a chat template.
        template: Whether to bring the prompt into the form that training gives it: the
            model's chat template, if it has one. False continues the text as it stands.
        stream: Called with each piece of text as it is written.

    Returns:
        The answer, without the stop token and surrounding white space.

    Raises:
        ConfigError: A setting cannot be used.
    """
    _check_positive("max_new_tokens", max_new_tokens)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(
            "temperature cannot be negative.",
            expected="0 or above",
            got=temperature,
            key="temperature",
        )
    if not 0 < top_p <= 1:
        raise ConfigError(
            "top_p is not a probability.", expected="0 < top_p <= 1", got=top_p, key="top_p"
        )
    ids = _prompt_ids(tokenizer, prompt, system, template)
    if not ids:
        raise ConfigError("The prompt is empty.", expected="at least one token", key="prompt")
    streamer = _streamer(tokenizer, stream) if stream is not None else None
    with evaluating(model), _seeded(seed, _device(model)):
        (written,) = _continue(
            model,
            tokenizer,
            [ids],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            streamer=streamer,
        )
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text.strip() if template else text


def _prompt_ids(tokenizer: Any, prompt: str, system: str | None, template: bool) -> list[int]:
    if template:
        return encode_prompt(prompt, tokenizer, system=system)
    if system is not None:
        raise ConfigError(
            "A prompt without a template has no place for a system message.",
            fix="put it into the prompt",
            key="system",
        )
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids


def _streamer(tokenizer: Any, stream: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        # The base class prints; everything else it does (whole words only) is wanted.
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                stream(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


# General knowledge ---------------------------------------------------------------------------


def perplexity(
    model: nn.Module, tokenizer: Any, text: str, *, window: int = 1024, stride: int = 512
) -> float:
    """Perplexity of a running text, each token predicted from the tokens before it.

    The text is read through windows that overlap: each moves on by ``stride`` tokens and
    scores only what the one before it has not, so that all but the first tokens have at
    least ``window - stride`` tokens of context.

    Args:
        model: A Transformers causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        text: The text; at least two tokens.
        window: Tokens the model sees at a time.
        stride: Tokens by which the window moves, at most ``window``.

    Returns:
        exp of the mean cross-entropy, over all tokens but the first.

    Raises:
        ConfigError: The window or the stride cannot be used.
        DataError: The text is too short.
    """
    _check_positive("stride", stride)
    if window < 2 or stride >= window:
        raise ConfigError(
            "The window cannot move like that.",
            expected="2 <= window and stride < window",
            got=f"window {window}, stride {stride}",
            key="stride",
        )
    # verbose: that the whole text is longer than the model's context is meant.
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise DataError("The text is too short.", expected="at least two tokens", got=len(ids))
    device = _device(model)
    total, count, scored = 0.0, 0, 1
    with evaluating(model):
        for start in range(0, len(ids), stride):
            end = min(start + window, len(ids))
            part = torch.tensor([ids[start:end]], device=device)
            labels = part.clone()
            labels[0, : scored - start] = IGNORE_INDEX
            output = model_loss_output(model, {"input_ids": part, "labels": labels})
            total += float(output.loss) * output.count
            count += output.count
            scored = end
            if end == len(ids):
                break
    return exp_or_inf(total / count)


def general_text(characters: int = 24_000) -> str:
    """English prose that has nothing to do with any built-in data set.

    Paragraphs of the Python language reference, which every Python carries as
    ``pydoc_data.topics``, code and grammar left out. It differs a little between Python
    versions, so figures from two of them cannot be compared.

    Args:
        characters: Length of the text at most; it ends with a whole paragraph.

    Raises:
        ConfigError: If it would be empty.
    """
    from pydoc_data.topics import topics

    parts: list[str] = []
    left = characters
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            paragraph = " ".join(block.split())
            if not _is_prose(block, paragraph):
                continue
            if len(paragraph) + 2 > left:
                if not parts:
                    raise ConfigError(
                        "No paragraph is that short.",
                        expected="at least 2000",
                        got=characters,
                        key="characters",
                    )
                return "\n\n".join(parts)
            parts.append(paragraph)
            left -= len(paragraph) + 2
    return "\n\n".join(parts)


def _is_prose(block: str, paragraph: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return (
        len(paragraph) >= 120
        and paragraph.endswith(".")
        and "::=" not in block
        and ">>>" not in block
        and not block.startswith("      ")
        and letters >= 0.9 * len(paragraph)
    )


def _check_positive(key: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{key} cannot be {value!r}.", expected="an integer of at least 1", key=key
        )
