"""Python files and modules of the user's own, imported before a command runs.

    lorasmith train … --plugin my_variant.py --adapter.variant my_variant
    LORASMITH_PLUGINS=my_variant.py lorasmith info my-adapter

Whatever they register (variants, above all) is there for the command. They are imported only
where the user names them: what an adapter's files say never makes code run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from lorasmith.errors import ConfigError, LorasmithError

__all__ = ["VARIABLE", "load_plugins"]

#: Environment variable with plugins for every command, separated as in PATH.
VARIABLE = "LORASMITH_PLUGINS"


def load_plugins(given: Iterable[str]) -> list[ModuleType]:
    """Imports those that are given, after those that the environment names; each once.

    Args:
        given: Paths of Python files, or dotted names of modules.

    Raises:
        ConfigError: If one cannot be found or fails when it is imported.
    """
    named = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name.strip()]
    return [
        *(_load(name.strip(), VARIABLE) for name in named),
        *(_load(name, "--plugin") for name in given),
    ]


def _load(name: str, key: str) -> ModuleType:
    path = Path(name).expanduser()
    is_file = path.suffix == ".py" or path.is_file() or os.sep in name
    try:
        return _from_file(path, key) if is_file else importlib.import_module(name)
    except LorasmithError:
        raise
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        raise ConfigError(
            "The plugin cannot be found." if missing else "The plugin fails when it is imported.",
            expected="the path of a Python file, or the name of an installed module"
            if missing
            else None,
            got=name if missing else f"{type(error).__name__}: {error}",
            file=path if is_file else None,
            key=key,
        ) from error


def _from_file(path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(
            "The plugin cannot be found.",
            expected="the path of a Python file, or the name of an installed module",
            got=path,
            key=key,
        )
    path = path.resolve()
    # By a name that no package can have, so that none is hidden; the same for the same file.
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    name = f"lorasmith_plugin_{digest}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(
            "The plugin is no Python file.", expected="a file named *.py", file=path, key=key
        )
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses look their module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
