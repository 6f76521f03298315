"""What autograd is about while a module runs: a backward pass, or hooks on what it saves."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Say whether autograd is running a backward pass in this thread, as a recomputation does."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def hooked() -> bool:
    """Say whether hooks take what autograd saves, as those of a non-reentrant checkpoint do.

    It sets them where it records and again where it recomputes.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
