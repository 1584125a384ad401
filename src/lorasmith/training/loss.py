"""Cross-entropy of a causal language model, computed only where there are labels.

A fine-tuning row is mostly prompt, and the logits of a prompt are never used. With a
vocabulary of 49,152 they are also the largest tensor of the whole step. Here the
language-model head runs only on the hidden states that predict a supervised token, in
chunks, and each chunk's gradient is computed while its logits are still at hand:

    z_i = cap · tanh(s · (W h_i + b) / cap)         logits; cap = ∞ where there is no soft cap
    L_i = log Σ_v exp z_iv − z_i,y_i                nats
    H_i = log Σ_v exp z_iv − Σ_v p_iv z_iv          entropy of p_i = softmax(z_i), nats
    ∂L_i/∂h_i = s · Wᵀ [(p_i − e_{y_i}) ⊙ (1 − (z_i / cap)²)]

with h_i the hidden state [d] before the token y_i, W [vocab, d], b [vocab] and s the logit
scale. So the forward pass leaves one tensor [n, d] behind (n supervised tokens) where the
usual computation leaves two or three of [batch · T, vocab]. The softmax is in float32 or
better; value and gradient equal those of the full computation to rounding.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lorasmith.core.lowrank import no_autocast
from lorasmith.errors import ConfigError, DataError, TrainingError
from lorasmith.training.data import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "HeadInput",
    "LossOutput",
    "head_input",
    "model_loss",
    "model_loss_output",
    "supervised_cross_entropy",
]

Reduction = Literal["mean", "sum", "none"]

# Logits held at one time, in elements: 64 MiB in float32 on a CPU. An accelerator needs larger
# chunks, since each of them reads the whole head weight once.
_CHUNK_ELEMENTS_CPU = 2**24
_CHUNK_ELEMENTS_ACCELERATOR = 2**26


@dataclass(frozen=True)
class LossOutput:
    """What one pass over the supervised tokens gives.

    Attributes:
        loss: Cross-entropy in nats: a scalar, or [count] with ``reduction="none"`` (in
            row-major order of the supervised positions). float32, or float64 for float64 input.
        count: Number of supervised tokens.
        entropy: Entropy of the model's distribution at each supervised position, in nats,
            [count], detached; None unless it was asked for.
        summed: Sum of the cross-entropy over the supervised tokens, detached and without any
            load-balancing loss; of a model's forward pass only.
    """

    loss: Tensor
    count: int
    entropy: Tensor | None = None
    summed: Tensor | None = None


@dataclass(frozen=True)
class _Chunked:
    """The constants of one call, so that they travel as one argument."""

    rows: int
    scale: float
    cap: float | None
    entropy: bool
    gradient: bool
    per_row: bool
    compute_dtype: torch.dtype


def _soft_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cross_entropy_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: _Chunked, grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss [c], entropy [c] or None, and ∂loss/∂(W h + b) [c, vocab] or None, of one chunk."""
    logits = F.linear(hidden, weight, bias)
    z = logits.to(_soft_dtype(logits.dtype))
    if call.scale != 1.0:
        z.mul_(call.scale)
    slope: Tensor | None = None
    if call.cap is not None:
        z.div_(call.cap).tanh_()
        if grad:
            slope = torch.addcmul(z.new_ones(()), z, z, value=-1)
        z.mul_(call.cap)
    z.sub_(z.amax(dim=-1, keepdim=True))
    column = targets.unsqueeze(-1)
    at_target = z.gather(-1, column).squeeze(-1)
    p = z.exp()
    total = p.sum(dim=-1)
    log_total = total.log()
    loss = log_total - at_target
    entropy = None
    if call.entropy:
        # einsum multiplies and sums without a third chunk-sized tensor.
        entropy = log_total - torch.einsum("nv,nv->n", p, z) / total
    if not grad:
        return loss, entropy, None
    p.div_(total.unsqueeze(-1))
    p.scatter_add_(-1, column, p.new_full((1, 1), -1.0).expand_as(column))
    if slope is not None:
        p.mul_(slope)
    if call.scale != 1.0:
        p.mul_(call.scale)
    return loss, entropy, p.to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Losses of the rows [n, d]; every gradient is ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        call: _Chunked,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = call.compute_dtype
        needs_hidden, needs_weight, needs_bias = (
            call.gradient and needed for needed in ctx.needs_input_grad[:3]
        )
        # Row-wise weighting of the head's gradient is known only in the backward pass.
        recompute = call.per_row and (needs_weight or needs_bias)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = grad_bias = None
        if not recompute:
            soft = _soft_dtype(weight.dtype)
            grad_weight = torch.zeros_like(weight, dtype=soft) if needs_weight else None
            if needs_bias and bias is not None:
                grad_bias = torch.zeros_like(bias, dtype=soft)
        losses: list[Tensor] = []
        entropies: list[Tensor] = []
        with no_autocast(hidden.device):
            head = weight.to(dtype)
            head_bias = None if bias is None else bias.to(dtype)
            any_grad = grad_hidden is not None or grad_weight is not None or grad_bias is not None
            for start in range(0, hidden.shape[0], call.rows):
                part = slice(start, start + call.rows)
                rows = hidden[part].to(dtype)
                loss, entropy, delta = _cross_entropy_rows(
                    rows, head, head_bias, targets[part], call, any_grad
                )
                losses.append(loss)
                if entropy is not None:
                    entropies.append(entropy)
                if delta is None:
                    continue
                if grad_hidden is not None:
                    grad_hidden[part] = (delta @ head).to(grad_hidden.dtype)
                if grad_weight is not None:
                    _add_product(grad_weight, delta, rows)
                if grad_bias is not None:
                    grad_bias += delta.sum(dim=0, dtype=grad_bias.dtype)
        ctx.call, ctx.recompute, ctx.weight_dtype = call, recompute, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if recompute:
            ctx.save_for_backward(grad_hidden, hidden, weight, bias, targets)
        else:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        entropy_all = torch.cat(entropies) if entropies else None
        if entropy_all is not None:
            ctx.mark_non_differentiable(entropy_all)
        every = torch.cat(losses)
        return (every if call.per_row else every.sum()), entropy_all

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Chunked = ctx.call
        if not ctx.recompute:
            grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
            factor = grad_loss.unsqueeze(-1) if call.per_row else grad_loss
            return (
                _scaled(grad_hidden, factor, None if grad_hidden is None else grad_hidden.dtype),
                _scaled(grad_weight, grad_loss, ctx.weight_dtype),
                _scaled(grad_bias, grad_loss, ctx.bias_dtype),
                None,
                None,
            )
        grad_hidden, hidden, weight, bias, targets = ctx.saved_tensors
        soft = _soft_dtype(weight.dtype)
        grad_weight = torch.zeros_like(weight, dtype=soft) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=soft)
            if bias is not None and ctx.needs_input_grad[2]
            else None
        )
        with no_autocast(hidden.device):
            head = weight.to(call.compute_dtype)
            head_bias = None if bias is None else bias.to(call.compute_dtype)
            for start in range(0, hidden.shape[0], call.rows):
                part = slice(start, start + call.rows)
                rows = hidden[part].to(call.compute_dtype)
                delta = _cross_entropy_rows(rows, head, head_bias, targets[part], call, True)[2]
                assert delta is not None  # the gradient was asked for
                delta = _scaled(delta, grad_loss[part].unsqueeze(-1), delta.dtype)
                if grad_weight is not None:
                    _add_product(grad_weight, delta, rows)
                if grad_bias is not None:
                    grad_bias += delta.sum(dim=0, dtype=grad_bias.dtype)
        return (
            _scaled(
                grad_hidden,
                grad_loss.unsqueeze(-1),
                None if grad_hidden is None else grad_hidden.dtype,
            ),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _apply(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: _Chunked
) -> tuple[Tensor, Tensor | None]:
    """Typed form of ``_ChunkedCrossEntropy.apply``."""
    function = cast(Any, _ChunkedCrossEntropy)
    return cast("tuple[Tensor, Tensor | None]", function.apply(hidden, weight, bias, targets, call))


def _add_product(total: Tensor, delta: Tensor, rows: Tensor) -> None:
    """Add deltaᵀ rows to the total [vocab, d], summed over the chunks in at least float32."""
    if delta.dtype == total.dtype:
        total.addmm_(delta.t(), rows)
    else:
        total += delta.t() @ rows


def _scaled(grad: Any, factor: Tensor, dtype: torch.dtype | None) -> Any:
    # The factor is often 1 / tokens: rounding it to bfloat16 would shift every gradient alike,
    # so the product is formed in float32.
    if grad is None:
        return None
    return (grad.to(_soft_dtype(grad.dtype)) * factor).to(dtype)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast would bring a matrix product, or None outside autocast."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _chunk_rows(chunk: int | None, vocabulary: int, device: torch.device) -> int:
    if chunk is None:
        budget = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS_ACCELERATOR
        return max(16, budget // max(1, vocabulary))
    if chunk < 1:
        raise ConfigError("The chunk is too small.", expected="chunk >= 1 rows", got=chunk)
    return chunk


def _supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices [n] of the positions that predict a supervised token, and the tokens [n]."""
    if labels.dim() not in (1, 2) or labels.numel() == 0:
        raise DataError(
            "The labels have the wrong shape.",
            expected="[batch, T] or [T], with at least one token",
            got=list(labels.shape),
        )
    following = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].reshape(-1)
    index = (following != IGNORE_INDEX).nonzero().squeeze(-1)
    if index.numel() == 0:
        raise DataError(
            "No token of the batch is supervised, so there is no loss.",
            expected=f"at least one label other than {IGNORE_INDEX} after the first position",
            got=f"labels {list(labels.shape)}, all ignored",
            fix="check that the rows have a completion and that max_length does not cut it off",
        )
    return index, following.index_select(0, index).long()


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    low, high = (int(v) for v in torch.stack(torch.aminmax(targets)).tolist())
    if low < 0 or high >= vocabulary:
        raise DataError(
            "A label lies outside the vocabulary.",
            expected=f"{IGNORE_INDEX} or 0 to {vocabulary - 1}",
            got=low if low < 0 else high,
            fix="use the tokenizer that belongs to this model",
        )


def supervised_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    head_bias: Tensor | None = None,
    chunk: int | None = None,
    reduction: Reduction = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> LossOutput:
    """Cross-entropy of the next token, with the head applied at supervised positions only.

    Args:
        hidden: Hidden states that enter the head, [batch, T, d] or [T, d], any float dtype.
        head_weight: The head's weight, [vocab, d]. Gets a gradient if it requires one.
        labels: Token ids, [batch, T] or [T], *not* shifted: position t predicts label t + 1.
            ``-100`` marks tokens without supervision.
        head_bias: [vocab], if the head has one.
        chunk: Rows of logits held at one time. Default: as many as make 64 MiB of float32
            (256 MiB on an accelerator), at least 16.
        reduction: ``"mean"`` over the supervised tokens, ``"sum"``, or ``"none"``.
        logit_scale: Factor on the logits (Cohere's ``logit_scale``, Granite's
            1 / ``logits_scaling``).
        softcap: ``cap`` of cap · tanh(logits / cap), applied after the scale (Gemma 2).
        with_entropy: Also return the entropy of the predicted distributions.

    Returns:
        :class:`LossOutput`. The gradient with respect to ``hidden`` is zero at positions that
        predict nothing. The matrix products run in the head's dtype, or in autocast's.

    Raises:
        DataError: No label is supervised, or one is outside the vocabulary.
        ConfigError: Shapes or options do not fit.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ConfigError(
            "Hidden states and labels do not fit.",
            expected=f"labels of shape {list(hidden.shape[:-1])}",
            got=list(labels.shape),
        )
    if head_weight.dim() != 2 or head_weight.shape[1] != hidden.shape[-1]:
        raise ConfigError(
            "Hidden states and head do not fit.",
            expected=f"a head weight [vocab, {hidden.shape[-1]}]",
            got=list(head_weight.shape),
        )
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError("Unknown reduction.", expected="mean, sum or none", got=repr(reduction))
    if softcap is not None and not softcap > 0:
        raise ConfigError("The soft cap must be positive.", expected="> 0, or None", got=softcap)
    index, targets = _supervised(labels.to(hidden.device))
    _check_targets(targets, head_weight.shape[0])
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
    call = _Chunked(
        rows=_chunk_rows(chunk, head_weight.shape[0], hidden.device),
        scale=float(logit_scale),
        cap=None if softcap is None else float(softcap),
        entropy=with_entropy,
        gradient=torch.is_grad_enabled(),
        per_row=reduction == "none",
        compute_dtype=_autocast_dtype(hidden.device) or head_weight.dtype,
    )
    loss, entropy = _apply(rows, head_weight, head_bias, targets, call)
    count = index.numel()
    return LossOutput(loss / count if reduction == "mean" else loss, count, entropy)


def _cross_entropy_through(
    head: nn.Module,
    hidden: Tensor,
    index: Tensor,
    targets: Tensor,
    scale: float,
    cap: float | None,
    chunk: int | None,
    vocabulary: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the losses for a head that is more than one weight (an adapter on it, 4 bits, …).

    The module itself is called on each chunk, and again in the backward pass, so that its
    hooks and all its parameters take part and still no logits-sized tensor is kept.
    """

    def one(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(rows.unsqueeze(0)).squeeze(0)
        z = _to_logits(logits.to(_soft_dtype(logits.dtype)), scale, cap)
        loss = F.cross_entropy(z, wanted, reduction="sum")
        if not with_entropy:
            return loss, loss.new_empty(0)
        with torch.no_grad():
            log_p = z.log_softmax(dim=-1)
            return loss, -torch.einsum("nv,nv->n", log_p.exp(), log_p)

    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
    size = _chunk_rows(chunk, vocabulary, hidden.device)
    losses, entropies = [], []
    for start in range(0, rows.shape[0], size):
        part = slice(start, start + size)
        if torch.is_grad_enabled():
            loss, entropy = checkpoint(one, rows[part], targets[part], use_reentrant=False)
        else:
            loss, entropy = one(rows[part], targets[part])
        losses.append(loss)
        entropies.append(entropy)
    return torch.stack(losses).sum(), torch.cat(entropies) if with_entropy else None


def _to_logits(head_output: Tensor, scale: float, cap: float | None) -> Tensor:
    z = head_output * scale if scale != 1.0 else head_output
    return z if cap is None else torch.tanh(z / cap) * cap


def model_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    num_items_in_batch: Tensor | int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The loss alone of :func:`model_loss_output`, for ``Trainer.compute_loss``."""
    return model_loss_output(model, inputs, num_items_in_batch=num_items_in_batch, chunk=chunk).loss


def model_loss_output(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    num_items_in_batch: Tensor | int | None = None,
    chunk: int | None = None,
    with_entropy: bool = False,
) -> LossOutput:
    """Loss of a Transformers causal language model without computing all of its logits.

    The model is called as usual, through every wrapper (DDP, FSDP, PEFT, accelerate's
    autocast), while a temporary hook takes the hidden states that enter the output head and
    lets only the last position through. The head then runs at the supervised positions. What
    the model does to the logits after the head (Gemma's soft cap, Cohere's and Granite's
    scale) is read from its configuration and compared with the model's own output on the
    first call. Where they differ, or where the head cannot be reached, the model computes its
    own full logits and loss, and a warning says so once. Load-balancing losses of
    mixture-of-experts models are added as the model itself adds them.

    Args:
        model: A ``transformers`` model for causal language modelling, wrapped or not.
        inputs: The model's keyword arguments, ``labels`` among them ([batch, T], -100 ignored).
        num_items_in_batch: Supervised tokens of the whole optimiser step, as Trainer counts
            them under gradient accumulation: the summed loss is divided by it. Default: by the
            supervised tokens of this batch.
        chunk: Rows of logits held at one time; see :func:`supervised_cross_entropy`.
        with_entropy: Also return the entropy at the supervised positions.

    Raises:
        DataError: ``labels`` are missing, or none of them is supervised.
        TrainingError: The model is an encoder-decoder.
    """
    body = dict(inputs)
    labels = body.pop("labels", None)
    if not isinstance(labels, Tensor):
        raise DataError(
            "The batch has no labels.",
            expected="a tensor under 'labels'",
            got=f"the keys {sorted(inputs)}",
            fix="make the batch with one of lorasmith.training.collate's collators",
        )
    index, targets = _supervised(labels)
    base, obstacle = _unwrap(model)
    if obstacle is None:
        obstacle = _obstacle(base)
    if obstacle is None and _VERIFIED.get(base) == (_after_head(base), None):
        obstacle = _UNKNOWN_AFTER_HEAD
    result: LossOutput | str = (
        _loss_at_labels(model, base, body, labels, index, targets, chunk, with_entropy)
        if obstacle is None
        else obstacle
    )
    if isinstance(result, str):
        result = _loss_of_model(model, base, inputs, index, result, chunk, with_entropy)
    return _normalised(result, num_items_in_batch)


@dataclass(frozen=True)
class _Summed(LossOutput):
    """``loss`` is the sum over the supervised tokens; ``extra`` is added after the division."""

    extra: Tensor | None = None


def _normalised(output: LossOutput, items: Tensor | int | None) -> LossOutput:
    divisor = output.count if items is None else items
    if isinstance(divisor, Tensor):
        divisor = divisor.to(output.loss.device)
    loss = output.loss / divisor
    extra = output.extra if isinstance(output, _Summed) else None
    return LossOutput(
        loss if extra is None else loss + extra,
        output.count,
        output.entropy,
        output.loss.detach(),
    )


def _unwrap(model: nn.Module) -> tuple[nn.Module, str | None]:
    """The Transformers model inside its wrappers, and what stands in the way, if anything."""
    obstacle: str | None = None
    while True:
        if hasattr(model, "_orig_mod"):
            # A compiled graph ignores hooks that are set afterwards.
            obstacle = "the whole model is compiled; compile model.get_decoder() instead"
            model = cast(nn.Module, model._orig_mod)
        elif type(model).__module__.startswith(("torch.nn.parallel", "torch.distributed")):
            inner = getattr(model, "module", None)
            if not isinstance(inner, nn.Module):
                return model, obstacle
            model = inner
        elif type(model).__module__.startswith("peft.") and hasattr(model, "get_base_model"):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                obstacle = "PEFT prompt learning changes the length of the sequence"
            model = cast(Any, model).get_base_model()
        else:
            return model, obstacle


def _obstacle(base: nn.Module) -> str | None:
    """Why the head of this model cannot be taken apart, or None. Cheap: asked at every step."""
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TrainingError(
            "lorasmith trains decoder-only language models.",
            expected="a model for causal language modelling",
            got=f"the encoder-decoder {type(base).__name__}",
        )
    get_head = getattr(base, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if not isinstance(head, nn.Module):
        return "it has no output head (get_output_embeddings() gives none)"
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and (hasattr(weight, "full_tensor") or weight.numel() == 0):
        return "the head's weight is sharded over several devices"
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(base, "loss_function", None) is not ForCausalLMLoss:
        return "its loss is not the usual causal cross-entropy"
    return None


def _plain_head(head: nn.Module) -> bool:
    """Whether the head is exactly x Wᵀ + b, with nothing attached to it."""
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.is_floating_point()
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and "forward" not in head.__dict__  # accelerate's device hooks replace it
    )


def _after_head(base: nn.Module) -> _AfterHead:
    """Scale and soft cap between the head's output and the logits, from the configuration."""
    config: Any = getattr(base, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value:
            # Granite's scaling divides, the others multiply.
            scale *= 1.0 / value if name == "logits_scaling" else float(value)
    cap = getattr(config, "final_logit_softcapping", None)
    return scale, float(cap) if cap else None


_AfterHead = tuple[float, "float | None"]

# Models whose post-head arithmetic was compared with their own logits: what the configuration
# declares, and what was found true of the model (None: nothing that is known here).
_VERIFIED: weakref.WeakKeyDictionary[nn.Module, tuple[_AfterHead, _AfterHead | None]]
_VERIFIED = weakref.WeakKeyDictionary()

# Models whose user has been told why the full logits are computed.
_WARNED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()

# Multiples of a real hidden state shown to the head in that comparison, so that a soft cap is
# seen where it bends and where it is flat.
_PROBE_SCALES = (1.0, 16.0, 256.0, 4096.0)


def _loss_at_labels(
    model: nn.Module,
    base: nn.Module,
    body: dict[str, Any],
    labels: Tensor,
    index: Tensor,
    targets: Tensor,
    chunk: int | None,
    with_entropy: bool,
) -> _Summed | str:
    """The summed loss, or the reason why it cannot be had this way."""
    plain = _plain_head(cast(Any, base).get_output_embeddings())
    found = _head_input(model, base, body, labels.shape)
    if isinstance(found, str):
        return found
    hidden, head, scale, cap = found.hidden, found.head, found.scale, found.cap
    index, targets = index.to(hidden.device), targets.to(hidden.device)
    _check_targets(targets, found.vocabulary)
    # The loss runs outside the model's forward, hence outside accelerate's autocast: repeat it.
    with found.autocast():
        if plain:
            weight, bias = cast(Tensor, head.weight), cast("Tensor | None", head.bias)
            flat = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
            call = _Chunked(
                rows=_chunk_rows(chunk, found.vocabulary, hidden.device),
                scale=scale,
                cap=cap,
                entropy=with_entropy,
                gradient=torch.is_grad_enabled(),
                per_row=False,
                compute_dtype=found.autocast_dtype or weight.dtype,
            )
            loss, entropy = _apply(flat, weight, bias, targets, call)
        else:
            loss, entropy = _cross_entropy_through(
                head, hidden, index, targets, scale, cap, chunk, found.vocabulary, with_entropy
            )
    return _Summed(loss, index.numel(), entropy, extra=_auxiliary_loss(base, found.output))


@dataclass(frozen=True)
class HeadInput:
    """A forward pass that stopped before the output head.

    Attributes:
        hidden: What enters the head, [batch, T, d].
        head: The head.
        scale: Factor on what the head gives.
        cap: Soft cap of it, or None.
        vocabulary: Number of logits a position.
        autocast_dtype: To which autocast brought the products, or None.
        output: What the model returned; its logits are of no use.
    """

    hidden: Tensor
    head: nn.Module
    scale: float
    cap: float | None
    vocabulary: int
    autocast_dtype: torch.dtype | None
    output: Any

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """As it was inside the model's forward pass."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.hidden.device.type, dtype=self.autocast_dtype)

    def logits(self, rows: Tensor) -> Tensor:
        """Logits [n, vocab] of some of the hidden states [n, d]."""
        with self.autocast():
            found = self.head(rows.unsqueeze(0)).squeeze(0)
            return _to_logits(found.to(_soft_dtype(found.dtype)), self.scale, self.cap)


def head_input(model: nn.Module, inputs: Mapping[str, Any]) -> HeadInput | str:
    """A causal language model's forward pass without its logits, or why that cannot be.

    Args:
        model: A ``transformers`` model for causal language modelling, wrapped or not.
        inputs: The model's keyword arguments without labels; ``input_ids`` [batch, T].

    Raises:
        TrainingError: The model is an encoder-decoder.
    """
    base, obstacle = _unwrap(model)
    if obstacle is None:
        obstacle = _obstacle(base)
    if obstacle is not None:
        return obstacle
    return _head_input(model, base, dict(inputs), inputs["input_ids"].shape)


def _head_input(
    model: nn.Module, base: nn.Module, body: dict[str, Any], shape: torch.Size
) -> HeadInput | str:
    head = cast(nn.Module, cast(Any, base).get_output_embeddings())
    declared = _after_head(base)
    known = _VERIFIED.get(base)
    verify = known is None or known[0] != declared
    seen: list[tuple[Tensor, torch.dtype | None]] = []
    head_outputs: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["input"]
        seen.append((hidden, _autocast_dtype(hidden.device)))
        last = hidden[..., -1:, :].contiguous()
        if verify:
            last = torch.cat([last * factor for factor in _PROBE_SCALES], dim=-2)
        return (last, *args[1:]) if args else args, kwargs if args else {**kwargs, "input": last}

    def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        if verify:
            # A copy: some models scale or cap the logits in place.
            head_outputs.append(output.detach().clone())

    if "use_cache" in inspect.signature(type(base).forward).parameters:
        body.setdefault("use_cache", False)
    handles = [
        head.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        head.register_forward_hook(after),
    ]
    try:
        out = model(**body, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != 1:
        return f"its head ran {len(seen)} times in one forward pass"
    hidden, autocast_dtype = seen[0]
    if hidden.shape[:-1] != shape:
        return f"its head saw {list(hidden.shape[:-1])} positions, not {list(shape)}"
    if known is None or verify:
        known = (declared, _agreeing(declared, head_outputs[0], out.logits.detach()))
        _VERIFIED[base] = known
    if known[1] is None:
        return _UNKNOWN_AFTER_HEAD
    return HeadInput(hidden, head, *known[1], out.logits.shape[-1], autocast_dtype, out)


_UNKNOWN_AFTER_HEAD = "it changes the logits after the head in a way that lorasmith does not know"


def _agreeing(declared: _AfterHead, head_output: Tensor, logits: Tensor) -> _AfterHead | None:
    """The scale and cap that turn the head's output into the model's logits, if these do.

    A declared scale may have been applied before the head (MiniCPM 3), or a declared cap not
    at all, so each is also tried without.
    """
    scale, cap = declared
    for candidate in dict.fromkeys([(scale, cap), (1.0, cap), (scale, None), (1.0, None)]):
        if _agree(_to_logits(head_output.float(), *candidate), logits):
            return candidate
    return None


def _agree(expected: Tensor, got: Tensor) -> bool:
    """Whether two [..., vocab] tensors are equal up to the rounding of the second one's dtype."""
    if expected.shape != got.shape:
        return False
    tolerance = 1e-4 if got.dtype in (torch.float32, torch.float64) else 2e-2
    got = got.float()
    finite = expected.isfinite() & got.isfinite()  # the largest probe overflows float16
    zero = torch.zeros(())
    expected, got = (
        torch.where(finite, tensor, zero.to(tensor.device)) for tensor in (expected, got)
    )
    size = expected.abs().amax(dim=-1)
    return bool(((expected - got).abs().amax(dim=-1) <= tolerance * size).all())


def _auxiliary_loss(base: nn.Module, out: Any) -> Tensor | None:
    """Router loss of a mixture of experts, weighted as the model's own forward weighs it."""
    auxiliary = getattr(out, "aux_loss", None)
    if not isinstance(auxiliary, Tensor):
        return None
    weight: Any = getattr(base, "router_aux_loss_coef", None)
    if weight is None:
        weight = getattr(base.config, "router_aux_loss_coef", 0.0)
    return auxiliary * float(weight)


def _loss_of_model(
    model: nn.Module,
    base: nn.Module,
    inputs: Mapping[str, Any],
    index: Tensor,
    reason: str,
    chunk: int | None,
    with_entropy: bool,
) -> LossOutput:
    """The model's own loss over its full logits, with a warning that names the reason."""
    if _WARNED.get(base) != reason:
        _WARNED[base] = reason
        warnings.warn(
            f"{type(base).__name__}: the loss is computed from the full logits, which takes more "
            f"time and memory, because {reason}.",
            stacklevel=4,
        )
    out = model(**inputs, return_dict=True)
    count = index.numel()
    entropy = None
    if with_entropy:
        logits = out.logits.detach()
        flat = logits.reshape(-1, logits.shape[-1])
        size = _chunk_rows(chunk, flat.shape[-1], flat.device)
        parts = []
        for rows in torch.split(index.to(flat.device), size):
            log_p = flat[rows].float().log_softmax(dim=-1)
            parts.append(-torch.einsum("nv,nv->n", log_p.exp(), log_p))
        entropy = torch.cat(parts)
    # The model's loss is a mean over the supervised tokens; the sum is what accumulates.
    return LossOutput(out.loss * count, count, entropy)
