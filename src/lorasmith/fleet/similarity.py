"""How alike adapters are: inner products of their ΔW, whatever factors they are stored in.

    ⟨ΔW₁, ΔW₂⟩ = tr(A₁ᵀ B₁ᵀ B₂ A₂) = Σ (B₁ᵀ B₂) ∘ (A₁ A₂ᵀ)

    A_i [r_i, d_in], B_i [d_out, r_i]    factors of adapter i on one layer, ΔW_i = B_i A_i
    B₁ᵀ B₂, A₁ A₂ᵀ [r₁, r₂]              so that nothing of the size of ΔW is made

This is exact and gauge free: B R⁻¹, R A is the same adapter for any invertible R, and so are
(−A, −B), while comparing A with A and B with B calls these unlike. All pairs of a fleet come at
once: with the A of all adapters stacked to [Σ r, d_in] and the Bᵀ to [Σ r, d_out], two Gram
products, their elementwise product, and sums over blocks; only the half on and above the
diagonal is computed. For adapters without low-rank factors (see ``model``) the change itself is
used: ⟨B A, D⟩ = Σ (Bᵀ D) ∘ A, and ⟨D₁, D₂⟩ of the flattened matrices. A member whose rank
exceeds d_in d_out / (d_in + d_out) is multiplied out, since that is cheaper then.

Over the fleet ⟨Δ_i, Δ_j⟩ is the sum over layers, in float64; a layer that an adapter does not
adapt counts as ΔW = 0. Hence

    norm_i² = G_ii        cosine_ij = G_ij / (norm_i norm_j)        (0 where a norm is 0)
    distance_ij² = G_ii + G_jj − 2 G_ij

Products are float32 by default: cosines are good to about 1e-6, and distances below about
5e-4 of the norms are rounding, which ``dtype=torch.float64`` takes away at twice the time.
``differences.diff`` of one pair always takes the exact way.

What is not in it: ``modules_to_save`` and the LoRA of an embedding; and of DoRA the rescaling
by its magnitudes, as long as there is no ``model``: then the change is that of the low-rank
part alone. Both are said in ``notes``. With ``model=`` DoRA, and families that are not B A
(IA3, OFT, LoHa, …), are compared by their effective ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lorasmith.core.adapter import unwrap
from lorasmith.core.layers import describe, read_weight
from lorasmith.errors import AdapterFileError, ConfigError, UnknownNameError
from lorasmith.fleet.members import LayerFactors, Member, Source, open_members, unknown_id
from lorasmith.io.files import check_base

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LayerGram", "SimilarityMatrix", "factor_gram", "similarity"]

_Progress: TypeAlias = Callable[[str, int, int], None] | None
_Array: TypeAlias = "NDArray[np.float64]"

#: Bytes that the stacked factors of one layer may take by default; a larger fleet goes block
#: by block, and reads factors again for each block.
MEMORY = 2**30
#: Rows of one product: enough for full speed, few enough that the result stays in the cache.
_ROWS = 512


@dataclass(frozen=True)
class LayerGram:
    """Inner products on one layer.

    Attributes:
        module: Name of the layer.
        gram: [N, N] float64; 0 for adapters that do not adapt it.
        present: Which adapters do.
    """

    module: str
    gram: _Array
    present: tuple[bool, ...]


@dataclass(frozen=True)
class SimilarityMatrix:
    """All inner products of a fleet.

    Attributes:
        ids: Names of the adapters, in the order of rows and columns.
        gram: ⟨ΔW_i, ΔW_j⟩ over all layers, [N, N] float64, symmetric.
        modules: Names of the layers that it is summed over.
        layers: The same for single layers, where asked for.
        notes: What of the adapters is not compared.
    """

    ids: tuple[str, ...]
    gram: _Array
    modules: tuple[str, ...]
    layers: tuple[LayerGram, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def index(self, id: str) -> int:  # noqa: A002 - its name
        """Row of an adapter.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        if id not in self.ids:
            raise unknown_id("There is no adapter of that name.", id, self.ids, key="id")
        return self.ids.index(id)

    @cached_property
    def norms(self) -> _Array:
        """‖ΔW_i‖ over all layers, [N]."""
        found: _Array = np.sqrt(np.clip(np.diag(self.gram), 0.0, None))
        return found

    @cached_property
    def cosine(self) -> _Array:
        """Cosine of ΔW_i and ΔW_j, [N, N] in [−1, 1]; of an adapter that does nothing 0."""
        return _cosine(self.gram)

    @cached_property
    def distances(self) -> _Array:
        """‖ΔW_i − ΔW_j‖, [N, N]."""
        squares = np.diag(self.gram)
        found: _Array = np.sqrt(
            np.clip(squares[:, None] + squares[None, :] - 2 * self.gram, 0.0, None)
        )
        np.fill_diagonal(found, 0.0)
        return found

    @cached_property
    def relative_distances(self) -> _Array:
        """‖ΔW_i − ΔW_j‖ / max(‖ΔW_i‖, ‖ΔW_j‖), [N, N]; 0 between two that do nothing."""
        largest = np.maximum(self.norms[:, None], self.norms[None, :])
        found: _Array = np.zeros_like(self.distances)
        np.divide(self.distances, largest, out=found, where=largest > 0)
        return found

    def layer_cosine(self, module: str) -> _Array:
        """The cosines on one layer.

        Raises:
            UnknownNameError: If the layers were not asked for, or it is none of them.
        """
        for layer in self.layers:
            if layer.module == module:
                return _cosine(layer.gram)
        raise UnknownNameError(
            "There are no inner products for that layer.",
            got=module,
            fix="pass per_layer=True, and the name of an adapted layer",
        )

    def nearest(self, id: str) -> list[tuple[str, float]]:  # noqa: A002
        """The other adapters and their cosines, the most similar one first."""
        row = self.cosine[self.index(id)]
        others = [i for i in range(len(self.ids)) if self.ids[i] != id]
        return [(self.ids[i], float(row[i])) for i in sorted(others, key=lambda i: -row[i])]

    def to_dict(self) -> dict[str, Any]:
        """The figures, in types that JSON can hold."""
        return {
            "ids": list(self.ids),
            "norms": self.norms.tolist(),
            "gram": self.gram.tolist(),
            "cosine": self.cosine.tolist(),
            "distances": self.distances.tolist(),
            "modules": list(self.modules),
            "layers": {layer.module: layer.gram.tolist() for layer in self.layers},
            "notes": list(self.notes),
        }


def _cosine(gram: _Array) -> _Array:
    norms = np.sqrt(np.clip(np.diag(gram), 0.0, None))
    product = np.outer(norms, norms)
    found: _Array = np.zeros_like(gram)
    np.divide(gram, product, out=found, where=product > 0)
    np.clip(found, -1.0, 1.0, out=found)
    np.fill_diagonal(found, (norms > 0).astype(np.float64))
    return found


# The mathematics -------------------------------------------------------------------------------


def factor_gram(
    factors: Sequence[tuple[Tensor, Tensor]], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inner products of all pairs of low-rank changes of one layer.

    Args:
        factors: (A [r_i, d_in], B [d_out, r_i]) of each; ranks may differ.
        dtype: Of the products.

    Returns:
        [N, N], float64, symmetric.
    """
    stack = _Stack.of(factors, dtype)
    found = _cross(stack, stack)
    return _mirrored(found)


@dataclass(frozen=True)
class _Stack:
    """Factors of several adapters: A [Σ r, d_in], Bᵀ [Σ r, d_out], and their ranks."""

    A: Tensor
    Bt: Tensor
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, factors: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> _Stack:
        return cls(
            torch.cat([A.detach().to(dtype) for A, _ in factors]),
            torch.cat([B.detach().to(dtype).T for _, B in factors]),
            tuple(A.shape[0] for A, _ in factors),
        )

    def starts(self) -> list[int]:
        return [0, *np.cumsum(self.ranks).tolist()]


def _cross(left: _Stack, right: _Stack) -> Tensor:
    """[len(left), len(right)] inner products; of a stack with itself the upper half alone."""
    same = left is right
    out = torch.zeros(len(left.ranks), len(right.ranks), dtype=torch.float64, device=left.A.device)
    starts, ends = left.starts(), right.starts()
    first = 0
    while first < len(left.ranks):
        last = first + 1
        while last < len(left.ranks) and starts[last + 1] - starts[first] <= _ROWS:
            last += 1
        rows = slice(starts[first], starts[last])
        column = first if same else 0
        columns = slice(ends[column], None)
        # The smaller side first would be no faster: both have the same number of rows.
        product = torch.mm(left.A[rows], right.A[columns].T)
        product *= torch.mm(left.Bt[rows], right.Bt[columns].T)
        out[first:last, column:] = _sums(product, left.ranks[first:last], right.ranks[column:])
        first = last
    return out


def _sums(values: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """Sums over blocks of ``rows`` × ``columns`` entries: [len(rows), len(columns)]."""
    if len(set(rows)) == len(set(columns)) == 1:
        return values.view(len(rows), rows[0], len(columns), columns[0]).sum(dim=(1, 3))
    # Blocks of several sizes, as two products with the matrices that say who is whose: rows
    # first, which leaves little for the second.
    mine = _membership(rows, values)
    theirs = _membership(columns, values)
    return (mine @ values) @ theirs.T


def _membership(sizes: Sequence[int], like: Tensor) -> Tensor:
    """[len(sizes), Σ sizes]: 1 where a column belongs to the row."""
    owner = torch.repeat_interleave(
        torch.arange(len(sizes), device=like.device), torch.tensor(sizes, device=like.device)
    )
    found = torch.zeros(len(sizes), int(owner.numel()), dtype=like.dtype, device=like.device)
    found[owner, torch.arange(owner.numel(), device=like.device)] = 1
    return found


def _mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix with that half on and above the diagonal."""
    upper = torch.triu(upper)
    return upper + torch.triu(upper, 1).T


# The fleet -------------------------------------------------------------------------------------


def similarity(
    sources: Source | Sequence[Source] | Mapping[str, Source],
    ids: Sequence[str] | None = None,
    *,
    model: nn.Module | None = None,
    per_layer: bool = False,
    modules: Callable[[str], bool] | None = None,
    dtype: torch.dtype = torch.float32,
    allow_base_mismatch: bool = False,
    memory: int = MEMORY,
    progress: _Progress = None,
) -> SimilarityMatrix:
    """Similarity of all pairs of a fleet, layer by layer.

        found = ls.similarity(["zoo/dates-en-s0", "zoo/dates-de-s0", "zoo/gsm8k-s0"])
        found.cosine            # [3, 3]

    Args:
        sources: Adapters, as :func:`lorasmith.fleet.open_members` takes them.
        ids: Their names.
        model: The base model. With it DoRA and families that are not B A are compared by
            their effective ΔW; without it DoRA by its low-rank part, and the others are refused.
        per_layer: Whether to keep the inner products of each layer (N² numbers a layer).
        modules: Which layers to compare, by name; all by default.
        dtype: Of the products.
        allow_base_mismatch: See :func:`~lorasmith.fleet.open_members`; also of ``model``.
        memory: Bytes that the factors of one layer may take at a time.
        progress: Called with ("open", adapters opened, adapters), then with ("similarity",
            layers done, layers).

    Raises:
        AdapterFileError: If an adapter cannot be read or a layer is not in the model.
        BaseMismatchError: If they are of different base models.
        UnsupportedFeatureError: If one cannot be compared.
        ConfigError: If no layer is left to compare.
    """
    members = open_members(
        sources,
        ids,
        allow_base_mismatch=allow_base_mismatch,
        needs="factors" if model is None else "delta",
        progress=progress,
    )
    layers: list[LayerGram] = []
    names: list[str] = []
    total = np.zeros((len(members), len(members)))
    for layer in layer_grams(
        members,
        model=model,
        modules=modules,
        dtype=dtype,
        allow_base_mismatch=allow_base_mismatch,
        memory=memory,
        progress=progress,
    ):
        total += layer.gram
        names.append(layer.module)
        if per_layer:
            layers.append(layer)
    if not names:
        raise ConfigError("There is no layer to compare.", key="modules")
    return SimilarityMatrix(
        tuple(m.id for m in members),
        total,
        tuple(names),
        tuple(layers),
        tuple(_notes(members, effective=model is not None)),
    )


def layer_grams(
    members: Sequence[Member],
    *,
    model: nn.Module | None = None,
    modules: Callable[[str], bool] | None = None,
    dtype: torch.dtype = torch.float32,
    allow_base_mismatch: bool = False,
    memory: int = MEMORY,
    progress: _Progress = None,
) -> Iterator[LayerGram]:
    """The inner products of one layer after the other; see :func:`similarity`."""
    if model is not None:
        model = unwrap(model)
        for member in members:
            check_base(model, member.weights, allow_base_mismatch)
    wanted: dict[str, list[int]] = {}
    for place, member in enumerate(members):
        for module in member.modules:
            if modules is None or modules(module):
                wanted.setdefault(module, []).append(place)
    for done, (module, places) in enumerate(wanted.items()):
        weight = None if model is None else _base_weight(model, module)
        inner = _layer([members[i] for i in places], module, weight, dtype, memory)
        gram = np.zeros((len(members), len(members)))
        gram[np.ix_(places, places)] = inner.numpy(force=True)
        present = [False] * len(members)
        for place in places:
            present[place] = True
        yield LayerGram(module, gram, tuple(present))
        if progress is not None:
            progress("similarity", done + 1, len(wanted))


def _layer(
    members: Sequence[Member],
    module: str,
    weight: Tensor | None,
    dtype: torch.dtype,
    memory: int,
) -> Tensor:
    """[n, n] of the members that adapt the layer."""
    thin: list[int] = []
    dense: list[int] = []
    for place, member in enumerate(members):
        low_rank = weight is None or (not member.dora and member.low_rank(module))
        (thin if low_rank and not _is_thick(member, module) else dense).append(place)
    out = torch.zeros(len(members), len(members), dtype=torch.float64)

    def change(place: int) -> Tensor:
        member = members[place]
        if weight is not None and (member.dora or not member.low_rank(module)):
            return member.delta(module, weight.to(dtype), dtype=dtype).to(dtype)
        return member.factors(module).delta(dtype)

    def stack(places: Sequence[int]) -> _Stack:
        found: list[LayerFactors] = [members[i].factors(module) for i in places]
        return _Stack.of([(f.A, f.B) for f in found], dtype)

    def fill(rows: Sequence[int], columns: Sequence[int], values: Tensor) -> None:
        out[torch.tensor(rows)[:, None], torch.tensor(columns)] = values.double().cpu()
        out[torch.tensor(columns)[:, None], torch.tensor(rows)] = values.double().cpu().T

    blocks = _blocks(members, thin, module, dtype, memory)
    for number, mine in enumerate(blocks):
        left = stack(mine)
        fill(mine, mine, _mirrored(_cross(left, left)))
        for theirs in blocks[number + 1 :]:
            fill(mine, theirs, _cross(left, stack(theirs)))
        for place in dense:
            D = change(place)
            # Σ (Bᵀ D) ∘ A, summed over each adapter's rows.
            rows = ((left.Bt @ D) * left.A).sum(dim=1, dtype=torch.float64)
            fill(mine, [place], _sums(rows[:, None], left.ranks, [1]))
    most = max(1, memory // max(1, _bytes(members[dense[0]], module, dtype))) if dense else 1
    groups = [dense[i : i + most] for i in range(0, len(dense), most)]
    for number, mine in enumerate(groups):
        flat = torch.stack([change(i).flatten() for i in mine])
        fill(mine, mine, _inner(flat, flat))
        for theirs in groups[number + 1 :]:
            fill(mine, theirs, _inner(flat, torch.stack([change(i).flatten() for i in theirs])))
    return out


#: Values summed in the dtype of the products before they go on in float64.
_CHUNK = 2**16


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """left rightᵀ of long rows, summed in float64 piece by piece."""
    found = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64, device=left.device)
    pieces = (torch.split(side, _CHUNK, dim=1) for side in (left, right))
    for a, b in zip(*pieces, strict=True):
        found += (a @ b.T).double()
    return found


def _is_thick(member: Member, module: str) -> bool:
    """Whether a pair costs more by factors than multiplied out."""
    d_in, d_out = member.sizes_of(module)
    return bool(d_in and d_out) and member.rank(module) * (d_in + d_out) > d_in * d_out


def _bytes(member: Member, module: str, dtype: torch.dtype) -> int:
    return math.prod(member.sizes_of(module)) * dtype.itemsize


def _blocks(
    members: Sequence[Member],
    places: Sequence[int],
    module: str,
    dtype: torch.dtype,
    memory: int,
) -> list[list[int]]:
    """Groups of members two of which, with their products, fit into ``memory``."""

    def size(place: int) -> int:
        return members[place].rank(module) * sum(members[place].sizes_of(module)) * dtype.itemsize

    # A product has _ROWS rows and a column for each stacked row; there are two of them.
    per_row = 2 * _ROWS * dtype.itemsize
    sizes = {p: size(p) + per_row * members[p].rank(module) for p in places}
    limit = memory if sum(sizes.values()) <= memory else memory // 2
    blocks: list[list[int]] = []
    used = 0
    for place in places:
        if not blocks or used + sizes[place] > limit:
            blocks.append([])
            used = 0
        blocks[-1].append(place)
        used += sizes[place]
    return blocks


def _base_weight(model: nn.Module, module: str) -> Tensor:
    """W [d_out, d_in] of a layer of the model."""
    try:
        layer = model.get_submodule(module)
    except AttributeError:
        layer = None
    info = None if layer is None else describe(layer, module)
    if layer is None or info is None:
        raise AdapterFileError(
            "An adapter has tensors for a layer that the model does not have.",
            key=module,
            got=type(model).__name__,
            fix="pass the model that it was made for",
        )
    return read_weight(layer, info).detach()


def _notes(members: Sequence[Member], *, effective: bool) -> Iterator[str]:
    dora = [m.id for m in members if m.dora]
    if dora and not effective:
        yield (
            f"{_some(dora)}: DoRA is compared by its low-rank part, without its magnitudes; "
            "pass the base model (model=, --model) to compare what it does to the weights"
        )
    saved = [m.id for m in members if m.weights.saved_modules]
    if saved:
        yield f"{_some(saved)}: modules_to_save are not compared"
    embedded = [m.id for m in members if any(".lora_embedding_" in k for k in m.rest)]
    if embedded:
        yield f"{_some(embedded)}: the LoRA of an embedding is not compared"


def _some(names: Sequence[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
