"""The products with a force's Jacobian at one state, and how autograd gives them for any force.

Where a dynamics has closed forms, one evaluation of its force gives all that a call needs: the
force, the Jacobian's products, and the way back to parameters and input.
"""

from __future__ import annotations

import importlib
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from altprop.assign import assign_pull
from altprop.errors import RuleError

Gradients = tuple[Tensor | None, ...]


class AbstractLinearisation(ABC):
    """The products with a force's Jacobian `J = ∂F/∂z` at one state, `(B, ...) → (B, ...)`."""

    @abstractmethod
    def vjp(self, a: Tensor) -> Tensor:
        """Return `Jᵀa`, detached."""

    @abstractmethod
    def jvp(self, v: Tensor) -> Tensor:
        """Return `Jv`, detached."""

    tells_tokens: ClassVar[bool] = False
    """Whether `own_vjp` is there."""

    def own_vjp(self, a: Tensor) -> Tensor:
        """Return what of `Jᵀa` goes from a token to the same token, `(B, T, C)`, detached.

        Of a causal dynamics these blocks on the diagonal, one per token, have all eigenvalues of
        `J`.

        **Raises:** `RuleError` from what does not tell tokens apart.
        """
        raise RuleError(f"{type(self).__name__} does not tell tokens apart: see tells_tokens")

    def inverse(self, *, transposed: bool) -> Callable[[Tensor], Tensor] | None:
        """Return `r ↦ −J⁻¹ r` (or `−J⁻ᵀ r`) if that costs no more than a product, else `None`.

        Where there is one, estimators correct with it instead of relaxing.
        """
        return None


class AbstractEvaluation(AbstractLinearisation):
    """A force evaluated at one state and linearised there, with all its gradients in closed form.

    `sources`: what the force is a function of beside the state, the input first, then parameters,
    as they are in autograd's graph.
    """

    sources: tuple[Tensor, ...]

    @abstractmethod
    def force(self) -> Tensor:
        """Return the force `(B, ...)`, detached; to be called once, for it is not kept."""

    @abstractmethod
    def pull(self, a: Tensor) -> Gradients:
        """Return `aᵀ ∂F/∂s` for every source `s`, in its shape; `None` for one that learns not."""


def record(
    made: AbstractEvaluation, again: Callable[[], AbstractLinearisation]
) -> tuple[Tensor, Callable[[], AbstractLinearisation]]:
    """Return a force with its evaluation as autograd's record of it, and what gives that back.

    The evaluation lives exactly as long as what autograd would have saved: until the backward pass
    frees the graph, and not at all where activations are checkpointed.

    **Arguments:** `made`, the evaluation; `again`, which makes it anew where it is asked for after
    that.
    """
    keeper = made.sources[0].new_empty(0)
    setattr(keeper, _KEPT, made)  # only this tensor holds it, and only autograd holds the tensor
    known = weakref.ref(made)

    def pull(keeper: Tensor, a: Tensor) -> Gradients:
        kept = getattr(keeper, _KEPT, None)
        if kept is None:  # hooks on saved tensors gave a copy
            kept = again()
        assert isinstance(kept, AbstractEvaluation)
        return kept.pull(a)

    return assign_pull(made.force(), pull, keeper, made.sources), ClosedForm(known, again)


class ClosedForm:
    """What gives the evaluation that autograd holds, or makes it anew where it is no more.

    **Arguments:** `known`, a weak reference to it; `again`, which makes it.
    """

    def __init__(
        self,
        known: weakref.ref[AbstractEvaluation],
        again: Callable[[], AbstractLinearisation],
    ) -> None:
        self._known, self._again = known, again

    def __call__(self) -> AbstractLinearisation:
        kept = self._known()
        return self._again() if kept is None else kept


_KEPT = "_altprop_evaluation"


class AutogradLinearisation(AbstractLinearisation):
    """The products of any force, by automatic differentiation.

    `Jv` is forward mode's. Where that refuses, as it does an energy's gradient that the force takes
    by autograd, it is the derivative of `Jᵀw` by `w`: as exact, from a second graph that is kept.

    **Arguments:** `force`, from a state `(B, ...)` to the force of that shape; `state`, where.
    """

    def __init__(self, force: Callable[[Tensor], Tensor], state: Tensor) -> None:
        self._force, self._state = force, state.detach()
        self._turned: _Turned | None = None
        with torch.enable_grad():
            self._leaf = self._state.clone().requires_grad_()
            self._out = force(self._leaf)

    def vjp(self, a: Tensor) -> Tensor:
        if not self._out.requires_grad:
            return torch.zeros_like(self._state)
        return _gradient(self._out, self._leaf, a)

    def jvp(self, v: Tensor) -> Tensor:
        if self._turned is not None:
            return self._turned(v)
        load_forward_mode()
        refusal = RuntimeError()
        for inside in (nullcontext, _plain_kernels):  # of fused kernels some have no derivative
            try:
                with inside():
                    return self._jvp(v)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                refusal = error
            if not isinstance(refusal, NotImplementedError):
                break
        try:
            return self._turn(v, refusal)
        finally:
            del refusal  # its traceback holds this frame

    def _jvp(self, v: Tensor) -> Tensor:
        # neither the fused attention kernels nor a fused layer has a forward-mode derivative
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _no_fast_path():
            pair: tuple[Tensor, ...] = torch.func.jvp(self._force, (self._state,), (v,))
        return pair[1]

    def _turn(self, v: Tensor, refusal: RuntimeError) -> Tensor:
        """Return `Jv` where forward mode has refused, and keep what gives the next ones.

        An error that is no refusal of forward mode's is raised as it is: the force and its backward
        pass are evaluated again without it.

        **Raises:** `RuleError` from the refusal where the backward pass has no derivative either.
        """
        with sdpa_kernel(SDPBackend.MATH), _no_fast_path(), _plain_kernels():
            turned = _Turned(self._force, self._state)
            try:
                pushed = turned.begin(v)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                turned.pull()
                first, second = (str(e).partition("\n")[0] for e in (refusal, error))
                raise RuleError(
                    f"an operation of the force has no forward-mode derivative ({first}), nor has "
                    f"its backward pass one ({second}): write estimator=Implicit(), which needs "
                    "none"
                ) from refusal
        self._turned = turned
        return pushed


class _Turned:
    """`v ↦ Jv` as the derivative by `w` of `Jᵀw`, a linear map that autograd has a record of.

    **Arguments:** those of an `AutogradLinearisation`.
    """

    def __init__(self, force: Callable[[Tensor], Tensor], state: Tensor) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        w = torch.randn(state.shape, generator=generator, device="cpu")
        self._w = w.to(state).requires_grad_()
        with torch.enable_grad():
            self._leaf = state.clone().requires_grad_()
            self._out = force(self._leaf)

    def pull(self, *, recorded: bool = False) -> Tensor:
        """Return `Jᵀw`."""
        if not self._out.requires_grad:
            return torch.zeros_like(self._w)
        with torch.enable_grad():
            return _gradient(self._out, self._leaf, self._w, create_graph=recorded)

    def begin(self, v: Tensor) -> Tensor:
        """Return the first product, and see that it is one.

        A backward pass that is not recorded as it is computed, which detaches its cotangent say,
        shows here, for `⟨w, Jv⟩` must be `⟨Jᵀw, v⟩`.

        **Raises:** `RuntimeError` where there is no record of the backward pass, or a wrong one.
        """
        self._pulled = self.pull(recorded=True)
        pushed, w, pulled = self(v), self._w.detach(), self._pulled.detach()
        size = w.norm() * pushed.norm() + pulled.norm() * v.norm()
        near = _AGREE * torch.finfo(v.dtype).eps ** 0.5 * size / max(v.numel(), 1) ** 0.5
        if bool(((w * pushed).sum() - (pulled * v).sum()).abs() > near):
            raise RuntimeError("what it computes from its cotangent is not recorded")
        return pushed

    def __call__(self, v: Tensor) -> Tensor:
        if not self._pulled.requires_grad:
            return torch.zeros_like(v)
        return _gradient(self._pulled, self._w, v)


_AGREE = 100.0  # square roots of eps, in what a random direction meets of another one


def _gradient(of: Tensor, by: Tensor, a: Tensor, create_graph: bool = False) -> Tensor:
    """Return the product of `a` with the Jacobian of one tensor by another; keep the graph."""
    (out,) = torch.autograd.grad(
        of,
        by,
        a,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return out


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Run torch's encoder layers as they are written, in evaluation mode too."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Run without the libraries of fused kernels inside."""
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        yield
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled


@cache
def load_forward_mode() -> None:
    """Load torch's forward-mode formulas, whose import warns of torch's own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
