"""What a basis holds of an adapter, and what it takes to hold more: the steps of ``add``.

An adapter ΔW = B A comes in as rows, A [k, d_in] and B [k, d_out] (the columns of the factor).
With the basis of a layer as it is, U [d_out, R_u] and V [R_d, d_in], the code nearest to it is

    joint   C = (U⁺ B)(A V⁺), by least squares, U⁺ the pseudo-inverse; on a layer with diagonal
            cores only the diagonal of it
    share   loadings m, ℓ of the flattened factors in the components, after the factors have been
            brought into the gauge of the fleet (:func:`lorasmith.fleet.share.placed`)

(:func:`fit`). What is left over may be kept as a residual of low rank (:func:`within_budget`), or
the basis gets further directions, which changes no adapter (:func:`extend`). A layer that the
subspace does not know yet starts with a basis of nothing (:func:`blank`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorasmith.errors import ConfigError
from lorasmith.fleet import incremental, share
from lorasmith.fleet.building import Progress
from lorasmith.fleet.codec import Codec
from lorasmith.fleet.codes import (
    DIAGONAL,
    FACTORED,
    FULL,
    LOADINGS,
    PARTS,
    Code,
    Layer,
    coded,
    is_diagonal,
)
from lorasmith.fleet.members import Member
from lorasmith.fleet.options import Basis
from lorasmith.fleet.quantizing import FINER
from lorasmith.fleet.residuals import Part, chosen

__all__ = [
    "blank",
    "codecs_of",
    "extend",
    "fit",
    "given",
    "insert",
    "insert_codes",
    "project",
    "within_budget",
]


def blank(
    module: str, sizes: tuple[int, int], basis: Basis, like: Layer | None = None, adapters: int = 0
) -> Layer:
    """A layer with a basis of nothing: no direction (joint), or a mean of zeros (share).

    Args:
        module: Its name.
        sizes: (d_in, d_out).
        basis: Which basis.
        like: A layer of the same subspace, for the rank of the Share basis.
        adapters: How many adapters there are, which have nothing here.
    """
    d_in, d_out = sizes
    width = 1 if like is None else like.width
    start = width if basis == "share" else 0
    return Layer.new(module, torch.zeros(start, d_out), torch.zeros(start, d_in), adapters, width)


def codecs_of(layer: Layer) -> dict[str, Codec]:
    """Part of a layer → how it is stored, the same on all layers of a subspace."""
    return {name: getattr(layer, name).codec for name in PARTS}


def fit(layer: Layer, A: Tensor, B: Tensor, basis: Basis, gauge: str | None = None) -> Code:
    """The code of ΔW in a layer's basis; no residual.

    Args:
        layer: The layer.
        A: [k, d_in], float32.
        B: [k, d_out].
        basis: Which basis.
        gauge: That of the Share basis; ``"aligned"`` by default.
    """
    up, down = layer.up.unpack(), layer.down.unpack()
    none = B.new_zeros(0, B.shape[1]), A.new_zeros(0, A.shape[1])
    if basis == "joint":
        if not len(up) or not len(down):
            return Code(FACTORED, B.new_zeros(0, len(up)), A.new_zeros(0, len(down)), *none)
        right, left = share.balance(
            incremental.coordinates(A, down), incremental.coordinates(B, up)
        )
        if layer.diagonal:
            return coded(left, right, layer.sizes, diagonal=True)
        return coded(left, right, layer.sizes)
    r = layer.width
    A, B = share.placed(A, B, down[:r], up[:r], gauge or "aligned")
    ups, downs = up.view(-1, r * up.shape[1]), down.view(-1, r * down.shape[1])
    left = incremental.coordinates(B.reshape(1, -1), ups)
    right = incremental.coordinates(A.reshape(1, -1), downs)
    return Code(LOADINGS, left, right, *none)


def project(
    layers: Sequence[Layer],
    member: Member,
    basis: Basis,
    gauge: str | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Part]:
    """What a basis holds of each layer of an adapter, and what is left over.

    Args:
        layers: The subspace.
        member: The adapter.
        basis: Which basis.
        gauge: That of the Share basis; ``"aligned"`` by default.
        progress: Called with ("layers", done, layers of the adapter).

    Returns:
        Module name → what is held, of all layers of the adapter.
    """
    known = {layer.module: layer for layer in layers}
    like = layers[0] if layers else None
    found: dict[str, Part] = {}
    for done, module in enumerate(member.modules, start=1):
        factors = member.factors(module)
        A, B = factors.A, factors.B.mT.contiguous()
        own = known.get(module)
        layer = blank(module, (A.shape[1], B.shape[1]), basis, like) if own is None else own
        found[module] = Part.of(own, fit(layer, A, B, basis, gauge), layer, A, B)
        if progress is not None:
            progress("layers", done, len(member.modules))
    return found


def within_budget(
    layers: Sequence[Layer], parts: Mapping[str, Part], allowed: float
) -> tuple[dict[str, Part], Codec]:
    """The parts with residuals that keep the budget after rounding, and their codec.

    Residuals of others stay as they are stored; without any, more bits are taken where it
    needs them. Where no bits are enough it is what the present ones hold.

    Args:
        layers: The subspace.
        parts: Module name → what the basis holds of an adapter.
        allowed: The most that the adapter may lose, 0 to 1.
    """
    codec: Codec = layers[0].residual_up.codec if layers else "float32"
    made, met = chosen(parts, allowed, codec)
    if any(len(layer.residual_up) for layer in layers):
        return made, codec
    for finer in FINER[codec]:
        if met:
            break
        other, met = chosen(parts, allowed, finer)
        if met:
            made, codec = other, finer
    return made, codec


def insert(layers: Sequence[Layer], parts: Mapping[str, Part]) -> tuple[Tensor, Tensor]:
    """Puts an adapter behind the last one; layers that it does not adapt have a place for it too.

    Args:
        layers: The subspace; changed. All layers of the adapter are among them.
        parts: Module name → what is to be held of the adapter.

    Returns:
        ‖ΔW‖² and ‖ΔW − ΔŴ‖² of each layer [L], float64, as it is stored now, residual and
        rounding included.
    """
    energy = torch.zeros(len(layers), dtype=torch.float64)
    gone = torch.zeros_like(energy)
    for place, layer in enumerate(layers):
        layer.grow()
        if layer.module not in parts:
            continue
        part, number = parts[layer.module], len(layer.index) - 1
        layer.put(number, part.code)
        energy[place] = part.energy
        gone[place] = float(share.distance(*part.whole, *layer.rows(number)))
    return energy, gone


def insert_codes(layers: Sequence[Layer], codes: Mapping[str, Code]) -> Tensor:
    """Puts an adapter of which there are only codes behind the last one.

    Args:
        layers: The subspace; changed.
        codes: Module name → code.

    Returns:
        ‖ΔŴ‖² of each layer [L], float64, as it is stored now.
    """
    energy = torch.zeros(len(layers), dtype=torch.float64)
    for place, layer in enumerate(layers):
        layer.grow()
        if layer.module in codes:
            number = len(layer.index) - 1
            layer.put(number, codes[layer.module])
            energy[place] = incremental.square(*layer.rows(number))
    return energy


def given(layer: Layer, core: Tensor | tuple[Tensor, Tensor], basis: Basis) -> Code:
    """The code of a core that is given, e.g. one that was trained in the basis.

    Args:
        layer: Its layer.
        core: C [R_u, R_d], of which only the diagonal is stored where there is nothing else; or
            for the Share basis the loadings (m [K + 1], ℓ [K + 1]).
        basis: Which basis.

    Raises:
        ConfigError: It has another shape than the basis asks for.
    """
    none = torch.zeros(0, layer.sizes[0]), torch.zeros(0, layer.sizes[1])
    wanted: tuple[int, ...]
    got: tuple[int, ...]
    if isinstance(core, tuple):
        left, right = (t.detach().float().reshape(1, -1) for t in core)
        wanted = (len(layer.up) // layer.width, len(layer.down) // layer.width)
        got = (left.shape[1], right.shape[1])
        code = Code(LOADINGS, left, right, *none)
    else:
        whole = core.detach().float()
        wanted, got = layer.ranks, tuple(whole.shape)
        code = Code(FULL, torch.zeros(0, len(layer.up)), whole, *none)
        if wanted == got and min(got) > 1 and is_diagonal(whole):
            values = torch.diagonal(whole).reshape(1, -1)
            code = replace(code, kind=DIAGONAL, right=values)
    if wanted != got or isinstance(core, tuple) != (basis == "share"):
        raise ConfigError(
            "A core does not fit the basis.",
            expected=f"{'loadings' if basis == 'share' else 'a core'} {list(wanted)}",
            got=list(got),
            key=layer.module,
        )
    return code


def extend(layer: Layer, up: Tensor, down: Tensor) -> None:
    """Appends directions to the basis of a layer; what adapters do stays exactly the same.

    Args:
        layer: The layer; changed.
        up: New columns of U [d_out, n], n a multiple of the layer's width.
        down: New rows of V [n', d_in], likewise.

    Raises:
        ConfigError: They do not fit the layer.
    """
    rows_up, rows_down = up.detach().float().mT.contiguous(), down.detach().float()
    fits = rows_up.shape[1:] == (layer.sizes[0],) and rows_down.shape[1:] == (layer.sizes[1],)
    if not fits or len(rows_up) % layer.width or len(rows_down) % layer.width:
        raise ConfigError(
            "The new directions do not fit the layer.",
            expected=f"up [{layer.sizes[0]}, n] and down [n, {layer.sizes[1]}]"
            + (f", n a multiple of {layer.width}" if layer.width > 1 else ""),
            got=f"up {list(up.shape)} and down {list(down.shape)}",
            key=layer.module,
        )
    codes = layer.codes()
    more_up, more_down = len(rows_up) // layer.width, len(rows_down) // layer.width
    pad = torch.nn.functional.pad
    wide = []
    for code in codes:
        left = pad(code.left, (0, more_up))
        if code.kind == FULL:
            right = pad(code.right, (0, more_down, 0, more_up))
        elif code.kind == DIAGONAL:
            Ru, Rd = len(layer.up) + more_up, len(layer.down) + more_down
            size = min(Ru, Rd) if layer.diagonal else Rd
            right = pad(code.right, (0, size - code.right.shape[1]))
        else:
            right = pad(code.right, (0, more_down))
        wide.append(replace(code, left=left, right=right))
    pack = type(layer.up).pack
    layer.up = type(layer.up).join([layer.up, pack(rows_up, layer.up.codec)])
    layer.down = type(layer.down).join([layer.down, pack(rows_down, layer.down.codec)])
    layer.refill(wide)
