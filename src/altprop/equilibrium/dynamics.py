"""What an equilibrium relaxes: a force `F(z; x)` with parameters, and its products at one state.

Shapes: `B` samples, `T` tokens, `C` channels, `H` heads; states and inputs are `(B, T, C)` for the
transformers here, and `(B, ...)` in general. Samples never interact.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from altprop.equilibrium.analytic import causal_attention, gelu, layer_norm, linear
from altprop.equilibrium.linearised import (
    LinearisedAttention,
    LinearisedFeedForward,
    LinearisedNorm,
)
from altprop.errors import ConfigError, RuleError


class AbstractLinearisation(ABC):
    """The products with a force's Jacobian `J = ∂F/∂z` at one state, `(B, ...) → (B, ...)`."""

    @abstractmethod
    def vjp(self, a: Tensor) -> Tensor:
        """Return `Jᵀa`, detached."""

    @abstractmethod
    def jvp(self, v: Tensor) -> Tensor:
        """Return `Jv`, detached."""


class AutogradLinearisation(AbstractLinearisation):
    """The products of any force, by automatic differentiation.

    **Arguments:** `force`, from a state `(B, ...)` to the force of that shape; `state`, where.
    """

    def __init__(self, force: Callable[[Tensor], Tensor], state: Tensor) -> None:
        self._force, self._state = force, state.detach()
        with torch.enable_grad():
            self._leaf = self._state.clone().requires_grad_()
            self._out = force(self._leaf)

    def vjp(self, a: Tensor) -> Tensor:
        if not self._out.requires_grad:
            return torch.zeros_like(a)
        (out,) = torch.autograd.grad(
            self._out, self._leaf, a, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return out

    def jvp(self, v: Tensor) -> Tensor:
        # the fused attention kernels have no forward-mode derivative
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # torch's first forward-mode call scripts its own decompositions, and warns of itself
            warnings.simplefilter("ignore", DeprecationWarning)
            pair: tuple[Tensor, ...] = torch.func.jvp(self._force, (self._state,), (v,))
        return pair[1]


class AbstractDynamics(nn.Module, ABC):
    """Base of every dynamics: `dynamics(z, x)` is the force `F(z; x, θ)`.

    The parameters are the module's. `step` is the `ε` for which `z + εF(z)` is the natural
    fixed-point map, `g(z)` in the stabiliser's terms.
    """

    step: float = 1.0

    @abstractmethod
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the force at state `z` under input `x`, both `(B, ...)`."""

    def start(self, x: Tensor) -> Tensor:
        """Return the state that the free phase starts from; `x` itself unless overridden."""
        return x

    def linearise(self, z: Tensor, x: Tensor) -> AbstractLinearisation:
        """Return the Jacobian's products at `z`; override it where closed forms are cheaper."""
        x = x.detach()
        return AutogradLinearisation(lambda state: self(state, x), z)

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the force continued analytically to a complex state `z`, under a real input `x`.

        Only `HolomorphicEP` asks for it. On real states it must equal the force, and complex
        conjugates nowhere enter it; `altprop.equilibrium.analytic` has the parts.

        **Raises:** `RuleError` where a dynamics has none, which is the default.
        """
        raise RuleError(
            f"{type(self).__name__} has no analytic force: HolomorphicEP relaxes complex states, "
            "on which torch defines no softmax, layer norm, GELU or fused attention, and relu has "
            "no continuation at all; give the dynamics a method analytic(z, x) made of the parts "
            "in altprop.equilibrium.analytic, or write estimator=AEP()"
        )


class CausalAttention(nn.Module):
    """Multi-head causal softmax attention with independent `W_Q, W_K, W_V, W_O` and no bias.

    **Arguments:** `d_model`, the width `C`; `heads`, which must divide it; `init_std`, the standard
    deviation of the normal initialisation.
    """

    def __init__(self, d_model: int, heads: int, init_std: float) -> None:
        super().__init__()
        if d_model < 1 or heads < 1 or d_model % heads:
            raise ConfigError(
                f"heads is {heads} and d_model is {d_model}: heads must divide d_model, "
                "for example heads=4 with d_model=128"
            )
        self.heads = heads
        self.W_Q, self.W_K, self.W_V, self.W_O = (
            nn.Parameter(init_std * torch.randn(d_model, d_model)) for _ in range(4)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Return the attention's output, `(B, T, C) → (B, T, C)`."""
        B, T, C = z.shape
        qkv = nnf.linear(z, torch.cat([self.W_Q, self.W_K, self.W_V]))
        q, k, v = qkv.view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nnf.scaled_dot_product_attention(q, k, v, is_causal=True)
        return nnf.linear(mixed.transpose(1, 2).reshape(B, T, C), self.W_O)

    @torch.no_grad()
    def linearise(self, z: Tensor) -> LinearisedAttention:
        """Return the attention linearised at `z`, `(B, T, C)`."""
        w_qkv = torch.cat([self.W_Q, self.W_K, self.W_V])
        return LinearisedAttention(z, w_qkv, self.W_O.detach(), self.heads)

    def analytic(self, z: Tensor) -> Tensor:
        """Return the attention's output at a complex state, `(B, T, C)`."""
        return causal_attention(z, self.W_Q, self.W_K, self.W_V, self.W_O, self.heads)

    def extra_repr(self) -> str:
        return f"d_model={self.W_Q.shape[0]}, heads={self.heads}"


class DampedAttention(AbstractDynamics):
    """Damped attention, `F(z; x) = −(z − x) + s(Attn(z) − c z)`.

    The reference dynamics of the field (Scurria et al., arXiv 2602.03670). Its Jacobian is not
    symmetric, so naive equilibrium propagation is biased on it. To train a language model prefer
    `GatedBlock`: without a stabiliser this one loses its fixed point.

    **Arguments:** `d_model`, the width `C`; `heads`; `scale`, `s`; `damping`, `c`. Weights start at
    `N(0, 1/C)`. **Input and state:** `(B, T, C)`.
    """

    def __init__(self, d_model: int, heads: int, scale: float = 1.0, damping: float = 1.0) -> None:
        super().__init__()
        if not 1 + scale * damping > 0:
            raise ConfigError(
                f"scale is {scale} and damping is {damping}: 1 + scale × damping must be positive, "
                "or nothing pulls the state back"
            )
        self.scale, self.damping = scale, damping
        self.step = 1 / (1 + scale * damping)
        self.attention = CausalAttention(d_model, heads, init_std=d_model**-0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - (1 + self.scale * self.damping) * z + self.scale * self.attention(z)

    def linearise(self, z: Tensor, x: Tensor) -> AbstractLinearisation:
        return _LinearisedDamping(
            self.attention.linearise(z), self.scale, 1 + self.scale * self.damping
        )

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        attended = self.scale * self.attention.analytic(z)
        return x - (1 + self.scale * self.damping) * z + attended

    def extra_repr(self) -> str:
        return f"scale={self.scale}, damping={self.damping}"


class GatedBlock(AbstractDynamics):
    """A pre-norm transformer block whose fed-back part passes through a learned gate.

    `w = x + α ⊙ (z − x)`, `u = x + Attn(LN₁ w)`, `g(z) = u + FFN(LN₂ u)`, `F = g(z) − z`. At its
    initialisation `α = 0` it is exactly the ordinary feed-forward block; learning raises the gate
    as far as feedback pays, so train it with `JacobianHinge`, or the fixed point gets lost.

    **Arguments:** `d_model`, the width `C`; `heads`; `expansion`, the width of the feed-forward
    part in multiples of `C`; `init_std`, of every weight. **Input and state:** `(B, T, C)`.
    """

    def __init__(
        self, d_model: int, heads: int, expansion: int = 4, init_std: float = 0.02
    ) -> None:
        super().__init__()
        if expansion < 1:
            raise ConfigError(f"expansion is {expansion}, expected at least 1")
        self.alpha = nn.Parameter(torch.zeros(d_model))
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = CausalAttention(d_model, heads, init_std)
        self.norm2 = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, expansion * d_model)
        self.down = nn.Linear(expansion * d_model, d_model)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        w = x + self.alpha * (z - x)
        u = x + self.attention(self.norm1(w))
        return u + self.down(nnf.gelu(self.up(self.norm2(u)))) - z

    def linearise(self, z: Tensor, x: Tensor) -> AbstractLinearisation:
        return _LinearisedGate(self, z, x)

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        one, two = self.norm1, self.norm2
        w = x + self.alpha * (z - x)
        u = x + self.attention.analytic(layer_norm(w, one.weight, one.bias, one.eps))
        h = linear(layer_norm(u, two.weight, two.bias, two.eps), self.up.weight, self.up.bias)
        return u + linear(gelu(h), self.down.weight, self.down.bias) - z


class _LinearisedDamping(AbstractLinearisation):
    """`J = s A − (1 + sc) I` with the attention's Jacobian `A`."""

    def __init__(self, attention: LinearisedAttention, scale: float, leak: float) -> None:
        self._attention, self._scale, self._leak = attention, scale, leak

    @torch.no_grad()
    def vjp(self, a: Tensor) -> Tensor:
        return self._scale * self._attention.vjp(a) - self._leak * a

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        return self._scale * self._attention.jvp(v) - self._leak * v


class _LinearisedGate(AbstractLinearisation):
    """`J = (I + E N₂) A N₁ diag(α) − I`, by the parts' own Jacobians."""

    @torch.no_grad()
    def __init__(self, block: GatedBlock, z: Tensor, x: Tensor) -> None:
        self._alpha = block.alpha.detach()
        one, two = block.norm1, block.norm2
        w = x + self._alpha * (z - x)
        self._norm1 = LinearisedNorm(w, one.weight.detach(), one.bias.detach(), one.eps)
        self._attention = block.attention.linearise(self._norm1.value)
        u = x + self._attention.value
        self._norm2 = LinearisedNorm(u, two.weight.detach(), two.bias.detach(), two.eps)
        self._feed_forward = LinearisedFeedForward(
            self._norm2.value,
            block.up.weight.detach(),
            block.up.bias.detach(),
            block.down.weight.detach(),
        )

    @torch.no_grad()
    def vjp(self, a: Tensor) -> Tensor:
        du = a + self._norm2.vjp(self._feed_forward.vjp(a))
        return self._alpha * self._norm1.vjp(self._attention.vjp(du)) - a

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        du = self._attention.jvp(self._norm1.jvp(self._alpha * v))
        return du + self._feed_forward.jvp(self._norm2.jvp(du)) - v
