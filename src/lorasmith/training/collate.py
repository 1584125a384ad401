"""From tokenised rows to batches: padding, packing, and packing with a shared prefix.

Padding
    Rows [batch, T] padded on the right to the longest one. Works with every model.
Packing
    Rows lie behind one another in one sequence, without padding. ``position_ids`` restart at
    each row and a block-causal attention mask keeps rows apart.
Shared-prefix packing
    As packing, but tokens with which all rows of the batch begin (the system message and the
    head of the chat template) are stored once; every row attends to them::

        tokens      p p p | a a a a | b b | c c c
        positions   0 1 2 | 3 4 5 6 | 3 4 | 3 4 5
        sees        itself and the past within | | , and all of p

    With prefix length 0 this is plain packing. The prefix ends at least one token before the
    first supervised token of any row, so each prediction is made from the row's own tokens:
    loss and gradients are those of the padded batch, to rounding. (Noise is the exception:
    dropout on the prefix is drawn once for all rows instead of once a row.)

Whether a model can be given packed rows is decided by :func:`packing_support`, which tries it.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lorasmith.errors import ConfigError, DataError, TrainingError
from lorasmith.training.data import IGNORE_INDEX, TASK

__all__ = [
    "ROW_TOKENS",
    "Collator",
    "CountingCollator",
    "PackingCollator",
    "PackingSupport",
    "PaddingCollator",
    "TokenBudgetSampler",
    "choose_collator",
    "packing_support",
    "shared_prefix_length",
]

Row = Mapping[str, Any]
"""A tokenised row: ``input_ids`` and ``labels``, lists of equal length."""

DEFAULT_MAX_TOKENS = 512
"""Longest packed sequence, in tokens, unless one row is longer. Attention grows with its square:
eight rows of GSM8K took 4.8 s a step as one sequence of 1,663 tokens and 3.9 s as four of 476."""


ROW_TOKENS = "row_tokens"
"""Key under which a batch says how many tokens its rows have; not one of the model's."""


class Collator(Protocol):
    """Makes one batch, a dict of tensors for the model, of some tokenised rows."""

    def __call__(self, rows: Sequence[Row], /) -> dict[str, Tensor]:
        """Batch of the rows: tensors for the model, ``labels`` among them."""
        ...


def _checked(rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
    if not rows:
        raise DataError("A batch has no rows.", expected="at least one row")
    checked: list[tuple[list[int], list[int]]] = []
    for number, row in enumerate(rows):
        try:
            ids, labels = list(row["input_ids"]), list(row["labels"])
        except KeyError as error:
            raise DataError(
                f"Row {number} of the batch is not tokenised.",
                expected="the columns input_ids and labels",
                got=sorted(row),
                fix="pass the rows through lorasmith.training.data.tokenise",
            ) from error
        if not ids or len(ids) != len(labels):
            raise DataError(
                f"Row {number} of the batch is malformed.",
                expected="as many labels as input_ids, at least one",
                got=f"{len(ids)} input_ids and {len(labels)} labels",
            )
        checked.append((ids, labels))
    return checked


@dataclass(frozen=True)
class PaddingCollator:
    """Rows padded on the right to the longest of the batch.

    Attributes:
        pad_token_id: Token put behind shorter rows. Any token will do: it is masked.
        multiple_of: Round the length up to a multiple of this many tokens.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, rows: Sequence[Row], /) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (1: a token, 0: padding), ``labels``: [batch, T]."""
        checked = _checked(rows)
        length = max(len(ids) for ids, _ in checked)
        length = -(-length // self.multiple_of) * self.multiple_of
        shape = (len(checked), length)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        mask = torch.zeros(shape, dtype=torch.long)
        for i, (ids, row_labels) in enumerate(checked):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, : len(ids)] = torch.tensor(row_labels)
            mask[i, : len(ids)] = 1
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def shared_prefix_length(rows: Sequence[Row]) -> int:
    """Tokens that all rows begin with and that can be stored once.

    At most the common prefix, and so short that in every row the token after it is
    unsupervised. The first token of a row is never predicted, so its label does not count.
    """
    checked = _checked(rows)
    if len(checked) < 2:
        return 0
    limit = min(_last_unsupervised_start(labels) for _, labels in checked)
    shortest, longest = min(ids for ids, _ in checked), max(ids for ids, _ in checked)
    common = 0
    # The smallest and the largest list differ from each other first of all pairs.
    for a, b in zip(shortest, longest, strict=False):
        if a != b or common >= limit:
            break
        common += 1
    return min(common, limit)


def _last_unsupervised_start(labels: Sequence[int]) -> int:
    """Index of the last token that comes before the first supervised token after the first."""
    for i in range(1, len(labels)):
        if labels[i] != IGNORE_INDEX:
            return i - 1
    return len(labels) - 1


@dataclass(frozen=True)
class PackingCollator:
    """Rows packed into as few sequences as fit, with a shared prefix where there is one.

    Attributes:
        pad_token_id: Token that fills up shorter sequences, if there are several.
        max_tokens: Longest sequence. Rows that do not fit go to further sequences of the same
            batch, all of nearly equal length; only a longer row makes longer sequences.
        share_prefix: Store the common prefix of the rows once a sequence.
        mask_dtype: ``torch.bool`` (True: may attend) for SDPA, or a float dtype (0: may attend,
            the dtype's smallest number: may not) for eager attention.
        multiple_of: Round sequence lengths up to a multiple of this many tokens.
    """

    pad_token_id: int
    max_tokens: int = DEFAULT_MAX_TOKENS
    share_prefix: bool = True
    mask_dtype: torch.dtype = torch.bool
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.multiple_of < 1:
            raise ConfigError(
                "The packing collator's sizes are too small.",
                expected="max_tokens and multiple_of of at least 1",
                got=f"{self.max_tokens} and {self.multiple_of}",
            )

    def __call__(self, rows: Sequence[Row], /) -> dict[str, Tensor]:
        """Pack the rows.

        Returns:
            ``input_ids``, ``position_ids`` and ``labels``, int64 [sequences, T], and
            ``attention_mask`` [sequences, 1, T, T]. Labels are unshifted, as models expect
            them; that of each row's first own token is -100, since nothing predicts it.
        """
        checked = _checked(rows)
        prefix = shared_prefix_length(rows) if self.share_prefix else 0
        own = [len(ids) - prefix for ids, _ in checked]
        bins = _balanced(own, self.max_tokens - prefix)
        length = prefix + max(sum(own[i] for i in members) for members in bins)
        length = -(-length // self.multiple_of) * self.multiple_of
        shape = (len(bins), length)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        positions = torch.zeros(shape, dtype=torch.long)
        # Filled block by block: comparing T x T tensors would cost far more.
        allowed = torch.zeros((len(bins), 1, length, length), dtype=torch.bool)
        for b, members in enumerate(bins):
            input_ids[b, :prefix] = torch.tensor(checked[members[0]][0][:prefix])
            positions[b, :prefix] = torch.arange(prefix)
            allowed[b, 0, :prefix, :prefix] = _causal(prefix)
            start = prefix
            for i in members:
                ids, row_labels = checked[i]
                stop = start + own[i]
                input_ids[b, start:stop] = torch.tensor(ids[prefix:])
                labels[b, start:stop] = torch.tensor(row_labels[prefix:])
                labels[b, start] = IGNORE_INDEX
                positions[b, start:stop] = torch.arange(prefix, len(ids))
                allowed[b, 0, start:stop, :prefix] = True
                allowed[b, 0, start:stop, start:stop] = _causal(own[i])
                start = stop
            # Padding attends to itself alone: a row of a softmax must not be empty.
            allowed[b, 0].diagonal()[start:] = True
        return {
            "input_ids": input_ids,
            "position_ids": positions,
            "attention_mask": _as_mask(allowed, self.mask_dtype),
            "labels": labels,
        }


def _balanced(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over few bins of nearly equal content, none above the capacity.

    Equal content matters more than full bins: every sequence is as long as the longest one.
    The largest item goes first, each to the emptiest bin, with one more bin until all fit.
    """
    capacity = max(capacity, *sizes)
    count = -(-sum(sizes) // capacity)
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            b = min(range(count), key=filled.__getitem__)
            bins[b].append(i)
            filled[b] += sizes[i]
        if max(filled) <= capacity:
            return [sorted(members) for members in bins]
        count += 1


def _causal(length: int) -> Tensor:
    return torch.ones((length, length), dtype=torch.bool).tril()


def _as_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as it is, or as numbers that are added to the attention scores."""
    if dtype == torch.bool:
        return allowed
    mask = torch.zeros(allowed.shape, dtype=dtype)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


class TokenBudgetSampler:
    """Batches of rows of similar length with a bounded number of tokens.

    For ``DataLoader(batch_sampler=…)``. Every row occurs once an epoch. Rows are shuffled,
    sorted by length within windows of several batches, cut into batches whose rows times the
    longest row stay within the budget, and the batches are shuffled again.

    Args:
        lengths: Tokens of every row.
        max_tokens: Most tokens of a batch, padding included. A longer row is a batch alone.
        max_rows: Most rows of a batch.
        seed: Order; :meth:`set_epoch` gives each epoch its own.
        window: Rows sorted at one time.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        max_tokens: int,
        max_rows: int | None = None,
        seed: int = 0,
        window: int = 1024,
    ) -> None:
        if max_tokens < 1 or window < 1 or (max_rows is not None and max_rows < 1):
            raise ConfigError(
                "The token budget's sizes are too small.",
                expected="max_tokens, max_rows and window of at least 1",
                got=f"{max_tokens}, {max_rows} and {window}",
            )
        self.lengths = list(lengths)
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.seed = seed
        self.window = window
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of that epoch from now on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def __len__(self) -> int:
        return len(self._batches())

    def _batches(self) -> list[list[int]]:
        generator = random.Random(f"{self.seed}:{self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), self.window):
            batch: list[int] = []
            for i in sorted(order[start : start + self.window], key=lambda i: -self.lengths[i]):
                # Longest first: the batch's first row is its longest.
                width = self.lengths[batch[0]] if batch else self.lengths[i]
                full = (len(batch) + 1) * width > self.max_tokens or len(batch) == self.max_rows
                if batch and full:
                    batches.append(batch)
                    batch = []
                batch.append(i)
            batches.append(batch)
        generator.shuffle(batches)
        return batches


# --- can this model be given packed rows? --------------------------------------------------


@dataclass(frozen=True)
class PackingSupport:
    """Whether a model computes packed rows exactly as it computes them apart.

    Attributes:
        supported: The verdict.
        reason: One sentence for the user: why, or why not.
        mask_dtype: Dtype of the attention mask to give to the model.
    """

    supported: bool
    reason: str
    mask_dtype: torch.dtype = torch.bool

    def __bool__(self) -> bool:
        return self.supported


def packing_support(model: nn.Module, *, max_length: int | None = None) -> PackingSupport:
    """Find out whether a model can be trained on packed rows.

    The model's attention must take a ready-made 4D mask (``sdpa`` or ``eager``) and its forward
    ``position_ids``. Both are then tried on a few random tokens, without gradient and in
    evaluation mode: three rows packed behind a shared prefix must give the logits that each
    row gives alone, and changing one row must leave the others as they are. That catches
    what no attribute tells: ALiBi, recurrent layers, masks that are ignored.

    Args:
        model: A Transformers model for causal language modelling.
        max_length: Longest row that will be packed, in tokens. Needed only for models with
            sliding-window attention: their window is not part of the packed mask, which is
            exact up to rows of that length.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return PackingSupport(False, "the model has no Transformers configuration")
    parameters = inspect.signature(model.forward).parameters
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for needed in ("position_ids", "attention_mask"):
        if needed not in parameters and not takes_anything:
            return PackingSupport(False, f"{type(model).__name__} takes no {needed}")
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return PackingSupport(
            False, f"attention {attention!r} takes no block mask (sdpa and eager do)"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = _sliding_window(text)
    if window is not None and (max_length is None or max_length > window):
        return PackingSupport(
            False, f"rows may be longer than the attention window of {window} tokens"
        )
    # A float mask must have the dtype of the attention scores.
    dtype = torch.bool if attention == "sdpa" else _float_dtype(model)
    problem = _try_packing(model, text, dtype)
    if problem is not None:
        return PackingSupport(False, problem)
    return PackingSupport(True, "packed rows gave the same logits as rows apart", dtype)


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _sliding_window(config: Any) -> int | None:
    layers = getattr(config, "layer_types", None)
    windows = []
    sliding = layers is None or any("sliding" in str(kind) for kind in layers)
    if sliding and getattr(config, "use_sliding_window", True):
        windows.append(getattr(config, "sliding_window", None))
    if layers is not None and any("chunked" in str(kind) for kind in layers):
        windows.append(getattr(config, "attention_chunk_size", None))
    known = [w for w in windows if isinstance(w, int) and w > 0]
    return min(known) if known else None


def _try_packing(model: nn.Module, config: Any, mask_dtype: torch.dtype) -> str | None:
    """What goes wrong with packed rows, or None."""
    vocabulary = int(getattr(config, "vocab_size", 0))
    if vocabulary < 2:
        return "the size of the vocabulary is unknown"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (19,), generator=generator).tolist()
    prefix = ids[:3]
    rows = [prefix + ids[3:9], prefix + ids[9:13], prefix + ids[13:19]]
    changed = [rows[0], prefix + [(v + 1) % vocabulary for v in rows[1][3:]], rows[2]]
    # Supervise the last token of a row only, so that the common prefix can be shared.
    collate = PackingCollator(pad_token_id=ids[0], mask_dtype=mask_dtype)

    def pack(batch: list[list[int]]) -> Tensor:
        labels = [[IGNORE_INDEX] * (len(r) - 1) + [r[-1]] for r in batch]
        packed = collate(
            [{"input_ids": r, "labels": y} for r, y in zip(batch, labels, strict=True)]
        )
        del packed["labels"]
        return _logits(model, packed)[0]

    try:
        with _evaluating(model):
            packed, perturbed = pack(rows), pack(changed)
            apart = [_logits(model, {"input_ids": torch.tensor([row])})[0] for row in rows]
    except Exception as error:  # noqa: BLE001 - any failure of the forward pass is an answer
        return f"the model refuses packed rows ({type(error).__name__}: {str(error)[:120]})"
    prefix_length = len(packed) - sum(len(row) - 3 for row in rows)
    expected = torch.cat([apart[0][:prefix_length], *(a[prefix_length:] for a in apart)])
    if expected.shape != packed.shape or not bool(packed.isfinite().all()):
        return "the model's logits on packed rows are not usable"
    size = float(expected.abs().max())
    exact = packed.dtype in (torch.float32, torch.float64)
    if float((packed - expected).abs().max()) > (1e-4 if exact else 5e-2) * size:
        return "packed rows do not give the logits of rows apart"
    # The same shapes go through the same kernels, so nothing else may move.
    second = slice(len(rows[0]), len(rows[0]) + len(rows[1]) - 3)
    moved = (packed - perturbed).abs()
    moved[second] = 0
    if float(moved.max()) > (1e-6 if exact else 1e-2) * size:
        return "packed rows see each other"
    return None


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    out = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
    logits: Tensor = out.logits
    return logits.detach()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own flag comes back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def choose_collator(
    model: nn.Module,
    pad_token_id: int,
    *,
    packing: bool | Literal["auto"] = "auto",
    max_length: int | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    share_prefix: bool = True,
) -> tuple[Collator, PackingSupport]:
    """The collator for a model, and why it is that one.

    Args:
        model: The model that will be trained.
        pad_token_id: Token for padding; the end-of-sequence token will do.
        packing: True: pack, or fail if the model cannot. ``"auto"``: pack if it can, else pad.
            False: pad.
        max_length: Longest row, in tokens.
        max_tokens: Longest packed sequence, in tokens.
        share_prefix: Store the common prefix of the rows once.

    Raises:
        TrainingError: Packing was asked for and the model does not support it.
    """
    if packing is False:
        return PaddingCollator(pad_token_id), PackingSupport(False, "packing is switched off")
    support = packing_support(model, max_length=max_length)
    if support:
        return (
            PackingCollator(
                pad_token_id,
                max_tokens=max_tokens,
                share_prefix=share_prefix,
                mask_dtype=support.mask_dtype,
            ),
            support,
        )
    if packing is True:
        raise TrainingError(
            "This model cannot be trained on packed rows.",
            expected="a model that takes position_ids and a 4D attention mask",
            got=support.reason,
            fix="leave packing on 'auto' to pad instead, or load the model with attention 'sdpa'",
        )
    return PaddingCollator(pad_token_id), support


@dataclass(frozen=True)
class CountingCollator:
    """A collator that also says how many tokens the rows of a batch have, and their task."""

    collate: Collator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(self.collate(rows))
        batch[ROW_TOKENS] = sum(len(row["input_ids"]) for row in rows)
        if TASK in rows[0]:
            (batch[TASK],) = {row[TASK] for row in rows}
        return batch
