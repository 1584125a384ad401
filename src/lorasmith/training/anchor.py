"""The stress controller's anchor as rows of data: what ``lorasmith train`` must not forget.

A controller takes a function that gives a loss. Here it is the mean loss over all supervised
tokens of some rows, which a run names as it names its training data:

    --dynamics stress --dynamics-options.stress.anchor DATA

    dynamics: {stress: {anchor: DATA}}
    dynamics: {stress: {anchor: {data: DATA, split: test, rows: 64}}}

Every process computes the same rows, so they should be few.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.errors import ConfigError
from lorasmith.training.collate import Collator
from lorasmith.training.data import load_rows, tokenise
from lorasmith.training.evaluate import length_batches
from lorasmith.training.loss import model_loss_output

__all__ = ["ROWS", "RowsAnchor", "load_anchors", "with_anchor"]

logger = logging.getLogger(__name__)

#: Rows unless the run says otherwise.
ROWS = 32
_KEY = "dynamics_options.stress.anchor"


class RowsAnchor:
    """Mean loss a supervised token over rows; to be loaded before it is called.

    Args:
        data: The rows, in the forms that training data has.
        split: Their split, where the data have several.
        rows: At most so many are used, a random choice if there are more (that of ``limit``).

    Raises:
        ConfigError: A value cannot be used.
    """

    def __init__(self, data: str, *, split: str = "train", rows: int = ROWS) -> None:
        given: tuple[Any, ...] = (data, split, rows)  # a file may say anything
        kinds = tuple(type(value) for value in given)
        if kinds != (str, str, int) or not data or rows < 1:
            raise ConfigError(
                "That is not an anchor.",
                expected="DATA, or {data: DATA, split: SPLIT, rows: whole number of at least 1}",
                got=repr({"data": data, "split": split, "rows": rows}),
                key=_KEY,
            )
        self.data, self.split, self.rows = data, split, rows
        self._model: nn.Module | None = None
        self._batches: list[dict[str, Tensor]] = []

    def load(
        self,
        model: nn.Module,
        tokenizer: Any,
        collate: Collator,
        *,
        batch_size: int,
        max_length: int,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        """Reads the rows, and makes batches of them.

        Args:
            model: The model whose loss it is, with the adapter.
            tokenizer: Its tokenizer.
            collate: Makes a batch of tokenised rows.
            batch_size: Rows a batch.
            max_length: Tokens at which rows are cut.
            device: Where the batches are kept.
            seed: For reading, as for training data.

        Raises:
            DataError: The rows cannot be read.
        """
        read = load_rows(self.data, split=self.split, limit=self.rows, seed=seed)
        found = tokenise(read, tokenizer, max_length=max_length)
        places = length_batches(list(found["length"]), batch_size)
        batches = [collate([found[i] for i in batch]) for batch in places]
        self._batches = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
        self._model = model
        logger.info("What must not be forgotten: %d rows of %s.", len(found), self.data)

    def __call__(self) -> Tensor:
        """The loss now in nats a token, 0-dimensional, in the mode the model is in."""
        if self._model is None:
            raise ConfigError(
                "The rows of the anchor have not been loaded.",
                expected="RowsAnchor.load(…) before training, as lorasmith train does",
                got=f"an anchor of {self.data}",
                key=_KEY,
            )
        total, tokens = torch.zeros((), dtype=torch.float64), 0.0
        with torch.no_grad():
            for batch in self._batches:
                output = model_loss_output(self._model, batch)
                total += float(output.loss) * float(output.count)
                tokens += float(output.count)
        return total / tokens


def with_anchor(
    options: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, dict[str, Any]] | None:
    """Options of dynamics, with the stress controller's anchor made of what names its rows.

    Args:
        options: Rule → option → value, as a configuration file has them.

    Raises:
        ConfigError: The anchor is not said as it must be.
    """
    if options is None:
        return None
    made = {rule: dict(values) for rule, values in options.items()}
    given = made.get("stress", {}).get("anchor")
    if given is None:
        return made
    if isinstance(given, str):
        given = {"data": given}
    known = ("data", "split", "rows")
    if not isinstance(given, Mapping) or "data" not in given or set(given) - set(known):
        raise ConfigError(
            "That is not an anchor.",
            expected="DATA, or {data: DATA, split: SPLIT, rows: N}",
            got=repr(given),
            key=_KEY,
        )
    made["stress"]["anchor"] = RowsAnchor(**given)
    return made


def load_anchors(rules: Sequence[Any], model: nn.Module, tokenizer: Any, **settings: Any) -> None:
    """Loads the anchors of rules that have one of rows; see :meth:`RowsAnchor.load`."""
    for rule in rules:
        anchor = getattr(rule, "anchor", None)
        if isinstance(anchor, RowsAnchor):
            anchor.load(model, tokenizer, **settings)
