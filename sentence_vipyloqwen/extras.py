"""Optional dependencies: imported where they are used, missed with an error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Its dotted name.
        extra: The extra of this package that installs it.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{module!r} is not installed; install it with: pip install 'sentence-vipyloqwen[{extra}]'"
        ) from error
