"""Where a push goes: a directory of a store, in which readers see one generation or the other.

A store (S3, Google Cloud Storage, …) replaces one file at a time, so that a directory of three
cannot be replaced at once. What makes a generation is its record: ``lorasmith.json`` of an
adapter, ``subspace.json`` of a compressed fleet, which name the other files' SHA-256.

A new directory: everything else first, last the file by which readers know that there is
something (``adapter_config.json``, ``subspace.json``).

Over an older generation:

    1. new files → .lorasmith/<sha256>-<name>      readers: old
    2. old files → .lorasmith/<sha256>-<name>      old (copied by the store itself)
    3. .lorasmith/… → their names                  old, from .lorasmith where need be
    4. the record                                  new
    5. .lorasmith/ and files of the old generation are removed

:func:`lorasmith.io.hub.fetch` compares what it copies with the record, and takes what does not
fit from ``.lorasmith``. An upload that ends anywhere before step 4 leaves the old generation
readable, one after it the new one; a later push clears what is left. Other programs, which do
not know the record, can meet a mixture during step 3, and only then.

A directory of this machine (``file://``) is replaced as a whole (:mod:`lorasmith.io.atomic`).
Two pushes to one place at the same time: no reader gets a mixture, but there is no lock. The
second to finish notices most often, and fails; push again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

from lorasmith.errors import AdapterFileError, LorasmithError
from lorasmith.io import peft
from lorasmith.io.atomic import replace_files
from lorasmith.io.bundle import CARD, OWNED_BY, RECORDS, Bundle, describes, plain_record
from lorasmith.io.card import MARK
from lorasmith.io.checks import some
from lorasmith.io.hub import FLEET, STAGING, copied, failures, file_system, hashes_in, listed
from lorasmith.io.strict import parse_object
from lorasmith.io.tensors import sha256_of
from lorasmith.io.weights import OWN

__all__ = ["Progress", "Sent", "check_place", "send"]

#: Stores without directories, which need not be made.
_FLAT = frozenset({"abfs", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a"})
#: Files of other pushes in ``.lorasmith`` are left to them for so long.
_STALE = timedelta(days=1)

#: Called with (phase, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sent:
    """What became of one upload: name → bytes, and what was there."""

    files: dict[str, int]
    replaced: bool
    removed: tuple[str, ...]


def send(bundle: Bundle, url: str, overwrite: bool, progress: Progress | None) -> Sent:
    """Writes a generation under a URL, over an older one if there is one and it may be.

    Args:
        bundle: The files.
        url: Of the directory.
        overwrite: Whether an older generation may be replaced.
        progress: Called with (phase, bytes done, bytes in all).

    Raises:
        AdapterFileError: There is something already, or writing fails; readers still get what
            was there.
    """
    files, root = file_system(url)
    try:
        if url.startswith(("file://", "local://")):
            return _to_directory(bundle, Path(root), overwrite)
        return Store(files, root, url, bundle, progress).upload(overwrite)
    except LorasmithError:
        raise
    except failures() as error:
        raise AdapterFileError(
            f"The upload failed: {str(error) or type(error).__name__}.",
            file=url,
            fix="check the URL, credentials and the network, and push again; what was there "
            "before is what readers still get",
        ) from error


def check_place(
    bundle: Bundle, held: set[str], url: str | Path, overwrite: bool, *, foreign: bool = False
) -> Literal["adapter", "fleet"] | None:
    """What kind of thing is there already.

    Args:
        bundle: What is to be put there.
        held: Names of what is there.
        url: For messages.
        overwrite: Whether it may be replaced.
        foreign: Whether other files do no harm.
    """
    old: Literal["adapter", "fleet"] | None = (
        "fleet" if FLEET in held else "adapter" if peft.CONFIG in held else None
    )
    if old is not None and old != bundle.kind:
        raise AdapterFileError(
            f"There is {'a fleet' if old == 'fleet' else 'an adapter'} already, and this is "
            f"{'a fleet' if bundle.kind == 'fleet' else 'an adapter'}.",
            file=url,
            fix="choose another place",
        )
    if old is not None and not overwrite:
        raise AdapterFileError(
            f"There is {'a fleet' if old == 'fleet' else 'an adapter'} already.",
            file=url,
            fix="choose another place, or replace it: overwrite=True, --overwrite",
        )
    others = sorted(held - set(bundle.all()) - OWNED_BY[bundle.kind] - {STAGING, CARD})
    if old is None and others and not foreign:
        raise AdapterFileError(
            "The place holds something, but no adapter; it is not touched.",
            file=url,
            got=some(others),
            fix="choose a new or an empty one, e.g. a directory below it",
        )
    return old


def _to_directory(bundle: Bundle, target: Path, overwrite: bool) -> Sent:
    held = {e.name for e in target.iterdir()} if target.is_dir() else set()
    old = check_place(bundle, held, target, overwrite)
    sent = bundle.all()
    if bundle.card and CARD in held:
        text = (target / CARD).read_text(encoding="utf-8", errors="replace")
        if MARK not in text:
            del sent[CARD]
    owned = OWNED_BY[bundle.kind] | set(sent)

    def write(stage: Path) -> None:
        for name, file in sent.items():
            shutil.copyfile(file, stage / name)

    replace_files(target, owned, write)
    removed = sorted((held & OWNED_BY[bundle.kind]) - set(sent))
    sizes = {name: file.stat().st_size for name, file in sent.items()}
    return Sent(sizes, old is not None, tuple(removed))


class Store:
    """One upload to a directory of a store.

    Args:
        files: The file system.
        root: The directory in it.
        url: Its URL.
        bundle: What is uploaded.
        progress: Called with (phase, bytes done, bytes in all).
    """

    def __init__(
        self, files: Any, root: str, url: str, bundle: Bundle, progress: Progress | None
    ) -> None:
        self._files, self._root, self._url = files, root, url
        self._bundle = bundle
        self._progress = progress
        self._done = self._total = 0

    def upload(self, overwrite: bool) -> Sent:
        held = listed(self._files, self._root)
        old = check_place(self._bundle, set(held), self._url, overwrite)
        sent = self._bundle.all()
        if self._bundle.card and CARD in held and not self._generated():
            del sent[CARD]
        sizes = {name: file.stat().st_size for name, file in sent.items()}
        if old is None:
            self._total = sum(sizes.values())
            self._make(self._root)
            for name, file in sent.items():
                self._put(file, name)
            if STAGING in held:
                self._clear((), stale=True)
            return Sent(sizes, False, ())
        removed = self._replace(old, set(held), sent)
        return Sent(sizes, True, removed)

    def _replace(
        self, kind: Literal["adapter", "fleet"], held: set[str], sent: dict[str, Path]
    ) -> tuple[str, ...]:
        bundle, record = self._bundle, RECORDS[kind]
        before, old_record = self._old(kind)
        kept = set(listed(self._files, f"{self._root}/{STAGING}"))
        # What is the same in both generations stays where it is, unless an upload that was cut
        # off has put something else there.
        changed = {
            n: sha
            for n, sha in bundle.hashes.items()
            if before.get(n) != sha or f"{sha}-{n}" in kept
        }
        moved = {n: sha for n, sha in before.items() if changed.get(n, sha) != sha}
        self._total = sum(
            f.stat().st_size for n, f in sent.items() if n not in bundle.parts or n in changed
        )
        self._make(f"{self._root}/{STAGING}")
        spare = {f"{sha}-{name}" for name, sha in (*changed.items(), *moved.items())}
        switching = False
        try:
            for name, sha in changed.items():
                self._put(bundle.parts[name], f"{STAGING}/{sha}-{name}")
            for name, sha in moved.items():
                # After an upload that was cut off, what is under the name may be another's.
                if f"{sha}-{name}" not in kept:
                    self._copy(name, f"{STAGING}/{sha}-{name}")
            if old_record is not None:
                self._put(old_record, record, counted=False)
            for name in bundle.beside:
                if name in sent:
                    self._put(sent[name], name)
            switching = True
            for name, sha in changed.items():
                self._copy(f"{STAGING}/{sha}-{name}", name)
            self._files.invalidate_cache()
            marks = {name: self._mark(name) for name in bundle.parts}
            self._put(bundle.record, record)
        except BaseException:
            if not switching:
                # Readers have no need of it: nothing else has been touched.
                with contextlib.suppress(Exception):
                    self._clear(spare - kept)
            raise
        self._files.invalidate_cache()
        if {name: self._mark(name) for name in bundle.parts} != marks or not self._is_ours(record):
            raise AdapterFileError(
                "Somebody else has pushed to this place at the same time.",
                file=self._url,
                fix="push it again when they have finished",
            )
        removed = sorted((held & OWNED_BY[kind]) - set(sent))
        self._remove(removed)
        self._clear(spare, stale=True)
        return tuple(removed)

    def _old(self, kind: Literal["adapter", "fleet"]) -> tuple[dict[str, str], Path | None]:
        """SHA-256 of the files of the generation that is there; a record, if it has none."""
        if kind == "fleet":
            text = self._files.cat_file(f"{self._root}/{FLEET}")
            entries = parse_object(text, f"{self._url}/{FLEET}", limit=2**30, values=10**8)
            return hashes_in(entries, "files"), None
        folder = copied(self._files, self._root, self._url, tuple(OWNED_BY[kind] - {peft.PICKLE}))
        parts = {n: folder / n for n in (peft.CONFIG, peft.WEIGHTS) if (folder / n).is_file()}
        hashes = {n: sha256_of(f) for n, f in parts.items()}
        if len(parts) < 2 or ((folder / OWN).is_file() and describes(folder / OWN, hashes)):
            return hashes, None
        made = self._bundle.record.with_name(f"old-{OWN}")
        made.write_text(plain_record(parts, hashes), encoding="utf-8")
        return hashes, made

    def _generated(self) -> bool:
        """Whether the card that is there is one of ours."""
        return MARK.encode() in self._files.cat_file(f"{self._root}/{CARD}")

    def _is_ours(self, record: str) -> bool:
        there: bytes = self._files.cat_file(f"{self._root}/{record}")
        return there == self._bundle.record.read_bytes()

    def _mark(self, name: str) -> str:
        return str(self._files.info(f"{self._root}/{name}"))

    def _make(self, folder: str) -> None:
        protocol = self._files.protocol
        kinds = {protocol} if isinstance(protocol, str) else set(protocol)
        if not kinds & _FLAT:
            self._files.makedirs(folder, exist_ok=True)

    def _put(self, file: Path, name: str, *, counted: bool = True) -> None:
        from fsspec.callbacks import Callback

        before, store = self._done, self

        class Report(Callback):  # type: ignore[misc]
            def call(self, *_: Any, **__: Any) -> None:
                if counted:
                    store._report(before + min(int(self.value or 0), file.stat().st_size))

        self._files.put_file(os.fspath(file), f"{self._root}/{name}", callback=Report())
        if counted:
            self._done = before + file.stat().st_size
            self._report(self._done)

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress("uploading", done, self._total)

    def _copy(self, name: str, other: str) -> None:
        self._files.cp_file(f"{self._root}/{name}", f"{self._root}/{other}")

    def _remove(self, names: Collection[str]) -> None:
        for name in names:
            self._files.rm_file(f"{self._root}/{name}")

    def _clear(self, names: Collection[str], *, stale: bool = False) -> None:
        """Removes files from ``.lorasmith``.

        Args:
            names: Of those that may go.
            stale: Whether those that others left there long ago go, too.
        """
        folder = f"{self._root}/{STAGING}"
        self._files.invalidate_cache()
        here = set(listed(self._files, folder))
        gone = {n for n in here if n in names or (stale and self._stale(f"{folder}/{n}"))}
        self._remove([f"{STAGING}/{name}" for name in sorted(gone)])
        if gone and gone == here:
            # Object stores have no empty directories.
            with contextlib.suppress(Exception):
                self._files.rmdir(folder)

    def _stale(self, path: str) -> bool:
        unknown: tuple[type[BaseException], ...] = (*failures(), KeyError, TypeError)
        try:
            made = self._files.modified(path)
        except unknown:
            return False
        made = made if made.tzinfo is not None else made.replace(tzinfo=timezone.utc)
        return bool(datetime.now(timezone.utc) - made > _STALE)
