"""The drop-in layer for people who write their own model and loop, and its explicit calls.

`LocalLinear`'s `method` strings are names for the same rule values that `convert` takes; with the
`dfa` methods the backward pass is ordinary and a call after it overwrites the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altprop.assign import assign_transport
from altprop.conversion.sites import LinearMap, TransportSite
from altprop.errors import ConfigError, RuleError, unknown
from altprop.feedback import cosine_gradient, draw, generator_for, randn
from altprop.layouts import spread_given
from altprop.recording import in_backward
from altprop.rule import AbstractTransport, Site
from altprop.rules.feedback_alignment import FeedbackAlignment
from altprop.rules.sign_symmetry import SignSymmetry

_METHODS = ("bp", "fa", "sign_sym", "dfa", "dfa_block")
_FEEDBACK = ("B", "B_dfa", "B_dfa_block")


class LinearFA(torch.autograd.Function):
    """`LinearFA.apply(x, W, B, bias=None)`: `x Wᵀ + b`, whose input receives `g B`."""

    @staticmethod
    def apply(x: Tensor, W: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply to `x` (..., in) with `W` and `B` (out, in) and `bias` (out) or none."""
        if B.shape != W.shape:
            raise ConfigError(
                f"B has shape {tuple(B.shape)}; it must be the weight's, {tuple(W.shape)}"
            )
        return assign_transport(x, W, bias, FeedbackAlignment(), B.detach())


class LinearSignSym(torch.autograd.Function):
    """`LinearSignSym.apply(x, W, bias=None)`: input receives `g sign(W) ‖W‖_F / √numel(W)`."""

    @staticmethod
    def apply(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply to `x` (..., in) with `W` (out, in) and `bias` (out) or none."""
        return assign_transport(x, W, bias, SignSymmetry())


class LocalLinear(nn.Linear):
    """A linear layer with a local learning rule; weight `N(0, init_std²)`, bias zero.

    **Arguments:** `method`: `"bp"`, ordinary autograd; `"fa"`, a fixed random `B` (out, in) in the
    weight's place on the way back; `"sign_sym"`, `sign(W) · ‖W‖_F / √numel(W)`; `"dfa"` and
    `"dfa_block"`, ordinary passes whose gradients `apply_dfa_update` or `apply_dfa_block_update`
    then overwrite. `fa_init_mode`, `fa_sparse_k`: the drawing of `B`, with std `init_std`, as in
    `FeedbackAlignment`. `fa_grape`: `B` is a parameter without gradient that `grape_align_step`
    turns by `fa_grape_n_probe` probes. Options of another method are accepted and inert.
    `seed` or `generator`: where the feedback comes from; without either, one integer is taken from
    the global generator, which also draws the weight.

    State-dict keys: `weight`, `bias`, `B`, `B_dfa`, `B_dfa_block`.
    **Raises:** `ConfigError` for an unknown method or initialisation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        method: str = "bp",
        init_std: float = 0.02,
        fa_init_mode: str = "gaussian",
        fa_sparse_k: int | None = None,
        fa_grape: bool = False,
        fa_grape_n_probe: int = 32,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if method not in _METHODS:
            raise unknown("method", method, _METHODS)
        if seed is not None and generator is not None:
            raise ConfigError("give a seed or a generator for the feedback, not both")
        if fa_grape_n_probe < 1:
            raise ConfigError(f"fa_grape_n_probe must be at least 1, not {fa_grape_n_probe}")
        if init_std < 0:
            raise ConfigError(f"init_std must not be negative, got {init_std}")
        rules: dict[str, AbstractTransport] = {"sign_sym": SignSymmetry()}
        if method == "fa":
            rules["fa"] = FeedbackAlignment(fa_init_mode, init_std or 0.02, fa_sparse_k)
        self.init_std = init_std
        super().__init__(in_features, out_features, bias, device, dtype)
        self.method = method
        self.fa_grape = fa_grape
        self.fa_grape_n_probe = fa_grape_n_probe
        if seed is None:
            seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        self.seed = seed
        if self.weight.is_complex() and method != "bp":
            raise ConfigError(
                f"method={method!r} is for real numbers, not {self.weight.dtype}: write method='bp'"
            )
        self._site: TransportSite | None = None
        self._input: Tensor | None = None
        self._again = False  # whether the remembered input is not the first since the last update
        self._probes = 0
        for name in _FEEDBACK:
            self.register_buffer(name, None)
        if method in rules:
            rule = rules[method]
            name = "B" if type(rule).draw is not AbstractTransport.draw else ""
            site = Site("B", out_features, in_features)
            self._site = TransportSite(
                site=site, name=name, rule=rule, seed=seed, stored=LinearMap()
            )
        self._draw()

    def _draw(self) -> None:
        """Draw the feedback that the method has from its beginning, from the seed alone."""
        if self._site is None:
            return
        B = self._site.rule.draw(self._site.site, generator_for(self.seed, "B"))
        if B is not None:
            self._keep("B", B)

    def _apply(self, fn: Any, recurse: bool = True) -> LocalLinear:
        lost = self.weight.is_meta
        super()._apply(fn, recurse)
        if lost and not self.weight.is_meta:  # built on the meta device, where no value is kept
            self._draw()
        return self

    def reset_parameters(self) -> None:
        """Draw the weight from `N(0, init_std²)` and set the bias to zero."""
        nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method!r}"

    def _keep(self, name: str, value: Tensor) -> None:
        value = value.to(device=self.weight.device, dtype=self.weight.dtype)
        if name == "B" and self.fa_grape:
            self._buffers.pop("B", None)
            self.B = nn.Parameter(value, requires_grad=False)
        else:
            self._buffers[name] = value

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        if self.method in ("dfa", "dfa_block"):
            if not in_backward():  # else it is a checkpoint's recomputation
                self._again = self._input is not None
            self._input = input.detach()
        elif self._site is not None:
            return self._site(self, input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)

    @torch.no_grad()
    def grape_align_step(self, lr_b: float = 0.01, normalize_columns: bool = False) -> None:
        """Turn `B` one step of size `lr_b` towards the weight, by forward-only probes.

        One step on `1 − cos(B, Ĵ)` with `Ĵ = mean((W p) pᵀ)`. Does nothing unless `method="fa"`
        and `fa_grape=True`. `normalize_columns` afterwards gives each column of `B` unit norm.
        """
        if not (self.method == "fa" and self.fa_grape):
            return
        generator = generator_for(self.seed, "probe", self._probes)
        self._probes += 1
        p = randn(generator, self.fa_grape_n_probe, self.in_features).to(self.weight)
        estimate = F.linear(p, self.weight).t() @ p / len(p)
        self.B.sub_(cosine_gradient(self.B, estimate), alpha=lr_b)
        if normalize_columns:
            self.B.div_(torch.linalg.vector_norm(self.B, dim=0, keepdim=True).clamp_min(1e-8))

    def set_dfa_target_dim(self, target_dim: int, init_std: float = 0.02) -> None:
        """Draw `B_dfa` (out, target_dim) from `N(0, init_std²)`, for errors of that width."""
        self._target("B_dfa", target_dim, init_std)

    def _target(self, name: str, width: int, init_std: float) -> None:
        if self.weight.is_meta:
            raise RuleError("this layer is on the meta device: materialise the model first")
        if width < 1:
            raise ConfigError(f"the error's width must be at least 1, not {width}")
        generator = generator_for(self.seed, name)
        self._keep(name, draw("gaussian", self.out_features, width, generator, std=init_std))

    def dfa_compute_grad(self, e_L: Tensor) -> None:
        """Overwrite the gradients with `(e_L Bᵀ)ᵀ x` and `Σ e_L Bᵀ`, summed over leading axes.

        **Arguments:** `e_L` (..., target_dim), the error at the output, detached here; its axes are
        those of the layer's input; where it lacks the last, or has one of size 1, it is repeated.
        Forgets the remembered input.
        **Raises:** `RuleError` before `set_dfa_target_dim` or before a recorded forward pass, after
        several of them, in one of several processes, and for an error that does not fit, or may
        lack one axis or another.
        """
        self._compute("B_dfa", e_L, "initialize_dfa_targets(model, target_dim)", per_token=False)

    @torch.no_grad()
    def _compute(self, name: str, e: Tensor, missing: str, per_token: bool) -> None:
        B = getattr(self, name)
        if B is None:
            raise RuleError(f"this layer has no feedback yet: call {missing} first")
        if self._input is None:
            raise RuleError("this layer remembers no input: call the model, with gradients, first")
        if e.shape[-1] != B.shape[1]:
            raise RuleError(
                f"the error has {e.shape[-1]} features but the feedback was drawn for "
                f"{B.shape[1]}: pass an error of that width or call {missing} again"
            )
        self._refuse_doubt()
        x, self._input = self._input, None
        shape = torch.Size((*x.shape[:-1], self.out_features))
        signal = (spread_given(e.detach().to(B.dtype), shape) @ B.t()).expand(shape)
        rows = shape[:-1].numel()
        signal = signal.reshape(rows, self.out_features)
        if per_token:
            signal = signal / len(signal)
        if self.weight.requires_grad:
            self.weight.grad = signal.t() @ x.reshape(rows, self.in_features).to(signal.dtype)
        if self.bias is not None and self.bias.requires_grad:
            self.bias.grad = signal.sum(0)

    def _refuse_doubt(self) -> None:
        """Refuse to overwrite a gradient that is not of one call, in one process."""
        if self._again:
            self._input, self._again = None, False
            raise RuleError(
                "this layer was called more than once since the last update, and one error cannot "
                "be that of several calls: update after each, call it within torch.no_grad() where "
                "no update follows, or use convert(model, DirectFeedback(), output=...)"
            )
        group = torch.distributed
        if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
            raise RuleError(
                f"an update of one process alone, in a group of {group.get_world_size()}, would "
                "let replicas drift apart, since it overwrites what they have averaged: use "
                "convert(model, DirectFeedback(), output=...), which data parallelism averages"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("B_dfa", "B_dfa_block"):  # a fresh layer has none yet: make room
            value = state_dict.get(prefix + name)
            if value is not None:
                self._keep(name, torch.empty_like(value, device="cpu"))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.B is not None and self.B.is_meta and not self.weight.is_meta:  # assign=True
            self._draw()
        missing: list[str] = args[2]
        missing[:] = [key for key in missing if key not in {prefix + n for n in _FEEDBACK}]


def _layers(model: nn.Module, method: str) -> list[LocalLinear]:
    found = [m for m in model.modules() if isinstance(m, LocalLinear) and m.method == method]
    if not found:
        raise RuleError(
            f"this {type(model).__name__} has no LocalLinear(method={method!r}): nothing to do"
        )
    return found


def initialize_dfa_targets(model: nn.Module, target_dim: int) -> None:
    """Draw the feedback of every `LocalLinear(method="dfa")`, for errors of width `target_dim`.

    Call it once, after construction and device placement.
    **Arguments:** `model`, which holds them; `target_dim`, the features of the output's error.
    **Raises:** `RuleError` if there is no such layer, or one is on the meta device; `ConfigError`
    for a width below 1.
    """
    for layer in _layers(model, "dfa"):
        layer.set_dfa_target_dim(target_dim)


def apply_dfa_update(model: nn.Module, e_L: Tensor) -> None:
    """Overwrite, after `loss.backward()`, the gradients of every `dfa` layer by the error's.

    Every other parameter keeps backprop's. **Arguments:** `model`, which holds them; `e_L`
    (..., target_dim), the gradient of the loss at the output. **Raises:** `RuleError` if a call is
    missing, saying which.
    """
    for layer in _layers(model, "dfa"):
        layer.dfa_compute_grad(e_L)


def initialize_dfa_block_targets(model: nn.Module, d_block: int, init_std: float = 0.02) -> None:
    """Draw the feedback of every `dfa_block` layer, for blocks of output width `d_block`.

    **Arguments:** `model`, which holds them; `d_block`, the features of a block's output;
    `init_std`, of the drawing. **Raises:** as `initialize_dfa_targets`.
    """
    for layer in _layers(model, "dfa_block"):
        layer._target("B_dfa_block", d_block, init_std)


def apply_dfa_block_update(block: nn.Module, block_output_error: Tensor) -> None:
    """Set the gradients of one block's `dfa_block` layers from the error at its output.

    The products are those of `apply_dfa_update` *divided by the number of tokens*.
    **Arguments:** `block`, which holds the layers; `block_output_error` (..., d_block), the
    gradient of the loss at the block's output.
    **Raises:** `RuleError` if a call is missing, saying which.
    """
    missing = "initialize_dfa_block_targets(model, d_block)"
    for layer in _layers(block, "dfa_block"):
        layer._compute("B_dfa_block", block_output_error, missing, per_token=True)
