"""What adapters change in a base: layers, whole tensors, and embeddings.

    part of an adapter                              kept in
    tensors of a layer                              ``layers``
    a copy of a module (``modules_to_save``)        ``replacements``
    the embedding or head itself, as PEFT saves     ``replacements``
    it beside a resized vocabulary
    a LoRA on the input embedding                   ``embedded``

Everything that does not fit the base is refused here, adapters of weight 0 included. Of the
base's values only those are read that an adapter has a copy of: a copy that is the base's own
changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.errors import AdapterFileError, FuseError, ModelError
from lorasmith.export.fuse_adapters import Part
from lorasmith.export.fuse_base import Base
from lorasmith.export.fuse_matrix import Embedding
from lorasmith.export.fuse_tensors import Stored
from lorasmith.io import peft
from lorasmith.io.files import check_targets, layers_on
from lorasmith.io.tensors import TensorSource
from lorasmith.io.weights import check_finite, reason_for

__all__ = ["Changes"]


class Changes:
    """What the adapters change, by name.

    Attributes:
        parts: The adapters whose weight is not 0.
        layers: Layer → the adapters that act on it.
        replacements: Tensor that is an adapter's own → (the adapter's tensors, name there).
        embedded: Embedding → LoRAs on it.
        owners: Parameter → all names of what it is one with, of those that have several.
    """

    def __init__(self, base: Base, parts: Sequence[Part]) -> None:
        self._base = base
        self.parts = [part for part in parts if part.weight]
        self.layers: dict[str, list[Part]] = {}
        self.replacements: dict[str, tuple[TensorSource, str]] = {}
        self.embedded: dict[str, list[Embedding]] = {}
        self.owners = _owners(base.skeleton)
        for part in parts:
            # Also those of weight 0: what does not fit is an error whatever its weight.
            self._collect(part)

    def _collect(self, part: Part) -> None:
        base, weights, file = self._base, part.weights, part.file
        if base.skeleton is not None:
            part.infos = layers_on(base.skeleton, part.core, file or Path(peft.WEIGHTS))
            check_targets(base.skeleton, part.core, file or Path(peft.WEIGHTS))
        else:
            for module in part.core.modules:
                if module not in base.source.layers:
                    raise AdapterFileError(
                        "The adapter has tensors for a layer that the checkpoint does not have.",
                        file=file,
                        key=module,
                    )
            part.infos = {m: base.source.layers[m].info for m in part.core.modules}
        for module in part.infos:
            if part.weight:
                self.layers.setdefault(module, []).append(part)
            if module not in base.source.layers:
                problem = base.source.problems.get(module)
                raise ModelError(
                    "A layer of the adapter cannot be read from the checkpoint.",
                    expected="a matrix of floating-point numbers, as the model has it",
                    got=problem.message if problem is not None else "it is not there",
                    file=base.folder,
                    key=module,
                )
        for module, leaves in weights.saved_modules.items():
            self._check_saved(part, module, leaves)
            for leaf in leaves:
                self._replace(part, f"{module}.{leaf}")
        self._take_others(part)

    def _check_saved(self, part: Part, module: str, leaves: Sequence[str]) -> None:
        skeleton = self._base.skeleton
        if skeleton is None:
            return
        try:
            wanted = set(skeleton.get_submodule(module).state_dict())
        except AttributeError as error:
            raise AdapterFileError(
                "The adapter has a copy of a module that the model does not have.",
                file=part.file,
                key=module,
                got=type(skeleton).__name__,
                fix="name a base of the class that it was trained on",
            ) from error
        for leaf in sorted(wanted ^ set(leaves)):
            raise AdapterFileError(
                "A tensor is missing." if leaf in wanted else "A tensor is not the module's.",
                file=part.file,
                key=f"{peft.PREFIX}{module}.{leaf}",
            )

    def _take_others(self, part: Part) -> None:
        """LoRAs on embeddings; embeddings and head that PEFT saves beside adapters."""
        halves: dict[str, dict[str, str]] = {}
        for name in part.others:
            module, _, leaf = name.rpartition(".")
            if leaf in ("lora_embedding_A", "lora_embedding_B") and module in self.embeddings():
                halves.setdefault(module, {})[leaf[-1]] = name
                continue
            plain = name.replace(".base_layer.", ".")
            if plain in self._ends():
                self._replace(part, plain, name)
                continue
            raise AdapterFileError(
                f"The file holds a tensor that cannot be fused: {reason_for(name)}.",
                file=part.file,
                key=name,
                got=f"{len(part.others)} tensors beside the adapter's own",
                fix="merge it with PEFT: model.merge_and_unload().save_pretrained(…)",
            )
        for module, found in halves.items():
            self._embed(part, module, found)

    def _embed(self, part: Part, module: str, found: Mapping[str, str]) -> None:
        weights = part.weights
        if set(found) != {"A", "B"}:
            missing = f"{module}.lora_embedding_{'B' if 'A' in found else 'A'}"
            raise AdapterFileError("A tensor is missing.", file=part.file, key=missing)
        if weights.variant.name != "lora":
            raise AdapterFileError(
                f"What {weights.variant.name} does to an embedding is not fused.",
                file=part.file,
                key=module,
                fix="merge it with PEFT: model.merge_and_unload().save_pretrained(…)",
            )
        config: Any = weights.config
        A, B = (weights.tensors[f"{peft.PREFIX}{found[h]}"].to(torch.float32) for h in "AB")
        for half, value in (("A", A), ("B", B)):
            check_finite(value, found[half], part.file)
        rows, columns = self.shape(f"{module}.weight")
        rank = config.rank_of(module)
        if A.shape != (rank, rows) or B.shape != (columns, rank):
            raise AdapterFileError(
                "A LoRA on an embedding has other shapes than it and the configuration ask for.",
                file=part.file,
                key=module,
                expected=f"A [{rank}, {rows}], B [{columns}, {rank}]",
                got=f"A {list(A.shape)}, B {list(B.shape)}",
            )
        if part.weight:
            scaling = config.scaling_of(module) * part.weight
            self.embedded.setdefault(module, []).append((A, B, scaling))

    def _replace(self, part: Part, name: str, key: str | None = None) -> None:
        """Takes a whole tensor from an adapter, unless it is the base's own."""
        source, key = part.weights.tensors, f"{peft.PREFIX}{key or name}"
        check_finite(value := source[key], key, part.file)
        shape, mine = tuple(value.shape), self.start(name)
        if mine is not None and mine.shape == shape and _equal(mine, value):
            return
        old = self.shape(name)
        resized = name in self._ends() and len(shape) == len(old) and shape[1:] == old[1:]
        if shape != old and not resized:
            raise AdapterFileError(
                "A tensor does not fit the module that it is a copy of.",
                file=part.file,
                key=key,
                expected=list(old),
                got=list(shape),
                fix="is it the right base model?",
            )
        if not part.weight:
            return
        if part.weight != 1.0 or len(self.parts) > 1:
            raise FuseError(
                "An adapter with modules_to_save, or with an embedding of its own, has whole "
                "tensors, which are not mixed.",
                file=part.file,
                key=name,
                expected="that adapter alone, with weight 1",
                fix="lorasmith merge makes one adapter of several",
            )
        self.replacements[name] = (source, key)

    # -- ends of the model ---------------------------------------------------------------

    def embeddings(self) -> list[str]:
        """The module that is the input embedding, if the class says so."""
        skeleton = self._base.skeleton
        get = getattr(skeleton, "get_input_embeddings", None)
        try:
            found = get() if callable(get) else None
        except (AttributeError, NotImplementedError):
            found = None
        if skeleton is None or found is None:
            return []
        return [n for n, m in skeleton.named_modules() if m is found]

    def _ends(self) -> set[str]:
        """Parameters of the input embedding and the head."""
        ends = {f"{m}.weight" for m in self.embeddings()}
        return ends | {
            f"{h}.{leaf}" for h in self._base.source.heads for leaf in ("weight", "bias")
        }

    def written_directly(self) -> dict[str, tuple[TensorSource, str]]:
        """Those of ``replacements`` that are no adapter's ``modules_to_save``."""
        saved = {
            f"{module}.{leaf}"
            for part in self.parts
            for module, leaves in part.weights.saved_modules.items()
            for leaf in leaves
        }
        return {n: found for n, found in self.replacements.items() if n not in saved}

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the checkpoint's embedding, where it is known."""
        return next((self.shape(f"{m}.weight")[0] for m in self.embeddings()), None)

    def start(self, name: str) -> Stored | None:
        """What the base has for a parameter, be it under the name of one tied to it."""
        for each in (name, *self.owners.get(name, ())):
            key = self._base.key_of(each)
            if key is not None:
                return self._base.stored[key]
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of what the base has for a parameter; a ``ModelError`` if it has nothing."""
        found = self.start(name)
        if found is None:
            raise ModelError("The checkpoint has no such tensor.", file=self._base.folder, key=name)
        return found.shape

    def touches(self, name: str) -> bool:
        """Whether an adapter changes a parameter, biases of its layers apart."""
        module, _, leaf = name.rpartition(".")
        if name in self.replacements:
            return True
        return leaf == "weight" and (module in self.embedded or module in self.layers)


def _equal(stored: Stored, value: Tensor) -> bool:
    """Whether an adapter's copy of a tensor is the base's own, as far as its dtype tells."""
    if stored.dtype is None:
        return False
    first = 0
    for block in stored.blocks():
        mine = value.reshape(stored.shape or (1,))[first : first + block.shape[0]]
        if not torch.equal(block.to(value.dtype), mine):
            return False
        first += block.shape[0]
    return True


def _owners(skeleton: nn.Module | None) -> dict[str, list[str]]:
    """Parameter → all names of what it is one with, of those that have several."""
    found: dict[int, list[str]] = {}
    if skeleton is not None:
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            found.setdefault(id(parameter), []).append(name)
    return {n: names for names in found.values() if len(names) > 1 for n in names}
