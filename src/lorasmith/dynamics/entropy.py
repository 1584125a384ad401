"""Entropy of the model's predictions, and the governor that sets a penalty's weight by it.

For logits z_i [vocab] at a supervised position i, with m_i = max_v z_iv:

    L_i = log Σ_v exp(z_iv − m_i) − (z_i,y_i − m_i)                     cross-entropy, nats
    H_i = log Σ_v exp(z_iv − m_i) − Σ_v p_iv (z_iv − m_i)               entropy, nats
    p_i = softmax(z_i)

Both come from one pass over the logits in tiles that together stay below a tenth of the
logits' memory, whatever their dtype, number of positions and vocabulary. A vocabulary that
is masked with −∞ counts as absent.

**Governor** (EgoRA's). With H the mean of H_i over the supervised tokens of the whole
optimiser step, the penalty's gradient is added with the weight

    λ = max(α H, floor)        α = e/2,  floor = ln 2

so the less certain the model is, the more it is held back. α adapts to the trend of the
generalisation gap: after evaluation k, with gap_k the validation loss minus the mean
training loss since the evaluation before,

    g_k = β g_{k−1} + (1 − β) gap_k,  β = 0.7,  g_1 = gap_1
    t = clip((g_k − g_{k−1}) / |g_{k−1}|, −1, 1)
    α ← clip(α · (1 + 0.15 t, or 1.45 where t > 0.5), 0.05, 3)          from k = 3 on

and, if a cooldown is wanted, α ← 0.95 α after every 3 evaluations in a row with t ≤ 0.
Without evaluations α stays as it is. λ is a tensor on the device: no step waits for it.

λ has the size 1.4 to 3 for what EgoRA adds up over all sites; here the penalty is by default
the mean over the sites (``OrthogonalityPenalty(scale=...)``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lorasmith.core.lowrank import no_autocast
from lorasmith.dynamics.orthogonality import OrthogonalityPenalty, Penalty
from lorasmith.dynamics.protocol import Dynamic, Need, Site, Step, plain
from lorasmith.errors import ConfigError, DataError, TrainingError

if TYPE_CHECKING:
    from lorasmith.dynamics.context import Context

__all__ = ["EntropyGovernor", "TokenStatistics", "token_statistics"]

# The tiles that are alive at one time take at most this share of the logits' bytes ...
_SHARE = 12
# ... and of a large batch no more than this: 32 MiB of float32 stay in the cache's reach on a
# CPU, an accelerator wants larger ones for fewer launches.
_TILE_CPU = 2**23
_TILE_ACCELERATOR = 2**26
# exp of it is 0 in float64 too, and times 0 it is 0, which −∞ is not.
_ABSENT = -1000.0


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """Loss and entropy at every position of a batch, detached.

    The shapes are those of the labels: [batch, T], or [batch] for a classifier. Position t
    is the one whose logits predict, so with a shift its label stands at t + 1.

    Attributes:
        loss: Cross-entropy in nats, float32; 0 where nothing is supervised.
        entropy: Entropy in nats, float32; 0 where nothing is supervised. ``None`` if it was
            not asked for.
        supervised: Mask of the positions that predict a label.
    """

    loss: Tensor
    entropy: Tensor | None
    supervised: Tensor

    @property
    def tokens(self) -> Tensor:
        """Number of supervised positions, 0-dimensional int64."""
        return self.supervised.sum()

    @property
    def mean_loss(self) -> Tensor:
        """Mean loss a supervised position, 0-dimensional; NaN where there is none."""
        return _mean(self.loss, self.tokens)

    @property
    def mean_entropy(self) -> Tensor | None:
        """Mean entropy a supervised position, 0-dimensional; NaN where there is none."""
        return None if self.entropy is None else _mean(self.entropy, self.tokens)


def token_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = True,
    ignore_index: int = -100,
    chunk: int | None = None,
    entropy: bool = True,
) -> TokenStatistics:
    """Loss and entropy of a model's predictions at its supervised positions.

    On an accelerator nothing waits for the device: every position is computed, and masked
    afterwards. On a CPU only the supervised ones are.

    Args:
        logits: [batch, T, vocab] or [batch, classes], any float dtype, any strides.
        labels: [batch, T] or [batch], integers. What stands at ignored positions is not read.
        shift: Whether position t predicts label t + 1, as in a causal language model, rather
            than label t.
        ignore_index: The label of what is not supervised.
        chunk: Elements of the logits worked on at a time; by default as many as a twelfth
            of the logits' memory allows.
        entropy: Whether the entropy is wanted.

    Returns:
        The statistics; equal to the dense float64 formulas to 1e-6 (of a nat, and relative).

    Raises:
        DataError: If the shapes do not fit, the labels are not integers or (seen on CPU
            only) a supervised label is outside the vocabulary.
        ConfigError: If ``chunk`` is below 1.
    """
    if logits.dim() != labels.dim() + 1 or logits.shape[:-1] != labels.shape:
        raise DataError(
            "Logits and labels do not belong together.",
            expected="logits [batch, T, vocab] and labels [batch, T], or [batch, classes] and "
            "[batch]",
            got=f"logits {list(logits.shape)} and labels {list(labels.shape)}",
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            "An entropy needs labels that are classes.", expected="integers", got=labels.dtype
        )
    if chunk is not None and chunk < 1:
        raise ConfigError("The chunk is too small.", expected=">= 1", got=chunk, key="chunk")
    with torch.no_grad(), no_autocast(logits):
        return _statistics(
            logits.detach(),
            labels.detach(),
            shift,
            ignore_index,
            chunk,
            entropy,
            pick=logits.device.type == "cpu",
        )


def _statistics(
    logits: Tensor,
    labels: Tensor,
    shift: bool,
    ignore_index: int,
    chunk: int | None,
    entropy: bool,
    pick: bool,
) -> TokenStatistics:
    """The statistics; with ``pick`` only supervised rows are read, which needs their number."""
    device = logits.device
    targets = labels.to(device)
    if shift:
        targets = torch.nn.functional.pad(targets, (0, 1), value=ignore_index)[..., 1:]
    supervised = targets != ignore_index
    targets = torch.where(supervised, targets, 0).long()
    vocabulary = logits.shape[-1]
    loss = torch.zeros(targets.shape, dtype=torch.float32, device=device)
    entropies = torch.zeros_like(loss) if entropy else None
    if pick and targets.numel():
        _check_targets(targets, vocabulary)
    # Bytes alive at one time for each element of a tile: z and p, and the rows picked.
    soft = torch.float64 if logits.dtype == torch.float64 else torch.float32
    alive = 2 * soft.itemsize + (logits.itemsize if pick else 0)
    if chunk is None:
        chunk = logits.numel() * logits.itemsize // (_SHARE * alive)
        chunk = min(chunk, _TILE_CPU if device.type == "cpu" else _TILE_ACCELERATOR)
    rows, columns = max(1, chunk // max(1, vocabulary)), max(1, min(chunk, vocabulary))
    for z, y, mask, out, out_entropy in _matrices(logits, targets, supervised, loss, entropies):
        if pick:
            for index in torch.split(mask.nonzero().squeeze(-1), rows):
                got, got_entropy = _rows(z, index, y[index], columns, soft, entropy)
                out.index_copy_(0, index, got)
                if out_entropy is not None and got_entropy is not None:
                    out_entropy.index_copy_(0, index, got_entropy)
            continue
        for start in range(0, z.shape[0], rows):
            part = slice(start, start + rows)
            got, got_entropy = _rows(z[part], None, y[part], columns, soft, entropy)
            out[part] = torch.where(mask[part], got, 0.0)
            if out_entropy is not None and got_entropy is not None:
                out_entropy[part] = torch.where(mask[part], got_entropy, 0.0)
    return TokenStatistics(loss, entropies, supervised)


def _matrices(
    logits: Tensor, targets: Tensor, supervised: Tensor, loss: Tensor, entropies: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
    """The batch as matrices [positions, vocab] without copying the logits: one if it can be."""
    if logits.dim() == 2:
        yield logits, targets, supervised, loss, entropies
        return
    try:
        flat = logits.view(-1, logits.shape[-1])
    except RuntimeError:  # a slice of longer rows
        for i in range(logits.shape[0]):
            own = None if entropies is None else entropies[i]
            yield logits[i], targets[i], supervised[i], loss[i], own
        return
    own = None if entropies is None else entropies.view(-1)
    yield flat, targets.reshape(-1), supervised.reshape(-1), loss.view(-1), own


def _rows(
    logits: Tensor,
    index: Tensor | None,
    targets: Tensor,
    columns: int,
    soft: torch.dtype,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss and entropy [n], float32, of the rows of ``logits`` [·, vocab], or those picked."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    vocabulary = logits.shape[-1]
    blocks = [slice(c, c + columns) for c in range(0, vocabulary, columns)]
    tops = [_pick(logits[:, block], index).amax(dim=-1) for block in blocks]
    top = tops[0] if len(tops) == 1 else torch.stack(tops).amax(dim=0)
    total = torch.zeros(targets.shape, dtype=wide, device=logits.device)
    weighted = torch.zeros_like(total)
    for block in blocks:
        _add_tile(logits[:, block], index, top.to(soft).unsqueeze(-1), total, weighted, entropy)
    log_total = total.log()
    # Of one element a row: exact, where float32 would round a difference of 20 to 1e-6.
    at_target = (
        logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if index is None
        else logits[index, targets]
    )
    loss = log_total - (at_target.to(wide) - top.to(wide))
    if not entropy:
        return loss.float(), None
    # Rounding must not make a certain prediction's entropy negative.
    return loss.float(), (log_total - weighted / total).clamp(min=0.0).float()


def _pick(logits: Tensor, index: Tensor | None) -> Tensor:
    return logits if index is None else logits.index_select(0, index)


def _add_tile(
    logits: Tensor,
    index: Tensor | None,
    top: Tensor,
    total: Tensor,
    weighted: Tensor,
    entropy: bool,
) -> None:
    """Adds Σ exp z and Σ z exp z of one tile; a function, so that its tensors die with it."""
    z = torch.sub(_pick(logits, index).to(top.dtype), top).clamp_(min=_ABSENT)
    p = z.exp()
    total += p.sum(dim=-1)
    if entropy:
        # In place, not as a matrix product: that one may run in TensorFloat-32.
        weighted += p.mul_(z).sum(dim=-1)


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    low, high = torch.aminmax(targets)
    if int(low) < 0 or int(high) >= vocabulary:
        raise DataError(
            "A label lies outside the vocabulary.",
            expected=f"0 to {vocabulary - 1}, or the index to ignore",
            got=int(low) if int(low) < 0 else int(high),
            fix="use the tokenizer that belongs to this model",
        )


def _mean(values: Tensor, tokens: Tensor) -> Tensor:
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    return (values.sum(dtype=wide) / tokens).float()


# -- the governor --------------------------------------------------------------------------

_BETA = 0.7
_GAIN, _ALARM, _ALARM_GAIN = 0.15, 0.5, 0.45
_WARM_UP = 2
_BOUNDS = (0.05, 3.0)
_COOLDOWN = 0.95


class EntropyGovernor(Dynamic):
    """Drives a penalty with a weight that follows the entropy of the model's predictions.

        ls.Dynamics(model, ls.EntropyGovernor(), optimizer)

    The penalty is bound, driven and saved by the governor: it is not a rule of its own.

    Args:
        penalty: What is driven: any rule with ``apply(step, weight)``, ``value()`` and a
            ``weight`` (on which λ is a factor), such as an :class:`OrthogonalityPenalty` or
            a ``RotationBudget`` that penalises. Default: the spectral orthogonality penalty.
        alpha: α at the start, λ for each nat of entropy.
        floor: Lowest λ.
        adaptive: Whether α follows the evaluations.
        cooldown: Whether α also falls after every ``patience`` evaluations in a row in
            which the gap has not grown.
        patience: See ``cooldown``.

    Attributes:
        alpha: α now.
        history: One record for each evaluation that counted: ``step``, ``gap``, ``ema``,
            ``trend`` (``None`` for the first) and ``alpha`` (afterwards).

    Raises:
        ConfigError: A value cannot be used.
    """

    name: ClassVar[str] = "entropy"

    def __init__(
        self,
        penalty: Penalty | None = None,
        *,
        alpha: float = math.e / 2,
        floor: float = math.log(2),
        adaptive: bool = True,
        cooldown: bool = False,
        patience: int = 3,
    ) -> None:
        for key, value in (("alpha", alpha), ("floor", floor)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"{key} cannot be {value!r}.",
                    expected="a finite number of at least 0",
                    got=value,
                    key=key,
                )
        if patience < 1:
            raise ConfigError("No patience.", expected=">= 1", got=patience, key="patience")
        if penalty is None:
            penalty = OrthogonalityPenalty()
        if not isinstance(penalty, Penalty):
            raise ConfigError(
                "That is not a penalty that a governor can drive.",
                expected="a rule with apply(step, weight), value() and a weight",
                got=repr(penalty),
                key="penalty",
            )
        if getattr(penalty, "kind", None) == "projection":
            raise ConfigError(
                "A projection has no weight that a governor could set.",
                expected="a rule that adds a penalty",
                got=repr(penalty),
                fix='RotationBudget(kind="penalty")',
                key="penalty",
            )
        self.penalty: Penalty = penalty
        self.needs = penalty.needs | frozenset[Need]({"entropy"})
        self.alpha = float(alpha)
        self.floor = float(floor)
        self.adaptive = adaptive
        self.cooldown = cooldown
        self.patience = patience
        self.history: list[dict[str, Any]] = []
        self._step = 0
        self._ema: float | None = None
        self._calm = 0
        # λ and H of the last step, and Σ loss · tokens, Σ tokens since the last evaluation.
        self._lambda: Tensor | None = None
        self._entropy: Tensor | None = None
        self._sums: Tensor | None = None

    def made_with(self) -> dict[str, Any]:
        """What it was made with; the penalty with its own options, also the default one."""
        return super().made_with() | {"penalty": plain(self.penalty)}

    def bind(self, context: Context) -> None:
        self.context = context
        self.penalty.bind(context)

    def on_sites(self, sites: Sequence[Site]) -> None:
        self.penalty.on_sites(sites)

    def select(self, tasks: Sequence[str]) -> None:
        self.penalty.select(tasks)

    def before_step(self, step: Step) -> None:
        entropy = step.statistics.entropy
        if entropy is None:
            raise TrainingError(
                "The entropy governor needs the entropy of the model's predictions.",
                expected="logits and labels (classes, not numbers), observed in every step",
                got="none since the last optimiser step",
                fix="call the model with labels, or observe(logits=…, labels=…) in the loop",
            )
        with torch.no_grad():
            entropy = entropy.detach().float()
            # A NaN would spread from here over all weights; the loss reports it elsewhere.
            governed = torch.where(entropy.isfinite(), self.alpha * entropy, 0.0)
            self._lambda, self._entropy = governed.clamp(min=self.floor), entropy
            self._add_loss(step)
            self.penalty.apply(step, self._lambda * self.penalty.weight)
        self._step = step.number + 1

    def _add_loss(self, step: Step) -> None:
        loss, tokens = step.statistics.loss, step.statistics.tokens
        if not self.adaptive or loss is None or tokens is None:
            return
        dtype = torch.float32 if loss.device.type == "mps" else torch.float64
        loss, tokens = loss.detach().to(dtype), tokens.detach().to(dtype)
        usable = loss.isfinite()
        new = torch.stack((torch.where(usable, loss * tokens, 0.0), usable * tokens))
        self._sums = new if self._sums is None else self._sums.to(new.device) + new

    def after_step(self, step: Step) -> None:
        self.penalty.after_step(step)

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        self.penalty.on_evaluate(metrics)
        if not self.adaptive:
            return
        validation = metrics.get("eval_loss")
        if validation is None or not math.isfinite(validation):
            warnings.warn(
                "The entropy governor leaves α as it is: the evaluation has no finite "
                f"'eval_loss' (got {validation!r}; there are {', '.join(metrics) or 'none'}).",
                stacklevel=2,
            )
            return
        loss, tokens = (0.0, 0.0) if self._sums is None else self._sums.tolist()
        self._sums = None
        if tokens == 0:  # nothing was trained since the last one: there is no new gap
            return
        self._adapt(float(validation) - loss / tokens)

    def _adapt(self, gap: float) -> None:
        before, self._ema = self._ema, gap
        trend = None
        if before is not None:
            self._ema = _BETA * before + (1 - _BETA) * gap
            trend = (self._ema - before) / max(abs(before), 1e-12)
            trend = max(-1.0, min(1.0, trend))
            if len(self.history) >= _WARM_UP:
                self.alpha *= 1 + (_ALARM_GAIN if trend > _ALARM else _GAIN * trend)
                self._cool(trend)
                self.alpha = max(_BOUNDS[0], min(_BOUNDS[1], self.alpha))
        self.history.append(
            {
                "step": self._step,
                "gap": gap,
                "ema": self._ema,
                "trend": trend,
                "alpha": self.alpha,
            }
        )

    def _cool(self, trend: float) -> None:
        self._calm = self._calm + 1 if trend <= 0 else 0
        if self.cooldown and self._calm >= self.patience:
            self.alpha *= _COOLDOWN
            self._calm = 0

    def value(self) -> Tensor:
        """The penalty at the present factors, without weight, 0-dimensional."""
        return self.penalty.value()

    def metrics(self) -> dict[str, float]:
        """``lambda`` and ``entropy`` of the last step, ``alpha``, and the penalty's own."""
        found = {"alpha": self.alpha}
        if self._lambda is not None and self._entropy is not None:
            found["lambda"] = float(self._lambda)
            found["entropy"] = float(self._entropy)
        return found | self.penalty.metrics()

    def state_dict(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "ema": self._ema,
            "calm": self._calm,
            "step": self._step,
            "history": [dict(record) for record in self.history],
            "lambda": None if self._lambda is None else self._lambda.clone(),
            "entropy": None if self._entropy is None else self._entropy.clone(),
            "sums": None if self._sums is None else self._sums.clone(),
            "penalty": self.penalty.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.penalty.load_state_dict(state["penalty"])
        self.alpha, self._ema = state["alpha"], state["ema"]
        self._calm, self._step = state["calm"], state["step"]
        self.history = [dict(record) for record in state["history"]]
        self._lambda, self._entropy, self._sums = (
            None if state[key] is None else state[key].clone()
            for key in ("lambda", "entropy", "sums")
        )

    def close(self) -> None:
        self.penalty.close()
