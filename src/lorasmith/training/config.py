"""What a training run is told: frozen dataclasses, the same for Python, YAML and the shell.

Importing this module imports neither torch nor Transformers: the command line reads its
help texts from here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from cyclopts import Parameter

from lorasmith.errors import ConfigError

if TYPE_CHECKING:
    from lorasmith.core.config import AdapterConfig
    from lorasmith.dynamics.protocol import Dynamic

__all__ = ["AdapterOptions", "Packing", "Quantization", "Schedule", "TrainConfig"]

Packing = Literal["auto", "on", "off"]
Schedule = Literal["linear", "cosine", "constant"]
Form = Literal["full", "diagonal", "loadings"]
Quantization = Literal["nf4", "fp4", "int8", "int4", "int8-torchao"]


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Which adapter to train. What is left out takes the variant's default."""

    variant: str = "lora"
    """Adapter family; lorasmith variants lists them."""

    r: int | None = None
    """Rank of the update."""

    alpha: float | None = None
    """Numerator of the scaling."""

    dropout: float | None = None
    """Probability with which an input of the adapter is zeroed in training."""

    targets: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True)] = None
    """Layers to adapt: all-linear, a role, names, globs or re:EXPRESSION."""

    exclude: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True)] = None
    """Layers to leave out, in the same forms."""

    layers: Annotated[tuple[int, ...] | None, Parameter(consume_multiple=True)] = None
    """Indices of the transformer blocks to adapt; negative ones count from the end."""

    scaling: str | None = None
    """standard (alpha / r) or rslora (alpha / √r)."""

    init: str | None = None
    """How the tensors start: kaiming, gaussian, orthogonal, pissa, olora, eva, corda, lora_ga,
    loftq."""

    init_options: dict[str, Any] | None = None
    """Options of the initialisation, as JSON: {"NAME": VALUE}."""

    rank_pattern: dict[str, int] | None = None
    """Ranks of single layers, as JSON: {"NAME": RANK}."""

    alpha_pattern: dict[str, float] | None = None
    """Alphas of single layers, as JSON: {"NAME": ALPHA}."""

    feedforward: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True)] = None
    """IA3: layers whose input is scaled instead of their output."""

    modules_to_save: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True)] = None
    """Modules to train as a whole, beside the adapter."""

    options: dict[str, Any] | None = None
    """Fields of the variant's own, as --adapter.options.NAME VALUE."""

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "feedforward", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, (value,))
            elif value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        doubled = sorted(set(self.options or ()) & self._common())
        if doubled:
            raise ConfigError(
                f"{doubled[0]!r} is an option of its own.",
                fix=f"give adapter.{doubled[0]} instead of adapter.options.{doubled[0]}",
                key=f"adapter.options.{doubled[0]}",
            )

    @classmethod
    def _common(cls) -> set[str]:
        return {f.name for f in dataclasses.fields(cls)} - {"options"}

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were set, without ``variant``; ``options`` are merged in."""
        values = {
            name: value
            for name in (f.name for f in dataclasses.fields(self))
            if name not in ("variant", "options") and (value := getattr(self, name)) is not None
        }
        return {**values, **(self.options or {})}

    def to_config(self) -> AdapterConfig:
        """The variant's own configuration.

        Raises:
            UnknownNameError: No variant of that name is registered.
            ConfigError: The variant does not take a field that was set, or refuses its
                value.
        """
        import lorasmith.adapters  # noqa: F401 - registers the variants
        from lorasmith.core.registry import get_variant, variants

        # On a command line dashes are at home, in Python names underscores.
        same = self.variant.replace("-", "_")
        known = self.variant not in variants() and same in variants()
        kind = get_variant(same if known else self.variant).config_class
        fields = {f.name: f for f in dataclasses.fields(kind)}
        given = self.given
        for name in given:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                raise ConfigError(
                    f"The variant {self.variant!r} does not take {name!r}.",
                    expected=f"fields among {', '.join(fields)}",
                    got=name,
                    fix=f"did you mean {near[0]!r}?" if near else "leave it out",
                    key=f"adapter.{name}",
                )
        own = set(self.options or ())
        values: dict[str, Any] = {
            name: _typed(value, str(fields[name].type)) if name in own else value
            for name, value in given.items()
        }
        for name in ("targets", "exclude", "feedforward"):
            # "all-linear" and its like are words, not lists of one name.
            if isinstance(values.get(name), tuple) and len(values[name]) == 1:
                values[name] = values[name][0]
        return kind(**values)


def _value(value: Any) -> Any:
    """A value of which the type is not known, from text or already read.

    Read as JSON, since YAML takes 1e-3 for text and off for False.
    """
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return {"True": True, "False": False}.get(value, value)


def _typed(value: object, annotation: str) -> object:
    """A value from the command line, which is text, in the type that its text looks like."""
    if not isinstance(value, str) or annotation in ("str", "<class 'str'>"):
        return value
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Raises:
        ConfigError: If a value cannot be used, or two of them contradict each other.
    """

    model: str
    """Base model: an alias (smollm2), a hub id, or a path."""

    data: str
    """Rows to train on: a jsonl, json, csv, tsv, parquet or txt file, a hub id, or
    builtin:NAME; or several tasks: NAME=SOURCE,NAME=SOURCE."""

    _: KW_ONLY

    output: Annotated[Path, Parameter(alias="-o")]
    """Directory for the adapter, its checkpoints and training.json."""

    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    """Which adapter to train."""

    split: str = "train"
    """Split of DATA to train on."""

    limit: int | None = None
    """Use at most so many rows, of each source."""

    task_column: str = "auto"
    """Column with the task of each row: every batch is then of one task, and losses are reported
    for each. auto: the column task, if there is one with at most 64 tasks; none: no tasks."""

    dynamics: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()
    """Rules that act during training, with commas between them: gauge,entropy,budget. lorasmith
    dynamics lists them."""

    dynamics_options: dict[str, dict[str, Any]] | None = None
    """Options of the rules, as --dynamics-options.gauge.mu 1.0, or as JSON:
    {"gauge": {"mu": 1.0}}."""

    calibration: str | None = None
    """Rows to start from, in the same forms as DATA, for adapters that look at data first
    (initialisations eva, corda, lora_ga, …). Default: the first of DATA's."""

    calibration_split: str = "train"
    """Split of --calibration."""

    calibration_rows: int | None = None
    """Start from so many rows; default: 128."""

    eval_data: str | None = None
    """Rows to evaluate on, in the same forms as DATA."""

    eval_data_split: str = "test"
    """Split of --eval-data."""

    eval_split: float = 0.0
    """Fraction of DATA's rows to hold out and evaluate on."""

    eval_limit: int | None = None
    """Evaluate on at most so many rows."""

    max_length: int = 1024
    """Longest row, in tokens; what is longer is cut."""

    packing: Packing = "auto"
    """Lay the rows of a batch in one sequence, without padding: auto where the model can."""

    steps: int | None = None
    """Number of optimiser steps; if given, --epochs does not count."""

    epochs: float = 1.0
    """Number of passes over the rows."""

    batch_size: int = 8
    """Rows a step on each device."""

    gradient_accumulation: int = 1
    """Batches whose gradients make up one optimiser step."""

    lr: float = 2e-4
    """Peak learning rate of AdamW."""

    schedule: Schedule = "linear"
    """Course of the learning rate after the warm-up."""

    warmup: float = 0.03
    """Steps of linear warm-up; a value below 1 is a fraction of all steps, rounded down."""

    lora_plus_ratio: float | None = None
    """LoRA+: learn B so many times as fast as A, e.g. 16. Default: one rate for all."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""

    seed: int = 0
    """Seed of the adapter's start, the order of rows and dropout."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the base model; the adapter is float32 always."""

    quantize: Quantization | None = None
    """Quantise the base model while loading it: nf4, fp4 or int8 (bitsandbytes), int4 or
    int8-torchao (torchao)."""

    dequantize: bool = False
    """Let an adapter that must read the base's weights dequantise them, layer by layer."""

    device: str = "auto"
    """auto, cpu, cuda or mps."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    eval_batch_size: int | None = None
    """Rows a batch in evaluation; default: as in training."""

    eval_steps: int | None = None
    """Evaluate every so many steps; default: after each epoch. The end is always evaluated."""

    early_stopping: int | None = None
    """Stop after so many evaluations without a new best loss, and keep the best adapter."""

    save_steps: int | None = 500
    """Write a checkpoint every so many steps."""

    save_total_limit: int = 2
    """Keep at most so many checkpoints."""

    log_steps: int | None = None
    """Log the loss every so many steps; default: about 200 times a run."""

    report_to: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()
    """Trackers: tensorboard, wandb, mlflow, trackio, …"""

    run_name: str | None = None
    """Name of the run in trackers."""

    subspace: Path | None = None
    """Directory of a fleet's shared subspace (lorasmith fleet compress): train a new task inside
    its basis. Of the adapter's options then only targets, exclude, layers, dropout and
    modules_to_save count."""

    subspace_extra: int = 0
    """New directions (of a share basis: components) a layer to train with the core, of this task
    only."""

    subspace_form: Form | None = None
    """What is trained: full or diagonal with a joint basis, loadings with a share basis. Default:
    full, or loadings."""

    subspace_task: str | None = None
    """Id of the new task in the fleet; default: the name of OUTPUT."""

    subspace_save: Path | None = None
    """Write the fleet with the new task to this directory."""

    subspace_in_place: bool = False
    """Add the new task to the fleet in its own directory."""

    resume: str = "no"
    """no, last (the newest good checkpoint in OUTPUT), auto (the same if there is one), or the
    path of a checkpoint."""

    changed: Literal["refuse", "accept"] = "refuse"
    """What to do where a resumed run has other data, another base or other options than it began
    with. Another adapter or other dynamics are refused always."""

    overwrite: bool = False
    """Replace what an earlier run left in OUTPUT."""

    revision: str | None = None
    """Branch, tag or commit of MODEL on the hub."""

    trust_remote_code: bool = False
    """Let code that comes with MODEL run."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output).expanduser())
        for key in ("subspace", "subspace_save"):
            if (given := getattr(self, key)) is not None:
                object.__setattr__(self, key, Path(given).expanduser())
        trackers: Any = self.report_to
        trackers = (trackers,) if isinstance(trackers, str) else tuple(trackers)
        object.__setattr__(self, "report_to", tuple(n for n in trackers if n != "none"))
        self._normalise_dynamics()
        for name in ("model", "data", "device", "split", "resume", "task_column"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"{name} is empty.", got=repr(value), key=name)
        for name in (
            "steps",
            "limit",
            "eval_limit",
            "calibration_rows",
            "max_length",
            "batch_size",
            "gradient_accumulation",
            "eval_batch_size",
            "eval_steps",
            "early_stopping",
            "save_steps",
            "save_total_limit",
            "log_steps",
        ):
            _check_integer(name, getattr(self, name), at_least=1)
        _check_integer("seed", self.seed, at_least=0)
        _check_integer("subspace_extra", self.subspace_extra, at_least=0)
        if self.max_length < 2:
            raise ConfigError(
                "max_length leaves no token to predict.",
                expected="at least 2",
                got=self.max_length,
                key="max_length",
            )
        _check_number("epochs", self.epochs, above=0.0)
        _check_number("lr", self.lr, above=0.0)
        if self.lora_plus_ratio is not None:
            _check_number("lora_plus_ratio", self.lora_plus_ratio, above=0.0)
        _check_number("warmup", self.warmup, at_least=0.0)
        _check_number("weight_decay", self.weight_decay, at_least=0.0)
        _check_number("max_grad_norm", self.max_grad_norm, at_least=0.0)
        _check_number("eval_split", self.eval_split, at_least=0.0, below=1.0)
        _check_choice("changed", self.changed, ("refuse", "accept"))
        _check_choice("packing", self.packing, ("auto", "on", "off"))
        _check_choice("schedule", self.schedule, ("linear", "cosine", "constant"))
        _check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        if self.quantize is not None:
            _check_choice("quantize", self.quantize, get_args(Quantization))
        self._check_together()
        self._check_subspace()

    def _normalise_dynamics(self) -> None:
        """Names as a tuple, options beside them; a mapping of both is taken, too."""
        given: Any = self.dynamics
        options = {
            name: dict(values or {}) for name, values in (self.dynamics_options or {}).items()
        }
        if isinstance(given, Mapping):
            for name, values in given.items():
                if values:
                    options[name] = {**dict(values), **options.get(name, {})}
        parts = [given] if isinstance(given, str) else list(given or ())
        names = [n.strip() for part in parts for n in str(part).split(",")]
        names = [n for n in names if n and n != "none"]
        object.__setattr__(self, "dynamics", tuple(names))
        options = {
            name: {key.replace("-", "_"): _value(value) for key, value in values.items()}
            for name, values in options.items()
            if values
        }
        object.__setattr__(self, "dynamics_options", options or None)

    def make_dynamics(self) -> tuple[Dynamic, ...]:
        """The rules, made anew.

        Raises:
            UnknownNameError: There is no rule of that name.
            ConfigError: A rule does not take an option that was given, or refuses its value.
        """
        if not self.dynamics and not self.dynamics_options:
            return ()
        from lorasmith.dynamics.registry import make_dynamics

        options = self.dynamics_options
        if options is not None and options.get("stress", {}).get("anchor") is not None:
            from lorasmith.training.anchor import with_anchor

            options = with_anchor(options)
        return make_dynamics(self.dynamics, options)

    def _check_together(self) -> None:
        if self.eval_data is not None and self.eval_split > 0:
            raise ConfigError(
                "eval_data and eval_split both say what to evaluate on.",
                expected="one of them",
                fix="leave out eval_split to evaluate on eval_data",
                key="eval_split",
            )
        if not self.evaluates:
            for name in ("early_stopping", "eval_steps"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} needs something to evaluate on.",
                        fix="give eval_data or eval_split as well",
                        key=name,
                    )
        if self.steps is not None and self.warmup >= 1 and self.warmup >= self.steps:
            raise ConfigError(
                "The warm-up is as long as the whole run.",
                expected=f"fewer than {self.steps} steps, or a fraction below 1",
                got=self.warmup,
                key="warmup",
            )
        if self.resume != "no" and self.overwrite:
            raise ConfigError(
                "resume and overwrite contradict each other.",
                fix="leave one of them out",
                key="overwrite",
            )

    def _check_subspace(self) -> None:
        """What goes with --subspace, and what does not go without it."""
        if self.subspace_form is not None:
            _check_choice("subspace_form", self.subspace_form, get_args(Form))
        if self.subspace is None:
            for key in ("extra", "form", "task", "save", "in_place"):
                if getattr(self, f"subspace_{key}"):
                    raise ConfigError(
                        f"subspace_{key} needs a subspace.",
                        fix="give subspace, the directory of a fleet, as well",
                        key=f"subspace_{key}",
                    )
            return
        own = {"targets", "exclude", "layers", "dropout", "modules_to_save"}
        others = sorted(set(self.adapter.given) - own)
        if others or self.adapter.variant not in ("lora", "subspace"):
            raise ConfigError(
                "What is trained in a subspace follows from its basis.",
                expected="adapter options among " + ", ".join(sorted(own)),
                got=", ".join(others) or f"variant {self.adapter.variant}",
                fix="subspace_form and subspace_extra say what is trained",
                key=f"adapter.{others[0]}" if others else "adapter.variant",
            )
        if self.subspace_save is not None and self.subspace_in_place:
            raise ConfigError(
                "subspace_save and subspace_in_place contradict each other.",
                fix="leave one of them out",
                key="subspace_save",
            )

    @property
    def subspace_target(self) -> Path | None:
        """Where the fleet with the new task is to be written, if anywhere."""
        return self.subspace if self.subspace_in_place else self.subspace_save

    @property
    def evaluates(self) -> bool:
        """Whether the run has rows to evaluate on."""
        return self.eval_data is not None or self.eval_split > 0

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types that JSON and YAML can hold."""
        values = dataclasses.asdict(self)
        for key in ("output", "subspace", "subspace_save"):
            path = getattr(self, key)
            values[key] = None if path is None else str(path)
        values["report_to"] = list(self.report_to)
        values["dynamics"] = list(self.dynamics)
        values["adapter"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values["adapter"].items()
            if value is not None
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`; an unknown field is an error."""
        values = dict(values)
        adapter = values.pop("adapter", {})
        if not isinstance(adapter, AdapterOptions):
            adapter = _build(AdapterOptions, adapter, "adapter.")
        built: TrainConfig = _build(cls, {**values, "adapter": adapter}, "")
        return built


def _build(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
    fields = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise ConfigError(
                f"There is no option {prefix}{name}.",
                fix=f"did you mean {prefix}{near[0]}?" if near else "leave it out",
                key=f"{prefix}{name}",
            )
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in values
    ]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing.", key=f"{prefix}{missing[0]}")
    return kind(**values)


_FIX = "give such a number, or leave it out for the default"


def _check_integer(key: str, value: object, *, at_least: int) -> None:
    if value is None:
        return
    if type(value) is not int or value < at_least:
        raise ConfigError(
            f"{key} cannot be {value!r}.",
            expected=f"an integer of at least {at_least}",
            got=repr(value),
            fix=_FIX,
            key=key,
        )


def _check_number(
    key: str,
    value: object,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    usable = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= at_least
        and value > above
        and value < below
    )
    if not usable:
        bounds = [
            f"at least {at_least:g}" if math.isfinite(at_least) else "",
            f"above {above:g}" if math.isfinite(above) else "",
            f"below {below:g}" if math.isfinite(below) else "",
        ]
        raise ConfigError(
            f"{key} cannot be {value!r}.",
            expected="a number " + " and ".join(b for b in bounds if b),
            got=repr(value),
            fix=_FIX,
            key=key,
        )


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise ConfigError(
            f"{key} cannot be {value!r}.",
            expected=" or ".join(choices),
            got=repr(value),
            fix=f"did you mean {near[0]!r}?" if near else None,
            key=key,
        )
