"""One implementation that drives the rules, whatever the loop: hooks on optimiser and model.

The optimiser's own step hooks are the one place that every loop passes exactly once an
optimiser step: after accumulation, unscaling, clipping and the average over processes, and
not at all in a step that ``GradScaler`` drops. So a plain loop, Transformers' Trainer, TRL
and ours need nothing else.

The rules' state travels inside the optimiser's ``state_dict``, and so in the checkpoints of any
loop that saves its optimiser: :mod:`~.carried_state`. Parameters that rules add, and the average
of their gradients over processes: :mod:`~.context` and :mod:`~.added_gradients`.

A deep copy or a pickle of the model leaves the driver behind: the copy's hooks know none. They
observe nothing, and go on taking ``task`` out of the model's arguments, so that the copy can be
given the same batches.

What the model does is observed by a hook on its forward pass in training mode, or by calls
of :meth:`Dynamics.observe` from loops that compute their loss elsewhere: :mod:`~.observing`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorasmith.core.adapter import unwrap
from lorasmith.dynamics.added_gradients import AddedGradients
from lorasmith.dynamics.carried_state import (
    STATE_KEY,
    Changed,
    check_changed,
    check_fresh,
    check_state,
    put_in,
    state_of,
    take_out,
)
from lorasmith.dynamics.context import Context, check_owned, unwrap_optimizer
from lorasmith.dynamics.observing import TASK_KEY, Observer, tasks_of
from lorasmith.dynamics.protocol import Dynamic, Need, Site, Step
from lorasmith.dynamics.rules import as_rules, check_rules, warn_of_two_penalties
from lorasmith.dynamics.sites import active_adapter
from lorasmith.errors import ConfigError, TrainingError

__all__ = ["STATE_KEY", "TASK_KEY", "Context", "Dynamics", "unwrap_optimizer"]


class _ModelHook:
    """A hook on the model that a copy of the model does not bring the driver along with.

    A bound method would be copied with the driver, its rules and the optimiser, and the copy be
    observed by that second driver.
    """

    def __init__(self, driver: Dynamics | None, after: bool) -> None:
        self._driver = None if driver is None else weakref.ref(driver)
        self._after = after

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], *output: Any) -> Any:
        driver = None if self._driver is None else self._driver()
        if driver is not None:
            act: Any = driver._after_forward if self._after else driver._before_forward
            return act(module, args, kwargs, *output)
        if self._after or TASK_KEY not in kwargs:
            return None
        return args, {key: value for key, value in kwargs.items() if key != TASK_KEY}

    def __reduce__(self) -> tuple[Any, ...]:
        return _ModelHook, (None, self._after)


class Dynamics:
    """Makes rules act in any training loop, from now until it is closed.

        with ls.Dynamics(model, [ls.GaugeProjection(), ls.EntropyGovernor()], optimizer):
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Args:
        model: A model with an adapter of ours, a ``PeftModel`` (LoRA, rsLoRA, DoRA), or one
            with modules that carry ``lora_A`` and ``lora_B``; wrapped (DDP, compiled) or not.
        rules: What is to act, in order.
        optimizer: The optimiser that trains the adapter.
        adapter: Its name; by default the active one.
        tasks: Names of the tasks, where there are several; needed with several processes.
        observe: ``"auto"``: loss and entropy are taken from the model's output in training
            mode. ``"manual"``: the loop calls :meth:`observe`.
        changed: What to do when the state of the same rules comes from a checkpoint, but with
            other options or in another order, or when the optimiser has since made steps
            without them. ``"refuse"``: an error that says what differs. ``"accept"``: a warning;
            the present options act, on the state as it is (so α of an ``EntropyGovernor``, which
            is state, goes on from the checkpoint).

    Attributes:
        rules: The rules, in order.
        context: What they act on.
        steps: Optimiser steps done, those before a resume included.
        resumed: Whether the optimiser came with the rules' state from a checkpoint.

    Raises:
        UnknownNameError: The model has no low-rank adapter; the message says what was looked
            for.
        ConfigError: A rule cannot work on it.
        TrainingError: The optimiser comes with the state of other rules; see ``changed``.

    Warns:
        UserWarning: Two of the rules apply a penalty of the same kind.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Dynamic | Iterable[Dynamic],
        optimizer: torch.optim.Optimizer,
        *,
        adapter: str | None = None,
        tasks: Sequence[str] = (),
        observe: Literal["auto", "manual"] = "auto",
        changed: Changed = "refuse",
    ) -> None:
        self.rules = as_rules(rules)
        check_rules(self.rules)
        check_changed(changed)
        self.changed = changed
        if observe not in ("auto", "manual"):
            raise ConfigError("Unknown observe.", expected="auto or manual", got=repr(observe))
        self.steps = 0
        self._inner = unwrap(model)
        raw = unwrap_optimizer(optimizer)
        self._step: Step | None = None
        #: Groups whose learning rate is scaled at the moment, with the rate of before.
        self._rates: list[tuple[dict[str, Any], Any]] = []
        #: Whether the batch before said its task itself.
        self._named_by_batch = False
        self._handles: list[RemovableHandle] = []
        self._device = next((p.device for p in self._inner.parameters()), torch.device("cpu"))
        #: Added parameters that were taken out of the groups for a checkpoint to be loaded.
        self._waiting: list[tuple[str, nn.Parameter]] = []
        name = active_adapter(model, adapter)
        self.context = Context(
            self._inner, raw, name, tasks, self._on_sites, self._note_added_gradient
        )
        self._observer = Observer(self.context, self._needs_entropy)
        self._added_gradients = AddedGradients(self.context, self._device)
        check_owned(raw, self.context.sites)
        _check_alone(raw)
        bound: list[Dynamic] = []
        try:
            for rule in self.rules:
                rule.bind(self.context)
                bound.append(rule)
            self._install(raw, auto=observe == "auto")
            self.resumed = self._take_state()
        except BaseException:
            for handle in self._handles:
                handle.remove()
            for rule in bound:
                rule.close()
            self.context.close()
            raise
        warn_of_two_penalties(self.rules)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser whose steps are followed."""
        return self.context.optimizer

    @property
    def needs(self) -> frozenset[Need]:
        """What must be observed beyond the loss."""
        return frozenset[Need]().union(*(rule.needs for rule in self.rules))

    def _needs_entropy(self) -> bool:
        return "entropy" in self.needs

    # -- hooks, and what is observed ------------------------------------------------------------

    def _install(self, optimizer: torch.optim.Optimizer, *, auto: bool) -> None:
        keep = self._handles.append
        keep(optimizer.register_step_pre_hook(self._before_step))
        keep(optimizer.register_step_post_hook(self._after_step))
        keep(optimizer.register_state_dict_post_hook(self._into_state_dict))
        keep(optimizer.register_load_state_dict_pre_hook(self._before_load))
        keep(optimizer.register_load_state_dict_post_hook(self._after_load))
        module = self._inner
        before, after = (_ModelHook(self, after=late) for late in (False, True))
        keep(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        for site in self.context.sites:
            keep(site.B.register_post_accumulate_grad_hook(self._note_backward))  # type: ignore[no-untyped-call]
        if auto:
            keep(module.register_forward_hook(after, with_kwargs=True))

    def _before_forward(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._added_gradients.before_forward()
        if TASK_KEY not in kwargs:
            if self._named_by_batch:  # the one before said its task; this one has none
                self._observer.tasks, self._named_by_batch = None, False
            return None
        kwargs = dict(kwargs)
        self.select(kwargs.pop(TASK_KEY))
        self._named_by_batch = True
        return args, kwargs

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if module.training and torch.is_grad_enabled():
            self._observer.observe_output(output, kwargs.get("labels"))

    def select(self, task: str | int | Sequence[Any] | Tensor | None) -> None:
        """Says to which task the rows of the coming batch belong.

        A batch with an entry ``"task"`` among the model's keyword arguments does this by
        itself; the model never sees the entry.

        Args:
            task: One name for all rows, or one for each; numbers are indices into the
                declared tasks, or names if none were declared.
        """
        self._named_by_batch = False
        if task is None:
            self._observer.tasks = None
            return
        names = tasks_of(task, self.context.tasks, self._inner.training)
        self._observer.tasks = names
        for rule in self.rules:
            rule.select(names)

    def observe(
        self,
        *,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        shift: bool | None = None,
        loss: Tensor | None = None,
        entropy: Tensor | None = None,
        tokens: Tensor | int = 1,
        task: str | int | Sequence[Any] | Tensor | None = None,
    ) -> None:
        """What the model did on one batch; for loops with ``observe="manual"``.

        Args:
            logits: [batch, T, vocab] or [batch, classes], with ``labels``: loss and entropy
                are computed from them, over supervised positions.
            labels: [batch, T] or [batch], -100 where nothing is supervised.
            shift: Whether position t predicts label t + 1. Default: what the model's own
                loss does.
            loss: Without logits: mean loss of the batch in nats a token, 0-dimensional.
            entropy: Without logits: mean entropy over the supervised positions in nats,
                0-dimensional.
            tokens: Without logits: over how many tokens (or rows) these means are.
            task: Task of the batch or of each row; default: as :meth:`select` said.
        """
        if task is not None:
            self.select(task)
        self._observer.observe(
            logits=logits, labels=labels, shift=shift, loss=loss, entropy=entropy, tokens=tokens
        )

    def _note_backward(self, _: Tensor) -> None:
        self._observer.backward = True

    def _note_added_gradient(self, _: Tensor) -> None:
        self._observer.backward = True
        self._added_gradients.note()

    # -- the step ----------------------------------------------------------------------

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._step = None
        self._restore_rates()  # of a step that has failed
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._begin(optimizer)
            return None
        # The gradients are those that the closure makes, from inside the step.
        acting = self._acting(optimizer, closure)
        if len(args) > 1:
            return (args[0], acting, *args[2:]), kwargs
        return args, {**kwargs, "closure": acting}

    def _acting(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]
    ) -> Callable[[], Any]:
        """The closure, and the rules once, after it has first been evaluated."""

        def evaluate() -> Any:
            loss = closure()
            step = self._step
            if step is None:
                self._begin(optimizer)
                return loss
            # L-BFGS and its kin. What they see again belongs to no step.
            self._observer.forget()
            if step.gradient_added:
                raise TrainingError(
                    "The optimiser evaluates its closure more than once a step, and a dynamic "
                    "adds to the gradient once.",
                    expected="an optimiser that evaluates once, such as AdamW or SGD",
                    got=type(optimizer).__name__,
                    fix="leave penalties out, or change the optimiser",
                )
            return loss

        return evaluate

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        self._observer.backward = False
        self._added_gradients.before_step()
        statistics = self._observer.finish(self._device)
        step = Step(self.steps, statistics, optimizer, getattr(optimizer, "grad_scale", None))
        self._step = step
        for rule in self.rules:
            rule.before_step(step)
        if step.learning_rate_factor != 1.0:
            for group in optimizer.param_groups:
                self._rates.append((group, group["lr"]))
                # A new object: a tensor rate is the scheduler's, which must not see this.
                group["lr"] = group["lr"] * step.learning_rate_factor

    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        step, self._step = self._step, None
        self._restore_rates()
        if step is None:
            return
        for rule in sorted(self.rules, key=lambda rule: rule.last):
            rule.after_step(step)
        self.steps += 1

    def _restore_rates(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []

    # -- evaluation and log ------------------------------------------------------------

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        """Tells the rules of an evaluation; ``"eval_loss"`` is the task's loss."""
        for rule in self.rules:
            rule.on_evaluate(metrics)

    def metrics(self) -> dict[str, float]:
        """``"<rule>/<number>"`` → value, of all rules; may wait for the device."""
        return {
            f"{rule.name}/{key}": float(value)
            for rule in self.rules
            for key, value in rule.metrics().items()
        }

    # -- state -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The rules' state; it is also part of the optimiser's ``state_dict()``."""
        return state_of(self.rules, self.steps)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state.

        Raises:
            TrainingError: If it is that of other rules, or (unless ``changed="accept"``) of the
                same with other options or in another order.
        """
        check_state(state, self.rules, self.changed)
        self.steps = int(state["steps"])
        for rule in sorted(self.rules, key=lambda rule: not rule.makes_sites):
            rule.load_state_dict(state["rules"][rule.name])

    def _into_state_dict(
        self, optimizer: torch.optim.Optimizer, packed: dict[str, Any]
    ) -> dict[str, Any]:
        return put_in(optimizer, packed, self.context.added, self.state_dict())

    def _before_load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Brings the groups back to the size that every checkpoint has."""
        for name, parameter in list(self.context.added.items()):
            self._waiting.append((name, parameter))
            self.context.remove_parameter(parameter)

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        self._take_state()

    def _take_state(self) -> bool:
        """Takes the rules' state out of an optimiser that has loaded a checkpoint."""
        waiting, self._waiting = self._waiting, []
        carried = take_out(self.optimizer)
        if carried is None:
            for name, parameter in waiting:  # a checkpoint that knows nothing of dynamics
                self.context.add_parameter(name, parameter)
            return False
        self.context.stash = dict(carried["added"])
        try:
            check_fresh(self.optimizer, carried, self.changed)
            self.load_state_dict(carried["dynamics"])
        except BaseException:
            # For whoever tries again with the right rules; else these would start anew.
            self.optimizer.param_groups[0][STATE_KEY] = carried
            raise
        finally:
            self.context.stash = {}
        return True

    # -- the end -----------------------------------------------------------------------

    def _on_sites(self, sites: tuple[Site, ...]) -> None:
        for rule in self.rules:
            rule.on_sites(sites)

    def close(self) -> None:
        """Takes all hooks off and lets the rules clean up. The adapter stays as it is."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._restore_rates()
        for rule in self.rules:
            rule.close()
        self.context.close()

    def __enter__(self) -> Dynamics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_alone(optimizer: torch.optim.Optimizer) -> None:
    """Two at once would act twice and save the state of one."""
    owners = (getattr(h, "__self__", None) for h in optimizer._optimizer_step_pre_hooks.values())
    other = next((o for o in owners if isinstance(o, Dynamics)), None)
    if other is not None:
        raise ConfigError(
            "The optimiser has dynamics already.",
            expected="one Dynamics with all rules, in the order in which they act",
            got=", ".join(rule.name for rule in other.rules),
            fix="close() the other one first, or give it all rules",
        )
