"""What a dynamic is: a rule that acts on an adapter while it is trained.

A rule sees the training from a few fixed moments and never from inside a loop, so that the
same rule works in a plain loop, in Transformers' Trainer and in ours:

    bind           once: the model, its low-rank sites, the optimiser
    select         before a forward pass: which task each row of the batch belongs to
    before_step    gradients are complete (accumulated, unscaled, clipped, averaged over
                   processes) and the optimiser is about to use them; a rule may add to them
    after_step     the optimiser has moved the parameters; a rule may rewrite the factors
    on_evaluate    an evaluation has been made
    metrics        numbers for the log
    state_dict     all that a resumed run needs to go on bit for bit
    made_with      its options, which a resumed run is compared with

What the model did in between reaches a rule as :class:`Statistics` of the whole optimiser
step, over all its batches and processes. They are tensors on the model's device: a rule that
calls ``float()`` on one in every step makes the device wait, and should not.

Penalties are added to gradients, in closed form, once a step: the loss that is reported is
the task's alone.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lorasmith.core.layers import LayerInfo
from lorasmith.core.variant import Factors

if TYPE_CHECKING:
    from lorasmith.dynamics.context import Context

__all__ = ["Dynamic", "Need", "Site", "Statistics", "Step"]

#: What a rule may want to know of each step beyond the loss.
Need = Literal["entropy", "tasks"]


@dataclass(frozen=True, eq=False)
class Site:
    """One adapted layer whose factors are trained: ΔW = scaling · (B A − B0 A0).

    Attributes:
        adapter: Name of the adapter.
        name: Name of the module.
        factors: The live factors; ``A`` and ``B`` are parameters of the model.
        magnitude: DoRA's magnitudes [d_out], live, or ``None``.
    """

    adapter: str
    name: str
    factors: Factors
    magnitude: Tensor | None = None

    @property
    def key(self) -> str:
        """Under which name a rule's state keeps what belongs here."""
        return f"{self.adapter}/{self.name}"

    @property
    def A(self) -> nn.Parameter:  # noqa: N802 - the field's name
        """[r, d_in]."""
        return cast("nn.Parameter", self.factors.A)

    @property
    def B(self) -> nn.Parameter:  # noqa: N802
        """[d_out, r]."""
        return cast("nn.Parameter", self.factors.B)

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return self.factors.scaling

    @property
    def rank(self) -> int:
        """r."""
        return self.factors.rank

    @property
    def info(self) -> LayerInfo | None:
        """The layer underneath, where there is one that lorasmith knows."""
        return None if self.factors.base is None else self.factors.base.info


@dataclass(frozen=True)
class Statistics:
    """What the model did in one optimiser step, over all of its batches and processes.

    Attributes:
        tokens: Number of supervised tokens (rows, for a classifier), 0-dimensional.
        loss: Mean cross-entropy a supervised token in nats, 0-dimensional; without any
            penalty. ``None`` if nothing was observed.
        entropy: Mean entropy of the model's distribution at supervised positions in nats,
            0-dimensional; ``None`` unless some rule needs it.
        tasks: Task → (mean loss, tokens), each 0-dimensional. A task that was not seen in the
            step is missing, or has 0 tokens (with several processes).
    """

    tokens: Tensor | None = None
    loss: Tensor | None = None
    entropy: Tensor | None = None
    tasks: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Step:
    """One optimiser step, as the rules see it.

    Attributes:
        number: Optimiser steps done before this one, since training began (resumes included).
        statistics: What the model did.
        optimizer: The optimiser that steps.
        skipped: Whether the parameters stay as they are in this step.
    """

    def __init__(
        self,
        number: int,
        statistics: Statistics,
        optimizer: torch.optim.Optimizer,
        gradient_scale: Tensor | None = None,
    ) -> None:
        self.number = number
        self.statistics = statistics
        self.optimizer = optimizer
        self.skipped = False
        #: Whether a rule has added to a gradient.
        self.gradient_added = False
        self._gradient_scale = gradient_scale
        #: Product of the factors asked for; the driver applies and takes back.
        self.learning_rate_factor = 1.0

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """A parameter's gradient in the loss's own scale; ``None`` if it has none."""
        if parameter.grad is None or self._gradient_scale is None:
            return parameter.grad
        return parameter.grad / self._gradient_scale

    def add_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        """Adds to a parameter's gradient; does nothing if it has none in this step.

        A parameter without a gradient took no part in the step: a penalty on it would move
        what the user has frozen or not used.
        """
        if parameter.grad is None:
            return
        self.gradient_added = True
        if self._gradient_scale is not None:  # a fused optimiser unscales by itself
            gradient = gradient * self._gradient_scale
        parameter.grad.add_(gradient.to(parameter.grad.dtype))

    def scale_learning_rate(self, factor: float) -> None:
        """Multiplies the learning rate of every parameter group, for this step alone."""
        self.learning_rate_factor *= factor

    def skip(self) -> None:
        """Leaves all parameters and the optimiser's state as they are in this step."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self.skipped = True


def plain(value: Any) -> Any:
    """A value as a checkpoint can hold and compare it: numbers, texts, lists and dicts.

    A rule becomes ``{name: its options}``, a function its name, and anything else (data, for
    example) the name of its type: of such things only so much is compared.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):  # NumPy's, too, which a checkpoint cannot hold
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Dynamic):
        return {value.name: value.made_with()}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple) and len(value) <= _LONGEST:
        return [plain(one) for one in value]
    if callable(value):
        return f"{getattr(value, '__qualname__', type(value).__qualname__)}()"
    return type(value).__qualname__


#: Longer sequences are data, not options.
_LONGEST = 64


class Dynamic:
    """Base class of the rules: every moment does nothing until a rule says what.

    One instance belongs to one training run.
    """

    #: Name in logs, in checkpoints and on the command line.
    name: ClassVar[str]
    #: What must be observed for it.
    needs: frozenset[Need] = frozenset()
    #: Whether it adds and removes adapters; its state is loaded before that of the others,
    #: which may be of layers that are there only then.
    makes_sites: ClassVar[bool] = False
    #: Whether it leaves B A as it is, and wants to be the last to move the factors after a
    #: step: nobody else then notices, and what it brings about holds.
    last: ClassVar[bool] = False

    #: Set by :meth:`bind`.
    context: Context
    #: The arguments of the outermost ``__init__``, defaults included.
    _arguments: Mapping[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _noting(cls.__init__)  # type: ignore[method-assign]

    def made_with(self) -> dict[str, Any]:
        """What the rule was made with: option → value, in the form of :func:`plain`.

        It goes into checkpoints, and a run that resumes with other values is told. By default
        the arguments of the class, defaults included; a rule may leave some out.
        """
        return {key: plain(value) for key, value in getattr(self, "_arguments", {}).items()}

    def bind(self, context: Context) -> None:
        """Gets to know the model; called once, before the first step.

        Raises:
            LorasmithError: If the rule cannot work on what was found.
        """
        self.context = context
        self.on_sites(context.sites)

    def on_sites(self, sites: Sequence[Site]) -> None:
        """The sites to act on: when bound, and again whenever adapters come or go."""

    def select(self, tasks: Sequence[str]) -> None:
        """The tasks of the rows of the batch that is about to be computed."""

    def before_step(self, step: Step) -> None:
        """May add to gradients, scale the learning rate, or skip the step."""

    def after_step(self, step: Step) -> None:
        """May rewrite the factors."""

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        """An evaluation was made; ``"eval_loss"`` is the task's loss."""

    def metrics(self) -> dict[str, float]:
        """Numbers for the log; called when a log is written, and may wait for the device."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that changes: tensors, numbers, texts, ``None``, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state; called after :meth:`bind`."""

    def close(self) -> None:
        """Training is over; takes back what must not stay on the model."""


def _noting(init: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` that notes its arguments, unless that of a subclass has done so."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def noting(self: Dynamic, *args: Any, **kwargs: Any) -> None:
        if "_arguments" not in self.__dict__:
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError:
                pass  # the call says what is wrong
            else:
                bound.apply_defaults()
                found = dict(list(bound.arguments.items())[1:])
                for name, parameter in signature.parameters.items():
                    if parameter.kind is parameter.VAR_KEYWORD:
                        found |= found.pop(name)
                self._arguments = found
        init(self, *args, **kwargs)

    return noting
