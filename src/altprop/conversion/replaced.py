"""Modules whose forward is not their class's: compiled ones, and those with one of their own.

A role is a class, and torch calls what the instance holds first. So a role goes to the module that
`torch.compile` wraps, and where somebody has put another forward on the instance there is none.
"""

from __future__ import annotations

from torch import nn
from torch._dynamo import OptimizedModule

REPLACED = (
    "a forward of its own was put on this module, past which no rule would act: undo that first, "
    "with accelerate's hooks by remove_hook_from_module(model, recurse=True), else by del "
    "module.forward"
)
AFTERWARDS = (
    "a forward of its own was put on this module after convert, which would outlive it: undo that "
    "first, after accelerator.prepare by accelerator.unwrap_model(model, keep_fp32_wrapper=False), "
    "else by del module.forward"
)
_WRAPPED = "_orig_mod"


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module is what `torch.compile` puts around another one."""
    return isinstance(module, OptimizedModule)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was given, or the module itself."""
    while is_compiled(module):
        inner = module._modules[_WRAPPED]
        assert inner is not None
        module = inner
    return module


def uncompiled(path: str) -> str:
    """Return a path, or a pattern, without the names that `torch.compile` has put into it."""
    return ".".join(part for part in path.split(".") if part != _WRAPPED)


def is_replaced(module: nn.Module) -> bool:
    """Say whether the instance holds a forward other than its class's."""
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def drop_own(module: nn.Module) -> None:
    """Drop the class's own forward from an instance, where hooks leave it when they are undone."""
    if not is_replaced(module):
        module.__dict__.pop("forward", None)
