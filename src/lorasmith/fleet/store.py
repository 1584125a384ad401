"""A shared subspace as files.

    subspace.json       the manifest: format, ids, what it takes to rebuild each adapter, how each
                        layer is stored, SHA-256 and size of the other files
    basis.safetensors   "<layer>.up.data", "<layer>.up.scales", "<layer>.down.…"
    codes.safetensors   "<layer>.left.…", "<layer>.right.…", "<layer>.residual_up.…",
                        "<layer>.residual_down.…", "index", "energy", "lost"
    rest.safetensors    "<number>": tensors beside the factors (only if there are any)

Layers and adapters are numbered: ids and module names stand in the manifest only, so that no id
can name a file or collide with another. Records that agree are written once. The files are
replaced as a whole (:mod:`lorasmith.io.atomic`). Values are stored as they are held, packed.

Reading is strict: every tensor expected, none besides, shapes, dtypes, finite scales, indices that
add up, and the hashes of the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lorasmith import __version__
from lorasmith.errors import AdapterFileError, LorasmithError, in_file
from lorasmith.fleet.codec import Rows, codec_of
from lorasmith.fleet.codes import ABSENT, DIAGONAL, FACTORED, FULL, LOADINGS, PARTS, Layer
from lorasmith.fleet.members import MemberRecord, check_id
from lorasmith.fleet.records import Adapter
from lorasmith.io.atomic import explained_failure, read_one_generation, replace_files
from lorasmith.io.fingerprint import Fingerprint
from lorasmith.io.hub import fetch, release
from lorasmith.io.strict import check_inside, read_object
from lorasmith.io.tensors import FileTensors, sha256_of
from lorasmith.io.weights import BaseModel, as_path

if TYPE_CHECKING:
    from lorasmith.fleet.subspace import SharedSubspace

__all__ = [
    "BASIS",
    "CODES",
    "MANIFEST",
    "REST",
    "check_target",
    "is_subspace",
    "load",
    "problems",
    "save",
    "validate",
]

MANIFEST = "subspace.json"
BASIS = "basis.safetensors"
CODES = "codes.safetensors"
REST = "rest.safetensors"
OWNED = frozenset({MANIFEST, BASIS, CODES, REST})
#: Version of the format. A higher one is not read.
FORMAT = 1
#: Bytes of a manifest; an adapter takes a few hundred.
_LARGEST = 2**30
#: Tensors of a file: of each adapter those beside its factors.
_MOST = 4_000_000
_KIND = "lorasmith shared subspace"


def is_subspace(path: str | os.PathLike[str]) -> bool:
    """Whether a directory, a URL or a repository of the hub holds a shared subspace.

    Raises:
        AdapterFileError: A URL, or the hub, cannot be read.
        MissingDependencyError: A package for it is missing.
    """
    folder = fetch(path, (MANIFEST,))
    if folder is not None:
        release(folder)
    return folder is not None


def check_target(path: str | os.PathLike[str]) -> Path:
    """The directory to save to; what takes long can ask before it begins.

    Raises:
        AdapterFileError: It is a URL, or holds something other than a shared subspace.
    """
    target = as_path(path).expanduser()
    if (
        target.exists()
        and not is_subspace(target)
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise AdapterFileError(
            "The path holds something other than a shared subspace.",
            file=target,
            fix="choose a new or an empty directory",
        )
    return target


def save(subspace: SharedSubspace, path: str | os.PathLike[str]) -> Path:
    """Writes a subspace to a directory; see ``SharedSubspace.save``."""
    target = check_target(path)
    found = problems(subspace)
    if found:
        raise AdapterFileError(
            "The subspace is damaged and is not saved.", got=found[0], file=target
        )
    resolved = Path(os.path.realpath(target))
    known = subspace._generation if subspace._source == resolved else None
    made: dict[str, Any] = {}

    def write(folder: Path) -> None:
        # Under the writers' lock.
        if known is not None and is_subspace(resolved) and sha256_of(resolved / MANIFEST) != known:
            raise AdapterFileError(
                "The subspace has been changed by somebody else since it was read.",
                file=target,
                fix="load it again and repeat the change, or save to another directory",
            )
        _write(subspace, folder)
        made["generation"] = sha256_of(folder / MANIFEST)
        made["disk"] = sum(f.stat().st_size for f in folder.iterdir() if f.name in OWNED)

    with explained_failure("The subspace", target):
        replace_files(target, OWNED, write)
    subspace._generation, subspace._disk = made["generation"], made["disk"]
    subspace._source = resolved
    return target


def _write(subspace: SharedSubspace, folder: Path) -> None:
    from safetensors.torch import save_file

    basis: dict[str, Tensor] = {}
    codes: dict[str, Tensor] = {}
    for number, layer in enumerate(subspace._layers):
        for part in PARTS:
            into = basis if part in ("up", "down") else codes
            for name, value in getattr(layer, part).tensors().items():
                into[f"{number}.{part}.{name}"] = value.detach().cpu().clone()
    adapters = subspace._adapters
    codes["index"] = _packed_index(subspace._layers, len(adapters))
    codes["energy"] = _stack([a.energy for a in adapters], len(subspace._layers)).float()
    codes["lost"] = _stack([a.lost for a in adapters], len(subspace._layers)).float()
    rest: dict[str, Tensor] = {}
    tables = _Tables()
    entries = []
    for adapter in adapters:
        names = {}
        for key, value in adapter.rest.items():
            names[key] = len(rest)
            rest[str(len(rest))] = value.detach().cpu().contiguous().clone()
        entries.append(
            {
                "id": adapter.id,
                "bytes": adapter.nbytes,
                "record": {k: tables.add(k, v) for k, v in adapter.record.to_dict().items()},
                "rest": names,
            }
        )
    files = {BASIS: basis, CODES: codes} | ({REST: rest} if rest else {})
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    printed = subspace.base.fingerprint
    manifest = {
        "kind": _KIND,
        "format": FORMAT,
        "version": __version__,
        "basis": subspace.basis,
        "gauge": subspace.gauge,
        "budget": subspace.budget,
        "base": {
            "name": subspace.base.name,
            "fingerprint": None if printed is None else printed.to_dict(),
        },
        "layers": [
            {
                "module": layer.module,
                "width": layer.width,
                "parts": {
                    part: [
                        getattr(layer, part).codec,
                        len(getattr(layer, part)),
                        getattr(layer, part).columns,
                    ]
                    for part in PARTS
                },
            }
            for layer in subspace._layers
        ],
        "records": tables.tables,
        "adapters": entries,
        "files": {
            name: {"sha256": sha256_of(folder / name), "size": (folder / name).stat().st_size}
            for name in files
        },
    }
    text = json.dumps(manifest, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for name in files:
        os.chmod(folder / name, (folder / MANIFEST).stat().st_mode & 0o777)


class _Tables:
    """Values by field, each of them once."""

    def __init__(self) -> None:
        self.tables: dict[str, list[Any]] = {}
        self._where: dict[tuple[str, str], int] = {}

    def add(self, name: str, value: Any) -> int:
        key = (name, json.dumps(value, sort_keys=True))
        if key not in self._where:
            table = self.tables.setdefault(name, [])
            self._where[key] = len(table)
            table.append(value)
        return self._where[key]


def _stack(values: list[Tensor], layers: int) -> Tensor:
    return torch.stack(values) if values else torch.zeros(0, layers, dtype=torch.float64)


def _packed_index(layers: list[Layer], adapters: int) -> Tensor:
    """[L, N, 4] in the smallest unsigned type; [L, 1, 4] where all adapters agree."""
    if not layers:
        return torch.zeros(0, adapters, 4, dtype=torch.uint8)
    index = torch.stack([layer.index for layer in layers])
    if adapters > 1 and bool((index == index[:, :1]).all()):
        index = index[:, :1]
    kind = torch.uint8 if not index.numel() or int(index.max()) < 256 else torch.int32
    return index.to(kind).contiguous()


# Reading --------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> SharedSubspace:
    """Reads a subspace; see ``SharedSubspace.load``."""
    folder = fetch(path, (MANIFEST, BASIS, CODES, REST))
    if folder is None:
        raise AdapterFileError(
            "There is no shared subspace.",
            file=path,
            expected=f"a directory, URL or hub id with {MANIFEST}",
            fix="make one with lorasmith fleet compress",
        )
    try:
        return read_one_generation(folder, OWNED, lambda: _load(folder))
    finally:
        release(folder)


def _load(folder: Path) -> SharedSubspace:
    from lorasmith.fleet.subspace import SharedSubspace

    manifest = _manifest(folder)
    generation = sha256_of(folder / MANIFEST)
    try:
        subspace = _read(folder, manifest)
    except AdapterFileError as error:
        if error.file is not None:
            raise
        raise in_file(error, folder / MANIFEST, AdapterFileError) from error
    except (
        LorasmithError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        reason = error.what if isinstance(error, LorasmithError) else repr(error)
        raise AdapterFileError(
            f"The manifest of the subspace cannot be understood: {reason}", file=folder / MANIFEST
        ) from error
    assert isinstance(subspace, SharedSubspace)
    found = problems(subspace)
    if found:
        raise AdapterFileError("The subspace is damaged.", got=found[0], file=folder)
    subspace._generation = generation
    subspace._source = Path(os.path.realpath(folder))
    subspace._disk = sum((folder / n).stat().st_size for n in [MANIFEST, *manifest["files"]])
    return subspace


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        size = file.stat().st_size
        manifest = read_object(file, limit=_LARGEST, values=200_000 + size // 4, root=folder)
    except OSError as error:
        raise AdapterFileError(f"The manifest cannot be read: {error}.", file=file) from error
    if manifest.get("kind") != _KIND:
        raise AdapterFileError(
            "That is not a manifest of a shared subspace.",
            file=file,
            key="kind",
            expected=_KIND,
            got=repr(manifest.get("kind"))[:80],
        )
    version = manifest.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise AdapterFileError(
            "The subspace has a format that this version of lorasmith does not read.",
            file=file,
            key="format",
            expected=f"at most {FORMAT}",
            got=repr(version)[:80],
            fix="update lorasmith",
        )
    return manifest


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> Iterator[AdapterFileError]:
    files = manifest["files"]
    if not {BASIS, CODES} <= set(files) <= OWNED - {MANIFEST}:
        yield AdapterFileError("The manifest names other files than a subspace has.", file=folder)
        return
    for name, known in files.items():
        file = folder / name
        if not file.is_file():
            yield AdapterFileError("A file of the subspace is missing.", file=file)
            continue
        check_inside(file, folder)
        if file.stat().st_size != known["size"] or sha256_of(file) != known["sha256"]:
            yield AdapterFileError(
                "A file of the subspace is not the one that its manifest names.",
                file=file,
                key=name,
                expected=f"{known['size']} bytes with the SHA-256 {known['sha256']}"[:120],
                got=f"{file.stat().st_size} bytes",
                fix="it is damaged, or of another generation: copy the directory again",
            )


def _read(folder: Path, manifest: Mapping[str, Any]) -> SharedSubspace:
    from lorasmith.fleet.subspace import SharedSubspace

    for error in _check_files(folder, manifest):
        raise error
    tensors = {name: FileTensors(folder / name, most=_MOST) for name in manifest["files"]}
    expected: dict[str, set[str]] = {name: set() for name in tensors}
    entries = manifest["adapters"]
    count = len(entries)
    expected[CODES] |= {"index", "energy", "lost"}
    index = tensors[CODES]["index"].to(torch.int64)
    if index.dim() == 3 and index.shape[1] == 1 and count > 1:
        index = index.expand(-1, count, -1)
    described = manifest["layers"]
    if tuple(index.shape) != (len(described), count, 4):
        raise AdapterFileError(
            "The index does not fit the manifest.",
            file=folder / CODES,
            expected=[len(described), count, 4],
            got=list(index.shape),
        )
    layers = []
    for number, entry in enumerate(described):
        parts = {}
        for part in PARTS:
            codec, rows, columns = entry["parts"][part]
            file = BASIS if part in ("up", "down") else CODES
            values = {}
            for name, (dtype, shape) in Rows.layout(codec_of(codec), rows, columns).items():
                key = f"{number}.{part}.{name}"
                expected[file].add(key)
                value = tensors[file][key]
                if value.dtype != dtype or tuple(value.shape) != shape:
                    raise AdapterFileError(
                        "A tensor is not what the manifest says.",
                        file=folder / file,
                        key=key,
                        expected=f"{dtype} {list(cast('tuple[int, ...]', shape))}",
                        got=f"{value.dtype} {list(value.shape)}",
                    )
                values[name] = value
            parts[part] = Rows(codec_of(codec), columns, values["data"], values.get("scales"))
        layers.append(
            Layer(str(entry["module"]), int(entry["width"]), **parts, index=index[number].clone())
        )
    energy, lost = (tensors[CODES][k].to(torch.float64) for k in ("energy", "lost"))
    tables = manifest["records"]
    adapters: list[Adapter] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry["id"], str):
            raise AdapterFileError(
                "The id of an adapter is not a text.",
                file=folder / MANIFEST,
                key="id",
                expected="a text",
                got=repr(entry["id"])[:200],
            )
        record = MemberRecord.from_dict({k: tables[k][i] for k, i in entry["record"].items()})
        rest = {}
        for key, place in entry["rest"].items():
            expected[REST].add(str(place))
            rest[key] = tensors[REST][str(place)]
        adapters.append(
            Adapter(entry["id"], record, rest, int(entry["bytes"]), energy[number], lost[number])
        )
    for name, source in tensors.items():
        extra = sorted(set(source) ^ expected[name])
        if extra:
            raise AdapterFileError(
                "A tensor is missing or not expected.", file=folder / name, key=extra[0]
            )
    for number, adapter in enumerate(adapters):
        for layer in layers:
            told = adapter.record.sizes.get(layer.module, (0, 0))
            # 0 where the adapter does not say it.
            if min(told) and told[::-1] != layer.sizes and layer.has(number):
                raise AdapterFileError(
                    "The record of an adapter has other sizes than the layer.",
                    file=folder / MANIFEST,
                    key=layer.module,
                    expected=layer.sizes[::-1],
                    got=told,
                )
    base = manifest["base"]
    printed = base["fingerprint"]
    return SharedSubspace(
        manifest["basis"],
        layers,
        adapters,
        base=BaseModel(base["name"], None if printed is None else Fingerprint.from_dict(printed)),
        budget=float(manifest["budget"]),
        gauge=manifest.get("gauge"),
    )


# Checking -------------------------------------------------------------------------------------


def validate(path: str | os.PathLike[str]) -> list[str]:
    """All that is wrong with a subspace on disk; nothing if it is whole."""
    fetched = None
    try:
        fetched = fetch(path, (MANIFEST, BASIS, CODES, REST))
        folder = fetched or Path(path).expanduser()
        manifest = _manifest(folder)
        found = [str(error) for error in _check_files(folder, manifest)]
        if not found:
            load(folder)
    except LorasmithError as error:
        return [str(error)]
    except (KeyError, TypeError, ValueError) as error:
        return [f"The manifest cannot be understood: {error!r}."]
    finally:
        if fetched is not None:
            release(fetched)
    return found


def problems(subspace: SharedSubspace) -> list[str]:
    """All that is wrong with a subspace in memory."""
    found = []
    if subspace.basis not in ("joint", "share"):
        found.append(f"unknown basis {subspace.basis!r}")
    if subspace.gauge not in (None, "aligned", "balanced", "stored"):
        found.append(f"unknown gauge {subspace.gauge!r}")
    seen: set[str] = set()
    for adapter in subspace._adapters:
        try:
            check_id(adapter.id)
        except LorasmithError as error:
            found.append(str(error))
        if adapter.id in seen:
            found.append(f"the id {adapter.id!r} stands twice")
        seen.add(adapter.id)
        found += _adapter_problems(subspace, adapter)
    modules = [layer.module for layer in subspace._layers]
    if len(set(modules)) != len(modules):
        found.append("a layer stands twice")
    for layer in subspace._layers:
        found += [f"{layer.module}: {p}" for p in _layer_problems(layer, len(subspace._adapters))]
    if not found:
        for number, adapter in enumerate(subspace._adapters):
            held = {layer.module for layer in subspace._layers if layer.has(number)}
            if held != set(adapter.record.modules):
                odd = sorted(held ^ set(adapter.record.modules))[0]
                found.append(f"{adapter.id!r}: record and codes disagree about the layer {odd}")
    return found


def _adapter_problems(subspace: SharedSubspace, adapter: Adapter) -> list[str]:
    found = [
        f"{adapter.id!r}: {key} is missing beside the factors, or not expected"
        for key in sorted(set(adapter.rest) ^ set(adapter.record.rest))
    ]
    for key in set(adapter.rest) & set(adapter.record.rest):
        if tuple(adapter.rest[key].shape) != tuple(adapter.record.rest[key]):
            found.append(f"{adapter.id!r}: {key} has another shape than its record says")
        if not bool(torch.isfinite(adapter.rest[key]).all()):
            found.append(f"{adapter.id!r}: {key} is not finite")
    for name in ("energy", "lost"):
        values = getattr(adapter, name)
        if values.shape != (len(subspace._layers),):
            found.append(f"{adapter.id!r}: {name} has another length than there are layers")
        elif not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            found.append(f"{adapter.id!r}: {name} is not a list of squares")
    return found


def _layer_problems(layer: Layer, count: int) -> list[str]:
    found = []
    for part in PARTS:
        rows: Rows = getattr(layer, part)
        for name, value in rows.tensors().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                found.append(f"{part}.{name} is not finite")
    index = layer.index
    if tuple(index.shape) != (count, 4) or bool((index < 0).any()):
        return [*found, "the index does not have one row for each adapter"]
    if layer.width < 1 or len(layer.up) % layer.width or len(layer.down) % layer.width:
        return [*found, "the basis is not made of whole components"]
    sums = index.sum(0).tolist()
    for part, total in (
        ("left", sums[1]),
        ("right", sums[2]),
        ("residual_up", sums[3]),
        ("residual_down", sums[3]),
    ):
        if len(getattr(layer, part)) != total:
            found.append(f"{part} has {len(getattr(layer, part))} rows, the index says {total}")
    Ru, Rd = layer.ranks
    sizes = {FULL: (0, Ru), DIAGONAL: (0, 1), LOADINGS: (1, 1), ABSENT: (0, 0)}
    for kind, left, right, _ in torch.unique(index, dim=0).tolist() if count else []:
        fits = left == right if kind == FACTORED else sizes.get(kind) == (left, right)
        if not fits:
            found.append(f"a code of the kind {kind} with {left} and {right} rows is impossible")
    lefts, rights = Ru // layer.width, Rd // layer.width
    if layer.diagonal and layer.right.columns == min(Ru, Rd):
        rights = min(Ru, Rd)
    if (layer.left.columns, layer.right.columns) != (lefts, rights) and len(layer.right):
        found.append(
            f"codes of {layer.left.columns} and {layer.right.columns} columns do not fit a basis "
            f"of {lefts} and {rights}"
        )
    return found
