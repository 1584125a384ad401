"""What a push sends: the files of one generation, checked, and held while they are sent.

An adapter is read and found finite, a fleet compared with its manifest, before anything is sent.
Files get a second name in a directory of this process (a hard link, or a copy): writers replace
files and never write into them, so what was checked is what is sent, whoever saves meanwhile. An
adapter without a record of ours that fits gets a plain one, since records are how readers of a
store tell generations apart (:mod:`lorasmith.io.store`).

Other files at the top go along (tokenizer, ``training.json``, …); pickles, hidden files,
subdirectories and links that lead out of the directory do not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

from torch import nn

from lorasmith import __version__
from lorasmith.errors import AdapterFileError, ConfigError, in_file
from lorasmith.io import peft
from lorasmith.io.card import RUN, adapter_card, fleet_card
from lorasmith.io.files import read_adapter
from lorasmith.io.hub import FLEET, FLEET_FILES, HUB_ID, adapters_below, fetch, is_url, locate
from lorasmith.io.strict import check_inside, read_object
from lorasmith.io.tensors import sha256_of
from lorasmith.io.weights import FORMAT, OWN, OWNED, AdapterWeights, as_path, check_finite

__all__ = [
    "CARD",
    "OWNED_BY",
    "RECORDS",
    "Bundle",
    "bundle_of",
    "describes",
    "held_files",
    "plain_record",
    "run_record",
]

#: Generated where there is none.
CARD = "README.md"
#: Files of a generation, by what a directory holds.
OWNED_BY = {"adapter": OWNED, "fleet": frozenset(FLEET_FILES)}
#: File by which readers know that there is something.
_SIGN = {"adapter": peft.CONFIG, "fleet": FLEET}
#: File that names the others' SHA-256.
RECORDS = {"adapter": OWN, "fleet": FLEET}
#: Never uploaded: pickles can run code, and are optimiser states most often.
_PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_MANIFEST_LIMIT = 2**30


@runtime_checkable
class _Saveable(Protocol):
    def save(self, path: str | os.PathLike[str]) -> Any: ...


@dataclass(frozen=True)
class Bundle:
    """The files of one push, held so that whoever replaces the originals does no harm.

    Attributes:
        kind: What it is.
        parts: Name → file, of a generation without its record.
        hashes: Name → SHA-256 of these.
        record: The file that names them.
        beside: Name → any other file.
        left_out: Names that are not uploaded.
        card: Whether ``beside`` holds a card that was generated now.
    """

    kind: Literal["adapter", "fleet"]
    parts: dict[str, Path]
    hashes: dict[str, str]
    record: Path
    beside: dict[str, Path]
    left_out: tuple[str, ...]
    card: bool

    def all(self) -> dict[str, Path]:
        """In the order in which a new directory is written."""
        found = {**self.beside, **self.parts, RECORDS[self.kind]: self.record}
        sign = _SIGN[self.kind]
        return {**{n: f for n, f in found.items() if n != sign}, sign: found[sign]}


@contextlib.contextmanager
def held_files(source: Any) -> Iterator[tuple[list[Path], Path]]:
    """The directories to push, more than one for a directory of adapters; and a scratch one."""
    with tempfile.TemporaryDirectory(prefix="lorasmith-push-") as made:
        scratch = Path(made)
        if isinstance(source, nn.Module):
            source = AdapterWeights.from_model(source)
        if not isinstance(source, str | os.PathLike):
            if not isinstance(source, _Saveable):
                raise ConfigError(
                    "That cannot be pushed.",
                    expected="a path, an adapter, a SharedSubspace, or a model with an adapter",
                    got=type(source).__name__,
                    key="source",
                )
            origin = getattr(source, "path", None)
            folder = scratch / (origin.name if isinstance(origin, Path) else "adapter")
            source.save(folder)
            yield [folder], scratch
            return
        path = cast("str | os.PathLike[str]", source)
        local = None if is_url(path) else as_path(path).expanduser()
        if local is None or local.is_dir():
            if (fleet := fetch(path, FLEET_FILES)) is not None:
                yield [fleet], scratch
                return
            below = adapters_below(path)
            if below is not None and len(below) > 1:
                yield [locate(one) for one in below], scratch
                return
        elif not local.exists() and isinstance(path, str) and HUB_ID.fullmatch(path):
            with contextlib.suppress(AdapterFileError):
                if (fleet := fetch(path, FLEET_FILES)) is not None:
                    yield [fleet], scratch
                    return
        yield [locate(path)], scratch


def bundle_of(folder: Path, scratch: Path, where: str, *, extras: bool, card: bool) -> Bundle:
    """The files of a directory, checked, under names in ``scratch`` that nobody replaces.

    Args:
        folder: The directory.
        scratch: One that is removed afterwards.
        where: Address for the card.
        extras: Whether other files at the top belong to it.
        card: Whether to generate a card where there is none.
    """
    own = Path(tempfile.mkdtemp(dir=scratch))
    kind: Literal["adapter", "fleet"] = "fleet" if (folder / FLEET).is_file() else "adapter"
    record = RECORDS[kind]
    files: dict[str, Path] = {}
    beside: dict[str, Path] = {}
    left_out = []
    try:
        for entry in sorted(folder.iterdir()):
            name = entry.name
            if name in OWNED_BY[kind] and name != peft.PICKLE:
                check_inside(entry, folder)
                files[name] = _hold(entry, own / name)
            elif (extras or name == CARD) and _wanted(entry, folder):
                beside[name] = _hold(entry, own / name)
            else:
                left_out.append(name)
    except OSError as error:
        raise AdapterFileError(f"The files cannot be read: {error}.", file=folder) from error
    weights = None
    if kind == "adapter":
        weights = _checked(own, folder)
        parts = {n: files[n] for n in (peft.WEIGHTS, peft.CONFIG)}
        hashes = {n: sha256_of(f) for n, f in parts.items()}
        if files.get(record) is None or not describes(files[record], hashes):
            files[record] = own / record
            files[record].write_text(plain_record(parts, hashes), encoding="utf-8")
    else:
        hashes = _hashes_of_fleet(own, folder)
        parts = {n: files[n] for n in hashes}
    made = card and CARD not in beside
    if made:
        if weights is not None:
            text = adapter_card(weights, where, run=run_record(folder))
        else:
            text = fleet_card(read_object(own / FLEET, limit=_MANIFEST_LIMIT, values=10**8), where)
        beside[CARD] = own / CARD
        beside[CARD].write_text(text, encoding="utf-8")
    return Bundle(kind, parts, hashes, files[record], beside, tuple(left_out), made)


def _wanted(entry: Path, folder: Path) -> bool:
    """Whether a file beside an adapter or a fleet is uploaded with it."""
    every = OWNED | frozenset(FLEET_FILES)
    if entry.name.startswith(".") or entry.name in every or entry.suffix.lower() in _PICKLES:
        return False
    if not entry.is_file():
        return False
    try:
        check_inside(entry, folder)
    except AdapterFileError:
        return False
    return True


def _hold(file: Path, held: Path) -> Path:
    """A second name for a file, or a copy: writers replace files, and never write into them."""
    real = os.path.realpath(file)
    try:
        os.link(real, held)
    except OSError:  # another file system
        shutil.copyfile(real, held)
    return held


def _checked(held: Path, folder: Path) -> AdapterWeights:
    """The adapter, read and found whole and finite."""
    with warnings.catch_warnings():
        # A record of other files is replaced by a plain one.
        warnings.filterwarnings("ignore", message=".*describes other files than those beside it")
        try:
            weights = read_adapter(held)
            for key in weights.tensors:
                check_finite(weights.tensors[key], key, folder / peft.WEIGHTS)
        except AdapterFileError as error:
            # Under the name that the user knows.
            place = str(error.file or "").replace(os.fspath(held), os.fspath(folder))
            raise in_file(error, place or folder, AdapterFileError) from error
    return weights


def describes(record: Path, hashes: dict[str, str]) -> bool:
    """Whether a record names files of these SHA-256.

    Args:
        record: ``lorasmith.json``.
        hashes: Name → SHA-256.
    """
    entries = read_object(record).get("manifest")
    return isinstance(entries, dict) and all(
        isinstance(entries.get(n), dict) and entries[n].get("sha256") == sha
        for n, sha in hashes.items()
    )


def plain_record(parts: dict[str, Path], hashes: dict[str, str]) -> str:
    """A record that names the files and adds nothing to what PEFT's configuration says."""
    record = {
        "format": FORMAT,
        "version": __version__,
        "config": None,
        "frozen": [],
        "padding": [],
        "sizes": {},
        "base": {"name": None, "fingerprint": None},
        "manifest": {
            n: {"sha256": hashes[n], "size": file.stat().st_size} for n, file in parts.items()
        },
    }
    return json.dumps(record, indent=2, sort_keys=True) + "\n"


def _hashes_of_fleet(held: Path, folder: Path) -> dict[str, str]:
    """Name → SHA-256 of the files that a fleet's manifest names, compared with them."""
    manifest = held / FLEET
    entries = read_object(manifest, limit=_MANIFEST_LIMIT, values=10**8).get("files")
    if not isinstance(entries, dict) or not set(entries) <= set(FLEET_FILES) - {FLEET}:
        raise AdapterFileError(
            "The manifest of the fleet does not name its files.", file=folder / FLEET, key="files"
        )
    found = {}
    for name, entry in entries.items():
        found[name] = sha256_of(held / name) if (held / name).is_file() else ""
        if not isinstance(entry, dict) or entry.get("sha256") != found[name]:
            raise AdapterFileError(
                "A file of the fleet is missing, or not the one that its manifest names.",
                file=folder / name,
                fix="look at it with lorasmith fleet validate, and copy or make it again",
            )
    return found


def run_record(folder: Path) -> dict[str, Any] | None:
    """What ``lorasmith train`` wrote of the run, where it did."""
    file = folder / RUN
    try:
        return read_object(file, limit=2**28, values=10**7, root=folder)
    except FileNotFoundError:
        return None
    except (OSError, AdapterFileError) as error:
        warnings.warn(f"The card says nothing of the run: {error}", UserWarning, stacklevel=2)
        return None
