"""What is trained, on the base model: chosen, attached inside a fleet's basis, taken off again.

Attaching an adapter itself is :func:`lorasmith.attach`, as for any user; here is what a run adds:
the options of a subspace, the weights from before a quantisation, and what puts a model that
belongs to the caller back as it was.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lorasmith.core.adapter import attached
from lorasmith.core.attach import detach
from lorasmith.core.registry import variant_of
from lorasmith.errors import ConfigError, LorasmithError
from lorasmith.training.config import TrainConfig
from lorasmith.training.models import load_model, resolve_model

if TYPE_CHECKING:
    from lorasmith.core.config import AdapterConfig
    from lorasmith.fleet.trainable import SubspaceTrainer

__all__ = [
    "GradientCheckpointing",
    "attach_in_subspace",
    "choose_adapter_config",
    "detach_new",
    "original_weights",
    "restored",
]

logger = logging.getLogger(__name__)


def choose_adapter_config(config: TrainConfig) -> AdapterConfig:
    """What is trained, of a subspace as far as it is known without the fleet."""
    if config.subspace is None:
        return config.adapter.to_config()
    from lorasmith.adapters.subspace import SubspaceConfig
    from lorasmith.fleet.store import is_subspace

    for path, there in ((config.subspace, True), (config.subspace_save, False)):
        if path is not None and not is_subspace(path) and (there or path.exists()):
            raise ConfigError(
                "That is not the directory of a fleet.",
                expected="what lorasmith fleet compress writes" + ("" if there else ", or nothing"),
                got="another directory or file" if path.exists() else "nothing there",
                fix="check the path",
                file=path,
                key="subspace" if there else "subspace_save",
            )
    return SubspaceConfig(init="fleet")


def attach_in_subspace(config: TrainConfig, model: Any) -> SubspaceTrainer:
    """Attaches what is trained inside a fleet's basis."""
    from lorasmith.fleet.trainable import SubspaceTrainer

    assert config.subspace is not None
    options = config.adapter
    made = SubspaceTrainer(
        model,
        config.subspace,
        config.subspace_task or config.output.resolve().name,
        form=config.subspace_form,
        extra=config.subspace_extra,
        modules=options.targets,
        exclude=options.exclude or (),
        layers=options.layers,
        modules_to_save=options.modules_to_save or (),
        dropout=options.dropout or 0.0,
    )
    count = made.parameter_count()
    logger.info(
        "Training %s numbers on %d layers; LoRA of rank %d would train %s.",
        f"{count.trained:,}",
        count.layers,
        count.lora_rank,
        f"{count.lora:,}",
    )
    return made


def original_weights(config: TrainConfig, adapter: AdapterConfig) -> Any:
    """The weights before ``--quantize``, for an adapter that corrects what it has lost."""
    if config.quantize is None or not variant_of(adapter).corrects(adapter):
        return None
    resolved = resolve_model(config.model, revision=config.revision)
    if any(Path(resolved.path).glob("model*.safetensors*")):
        return resolved.path  # read one tensor at a time
    model, _ = load_model(
        config.model,
        dtype=config.dtype,
        device="cpu",
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    return model


def detach_new(model: nn.Module, there: frozenset[str]) -> None:
    """Takes off every adapter that was not there before."""
    for name in [name for name in attached(model) if name not in there]:
        # The error that is under way says more than a second one would.
        with contextlib.suppress(LorasmithError):
            detach(model, name)


@contextlib.contextmanager
def restored(model: Any) -> Iterator[None]:
    """Trainer switches the cache off and training mode on; this puts both back."""
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    training = model.training
    try:
        yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache  # type: ignore[union-attr]
        model.train(training)


class GradientCheckpointing:
    """Recomputation of activations for the time of a run."""

    def __init__(self, model: Any, wanted: bool) -> None:
        self.model, self.wanted = model, wanted

    def __enter__(self) -> None:
        if not self.wanted:
            return
        # The reentrant form needs inputs with gradients, which a frozen base does not have.
        settings = {"use_reentrant": False}
        if hasattr(self.model, "activation_checkpointing_enable"):
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    def __exit__(self, *_: object) -> None:
        if not self.wanted:
            return
        if hasattr(self.model, "activation_checkpointing_disable"):
            self.model.activation_checkpointing_disable()
        else:
            self.model.gradient_checkpointing_disable()
