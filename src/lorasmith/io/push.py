"""Adapters and fleets to a store or to the hub; readers see the old generation or the new one.

What is sent is put together in :mod:`lorasmith.io.bundle`. How a store (S3, Google Cloud
Storage, …) gets it without a moment in which readers would meet a mixture is in
:mod:`lorasmith.io.store`. On the hub a push is one commit, which fails if somebody else has
committed in between.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lorasmith.errors import (
    AdapterFileError,
    ConfigError,
    LorasmithError,
    MissingDependencyError,
)
from lorasmith.io.bundle import CARD, OWNED_BY, Bundle, bundle_of, held_files
from lorasmith.io.card import MARK
from lorasmith.io.hub import HF, HUB_ID, is_url
from lorasmith.io.store import Progress, Sent, check_place, send
from lorasmith.io.weights import AdapterWeights
from lorasmith.redaction import redact

__all__ = ["Pushed", "push", "push_to_hub"]


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
    with held_files(source) as (folders, scratch):
        many = len(folders) > 1
        done = []
        for folder in folders:
            at = f"{url.rstrip('/')}/{folder.name}" if many else url
            bundle = bundle_of(folder, scratch, redact(at), extras=extras, card=card)
            done.append((folder.name, bundle.left_out, send(bundle, at, overwrite, progress)))
        kind: Any = "adapters" if many else bundle.kind

    def names(of: Callable[[Sent, tuple[str, ...]], Any]) -> tuple[str, ...]:
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
    with held_files(source) as (folders, scratch):
        if len(folders) > 1:
            raise AdapterFileError(
                "A repository holds one adapter or one fleet, and these are several.",
                got=", ".join(f.name for f in folders[:8]),
                fix="push them one by one with folder=…, or compress them (lorasmith fleet "
                "compress)",
            )
        at = repository if not folder else url
        bundle = bundle_of(folders[0], scratch, at, extras=extras, card=card)
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
    bundle: Bundle,
    repository: str,
    revision: str | None,
    inside: str,
    private: bool,
    message: str | None,
    overwrite: bool,
    progress: Progress | None,
) -> tuple[Sent, str | None]:
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
    old = check_place(bundle, top - {".gitattributes"}, url, overwrite, foreign=True)
    sent = bundle.all()
    if bundle.card and CARD in top:
        path = api.hf_hub_download(repository, f"{inside}{CARD}", revision=found.sha)
        if MARK not in Path(path).read_text(encoding="utf-8", errors="replace"):
            del sent[CARD]
    removed = sorted((top & OWNED_BY[old]) - set(sent)) if old else []
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
    return Sent(sizes, old is not None, tuple(removed)), address
