"""Adapters and fleets to a store or to the hub; readers see the old generation or the new one.

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

A directory of this machine (``file://``) is replaced as a whole (:mod:`lorasmith.io.atomic`). On
the hub a push is one commit, which fails if somebody else has committed in between.

Two pushes to one place at the same time: no reader gets a mixture, but there is no lock. The
second to finish notices most often, and fails; push again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

from torch import nn

from lorasmith import __version__
from lorasmith.errors import (
    AdapterFileError,
    ConfigError,
    LorasmithError,
    MissingDependencyError,
)
from lorasmith.io import peft
from lorasmith.io.atomic import replace_files
from lorasmith.io.card import MARK, RUN, adapter_card, fleet_card
from lorasmith.io.files import read_adapter
from lorasmith.io.hub import (
    FLEET,
    FLEET_FILES,
    HF,
    HUB_ID,
    STAGING,
    adapters_below,
    copied,
    failures,
    fetch,
    file_system,
    hashes_in,
    is_url,
    listed,
    locate,
)
from lorasmith.io.strict import check_inside, parse_object, read_object
from lorasmith.io.tensors import sha256_of
from lorasmith.io.weights import FORMAT, OWN, OWNED, AdapterWeights, as_path, check_finite
from lorasmith.redaction import redact

__all__ = ["Pushed", "push", "push_to_hub"]

CARD = "README.md"
#: Files of a generation, by what a directory holds.
_OWNED = {"adapter": OWNED, "fleet": frozenset(FLEET_FILES)}
#: File by which readers know that there is one.
_SIGN = {"adapter": peft.CONFIG, "fleet": FLEET}
_RECORD = {"adapter": OWN, "fleet": FLEET}
#: Never uploaded: pickles can run code, and are optimiser states most often.
_PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
#: Stores without directories, which need not be made.
_FLAT = frozenset({"abfs", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a"})
#: Files of other pushes in ``.lorasmith`` are left to them for so long.
_STALE = timedelta(days=1)
_MANIFEST_LIMIT = 2**30

#: Called with (phase, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]


@runtime_checkable
class _Saveable(Protocol):
    def save(self, path: str | os.PathLike[str]) -> Any: ...


@dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Attributes:
        url: Where to, without secrets.
        kind: ``"adapter"``, ``"fleet"`` (compressed) or ``"adapters"`` (a directory of them).
        files: Names of the uploaded files.
        nbytes: Bytes of them.
        replaced: Whether there was an older generation.
        removed: Names of files of it that are gone.
        left_out: Names in the directory that were not uploaded: subdirectories, hidden files
            and pickles.
        commit: The hub's address of the commit.
        seconds: Wall time.
    """

    url: str
    kind: Literal["adapter", "fleet", "adapters"]
    files: tuple[str, ...]
    nbytes: int
    replaced: bool
    removed: tuple[str, ...]
    left_out: tuple[str, ...]
    commit: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class _Bundle:
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
        found = {**self.beside, **self.parts, _RECORD[self.kind]: self.record}
        sign = _SIGN[self.kind]
        return {**{n: f for n, f in found.items() if n != sign}, sign: found[sign]}


def push(
    source: str | os.PathLike[str] | AdapterWeights | nn.Module | Any,
    url: str,
    *,
    overwrite: bool = False,
    extras: bool = True,
    card: bool = True,
    private: bool = True,
    token: str | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Uploads an adapter, a compressed fleet, or a directory of adapters.

    Args:
        source: Directory, hub id or URL; an adapter that has been read, a
            ``SharedSubspace``, or a model with an adapter.
        url: Where to: any URL that fsspec can write (``s3://bucket/name``, ``gs://``,
            ``memory://``, ``file://``) or ``hf://owner/name[@revision][/folder]``. Credentials
            and endpoints are those of the environment, as fsspec's packages read them.
        overwrite: Replace the adapter or fleet that is there.
        extras: Upload the other files at the top of the directory, too (tokenizer,
            ``training.json``, …); never pickles, hidden files and subdirectories.
        card: Generate a ``README.md`` (see :mod:`lorasmith.io.card`) where there is none.
        private: Of a repository of the hub that is made for it.
        token: For the hub; that of ``HF_TOKEN`` or ``hf auth login`` by default.
        progress: Called with (phase, bytes done, bytes in all).

    Raises:
        AdapterFileError: If there is no whole adapter or fleet, the URL holds something
            already, or it cannot be written; what was there is still there then.
        ConfigError: If that is no URL.
        MissingDependencyError: If a package for the URL's protocol is missing.
    """
    if not is_url(url):
        raise ConfigError(
            "That is not a URL to push to.",
            expected="s3://bucket/name, gs://…, memory://…, file:///… or hf://owner/name",
            got=url,
            fix=f"did you mean hf://{url}?"
            if HUB_ID.fullmatch(str(url))
            else "to save to a directory of this machine use .save(path)",
            key="url",
        )
    hub = HF.fullmatch(url)
    if hub is None and url.startswith("hf://"):
        raise ConfigError(
            "That is not a repository of the hub.",
            expected="hf://owner/name, hf://owner/name@revision or hf://owner/name/folder",
            got=url,
            key="url",
        )
    if hub is not None:
        return push_to_hub(
            source,
            hub["id"],
            revision=hub["revision"],
            folder=hub["folder"],
            private=private,
            token=token,
            overwrite=overwrite,
            extras=extras,
            card=card,
            progress=progress,
        )
    started = time.perf_counter()
    with _held(source) as (folders, scratch):
        many = len(folders) > 1
        done = []
        for folder in folders:
            at = f"{url.rstrip('/')}/{folder.name}" if many else url
            bundle = _bundle(folder, scratch, redact(at), extras=extras, card=card)
            done.append((folder.name, bundle.left_out, _send(bundle, at, overwrite, progress)))
        kind: Any = "adapters" if many else bundle.kind

    def names(of: Callable[[_Sent, tuple[str, ...]], Any]) -> tuple[str, ...]:
        return tuple(f"{f}/{n}" if many else n for f, left, sent in done for n in of(sent, left))

    return Pushed(
        redact(url),
        kind,
        names(lambda sent, _: sent.files),
        sum(sum(sent.files.values()) for *_, sent in done),
        any(sent.replaced for *_, sent in done),
        names(lambda sent, _: sent.removed),
        names(lambda _, left: left),
        None,
        time.perf_counter() - started,
    )


def push_to_hub(
    source: str | os.PathLike[str] | AdapterWeights | nn.Module | Any,
    repository: str,
    *,
    revision: str | None = None,
    folder: str | None = None,
    private: bool = True,
    token: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
    extras: bool = True,
    card: bool = True,
    progress: Progress | None = None,
) -> Pushed:
    """Uploads an adapter or a compressed fleet to the hub, as one commit.

    The commit builds on the state that was looked at: if somebody else commits in between,
    the hub refuses it.

    Args:
        source: As in :func:`push`, but one adapter or one fleet.
        repository: ``"owner/name"``; made if it does not exist.
        revision: Branch; made if it does not exist.
        folder: Directory in the repository.
        private: Whether a repository that is made now is private. An older one stays as it is.
        token: By default that of ``HF_TOKEN`` or ``hf auth login``.
        message: Of the commit.
        overwrite: Replace the adapter or fleet that is there.
        extras: Upload the other files at the top of the directory, too; see :func:`push`.
        card: Generate a ``README.md`` where there is none.
        progress: Called with (phase, bytes done, bytes in all), at the beginning and the end.

    Raises:
        AdapterFileError: If there is no whole adapter or fleet, the repository holds one
            already, or the hub refuses; nothing has changed there then.
        ConfigError: If that is no name of a repository.
        MissingDependencyError: If ``huggingface_hub`` is missing.
    """
    if not HUB_ID.fullmatch(str(repository)):
        raise ConfigError(
            "That is not the name of a repository.",
            expected="owner/name",
            got=repository,
            key="repository",
        )
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise MissingDependencyError(
            "Pushing to the hub needs the package huggingface_hub.",
            fix="pip install huggingface_hub",
        ) from error
    started = time.perf_counter()
    inside = f"{folder.strip('/')}/" if folder else ""
    url = f"hf://{repository}" + (f"@{revision}" if revision else "") + f"/{inside}".rstrip("/")
    with _held(source) as (folders, scratch):
        if len(folders) > 1:
            raise AdapterFileError(
                "A repository holds one adapter or one fleet, and these are several.",
                got=", ".join(f.name for f in folders[:8]),
                fix="push them one by one with folder=…, or compress them (lorasmith fleet "
                "compress)",
            )
        at = repository if not folder else url
        bundle = _bundle(folders[0], scratch, at, extras=extras, card=card)
        api = huggingface_hub.HfApi(token=token)
        try:
            sent, commit = _commit(
                api, bundle, repository, revision, inside, private, message, overwrite, progress
            )
        except LorasmithError:
            raise
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = str(error).strip().splitlines()
            raise AdapterFileError(
                f"The hub did not take it: {reason[0] if reason else type(error).__name__}",
                file=url,
                fix="check the name, the token (hf auth login, or HF_TOKEN), its rights and the "
                "network; nothing has changed on the hub",
            ) from error
    return Pushed(
        url,
        bundle.kind,
        tuple(sent.files),
        sum(sent.files.values()),
        sent.replaced,
        sent.removed,
        bundle.left_out,
        commit,
        time.perf_counter() - started,
    )


def _commit(
    api: Any,
    bundle: _Bundle,
    repository: str,
    revision: str | None,
    inside: str,
    private: bool,
    message: str | None,
    overwrite: bool,
    progress: Progress | None,
) -> tuple[_Sent, str | None]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = api.repo_info(repository, repo_type="model")
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private, repo_type="model", exist_ok=True)
        found = api.repo_info(repository, repo_type="model")
    if revision is not None:
        try:
            found = api.repo_info(repository, repo_type="model", revision=revision)
        except RevisionNotFoundError:
            api.create_branch(repository, branch=revision, repo_type="model", exist_ok=True)
            found = api.repo_info(repository, repo_type="model", revision=revision)
    every = {sibling.rfilename for sibling in found.siblings or ()}
    held = {n.removeprefix(inside) for n in every if n.startswith(inside)}
    top = {n for n in held if "/" not in n}
    url = f"hf://{repository}/{inside}".rstrip("/")
    # The hub puts .gitattributes into every repository, and people begin with a card.
    old = _check_place(bundle, top - {".gitattributes"}, url, overwrite, foreign=True)
    sent = bundle.all()
    if bundle.card and CARD in top:
        path = api.hf_hub_download(repository, f"{inside}{CARD}", revision=found.sha)
        if MARK not in Path(path).read_text(encoding="utf-8", errors="replace"):
            del sent[CARD]
    removed = sorted((top & _OWNED[old]) - set(sent)) if old else []
    total = sum(file.stat().st_size for file in sent.values())
    if progress is not None:
        progress("uploading", 0, total)
    info = api.create_commit(
        repository,
        [
            *(CommitOperationAdd(f"{inside}{name}", file) for name, file in sent.items()),
            *(CommitOperationDelete(f"{inside}{name}") for name in removed),
        ],
        commit_message=message or f"Upload {'a fleet' if bundle.kind == 'fleet' else 'an adapter'}",
        repo_type="model",
        revision=revision,
        parent_commit=found.sha,
    )
    if progress is not None:
        progress("uploading", total, total)
    sizes = {name: file.stat().st_size for name, file in sent.items()}
    address = getattr(info, "commit_url", None)
    return _Sent(sizes, old is not None, tuple(removed)), address


# What is uploaded -----------------------------------------------------------------------------


@contextlib.contextmanager
def _held(source: Any) -> Iterator[tuple[list[Path], Path]]:
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


def _bundle(folder: Path, scratch: Path, where: str, *, extras: bool, card: bool) -> _Bundle:
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
    record = _RECORD[kind]
    files: dict[str, Path] = {}
    beside: dict[str, Path] = {}
    left_out = []
    try:
        for entry in sorted(folder.iterdir()):
            name = entry.name
            if name in _OWNED[kind] and name != peft.PICKLE:
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
        if files.get(record) is None or not _describes(files[record], hashes):
            files[record] = own / record
            files[record].write_text(_plain_record(parts, hashes), encoding="utf-8")
    else:
        hashes = _hashes_of_fleet(own, folder)
        parts = {n: files[n] for n in hashes}
    made = card and CARD not in beside
    if made:
        if weights is not None:
            text = adapter_card(weights, where, run=_run(folder))
        else:
            text = fleet_card(read_object(own / FLEET, limit=_MANIFEST_LIMIT, values=10**8), where)
        beside[CARD] = own / CARD
        beside[CARD].write_text(text, encoding="utf-8")
    return _Bundle(kind, parts, hashes, files[record], beside, tuple(left_out), made)


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
            raise AdapterFileError(
                error.what,
                file=place or folder,
                key=error.key,
                expected=error.expected,
                got=error.got,
                fix=error.fix,
            ) from error
    return weights


def _describes(record: Path, hashes: dict[str, str]) -> bool:
    entries = read_object(record).get("manifest")
    return isinstance(entries, dict) and all(
        isinstance(entries.get(n), dict) and entries[n].get("sha256") == sha
        for n, sha in hashes.items()
    )


def _plain_record(parts: dict[str, Path], hashes: dict[str, str]) -> str:
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


def _run(folder: Path) -> dict[str, Any] | None:
    """What ``lorasmith train`` wrote of the run, where it did."""
    file = folder / RUN
    try:
        return read_object(file, limit=2**28, values=10**7, root=folder)
    except FileNotFoundError:
        return None
    except (OSError, AdapterFileError) as error:
        warnings.warn(f"The card says nothing of the run: {error}", UserWarning, stacklevel=2)
        return None


# Where it goes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sent:
    """What became of one upload: name → bytes, and what was there."""

    files: dict[str, int]
    replaced: bool
    removed: tuple[str, ...]


def _send(bundle: _Bundle, url: str, overwrite: bool, progress: Progress | None) -> _Sent:
    files, root = file_system(url)
    try:
        if url.startswith(("file://", "local://")):
            return _to_directory(bundle, Path(root), overwrite)
        return _Store(files, root, url, bundle, progress).upload(overwrite)
    except LorasmithError:
        raise
    except failures() as error:
        raise AdapterFileError(
            f"The upload failed: {str(error) or type(error).__name__}.",
            file=url,
            fix="check the URL, credentials and the network, and push again; what was there "
            "before is what readers still get",
        ) from error


def _check_place(
    bundle: _Bundle, held: set[str], url: str | Path, overwrite: bool, *, foreign: bool = False
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
    others = sorted(held - set(bundle.all()) - _OWNED[bundle.kind] - {STAGING, CARD})
    if old is None and others and not foreign:
        raise AdapterFileError(
            "The place holds something, but no adapter; it is not touched.",
            file=url,
            got=", ".join(others[:4]) + (f" and {len(others) - 4} more" if others[4:] else ""),
            fix="choose a new or an empty one, e.g. a directory below it",
        )
    return old


def _to_directory(bundle: _Bundle, target: Path, overwrite: bool) -> _Sent:
    held = {e.name for e in target.iterdir()} if target.is_dir() else set()
    old = _check_place(bundle, held, target, overwrite)
    sent = bundle.all()
    if bundle.card and CARD in held:
        text = (target / CARD).read_text(encoding="utf-8", errors="replace")
        if MARK not in text:
            del sent[CARD]
    owned = _OWNED[bundle.kind] | set(sent)

    def write(stage: Path) -> None:
        for name, file in sent.items():
            shutil.copyfile(file, stage / name)

    replace_files(target, owned, write)
    removed = sorted((held & _OWNED[bundle.kind]) - set(sent))
    sizes = {name: file.stat().st_size for name, file in sent.items()}
    return _Sent(sizes, old is not None, tuple(removed))


class _Store:
    """One upload to a directory of a store.

    Args:
        files: The file system.
        root: The directory in it.
        url: Its URL.
        bundle: What is uploaded.
        progress: Called with (phase, bytes done, bytes in all).
    """

    def __init__(
        self, files: Any, root: str, url: str, bundle: _Bundle, progress: Progress | None
    ) -> None:
        self._files, self._root, self._url = files, root, url
        self._bundle = bundle
        self._progress = progress
        self._done = self._total = 0

    def upload(self, overwrite: bool) -> _Sent:
        held = listed(self._files, self._root)
        old = _check_place(self._bundle, set(held), self._url, overwrite)
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
            return _Sent(sizes, False, ())
        removed = self._replace(old, set(held), sent)
        return _Sent(sizes, True, removed)

    def _replace(
        self, kind: Literal["adapter", "fleet"], held: set[str], sent: dict[str, Path]
    ) -> tuple[str, ...]:
        bundle, record = self._bundle, _RECORD[kind]
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
        removed = sorted((held & _OWNED[kind]) - set(sent))
        self._remove(removed)
        self._clear(spare, stale=True)
        return tuple(removed)

    def _old(self, kind: Literal["adapter", "fleet"]) -> tuple[dict[str, str], Path | None]:
        """SHA-256 of the files of the generation that is there; a record, if it has none."""
        if kind == "fleet":
            text = self._files.cat_file(f"{self._root}/{FLEET}")
            entries = parse_object(text, f"{self._url}/{FLEET}", limit=2**30, values=10**8)
            return hashes_in(entries, "files"), None
        folder = copied(self._files, self._root, self._url, tuple(_OWNED[kind] - {peft.PICKLE}))
        parts = {n: folder / n for n in (peft.CONFIG, peft.WEIGHTS) if (folder / n).is_file()}
        hashes = {n: sha256_of(f) for n, f in parts.items()}
        if len(parts) < 2 or ((folder / OWN).is_file() and _describes(folder / OWN, hashes)):
            return hashes, None
        made = self._bundle.record.with_name(f"old-{OWN}")
        made.write_text(_plain_record(parts, hashes), encoding="utf-8")
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
