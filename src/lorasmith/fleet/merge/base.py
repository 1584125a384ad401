"""What merging must know of the base model: W of single layers, and whole modules.

Read tensor by tensor; of a checkpoint nothing is loaded that is not asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor, nn

from lorasmith.errors import AdapterFileError, ConfigError
from lorasmith.fleet.members import Member

__all__ = ["BaseModelWeights", "Model"]

#: The base model: in memory, or a checkpoint directory, alias or hub id.
Model: TypeAlias = "nn.Module | str | os.PathLike[str]"


class BaseModelWeights:
    """The base model under a merge.

    Args:
        model: The model.
        members: The adapters, all of which must have been made for it.
        modules: Names of the layers that they adapt.
        allow_base_mismatch: Whether they may have been made for another one.

    Raises:
        BaseMismatchError: They were made for another model.
        ModelError: There is no such model.
    """

    def __init__(
        self,
        model: Model,
        members: Sequence[Member],
        modules: Sequence[str],
        allow_base_mismatch: bool,
    ) -> None:
        from lorasmith.io.sources import align, open_sides

        before, _ = open_sides(model, members[0].weights, allow_base_mismatch=allow_base_mismatch)
        self._source = before.weights
        for member in members[1:]:
            self._source.check_adapter(member.weights, allow_base_mismatch)
        self._names = align(modules, list(self._source.layers))
        self._root: nn.Module | None = getattr(self._source, "root", None)

    def weight(self, module: str) -> Tensor:
        """W [d_out, d_in] of a layer, in the dtype of its storage."""
        if module not in self._names:
            raise AdapterFileError(
                "An adapter has tensors for a layer that the base model does not have.",
                key=module,
                got=self._source.label,
                fix="pass the model that it was made for",
            )
        weight = self._source.layers[self._names[module]].read()
        if weight.is_meta:
            raise ConfigError(
                "The base model has no values (it is on the meta device).", key=module
            )
        return weight

    def tensor(self, module: str, leaf: str) -> Tensor:
        """One tensor of a module that adapters replace as a whole (``modules_to_save``)."""
        if self._root is not None:
            try:
                found = self._root.get_submodule(module).state_dict().get(leaf)
            except AttributeError:
                found = None
            if isinstance(found, Tensor) and not found.is_meta:
                return found
        elif leaf == "weight" and module in self._source.layers:
            matrix = self._source.layers[module]
            return matrix.read().T if matrix.transposed else matrix.read()
        raise ConfigError(
            "The base model does not tell a tensor of modules_to_save.",
            expected="the model that the adapters were made for, loaded (an nn.Module)",
            got=self._source.label,
            key=f"{module}.{leaf}",
        )
