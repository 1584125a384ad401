"""Several adapters at once: a weighted mix of them, or another one for each row of a batch.

A mix is linear in what each adapter does: with y_i the layer's output under adapter i alone
and y_0 that of the base layer,

    y = y_0 + Σ_i w_i (y_i − y_0),    which is    W + Σ_i w_i (W_i − W)    in weights.

With rows, row j of the batch (the first dimension) gets y_i of its own adapter i.

Whatever the variant, ``before`` and ``after`` can run on each adapter's own rows. Adapters
with an affine form (:class:`~lorasmith.core.variant.Affine`: all low-rank ones, gains) share
one pass instead:

* rows: h = bmm(x, A[row]ᵀ), y += bmm(h, B[row]ᵀ), with A [n, r, d_in] and B [n, r, d_out]
  stacked, lower ranks filled up with zeros and the scalings multiplied in;
* a mix: one pair of factors of rank Σ r_i, and one gain.

While none of the adapters trains, what is stacked stays resident, in the dtype of the
products, until a tensor changes. Training stacks the live parameters on each call, so that
gradients reach every adapter from its own rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import getitem, is_
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.core import lowrank
from lorasmith.core.hooks import CARRY, owns_output
from lorasmith.core.layers import LayerInfo, weight_version
from lorasmith.core.state import AdapterSlot, LayerAdapter, SavedModule
from lorasmith.core.variant import Affine, BaseLayer
from lorasmith.errors import AttachError, ConfigError

__all__ = [
    "Blend",
    "Choice",
    "LayerMix",
    "LayerRows",
    "Mix",
    "Plan",
    "Rows",
    "SavedPlan",
    "describe",
    "layer_plan",
    "names_in",
    "plan_of",
    "saved_plan",
    "without",
    "wrong_rows",
]


@dataclass(frozen=True)
class Mix:
    """A weighted mix: (adapter name, weight) in the order given."""

    weights: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Rows:
    """An adapter, or ``None`` for the base model, for each row of a batch."""

    names: tuple[str | None, ...]


#: Which adapters act: one, none, a mix, or one for each row.
Plan: TypeAlias = str | Mix | Rows | None
#: The same as users write it.
Choice: TypeAlias = str | Mapping[str, float] | Sequence[str | None] | None


def plan_of(choice: Choice) -> Plan:
    """The plan that a user's choice stands for. Whether the names exist is not looked at.

    ``{name: 1.0}`` is the adapter itself, and a mix of nothing is the base model.

    Raises:
        ConfigError: If it is none of what it could be, or a weight is not a finite number.
    """
    given: object = choice
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, Mapping):
        weights = tuple((_name(n), _weight(n, w)) for n, w in given.items())
        return _simplest(Mix(weights))
    if isinstance(given, Sequence) and len(given):
        return Rows(tuple(None if n is None else _name(n) for n in given))
    raise ConfigError(
        "That does not say which adapters are to act.",
        expected="a name, {name: weight}, a list with a name or None for each row, or None",
        got=repr(given),
    )


def _name(given: object) -> str:
    if isinstance(given, str):
        return given
    raise ConfigError("That is not the name of an adapter.", expected="a string", got=repr(given))


def _weight(name: object, given: object) -> float:
    if isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given):
        return float(given)
    raise ConfigError(
        f"The weight of {name!r} in the mix is not a finite number.",
        expected="a float; negative ones subtract what the adapter does",
        got=repr(given),
        key=str(name),
    )


def _simplest(mix: Mix) -> Plan:
    if not mix.weights:
        return None
    if len(mix.weights) == 1 and mix.weights[0][1] == 1.0:
        return mix.weights[0][0]
    return mix


def names_in(plan: Plan) -> tuple[str, ...]:
    """The adapters that have a part in a plan, each once."""
    if plan is None:
        return ()
    if isinstance(plan, str):
        return (plan,)
    if isinstance(plan, Mix):
        return tuple(n for n, _ in plan.weights)
    return tuple(dict.fromkeys(n for n in plan.names if n is not None))


def without(plan: Plan, gone: Iterable[str]) -> Plan:
    """What is left of a plan when adapters go.

    A mix loses their terms, the other weights stay; their rows get the base model.
    """
    gone = frozenset(gone)
    if isinstance(plan, str):
        return None if plan in gone else plan
    if isinstance(plan, Mix):
        return _simplest(Mix(tuple((n, w) for n, w in plan.weights if n not in gone)))
    if isinstance(plan, Rows):
        return Rows(tuple(None if n in gone else n for n in plan.names))
    return None


def describe(plan: Plan) -> str:
    """A plan in words, for messages: ``a``, ``0.5 a + 0.5 b``, ``a, b, base``."""
    if plan is None:
        return "the base model"
    if isinstance(plan, str):
        return plan
    if isinstance(plan, Mix):
        return " + ".join(f"{w:g} {n}" for n, w in plan.weights)
    return ", ".join(n or "base" for n in plan.names)


def layer_plan(plan: Mix | Rows, slot: AdapterSlot) -> LayerMix | LayerRows | None:
    """What a plan says for one layer; ``None`` if none of its adapters is there."""
    made = LayerMix(plan, slot) if isinstance(plan, Mix) else LayerRows(plan, slot)
    return made if made.parts else None


# -- what has been computed from the adapters, and whether it still holds --------------


class _Watch:
    """Notices when tensors are replaced or change their values.

    Versions do not show what is written through ``.data``. On CPU a few values of each
    tensor are compared too; to look at them on a device would stall it.
    """

    _SAMPLES = 8

    def __init__(self, parts: Sequence[LayerAdapter], base: BaseLayer) -> None:
        places: list[tuple[dict[str, Any], str]] = []
        for part in parts:
            for owner in (part, part.shared):
                if owner is not None:
                    places += [(owner._parameters, n) for n in owner._parameters]
                    places += [(owner._buffers, n) for n in owner._buffers]
        self._base = None
        if any(part.variant.weight_use(part.config) == "always" for part in parts):
            self._base = base
            if "bias" in base.module._parameters:
                places.append((base.module._parameters, "bias"))
        self._weight = self._version()
        places = [(d, n) for d, n in places if d[n] is not None]
        self._owners = [d for d, _ in places]
        self._names = [n for _, n in places]
        self._tensors: list[Tensor] = [d[n] for d, n in places]
        # Bound once: this runs on every call of every layer.
        self._pointers = [t.data_ptr for t in self._tensors]
        self._stamps = [t._version for t in self._tensors], [f() for f in self._pointers]
        self._views = [self._sample(t).tobytes for t in self._tensors if t.device.type == "cpu"]
        self._values = [f() for f in self._views]

    def _version(self) -> tuple[int, ...]:
        base = self._base
        return () if base is None else weight_version(base.module, base.info)

    def _sample(self, tensor: Tensor) -> Any:
        flat = tensor.detach().flatten() if tensor.is_contiguous() else tensor.detach()[:0]
        if flat.dtype not in (torch.float32, torch.float64):
            flat = flat[:0].float()
        # A prime step, so that the samples do not all lie in one column.
        return flat[:: max(1, flat.numel() // self._SAMPLES - 1) | 1].numpy()

    def quiet(self) -> bool:
        """Whether nothing has changed since."""
        versions, pointers = self._stamps
        return (
            all(map(is_, map(getitem, self._owners, self._names), self._tensors))
            and [t._version for t in self._tensors] == versions
            and [f() for f in self._pointers] == pointers
            and [f() for f in self._views] == self._values
            and (self._base is None or self._version() == self._weight)
        )


class _LayerPlan:
    """What mixes and rows have in common on one layer."""

    def __init__(self, parts: Iterable[LayerAdapter]) -> None:
        self.parts = tuple(parts)
        self.transforms_input = any(p.variant.transforms_input for p in self.parts)
        self._kept: tuple[torch.dtype, tuple[bool, ...], _Watch, Any] | None = None

    def clear(self) -> None:
        """Forgets what is resident."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _combined(self, base: BaseLayer, x: Tensor) -> Any:
        """What :meth:`_combine` gives, resident if no gradient is to reach the adapters."""
        if lowrank.plain(x):
            return self._combine(base, lowrank.compute_dtype(x))
        # Asked first what is cheap: this runs on every call of every layer.
        autocast = x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
        dtype = lowrank.compute_dtype(x) if autocast else x.dtype
        dtype = self._product_dtype(x, dtype)
        modes = tuple([p.training for p in self.parts])
        if torch.is_grad_enabled() and any(
            t.requires_grad for p in self.parts for t in p._parameters.values() if t is not None
        ):
            # What trains the adapters may write ``.data``: see what _Watch cannot see.
            self._kept = None
            return self._combine(base, dtype)
        kept = self._kept
        if kept is not None and kept[:2] == (dtype, modes) and kept[2].quiet():
            return kept[3]
        # Tensors made in inference mode could not be used where x has a gradient.
        with torch.inference_mode(False), torch.no_grad():
            watch = _Watch(self.parts, base)
            made = self._combine(base, dtype)
        self._kept = (dtype, modes, watch, made)
        return made

    def _product_dtype(self, x: Tensor, dtype: torch.dtype) -> torch.dtype:
        """In which dtype to multiply, where the layer computes in ``dtype``."""
        return dtype

    def _forms(self, base: BaseLayer) -> list[Affine] | None:
        """The affine forms of all adapters, or ``None`` if one has none."""
        forms = []
        for part in self.parts:
            form = part.variant.affine(part, base)
            if form is None or not _reached(form, part):
                return None
            forms.append(form)
        return forms

    def _combine(self, base: BaseLayer, dtype: torch.dtype) -> Any:
        raise NotImplementedError


def _reached(form: Affine, part: LayerAdapter) -> bool:
    """Whether gradients pass through a form if they are wanted."""
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in part.parameters()):
        return True
    tensors = (form.A, form.B, form.input_gain, form.gain, form.shift)
    return any(t is not None and t.requires_grad for t in tensors)


def _shared(base: BaseLayer) -> BaseLayer:
    """The layer as variants must see it where others read its output, too."""
    return replace(base, info=replace(base.info, fresh_output=False))


# -- mixes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sum:
    """y = gain ∘ base(input_gain ∘ x) + x A B + shift, all adapters and weights in it."""

    A: Tensor | None  # [R, d_in]
    B: Tensor | None  # [R, d_out]
    input_gain: Tensor | None
    gain: Tensor | None
    shift: Tensor | None


class LayerMix(_LayerPlan):
    """A weighted mix on one layer."""

    def __init__(self, mix: Mix, slot: AdapterSlot) -> None:
        found = [(slot.get(n), w) for n, w in mix.weights if w != 0.0]
        present = [(part, w) for part, w in found if part is not None]
        super().__init__(part for part, _ in present)
        self.weights = tuple(w for _, w in present)

    def before(self, base: BaseLayer, x: Tensor) -> Tensor:
        """The input for the base layer."""
        total = self._combined(base, x)
        if total is None or total.input_gain is None:
            return x
        gain: Tensor = total.input_gain
        return x * gain.to(x.dtype)

    def after(
        self, base: BaseLayer, x: Tensor, y: Tensor, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The output of the mix.

        Args:
            base: The layer.
            x: Its input [..., d_in], as :meth:`before` left it.
            y: Its output [..., d_out].
            run: Runs the bare layer on another input.
        """
        total: _Sum | None = self._combined(base, x)
        if total is None:
            return self._one_by_one(base, x, y, run)
        if total.A is not None and total.B is not None:
            h = F.linear(x.to(total.A.dtype), total.A)
        if total.gain is not None:
            y = y * total.gain.to(y.dtype)
        if total.A is not None and total.B is not None:
            h, b = h.to(y.dtype), total.B.to(y.dtype)
            if lowrank.plain(y):
                y = y + h @ b
            else:
                fresh = total.gain is not None or owns_output(base.module, base)
                owned = fresh and not torch.is_grad_enabled()
                y = lowrank.add_product(y, h.reshape(-1, h.shape[-1]), b.T, 1.0, owned)
        if total.shift is not None:
            y = y + total.shift.to(y.dtype)
        return y

    def _combine(self, base: BaseLayer, dtype: torch.dtype) -> _Sum | None:
        forms = self._forms(base)
        if forms is None:
            return None
        on_input = [f.input_gain is not None for f in forms]
        if any(on_input) and not all(on_input):
            return None
        pairs = list(zip(forms, self.weights, strict=True))

        def added(tensors: Iterable[Tensor | None], start: float) -> Tensor | None:
            terms = [
                (t - start) * w for t, (_, w) in zip(tensors, pairs, strict=True) if t is not None
            ]
            return torch.stack(terms).sum(dim=0) + start if terms else None

        A = [f.A for f in forms if f.A is not None]
        B = [
            (f.B * (w * f.scaling)).T if f.gain is None else (f.B * (w * f.scaling)).T * f.gain
            for f, w in pairs
            if f.B is not None
        ]
        return _Sum(
            torch.cat(A).to(dtype) if A else None,
            torch.cat(B).to(dtype) if B else None,
            added((f.input_gain for f in forms), 1.0),
            added((f.gain for f in forms), 1.0),
            added((f.shift for f in forms), 0.0),
        )

    def _one_by_one(
        self, base: BaseLayer, x: Tensor, y: Tensor, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        base = _shared(base)
        # Differences of nearly equal outputs: what is small must not be lost on the way.
        start = y.to(torch.promote_types(y.dtype, torch.float32))
        total = start
        for part, weight in zip(self.parts, self.weights, strict=True):
            seen, carry = part.variant.before(part, x, base)
            bare = y if seen is x or not part.variant.transforms_input else run(seen)
            mine = part.variant.after(part, bare, carry, base)
            total = total + weight * (mine.to(start.dtype) - start)
        return total.to(y.dtype)


# -- rows ------------------------------------------------------------------------------

#: Padding lower ranks to the highest may cost this many times the memory.
_RAGGED = 4
#: Up to how many tokens a row 16-bit factors are multiplied in float32 on CPU.
_FEW = 4


@dataclass(frozen=True)
class _Stack:
    """Factors and gains of b rows; ``None`` where nobody has any.

    Attributes:
        A, B: [n, d_in, r] and [n, r, d_out], the scalings in B.
        rows: The rows that A and B act on, or ``None`` for all.
        index: Which of the n belongs to each row; ``None`` if it is the n-th of the n-th.
        slots: [n m] rows sorted by adapter, m for each; filled up with row 0.
        places: Where among the slots each row is.
        input_gain, gain, shift: [b, 1, d_in] and twice [b, 1, d_out].
    """

    A: Tensor | None
    B: Tensor | None
    rows: Tensor | None
    index: Tensor | None
    slots: Tensor | None
    places: Tensor | None
    input_gain: Tensor | None
    gain: Tensor | None
    shift: Tensor | None


class LayerRows(_LayerPlan):
    """An adapter for each row, on one layer."""

    def __init__(self, rows: Rows, slot: AdapterSlot) -> None:
        found = {n: slot.get(n) for n in names_in(rows)}
        present = {n: part for n, part in found.items() if part is not None}
        super().__init__(present.values())
        order = {n: i for i, n in enumerate(present)}
        #: Length of the list that the user gave.
        self.count = len(rows.names)
        #: For each run of equal rows the index of its adapter in ``parts``; −1 for none.
        self.which = _runs([-1 if n is None else order.get(n, -1) for n in rows.names])

    def before(self, base: BaseLayer, x: Tensor) -> Tensor:
        """The input for the base layer."""
        self._check(base.info, x)
        stack = self._combined(base, x)
        if stack is None:
            return self._inputs(base, x)
        if stack.input_gain is None:
            return x
        gained: Tensor = self._by_row(x) * stack.input_gain.to(x.dtype)
        return gained.view(x.shape)

    def after(
        self, base: BaseLayer, x: Tensor, y: Tensor, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The output, each row by its own adapter; arguments as in :class:`LayerMix`."""
        self._check(base.info, x)
        stack: _Stack | None = self._combined(base, x)
        if stack is None:
            return self._outputs(base, x, y)
        out = y if y.dim() == 3 and y.shape[0] == len(self.which) else self._by_row(y)
        if stack.A is not None and stack.B is not None:
            owned = (
                not torch.is_grad_enabled()
                and not lowrank.plain(y)
                and y.is_contiguous()
                and owns_output(base.module, base)
            )
            rows = x if x.dim() == 3 and x.shape[0] == len(self.which) else self._by_row(x)
            out = _add_products(rows.to(stack.A.dtype), out, stack, owned)
        if stack.gain is not None:
            gain = stack.gain.to(y.dtype)
            out = (
                out * gain
                if stack.shift is None
                else torch.addcmul(stack.shift.to(y.dtype), out, gain)
            )
        return out if y.dim() == 3 and out.shape == y.shape else out.view(y.shape)

    def _check(self, info: LayerInfo, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[0] % self.count:
            raise wrong_rows(self.count, f"input of shape {tuple(x.shape)}", info.name)

    def _by_row(self, x: Tensor) -> Tensor:
        """[rows · k, ..., d] as [b, tokens, d]: what is repeated lies side by side."""
        b, d = len(self.which), x.shape[-1]
        return x.reshape(b, x.numel() // max(1, b * d), d)

    def _product_dtype(self, x: Tensor, dtype: torch.dtype) -> torch.dtype:
        # On CPU, batched products of single tokens take three times as long in 16 bits.
        few = x.device.type == "cpu" and x.numel() <= _FEW * len(self.which) * x.shape[-1]
        return torch.float32 if few and dtype.itemsize == 2 else dtype

    def _combine(self, base: BaseLayer, dtype: torch.dtype) -> _Stack | None:
        forms = self._forms(base)
        if forms is None:
            return None
        narrow = [i for i, f in enumerate(forms) if f.A is not None]
        ranks = [f.A.shape[0] for f in forms if f.A is not None]
        if ranks and max(ranks) * len(ranks) > _RAGGED * sum(ranks):
            return None
        gains = (
            self._stacked([f.input_gain for f in forms], 1.0),
            self._stacked([f.gain for f in forms], 1.0),
            self._stacked([f.shift for f in forms], 0.0),
        )
        if not narrow:
            return _Stack(None, None, None, None, None, None, *gains)
        like = forms[narrow[0]].A
        assert like is not None
        device, r, n = like.device, max(ranks), len(narrow)
        block = [narrow.index(i) if i in narrow else -1 for i in self.which]
        used = [i for i in block if i >= 0]
        rows = None
        if 2 * len(used) <= len(block):
            rows = _index([j for j, i in enumerate(block) if i >= 0], device)
            block = used
        order, index, slots, places = block, None, None, None
        if len(set(used)) < len(used):
            order = [*range(n), *([-1] if -1 in block else [])]
            block = [n if i < 0 else i for i in block]
            index = _index(block, device)
            sorted_rows, where = _sorted(block, len(order))
            if len(sorted_rows) <= 2 * len(block):
                slots, places = _index(sorted_rows, device), _index(where, device)
        As = [_padded(f.A, r) for f in forms if f.A is not None]
        Bs = [_padded((f.B * f.scaling).T, r) for f in forms if f.B is not None]
        As.append(torch.zeros_like(As[0]))
        Bs.append(torch.zeros_like(Bs[0]))
        A, B = (torch.stack([ts[i] for i in order]).to(dtype) for ts in (As, Bs))
        return _Stack(A.transpose(1, 2), B, rows, index, slots, places, *gains)

    def _stacked(self, tensors: Sequence[Tensor | None], neutral: float) -> Tensor | None:
        """Vectors by row [b, 1, d]; neutral where a row has none."""
        like = next((t for t in tensors if t is not None), None)
        if like is None:
            return None
        nothing = torch.full_like(like, neutral)
        full = [nothing if t is None else t for t in (*tensors, None)]
        return torch.stack([full[i] for i in self.which])[:, None]

    # Without an affine form: before and after of each adapter on its own rows.

    def _groups(self) -> list[tuple[int, list[int]]]:
        """(adapter or −1, its rows)."""
        return [
            (i, [j for j, k in enumerate(self.which) if k == i]) for i in dict.fromkeys(self.which)
        ]

    def _inputs(self, base: BaseLayer, x: Tensor) -> Tensor:
        base = _shared(base)
        rows, pieces = self._by_row(x), []
        carries: dict[int, Any] = {}
        for i, members in self._groups():
            mine = rows[_index(members, x.device)]
            if i >= 0 and self.parts[i].variant.transforms_input:
                mine, carry = self.parts[i].variant.before(self.parts[i], mine, base)
                carries[i] = carry
            pieces.append(mine.to(x.dtype))
        new = self._together(pieces).view(x.shape)
        if any(carry is not None for carry in carries.values()):
            setattr(new, CARRY, carries)
        return new

    def _outputs(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        base = _shared(base)
        carries = {} if torch.compiler.is_compiling() else x.__dict__.pop(CARRY, {})
        inputs, outputs, pieces = self._by_row(x), self._by_row(y), []
        for i, members in self._groups():
            index = _index(members, x.device)
            mine = outputs[index]
            if i >= 0:
                part, carry = self.parts[i], carries.get(i)
                if not part.variant.transforms_input:
                    _, carry = part.variant.before(part, inputs[index], base)
                mine = part.variant.after(part, mine, carry, base)
            pieces.append(mine.to(y.dtype))
        return self._together(pieces).view(y.shape)

    def _together(self, pieces: Sequence[Tensor]) -> Tensor:
        order = [j for _, members in self._groups() for j in members]
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(list(pieces))[_index(back, pieces[0].device)]


def wrong_rows(count: int, got: str, name: str) -> AttachError:
    """The error of a batch whose rows are not those that were spoken of."""
    return AttachError(
        "The batch does not have the rows that use(model, [...]) speaks of.",
        expected=f"a first dimension of {count} or a multiple of it (each row repeated, as "
        "beam search does)",
        got=f"{got} at {name}",
        fix="give use() one name for each row; sequences packed into one row cannot have "
        "adapters of their own",
        key=name,
    )


def _runs(which: Sequence[int]) -> tuple[int, ...]:
    """Without repetitions where all repeat equally often in a row: 2 2 0 0 → 2 0."""
    lengths, values = [0], [which[0]]
    for i in which:
        if i != values[-1]:
            values.append(i)
            lengths.append(0)
        lengths[-1] += 1
    step = math.gcd(*lengths)
    return tuple(which[::step])


def _sorted(block: Sequence[int], groups: int) -> tuple[list[int], list[int]]:
    """Rows sorted by group, filled up to equal numbers with row 0, and where each row is."""
    members = [[j for j, i in enumerate(block) if i == g] for g in range(groups)]
    m = max(map(len, members))
    slots = list(chain.from_iterable(rows + [0] * (m - len(rows)) for rows in members))
    places = [i * m + members[i].index(j) for j, i in enumerate(block)]
    return slots, places


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _padded(factor: Tensor, r: int) -> Tensor:
    """[r', d] with zeros below to [r, d]."""
    missing = r - factor.shape[0]
    return F.pad(factor, (0, 0, 0, missing)) if missing else factor


def _add_products(x: Tensor, y: Tensor, stack: _Stack, owned: bool) -> Tensor:
    """y [b, tokens, d_out] plus each row's x Aᵀ B; in y's memory if ``owned``."""
    A, B, rows = stack.A, stack.B, stack.rows
    assert A is not None
    assert B is not None
    whole = y
    if rows is not None:
        x = x.index_select(0, rows)
    if stack.index is not None:
        # Few tokens: sort the rows; many: fetch each row's factors, which are smaller.
        if stack.slots is not None and stack.places is not None and x.shape[1] < A.shape[2]:
            tokens = stack.slots.shape[0] // A.shape[0] * x.shape[1]
            grouped = x.index_select(0, stack.slots).view(A.shape[0], tokens, x.shape[-1])
            change = torch.bmm(torch.bmm(grouped, A), B)
            change = change.view(stack.slots.shape[0], x.shape[1], B.shape[-1])
            change = change.index_select(0, stack.places)
            return _added(whole, change, rows, owned)
        A, B = A.index_select(0, stack.index), B.index_select(0, stack.index)
    h = torch.bmm(x, A)
    # Autocast would give the sum of a float32 output its own dtype.
    if rows is None and y.dtype == B.dtype == h.dtype:
        return y.baddbmm_(h, B) if owned else torch.baddbmm(y, h, B)
    return _added(whole, torch.bmm(h, B), rows, owned)


def _added(y: Tensor, change: Tensor, rows: Tensor | None, owned: bool) -> Tensor:
    change = change.to(y.dtype)
    if rows is None:
        return y.add_(change) if owned else y + change
    return y.index_add_(0, rows, change) if owned else y.index_add(0, rows, change)


# -- whole modules, and weights --------------------------------------------------------


@dataclass(frozen=True)
class SavedPlan:
    """A mix or rows on a module that is trained as a whole (``modules_to_save``)."""

    name: str
    plan: Mix | Rows

    def output(
        self,
        copies: Mapping[str, nn.Module],
        output: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any],
    ) -> Any:
        """What stands in for the module's output.

        Args:
            copies: Adapter name → copy.
            output: The untouched module's output.
            args: What the module was called with.
            kwargs: The same by keyword.
            run: Runs a copy.
        """
        if not isinstance(output, Tensor) or not output.dim():
            raise AttachError(
                f"{self.name} returns no tensor with rows, so its copies cannot act together.",
                expected="a tensor",
                got=type(output).__name__,
                fix="use one adapter at a time",
                key=self.name,
            )
        if isinstance(self.plan, Mix):
            wide = torch.promote_types(output.dtype, torch.float32)
            start = output.to(wide)
            total = start
            for name, weight in self.plan.weights:
                if name in copies and weight != 0.0:
                    total = total + weight * (run(copies[name], args, kwargs).to(wide) - start)
            return total.to(output.dtype)
        names, size = self.plan.names, output.shape[0]
        if size % len(names):
            raise wrong_rows(len(names), f"output of shape {tuple(output.shape)}", self.name)
        k, result = size // len(names), output
        for name, copy in copies.items():
            mine = [j * k + i for j, n in enumerate(names) if n == name for i in range(k)]
            if not mine:
                continue
            index = _index(mine, output.device)

            def part(value: Any, index: Tensor = index) -> Any:
                if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
                    return value[index]
                return value

            made = run(copy, tuple(map(part, args)), {n: part(v) for n, v in kwargs.items()})
            result = result.index_copy(0, index, made.to(output.dtype))
        return result


def saved_plan(plan: Mix | Rows, saved: SavedModule) -> SavedPlan | None:
    """What a plan says for one module; ``None`` if none of its adapters has a copy."""
    if any(saved.get(n) is not None for n in names_in(plan)):
        return SavedPlan(saved.name, plan)
    return None


class Blend:
    """The effective weight of a mix on one layer; stands in for one adapter when fusing."""

    def __init__(self, parts: Sequence[tuple[LayerAdapter, float]]) -> None:
        self.parts = tuple(parts)
        self.info = parts[0][0].info
        self.config = parts[0][0].config

    @property
    def variant(self) -> Blend:
        """Itself: it knows the mathematics, too."""
        return self

    def effective_weight(self, state: Any, weight: Tensor) -> Tensor:
        """W + Σ w_i (W_i − W) [d_out, d_in]."""
        total = weight
        for part, w in self.parts:
            total = total + w * (part.variant.effective_weight(part, weight) - weight)
        return total

    def effective_bias(self, state: Any, bias: Tensor) -> Tensor:
        """b + Σ w_i (b_i − b) [d_out]."""
        total = bias
        for part, w in self.parts:
            total = total + w * (part.variant.effective_bias(part, bias) - bias)
        return total
