"""Hostile routers, checkpoints of training runs, and base models; see ``corpus``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.reliability.corpus import (
    Hostile,
    Spoil,
    edit_bytes,
    edit_tensors,
    fields,
    header,
    in_turn,
    outside,
    raw,
    write,
)

NAN, INF = float("nan"), float("inf")

# A router ---------------------------------------------------------------------------------------

ROUTER, TENSORS = "router.json", "router.safetensors"


def vouch_router(folder: Path) -> None:
    """Lets the configuration vouch for the tensors as they are."""
    if (folder / ROUTER).is_file() and (folder / TENSORS).is_file():
        digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        fields(ROUTER, sha256=digest)(folder)


def _trusted(spoil: Spoil) -> Spoil:
    return in_turn(spoil, vouch_router)


def _value(name: str, value: float) -> Spoil:
    return _trusted(edit_tensors(lambda t: t[name].view(-1)[:1].fill_(value), TENSORS))


def _report(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / ROUTER).read_text())
        change(values["report"])
        (folder / ROUTER).write_text(json.dumps(values))

    return spoil


ROUTERS: dict[str, Hostile] = {
    "broken": Hostile(edit_bytes(lambda d: d[:-20], ROUTER), file=ROUTER),
    "byte-order mark": Hostile(edit_bytes(lambda d: b"\xef\xbb\xbf" + d, ROUTER), file=ROUTER),
    "a million lists": Hostile(
        edit_bytes(lambda d: b'{"a": [' + b"[]," * 10**6 + b"[]]}", ROUTER), file=ROUTER
    ),
    "links out": Hostile(outside(ROUTER), file=ROUTER, key=ROUTER),
    "nothing": Hostile(edit_bytes(lambda d: b"{}", ROUTER), file=ROUTER, key=""),
    "format of the future": Hostile(fields(ROUTER, format=99), file=ROUTER, key="format"),
    "classes of numbers": Hostile(fields(ROUTER, classes=[1, 2]), file=ROUTER, key="classes"),
    "classes of paths": Hostile(
        fields(ROUTER, classes=["a\0b", "x" * 300]), file=ROUTER, key="classes"
    ),
    "a class twice": Hostile(fields(ROUTER, classes=["one", "one"]), file=ROUTER, key="classes"),
    "a class less": Hostile(fields(ROUTER, classes=["one"]), file=ROUTER, key="classes"),
    "a class more": Hostile(
        fields(ROUTER, classes=["one", "two", "three"]), file=TENSORS, key="bias"
    ),
    "no classes": Hostile(fields(ROUTER, classes=None), file=ROUTER, key="classes"),
    "threshold NaN": Hostile(raw("threshold", "NaN", ROUTER), file=ROUTER, key="threshold"),
    "threshold 7": Hostile(fields(ROUTER, threshold=7), file=ROUTER, key="threshold"),
    "layer 10^9": Hostile(fields(ROUTER, layer=10**9), file=ROUTER, key="layer", by=("load",)),
    "layer of a text": Hostile(fields(ROUTER, layer="os"), file=ROUTER, key="layer"),
    "max_length -1": Hostile(fields(ROUTER, max_length=-1), file=ROUTER, key="max_length"),
    "template of a text": Hostile(fields(ROUTER, template="{{ os }}"), file=ROUTER, key="template"),
    "report of a list": Hostile(fields(ROUTER, report=[1]), file=ROUTER, key="report"),
    "report of texts": Hostile(
        _report(lambda r: r.update(accuracy="all")), file=ROUTER, key="report"
    ),
    "fingerprint of numbers": Hostile(
        fields(ROUTER, base={"structure": 1, "sketch": 3}), file=ROUTER, key="base"
    ),
    "tensors truncated": Hostile(edit_bytes(lambda d: d[:-20], TENSORS), file=TENSORS),
    "tensors truncated, vouched for": Hostile(
        _trusted(edit_bytes(lambda d: d[:-20], TENSORS)), file=TENSORS
    ),
    "flipped bit": Hostile(
        edit_bytes(lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:], TENSORS),
        file=TENSORS,
        key="sha256",
    ),
    "header 0xFF": Hostile(
        _trusted(edit_bytes(lambda d: b"\xff" * 8 + d[8:], TENSORS)), file=TENSORS
    ),
    "tensors link out": Hostile(outside(TENSORS), file=TENSORS, key=TENSORS),
    "weight NaN": Hostile(_value("weight", NAN), file=TENSORS, key="weight"),
    "scale 0": Hostile(_value("scale", 0.0), file=TENSORS, key="scale"),
    "mean infinite": Hostile(_value("mean", INF), file=TENSORS, key="mean"),
    "another width": Hostile(
        _trusted(
            edit_tensors(
                lambda t: t.update(
                    weight=t["weight"][:, :-1], mean=t["mean"][:-1], scale=t["scale"][:-1]
                ),
                TENSORS,
            )
        ),
        file=TENSORS,
        key="mean",
        by=("load",),
    ),
    "whole numbers": Hostile(
        _trusted(edit_tensors(lambda t: t.update(mean=t["mean"].to(torch.int8)), TENSORS)),
        file=TENSORS,
        key="mean",
    ),
    "other tensors": Hostile(
        _trusted(edit_tensors(lambda t: t.update(os=torch.ones(1)), TENSORS)), file=TENSORS
    ),
}

# A checkpoint of a run --------------------------------------------------------------------------

STEP = "checkpoint-2"
RUN, TRAINER, SEAL = "run_state.json", "trainer_state.json", "manifest.json"
OPTIMIZER, SCHEDULER = "optimizer.safetensors", "scheduler.safetensors"
RANDOM, STATE = "rng_state.safetensors", "adapter_state.safetensors"


def seal(folder: Path) -> None:
    """Lets the manifest vouch for all files as they are."""
    listing = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL:
            data = path.read_bytes()
            listing[path.relative_to(folder).as_posix()] = {
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    (folder / SEAL).write_text(json.dumps({"format": 1, "files": listing}))


def within(spoil: Spoil, *, sealed: bool = True) -> Spoil:
    """Spoils the checkpoint of a run."""

    def run(folder: Path) -> None:
        spoil(folder / STEP)
        if sealed:
            seal(folder / STEP)

    return run


def _state(name: str, change: Callable[[Any], object]) -> Spoil:
    """Changes what stands in a state beside its tensors."""

    def run(tensors: dict[str, Tensor]) -> None:
        tree = json.loads(tensors["tree"].numpy().tobytes())
        made = change(tree)
        text = json.dumps(tree if made is None else made).encode()
        tensors["tree"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    return edit_tensors(run, name)


def _one_more(group: dict[str, Any]) -> None:
    dict(group["dict"])["params"].append(7)


def _option(tree: dict[str, Any], key: str, value: Any) -> None:
    """Changes an option of the optimiser's first group."""
    for pair in dict(tree["dict"])["param_groups"][0]["dict"]:
        if pair[0] == key:
            pair[1] = value


def _values_of_first(tree: dict[str, Any]) -> Any:
    """What the optimiser keeps of its first parameter, as pairs."""
    return dict(tree["dict"])["state"]["dict"][0][1]["dict"]


def _moment(change: Callable[[Tensor], Tensor], dimensions: int = 2) -> Spoil:
    """Changes the first moments of the optimiser, or its count of steps."""

    def run(tensors: dict[str, Tensor]) -> None:
        key = next(k for k, v in tensors.items() if v.dim() == dimensions)
        tensors[key] = change(tensors[key])

    return edit_tensors(run, OPTIMIZER)


def _checkpoint(
    spoil: Spoil, file: str, key: str | None = None, *, sealed: bool = True, **options: Any
) -> Hostile:
    return Hostile(
        within(spoil, sealed=sealed),
        file=file if sealed else STEP,
        key=key,
        kind="LorasmithError",
        **options,
    )


def _pickled(name: str) -> Spoil:
    """What ``torch.save`` writes, with code in it."""

    class Code:
        def __reduce__(self) -> Any:
            import os

            return os.system, ("touch PICKLED",)

    return lambda folder: torch.save({"state": Code()}, folder / name)


def _named(name: str) -> Spoil:
    """Lets the manifest name one more file."""

    def spoil(folder: Path) -> None:
        manifest = json.loads((folder / SEAL).read_text())
        manifest["files"][name] = {"size": 0, "sha256": ""}
        (folder / SEAL).write_text(json.dumps(manifest))

    return spoil


CHECKPOINTS: dict[str, Hostile] = {
    "manifest broken": _checkpoint(edit_bytes(lambda d: d[:-9], SEAL), STEP, sealed=False),
    "manifest of a million lists": _checkpoint(
        edit_bytes(lambda d: b'{"a": [' + b"[]," * 10**6 + b"[]]}", SEAL), STEP, sealed=False
    ),
    "manifest names files elsewhere": _checkpoint(_named("../../x"), STEP, sealed=False),
    "manifest of the future": _checkpoint(fields(SEAL, format=99), STEP, sealed=False),
    "manifest names a file of 300 characters": _checkpoint(_named("x" * 300), STEP, sealed=False),
    "optimiser truncated": _checkpoint(edit_bytes(lambda d: d[:-9], OPTIMIZER), STEP, sealed=False),
    "run broken": _checkpoint(edit_bytes(lambda d: d[:-9], RUN), RUN),
    "run of nothing": _checkpoint(edit_bytes(lambda d: b"{}", RUN), RUN, RUN),
    "run with a configuration of a list": _checkpoint(fields(RUN, config=[1]), RUN, RUN),
    "run of NaN tokens": _checkpoint(raw("tokens", "NaN", RUN), RUN, "tokens"),
    "trainer broken": _checkpoint(edit_bytes(lambda d: d[:-9], TRAINER), TRAINER),
    "trainer of the future": _checkpoint(fields(TRAINER, os="system"), TRAINER, "os"),
    "trainer at step 10^9": _checkpoint(fields(TRAINER, global_step=10**9), TRAINER, "global"),
    "trainer at step -1": _checkpoint(fields(TRAINER, global_step=-1), TRAINER, "global"),
    "trainer with callbacks of a number": _checkpoint(
        fields(TRAINER, stateful_callbacks=0.5), TRAINER, "stateful_callbacks"
    ),
    "trainer without a batch size": _checkpoint(
        fields(TRAINER, train_batch_size=None), TRAINER, "train_batch_size"
    ),
    "trainer with the best in a list": _checkpoint(
        fields(TRAINER, best_model_checkpoint=[1]), TRAINER, "best_model_checkpoint"
    ),
    "trainer with a log of numbers": _checkpoint(
        fields(TRAINER, log_history=[1]), TRAINER, "log_history"
    ),
    "optimiser of a pickle": _checkpoint(_pickled(OPTIMIZER), OPTIMIZER, OPTIMIZER),
    "scheduler of a pickle": _checkpoint(_pickled(SCHEDULER), SCHEDULER, SCHEDULER),
    "random numbers of a pickle": _checkpoint(_pickled(RANDOM), RANDOM, RANDOM),
    "pickles beside them": _checkpoint(
        in_turn(
            _pickled("optimizer.pt"),
            _pickled("scheduler.pt"),
            _pickled("rng_state.pth"),
            lambda p: (p / OPTIMIZER).unlink(),
        ),
        STEP,
        sealed=False,
    ),
    "optimiser header 0xFF": _checkpoint(
        edit_bytes(lambda d: b"\xff" * 8 + d[8:], OPTIMIZER), OPTIMIZER, OPTIMIZER
    ),
    "optimiser without a tree": _checkpoint(
        edit_tensors(lambda t: t.pop("tree"), OPTIMIZER), OPTIMIZER, "tree"
    ),
    "optimiser of a function": _checkpoint(
        _state(OPTIMIZER, lambda tree: {"os.system": "ls"}), OPTIMIZER, "tree"
    ),
    "optimiser nested": _checkpoint(
        edit_tensors(
            lambda t: t.update(tree=torch.frombuffer(bytearray(b"[" * 10**5), dtype=torch.uint8)),
            OPTIMIZER,
        ),
        OPTIMIZER,
        "tree",
    ),
    "optimiser of other parameters": _checkpoint(
        _state(OPTIMIZER, lambda tree: _one_more(dict(tree["dict"])["param_groups"][0])),
        OPTIMIZER,
        OPTIMIZER,
    ),
    "optimiser with another switch": _checkpoint(
        _state(OPTIMIZER, lambda tree: _option(tree, "differentiable", True)),
        OPTIMIZER,
        "differentiable",
    ),
    "optimiser with a learning rate of a text": _checkpoint(
        _state(OPTIMIZER, lambda tree: _option(tree, "lr", "os")), OPTIMIZER, "lr"
    ),
    "optimiser without a moment": _checkpoint(
        _state(OPTIMIZER, lambda tree: _values_of_first(tree).pop() and None), OPTIMIZER, "state"
    ),
    # A fused kernel takes the sizes of the parameters, and writes beyond the end.
    "moments of one number": _checkpoint(
        _moment(lambda v: v[:1, :1].clone()), OPTIMIZER, "exp_avg"
    ),
    "optimiser at step -1": _checkpoint(
        _moment(lambda v: v.fill_(-1.0), dimensions=0), OPTIMIZER, "step"
    ),
    "moments NaN": _checkpoint(_moment(lambda v: v * NAN), OPTIMIZER, "exp_avg"),
    "moments of another shape": _checkpoint(_moment(lambda v: v[:1, :2]), OPTIMIZER, "exp_avg"),
    "scheduler of a list": _checkpoint(_state(SCHEDULER, lambda tree: [1]), SCHEDULER, SCHEDULER),
    "scheduler with a field of its optimiser": _checkpoint(
        _state(SCHEDULER, lambda tree: tree["dict"].append(["optimizer", [1]])),
        SCHEDULER,
        "optimizer",
    ),
    "scheduler of texts": _checkpoint(
        _state(SCHEDULER, lambda tree: [p.__setitem__(1, "x") for p in tree["dict"]] and None),
        SCHEDULER,
        "",
    ),
    "optimiser with a text for a moment": _checkpoint(
        _state(OPTIMIZER, lambda tree: _values_of_first(tree)[-1].__setitem__(1, "os")),
        OPTIMIZER,
        "exp_avg",
    ),
    "random numbers below 0": _checkpoint(
        _state(RANDOM, lambda tree: dict(tree["dict"])["numpy"][1].__setitem__(0, -1)),
        RANDOM,
        RANDOM,
    ),
    "random numbers of texts": _checkpoint(
        _state(RANDOM, lambda tree: {"dict": [["python", "x"], ["numpy", "y"], ["cpu", "z"]]}),
        RANDOM,
        RANDOM,
    ),
    "adapter NaN": _checkpoint(
        edit_tensors(lambda t: t[min(t)].view(-1)[:1].fill_(NAN), STATE), STATE, ""
    ),
    "adapter of another shape": _checkpoint(
        edit_tensors(lambda t: t.update({min(t): t[min(t)][:1]}), STATE), STATE
    ),
    "adapter without a tensor": _checkpoint(edit_tensors(lambda t: t.pop(min(t)), STATE), STATE),
    "adapter links out": _checkpoint(outside(STATE), STATE, STATE),
}

# A base model -----------------------------------------------------------------------------------

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
#: A layer that the adapter is on.
Q0 = "model.layers.0.self_attn.q_proj.weight"


def _header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        entries, payload = header(folder / WEIGHTS)
        change(entries)
        write(folder / WEIGHTS, entries, payload)

    return spoil


def _index(values: Mapping[str, Any]) -> Spoil:
    return lambda folder: (folder / INDEX).write_text(json.dumps(values))


def _base(spoil: Spoil, file: str = WEIGHTS, key: str | None = None, **options: Any) -> Hostile:
    return Hostile(spoil, file=file, key=key, kind="LorasmithError", **options)


def _other_tensors(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    tensors["x"] = torch.ones(2)


BASES: dict[str, Hostile] = {
    "configuration broken": _base(edit_bytes(lambda d: d[:-9], CONFIG), CONFIG),
    "configuration with a mark": _base(edit_bytes(lambda d: b"\xef\xbb\xbf" + d, CONFIG), CONFIG),
    "configuration of a million lists": _base(
        edit_bytes(lambda d: b'{"a": [' + b"[]," * 10**6 + b"[]]}", CONFIG), CONFIG
    ),
    "a billion layers": _base(fields(CONFIG, num_hidden_layers=10**9), "", "num_hidden_layers"),
    "a billion layers of a class that lists them": _base(
        fields(CONFIG, model_type="qwen2", num_hidden_layers=10**9), CONFIG, "num_hidden_layers"
    ),
    "a billion layers inside": _base(
        fields(CONFIG, text_config={"num_hidden_layers": 10**9}), CONFIG, "num_hidden_layers"
    ),
    "a billion heads": _base(
        fields(CONFIG, num_key_value_heads=10**9), CONFIG, "num_key_value_heads"
    ),
    "a billion labels": _base(fields(CONFIG, num_labels=10**9), CONFIG, "num_labels"),
    "a class that is no model": _base(fields(CONFIG, architectures=["Seq2SeqTrainer"]), "", by=()),
    "layers of a text": _base(fields(CONFIG, num_hidden_layers="os"), "", by=()),
    "truncated": _base(edit_bytes(lambda d: d[: len(d) // 2], WEIGHTS)),
    "empty": _base(edit_bytes(lambda d: b"", WEIGHTS)),
    "header length 0xFF": _base(edit_bytes(lambda d: b"\xff" * 8 + d[8:], WEIGHTS)),
    "shape 2^40 x 2^40": _base(_header(lambda f: f[Q0].update(shape=[2**40, 2**40]))),
    "overlapping offsets": _base(
        _header(lambda f: f[Q0].update(data_offsets=f["model.norm.weight"]["data_offsets"]))
    ),
    "trailing bytes": _base(edit_bytes(lambda d: d + bytes(16), WEIGHTS)),
    "pickle": _base(
        in_turn(
            lambda p: torch.save({"x": torch.ones(1)}, p / "pytorch_model.bin"),
            lambda p: (p / WEIGHTS).unlink(),
        ),
        "a",
    ),
    "weights link out": _base(outside(WEIGHTS), WEIGHTS, WEIGHTS),
    "configuration links out": _base(outside(CONFIG), CONFIG, CONFIG),
    "tokenizer links out": _base(
        in_turn(lambda p: (p / "tokenizer.json").write_text("{}"), outside("tokenizer.json")),
        "tokenizer.json",
        "tokenizer.json",
        by=("fuse",),
    ),
    "index broken": _base(lambda p: (p / INDEX).write_text("{"), INDEX),
    "index of numbers": _base(_index({"weight_map": {Q0: 1}}), INDEX, "weight_map"),
    "index names files outside": _base(
        _index({"weight_map": {Q0: "../../x.safetensors"}}), INDEX, "weight_map"
    ),
    "index names a file of 300 characters": _base(
        _index({"weight_map": {Q0: "x" * 300}}), INDEX, "weight_map"
    ),
    "index without its shard": _base(
        _index({"weight_map": {Q0: "model-00001-of-00002.safetensors"}}), "a", got=False
    ),
    "a layer NaN": _base(
        edit_tensors(lambda t: t[Q0].view(-1)[:1].fill_(NAN), WEIGHTS),
        WEIGHTS,
        "q_proj",
        by=("fuse",),
    ),
    "a head of half its rows": _base(
        edit_tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:24]}), WEIGHTS),
        "",
        "lm_head",
        by=("fuse",),
    ),
    "a norm NaN, which no adapter is on": _base(
        edit_tensors(lambda t: t["model.norm.weight"].view(-1)[:1].fill_(NAN), WEIGHTS),
        WEIGHTS,
        "norm",
        by=("fuse",),
    ),
    "a layer of another shape": _base(
        edit_tensors(lambda t: t.update({Q0: t[Q0][:1]}), WEIGHTS), "", "q_proj"
    ),
    "a layer missing": _base(edit_tensors(lambda t: t.pop(Q0), WEIGHTS), "", "q_proj"),
    "a layer of whole numbers": _base(
        edit_tensors(lambda t: t.update({Q0: t[Q0].to(torch.int8)}), WEIGHTS), "", "q_proj"
    ),
    "other tensors alone": _base(edit_tensors(_other_tensors, WEIGHTS), ""),
}
