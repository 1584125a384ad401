"""What a fused model consists of: its tensors, in order, and its configuration.

Decided before a byte is written: which tensors are the base's own, replaced or computed, in
which dtype, whether a head that was tied to the embedding gets a matrix of its own, how many rows
the vocabulary has, and what ``config.json`` says of all that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.variant import Variant
from lorasmith.errors import AdapterFileError, FuseError, ModelError
from lorasmith.export.fuse_adapters import Part
from lorasmith.export.fuse_base import Base
from lorasmith.export.fuse_changes import Changes
from lorasmith.export.fuse_matrix import FusedMatrix, Measured, finite, narrowed
from lorasmith.export.fuse_tensors import FromCall, Stored
from lorasmith.export.shards import KINDS, Piece
from lorasmith.io.checks import check_finite

__all__ = ["Plan"]


class Plan:
    """What is to be written, tensor by tensor; hardly any of the base's values is read yet.

    Attributes:
        changes: What the adapters change.
        pieces: The tensors.
        config: The new ``config.json``.
        measured: Layer → sums, filled while the pieces are written.
        replaced: Names of the tensors that are an adapter's own.
        untied: Whether head and embedding come apart.
        vocabulary: (rows before, rows now) if they differ.
        main_dtype: The dtype of most numbers.
    """

    def __init__(self, base: Base, parts: Sequence[Part], dtype: torch.dtype | None) -> None:
        self._base, self._dtype = base, dtype
        self.measured: dict[str, Measured] = {}
        self.changes = Changes(base, parts)
        self.untied, self._names = self._ties()
        self.vocabulary = self._vocabulary()
        for part in parts:
            self._check_layers(part)
        self.replaced = list(self.changes.replacements)
        self.pieces = self._pieces()
        totals: dict[str, int] = {}
        for piece in self.pieces:
            totals[piece.kind] = totals.get(piece.kind, 0) + piece.nbytes
        main = max(totals, key=lambda k: totals[k])
        known = {kind: d for d, kind in KINDS.items()}
        self.main_dtype = str(known.get(main, main)).removeprefix("torch.")
        self.config = self._new_config()

    # -- ends of the model ---------------------------------------------------------------

    def _ties(self) -> tuple[bool, dict[str, str]]:
        """Whether tied weights come apart; new name in the files → parameter, of new tensors."""
        changes = self.changes
        added: dict[str, str] = {}
        untied = False
        heads = self._base.source.heads
        for group in {tuple(g) for g in changes.owners.values()}:
            if not any(changes.touches(n) for n in group):
                continue
            self._refuse_tying(group)
            whole = [changes.replacements.get(n) for n in group]
            acted = any(
                (m := n.rpartition(".")[0]) in changes.embedded or m in changes.layers
                for n in group
            )
            if not acted and all(whole) and _all_equal([s[k] for s, k in whole if s]):  # type: ignore[misc]
                for name in group[1:]:
                    del changes.replacements[name]
                first = next(n for n in group if self._base.key_of(n) is not None)
                changes.replacements[first] = changes.replacements.pop(group[0])
                continue
            ends = {f"{m}.weight" for m in (*changes.embeddings(), *heads)}
            if set(group) - ends:
                raise FuseError(
                    "The adapter changes a weight that several modules share, and the model's "
                    "class has no way to keep them apart.",
                    got=" and ".join(group),
                    fix="keep the adapter attached",
                    key=group[0],
                )
            untied = True
            added |= {name: name for name in group if self._base.key_of(name) is None}
        return untied, added

    def _refuse_tying(self, group: Sequence[str]) -> None:
        for part in self.changes.parts:
            if part.weights.peft.get("ensure_weight_tying"):
                raise FuseError(
                    "The adapter was trained with ensure_weight_tying: its change is meant for "
                    "the embedding and the head at once, and its files do not say how.",
                    got=" and ".join(group),
                    file=part.file,
                    fix="merge it with PEFT: model.merge_and_unload().save_pretrained(…)",
                )

    def _vocabulary(self) -> tuple[int, int] | None:
        changes = self.changes
        for module in changes.embeddings():
            name = f"{module}.weight"
            before = changes.shape(name)[0]
            new = changes.replacements.get(name)
            now = before if new is None else new[0].shape(new[1])[0]
            for head in self._base.source.heads:
                end = f"{head}.weight"
                if changes.start(end) is None:
                    continue
                other = changes.replacements.get(end)
                tied = name in changes.owners.get(end, ()) and not self.untied
                size = now if tied else changes.shape(end)[0]
                size = size if other is None else other[0].shape(other[1])[0]
                bias = changes.start(f"{head}.bias")
                changed = changes.replacements.get(f"{head}.bias")
                if size == now and bias is not None and changed is None and bias.shape[0] != now:
                    size = bias.shape[0]
                if size != now and new is None and other is None and changed is None:
                    raise ModelError(
                        "Embedding and head of the base model have different numbers of rows.",
                        expected=f"{now:,} rows in {head}, as in {module}",
                        got=f"{size:,}",
                        file=self._base.folder or self._base.resolved.path,
                        fix="download or copy the base model again",
                        key=head,
                    )
                if size != now:
                    raise FuseError(
                        "The vocabulary is resized in one end of the model and not in the other: "
                        "the rows that the other would need are in none of the files.",
                        expected=f"{now:,} rows in {head}, as in {module}",
                        got=f"{size:,}",
                        file=changes.parts[0].file,
                        fix="save the adapter again with both (PEFT: "
                        "save_embedding_layers=True, or both in modules_to_save)",
                        key=head,
                    )
            if now != before:
                return before, now
        return None

    def _check_layers(self, part: Part) -> None:
        """Shapes of the adapter's tensors against the layers, resized ones included."""
        for module, info in part.infos.items():
            new = self.changes.replacements.get(f"{module}.weight")
            if new is not None:
                d_out = new[0].shape(new[1])[0]
                part.infos[module] = info = replace(info, d_out=d_out)
            part.core.check_shapes(info)
        infos = list(part.infos.values())
        part.core.check_shared(infos)
        part.shared = part.core.shared_tensors(infos)

    # -- pieces --------------------------------------------------------------------------

    def _pieces(self) -> list[Piece]:
        base, changes = self._base, self.changes
        parameters: dict[str, str] = {}
        touched = set(changes.replacements)
        touched |= {f"{m}.weight" for m in (*changes.layers, *changes.embedded)}
        touched |= {f"{m}.bias" for m in changes.layers}
        for name in touched:
            key = base.key_of(name)
            if key is not None:
                parameters[key] = name
            elif not name.endswith(".bias") and name not in self._names:
                raise ModelError("The checkpoint has no such tensor.", file=base.folder, key=name)
        renamed = self._renamed() if self._names else {}
        own = self._parameters()
        pieces = []
        for key, stored in base.stored.items():
            changed = parameters.get(key)
            made = stored if changed is None else self._made(changed, stored)
            new = renamed.get(key, key)
            pieces.append(self._piece(new, stored, made, check=made is stored and key in own))
        for name in self._names:
            start = changes.start(name)
            assert start is not None
            pieces.append(self._piece(name, start, self._made(name, start)))
        return pieces

    def _renamed(self) -> dict[str, str]:
        """Name in the files → name in the class, if they differ by a prefix.

        A checkpoint of the model without its head must not get a head beside such names.
        """
        skeleton = self._base.skeleton
        if skeleton is None:
            return {}
        found = {}
        for name in skeleton.state_dict():
            key = self._base.key_of(name)
            if key is not None and key != name and key not in found:
                found[key] = name
        return found

    def _parameters(self) -> set[str | None]:
        """Names in the files of the parameters of the class; masks may hold infinities."""
        skeleton = self._base.skeleton
        if skeleton is None:
            return set()
        named = skeleton.named_parameters(remove_duplicate=False)
        return {self._base.key_of(name) for name, _ in named}

    def _piece(self, key: str, stored: Stored, made: Stored, *, check: bool = False) -> Piece:
        floating = made.dtype is not None and made.dtype.is_floating_point
        if not floating:
            return Piece(key, made.kind, made.shape, made.nbytes, made.blocks)
        dtype = self._out(stored)
        nbytes = math.prod(made.shape) * dtype.itemsize

        def blocks() -> Iterator[Tensor]:
            for block in made.blocks():
                if check:
                    try:
                        check_finite(block, key, made.file)
                    except AdapterFileError as error:
                        raise FuseError(
                            "A weight of the base model is not finite.",
                            expected=error.expected,
                            got=error.got,
                            file=made.file,
                            key=key,
                            fix="download or copy the base model again",
                        ) from error
                yield narrowed(block, dtype, key)

        return Piece(key, KINDS[dtype], made.shape, nbytes, blocks)

    def _out(self, stored: Stored) -> torch.dtype:
        """The dtype in which a tensor of the base is written."""
        assert stored.dtype is not None
        return self._dtype or self._base.dtype or stored.dtype

    def _made(self, name: str, stored: Stored) -> Stored:
        """A tensor with everything done to it; in its final dtype where an adapter acts."""
        module, _, leaf = name.rpartition(".")
        out = self._out(stored)
        new = self.changes.replacements.get(name)
        start: Stored = stored
        if new is not None:
            source, key = new
            start = FromCall(source.shape(key), source.dtype(key), lambda: source[key])
        acting = self.changes.layers.get(module, [])
        embedded = self.changes.embedded.get(module, [])
        wide = torch.float64 if _is_wide(start.dtype) or _is_wide(out) else torch.float32
        if leaf == "weight" and (acting or embedded):
            sums = self.measured.setdefault(module, Measured(module))
            return FusedMatrix(module, start, acting, embedded, out, wide, sums)
        if leaf == "bias" and acting:
            own = [p for p in acting if _moves_bias(p.weights.variant)]
            if own:
                return FromCall(start.shape, out, lambda: self._bias(module, start, own, wide))
        return start

    def _bias(
        self, module: str, start: Stored, acting: Sequence[Part], wide: torch.dtype
    ) -> Tensor:
        bias = torch.cat([b.to(wide) for b in start.blocks()])
        total = bias.clone()
        for part in acting:
            state = part.state(module, wide)
            total += part.weight * (part.weights.variant.effective_bias(state, bias) - bias)
        return finite(total, f"{module}.bias")

    # -- configuration -------------------------------------------------------------------

    def _new_config(self) -> dict[str, Any]:
        config = dict(self._base.config)
        inner = config.get("text_config")
        levels = [config]
        if isinstance(inner, dict):
            config["text_config"] = inner = dict(inner)
            levels.append(inner)
        if self._dtype is not None:
            name = str(self._dtype).removeprefix("torch.")
            for level in levels:
                for key in ("dtype", "torch_dtype"):
                    if key in level:
                        level[key] = name
            if not {"dtype", "torch_dtype"} & set(config):
                config["torch_dtype"] = name
        if self.untied:
            config["tie_word_embeddings"] = False
            if inner is not None and "tie_word_embeddings" in inner:
                inner["tie_word_embeddings"] = False
        if self.vocabulary is not None:
            for level in levels:
                if "vocab_size" in level:
                    level["vocab_size"] = self.vocabulary[1]
            if all("vocab_size" not in level for level in levels):
                config["vocab_size"] = self.vocabulary[1]
        return config


def _is_wide(dtype: torch.dtype | None) -> bool:
    return dtype in (torch.float32, torch.float64)


def _moves_bias(variant: Variant) -> bool:
    return type(variant).effective_bias is not Variant.effective_bias


def _all_equal(values: Sequence[Tensor]) -> bool:
    return all(v.shape == values[0].shape and torch.equal(v, values[0]) for v in values[1:])
