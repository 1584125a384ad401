"""One layer of a shared subspace: its basis, and what each adapter has there.

    ΔW_i ≈ Uᵀ-rows ᵀ · left_iᵀ · right_i · V  +  residual_upᵀ · residual_down

Everything is rows of numbers (:class:`lorasmith.fleet.codec.Rows`), of all adapters below each
other, so that quantising, saving, adding and removing treat all of it alike. The core
C_i = left_iᵀ right_i [R_u, R_d] is stored in one of four kinds:

    FULL      right = C, no left                    R_u rows of R_d
    FACTORED  left [k, R_u], right [k, R_d]         k rows of each; for k < R_u R_d / (R_u + R_d)
    DIAGONAL  right = the diagonal                  1 row of min(R_u, R_d); beside other kinds
                                                    of R_d, zeros at the end
    LOADINGS  left = m, right = ℓ                   1 row of K + 1 each; C = (m ℓᵀ) ⊗ I_r

An adapter's residual is k rows of length d_out and as many of length d_in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorasmith.fleet.codec import Codec, Rows

__all__ = [
    "ABSENT",
    "DIAGONAL",
    "FACTORED",
    "FULL",
    "LOADINGS",
    "Code",
    "Layer",
    "absent",
    "coded",
    "is_diagonal",
]

ABSENT, FULL, FACTORED, DIAGONAL, LOADINGS = range(5)

#: The parts of a layer that hold numbers.
PARTS = ("up", "down", "left", "right", "residual_up", "residual_down")
#: Which column of the index counts the rows of a part.
COLUMNS = {"left": 1, "right": 2, "residual_up": 3, "residual_down": 3}


@dataclass(frozen=True, eq=False)
class Code:
    """What one adapter has on one layer, float32.

    Attributes:
        kind: ``FULL``, ``FACTORED``, ``DIAGONAL``, ``LOADINGS`` or ``ABSENT``.
        left: [rows, columns], see the module.
        right: [rows, columns].
        residual_up: [k, d_out].
        residual_down: [k, d_in].
    """

    kind: int
    left: Tensor
    right: Tensor
    residual_up: Tensor
    residual_down: Tensor


@dataclass(eq=False)
class Layer:
    """One layer.

    Attributes:
        module: Its name in the model.
        width: Rows that a component has in ``up`` and ``down``: r of the Share basis, else 1.
        up: [R_u, d_out].
        down: [R_d, d_in].
        left, right: The cores of all adapters.
        residual_up, residual_down: Their residuals.
        index: [N, 4] int64: kind, rows of left, rows of right, rows of the residual.
    """

    module: str
    width: int
    up: Rows
    down: Rows
    left: Rows
    right: Rows
    residual_up: Rows
    residual_down: Rows
    index: Tensor = field(default_factory=lambda: torch.zeros(0, 4, dtype=torch.int64))

    @classmethod
    def new(cls, module: str, up: Tensor, down: Tensor, adapters: int, width: int = 1) -> Layer:
        """A layer on which ``adapters`` adapters have nothing yet."""
        return cls(
            module,
            width,
            Rows.pack(up),
            Rows.pack(down),
            Rows.empty(up.shape[0] // width),
            Rows.empty(down.shape[0] // width),
            Rows.empty(up.shape[1]),
            Rows.empty(down.shape[1]),
            torch.zeros(adapters, 4, dtype=torch.int64),
        )

    @property
    def ranks(self) -> tuple[int, int]:
        """(R_u, R_d)."""
        return len(self.up), len(self.down)

    @property
    def sizes(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.up.columns, self.down.columns

    def has(self, number: int) -> bool:
        """Whether an adapter adapts the layer."""
        return int(self.index[number, 0]) != ABSENT

    def _span(self, number: int, column: int) -> tuple[int, int]:
        start = int(self.index[:number, column].sum())
        return start, start + int(self.index[number, column])

    def code(self, number: int) -> Code:
        """What an adapter has here."""
        left, right, rest = (self._span(number, c) for c in (1, 2, 3))
        return Code(
            int(self.index[number, 0]),
            self.left.take(*left).unpack(),
            self.right.take(*right).unpack(),
            self.residual_up.take(*rest).unpack(),
            self.residual_down.take(*rest).unpack(),
        )

    def codes(self) -> list[Code]:
        """What all adapters have here; the rows are unpacked together."""
        sizes = self.index.T.tolist()
        parts = [
            torch.split(getattr(self, name).unpack(), sizes[column])
            for name, column in COLUMNS.items()
        ]
        return [Code(kind, *values) for kind, *values in zip(sizes[0], *parts, strict=True)]

    @property
    def diagonal(self) -> bool:
        """Whether there are cores, and all of them are diagonal."""
        kinds = set(self.index[:, 0].tolist()) - {ABSENT}
        return kinds == {DIAGONAL}

    def put(self, number: int, code: Code) -> None:
        """Replaces what an adapter has here."""
        if code.kind != LOADINGS and code.right.shape[1] != self.right.columns:
            code = self._one_length(code)
        new = {
            "left": (1, code.left),
            "right": (2, code.right),
            "residual_up": (3, code.residual_up),
            "residual_down": (3, code.residual_down),
        }
        for name, (column, values) in new.items():
            rows: Rows = getattr(self, name)
            start, stop = self._span(number, column)
            packed = Rows.pack(values, rows.codec)
            parts = [rows.take(0, start), packed, rows.take(stop, len(rows))]
            setattr(self, name, Rows.join(parts))
        sizes = [code.kind, len(code.left), len(code.right), len(code.residual_up)]
        self.index = self.index.clone()
        self.index[number] = torch.tensor(sizes)

    def _one_length(self, code: Code) -> Code:
        """Gives diagonals and rows of other kinds the same length, R_d; so the code too."""
        Rd = len(self.down)
        if self.right.columns != Rd:
            others = [_long(other, Rd) for other in self.codes()]
            self.refill(others)
        return _long(code, Rd)

    def fill(self, codes: Sequence[Code]) -> None:
        """Replaces what all adapters have here, in the codecs there are."""
        for name in PARTS[2:]:
            rows: Rows = getattr(self, name)
            # Codes of nothing are of any length.
            values = [v for v in (getattr(c, name) for c in codes) if len(v)]
            packed = torch.cat(values) if values else torch.zeros(0, rows.columns)
            setattr(self, name, Rows.pack(packed, rows.codec))
        self.index = torch.tensor(
            [[c.kind, len(c.left), len(c.right), len(c.residual_up)] for c in codes],
            dtype=torch.int64,
        ).reshape(-1, 4)

    def refill(self, codes: Sequence[Code]) -> None:
        """:meth:`fill` with rows of the lengths that the basis has by now."""
        for name, basis in (("left", self.up), ("right", self.down)):
            codec = getattr(self, name).codec
            setattr(self, name, Rows.empty(len(basis) // self.width, codec))
        self.fill(codes)

    def grow(self) -> None:
        """Room for one more adapter, which has nothing here."""
        self.index = torch.cat((self.index, torch.zeros(1, 4, dtype=torch.int64)))

    def drop(self, number: int) -> None:
        """Takes an adapter out."""
        for name, column in COLUMNS.items():
            setattr(self, name, getattr(self, name).without(*self._span(number, column)))
        self.index = torch.cat((self.index[:number], self.index[number + 1 :]))

    def core(self, number: int) -> Tensor:
        """C [R_u, R_d]; zero where the adapter has nothing here."""
        left, right = self.wide(self.code(number))
        return left.mT @ right

    def wide(self, code: Code) -> tuple[Tensor, Tensor]:
        """Left [k, R_u] and right [k, R_d] with C = leftᵀ right, whatever the kind."""
        Ru, Rd = self.ranks
        left, right = code.left, code.right
        if code.kind == ABSENT:
            return left.new_zeros(0, Ru), left.new_zeros(0, Rd)
        if code.kind == FULL:
            return torch.eye(Ru), right
        if code.kind == DIAGONAL:
            size = right.shape[1]
            return torch.eye(size, Ru), torch.eye(size, Rd) * right.mT
        if code.kind == LOADINGS:
            eye = torch.eye(self.width)
            return torch.kron(left, eye), torch.kron(right, eye)
        return left, right

    def rows(
        self, which: int | Code, up: Tensor | None = None, down: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A [k, d_in] and the columns of B as rows [k, d_out], residual included.

        Args:
            which: The adapter, or its code.
            up: The basis unpacked, if it is at hand.
            down: Likewise.
        """
        code = which if isinstance(which, Code) else self.code(which)
        left, right = self.wide(code)
        up = self.up.unpack() if up is None else up
        down = self.down.unpack() if down is None else down
        if code.kind == FULL:  # the identity on the left costs rows only
            Ru, Rd = self.ranks
            if Rd < Ru:
                left, right = right.mT, torch.eye(Rd)
        return (
            torch.cat((right @ down, code.residual_down)),
            torch.cat((left @ up, code.residual_up)),
        )

    def recode(self, **codecs: Codec) -> None:
        """Stores parts in other codecs: name of the part → codec."""
        for name, codec in codecs.items():
            rows: Rows = getattr(self, name)
            if rows.codec != codec:
                setattr(self, name, Rows.pack(rows.unpack(), codec))


def absent(sizes: tuple[int, int], columns: tuple[int, int]) -> Code:
    """The code of an adapter that has nothing on a layer.

    Args:
        sizes: (d_out, d_in).
        columns: Lengths of the rows of left and right.
    """
    return Code(
        ABSENT,
        torch.zeros(0, columns[0]),
        torch.zeros(0, columns[1]),
        torch.zeros(0, sizes[0]),
        torch.zeros(0, sizes[1]),
    )


def coded(left: Tensor, right: Tensor, sizes: tuple[int, int], *, diagonal: bool = False) -> Code:
    """The core leftᵀ right in the kind that takes the fewest numbers; without a residual.

    Args:
        left: [k, R_u].
        right: [k, R_d].
        sizes: (d_out, d_in) of the layer.
        diagonal: Whether to keep the diagonal only.
    """
    none = torch.zeros(0, sizes[0]), torch.zeros(0, sizes[1])
    Ru, Rd = left.shape[1], right.shape[1]
    if diagonal:
        size = min(Ru, Rd)
        return Code(
            DIAGONAL, left[:0], (left[:, :size] * right[:, :size]).sum(0, keepdim=True), *none
        )
    if left.shape[0] * (Ru + Rd) < Ru * Rd:
        return Code(FACTORED, left.contiguous(), right.contiguous(), *none)
    core = (left.to(torch.float64).mT @ right.to(torch.float64)).to(torch.float32)
    return Code(FULL, left[:0], core, *none)


def is_diagonal(core: Tensor) -> bool:
    """Whether a matrix [R_u, R_d] has nothing beside its diagonal."""
    return int(torch.count_nonzero(core)) == int(torch.count_nonzero(torch.diagonal(core)))


def _long(code: Code, columns: int) -> Code:
    """A diagonal with zeros at the end; other codes as they are."""
    if code.kind != DIAGONAL:
        return code
    more = columns - code.right.shape[1]
    return replace(code, right=torch.nn.functional.pad(code.right, (0, more)))
