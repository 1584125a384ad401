"""GGUF files, tensor by tensor, under the names and in the layout that Transformers gives them.

A GGUF file holds the weights of one model, often quantised in blocks, under llama.cpp's names
and in the layout that llama.cpp computes with. Both are undone here while reading:

* **Names** by ``gguf.TensorNameMap``: ``blk.3.attn_q.weight`` is
  ``model.layers.3.self_attn.q_proj.weight``. An output head that the file does not hold is the
  embedding once more.
* **Rows of q and k in Llama files.** llama.cpp rotates neighbouring rows of a head (2 j,
  2 j + 1), Transformers those that lie half a head apart (j, j + d / 2). Its converter
  therefore reorders the rows of each head from [2, d / 2] to [d / 2, 2] (``LlamaModel.permute``
  of llama.cpp's ``convert_hf_to_gguf.py``, since 2026 in ``conversion/llama.py``), so that

      row i d / 2 + j of Transformers' head  =  row 2 j + i of the file's      (i < 2, j < d / 2).

  Mistral's and SmolLM's files say ``llama``, too. The other architectures in
  :data:`ARCHITECTURES` rotate as Transformers does, and are stored as they are.
* **GPT-2's matrices.** The converter transposes what ``Conv1D`` stores; a file holds
  W [d_out, d_in] like any other.

Values come from ``gguf.quants.dequantize``, a few rows at a time: blocks never span two rows.
A quantised tensor is float32 (what its blocks stand for is exact in it); F32, F16 and BF16
tensors come as they are stored.

Vectors (norms, biases) are small, and apart: :attr:`GgufModel.vectors`. Gemma's and Nemotron's
norms compute with 1 + w; their files hold that sum, and one is taken off again.

Memory: the rows that are asked for, and a block of them in the file's form. ``GGUFReader``
maps the file, and is let go when the table of tensors is read; the tensors themselves are read
with plain reads, since pages of a mapped file count as memory of the process.

Limits: one file (not a split model), little-endian, the architectures listed, and of them what
is a matrix of its own (experts in one stack are left out). Falcon only with one key-value head:
the converter sorts the rows of the others' fused projection, and such files do not say of which
generation they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorasmith.errors import MissingDependencyError, ModelError, first_line
from lorasmith.io.gguf_header import check_header
from lorasmith.io.models import ResolvedModel, load_config, quiet, remote_code

__all__ = ["ARCHITECTURES", "GgufModel", "GgufTensor", "skeleton", "tensor_names"]

#: ``general.architecture`` → whether the rows of q and k are in llama.cpp's order.
ARCHITECTURES: Mapping[str, bool] = {
    "falcon": False,
    "gemma2": False,
    "gemma3": False,
    "gpt2": False,
    "llama": True,
    "nemotron": False,
    "phi3": False,
    "qwen2": False,
    "qwen3": False,
    "stablelm": False,
    "starcoder2": False,
}

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Architectures whose files hold 1 + w of a norm's weight w.
_ONE_MORE = frozenset({"gemma2", "gemma3", "nemotron"})
#: Values that are unpacked at a time.
_BLOCK = 2**18


@dataclass(frozen=True)
class GgufTensor:
    """Where one matrix of the file is, and how it is stored.

    Attributes:
        name: In the file.
        path: Of the file.
        shape: ``(rows, columns)``.
        kind: ggml's name of the storage type: ``Q4_1``, ``F16``, ….
        offset: Of its first byte.
        row_bytes: Bytes of one row.
        heads: Number of equal parts whose rows are in llama.cpp's order, or 0.
        stamp: Size and time of the file when its table was read.
    """

    name: str
    path: Path
    shape: tuple[int, int]
    kind: str
    offset: int
    row_bytes: int
    heads: int = 0
    stamp: tuple[int, int] = (0, 0)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values: their own, or float32 if they are quantised."""
        return _PLAIN.get(self.kind, torch.float32)

    @property
    def quantised(self) -> bool:
        """Whether the file holds blocks and not numbers."""
        return self.kind not in _PLAIN

    def read(self, first: int, target: Tensor) -> None:
        """Fills ``target`` [n, columns] of :attr:`dtype` with rows ``first`` to ``first + n``.

        Raises:
            ModelError: The file has been replaced, ends too early, or holds a type of blocks
                that the package ``gguf`` does not unpack.
        """
        self._check()
        if not self.heads:
            self._rows(first, target)
            return
        size = self.shape[0] // self.heads
        # Row i d / 2 + j of a head is row 2 j + i of the file's.
        order = torch.arange(size).view(size // 2, 2).T.reshape(-1)
        held = torch.empty((size, self.shape[1]), dtype=self.dtype)
        done = 0
        while done < target.shape[0]:
            head, row = divmod(first + done, size)
            count = min(size - row, target.shape[0] - done)
            self._rows(head * size, held)
            torch.index_select(held, 0, order[row : row + count], out=target[done : done + count])
            done += count

    def _rows(self, first: int, target: Tensor) -> None:
        """The same in the file's own order."""
        step = max(1, _BLOCK // max(1, self.shape[1]))
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.offset + first * self.row_bytes)
            if not self.quantised:
                self._fill(stream, memoryview(target.view(-1).view(torch.uint8).numpy().data))
                return
            for part in torch.split(target, step):
                raw = np.empty((part.shape[0], self.row_bytes), dtype=np.uint8)
                self._fill(stream, memoryview(raw.reshape(-1).data))
                part.copy_(torch.from_numpy(self._unpack(raw)))

    def _fill(self, stream: Any, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = stream.readinto(buffer[done:])
            if not count:
                raise ModelError("The file ends too early.", file=self.path, key=self.name)
            done += count

    def _unpack(self, raw: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            return dequantize(raw, GGMLQuantizationType[self.kind])
        except NotImplementedError as error:
            raise ModelError(
                "The file holds blocks of a type that the package gguf does not unpack.",
                got=self.kind,
                fix="convert it to another type, e.g. Q8_0 or F16",
                file=self.path,
                key=self.name,
            ) from error

    def _check(self) -> None:
        if _stamp(self.path) != self.stamp:
            raise ModelError(
                "The checkpoint has been replaced while it was being read.",
                file=self.path,
                fix="run it again",
            )


class GgufModel:
    """A model in a GGUF file: its class without values, and where each matrix is.

    Args:
        resolved: What :func:`lorasmith.io.models.resolve_model` gave for the file.

    Attributes:
        path: The file.
        architecture: ``general.architecture``.
        config: The Transformers configuration that the file's metadata come to.
        skeleton: The model on the meta device.
        tensors: Name in Transformers (``….q_proj.weight``) → the matrix, of those in the file.
        vectors: The same of what has one dimension; a vector [n] is a matrix of one row there.

    Raises:
        ModelError: It cannot be read, is split, or is of an architecture whose layout is not
            known here.
        MissingDependencyError: The package ``gguf``, or Transformers, is not installed.
    """

    def __init__(self, resolved: ResolvedModel) -> None:
        assert resolved.gguf_file is not None
        self.path = Path(resolved.path) / resolved.gguf_file
        self.architecture, found, lines, heads, size = _table(self.path)
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                "The layout of that architecture in GGUF files is not known here.",
                expected=", ".join(ARCHITECTURES),
                got=self.architecture,
                fix="load it with Transformers (gguf_file=…) and pass the model, or its checkpoint",
                file=self.path,
            )
        if self.architecture == "falcon" and heads[1] != 1:
            raise ModelError(
                "Of Falcon, GGUF files with several key-value heads are not read: they do not "
                "say in which order the rows of the fused projection are.",
                got=f"{heads[1]} key-value heads",
                fix="pass the checkpoint that it was converted from",
                file=self.path,
            )
        self.config = load_config(resolved)
        # What Transformers (5.23) does not take over from these files.
        if size and hasattr(self.config, "head_dim"):
            self.config.head_dim = size
        if self.architecture == "gpt2":
            self.config.n_positions = found["position_embd.weight"][0][0]
            self.config.n_inner = found["blk.0.ffn_up.weight"][0][0]
        self.skeleton = skeleton(self.config)
        permuted = dict(zip(("attn_q", "attn_k"), heads, strict=True))
        if not ARCHITECTURES[self.architecture]:
            permuted = {}
        self.tensors: dict[str, GgufTensor] = {}
        self.vectors: dict[str, GgufTensor] = {}
        names = tensor_names(self.architecture, self.skeleton)
        for name, there in names.items():
            if there in lines:
                shape, kind, offset, row = lines[there]
                self.vectors[name] = GgufTensor(
                    there, self.path, shape, kind, offset, row, 0, _stamp(self.path)
                )
            if there not in found:
                continue
            shape, kind, offset, row = found[there]
            parts = permuted.get(there.split(".")[-2], 0)
            if parts and shape[0] % (2 * parts):
                raise ModelError(
                    "The rows of a matrix do not divide into its heads.",
                    expected=f"a multiple of {2 * parts}",
                    got=shape[0],
                    file=self.path,
                    key=there,
                )
            self.tensors[name] = GgufTensor(
                there, self.path, shape, kind, offset, row, parts, _stamp(self.path)
            )

    def vector(self, name: str) -> Tensor:
        """One of :attr:`vectors`, as Transformers has it: [n]."""
        held = self.vectors[name]
        value = torch.empty(held.shape, dtype=held.dtype)
        held.read(0, value)
        more = self.architecture in _ONE_MORE and name.endswith("norm.weight")
        return value[0] - 1 if more else value[0]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


#: Of each matrix its shape, its type, its place and the bytes of a row.
_Entry = tuple[tuple[int, int], str, int, int]


def _table(
    path: Path,
) -> tuple[str, dict[str, _Entry], dict[str, _Entry], tuple[int, int], int | None]:
    """Architecture, matrices, vectors, the numbers of heads of q and of k, and the head size."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingDependencyError(
            "Reading GGUF files needs the package gguf, which is not installed.",
            fix='pip install "lorasmith[gguf]"',
        ) from error
    check_header(path)
    try:
        reader = GGUFReader(path)
        if reader.byte_order != "I":
            raise ModelError("The GGUF file is of another byte order than this machine.", file=path)
        architecture = _field(reader, "general.architecture", "")
        parts = _field(reader, "split.count", 1)
        heads = _field(reader, f"{architecture}.attention.head_count", 0)
        groups = _field(reader, f"{architecture}.attention.head_count_kv", heads)
        size = _field(reader, f"{architecture}.attention.key_length", None)
        found: dict[str, _Entry] = {}
        lines: dict[str, _Entry] = {}
        for one in reader.tensors:
            # ggml gives the fastest dimension first.
            shape = tuple(int(n) for n in reversed(one.shape))
            if len(shape) == 2:
                row = int(one.n_bytes) // max(1, shape[0])
                found[one.name] = (shape, one.tensor_type.name, int(one.data_offset), row)
            elif len(shape) == 1:
                size_of = int(one.n_bytes)
                lines[one.name] = (
                    (1, shape[0]),
                    one.tensor_type.name,
                    int(one.data_offset),
                    size_of,
                )
    except (ValueError, KeyError, IndexError, TypeError, OSError, UnicodeDecodeError) as error:
        raise ModelError(
            "The GGUF file cannot be read.",
            expected="a whole GGUF file, version 2 or 3",
            got=first_line(error),
            fix="download or convert it again",
            file=path,
        ) from error
    if parts not in (0, 1):
        raise ModelError(
            "The model is split over several GGUF files, which are not read.",
            got=f"{parts} files",
            fix="merge them: llama-gguf-split --merge FIRST OUTPUT",
            file=path,
        )
    if not isinstance(heads, int) or not isinstance(groups, int):
        raise ModelError(
            "Models whose layers have different numbers of heads are not read from GGUF files.",
            got=architecture,
            fix="pass the checkpoint that it was converted from",
            file=path,
        )
    return str(architecture), found, lines, (heads, groups), size


def _field(reader: Any, key: str, default: Any) -> Any:
    found = reader.get_field(key)
    return default if found is None else found.contents()


def skeleton(config: Any) -> nn.Module:
    """The model that a configuration describes, without weights."""
    import transformers

    with quiet(), torch.device("meta"):
        make: Any = transformers.AutoModelForCausalLM.from_config
        model: nn.Module = make(config, **remote_code(False))
        tie: Any = model.tie_weights
        tie()
    return model


def tensor_names(architecture: str, model: nn.Module) -> dict[str, str]:
    """Parameter name → name in a GGUF file, of those that llama.cpp has a name for."""
    import gguf

    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    config: Any = model.config
    known = gguf.get_tensor_name_map(kind, config.get_text_config().num_hidden_layers)
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        stem, dot, leaf = name.rpartition(".")
        parts = stem.split(".")
        # Some tables have names without what the class with the head puts before them.
        index = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
        for start in range(max(1, index)):
            there = known.get_name(".".join(parts[start:]))
            if there is not None:
                found[name] = f"{there}{dot}{leaf}"
                break
    return found
