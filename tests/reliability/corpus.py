"""Hostile artefacts: how each is made of a healthy one, and what must be said of it.

The catalogue of the reliability work: files, configurations, weights and ids. Each entry spoils a
healthy artefact in place, and names the class of the refusal, the file and the key that it must
name, and the readers that must refuse it. The other readers may use what is left (a wrong base
cannot be seen without a model), but must not fail in any other way.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "lorasmith.json"
PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
Spoil = Callable[[Path], object]


def in_turn(*spoils: Spoil) -> Spoil:
    """One after the other."""

    def run(folder: Path) -> None:
        for spoil in spoils:
            spoil(folder)

    return run


#: Exponential in the length of the name, for ``regex`` too.
SLOW = r"((\w|\.)+)+((\w|\.)|\w|\.)*$(?<=!)"

#: Readers of an adapter. Those of :data:`BLIND` see neither a model nor a value.
READERS = ("read", "load", "fleet", "info", "merge", "compress", "diagnose")
BLIND = ("info",)
_VALUES = tuple(r for r in READERS if r not in BLIND)


@dataclass(frozen=True)
class Hostile:
    """One hostile artefact.

    Attributes:
        spoil: Makes it, in place, of a healthy directory.
        file: Last part of the path that the refusal names.
        key: Text that its key holds; ``None`` where there is none to name.
        by: Readers that must refuse it.
        kind: Class of the refusal.
        got: Whether it says what was expected and got.
        ours: Whether a directory with our own record is spoilt the same way, the record made to
            vouch for the files as they are.
    """

    spoil: Spoil
    file: str = WEIGHTS
    key: str | None = None
    by: tuple[str, ...] = READERS
    kind: str = "AdapterFileError"
    got: bool = True
    ours: bool = True


# Ways to spoil ----------------------------------------------------------------------------------


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its payload."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, fields: Mapping[str, Any], payload: bytes) -> None:
    """Writes a safetensors file of any header, true or not."""
    text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def edit_header(change: Callable[[dict[str, Any], bytes], bytes | None]) -> Spoil:
    """Spoils the header (and, where ``change`` returns one, the payload) of the weights."""

    def spoil(folder: Path) -> None:
        fields, payload = header(folder / WEIGHTS)
        other = change(fields, payload)
        write(folder / WEIGHTS, fields, payload if other is None else other)

    return spoil


def edit_bytes(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Spoil:
    """Spoils the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit_tensors(change: Callable[[dict[str, Tensor]], object], name: str = WEIGHTS) -> Spoil:
    """Spoils the tensors of a file, which stays a proper one."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        values = load_file(folder / name)
        change(values)
        save_file({k: v.contiguous() for k, v in values.items()}, folder / name)

    return spoil


def fields(name: str = CONFIG, **changes: Any) -> Spoil:
    """Changes fields of a JSON file."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        values.update(changes)
        (folder / name).write_text(json.dumps(values))

    return spoil


def raw(key: str, text: str, name: str = CONFIG) -> Spoil:
    """Writes a value that ``json`` would not write."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        values[key] = "\0"
        (folder / name).write_text(json.dumps(values).replace('"\\u0000"', text))

    return spoil


def outside(name: str) -> Spoil:
    """A link to the same content in another directory."""

    def spoil(folder: Path) -> None:
        away = folder.parent / f"away-from-{folder.name}-{name}"
        (folder / name).rename(away)
        (folder / name).symlink_to(away)

    return spoil


def _first(tensors: dict[str, Tensor], part: str) -> str:
    return min(k for k in tensors if part in k)


def _set(value: float, part: str = "lora_A") -> Spoil:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[_first(tensors, part)].view(-1)[3] = value

    return edit_tensors(change)


def _wider(tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if "lora_A" in key:
            tensors[key] = torch.cat((value, value), 1)


def _half(tensors: dict[str, Tensor]) -> None:
    for key in sorted(tensors)[1::2]:
        del tensors[key]


def _renamed(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[f"nowhere.{key}"] = tensors.pop(key)


def _two_to_40(fields: dict[str, Any], payload: bytes) -> None:
    fields[f"{Q0}.lora_A.weight"]["shape"] = [2**40, 2**40]


def _wide(fields: dict[str, Any], payload: bytes) -> None:
    fields[f"{Q0}.lora_A.weight"]["shape"] = [2**20, 2**20]


def _nothing(fields: dict[str, Any], payload: bytes) -> bytes:
    at = fields[f"{Q0}.lora_A.weight"]["data_offsets"]
    fields[f"{Q0}.lora_A.weight"] = {
        "dtype": "F32",
        "shape": [2**40, 0],
        "data_offsets": [at[0]] * 2,
    }
    gap = at[1] - at[0]
    for entry in fields.values():
        if entry.get("data_offsets", [0])[0] >= at[1]:
            entry["data_offsets"] = [n - gap for n in entry["data_offsets"]]
    return payload[: at[0]] + payload[at[1] :]


def _overlap(fields: dict[str, Any], payload: bytes) -> None:
    first, second = sorted(k for k in fields if k[:2] != "__")[:2]
    fields[second]["data_offsets"] = fields[first]["data_offsets"]
    fields[second]["shape"] = fields[first]["shape"]


def _many(fields: dict[str, Any], payload: bytes) -> bytes:
    for number in range(150_000):
        place = len(payload)
        fields[f"t{number}"] = {"dtype": "F32", "shape": [0], "data_offsets": [place, place]}
    return payload


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"x": torch.ones(1)}, folder / "adapter_model.bin")


#: A pickle that makes a file where it is read.
_CODE = b"cos\nsystem\n(S'touch PICKLED'\ntR."

FILES: dict[str, Hostile] = {
    "truncated": Hostile(edit_bytes(lambda d: d[: len(d) * 7 // 10])),
    "truncated in the header": Hostile(edit_bytes(lambda d: d[:40])),
    "empty": Hostile(edit_bytes(lambda d: b"")),
    "four bytes": Hostile(edit_bytes(lambda d: d[:4])),
    "header length 0xFF": Hostile(edit_bytes(lambda d: b"\xff" * 8 + d[8:])),
    "header length of the file": Hostile(
        edit_bytes(lambda d: len(d).to_bytes(8, "little") + d[8:])
    ),
    "header of zeros": Hostile(edit_bytes(lambda d: d[:8] + bytes(len(d) - 8))),
    "header of 150,000 tensors": Hostile(edit_header(_many)),
    "shape 2^40 x 2^40": Hostile(edit_header(_two_to_40)),
    "shape 2^20 x 2^20": Hostile(edit_header(_wide)),
    "shape 2^40 x 0": Hostile(edit_header(_nothing), key=Q0.removeprefix(PREFIX)),
    "overlapping offsets": Hostile(edit_header(_overlap)),
    "negative offset": Hostile(
        edit_header(lambda f, p: f[f"{Q0}.lora_A.weight"].update(data_offsets=[-8, 64]))
    ),
    "trailing bytes": Hostile(edit_bytes(lambda d: d + bytes(16))),
    "pickle": Hostile(_pickle, file="a", key=None, ours=False),
    "pickle by another name": Hostile(edit_bytes(lambda d: _CODE)),
    "weights link out": Hostile(outside(WEIGHTS), key=WEIGHTS, ours=False),
    "configuration links out": Hostile(outside(CONFIG), file=CONFIG, key=CONFIG, ours=False),
    "weights are a pipe": Hostile(
        in_turn(lambda p: (p / WEIGHTS).unlink(), lambda p: os.mkfifo(p / WEIGHTS)),
        file="a",
        got=False,
        ours=False,
    ),
}

CONFIGS: dict[str, Hostile] = {
    "broken JSON": Hostile(edit_bytes(lambda d: d[: len(d) // 2], CONFIG), file=CONFIG),
    "byte-order mark": Hostile(edit_bytes(lambda d: b"\xef\xbb\xbf" + d, CONFIG), file=CONFIG),
    "not UTF-8": Hostile(edit_bytes(lambda d: d + b"\xff", CONFIG), file=CONFIG),
    "nested": Hostile(edit_bytes(lambda d: b"[" * 100_000, CONFIG), file=CONFIG, got=False),
    "17 MiB": Hostile(edit_bytes(lambda d: d + b" " * (17 * 2**20), CONFIG), file=CONFIG),
    "a million lists": Hostile(
        edit_bytes(lambda d: b'{"a": [' + b"[]," * 10**6 + b"[]]}", CONFIG), file=CONFIG
    ),
    "alpha NaN": Hostile(raw("lora_alpha", "NaN"), file=CONFIG, key="lora_alpha"),
    "alpha 1e999": Hostile(raw("lora_alpha", "1e999"), file=CONFIG, key="lora_alpha"),
    "alpha of 5,000 digits": Hostile(raw("lora_alpha", "9" * 5000), file=CONFIG, key="lora_alpha"),
    "alpha of 300 digits": Hostile(raw("lora_alpha", "9" * 300), file=CONFIG, key=""),
    "alpha negative": Hostile(fields(lora_alpha=-16), file=CONFIG, key="lora_alpha"),
    "alpha x 10,000": Hostile(fields(lora_alpha=160_000), file=CONFIG, key=""),
    "r = 1e9": Hostile(fields(r=10**9), key="lora_A"),
    "r = 2^70": Hostile(fields(r=2**70), key=""),
    "rank not that of the tensors": Hostile(fields(r=5), key="lora_A"),
    "rank pattern not that of the tensors": Hostile(
        fields(rank_pattern={"q_proj": 3}), key="lora_A"
    ),
    "catastrophic rank pattern": Hostile(fields(rank_pattern={SLOW: 3}), file=CONFIG, key="?<=!"),
    "many catastrophic patterns": Hostile(
        fields(rank_pattern={SLOW + "|x" * n: 3 for n in range(1000)}),
        file=CONFIG,
        key="",
    ),
    # Each is a little slow. Whether they are refused is a matter of the machine, but not when.
    "a hundred slow patterns": Hostile(
        fields(rank_pattern={rf"(\w|\.|{n})*(\w|\.)*y": 3 for n in range(100)}),
        file=CONFIG,
        key="",
        by=(),
    ),
    "pattern that counts to 1e9": Hostile(
        fields(alpha_pattern={"a{1000000000}": 3}), file=CONFIG, key="alpha_pattern"
    ),
    "catastrophic targets": Hostile(
        fields(target_modules=SLOW),
        file=CONFIG,
        key="target",
        by=("load",),
        kind="LorasmithError",
        ours=True,
    ),
    "catastrophic layers_pattern": Hostile(
        fields(layers_to_transform=[0], layers_pattern=SLOW),
        file=CONFIG,
        key="layers_pattern",
        by=("load",),
        kind="LorasmithError",
    ),
    "targets of numbers": Hostile(fields(target_modules=[1]), file=CONFIG, key="target_modules"),
    "layers of lists": Hostile(
        fields(layers_to_transform=[[0]]), file=CONFIG, key="layers_to_transform"
    ),
    "unknown type": Hostile(fields(peft_type="HRA2"), file=CONFIG, key="peft_type", ours=False),
    "type of a function": Hostile(
        fields(peft_type="os.system"), file=CONFIG, key="peft_type", ours=False
    ),
    "type of a list": Hostile(fields(peft_type=["LORA"]), file=CONFIG, key="peft_type", ours=False),
    "no type": Hostile(fields(peft_type=None), file=CONFIG, key="peft_type", ours=False),
    "IA3 configuration on LoRA weights": Hostile(
        lambda p: (p / CONFIG).write_text(
            json.dumps(
                {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
            )
        ),
        file="",
        key="",
        ours=False,
    ),
}

WEIGHTS_WRONG: dict[str, Hostile] = {
    "NaN": Hostile(
        _set(float("nan")),
        key="lora_A",
        by=_VALUES,
    ),
    "Inf": Hostile(_set(float("inf"), "lora_B"), key="lora_B", by=_VALUES),
    "half the keys": Hostile(edit_tensors(_half), key="lora_"),
    "no matching key": Hostile(edit_tensors(_renamed), key="nowhere"),
    "no tensor": Hostile(edit_tensors(lambda t: t.clear())),
    "extra keys": Hostile(
        edit_tensors(lambda t: t.update({f"{PREFIX}model.extra.weight": torch.ones(2)})),
        key="extra",
        by=("load",),
    ),
    "layers of another model": Hostile(
        edit_tensors(
            lambda t: [
                t.update({k.replace("layers.1", "layers.7"): t.pop(k)})
                for k in list(t)
                if "layers.1" in k
            ]
        ),
        file="",
        key="layers.7",
        by=("load", "diagnose"),
        kind="LorasmithError",
        ours=False,
    ),
    "shape of another base": Hostile(
        edit_tensors(_wider),
        key="lora_A",
        by=("load", "diagnose"),
        kind="LorasmithError",
        ours=False,
    ),
    "whole numbers": Hostile(
        edit_tensors(lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})), key="lora_"
    ),
}

ADAPTERS: dict[str, Hostile] = {
    **{f"files: {k}": v for k, v in FILES.items()},
    **{f"config: {k}": v for k, v in CONFIGS.items()},
    **{f"weights: {k}": v for k, v in WEIGHTS_WRONG.items()},
}

#: What only our own record beside PEFT's files can say wrong. Read and load must refuse.
RECORDS: dict[str, Hostile] = {
    "flipped payload bit": Hostile(
        edit_bytes(lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:]), by=("read", "load")
    ),
    "flipped bit in the configuration": Hostile(
        edit_bytes(lambda d: d.replace(b'"r": 4', b'"r": 5'), CONFIG), file=CONFIG
    ),
    "broken": Hostile(edit_bytes(lambda d: d[:-9], OWN), file=OWN),
    "byte-order mark": Hostile(edit_bytes(lambda d: b"\xef\xbb\xbf" + d, OWN), file=OWN),
    "links out": Hostile(outside(OWN), file=OWN, key=OWN),
    "format of the future": Hostile(fields(OWN, format=99), file=OWN, key="format"),
    "format of a list": Hostile(fields(OWN, format=[1]), file=OWN, key="format"),
    "variant of a function": Hostile(fields(OWN, config={"variant": "os:system"}), file=OWN),
    "configuration of a list": Hostile(fields(OWN, config=[1]), file=OWN, key="config"),
    "rank 1e9": Hostile(fields(OWN, config={"variant": "lora", "r": 10**9}), file=OWN, key=""),
    "fingerprint of numbers": Hostile(
        fields(OWN, base={"fingerprint": {"structure": 1, "sketch": 3}}),
        file=OWN,
        key="fingerprint",
    ),
    "padding of numbers": Hostile(fields(OWN, padding=[1]), file=OWN, key="padding"),
    "frozen that are not there": Hostile(fields(OWN, frozen=["A0"]), file="", key=""),
    "sizes of 2^60": Hostile(
        fields(OWN, sizes={"model.layers.0.self_attn.q_proj": [2**60, 2**60, 1]}),
        file=OWN,
        key="sizes",
    ),
}

# A shared subspace ------------------------------------------------------------------------------

MANIFEST, BASIS, CODES = "subspace.json", "basis.safetensors", "codes.safetensors"


def vouch(folder: Path) -> None:
    """Lets the manifest vouch for the files as they are: only the reader can object."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def vouched(spoil: Spoil) -> Spoil:
    """The same, and the manifest vouches for it."""
    return in_turn(spoil, vouch)


def manifest(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Spoils the manifest."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / MANIFEST).read_text())
        change(values)
        (folder / MANIFEST).write_text(json.dumps(values))

    return spoil


def _resize(layers: list[dict[str, Any]], rows: int) -> None:
    for layer in layers:
        for part in layer["parts"].values():
            part[1] = rows


FLEETS: dict[str, Hostile] = {
    "manifest broken": Hostile(edit_bytes(lambda d: d[:-20], MANIFEST), file=MANIFEST),
    "manifest with a mark": Hostile(
        edit_bytes(lambda d: b"\xef\xbb\xbf" + d, MANIFEST), file=MANIFEST
    ),
    "manifest of a million lists": Hostile(
        edit_bytes(lambda d: b'{"a": [' + b"[]," * 10**6 + b"[]]}", MANIFEST), file=MANIFEST
    ),
    "manifest links out": Hostile(outside(MANIFEST), file=MANIFEST, key=MANIFEST),
    "basis truncated": Hostile(edit_bytes(lambda d: d[:-20], BASIS), file=BASIS, key=BASIS),
    "basis truncated, vouched for": Hostile(
        vouched(edit_bytes(lambda d: d[:-20], BASIS)), file=BASIS
    ),
    "basis with a flipped bit": Hostile(
        edit_bytes(lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:], BASIS), file=BASIS, key=BASIS
    ),
    "basis header 0xFF": Hostile(
        vouched(edit_bytes(lambda d: b"\xff" * 8 + d[8:], BASIS)), file=BASIS
    ),
    "basis NaN": Hostile(
        vouched(
            edit_tensors(
                lambda t: [
                    v.view(-1)[:1].fill_(float("nan")) for v in t.values() if v.is_floating_point()
                ],
                BASIS,
            )
        ),
        file="",
        got=False,
    ),
    "basis links out": Hostile(outside(BASIS), file=BASIS, key=BASIS),
    "files named outside": Hostile(
        manifest(lambda m: m["files"].update({"../x": {"sha256": "", "size": 0}})),
        file="",
        got=False,
    ),
    "no files": Hostile(manifest(lambda m: m.update(files={})), file="", got=False),
    "format of the future": Hostile(
        manifest(lambda m: m.update(format=99)), file=MANIFEST, key="format"
    ),
    "another kind": Hostile(
        manifest(lambda m: m.update(kind="os.system")), file=MANIFEST, key="kind"
    ),
    "an id twice": Hostile(
        manifest(lambda m: m["adapters"][1].update(id=m["adapters"][0]["id"])), file="", got=False
    ),
    "an id with NUL": Hostile(
        manifest(lambda m: m["adapters"][0].update(id="a\0b")), file="", got=False
    ),
    "an id of a list": Hostile(
        manifest(lambda m: m["adapters"][0].update(id=["a"])), file=MANIFEST, key="id"
    ),
    "a record of other sizes": Hostile(
        manifest(lambda m: [s.update({k: [31, 40] for k in s}) for s in m["records"]["sizes"]]),
        file=MANIFEST,
        key="model",
    ),
    "a record of rank 0": Hostile(
        manifest(lambda m: [s.update(dict.fromkeys(s, 0)) for s in m["records"]["ranks"]]),
        file=MANIFEST,
        key="record",
        got=False,
    ),
    "a record with a number for modules_to_save": Hostile(
        manifest(lambda m: [s.update(modules_to_save=4) for s in m["records"]["peft"]]),
        file=MANIFEST,
        key="record",
        got=False,
    ),
    "an id of 300 characters": Hostile(
        manifest(lambda m: m["adapters"][0].update(id="x" * 300)), file="", got=False
    ),
    "layers of 2^40 rows": Hostile(
        manifest(lambda m: _resize(m["layers"], 2**40)), file="", key=""
    ),
    "layers of -1 rows": Hostile(
        manifest(lambda m: _resize(m["layers"], -1)),
        file="",
        key="",
        got=False,
    ),
    "an unknown codec": Hostile(
        manifest(lambda m: m["layers"][0]["parts"].update(up=["os.system", 1, 1])),
        file="",
        got=False,
    ),
    "width 0": Hostile(manifest(lambda m: m["layers"][0].update(width=0)), file="", got=False),
    "a layer twice": Hostile(
        manifest(lambda m: m["layers"][1].update(module=m["layers"][0]["module"])),
        file="",
        got=False,
    ),
    "an adapter less": Hostile(manifest(lambda m: m["adapters"].pop()), file="", got=False),
    "records out of reach": Hostile(
        manifest(lambda m: m["adapters"][0]["record"].update(config=10**9)),
        file=MANIFEST,
        got=False,
    ),
    "a configuration with an unknown option": Hostile(
        manifest(lambda m: [c.update(os="system") for c in m["records"]["config"]]),
        file=MANIFEST,
        key="record",
        got=False,
    ),
    "a fingerprint of something else": Hostile(
        manifest(lambda m: m["base"].update(fingerprint={"structure": 1})),
        file=MANIFEST,
        key="fingerprint",
    ),
    "budget NaN": Hostile(raw("budget", "NaN", MANIFEST), file=MANIFEST, key="budget"),
}

# GGUF -------------------------------------------------------------------------------------------

GGUF = "base.gguf"


def _at(place: int, value: int, size: int = 8) -> Spoil:
    return edit_bytes(
        lambda d: d[:place] + value.to_bytes(size, "little") + d[place + size :], GGUF
    )


def after(marker: bytes, skip: int, value: int, size: int = 8) -> Spoil:
    """Writes a number ``skip`` bytes after a text of the file."""

    def change(data: bytes) -> bytes:
        place = data.index(marker) + len(marker) + skip
        return data[:place] + value.to_bytes(size, "little") + data[place + size :]

    return edit_bytes(change, GGUF)


def _list(kind: int, count: int) -> Spoil:
    """Puts an entry with a list that counts more than it holds before the others."""

    def change(data: bytes) -> bytes:
        key = b"a.list"
        entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, kind, count)
        entries = struct.unpack("<Q", data[16:24])[0] + 1
        return data[:16] + struct.pack("<Q", entries) + entry + data[24:]

    return edit_bytes(change, GGUF)


_TENSOR = b"blk.0.attn_q.weight"
GGUFS: dict[str, Hostile] = {
    "truncated": Hostile(edit_bytes(lambda d: d[: len(d) // 2], GGUF)),
    "truncated in the header": Hostile(edit_bytes(lambda d: d[:200], GGUF)),
    "empty": Hostile(edit_bytes(lambda d: b"", GGUF)),
    "another magic": Hostile(edit_bytes(lambda d: b"GGML" + d[4:], GGUF), key="magic"),
    "version 2^31": Hostile(_at(4, 2**31, 4), key="version"),
    "2^60 tensors": Hostile(_at(8, 2**60), key="tensor_count"),
    "2^60 entries": Hostile(_at(16, 2**60), key="kv_count"),
    "a list of 2^60 bytes": Hostile(_list(0, 2**60), key="a.list"),
    "a list of 2^60 texts": Hostile(_list(8, 2**60), key="a.list"),
    "a list of lists": Hostile(_list(9, 3), key="a.list"),
    "a key of 2^60 characters": Hostile(_at(24, 2**60), key="entry"),
    "2^31 layers": Hostile(after(b"llama.block_count", 4, 2**31, 4), key="block_count"),
    "2^31 heads": Hostile(
        after(b"llama.attention.head_count_kv", 4, 2**31, 4), key="head_count_kv"
    ),
    "2^31 dimensions": Hostile(after(_TENSOR, 0, 2**31, 4), key="attn_q"),
    "2^40 x 2^40": Hostile(after(_TENSOR, 4, 2**104 + 2**40, 16), key="attn_q"),
    "a size of 0": Hostile(after(_TENSOR, 4, 0), key="attn_q"),
    "an unknown type": Hostile(after(_TENSOR, 20, 999, 4), key="attn_q"),
    "an offset beyond the end": Hostile(after(_TENSOR, 24, 2**50), key="attn_q"),
    "an overlapping offset": Hostile(after(_TENSOR, 24, 0), key=""),
}

# Ids --------------------------------------------------------------------------------------------

IDS: dict[str, Any] = {
    "climbs": "../x",
    "absolute": "/etc/passwd",
    "NUL": "a\0b",
    "300 characters": "x" * 300,
    "empty": "",
    "dots": "..",
    "half a surrogate pair": "a\ud800",
    "a number": 3,
}

#: Cases that go through the command line as well: one of each way of being refused.
EVERYWHERE = frozenset(
    {
        "files: truncated",
        "files: header length 0xFF",
        "files: shape 2^40 x 2^40",
        "files: pickle",
        "files: weights link out",
        "config: broken JSON",
        "config: alpha NaN",
        "config: r = 1e9",
        "config: catastrophic rank pattern",
        "config: type of a function",
        "weights: NaN",
        "weights: half the keys",
        "basis truncated",
        "an id twice",
        "2^60 tensors",
        "a list of 2^60 texts",
    }
)
