"""LoRA adapters in the form that vLLM, SGLang and Text Generation Inference take.

All three load PEFT directories, and each reads less in them than PEFT does. What they say of
themselves (files read in November 2026):

* **vLLM** (``vllm/lora/peft_helper.py`` at e745baf and later forms of it, ``vllm/lora/utils.py``,
  ``vllm/lora/lora_model.py`` at 0306474, ``vllm/config/lora.py`` at 01230b4): needs ``r``,
  ``lora_alpha``, ``target_modules``; honours ``use_rslora``; refuses ``use_dora``, a ``bias``,
  ``modules_to_save`` (later ones allow a classifier's head), r above ``--max-lora-rank``, which is
  one of 1, 8, 16, 32, 64, 128, 256, 320, 512 and 16 by default; later also ``lora_bias``,
  ``layer_replication``, aLoRA, QALoRA, BD-LoRA, and initialisations that move W (PiSSA, OLoRA,
  CorDA, LoftQ). Most versions do not read ``rank_pattern`` and ``alpha_pattern``: every layer gets
  the scaling of the whole. Names of tensors end in ``lora_A.weight`` or ``lora_B.weight``.
* **SGLang** (``lora_config.py`` at 0ceb81f, ``lora.py``, ``lora_manager.py``, ``mem_pool.py`` in
  ``python/sglang/srt/lora``): scaling is ``lora_alpha / r`` whatever ``use_rslora`` says; DoRA and
  added tokens are refused; r is at most ``--max-lora-rank``; later versions notice patterns.
  q, k and v of a layer are stacked into one, and gate and up (``normalize_qkv_proj``,
  ``normalize_gate_up_proj`` in ``lora.py`` of 2025 and 2026). A missing k or up is taken for
  zeros; a missing v beside a q is a ``KeyError``; without a q, or without a gate, nothing is
  stacked, and what there is stands under names that no buffer has.
* **TGI** (``server/text_generation_server/adapters/lora.py`` at 45d95bd): ``use_rslora`` counts,
  patterns do not; DoRA's magnitudes are left out without a word. So is a kind of layer (all
  ``q_proj``) that is not adapted in *every* layer of the model.

So the same directory serves all: plain LoRA, one rank r (narrower pairs padded with zeros), one
scaling alpha / r (what differs is in B), no rank-stabilised scaling, no patterns, no name of an
initialisation, the targets as a list of names. For TGI, layers that the adapter leaves alone get
factors of zeros; for SGLang q, v and gate do where another of their stack is adapted. See
``lorasmith.export.plain`` for when this is exact.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorasmith.adapters.lora import LoRAConfig
from lorasmith.errors import AdapterFileError, ConfigError
from lorasmith.export.plain import (
    Progress,
    commonest,
    exactly,
    fold,
    pair_rank,
    pairs,
    uniform,
)
from lorasmith.io.weights import AdapterWeights

__all__ = ["SERVERS", "VLLM_RANKS", "Served", "Server", "command", "max_lora_rank", "served"]

#: What vLLM's ``--max-lora-rank`` may be; 1 as well in later versions.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NUMBER = re.compile(r"\.(\d+)(?=\.)")


@dataclass(frozen=True)
class Server:
    """A server and its rules.

    Attributes:
        name: What the user calls it.
        title: What it calls itself.
        ranks: What its limit on ranks may be, or ``()`` for any number.
        whole: Whether a kind of layer must be adapted in all layers or in none.
        stacked: Whether q and v must be there wherever one of q, k, v is, and gate beside up.
    """

    name: str
    title: str
    ranks: tuple[int, ...] = ()
    whole: bool = False
    stacked: bool = False


SERVERS: Mapping[str, Server] = {
    "vllm": Server("vllm", "vLLM", VLLM_RANKS),
    "sglang": Server("sglang", "SGLang", stacked=True),
    "tgi": Server("tgi", "TGI", whole=True),
}


@dataclass(frozen=True)
class Served:
    """An adapter for a server.

    Attributes:
        weights: To be saved.
        rank: r of every layer.
        alpha: Scaling times r.
        padded: Number of layers whose rank was raised.
        folded: Number of layers whose B was multiplied.
        added: Number of layers that got factors of zeros.
        rounding: √(Σ ‖ΔW − ΔW'‖² / Σ ‖ΔW‖²) of the numbers stored.
    """

    weights: AdapterWeights
    rank: int
    alpha: float
    padded: int
    folded: int
    added: int
    rounding: float


def max_lora_rank(server: Server, rank: int) -> int:
    """The smallest limit on ranks that lets an adapter of that rank in.

    Raises:
        ConfigError: The server allows no such rank.
    """
    if not server.ranks:
        return rank
    for allowed in server.ranks:
        if allowed >= rank:
            return allowed
    raise ConfigError(
        f"{server.title} takes no adapter of that rank.",
        expected=f"at most {server.ranks[-1]}",
        got=rank,
        fix=f"truncate it: --rank {server.ranks[-1]} (the error is measured and reported)",
        key="rank",
    )


def served(
    weights: AdapterWeights,
    server: Server,
    *,
    rank: int | None = None,
    dtype: str = "auto",
    layers: int | None = None,
    rows: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Served:
    """A plain LoRA in the form that a server takes.

    Args:
        weights: The adapter, of the variant LoRA.
        server: Which one.
        rank: Of all layers; by default the highest that a layer has.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"auto"``: as it is stored, but
            float32 where B has to be multiplied by something other than powers of two.
        layers: Number of layers of the base model, for servers that want all of a kind.
        rows: d_out of the base model's ``q_proj`` and ``v_proj``, for servers that stack them;
            needed only where the adapter does not tell.
        progress: Called with (phase, done, total).

    Raises:
        ConfigError: The rank or the dtype is not possible.
        AdapterFileError: A value is not finite, or too large for the numbers chosen; or one of a
            stack is missing, and its size is not known.
    """
    if dtype not in (*DTYPES, "auto"):
        raise ConfigError(
            "A safetensors file for a server has no such numbers.",
            expected=", ".join(("auto", *DTYPES)),
            got=dtype,
            key="dtype",
        )
    ranks, scalings = {}, {}
    for name in weights.modules:
        factors = weights.factors[name]
        ranks[name], scalings[name] = pair_rank(factors), factors.scaling
    r = max(ranks.values()) if rank is None else rank
    if r < max(ranks.values()):
        raise ConfigError(
            "A layer has a higher rank than that.",
            expected=f"at least {max(ranks.values())}",
            got=r,
            key="rank",
        )
    max_lora_rank(server, r)
    scaling = commonest(scalings)
    if scaling == 0:
        raise AdapterFileError(
            "The scaling of most layers is 0, so that the adapter does nothing there.",
            file=weights.path,
            key="lora_alpha",
        )
    ratios = {name: s / scaling for name, s in scalings.items()}
    kind = DTYPES.get(dtype) or _kind(weights.dtype, ratios)
    tensors: dict[str, dict[str, Tensor]] = {}
    change = lost = 0.0
    for done, pair in enumerate(pairs(weights), 1):
        made = fold(pair, scaling, r, _stored_as(kind))
        tensors[pair.name] = {"A": made.A, "B": made.B}
        change += made.change**2
        lost += made.lost**2
        if progress is not None:
            progress("writing", done, len(ranks))
    added = _fill(tensors, layers) if server.whole else 0
    if server.stacked:
        added += _complete(tensors, rows or {}, server.title, weights)
    return Served(
        _assemble(weights, uniform(_config(weights), r, scaling), tensors, bool(added)),
        r,
        scaling * r,
        sum(n < r for n in ranks.values()),
        sum(ratio != 1 for ratio in ratios.values()),
        added,
        math.sqrt(lost / change) if change else 0.0,
    )


def _config(weights: AdapterWeights) -> LoRAConfig:
    config = weights.config
    assert isinstance(config, LoRAConfig)
    return config


def _kind(stored: torch.dtype, factors: Mapping[str, float]) -> torch.dtype:
    """The dtype in which what is stored stays exact, as far as there is one that servers read."""
    if all(exactly(f) for f in factors.values()) and stored in DTYPES.values():
        return stored
    return torch.float32


def _stored_as(kind: torch.dtype) -> Callable[[str, Tensor], tuple[Any, Tensor]]:
    def store(letter: str, value: Tensor) -> tuple[Any, Tensor]:  # noqa: ARG001 - both alike
        held = value.to(kind)
        return held, held

    return store


def _fill(tensors: dict[str, dict[str, Tensor]], layers: int | None) -> int:
    """Adds factors of zeros where a kind of layer is missing; how many."""
    kinds: dict[str, dict[int, str]] = {}
    for name in tensors:
        number = _NUMBER.search(name)
        if number is not None:
            kind = f"{name[: number.start(1)]}#{name[number.end(1) :]}"
            kinds.setdefault(kind, {})[int(number[1])] = name
    count = max((n + 1 for found in kinds.values() for n in found), default=0)
    count = max(count, layers or 0)
    added = 0
    for kind, found in kinds.items():
        like = tensors[next(iter(found.values()))]
        for index in range(count):
            if index not in found:
                name = kind.replace("#", str(index))
                tensors[name] = {label: torch.zeros_like(value) for label, value in like.items()}
                added += 1
    return added


#: Of what is stacked: what must be there, and the others.
_STACKS = ((("q_proj", "v_proj"), ("k_proj",)), (("gate_proj",), ("up_proj",)))


def _complete(
    tensors: dict[str, dict[str, Tensor]],
    rows: Mapping[str, int],
    title: str,
    weights: AdapterWeights,
) -> int:
    """Adds factors of zeros where one of a stack is missing; how many."""
    known = dict(rows)
    for name, pair in tensors.items():
        known[name.rpartition(".")[2]] = pair["B"].shape[0]
    # Keys and values have as many heads, and gates as many units.
    for one, other in (("v_proj", "k_proj"), ("gate_proj", "up_proj")):
        if one not in known and other in known:
            known[one] = known[other]
    added = 0
    for name in list(tensors):
        parent, _, leaf = name.rpartition(".")
        for needed, others in _STACKS:
            if leaf not in (*needed, *others):
                continue
            for missing in [n for n in needed if f"{parent}.{n}" not in tensors]:
                if missing not in known:
                    raise AdapterFileError(
                        f"{title} stacks {', '.join((*needed, *others))}, and takes no adapter "
                        f"without {missing}; how large it is, the adapter does not tell.",
                        file=weights.path,
                        key=f"{parent}.{missing}",
                        expected=" and ".join(needed),
                        got=leaf,
                        fix="give the base model (--base), so that it can be filled with zeros",
                    )
                A, B = tensors[name]["A"], tensors[name]["B"]
                tensors[f"{parent}.{missing}"] = {
                    "A": torch.zeros_like(A),
                    "B": B.new_zeros(known[missing], B.shape[1]),
                }
                added += 1
    return added


def _assemble(
    source: AdapterWeights,
    config: LoRAConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    more: bool,
) -> AdapterWeights:
    config = replace(config, targets=tuple(tensors), exclude=(), layers=None, modules_to_save=())
    made = AdapterWeights.from_tensors(config, tensors, like=source)
    # Names, since servers do not read what else may narrow the layers down, or regular expressions.
    given = source.peft.get("target_modules")
    narrowed = any(source.peft.get(k) for k in ("exclude_modules", "layers_to_transform"))
    same = isinstance(given, list) and not narrowed and not more
    made.peft["target_modules"] = given if same else list(tensors)
    made.peft["modules_to_save"] = None
    return made


def command(server: Server, base: str, name: str, path: str, rank: int) -> str:
    """The command that serves the adapter beside its base model.

    Args:
        server: Which one.
        base: Hub id or path of the base model.
        name: Under which requests ask for the adapter.
        path: Its directory.
        rank: Its rank.
    """
    adapter = shlex.quote(f"{name}={path}")
    model = shlex.quote(base)
    limit = max_lora_rank(server, rank)
    return {
        "vllm": f"vllm serve {model} --enable-lora --max-lora-rank {limit} "
        f"--lora-modules {adapter}",
        "sglang": f"python -m sglang.launch_server --model-path {model} --enable-lora "
        f"--max-lora-rank {limit} --lora-paths {adapter}",
        "tgi": f"text-generation-launcher --model-id {model} --lora-adapters {adapter}",
    }[server.name]
