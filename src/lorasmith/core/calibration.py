"""What data says about layers: statistics for variants and initialisations that ask for them.

``collect`` runs batches through the base model as it is (eval mode, adapters off, nothing
written) and gives each layer the statistics that were asked for, by name:

``"covariance"``
    C = E[x xᵀ] [d_in, d_in], float32, uncentred, over all tokens x of the layer's input.
``"inputs_svd:K"``
    :class:`InputComponents`: the K leading principal directions of the inputs, less their
    mean, with their singular values. ``"raw_inputs_svd:K"`` leaves the mean in.
``"gradient"``
    G = mean over batches of ∂loss/∂W [d_out, d_in], float32.
``"gradient_sketch:K"``
    :class:`LowRankMatrix` of rank K close to G, from two random sketches.

Memory does not depend on the number of tokens. A layer, for the first two a group of layers
that are fed the same tensor, takes d_in² numbers for ``covariance``; d_in² or, beyond 1024
features, about 2 K d_in for ``inputs_svd``; d_out d_in for ``gradient`` and some
6 K (d_in + d_out) for its sketch with its random matrices. To these come the activations of
one batch, which gradients keep until the backward pass is through. A smaller K or batch is
what to change where memory runs out.

Where a batch has an ``attention_mask`` [rows, positions], inputs at masked positions do not
count. They are recognised by shape: inputs [rows, positions, d_in] or [rows · positions,
d_in]; of inputs in another arrangement (tokens routed to an expert) all count.

The gradient of W needs no ``requires_grad`` on W: it is Σ_t g_t x_tᵀ of the gradients g at
the layer's output and its inputs x, and is summed up as the backward pass comes by.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core import quantized
from lorasmith.core.adapter import state_of
from lorasmith.core.hooks import _input_of
from lorasmith.core.layers import LayerInfo, device_of
from lorasmith.core.lowrank import no_autocast
from lorasmith.core.state import AdapterSlot
from lorasmith.errors import AttachError, ConfigError

__all__ = ["InputComponents", "LowRankMatrix", "collect"]

Loss = Callable[[Any], Tensor]

#: Inputs that are widened to float32 at a time.
_ROWS = 4096
#: Up to this many features sums are kept in float64: exact, and small.
_WIDE = 1024
#: Up to this many features principal directions come from the whole covariance.
_EXACT = 1024


@dataclass(frozen=True)
class InputComponents:
    """The leading principal directions of a layer's inputs.

    Attributes:
        vectors: [K', d_in], orthonormal rows, the strongest direction first. K' may be
            below the K asked for where there are fewer features or tokens.
        singular: [K'], the singular values of the matrix of all inputs.
        total: Sum of the squares of all its singular values.
        count: Number of inputs seen.
    """

    vectors: Tensor
    singular: Tensor
    total: float
    count: int

    @property
    def explained(self) -> Tensor:
        """Share of the variance that each direction explains, [K']."""
        if self.total <= 0:
            return torch.zeros_like(self.singular)
        return self.singular.square() / self.total


@dataclass(frozen=True)
class LowRankMatrix:
    """U diag(S) Vᵀ with orthonormal columns: U [d_out, K], S [K] falling, V [d_in, K]."""

    U: Tensor
    S: Tensor
    V: Tensor


def collect(
    root: nn.Module,
    infos: Sequence[LayerInfo],
    batches: Iterable[Any],
    wanted: Iterable[str],
    *,
    loss: Loss | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs batches through the base model and gives each layer its statistics.

    The model is as it was afterwards, also if a batch raises: weights, hooks, modes,
    ``requires_grad`` flags and which adapters act. Layers that are fed the same tensor
    share one value.

    Args:
        root: The unwrapped model.
        infos: The layers.
        batches: What the model is called with, one after another: mappings of keyword
            arguments, tuples or lists of positional ones, or single tensors. They are
            moved to the model's device.
        wanted: Names of the statistics, see the module.
        loss: Model output → scalar loss, for the gradients. Default: ``output.loss``.
        progress: Called with the number of batches done after each of them.

    Returns:
        Layer name → statistic → value. On a model of the meta device, tensors without
        values, and no batch is run.

    Raises:
        ConfigError: If a statistic is not known, or there is no batch.
        AttachError: If a layer was not reached by any batch or, where gradients are wanted,
            by any gradient; a value is not finite; or the output has no loss.
    """
    names = sorted(wanted)
    makers = {name: _parse(name) for name in names}
    if _without_values(root):
        return {i.name: {n: m.blank(i) for n, m in makers.items()} for i in infos}
    with torch.inference_mode(False), _untouched(root):
        try:
            return _run(root, infos, batches, makers, loss, progress, share=True)
        except _RegroupError as error:
            if iter(batches) is batches:
                raise AttachError(
                    "Two layers shared their input in one batch and not in another, so "
                    "calibration has to start over, and the batches can be read only once.",
                    got=f"e.g. {error}",
                    fix="give the batches as a list",
                    key="calibration",
                ) from None
            return _run(root, infos, batches, makers, loss, progress, share=False)


def _run(
    root: nn.Module,
    infos: Sequence[LayerInfo],
    batches: Iterable[Any],
    makers: Mapping[str, _Maker],
    loss: Loss | None,
    progress: Callable[[int], None] | None,
    *,
    share: bool,
) -> dict[str, dict[str, Any]]:
    device = _device(root)
    inputs = {n: m for n, m in makers.items() if not m.needs_gradient}
    gradients = {n: m for n, m in makers.items() if m.needs_gradient}
    watch = _Watch(inputs, gradients, share)
    done = 0
    try:
        for info in infos:
            watch.install(root.get_submodule(info.name), info)
        for batch in batches:
            moved = _to_device(batch, device)
            watch.start(_mask_of(moved))
            if gradients:
                with torch.enable_grad():
                    value = _loss_of(_call(root, moved), loss)
                    watch.backward(value)
                del value
            else:
                with torch.no_grad():
                    _call(root, moved)
            watch.finish()
            done += 1
            if progress is not None:
                progress(done)
    finally:
        watch.remove()
    if done == 0:
        raise ConfigError(
            "There is no calibration data: the iterable gave no batch.",
            expected="at least one batch",
            fix="an iterator that has been used up gives nothing more; make a new one",
            key="calibration",
        )
    with torch.no_grad():
        return watch.results(infos, done)


# What is summed up ---------------------------------------------------------------------------


class _Sum:
    """One statistic in the making."""

    def add(self, rows: Tensor) -> None:
        """Takes in inputs [n, d_in]."""
        raise NotImplementedError

    def add_gradient(self, g: Tensor, x: Tensor) -> None:
        """Takes in gradients [n, d_out] at the output, and the inputs [n, d_in]."""
        raise NotImplementedError

    def value(self, batches: int) -> Any:
        """The statistic."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Maker:
    """How to sum up one statistic: from inputs or from gradients."""

    make: Callable[[LayerInfo, torch.device], _Sum]
    blank: Callable[[LayerInfo], Any]
    needs_gradient: bool = False


class _Covariance(_Sum):
    def __init__(self, info: LayerInfo, device: torch.device) -> None:
        dtype = torch.float64 if info.d_in <= _WIDE else torch.float32
        self.mean: Tensor = torch.zeros(info.d_in, info.d_in, dtype=dtype, device=device)
        self.count = 0

    def add(self, rows: Tensor) -> None:
        for part in torch.split(rows, _ROWS):
            wide = part.to(torch.float32)
            self.count += len(part)
            # A running mean: its last digits do not drown in a growing sum.
            self.mean.lerp_(
                (wide.T @ wide).div_(len(part)).to(self.mean.dtype), len(part) / self.count
            )

    def value(self, batches: int) -> Tensor:
        return self.mean.to(torch.float32)


class _Shifted:
    """Inputs less a constant near their mean, so that covariances do not cancel."""

    def __init__(self, centered: bool) -> None:
        self.centered = centered
        self.shift: Tensor | None = None

    def __call__(self, part: Tensor) -> Tensor:
        wide = part.to(torch.float32)
        if not self.centered:
            return wide
        if self.shift is None:
            self.shift = wide.mean(dim=0)
        return wide - self.shift


class _ExactComponents(_Sum):
    """Principal directions from the whole covariance."""

    def __init__(self, info: LayerInfo, device: torch.device, k: int, centered: bool) -> None:
        self.k, self.centered = k, centered
        self.shifted = _Shifted(centered)
        self.count = 0
        self.sum = torch.zeros(info.d_in, dtype=torch.float64, device=device)
        self.squares = torch.zeros(info.d_in, info.d_in, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        for part in torch.split(rows, _ROWS):
            near = self.shifted(part)
            self.count += len(part)
            self.sum += near.sum(dim=0, dtype=torch.float64)
            self.squares += near.T @ near

    def value(self, batches: int) -> InputComponents:
        if self.centered:
            self.squares.sub_(torch.outer(self.sum, self.sum / self.count))
        values, vectors = torch.linalg.eigh(self.squares)
        k = min(self.k, self.count, len(values))
        return InputComponents(
            vectors.flip(1)[:, :k].T.to(torch.float32).contiguous(),
            values.flip(0)[:k].clamp_min(0).sqrt().to(torch.float32),
            float(self.squares.diagonal().sum().clamp_min(0)),
            self.count,
        )


class _IncrementalComponents(_Sum):
    """Principal directions by incremental SVD (Ross et al. 2008), for many features.

    Twice the directions asked for are carried along, so that what is cut off on the way
    hardly touches those that are kept.
    """

    def __init__(self, info: LayerInfo, device: torch.device, k: int, centered: bool) -> None:
        self.k, self.centered = min(k, info.d_in), centered
        self.carried = min(info.d_in, 2 * k + 16)
        self.shifted = _Shifted(centered)
        self.count = 0
        self.mean = torch.zeros(info.d_in, dtype=torch.float64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.scaled: Tensor = torch.zeros(0, info.d_in, device=device)  # diag(S) Vᵀ so far

    def add(self, rows: Tensor) -> None:
        for part in torch.split(rows, max(256, 4 * self.carried)):
            near = self.shifted(part)
            pieces = [self.scaled, near]
            n, seen = len(part), self.count
            if self.centered:
                mean = near.mean(dim=0, dtype=torch.float64)
                pieces[1] = near - mean.to(near.dtype)
                if seen:
                    gap = (mean - self.mean) * (seen * n / (seen + n)) ** 0.5
                    pieces.append(gap.to(near.dtype)[None])
                self.mean.lerp_(mean, n / (seen + n))
            self.count = seen + n
            for piece in pieces[1:]:
                self.total += piece.square().sum(dtype=torch.float64)
            self.scaled = self._cut(torch.cat(pieces))

    def _cut(self, matrix: Tensor) -> Tensor:
        """diag(S) Vᵀ of the leading directions of [n, d_in], from the n × n Gram matrix."""
        if matrix.shape[0] <= self.carried:
            return matrix
        wide = matrix.to(torch.float64)
        vectors: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors
        return (vectors[:, -self.carried :].flip(1).T @ wide).to(torch.float32)

    def value(self, batches: int) -> InputComponents:
        _, singular, vt = torch.linalg.svd(self.scaled.to(torch.float64), full_matrices=False)
        k = min(self.k, self.count, len(singular))
        return InputComponents(
            vt[:k].to(torch.float32), singular[:k].to(torch.float32), float(self.total), self.count
        )


class _Gradient(_Sum):
    def __init__(self, info: LayerInfo, device: torch.device) -> None:
        self.sum: Tensor = torch.zeros(info.d_out, info.d_in, device=device)

    def add_gradient(self, g: Tensor, x: Tensor) -> None:
        for part, inputs in zip(torch.split(g, _ROWS), torch.split(x, _ROWS), strict=True):
            self.sum.addmm_(part.to(torch.float32).T, inputs.to(torch.float32))

    def value(self, batches: int) -> Tensor:
        return self.sum.div_(batches)


class _GradientSketch(_Sum):
    """G Ω and Ψ G for random Ω, Ψ: Tropp et al. 2017 (arXiv 1609.00048), algorithm 4."""

    def __init__(self, info: LayerInfo, device: torch.device, k: int) -> None:
        # Random numbers of its own: the caller's generator is not to be touched.
        generator = torch.Generator().manual_seed(0)
        self.k = min(k, info.d_in, info.d_out)
        width = min(2 * self.k + 1, info.d_in)
        depth = min(4 * self.k + 3, info.d_out)

        def gaussian(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device)

        self.right, self.left = gaussian(info.d_in, width), gaussian(depth, info.d_out)
        self.range = torch.zeros(info.d_out, width, device=device)
        self.corange = torch.zeros(depth, info.d_in, device=device)

    def add_gradient(self, g: Tensor, x: Tensor) -> None:
        for part, inputs in zip(torch.split(g, _ROWS), torch.split(x, _ROWS), strict=True):
            wide, fed = part.to(torch.float32), inputs.to(torch.float32)
            self.range.addmm_(wide.T, fed @ self.right)
            self.corange.addmm_(self.left @ wide.T, fed)

    def value(self, batches: int) -> LowRankMatrix:
        q, _ = torch.linalg.qr(self.range.double() / batches)
        core = torch.linalg.pinv(self.left.double() @ q) @ (self.corange.double() / batches)
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        k = self.k
        return LowRankMatrix((q @ u[:, :k]).float(), s[:k].float(), vt[:k].T.float())


def _parse(name: str) -> _Maker:
    """What the name of a statistic stands for."""

    def meta(*size: int) -> Tensor:
        return torch.empty(*size, device="meta")

    kind, _, number = name.partition(":")
    k = int(number) if number.isdecimal() else 0
    if name == "covariance":
        return _Maker(_Covariance, lambda i: meta(i.d_in, i.d_in))
    if name == "gradient":
        return _Maker(_Gradient, lambda i: meta(i.d_out, i.d_in), needs_gradient=True)
    if kind in ("inputs_svd", "raw_inputs_svd") and k:
        centered = kind == "inputs_svd"
        return _Maker(
            lambda i, d: (
                _ExactComponents(i, d, k, centered)
                if i.d_in <= _EXACT
                else _IncrementalComponents(i, d, k, centered)
            ),
            lambda i: InputComponents(meta(min(k, i.d_in), i.d_in), meta(min(k, i.d_in)), 0.0, 0),
        )
    if kind == "gradient_sketch" and k:
        return _Maker(
            lambda i, d: _GradientSketch(i, d, k),
            lambda i: LowRankMatrix(meta(i.d_out, k), meta(k), meta(i.d_in, k)),
            needs_gradient=True,
        )
    raise ConfigError(
        f"There is no statistic named {name!r}.",
        expected="covariance, inputs_svd:<K>, raw_inputs_svd:<K>, gradient, gradient_sketch:<K>",
        got=name,
    )


# Watching the layers -------------------------------------------------------------------------


class _RegroupError(Exception):
    """Layers that were taken to be fed the same tensors are not."""


class _Source:
    """Sums over one sequence of input tensors, for all layers that are fed with it."""

    def __init__(self, sums: dict[str, _Sum]) -> None:
        self.sums = sums
        self.total = 0  # tensors taken in
        self.before = 0  # of these, in earlier batches
        self.recent: list[tuple[weakref.ref[Tensor], int]] = []
        self.rows = 0  # inputs that counted


class _Watch:
    """The hooks on the layers, and what they have summed up."""

    def __init__(
        self, inputs: Mapping[str, _Maker], gradients: Mapping[str, _Maker], share: bool
    ) -> None:
        self.inputs, self.gradients, self.share = inputs, gradients, share
        self.mask: Tensor | None = None
        self.handles: list[Any] = []
        self.source_of: dict[str, _Source] = {}
        self.done: dict[str, int] = {}  # tensors of its source that the layer has had
        self.fresh: list[_Source] = []  # sources that this batch brought about
        self.sums: dict[str, dict[str, _Sum]] = {}
        self.calls: dict[str, int] = {}
        self.leaves: list[Tensor] = []
        self.reached: set[str] = set()  # layers that a gradient has come to

    def install(self, module: nn.Module, info: LayerInfo) -> None:
        """Puts the hooks on one layer."""
        slot = AdapterSlot(info)  # only to say in an error which layer it is

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            x = _input_of(args, kwargs, slot)
            self.calls[info.name] = self.calls.get(info.name, 0) + 1
            if self.inputs:
                self._take(module, info, x)
            if not self.gradients or x.requires_grad:
                return None
            # So that the output requires a gradient, whatever comes first in the model.
            leaf = x.detach().requires_grad_()
            self.leaves.append(leaf)
            if args:
                return (leaf, *args[1:]), kwargs
            return args, {k: leaf if v is x else v for k, v in kwargs.items()}

        def after(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = _input_of(args, kwargs, slot).detach()
            version = x._version
            sums = self.sums.get(info.name)
            if sums is None:
                device = device_of(module)
                sums = {n: m.make(info, device) for n, m in self.gradients.items()}
                self.sums[info.name] = sums

            def arrived(g: Tensor) -> None:
                if x._version != version:
                    raise AttachError(
                        f"What {info.name} was fed has been overwritten since, so that the "
                        "gradient of its weight cannot be known.",
                        expected="a model that could be trained as a whole",
                        got="an operation in place on the layer's input",
                        fix="compute out of place there, or exclude the layer",
                        key=info.name,
                    )
                self.reached.add(info.name)
                with torch.no_grad(), no_autocast(x):
                    flat = g.reshape(-1, info.d_out), x.reshape(-1, info.d_in)
                    for each in sums.values():
                        each.add_gradient(*flat)

            # Written in place (by a ReLU), a view loses its node in the graph, hooks and all.
            y = output.clone() if output._is_view() else output
            y.register_hook(arrived)  # type: ignore[no-untyped-call]
            return y

        self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if self.gradients:
            self.handles.append(module.register_forward_hook(after, with_kwargs=True))

    def remove(self) -> None:
        """Takes all hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.leaves.clear()

    def start(self, mask: Tensor | None) -> None:
        """A new batch."""
        self.mask = mask
        self.leaves.clear()

    def backward(self, value: Tensor) -> None:
        """Runs the backward pass, on no parameter's ``grad``."""
        if self.leaves and value.requires_grad:
            torch.autograd.grad(value, self.leaves, allow_unused=True)
        self.leaves.clear()

    def finish(self) -> None:
        """The batch is through."""
        self.mask = None
        for name, source in self.source_of.items():
            if self.done[name] != source.total:
                raise _RegroupError(name)
        for source in {id(s): s for s in self.source_of.values()}.values():
            source.before = source.total
            source.recent.clear()
        self.fresh.clear()

    def _take(self, module: nn.Module, info: LayerInfo, x: Tensor) -> None:
        name = info.name
        source = self.source_of.get(name)
        if source is None:
            source = next((s for s in self.fresh if _just_saw(s, x)), None) if self.share else None
            if source is None:
                device = device_of(module)
                source = _Source({n: m.make(info, device) for n, m in self.inputs.items()})
                self.fresh.append(source)
            self.source_of[name], self.done[name] = source, 0
        at = self.done[name]
        if at < source.total:  # another layer has been there
            if not _is(source.recent[at - source.before], x):
                raise _RegroupError(name)
        else:
            rows = _counted(x.detach(), self.mask)
            if len(rows):
                with torch.no_grad(), no_autocast(rows):
                    for each in source.sums.values():
                        each.add(rows)
            source.rows += len(rows)
            source.total += 1
            source.recent.append((weakref.ref(x), x._version))
        self.done[name] = at + 1

    def results(self, infos: Sequence[LayerInfo], batches: int) -> dict[str, dict[str, Any]]:
        """Layer → statistic → value; sums are let go as they are turned into values."""
        for info in infos:
            source = self.source_of.get(info.name)
            if info.name not in self.calls or (source is not None and not source.rows):
                raise AttachError(
                    f"No calibration batch reached {info.name}, so nothing is known of it.",
                    expected="data that passes through every layer to adapt",
                    got=f"{batches} batches",
                    fix="give more or other batches, or exclude the layer",
                    key=info.name,
                )
            if self.gradients and info.name not in self.reached:
                raise AttachError(
                    f"The loss does not depend on {info.name}, so its gradient is not known.",
                    expected="a loss that is computed from what every layer to adapt gives",
                    got=f"{batches} batches without a gradient",
                    fix="give another calibration_loss, or exclude the layer",
                    key=info.name,
                )
        found: dict[str, dict[str, Any]] = {}
        made: dict[int, dict[str, Any]] = {}
        for info in infos:
            values: dict[str, Any] = {}
            source = self.source_of.get(info.name)
            if source is not None:
                if id(source) not in made:
                    made[id(source)] = {
                        n: source.sums.pop(n).value(batches) for n in list(source.sums)
                    }
                values.update(made[id(source)])
            for name, each in self.sums.pop(info.name, {}).items():
                values[name] = each.value(batches)
            for name, value in values.items():
                _check_finite(info.name, name, value)
            found[info.name] = values
        return found


def _is(seen: tuple[weakref.ref[Tensor], int], x: Tensor) -> bool:
    return seen[0]() is x and seen[1] == x._version


def _just_saw(source: _Source, x: Tensor) -> bool:
    """Whether ``x`` is the one and only tensor that the source has taken in."""
    return source.total == 1 and source.before == 0 and _is(source.recent[0], x)


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The inputs [n, d_in] at positions that are not masked."""
    flat = x.reshape(-1, x.shape[-1])
    if mask is None:
        return flat
    fits = x.shape[:-1] == mask.shape or (x.dim() == 2 and x.shape[0] == mask.numel())
    return flat[mask.reshape(-1).to(x.device)] if fits else flat


def _check_finite(layer: str, statistic: str, value: Any) -> None:
    tensors = [value] if isinstance(value, Tensor) else vars(value).values()
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            raise AttachError(
                f"The statistic {statistic!r} of {layer} is not finite.",
                expected="finite inputs and gradients",
                fix="look for NaN in the calibration data; in float16, try bfloat16",
                key=layer,
            )


# Batches and the model -----------------------------------------------------------------------


def _without_values(root: nn.Module) -> bool:
    tensors = list(root.parameters())
    return bool(tensors) and all(t.is_meta for t in tensors)


def _device(root: nn.Module) -> torch.device:
    return next((t.device for t in root.parameters() if not t.is_meta), torch.device("cpu"))


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        moved = batch.to(device)
        return moved.clone() if moved.is_inference() else moved
    if isinstance(batch, Mapping):
        return {k: _to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        moved_items = [_to_device(v, device) for v in batch]
        return tuple(moved_items) if type(batch) is tuple else moved_items
    return batch


def _call(root: nn.Module, batch: Any) -> Any:
    if isinstance(batch, str | bytes):
        raise ConfigError(
            "A calibration batch is a text, which no model takes.",
            expected="what the model is called with, e.g. dict(tokenizer(text, "
            'return_tensors="pt"))',
            got=repr(batch[:60]),
            fix="tokenise the texts first; `lorasmith train --calibration DATA` does it itself",
            key="calibration",
        )
    if isinstance(batch, Mapping):
        return root(**batch)
    if isinstance(batch, list | tuple):
        return root(*batch)
    return root(batch)


def _mask_of(batch: Any) -> Tensor | None:
    """[rows, positions], true where a token is real; ``None`` if all are."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
        return None
    real = mask != 0
    return None if bool(real.all()) else real


def _loss_of(output: Any, loss: Loss | None) -> Tensor:
    if loss is not None:
        value: Any = loss(output)
    elif isinstance(output, Mapping):
        value = output.get("loss")
    else:
        value = getattr(output, "loss", None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise AttachError(
            "Gradients are needed, and the model's output gives no loss."
            if loss is None
            else "calibration_loss gave no scalar.",
            expected="a tensor with one element",
            got="None" if value is None else type(value).__name__,
            fix="give batches with labels, or attach(..., calibration_loss=function of the output)",
            key="calibration_loss",
        )
    return value.reshape(())


@contextlib.contextmanager
def _untouched(root: nn.Module) -> Iterator[None]:
    """The bare base model in eval mode; afterwards everything is as it was."""
    from lorasmith.core.attach import use

    bare = state_of(root) is None
    training = [m for m in root.modules() if m.training]
    flags = [p for p in root.parameters() if p.requires_grad]
    config = getattr(root, "config", None)
    cache = getattr(config, "use_cache", None)
    with use(root, None):
        try:
            # Eval mode would have bitsandbytes repack its weights.
            quantized.prepare(root)
            for module in training:
                module.training = False
            for parameter in flags:
                parameter.requires_grad_(False)
            if cache is True and config is not None:
                config.use_cache = False
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in flags:
                parameter.requires_grad_(True)
            if bare:
                quantized.release(root)
            if cache is True and config is not None:
                config.use_cache = True
