"""Learning rules other than backprop, for PyTorch.

The forward pass is untouched; a learning rule decides what `.backward()` writes into `.grad`.
The names below are the whole public product. They are resolved on first use, so that
`import altprop` costs no more than reading this table.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:  # what the table below means, for type checkers and editors
    from altprop.errors import (
        AltpropError as AltpropError,
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        ConvergenceError as ConvergenceError,
        DataError as DataError,
        RuleError as RuleError,
    )

_EXPORTS = {
    "altprop.errors": (
        "AltpropError CheckpointError ConfigError ConvergenceError DataError RuleError"
    ),
}
_WHERE = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'altprop' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
