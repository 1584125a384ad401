"""Which task of a fleet a prompt belongs to, from the hidden states of the frozen base.

    h = mean over the prompt's tokens of the hidden state after layer l       [d]
    p = softmax(W (h − μ) / σ + b)                                            [tasks]

The base model runs once over the prompt, without any adapter. μ and σ are mean and standard
deviation of h over the training rows, W and b multinomial logistic regression with an L2
penalty (scikit-learn's, ``C``). vLoRA trains an MLP in its place; on the tasks of our
adapters, with few examples each, there is nothing left for one to gain.

l is the middle of the model unless said otherwise: the last layer's states are about the next
token, which in a chat template is much the same for all prompts.

A router says a task (top-1), or weights for several that are blended in delta space by
:meth:`MultiTaskModel.use`. Whatever is not sure enough (``threshold``) goes to the base model,
and so does what resembles examples given as ``others``. A softmax knows only what it has
seen: without ``others`` a prompt of none of the tasks may be assigned to one with confidence.

Accuracy is measured on rows that were held out by a stratified split, and the classifier that is
kept is the one that was measured.

Files: ``router.json`` and ``router.safetensors``; no pickle.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.core.adapter import unwrap
from lorasmith.core.attach import use
from lorasmith.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    DataError,
    LorasmithError,
    MissingDependencyError,
)
from lorasmith.fleet.members import check_id, unknown_id
from lorasmith.fleet.multitask import MultiTaskModel
from lorasmith.io.atomic import explained_failure, read_one_generation, replace_files
from lorasmith.io.fingerprint import Fingerprint, fingerprint
from lorasmith.io.strict import check_inside, read_object
from lorasmith.io.tensors import FileTensors, sha256_of
from lorasmith.io.weights import as_path

__all__ = ["Prompt", "RouterReport", "Routing", "TaskRouter"]

#: A user's message, or the turns of a conversation ({"role": …, "content": …}).
Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]]"
#: (phase, done, total).
Progress: TypeAlias = Callable[[str, int, int], None]

CONFIG = "router.json"
TENSORS = "router.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Routing:
    """Where one prompt goes.

    Attributes:
        task: The likeliest task, or ``None`` for the base model.
        confidence: Its probability (of whatever is likeliest, where ``task`` is ``None``).
        weights: Task → weight, summing to 1, the heaviest first; empty for the base model.
        probabilities: Task → probability; ``others`` have what is missing to 1.
    """

    task: str | None
    confidence: float
    weights: Mapping[str, float]
    probabilities: Mapping[str, float]

    @property
    def blend(self) -> Mapping[str, float] | None:
        """What :meth:`MultiTaskModel.use` takes for a soft choice."""
        return self.weights or None

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return {
            "task": self.task,
            "confidence": self.confidence,
            "weights": dict(self.weights),
            "probabilities": dict(self.probabilities),
        }


@dataclass(frozen=True)
class RouterReport:
    """What training came to, measured on rows that were held out.

    Attributes:
        accuracy: Share of the held-out rows that go to their own task.
        tasks: Class → share of its held-out rows that do; ``None`` is the class of ``others``.
        confusion: Of each class (in the order of ``tasks``) the number of held-out rows that
            go to each.
        trained: Number of rows trained on.
        held_out: Number of rows held out.
        layer: After which layer hidden states were taken.
        seed: Of the split.
    """

    accuracy: float
    tasks: Mapping[str | None, float]
    confusion: tuple[tuple[int, ...], ...]
    trained: int
    held_out: int
    layer: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold; the class of ``others`` is null."""
        return {
            **asdict(self),
            "tasks": [{"task": t, "accuracy": a} for t, a in self.tasks.items()],
            "confusion": [list(row) for row in self.confusion],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RouterReport:
        """The inverse of :meth:`to_dict`."""
        return cls(
            accuracy=float(values["accuracy"]),
            tasks={t["task"]: float(t["accuracy"]) for t in values["tasks"]},
            confusion=tuple(tuple(map(int, row)) for row in values["confusion"]),
            trained=int(values["trained"]),
            held_out=int(values["held_out"]),
            layer=int(values["layer"]),
            seed=int(values["seed"]),
        )


@dataclass(frozen=True, eq=False)
class _Classifier:
    """Attributes: W [classes, d], b [classes], μ [d], σ [d], all float32 on the CPU."""

    classes: tuple[str | None, ...]
    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Probabilities [n, classes] of hidden states [n, d]."""
        x = (states.double() - self.mean.double()) / self.scale.double()
        return torch.softmax(x @ self.weight.double().mT + self.bias.double(), dim=1)


class TaskRouter:
    """Assigns prompts to the tasks of a fleet; see the module.

    Args:
        model: The base model, or the :class:`MultiTaskModel` around it. While the router looks
            at a prompt no adapter acts.
        tokenizer: Its tokenizer.
        layer: After which layer to take hidden states: 0 for the embeddings, negative ones
            from the last; the middle by default.
        template: Whether to put prompts into the tokenizer's chat template, if it has one, as
            training does.
        max_length: Prompts longer than this many tokens are cut to their end.
        batch_size: Prompts a pass.
    """

    def __init__(
        self,
        model: nn.Module | MultiTaskModel,
        tokenizer: Any,
        *,
        layer: int | None = None,
        template: bool = True,
        max_length: int = 512,
        batch_size: int = 16,
    ) -> None:
        for key, value in (("max_length", max_length), ("batch_size", batch_size)):
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"{key} is not usable.", expected="at least 1", got=repr(value), key=key
                )
        self._served = model if isinstance(model, MultiTaskModel) else None
        self._root = unwrap(model.model if isinstance(model, MultiTaskModel) else model)
        self._tokenizer = tokenizer
        self._template = template
        self._max_length, self._batch_size = max_length, batch_size
        self.layer = self._layer(layer)
        #: The accuracy that training came to; ``None`` before.
        self.report: RouterReport | None = None
        self._classifier: _Classifier | None = None
        self._threshold = 0.0

    def _layer(self, layer: int | None) -> int:
        count = getattr(getattr(self._root, "config", None), "num_hidden_layers", None)
        if not isinstance(count, int):
            raise ConfigError(
                "The model does not tell how many layers it has.",
                expected="a Transformers model",
                got=type(self._root).__name__,
                key="model",
            )
        if layer is None:
            return count // 2
        if type(layer) is not int or not -count - 1 <= layer <= count:
            raise ConfigError(
                "The model has no such layer.",
                expected=f"0 (embeddings) to {count}, or negative",
                got=repr(layer),
                key="layer",
            )
        return layer if layer >= 0 else count + 1 + layer

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks it tells apart."""
        return tuple(t for t in self._trained().classes if t is not None)

    def _trained(self) -> _Classifier:
        if self._classifier is None:
            raise ConfigError("The router is not trained.", fix="fit(examples), or load one")
        return self._classifier

    # -- hidden states -----------------------------------------------------------------------

    def hidden(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> Tensor:
        """Mean hidden state of each prompt [n, d], float32, of the base model alone."""
        ids = [self._encode(p) for p in prompts]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        device = next(self._root.parameters()).device
        # Without the output head: it is as large as a layer and of no use here.
        body: Any = getattr(self._root, "base_model", self._root)
        found: dict[int, Tensor] = {}
        was_training = [m for m in self._root.modules() if m.training]
        self._root.eval()
        try:
            with torch.no_grad(), self._base_alone():
                for start in range(0, len(order), self._batch_size):
                    chosen = order[start : start + self._batch_size]
                    width = len(ids[chosen[0]])
                    tokens = torch.zeros(len(chosen), width, dtype=torch.long)
                    mask = torch.zeros_like(tokens)
                    for row, i in enumerate(chosen):
                        tokens[row, : len(ids[i])] = torch.tensor(ids[i])
                        mask[row, : len(ids[i])] = 1
                    output = body(
                        input_ids=tokens.to(device),
                        attention_mask=mask.to(device),
                        output_hidden_states=True,
                    )
                    states = output.hidden_states[self.layer].float().cpu()
                    weights = mask[..., None].float()
                    means = (states * weights).sum(1) / weights.sum(1)
                    found.update(zip(chosen, means, strict=True))
                    if progress is not None:
                        progress("hidden states", len(found), len(ids))
        finally:
            for module in was_training:
                module.training = True
        return torch.stack([found[i] for i in range(len(ids))])

    def _base_alone(self) -> AbstractContextManager[Any]:
        return use(self._root, None) if self._served is None else self._served.use(None)

    def _encode(self, prompt: Prompt) -> list[int]:
        tokenizer = self._tokenizer
        if self._template and getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = tokenizer.apply_chat_template(
                [dict(t) for t in turns], tokenize=False, add_generation_prompt=True
            )
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        elif isinstance(prompt, str):
            ids = list(tokenizer(prompt)["input_ids"])
        else:
            raise DataError(
                "A conversation takes a tokenizer with a chat template.",
                expected="a text",
                got=f"{len(prompt)} turns",
            )
        if not ids:
            raise DataError("A prompt is empty.", expected="at least one token", got=repr(prompt))
        return ids[-self._max_length :]

    # -- training ----------------------------------------------------------------------------

    def fit(
        self,
        examples: Mapping[str, Sequence[Prompt]],
        *,
        others: Sequence[Prompt] = (),
        held_out: float = 0.25,
        seed: int = 0,
        C: float = 1.0,
        threshold: float = 0.0,
        progress: Progress | None = None,
    ) -> RouterReport:
        """Trains it on examples of each task.

        Args:
            examples: Task → prompts; at least two of each.
            others: Prompts that belong to no task: a class of its own, the base model's.
            held_out: Share of the rows of each class that accuracy is measured on.
            seed: Of the split.
            C: Inverse strength of the L2 penalty.
            threshold: Probability below which a prompt goes to the base model.
            progress: Called with (phase, done, total).

        Raises:
            ConfigError: There are not two classes, or a setting cannot be used.
            DataError: A class has not two prompts.
            UnknownNameError: The fleet has no such task, where the router knows the fleet.
        """
        classes: list[str | None] = [check_id(t) for t in examples]
        rows = [list(p) for p in examples.values()]
        if others:
            classes.append(None)
            rows.append(list(others))
        self._check(classes, rows, held_out, C, threshold)
        labels = [i for i, prompts in enumerate(rows) for _ in prompts]
        states = self.hidden([p for prompts in rows for p in prompts], progress)
        model_selection, linear_model, metrics = _sklearn()
        train, test = model_selection.train_test_split(
            range(len(labels)), test_size=held_out, stratify=labels, random_state=seed
        )
        seen = states[train].double()
        mean, scale = seen.mean(0), seen.std(0, correction=0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        fitted = linear_model.LogisticRegression(C=C, max_iter=2000)
        fitted.fit(((seen - mean) / scale).numpy(), [labels[i] for i in train])
        weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
        if len(classes) == 2:  # scikit-learn keeps the difference of the two
            weight, bias = torch.cat((0 * weight, weight)), torch.cat((0 * bias, bias))
        made = _Classifier(
            tuple(classes), *(t.float().contiguous() for t in (weight, bias, mean, scale))
        )
        guessed = made(states[test]).argmax(1).tolist()
        truth = [labels[i] for i in test]
        table = metrics.confusion_matrix(truth, guessed, labels=list(range(len(classes))))
        confusion = tuple(tuple(int(n) for n in row) for row in table)
        self._classifier, self._threshold = made, float(threshold)
        self.report = RouterReport(
            accuracy=sum(row[i] for i, row in enumerate(confusion)) / len(test),
            tasks={
                c: row[i] / sum(row)
                for i, (c, row) in enumerate(zip(classes, confusion, strict=True))
            },
            confusion=confusion,
            trained=len(train),
            held_out=len(test),
            layer=self.layer,
            seed=seed,
        )
        return self.report

    def _check(
        self,
        classes: Sequence[str | None],
        rows: Sequence[Sequence[Prompt]],
        held_out: float,
        C: float,
        threshold: float,
    ) -> None:
        if len(classes) < 2:
            raise ConfigError(
                "There is nothing to tell apart.",
                expected="two tasks, or a task and others",
                got=f"{len(classes)} classes",
                key="examples",
            )
        known = None if self._served is None else self._served.tasks
        for name, prompts in zip(classes, rows, strict=True):
            if name is not None and known is not None and name not in known:
                raise unknown_id(f"The fleet has no task {name!r}.", name, known, key="examples")
            if len(prompts) < 2:
                raise DataError(
                    f"There are too few examples of {name or 'others'!r}.",
                    expected="at least two: one to train on, one to measure with",
                    got=len(prompts),
                    key=name,
                )
        checks = (
            ("held_out", held_out, 0 < held_out < 1, "a share between 0 and 1"),
            ("C", C, C > 0, "above 0"),
            ("threshold", threshold, 0 <= threshold <= 1, "a probability"),
        )
        for key, value, good, expected in checks:
            if not good:
                raise ConfigError(
                    f"{key} is not usable.", expected=expected, got=repr(value), key=key
                )
        fewest = round(held_out * sum(map(len, rows)))
        if fewest < len(classes):
            raise DataError(
                "Too few rows are held out for every class to be measured.",
                expected=f"at least {len(classes)}",
                got=fewest,
                fix="more examples, or a larger held_out",
                key="held_out",
            )

    # -- routing -----------------------------------------------------------------------------

    def route(
        self,
        prompts: Sequence[Prompt],
        *,
        most: int = 1,
        floor: float = 0.1,
        threshold: float | None = None,
        progress: Progress | None = None,
    ) -> list[Routing]:
        """Where prompts go.

        Args:
            prompts: Texts or conversations.
            most: How many tasks may share a prompt: 1 for the likeliest alone.
            floor: Tasks of a smaller probability take no part in a blend.
            threshold: Probability of the likeliest task below which the base model answers;
                that of training by default.
            progress: Called with (phase, done, total).

        Returns:
            One record a prompt. ``[r.task for r in …]`` and ``[r.blend for r in …]`` are what
            :meth:`MultiTaskModel.generate` takes as ``tasks``.

        Raises:
            ConfigError: The router is not trained, or a setting cannot be used.
        """
        classifier = self._trained()
        limit = self._threshold if threshold is None else threshold
        if type(most) is not int or most < 1:
            raise ConfigError("most is not usable.", expected="at least 1", got=most, key="most")
        for key, value in (("floor", floor), ("threshold", limit)):
            if not 0 <= value <= 1:
                raise ConfigError(
                    f"{key} is not a probability.", expected="0 to 1", got=value, key=key
                )
        if not prompts:
            return []
        found = []
        for row in classifier(self.hidden(list(prompts), progress)).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            chances = {t: p for t, p in zip(classifier.classes, row, strict=True) if t is not None}
            task = classifier.classes[best] if row[best] >= limit else None
            ranked = sorted(chances.items(), key=lambda item: -item[1])[:most]
            kept = {t: p for t, p in ranked if p >= floor or t == task} if task else {}
            total = sum(kept.values())
            weights = {t: p / total for t, p in kept.items()}
            found.append(Routing(task, row[best], weights, chances))
        return found

    # -- files -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes it to a directory, whole or not at all.

        Raises:
            ConfigError: The router is not trained.
            AdapterFileError: It cannot be written; the path is as it was then.
        """
        classifier, report = self._trained(), self.report
        assert report is not None
        target = as_path(path).expanduser()
        manifest = {
            "kind": "lorasmith task router",
            "format": FORMAT,
            "classes": list(classifier.classes),
            "layer": self.layer,
            "template": self._template,
            "max_length": self._max_length,
            "threshold": self._threshold,
            "report": report.to_dict(),
            "base": fingerprint(self._root).to_dict(),
        }

        def write(stage: Path) -> None:
            tensors = {n: getattr(classifier, n) for n in _TENSORS}
            save_file(tensors, stage / TENSORS)
            # Binds the two files to one generation.
            manifest["sha256"] = sha256_of(stage / TENSORS)
            text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
            (stage / CONFIG).write_text(text + "\n", encoding="utf-8")
            shutil.copymode(stage / CONFIG, stage / TENSORS)

        with explained_failure("The router", target):
            replace_files(target, {CONFIG, TENSORS}, write)
        return target

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module | MultiTaskModel,
        tokenizer: Any,
        *,
        batch_size: int = 16,
        allow_base_mismatch: bool = False,
    ) -> TaskRouter:
        """Reads a router that was trained on the hidden states of the same base model.

        Raises:
            AdapterFileError: It is no router, incomplete or damaged.
            BaseMismatchError: It was trained on another base model.
        """
        folder = as_path(path).expanduser()
        values, tensors = read_one_generation(folder, (CONFIG, TENSORS), lambda: _open(folder))
        record = _record(values, folder / CONFIG)
        classes, printed = record["classes"], record["base"]
        with _of_file(folder / CONFIG):
            router = cls(
                model,
                tokenizer,
                batch_size=batch_size,
                **{key: record[key] for key in ("layer", "template", "max_length")},
            )
        if not allow_base_mismatch:
            difference = printed.compare(fingerprint(router._root, names=list(printed.sketch)))
            if not difference.same:
                raise BaseMismatchError(
                    f"The router was trained on another base model: {difference}.",
                    file=folder,
                    fix="load the right base model, or pass allow_base_mismatch=True",
                )
        width = getattr(router._root.config, "hidden_size", None)
        router._classifier = _Classifier(classes, *_read(tensors, len(classes), width))
        router.report, router._threshold = record["report"], record["threshold"]
        return router


_TENSORS = ("weight", "bias", "mean", "scale")


def check(path: str | os.PathLike[str]) -> tuple[str | None, ...]:
    """The classes of a router on disk, without its base model.

    Raises:
        AdapterFileError: It is no router, incomplete or damaged.
    """
    folder = as_path(path).expanduser()
    values, tensors = read_one_generation(folder, (CONFIG, TENSORS), lambda: _open(folder))
    classes: tuple[str | None, ...] = _record(values, folder / CONFIG)["classes"]
    _read(tensors, len(classes))
    return classes


@contextmanager
def _of_file(file: Path) -> Iterator[None]:
    """Raises what is wrong with a value as an error of the file that it is from."""
    try:
        yield
    except LorasmithError as error:
        raise AdapterFileError(
            f"The router cannot be read: {error.what}",
            file=file,
            key=error.key,
            expected=error.expected,
            got=error.got,
        ) from error


def _classes(values: Any) -> tuple[str | None, ...]:
    classes = tuple(None if c is None else check_id(c) for c in values)
    if not isinstance(values, list) or not 2 <= len(set(classes)) == len(classes):
        raise ValueError
    return classes


def _threshold(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


#: Key → what it must be, and what reads it or raises.
_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "classes": ("two ids or more, each once", _classes),
    "report": ("what training came to", RouterReport.from_dict),
    "base": ("the fingerprint of a model", Fingerprint.from_dict),
    "threshold": ("a number from 0 to 1", _threshold),
    "layer": ("the number of a layer", _whole),
    "template": ("true or false", _flag),
    "max_length": ("at least 1", _whole),
}


def _record(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What the configuration says, each field checked."""
    if values.get("format") != FORMAT:
        raise AdapterFileError(
            "The router has another format.",
            file=file,
            expected=FORMAT,
            got=repr(values.get("format"))[:200],
            key="format",
        )
    found = {}
    for key, (expected, read) in _FIELDS.items():
        try:
            found[key] = read(values[key])
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # noqa: PERF203
            raise AdapterFileError(
                "A field of the router is malformed.",
                file=file,
                key=key,
                expected=expected,
                got=repr(values.get(key))[:200],
            ) from error
    return found


def _open(folder: Path) -> tuple[dict[str, Any], FileTensors]:
    """Configuration and tensors, which must be of one generation."""
    file, weights = folder / CONFIG, folder / TENSORS
    try:
        values = read_object(file, root=folder)
    except OSError as error:
        raise AdapterFileError("There is no router.", file=file, got=error.strerror) from error
    check_inside(weights, folder)
    tensors = FileTensors(weights)
    # Routers of earlier versions do not name the other file.
    if "sha256" in values and (
        (found := sha256_of(weights)) != values["sha256"] or tensors.changed()
    ):
        raise AdapterFileError(
            "The router's tensors are not those that its configuration names.",
            file=weights,
            key="sha256",
            expected=str(values["sha256"])[:64],
            got=found,
            fix="they are damaged, or of another generation: copy the directory again",
        )
    return values, tensors


def _read(tensors: FileTensors, classes: int, width: int | None = None) -> list[Tensor]:
    """The classifier's tensors, of as many hidden states as the model has, if it is known."""
    file = tensors.path
    if set(tensors) != set(_TENSORS):
        raise AdapterFileError(
            "The file does not hold a router.",
            file=file,
            expected=", ".join(_TENSORS),
            got=", ".join(sorted(tensors)[:6]),
        )
    found = {n: tensors[n] for n in _TENSORS}
    d = found["mean"].numel() if width is None else width
    shapes = {"mean": (d,), "scale": (d,), "bias": (classes,), "weight": (classes, d)}
    for name, shape in shapes.items():
        value = found[name]
        usable = value.is_floating_point() and bool(torch.isfinite(value).all())
        if name == "scale" and usable:
            usable = bool((value > 0).all())  # it divides
        if tuple(value.shape) != shape or not usable:
            raise AdapterFileError(
                "A tensor of the router is not usable.",
                file=file,
                expected=f"{list(shape)}, finite" + (", above 0" if name == "scale" else ""),
                got=f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
                + ("" if usable else ", not usable"),
                key=name,
            )
    return [found[n].float() for n in _TENSORS]


def _sklearn() -> tuple[Any, Any, Any]:
    try:
        from sklearn import linear_model, metrics, model_selection
    except ImportError as error:
        raise MissingDependencyError(
            "Training a router takes scikit-learn.",
            fix="pip install 'lorasmith[fleet]'",
        ) from error
    return model_selection, linear_model, metrics
