"""One implementation that drives the rules, whatever the loop: hooks on optimiser and model.

The optimiser's own step hooks are the one place that every loop passes exactly once an
optimiser step: after accumulation, unscaling, clipping and the average over processes, and
not at all in a step that ``GradScaler`` drops. So a plain loop, Transformers' Trainer, TRL
and ours need nothing else.

The rules' state travels inside the optimiser's ``state_dict`` (an extra entry of its first
parameter group, which every ``torch.optim.Optimizer`` carries along), and so in the
checkpoints of any loop that saves its optimiser. Parameters that a rule has added are taken
out of it, since the loop that loads it does not know them yet; they come back with the
rule's own state. With the state go the rules' order and options, and how many steps the
optimiser had counted: what loads it compares all three.

A loop without dynamics that loads such a checkpoint hands the entry on in its own, unread:
``torch.optim.Optimizer.load_state_dict`` keeps whatever a group holds, and no code of ours runs
there. The first that can tell is the next driver, by the steps that the optimiser has counted
since (SGD counts none; there it goes unnoticed).

Gradients of parameters that a rule has added are averaged over processes at the end of each
backward pass in which ``DistributedDataParallel`` averages its own, which knows only those it was
made with: clipping, ``GradScaler`` and all else before the step then find the same numbers
everywhere. Without that wrapper they are averaged when the step begins.

A deep copy or a pickle of the model leaves the driver behind: the copy's hooks know none. They
observe nothing, and go on taking ``task`` out of the model's arguments, so that the copy can be
given the same batches.

What the model does is observed by a hook on its forward pass in training mode, or by calls
of :meth:`Dynamics.observe` from loops that compute their loss elsewhere. Sums stay on the
device; several processes add theirs up once a step.
"""

from __future__ import annotations

import itertools
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lorasmith.core.adapter import unwrap
from lorasmith.dynamics.entropy import TokenStatistics, token_statistics
from lorasmith.dynamics.protocol import Dynamic, Need, Site, Statistics, Step
from lorasmith.dynamics.sites import active_adapter, find_sites
from lorasmith.errors import ConfigError, TrainingError

__all__ = ["STATE_KEY", "TASK_KEY", "Context", "Dynamics", "unwrap_optimizer"]

#: Entry of the optimiser's first parameter group that carries the rules' state.
STATE_KEY = "lorasmith_dynamics"
#: Name under which a batch says to which task its rows belong.
TASK_KEY = "task"

_FORMAT = 2

logger = logging.getLogger(__name__)

#: What to do about a checkpoint of rules with other options or in another order.
Changed = Literal["refuse", "accept"]


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside Accelerate's and Trainer's wrappers: the one whose step acts."""
    while type(optimizer).__module__.startswith(("accelerate.", "deepspeed.")):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "Dynamics need an optimiser of PyTorch.",
            expected="a torch.optim.Optimizer",
            got=type(optimizer).__name__,
        )
    return optimizer


class Context:
    """What a rule gets to know when it is bound.

    Attributes:
        model: The model, without wrappers.
        optimizer: The optimiser whose step is followed.
        adapter: Name of the adapter that training began with; ``""`` where it has none.
        sites: The low-rank layers in training.
        tasks: Names of the tasks, if they were given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        adapter: str,
        tasks: Sequence[str],
        on_sites: Callable[[tuple[Site, ...]], None],
        on_gradient: Callable[[Tensor], None],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.adapter = adapter
        self.tasks = tuple(tasks)
        self._on_sites = on_sites
        self._on_gradient = on_gradient
        self._handles: dict[str, RemovableHandle] = {}
        self.sites = find_sites(model, adapter or None)
        #: Parameters that rules have added, by the names that they gave them.
        self.added: dict[str, nn.Parameter] = {}
        #: Optimiser state of added parameters that has been loaded and not yet claimed.
        self.stash: dict[str, dict[str, Any]] = {}

    def find(self, adapter: str) -> tuple[Site, ...]:
        """The sites of another adapter of the model."""
        return find_sites(self.model, adapter)

    def refresh(self, adapters: Sequence[str]) -> None:
        """Watches the sites of these adapters from now on, and tells all rules."""
        self.sites = tuple(itertools.chain.from_iterable(map(self.find, adapters)))
        self._on_sites(self.sites)

    def add_parameter(
        self, name: str, parameter: nn.Parameter, like: nn.Parameter | None = None
    ) -> None:
        """Hands a new parameter to the optimiser, in the group of ``like``.

        Groups keep their number, so that learning-rate schedulers go on as they were.

        Args:
            name: Its name in checkpoints.
            parameter: It.
            like: A parameter of the optimiser whose state it starts with a copy of (unless a
                checkpoint has one of its own for it). Default: first group, no state.
        """
        if name in self.added:
            raise ConfigError("That parameter has been added before.", got=name)
        groups = self.optimizer.param_groups
        group = next((g for g in groups if like is not None and _holds(g, like)), groups[0])
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)
        self.added[name] = parameter
        if parameter.requires_grad:
            self._handles[name] = parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
        state = self.stash.pop(name, None)
        if state is None and like is not None:
            state = self.optimizer.state.get(like)
        if state:
            self.optimizer.state[parameter] = {
                key: _on_device_of(parameter, value, key, group) for key, value in state.items()
            }

    def remove_parameter(self, parameter: nn.Parameter) -> None:
        """Takes a parameter that was added away from the optimiser, with its state."""
        name = next(n for n, p in self.added.items() if p is parameter)
        for group in self.optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if p is not parameter]
            if "param_names" in group:
                group["param_names"][:] = [n for n in group["param_names"] if n != name]
        self.optimizer.state.pop(parameter, None)
        del self.added[name]
        self._release(name)

    def _release(self, *names: str) -> None:
        for name in names or tuple(self._handles):
            handle = self._handles.pop(name, None)
            if handle is not None:
                handle.remove()

    def close(self) -> None:
        """Takes the hooks off the added parameters, which stay."""
        self._release()


def _on_device_of(parameter: Tensor, value: Any, key: str, group: Mapping[str, Any]) -> Any:
    """A copy of optimiser state where the optimiser wants it: a checkpoint may be on the CPU."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return value.clone()
    return value.to(parameter.device, copy=True)


def _holds(group: Mapping[str, Any], parameter: nn.Parameter) -> bool:
    return any(p is parameter for p in group["params"])


class _Sums:
    """Sums over the batches of one optimiser step, on the device; nothing waits for it."""

    def __init__(self) -> None:
        #: Task, or ``None`` for rows without one → [loss, tokens, entropy, tokens with entropy].
        self.by_task: dict[str | None, Tensor] = {}

    def add(self, task: str | None, values: Sequence[Tensor]) -> None:
        new = torch.stack([v.detach().to(torch.float32).reshape(()) for v in values])
        known = self.by_task.get(task)
        self.by_task[task] = new if known is None else known + new.to(known.device)

    def statistics(self, tasks: Sequence[str], device: torch.device, entropy: bool) -> Statistics:
        """The step's, over all processes; starts anew."""
        sums, self.by_task = self.by_task, {}
        if _distributed():
            names: list[str | None] = [None, *tasks]
            unknown = sorted(str(t) for t in sums.keys() - set(names))
            if unknown:
                raise TrainingError(
                    f"The task {unknown[0]!r} was not declared.",
                    expected=", ".join(tasks) or "tasks=…, which several processes need",
                    got=", ".join(unknown),
                )
            table = torch.stack([sums.get(n, torch.zeros(4)).to(device) for n in names])
            dist.all_reduce(table)
            sums = dict(zip(names, table, strict=True))
        if not sums:
            return Statistics()
        total = torch.stack(list(sums.values())).sum(dim=0)
        loss, tokens, surprise, counted = total.unbind()
        return Statistics(
            tokens=tokens,
            loss=loss / tokens.clamp(min=1),
            entropy=surprise / counted.clamp(min=1) if entropy else None,
            tasks={
                task: (row[0] / row[1].clamp(min=1), row[1])
                for task, row in sums.items()
                if task is not None
            },
        )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
        _check_rules(self.rules)
        check_changed(changed)
        self.changed = changed
        if observe not in ("auto", "manual"):
            raise ConfigError("Unknown observe.", expected="auto or manual", got=repr(observe))
        self.steps = 0
        self._inner = unwrap(model)
        raw = unwrap_optimizer(optimizer)
        self._sums = _Sums()
        self._tasks: tuple[str, ...] | None = None  # of the batch under way
        #: Whether a batch of the step came without logits and without an entropy.
        self._blind = False
        #: Whether gradients have come since the last step.
        self._backward = False
        #: Whether the backward pass of the last forward pass ends with an average over processes.
        self._syncs = False
        #: Whether such an average has been asked for in the backward pass under way, and whether
        #: the gradients of added parameters are averages now.
        self._asked = self._averaged = False
        self._step: Step | None = None
        #: Groups whose learning rate is scaled at the moment, with the rate of before.
        self._rates: list[tuple[dict[str, Any], Any]] = []
        self._named_by_batch = False
        self._handles: list[RemovableHandle] = []
        self._device = next((p.device for p in self._inner.parameters()), torch.device("cpu"))
        self._shift: bool | None = None
        #: Added parameters that were taken out of the groups for a checkpoint to be loaded.
        self._waiting: list[tuple[str, nn.Parameter]] = []
        name = active_adapter(model, adapter)
        self.context = Context(
            self._inner, raw, name, tasks, self._on_sites, self._note_added_gradient
        )
        _check_owned(raw, self.context.sites)
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
        _warn_of_two_penalties(self.rules)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser whose steps are followed."""
        return self.context.optimizer

    @property
    def needs(self) -> frozenset[Need]:
        """What must be observed beyond the loss."""
        return frozenset[Need]().union(*(rule.needs for rule in self.rules))

    # -- hooks ---------------------------------------------------------------------------

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
        if torch.is_grad_enabled():
            self._syncs, self._asked = _ddp_syncs(), False
        if TASK_KEY not in kwargs:
            if self._named_by_batch:  # the one before said its task; this one has none
                self._tasks, self._named_by_batch = None, False
            return None
        kwargs = dict(kwargs)
        self.select(kwargs.pop(TASK_KEY))
        self._named_by_batch = True
        return args, kwargs

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
            self._tasks = None
            return
        values = task.tolist() if isinstance(task, Tensor) else task
        values = [values] if isinstance(values, str | int) else list(values)
        declared = self.context.tasks
        names = []
        for value in values:
            index = isinstance(value, int) and bool(declared)
            if index and not 0 <= value < len(declared):
                raise ConfigError(
                    "There is no task of that number.",
                    expected=f"0 to {len(declared) - 1}",
                    got=value,
                )
            name = declared[value] if index else str(value)
            if declared and name not in declared and self._inner.training:
                raise ConfigError(
                    "That task was not declared.",
                    expected=", ".join(declared),
                    got=name,
                    fix="name it in tasks=…, or leave tasks out and they are met as they come",
                )
            names.append(name)
        self._tasks = tuple(names)
        for rule in self.rules:
            rule.select(self._tasks)

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        fused = _fused(output)
        if fused is not None:
            self._drop_abandoned()
            self._add(fused, self._tasks)
            return
        labels = kwargs.get("labels")
        logits = getattr(output, "logits", None)
        if isinstance(labels, Tensor) and isinstance(logits, Tensor) and logits.dim() >= 2:
            if labels.is_floating_point():  # regression has no distribution
                self._observe_loss(getattr(output, "loss", None), labels.shape[0])
            elif logits.shape[:-1] == labels.shape:
                self.observe(logits=logits, labels=labels)
            return
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            self._observe_loss(loss, int(labels.shape[0]) if isinstance(labels, Tensor) else 1)

    def _observe_loss(self, loss: Tensor | None, rows: int) -> None:
        if loss is not None:
            self.observe(loss=loss, tokens=rows)

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
        self._drop_abandoned()
        names = self._tasks
        with torch.no_grad():
            if logits is not None and labels is not None:
                found = token_statistics(
                    logits.detach(),
                    labels,
                    shift=self._shifts() if shift is None else shift,
                    entropy="entropy" in self.needs,
                )
                self._add(found, names)
                return
            if loss is None:
                raise ConfigError("Nothing to observe.", expected="logits and labels, or a loss")
            if names is not None and len(set(names)) > 1:
                raise ConfigError(
                    "One loss for rows of several tasks cannot be told apart.",
                    expected="logits and labels, or batches of one task",
                    got=", ".join(sorted(set(names))),
                )
            device = loss.device
            count = (
                tokens.to(device, torch.float32)
                if isinstance(tokens, Tensor)
                else torch.full((), float(tokens), device=device)  # nothing waits for it
            )
            none = torch.zeros((), device=device)
            # The mean over no tokens is NaN, and says nothing.
            loss = torch.where(count > 0, loss.float(), none)
            if entropy is not None:
                entropy = torch.where(count > 0, entropy.to(device).float(), none)
            self._blind = self._blind or entropy is None
            self._sums.add(
                names[0] if names else None,
                [
                    loss * count,
                    count,
                    none if entropy is None else entropy * count,
                    none if entropy is None else count,
                ],
            )

    def _add(self, found: TokenStatistics, tasks: tuple[str, ...] | None) -> None:
        rows = (1,) if found.loss.dim() > 1 else ()  # sum over positions, if there are any
        count = found.supervised.to(torch.float32)
        columns = [found.loss, count]
        if found.entropy is None:
            columns += [torch.zeros_like(count)] * 2
        else:
            columns += [found.entropy, count]
        by_row = [c.sum(dim=rows) if rows else c for c in columns]
        if tasks is None or len(set(tasks)) == 1:
            self._sums.add(tasks[0] if tasks else None, [c.sum() for c in by_row])
            return
        if len(tasks) != len(by_row[0]):
            raise ConfigError(
                "The batch names another number of tasks than it has rows.",
                expected=f"{len(by_row[0])} names",
                got=len(tasks),
            )
        for task in dict.fromkeys(tasks):
            mask = torch.tensor([t == task for t in tasks], device=count.device)
            zero = torch.zeros((), device=count.device)
            self._sums.add(task, [torch.where(mask, c, zero).sum() for c in by_row])

    def _note_backward(self, _: Tensor) -> None:
        self._backward = True

    def _note_added_gradient(self, _: Tensor) -> None:
        self._backward, self._averaged = True, False
        if self._syncs and not self._asked:
            # DDP waits for its own averages in such a callback, queued before: the order is the
            # same on all processes.
            self._asked = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self._asked = False
        self._share_added_gradients()
        self._averaged = True

    def _drop_abandoned(self) -> None:
        """Forgets batches whose gradients were thrown away: the step was dropped.

        ``GradScaler`` does that after an overflow, and so may a loop.
        """
        gone = self._backward and all(site.B.grad is None for site in self.context.sites)
        if gone:
            self._sums.by_task.clear()
            self._backward = self._blind = False

    def _shifts(self) -> bool:
        """Whether the model's own loss predicts label t + 1 from position t."""
        if self._shift is None:
            inner: Any = self._inner
            if hasattr(inner, "get_base_model"):
                inner = inner.get_base_model()
            kind = getattr(inner, "loss_type", None) or type(inner).__name__
            self._shift = "CausalLM" in str(kind) or str(kind).endswith("LMHeadModel")
        return self._shift

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
            self._sums.by_task.clear()
            self._blind = False
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
        self._backward = False
        if not self._averaged:
            self._share_added_gradients()
        self._averaged = False
        needs = self.needs
        statistics = self._sums.statistics(
            self.context.tasks, self._device, entropy="entropy" in needs
        )
        blind, self._blind = self._blind or statistics.tokens is None, False
        if "entropy" in needs and blind:
            raise TrainingError(
                "A dynamic needs the entropy of the model's predictions, and none was observed.",
                expected="a model called with labels that returns logits, or Dynamics.observe(…)",
                got="no observation since the last optimiser step"
                if statistics.tokens is None
                else "a batch with its loss alone",
                fix="give labels to the model in training mode (model.train()), or call "
                "observe(logits=…, labels=…) in the loop",
            )
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

    def _share_added_gradients(self) -> None:
        """DDP knows only the parameters it was made with: averages the others' gradients."""
        if not (_distributed() and self.context.added):
            return
        parameters = list(self.context.added.values())
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        used = used.to(self._device)
        dist.all_reduce(used)
        world = dist.get_world_size()
        for parameter, count in zip(parameters, used.tolist(), strict=True):
            if count == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world)

    # -- evaluation and log --------------------------------------------------------------

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

    # -- state ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The rules' state; it is also part of the optimiser's ``state_dict()``."""
        return {
            "format": _FORMAT,
            "steps": self.steps,
            "rules": {rule.name: rule.state_dict() for rule in self.rules},
            "options": {rule.name: rule.made_with() for rule in self.rules},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state.

        Raises:
            TrainingError: If it is that of other rules, or (unless ``changed="accept"``) of the
                same with other options or in another order.
        """
        if state.get("format") != _FORMAT:
            raise TrainingError(
                "The state of the dynamics was written by another version of lorasmith.",
                expected=f"format {_FORMAT}",
                got=f"format {state.get('format')}",
                fix="resume with that version, or start anew: "
                f"optimizer.param_groups[0].pop({STATE_KEY!r})",
            )
        mine, found = [r.name for r in self.rules], list(state["rules"])
        if sorted(mine) != sorted(found):
            raise TrainingError(
                "The checkpoint is of a run with other dynamics.",
                expected=", ".join(found) or "none",
                got=", ".join(mine),
                fix="resume with the same dynamics, or start anew",
            )
        self._compare(state["options"], found)
        self.steps = int(state["steps"])
        for rule in sorted(self.rules, key=lambda rule: not rule.makes_sites):
            rule.load_state_dict(state["rules"][rule.name])

    def _compare(self, options: Mapping[str, Any], order: Sequence[str]) -> None:
        """The rules' order and options with those of the checkpoint."""
        mine = [rule.name for rule in self.rules]
        differences: list[tuple[str, Any, Any]] = []
        if mine != list(order):
            differences.append(("order", ", ".join(order), ", ".join(mine)))
        for rule in self.rules:
            then, now = options[rule.name], rule.made_with()
            differences += [
                (f"{rule.name}.{key}", _shown(then, key), _shown(now, key))
                for key in dict.fromkeys([*then, *now])
                if key not in then or key not in now or then[key] != now[key]
            ]
        self._refuse_or_warn(
            differences,
            "The checkpoint is of a run with the same dynamics, but not as they are now.",
            "resume with what the checkpoint has",
        )

    def _refuse_or_warn(
        self, differences: Sequence[tuple[str, Any, Any]], what: str, fix: str
    ) -> None:
        if not differences:
            return
        saved, present = ("; ".join(f"{row[0]} {row[i]}" for row in differences) for i in (1, 2))
        if self.changed == "refuse":
            raise TrainingError(
                what,
                expected=f"as in the checkpoint: {saved}",
                got=present,
                fix=f'{fix}, or go on with changed="accept"',
                key=differences[0][0],
            )
        logger.warning("%s Going on: %s → %s.", what, saved, present)

    def _into_state_dict(
        self, optimizer: torch.optim.Optimizer, packed: dict[str, Any]
    ) -> dict[str, Any]:
        """The optimiser's state with the rules', and without the parameters they added."""
        mine = {id(p): name for name, p in self.context.added.items()}
        groups, states, stash = [], {}, {}
        renamed: dict[Any, int] = {}
        names: dict[Any, str] = {}
        for group, live in zip(packed["param_groups"], optimizer.param_groups, strict=True):
            kept = []
            for index, parameter in zip(group["params"], live["params"], strict=True):
                if id(parameter) in mine:
                    names[index] = mine[id(parameter)]
                else:
                    kept.append(renamed.setdefault(index, len(renamed)))
            group = {**group, "params": kept}
            if "param_names" in group:
                group["param_names"] = [n for n in group["param_names"] if n not in mine.values()]
            groups.append(group)
        for index, value in packed["state"].items():
            if index in names:
                stash[names[index]] = dict(value)
            else:
                states[renamed.get(index, index)] = value
        groups[0][STATE_KEY] = {
            "dynamics": self.state_dict(),
            "added": stash,
            "counted": _counted(states.values()),
        }
        return {**packed, "state": states, "param_groups": groups}

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
        carried = None
        for group in self.optimizer.param_groups:
            carried = group.pop(STATE_KEY, None) or carried
        if carried is None:
            for name, parameter in waiting:  # a checkpoint that knows nothing of dynamics
                self.context.add_parameter(name, parameter)
            return False
        self.context.stash = dict(carried["added"])
        try:
            self._check_fresh(carried)
            self.load_state_dict(carried["dynamics"])
        except BaseException:
            # For whoever tries again with the right rules; else these would start anew.
            self.optimizer.param_groups[0][STATE_KEY] = carried
            raise
        finally:
            self.context.stash = {}
        return True

    def _check_fresh(self, carried: Mapping[str, Any]) -> None:
        """Raises if steps were made without dynamics since their state was saved."""
        then, now = carried.get("counted"), _counted(self.optimizer.state.values())
        if then is not None and now is not None and then != now:
            self._refuse_or_warn(
                [("optimiser steps", then, now)],
                "The optimiser has made steps since the state of dynamics that it carries: a loop "
                "without them went on, or a state_dict() was kept without copying it.",
                "resume from the checkpoint of the dynamics, or start them anew: "
                f"optimizer.param_groups[0].pop({STATE_KEY!r})",
            )

    # -- the end -------------------------------------------------------------------------

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


def _fused(output: Any) -> TokenStatistics | None:
    """What TRL's models say that compute their head and loss in one: each [batch, T]."""
    found = [getattr(output, name, None) for name in ("log_probs", "entropy", "label_mask")]
    tensors = [t for t in found if isinstance(t, Tensor) and t.dim() == 2]
    if len(tensors) < len(found):
        return None
    log_probs, entropy, mask = (t.detach() for t in tensors)
    mask = mask.bool()
    loss, entropy = (torch.where(mask, t.float(), 0.0) for t in (-log_probs, entropy))
    return TokenStatistics(loss, entropy, mask)


def _shown(options: Mapping[str, Any], key: str) -> str:
    return repr(options[key]) if key in options else "absent"


def _counted(states: Iterable[Mapping[str, Any]]) -> int | None:
    """The most steps that an optimiser has counted for a parameter; ``None`` if it counts none."""
    return max((int(state["step"]) for state in states if "step" in state), default=None)


def _ddp_syncs() -> bool:
    """Whether the forward pass under way is one of DDP that averages gradients afterwards.

    Outside of DDP, and in a micro-batch that is only accumulated, it is not.
    """
    if not _distributed():
        return False
    active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return active is not None and bool(active.require_backward_grad_sync)


def check_changed(changed: Changed) -> None:
    """Raises if that is not a thing to do about changed rules."""
    if changed not in ("refuse", "accept"):
        raise ConfigError(
            "Unknown changed.", expected="refuse or accept", got=repr(changed), key="changed"
        )


def as_rules(rules: Dynamic | Iterable[Dynamic]) -> tuple[Dynamic, ...]:
    """One rule or several as a tuple; what is neither is left for the check of rules."""
    given: Any = rules
    several = isinstance(given, Iterable) and not isinstance(given, Dynamic | str | type)
    return tuple(given if several else [given])


def _check_rules(rules: tuple[Dynamic, ...]) -> None:
    if not rules:
        raise ConfigError("There is no dynamic.", expected="at least one rule")
    for rule in rules:
        if not isinstance(rule, Dynamic):
            raise ConfigError(
                "That is not a dynamic.",
                expected="an instance, such as lorasmith.GaugeProjection()",
                got=repr(rule),
            )
    names = [rule.name for rule in rules]
    double = sorted({n for n in names if names.count(n) > 1})
    if double:
        raise ConfigError("A dynamic is there twice.", got=", ".join(double))


def _warn_of_two_penalties(rules: tuple[Dynamic, ...]) -> None:
    """Whoever names a governor and its penalty may well mean one."""
    names = [rule.name for rule in rules]
    for rule in rules:
        driven = getattr(getattr(rule, "penalty", None), "name", None)
        if driven in names:
            warnings.warn(
                f"The dynamics {rule.name!r} and {driven!r} add two penalties: {rule.name} drives "
                f"a penalty {driven!r} of its own, and the other one comes on top, with its fixed "
                f"weight. If one is meant, give {rule.name} alone; options of what it drives are "
                f"its option penalty.",
                stacklevel=3,
            )


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


def _check_owned(optimizer: torch.optim.Optimizer, sites: Sequence[Site]) -> None:
    """An optimiser that moves none of the factors belongs to something else."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(site.A) in known or id(site.B) in known for site in sites):
        raise ConfigError(
            "The optimiser trains none of the adapter's factors.",
            expected="an optimiser made with the adapter's parameters",
            got=f"{type(optimizer).__name__} with {len(known)} other parameters",
            fix="make it with adapter.parameters(), after attaching",
        )
