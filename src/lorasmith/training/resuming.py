"""What an interrupted run had come to, and whether this one can go on from it.

A run goes on only as the run that it was. The checkpoint says with which options it began, on
which rows (by a digest of their tokens) and on which base and tokenizer; each is compared, and
another one is refused unless ``changed`` is ``"accept"``. The adapter's options and the dynamics
cannot change at all. Options without influence on what is learned may.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.errors import BaseMismatchError, TrainingError
from lorasmith.io.files import check_base, read_adapter
from lorasmith.io.strict import read_object
from lorasmith.io.tokenizers import check_tokenizer
from lorasmith.redaction import redact_all
from lorasmith.training import checkpoints
from lorasmith.training.checkpoints import RUN_STATE
from lorasmith.training.config import TrainConfig
from lorasmith.training.data import TASK
from lorasmith.training.states import of_this_run

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Before", "rows_digest"]

logger = logging.getLogger(__name__)


class Before:
    """What an interrupted run had come to, and whether this one can go on from it."""

    #: Options without influence on what is learned, or that may well change on a resume.
    _FREE = frozenset(
        {"output", "resume", "overwrite", "save_steps", "save_total_limit", "log_steps"}
        | {"report_to", "run_name", "device", "eval_batch_size", "trust_remote_code"}
        | {"subspace_task", "subspace_save", "subspace_in_place", "changed"}
    )

    #: Options that say where to find what is compared by itself, the rows or the base.
    _JUDGED = frozenset({"model", "revision", "data", "split", "limit"})

    def __init__(self, config: TrainConfig, checkpoint: Path | None) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.eval_seconds = 0.0
        self.best: tuple[int, float] | None = None
        self.evaluations_since_best = 0
        self._rows: str | None = None
        self._checkpoint: Path | None = None
        self._accept = config.changed == "accept"
        if checkpoint is None:
            return
        self._checkpoint = checkpoint
        state = read_object(checkpoint / RUN_STATE, root=checkpoint)
        with of_this_run(checkpoint / RUN_STATE):
            self.tokens = int(state["tokens"])
            self.seconds = float(state["seconds"])
            self.eval_seconds = float(state["eval_seconds"])
            if state["best"] is not None:
                self.best = (int(state["best"][0]), float(state["best"][1]))
            self.evaluations_since_best = int(state["evaluations_since_best"])
            self._rows = str(state["rows"])
            # Written without secrets.
            self._compare(state["config"], redact_all(config.to_dict()))
        checkpoints.check_states(checkpoint)

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        if old["adapter"] != new["adapter"]:
            raise TrainingError(
                "The checkpoint is of another adapter than the one asked for.",
                expected=old["adapter"],
                got=new["adapter"],
                fix="give the same adapter options, or start anew with --overwrite",
                file=self._checkpoint,
            )
        for key in ("dynamics", "dynamics_options"):
            if (old.get(key) or None) != (new[key] or None):
                raise TrainingError(
                    "The checkpoint is of a run with other dynamics than those asked for.",
                    expected=old.get(key) or "none",
                    got=new[key] or "none",
                    fix="give the same dynamics, or start anew with --overwrite",
                    file=self._checkpoint,
                    key=key,
                )
        changed = [
            key
            for key in new
            if key not in self._FREE and key != "adapter" and key in old and old[key] != new[key]
        ]
        names = [key for key in changed if key not in self._JUDGED]
        if names and not self._accept:
            raise TrainingError(
                "The run began with other options than those given now.",
                expected=", ".join(f"{name} {old[name]!r}" for name in names),
                got=", ".join(f"{name} {new[name]!r}" for name in names),
                fix="give the same options, go on with these by --changed accept, or start anew "
                "with --overwrite",
                file=self._checkpoint,
                key=names[0],
            )
        if changed:
            logger.warning(
                "The run goes on with other options than it began with: %s.",
                ", ".join(f"{key} {old[key]!r} → {new[key]!r}" for key in changed),
            )

    def check_rows(self, rows: Dataset) -> None:
        """Raises a TrainingError unless the rows are those of the checkpoint, or may be others."""
        if self._rows is None or self._rows == rows_digest(rows):
            return
        if self._accept:
            logger.warning("The run goes on with other rows than it began with.")
            return
        count, _, digest = self._rows.partition(":")
        raise TrainingError(
            "The rows are not those with which the run began.",
            expected=f"{count} rows, SHA-256 {digest[:12]}…",
            got="{} rows, SHA-256 {:.12}…".format(*rows_digest(rows).split(":")),
            fix="give the same data, go on with these by --changed accept, or start anew with "
            "--overwrite",
            file=self._checkpoint,
            key="data",
        )

    def check_base(self, model: Any, tokenizer: Any) -> None:
        """Raises a TrainingError if base or tokenizer are not those of the checkpoint."""
        if self._checkpoint is None:
            return
        weights = read_adapter(self._checkpoint)
        try:
            check_base(model, weights, self._accept)
            check_tokenizer(
                weights.base.tokenizer, tokenizer, allow=self._accept, file=self._checkpoint
            )
        except BaseMismatchError as error:
            raise TrainingError(
                f"The checkpoint cannot be gone on from here: {error.what[0].lower()}"
                f"{error.what[1:]}",
                expected=error.expected,
                got=error.got,
                fix="give the same model, go on with this one by --changed accept, or start anew "
                "with --overwrite",
                file=self._checkpoint,
                key=error.key or "model",
            ) from error


def rows_digest(rows: Dataset) -> str:
    """Number of rows and a digest of their tokens, to tell whether two runs see the same."""
    digest = hashlib.sha256()
    columns = ["input_ids", "labels", *([TASK] if TASK in rows.column_names else [])]
    for batch in rows.select_columns(columns).iter(batch_size=1000):
        digest.update(repr(tuple(batch[column] for column in columns)).encode())
    return f"{len(rows)}:{digest.hexdigest()}"
