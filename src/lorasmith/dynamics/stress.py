"""Stress controller: one number for how training is going, and three modes that act on it.

After Unified-LoRA, whose code has the average of the loss and a learning rate for each mode;
what its description promises beyond that (conflict, memory, task adapters, snapshots) is
defined here; docs/dynamics-stress.md has it at a glance.

**Signals**, each in [0, 1]:

* E, error: a task's loss against its own baseline, :mod:`~.stress_loss`. A loss that only falls
  gives 0, whatever its size; one that doubles and stays gives 0.9 within ten steps. With several
  tasks: the mean over tasks, weighted by how often they come. ``error="absolute"`` is the
  paper's E = f / (1 + f).
* C, conflict = (1 − mean cosine of pairs of tasks) / 2. Single: cosine of the tasks' gradients
  on the shared factors (:mod:`~.stress_conflict`), in the metric of
  :func:`~.stress_signals.gradient_gram`. Multi: cosine
  of D_t = s (B_t A_t − B A), what each task's adapter has learned since its birth; for two
  equally long D_t this is the normalised variance 1 − ‖mean D‖² / mean ‖D‖².
* S, loss of memory. With an ``anchor``: e / (¼ + e), e the rise of its loss over the lowest
  seen. Else the drift from the snapshot, :mod:`~.stress_mirror`.

**Stress** x = w_C C + w_E E + w_S S + v_C ΔC⁺ + v_E ΔE⁺ + v_S ΔS⁺ (rises since the step
before), clamped to [0, 1]; φ its exponential average at rate 0.1. A loss that is not finite, or
a gradient, is x = 1 for that step, and the step is skipped.

**Modes.** Single: one shared adapter. Multi, entered at φ ≥ 0.35 if conflict is the largest
term and the tasks oppose each other (C > ½), left at φ < 0.2: one adapter a task, born as a
copy of the shared one, optimiser state included; rate × 0.6. Leaving it, the shared adapter
becomes the best rank-r form of the mean ΔW, in the gauge nearest to the mean A, with the mean
of the moments. Mirror, entered at φ ≥ 0.7, left at φ < 0.55, on top of either: rate × 0.2, a
pull towards the snapshot, the gradient of ½ κ ‖s (B A − B_s A_s)‖²; and a return to it
(parameters and optimiser state) whenever φ has not fallen in ``patience`` steps and the last
three losses are still high. After ``returns`` of them in one stay, what the loss is now is taken
for the new normal: Mirror would otherwise never let a task be learned that is harder than the
last one. An anchor that is being forgotten is never given up in this way.

A snapshot is renewed every ``snapshot_every`` steps while E < 0.3, so that it is from before
the stress, or from its first steps. Hysteresis and rests: :mod:`~.stress_modes`.

Costs. One wait for the device a step (the loss decides whether the step happens). Time on one
CPU core, 210 layers of 576 × 576, r = 16, in units of AdamW's own step (70 ms): a fifth in
Single and Multi; each tenth step, for C and S, 1.5 with one task and 6 with two; 3 in Mirror.
Memory: three times the adapter for the snapshot (values and two moments), once a task for ĝ.

Limits. Under DDP, Multi leaves the shared adapter without a gradient, so the wrapper needs
``find_unused_parameters=True``. A ``PeftModel`` needs batches of one task. Plain ``lora_A``
parameters have no Multi. Layers without two trained factors take no part in C, drift and pull,
but in snapshots and in Multi they do.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorasmith.dynamics.processes import distributed
from lorasmith.dynamics.protocol import Dynamic, Need, Site, Step
from lorasmith.dynamics.snapshot import Snapshot
from lorasmith.dynamics.stress_conflict import TaskGradients, gram_of_products
from lorasmith.dynamics.stress_history import MODES, Mode, StressRecord, write_csv, write_json
from lorasmith.dynamics.stress_loss import LossBaseline
from lorasmith.dynamics.stress_merge import merge_adapters
from lorasmith.dynamics.stress_mirror import add_pull, drift
from lorasmith.dynamics.stress_modes import Patience, Switch
from lorasmith.dynamics.stress_signals import (
    conflict_from_gram,
    difference,
    relative_excess,
    saturate,
)
from lorasmith.dynamics.task_adapters import TaskAdapters, adapter_name, task_adapters_of
from lorasmith.errors import ConfigError, TrainingError

__all__ = ["StressController"]

#: e of the anchor's loss at which S is ½.
_HALF = 0.25
_CALM = 0.3
_SHARE_RATE = 0.1
_LARGEST = 1e30


class StressController(Dynamic):
    """Watches stress, and changes between one adapter, one a task, and careful recovery.

    See the module for all formulas. Training goes on in whatever loop; tell which task each row
    of a batch belongs to (``task`` among the model's arguments, or ``Dynamics.select``).

    When training ends in Multi, the task adapters are merged into the shared one and go, unless
    ``keep_tasks``: then they stay on the model, beside the merged one, which acts.

    Args:
        error: ``"relative"``: the loss against its own baseline. ``"absolute"``: the paper's
            L / (1 + L), which a language model's usual loss of 2 to 12 keeps above ⅔.
        weights: w_C, w_E, w_S. Default: 0.5, 1, and 1 with an anchor or 0.15 without, since
            healthy training drifts.
        rises: v_C, v_E, v_S.
        smoothing: Rate of φ's average.
        error_rate: Rate of the fast average of the loss. Default: 0.2, or the published 0.1 with
            ``error="absolute"``.
        multi: φ below which Multi is left, and from which it is entered.
        mirror: The same for Mirror.
        cooldown: Steps of rest after a switch, c; grows if switches come thick.
        rates: Factors on the learning rate of every parameter group in Single, Multi and
            Mirror; the published 5e-5, 3e-5 and 1e-5 are 1, 0.6 and 0.2.
        task_adapters: Whether Multi may be entered at all.
        keep_tasks: Whether task adapters stay on the model, frozen, when Multi is left.
        anchor: What must not be forgotten: a function that gives a loss, or batches (keyword
            arguments for the model, labels among them). Evaluated without gradient, in
            evaluation mode; averaged over processes.
        anchor_every: Steps from one evaluation of the anchor to the next.
        pull: Strength of the pull in Mirror: the norm of its gradient is this × drift × the norm
            of the task's gradient, over all factors. 0 for none.
        kappa: κ itself instead, constant.
        patience: Steps in Mirror within which φ must fall by 0.02, or it goes back to the
            snapshot.
        returns: How often it goes back, before the level of the loss counts as normal (only
            with ``error="relative"``).
        snapshot_every: Steps between snapshots in calm.
        every: Steps between computations of C and of S without an anchor.
        history_limit: How many records are kept, the last ones; ``None`` for all.

    Raises:
        ConfigError: A value cannot be used.
    """

    name = "stress"
    needs: frozenset[Need] = frozenset({"tasks"})
    makes_sites = True

    def __init__(
        self,
        *,
        error: Literal["relative", "absolute"] = "relative",
        weights: tuple[float, float, float] | None = None,
        rises: tuple[float, float, float] = (0.25, 0.25, 0.25),
        smoothing: float = 0.1,
        error_rate: float | None = None,
        multi: tuple[float, float] = (0.2, 0.35),
        mirror: tuple[float, float] = (0.55, 0.7),
        cooldown: int = 100,
        rates: tuple[float, float, float] = (1.0, 0.6, 0.2),
        task_adapters: bool = True,
        keep_tasks: bool = False,
        anchor: Callable[[], Tensor | float] | Sequence[Mapping[str, Any]] | None = None,
        anchor_every: int = 50,
        pull: float = 1.0,
        kappa: float | None = None,
        patience: int = 50,
        returns: int = 3,
        snapshot_every: int = 10,
        every: int = 10,
        history_limit: int | None = 100_000,
    ) -> None:
        if error not in ("relative", "absolute"):
            raise ConfigError(
                "Unknown error.", expected="relative or absolute", got=repr(error), key="error"
            )
        if weights is None:
            weights = (0.5, 1.0, 0.15 if anchor is None else 1.0)
        for key, triple in (("weights", weights), ("rises", rises), ("rates", rates)):
            given: Sequence[float] = triple
            if len(given) != 3 or not all(_number(v) and v >= 0 for v in given):
                raise ConfigError(
                    f"{key} cannot be {triple!r}.",
                    expected="three finite numbers of at least 0",
                    got=repr(triple),
                    key=key,
                )
        pairs: dict[str, Sequence[float]] = {"multi": multi, "mirror": mirror}
        for key, pair in pairs.items():
            if not (len(pair) == 2 and all(map(_number, pair)) and 0 <= pair[0] < pair[1] <= 1):
                raise ConfigError(
                    f"{key} cannot be {pair!r}.",
                    expected="(leave, enter) with 0 ≤ leave < enter ≤ 1",
                    got=repr(pair),
                    key=key,
                )
        if error_rate is None:
            error_rate = 0.2 if error == "relative" else 0.1
        for key, value in (("smoothing", smoothing), ("error_rate", error_rate)):
            _check(key, value, _number(value) and 0 < value <= 1, "a number above 0, at most 1")
        for key, value in (("pull", pull), ("kappa", 0.0 if kappa is None else kappa)):
            _check(key, value, _number(value) and value >= 0, "a finite number of at least 0")
        counts = {
            "cooldown": cooldown,
            "anchor_every": anchor_every,
            "patience": patience,
            "returns": returns,
            "snapshot_every": snapshot_every,
            "every": every,
            "history_limit": 1 if history_limit is None else history_limit,
        }
        for key, count in counts.items():
            _check(key, count, _positive_whole(count), "a whole number of at least 1")
        self.error_kind = error
        self.weights = tuple(weights)
        self.rises = tuple(rises)
        self.smoothing = smoothing
        self.error_rate = error_rate
        self.rates = dict(zip(MODES, rates, strict=True))
        self.task_adapters = task_adapters
        self.keep_tasks = keep_tasks
        self.anchor = anchor
        self.anchor_every = anchor_every
        self.pull = pull
        self.kappa = kappa
        self.returns = returns
        self.snapshot_every = snapshot_every
        self.every = every
        self.history: deque[StressRecord] = deque(maxlen=history_limit)
        self._multi = Switch(*multi, cooldown)
        self._mirror = Switch(*mirror, cooldown)
        self._patience = Patience(patience)
        self.phi = 0.0
        self.error = self.conflict = self.memory = 0.0
        self._started = False
        self._baselines: dict[str, LossBaseline] = {}
        self._tasks: list[str] = []
        #: Names of the task adapters that are this controller's to write to and take off.
        self._born: set[str] = set()
        self._selected: tuple[str, ...] = ()
        self._gradients = TaskGradients()
        self._snapshot: Snapshot | None = None
        self._anchor_lowest = math.inf
        self._pending: StressRecord | None = None
        self._plan = ""
        #: E of the last losses alone, without any average of what was before.
        self._own_error = 0.0

    @classmethod
    def published(cls, **options: Any) -> StressController:
        """The paper's stress: φ of the loss alone, and bands of φ alone decide.

        Fed 0.5, 5.0 (50 steps) and 0.5, φ reads 0.333, 0.827, 0.371 (51 steps later) and 0.333
        again, the numbers of the published log. Signals and rates beside it are ours.
        """
        settings: dict[str, Any] = {
            "error": "absolute",
            "weights": (0.0, 1.0, 0.0),
            "rises": (0.0, 0.0, 0.0),
            "error_rate": 0.1,
            "smoothing": 0.1,
        }
        return cls(**{**settings, **options})

    # -- what it knows -------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """``"mirror"``, else ``"multi"`` or ``"single"``."""
        return "mirror" if self._mirror.on else "multi" if self._multi.on else "single"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks declared or seen so far."""
        return tuple(self._tasks)

    @property
    def task_adapter_names(self) -> dict[str, str]:
        """Task → name of its adapter, while tasks have adapters of their own."""
        return {t: self._adapter_of(t) for t in self._tasks} if self._multi.on else {}

    def metrics(self) -> dict[str, float]:
        """φ, E, C, S, the mode (0, 1, 2) and the factor on the learning rate."""
        return {
            "phi": self.phi,
            "error": self.error,
            "conflict": self.conflict,
            "memory": self.memory,
            "mode": float(MODES.index(self.mode)),
            "rate": self.rates[self.mode],
        }

    # -- binding and tasks ---------------------------------------------------------------

    def bind(self, context: Any) -> None:
        self._shared = context.sites
        self._adapters: TaskAdapters | None = None
        self._tasks = list(dict.fromkeys(context.tasks))
        if self.task_adapters:
            self._adapters = task_adapters_of(context.model, context.adapter)
        super().bind(context)
        self._born = set()
        if len(self._tasks) > 1:
            self._need_adapters()
            self._check_free(*self._tasks)
        self._keys = {
            key for key, p in self._parameters_of(context.adapter).items() if p.requires_grad
        }

    def _parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        return {} if self._adapters is None else self._adapters.parameters(adapter)

    def _need_adapters(self) -> None:
        if self.task_adapters and self._adapters is None:
            raise ConfigError(
                "This model cannot carry one adapter for each task.",
                expected="adapters attached by lorasmith, or a PeftModel",
                got=f"{type(self.context.model).__name__} with low-rank parameters of its own",
                fix="StressController(task_adapters=False): Single and Mirror alone",
                key="task_adapters",
            )

    def _check_free(self, *tasks: str) -> None:
        """Raises if a task's adapter would overwrite one of the user's."""
        adapters = self._adapters
        if adapters is None:
            return
        for task in tasks:
            name = self._adapter_of(task)
            if name not in self._born and adapters.exists(name):
                raise ConfigError(
                    f"The model has an adapter {name!r} already, which is not of this training.",
                    expected=f"a free name: the adapter of the task {task!r} would overwrite it",
                    got=name,
                    fix=f"detach {name!r}, or give the task another name",
                )

    def on_sites(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(sites)

    def _adapter_of(self, task: str) -> str:
        return adapter_name(self.context.adapter, task)

    def _meet(self, task: str) -> None:
        if task in self._tasks:
            return
        if distributed():
            raise TrainingError(
                f"The task {task!r} was not declared.",
                expected=", ".join(self._tasks) or "tasks=…, which several processes need",
                got=task,
            )
        self._tasks.append(task)
        if len(self._tasks) > 1:
            self._need_adapters()
            self._check_free(*self._tasks)
        if self._multi.on:
            self._birth(task)
            self._refresh()

    def select(self, tasks: Sequence[str]) -> None:
        if self.context.model.training:
            for task in dict.fromkeys(tasks):
                self._meet(task)
        self._selected = tuple(tasks)
        self._use(self._selected)

    def _use(self, tasks: Sequence[str]) -> None:
        if not self._multi.on or self._adapters is None:
            return
        known = set(self._tasks)
        shared = self.context.adapter
        # A task that only an evaluation has: nothing was learned for it alone.
        names = [self._adapter_of(t) if t in known else shared for t in tasks]
        self._adapters.use(names or [self._adapter_of(self._tasks[0])])

    # -- one step ------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        if step.statistics.loss is None:
            raise TrainingError(
                "The stress controller needs the loss of each step, and none was observed.",
                expected="a model called with labels, or Dynamics.observe(…) in the loop",
                got="no observation since the last optimiser step",
                fix="give labels to the model in training mode (model.train())",
            )
        for task in step.statistics.tasks:
            self._meet(task)
        self._multi.tick()
        self._mirror.tick()
        gradients = self._live_gradients(step)
        due = step.number % self.every == 0
        gram = self._gram() if due else None
        distance = self._drift() if due and self.anchor is None else None
        values = self._read(step, gradients, gram, distance)
        if self._multi.on and not step.skipped:
            self._check_selected(values)
        loss, gradient = values["loss"][0], values["gradient"][0]
        events = []
        old = self._signals()
        if not math.isfinite(loss) or not math.isfinite(gradient):
            events.append("skip: loss" if not math.isfinite(loss) else "skip: gradient")
            step.skip()
            stress = self._own_error = 1.0
        else:
            if values["tokens"][0] > 0:  # a step without a supervised token has no loss
                self._see(values)
            if self.anchor is not None and step.number % self.anchor_every == 0:
                self.memory = self._anchor_memory()
            new = self._signals()
            stress = sum(w * x for w, x in zip(self.weights, new, strict=True))
            stress += sum(v * max(0.0, x - y) for v, x, y in zip(self.rises, new, old, strict=True))
            if self._conflict_in_gradients():
                tokens = {k[5:]: v[1] for k, v in values.items() if k.startswith("task ")}
                self._gradients.learn(self._shared, tokens)
        stress = min(1.0, max(0.0, stress))
        self.phi += (self.smoothing if self._started else 1.0) * (stress - self.phi)
        self.phi = min(1.0, max(0.0, self.phi))
        self._started = True
        mode = self.mode
        self._decide(events)
        if not step.skipped:
            renew = self._calm() and step.number % self.snapshot_every == 0
            if renew or self._snapshot is None:
                self._take_snapshot()
            if self.rates[mode] != 1.0:
                step.scale_learning_rate(self.rates[mode])
            if mode == "mirror" and self._snapshot is not None:
                add_pull(step, self.sites, self._snapshot, pull=self.pull, kappa=self.kappa)
        self._pending = StressRecord(
            step.number,
            self.phi,
            self.error,
            self.conflict,
            self.memory,
            mode,
            loss if math.isfinite(loss) else math.nan,
            "; ".join(events),
        )

    def _check_selected(self, values: Mapping[str, list[float]]) -> None:
        """Each task that was observed must have trained its own adapter."""
        # With several processes the statistics name all tasks, those without a token too.
        found = {key[5:]: v[1] for key, v in values.items() if key.startswith("task ")}
        for task in [name for name, tokens in found.items() if tokens > 0] if found else [""]:
            adapter = self._adapter_of(task)
            mine = [s for s in self.sites if s.adapter == adapter]
            if all(s.A.grad is None and s.B.grad is None for s in mine):
                raise TrainingError(
                    "In Multi, each batch trains the adapter of its task, and the task of a "
                    "batch was not known before it was computed.",
                    expected="a 'task' among the model's arguments, or Dynamics.select(task) "
                    "before the forward pass",
                    got=f"a step on {task!r} that left its adapter without gradient",
                    fix="say the task of each batch, or StressController(task_adapters=False)",
                )

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Switches here, after the step, so that its gradients still meet their parameters."""
        plan, self._plan = self._plan, ""
        note = ""
        if plan == "multi":
            note = self._leave_multi() if self._multi.on else self._enter_multi()
        elif plan == "mirror":
            note = self._change_mirror()
        elif plan == "rollback" and self._snapshot is not None:
            self._snapshot.restore(step.optimizer)
            note = "rollback"
        elif plan == "accept":
            for baseline in self._baselines.values():
                baseline.accept()
            self.error = self._own_error = 0.0
            note = "accept"
        if self._pending is not None:
            record, self._pending = self._pending, None
            texts = [t for t in (record.event, note) if t]
            self.history.append(replace(record, event="; ".join(texts)))

    def _calm(self) -> bool:
        """Whether the present state is worth coming back to."""
        if self._mirror.on or self.phi >= self._mirror.leave:
            return False
        # Absolute error says nothing about how training goes.
        return self._remembers() and (self.error < _CALM or self.error_kind == "absolute")

    def _decide(self, events: list[str]) -> None:
        """Sets what :meth:`after_step` is to do."""
        if self._mirror.wants(self.phi, may_enter=True):
            self._plan = "mirror"
            return
        if self._mirror.on:
            if self._patience.ended(self.phi) and not self._over():
                self._patience.tries += 1
                spent = self._patience.tries > self.returns
                self._plan = "accept" if spent and self._may_accept() else "rollback"
            return
        terms = [w * x for w, x in zip(self.weights, self._signals(), strict=True)]
        # What Multi relieves is tasks that pull against each other, and nothing else.
        opposed = self.weights[0] == 0 or (terms[0] >= max(terms) and self.conflict > 0.5)
        several = len(self._tasks) > 1 and self._adapters is not None
        if self._multi.wants(self.phi, may_enter=several and opposed):
            self._plan = "multi"

    def _over(self) -> bool:
        """Whether the stress is over, though the averages still say otherwise."""
        limit = _CALM if self.error_kind == "relative" else self._mirror.leave
        return self._own_error < limit and self._remembers()

    def _remembers(self) -> bool:
        return self.anchor is None or self.memory < _CALM

    def _may_accept(self) -> bool:
        """Whether the loss alone is what is high."""
        return self.error_kind == "relative" and self._remembers()

    def _signals(self) -> tuple[float, float, float]:
        return self.conflict, self.error, self.memory

    def _change_mirror(self) -> str:
        self._mirror.change()
        self._patience.start(self.phi)
        return "enter mirror" if self._mirror.on else "leave mirror"

    # -- reading the device --------------------------------------------------------------

    def _live_gradients(self, step: Step) -> list[Tensor]:
        groups = step.optimizer.param_groups
        return [p.grad for g in groups for p in g["params"] if p.grad is not None]

    def _read(
        self,
        step: Step,
        gradients: list[Tensor],
        gram: Tensor | None,
        distance: Tensor | None,
    ) -> dict[str, list[float]]:
        """Everything that the host must know, in one transfer."""
        loss = step.statistics.loss
        assert loss is not None
        tokens = step.statistics.tokens
        assert tokens is not None  # it comes with the loss
        parts = {"loss": loss.reshape(1), "tokens": tokens.reshape(1)}
        # Norms that overflow (entries above 1e19) count as not finite: such a step is none.
        dense = [g for g in gradients if not g.is_sparse and g.numel()]
        norms = [n.float() for n in torch._foreach_norm(dense)] if dense else []
        parts["gradient"] = (
            torch.stack([n.to(loss.device) for n in norms]).max().reshape(1)
            if norms
            else torch.zeros(1, device=loss.device)
        )
        for task, (value, tokens) in step.statistics.tasks.items():
            parts[f"task {task}"] = torch.stack((value, tokens.to(value.dtype)))
        if gram is not None:
            parts["gram"] = gram.flatten()
        if distance is not None:
            parts["drift"] = distance.reshape(1)
        flat = torch.cat([p.detach().to(loss.device, torch.float32) for p in parts.values()])
        numbers = iter(flat.tolist())
        return {key: [next(numbers) for _ in range(p.numel())] for key, p in parts.items()}

    def _see(self, values: Mapping[str, list[float]]) -> None:
        """Updates the signals."""
        losses = {k[5:]: v for k, v in values.items() if k.startswith("task ")}
        if self.error_kind == "absolute":
            self.error = self._absolute_error(values["loss"][0])
        else:
            self.error = self._relative_error(losses or {"": [values["loss"][0], 1.0]})
        if "drift" in values:
            distance = values["drift"][0]
            self.memory = min(1.0, distance) if math.isfinite(distance) else 1.0
        if "gram" in values:
            flat = values["gram"]
            size = math.isqrt(len(flat))
            found = conflict_from_gram([flat[i * size : (i + 1) * size] for i in range(size)])
            self.conflict = self.conflict if found is None else found

    def _absolute_error(self, loss: float) -> float:
        loss = min(_LARGEST, max(0.0, loss))
        known = self._baselines.setdefault("", LossBaseline(loss, loss))
        known.fast += self.error_rate * (loss - known.fast)
        self._own_error = loss / (1.0 + loss)
        return known.fast / (1.0 + known.fast)

    def _relative_error(self, losses: Mapping[str, list[float]]) -> float:
        total = sum(tokens for _, tokens in losses.values())
        own = 0.0
        for task, (loss, tokens) in losses.items():
            if tokens <= 0 or not math.isfinite(loss):
                continue
            loss = min(_LARGEST, max(-_LARGEST, loss))
            known = self._baselines.setdefault(task, LossBaseline(loss, loss))
            known.update(loss, self.error_rate)
            own += tokens * known.now
        self._own_error = own / total if total > 0 else 0.0
        for task, known in self._baselines.items():
            share = losses[task][1] / total if task in losses and total > 0 else 0.0
            known.share += _SHARE_RATE * (share - known.share)
        weight = sum(b.share for b in self._baselines.values())
        if weight <= 0:
            return 0.0
        return sum(b.share * b.error for b in self._baselines.values()) / weight

    # -- conflict ------------------------------------------------------------------------

    def _conflict_in_gradients(self) -> bool:
        return not self._multi.on and len(self._tasks) > 1

    def _gram(self) -> Tensor | None:
        """Inner products of what the tasks want, [T, T]."""
        if len(self._tasks) < 2:
            return None
        if self._multi.on:
            return gram_of_products(self._products_since_birth())
        return self._gradients.gram(self._shared, self._tasks)

    def _products_since_birth(self) -> Iterable[list[tuple[Tensor, Tensor]]]:
        """By layer: each task's (Q, P) of s (B_t A_t − B A)."""
        by_name = {(s.adapter, s.name): s for s in self.sites}
        for shared in self._shared:
            mine = [by_name.get((self._adapter_of(t), shared.name)) for t in self._tasks]
            products = []
            for site in mine:
                if site is None:
                    break
                Q, P = difference(site.A, site.B, shared.A, shared.B)
                products.append((Q * site.scaling, P))
            if len(products) == len(mine):
                yield products

    # -- memory, pull --------------------------------------------------------------------

    def _drift(self) -> Tensor | None:
        return None if self._snapshot is None else drift(self.sites, self._snapshot)

    def _anchor_memory(self) -> float:
        loss = self._anchor_loss()
        if not math.isfinite(loss):
            return 1.0
        self._anchor_lowest = min(self._anchor_lowest, loss)
        return saturate(relative_excess(loss, self._anchor_lowest, 0.0), _HALF)

    def _anchor_loss(self) -> float:
        """Mean over the task adapters, if there are any, and over processes."""
        model = self.context.model
        modes = [(m, m.training) for m in model.modules()]
        tasks: list[tuple[str, ...]] = [(t,) for t in self._tasks] if self._multi.on else [()]
        total = 0.0
        try:
            model.eval()
            for selected in tasks:
                if selected:
                    self._use(selected)
                total += self._one_anchor_loss(model)
        finally:
            for module, training in modes:
                module.training = training
            self._use(self._selected)
        total /= len(tasks)
        if distributed():
            # The same number everywhere: devices differ in the last digits.
            device = next(model.parameters()).device
            shared = torch.tensor(total, dtype=torch.float32, device=device)
            dist.all_reduce(shared)
            total = float(shared) / dist.get_world_size()
        return total

    def _one_anchor_loss(self, model: nn.Module) -> float:
        if callable(self.anchor):
            return float(self.anchor())
        assert self.anchor is not None
        losses = [model(**batch).loss for batch in self.anchor]
        return float(torch.stack([x.float() for x in losses]).mean())

    def _trained(self) -> list[nn.Parameter]:
        groups = self.context.optimizer.param_groups
        return [p for g in groups for p in g["params"] if p.requires_grad]

    def _take_snapshot(self) -> None:
        if self._snapshot is None:
            self._snapshot = Snapshot()
        self._snapshot.take(self._trained(), self.context.optimizer)

    # -- task adapters -------------------------------------------------------------------

    def _birth(self, task: str) -> None:
        """A task's adapter: a copy of the shared one, with its optimiser state."""
        adapters = self._adapters
        assert adapters is not None
        shared = adapters.parameters(self.context.adapter)
        flags = {key: p.requires_grad for key, p in shared.items()}
        name = self._adapter_of(task)
        self._check_free(task)
        adapters.copy(name)
        self._born.add(name)
        for key, flag in flags.items():  # PEFT sets flags when it adds
            shared[key].requires_grad_(flag)
        known = {id(p) for g in self.context.optimizer.param_groups for p in g["params"]}
        for key, parameter in adapters.parameters(name).items():
            parameter.requires_grad_(key in self._keys)
            if key in self._keys and id(shared[key]) in known:
                self.context.add_parameter(f"{name}/{key}", parameter, shared[key])

    def _enter_multi(self) -> str:
        self._multi.change()
        self._separate()
        self._take_snapshot()
        return "enter multi"

    def _separate(self) -> None:
        assert self._adapters is not None
        for task in self._tasks:
            self._birth(task)
        for parameter in self._adapters.parameters(self.context.adapter).values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self._gradients = TaskGradients()
        self._refresh()

    def _refresh(self) -> None:
        self.context.refresh([self._adapter_of(t) for t in self._tasks])
        self._use(self._selected)

    def _leave_multi(self) -> str:
        error = self._merge()
        self._join()
        self._multi.change()
        self._take_snapshot()
        return f"leave multi: error {error:.3g}"

    def _join(self) -> None:
        """Back to the shared adapter alone; its values are not touched."""
        adapters = self._adapters
        assert adapters is not None
        shared = self.context.adapter
        added = {id(p) for p in self.context.added.values()}
        for task in self._tasks:
            name = self._adapter_of(task)
            for parameter in adapters.parameters(name).values():
                if id(parameter) in added:
                    self.context.remove_parameter(parameter)
                parameter.requires_grad_(False)
                parameter.grad = None
        adapters.use([shared])
        if not self.keep_tasks:
            for task in self._tasks:
                adapters.delete(self._adapter_of(task))
        for key, parameter in adapters.parameters(shared).items():
            parameter.requires_grad_(key in self._keys)
        self.context.refresh([shared])

    def _merge(self) -> float:
        """The tasks' mean into the shared adapter; gives the relative error of ΔW."""
        adapters = self._adapters
        assert adapters is not None
        by_name = {(s.adapter, s.name): s for s in self.sites}
        self._merge_error = merge_adapters(
            [
                (site, [by_name[self._adapter_of(t), site.name] for t in self._tasks])
                for site in self._shared
            ],
            adapters.parameters(self.context.adapter),
            [adapters.parameters(self._adapter_of(t)) for t in self._tasks],
            self.context.optimizer,
        )
        return self._merge_error

    # -- state ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        columns = {
            f.name: torch.tensor([getattr(r, f.name) for r in self.history], dtype=torch.float64)
            for f in fields(StressRecord)
            if f.name not in ("mode", "event")
        }
        modes = [MODES.index(r.mode) for r in self.history]
        state: dict[str, Any] = {
            "phi": self.phi,
            "signals": list(self._signals()),
            "started": self._started,
            "baselines": {task: b.state_dict() for task, b in self._baselines.items()},
            "tasks": list(self._tasks),
            "selected": list(self._selected),
            "multi": self._multi.state(),
            "mirror": self._mirror.state(),
            "patience": [self._patience.steps, self._patience.reference, self._patience.tries],
            "own_error": self._own_error,
            "anchor_lowest": self._anchor_lowest,
            "gradients": self._gradients.state_dict(),
            "history": {
                **columns,
                "mode": torch.tensor(modes, dtype=torch.int8),
                "event": {str(i): r.event for i, r in enumerate(self.history) if r.event},
            },
            "adapters": None,
            "snapshot": None,
        }
        if self._multi.on and self._adapters is not None:
            names = [self.context.adapter, *map(self._adapter_of, self._tasks)]
            state["adapters"] = {
                name: {k: p.detach() for k, p in self._adapters.parameters(name).items()}
                for name in names
            }
        if self._snapshot is not None:
            state["snapshot"] = self._snapshot.state_dict(self._trained())
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back, task adapters included: they are made, and filled, if the state has them."""
        if self._multi.on:
            self._multi.on = False
            self._join()
        self.phi = state["phi"]
        self.conflict, self.error, self.memory = state["signals"]
        self._started = state["started"]
        self._baselines = {t: LossBaseline.from_state(b) for t, b in state["baselines"].items()}
        self._tasks = list(state["tasks"])
        self._selected = tuple(state["selected"])
        self._multi.restore(state["multi"])
        self._mirror.restore(state["mirror"])
        patience = self._patience
        patience.steps, patience.reference, patience.tries = state["patience"]
        self._own_error = state["own_error"]
        self._anchor_lowest = state["anchor_lowest"]
        if state["adapters"] is not None:
            if self._adapters is None:
                raise ConfigError(
                    "The state has one adapter a task, and this controller makes none.",
                    expected="StressController(task_adapters=True)",
                    key="task_adapters",
                )
            self._separate()
            for name, values in state["adapters"].items():
                for key, parameter in self._adapters.parameters(name).items():
                    parameter.copy_(values[key])
        self._gradients = TaskGradients.from_state(state["gradients"], self._shared)
        self._snapshot = None
        if state["snapshot"] is not None:
            self._snapshot = Snapshot.from_state(state["snapshot"], self._trained())
        kept = state["history"]
        events = kept["event"]
        columns = [kept[k].tolist() for k in ("step", "phi", "error", "conflict", "memory")]
        self.history.clear()
        for i, (step, phi, error, conflict, memory, mode, loss) in enumerate(
            zip(*columns, kept["mode"].tolist(), kept["loss"].tolist(), strict=True)
        ):
            self.history.append(
                StressRecord(
                    int(step),
                    phi,
                    error,
                    conflict,
                    memory,
                    MODES[mode],
                    loss,
                    events.get(str(i), ""),
                )
            )
        self._pending, self._plan = None, ""

    @torch.no_grad()
    def close(self) -> None:
        """Merges the task adapters into the shared one, and lets the snapshot go."""
        if self._multi.on:
            note = self._leave_multi()
            if self.history:
                last = self.history.pop()
                texts = [t for t in (last.event, note) if t]
                self.history.append(replace(last, event="; ".join(texts)))
        self._snapshot = None
        self._gradients = TaskGradients()

    # -- history -------------------------------------------------------------------------

    def save_history(self, path: str | Path) -> None:
        """Writes the history: ``.json`` (a list of objects) or ``.csv``.

        Raises:
            ConfigError: If the path ends otherwise.
        """
        writers = {".json": write_json, ".csv": write_csv}
        writer = writers.get(Path(path).suffix.lower())
        if writer is None:
            raise ConfigError(
                "What kind of file is meant is not clear.",
                expected="a path that ends in .json or .csv",
                got=str(path),
            )
        writer(self.history, path)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check(key: str, value: object, usable: bool, expected: str) -> None:
    if not usable:
        raise ConfigError(
            f"{key} cannot be {value!r}.", expected=expected, got=repr(value), key=key
        )
