"""Options of the commands that run a base model, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from lorasmith.training.config import Quantization

__all__ = ["BaseModel", "BaseModelOptions"]

_GROUP = Group("Model options", sort_key=50)


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """How to load the base model, and which adapter to put on it."""

    adapter: Annotated[str | None, Parameter(alias="-a", group=_GROUP)] = None
    """Adapter to use: a directory or a hub id."""

    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Parameter(group=_GROUP)] = (
        "auto"
    )
    """dtype of the base model."""

    quantize: Annotated[Quantization | None, Parameter(group=_GROUP)] = None
    """Quantise the base model while loading it: nf4, fp4 or int8 (bitsandbytes), int4 or
    int8-torchao (torchao)."""

    dequantize: Annotated[bool, Parameter(group=_GROUP)] = False
    """Let an adapter that must read the base's weights dequantise them, layer by layer."""

    device: Annotated[str, Parameter(group=_GROUP)] = "auto"
    """auto, cpu, cuda or mps."""

    revision: Annotated[str | None, Parameter(group=_GROUP)] = None
    """Branch, tag or commit of MODEL on the hub."""

    trust_remote_code: Annotated[bool, Parameter(group=_GROUP)] = False
    """Let code that comes with MODEL run."""

    allow_base_mismatch: Annotated[bool, Parameter(group=_GROUP)] = False
    """Use the adapter even if it was made for other base weights."""

    allow_tokenizer_mismatch: Annotated[bool, Parameter(group=_GROUP)] = False
    """Use the adapter even if it was trained with another tokenizer."""

    def load(self, model: str) -> tuple[Any, Any]:
        """The base model, with the adapter on it if there is one, and its tokenizer."""
        from lorasmith.training.models import load_model

        base, tokenizer = load_model(
            model,
            dtype=self.dtype,
            device=self.device,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            quantize=self.quantize,
        )
        if self.adapter is not None:
            import lorasmith as ls
            from lorasmith.io.hub import locate
            from lorasmith.io.tokenizers import check_tokenizer

            folder = locate(self.adapter)  # once: the hub may have another by the second time
            check_tokenizer(
                ls.read_adapter(folder).base.tokenizer,
                tokenizer,
                allow=self.allow_tokenizer_mismatch,
                file=self.adapter,
                fix="use the tokenizer that it was trained with, or give "
                "--allow-tokenizer-mismatch",
            )
            ls.load(
                base,
                folder,
                dequantize=self.dequantize,
                allow_base_mismatch=self.allow_base_mismatch,
            )
        return base, tokenizer


#: The annotation with which a command takes them.
BaseModelOptions = Annotated[BaseModel, Parameter(name="*")]
