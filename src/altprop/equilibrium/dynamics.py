"""What an equilibrium relaxes: a force `F(z; x)` with parameters, and its products at one state.

Shapes: `B` samples, `T` tokens, `C` channels, `H` heads; states and inputs are `(B, T, C)` for the
transformers here, and `(B, ...)` in general. Samples never interact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from altprop.equilibrium import analytic
from altprop.equilibrium.driven import Driven
from altprop.equilibrium.linearised import (
    LinearisedAttention,
    LinearisedFeedForward,
    linearise_norm,
    summed,
)
from altprop.equilibrium.plain import FORCE, consists_of, evaluates, is_watched
from altprop.equilibrium.products import (
    AbstractEvaluation,
    AbstractLinearisation,
    AutogradLinearisation,
    Gradients,
    record,
)
from altprop.errors import ConfigError, RuleError


class AbstractDynamics(nn.Module, ABC):
    """Base of every dynamics: `dynamics(z, x)` is the force `F(z; x, θ)`.

    The parameters are the module's. `step` is the `ε` for which `z + εF(z)` is the natural
    fixed-point map, `g(z)` in the stabiliser's terms.
    """

    step: float = 1.0
    draws: bool | Literal["replayed", "fresh"] = False
    """What random numbers in the force mean: `"replayed"` (or True), the same ones in all
    evaluations of a call, as dropout's always are, or `"fresh"`, noise that is new in each."""
    feedforward: bool = False
    """Whether nothing feeds back, so that the fixed point cannot be lost."""
    margin: float = 0.3
    """How large the gain `‖J_gᵀv‖` may grow before a stabiliser pushes it back."""

    @property
    def gate(self) -> nn.Parameter | None:
        """The parameter that all feedback is multiplied by, where there is one."""
        return None

    prefix: int = 0
    """How many first tokens of a window are solved before the others; 0 for none.

    For causal dynamics alone, with states `(B, T, C)`. It saves evaluations where the first tokens
    have the slowest modes: attention that averages gives token `t` a `t`-th of its own feedback.
    """

    @abstractmethod
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the force at state `z` under input `x`, both `(B, ...)`."""

    def uses(self) -> Iterable[nn.Module]:
        """Return the modules that the force calls: its own, and any that it closes over."""
        return self.modules()

    def under(self, x: Tensor, *args: Any, **kwargs: Any) -> Driven:
        """Return this dynamics under one input; what else is given goes to every force."""
        return Driven(self, x, args, kwargs)

    def extend(self, cache: Any, x: Tensor) -> Extension:
        """Return what solves new tokens alone, where earlier ones do not depend on them.

        **Arguments:** `cache`, of the earlier tokens (`None`: there are none); `x`, the new
        tokens' input, `(B, t, C)`.

        **Raises:** `RuleError` for a dynamics that is not causal or has no cache.
        """
        raise RuleError(
            f"{type(self).__name__} keeps no cache of earlier tokens: solve the whole window "
            "anew, or give the dynamics an extend(cache, x) method"
        )

    def start(self, x: Tensor) -> Tensor:
        """Return the state that the free phase starts from; `x` itself unless overridden."""
        return x

    def evaluate(self, z: Tensor, x: Tensor) -> AbstractEvaluation | None:
        """Return the force, its products and all its gradients at `z`; `None` for no closed form.

        Override it where closed forms are cheaper than automatic differentiation. It counts for
        the force of the class that defines it: a subclass with another one has none. Where there
        are hooks or parametrisations, the recorded force is the ordinary one.
        """
        return None

    def linearise(self, z: Tensor, x: Tensor) -> AbstractLinearisation:
        """Return the Jacobian's products at `z`; override it for closed forms of these alone."""
        x = x.detach()
        made = self.evaluate(z.detach(), x) if evaluates(self, FORCE) else None
        return AutogradLinearisation(lambda state: self(state, x), z) if made is None else made

    def record(self, z: Tensor, x: Tensor) -> tuple[Tensor, Callable[[], AbstractLinearisation]]:
        """Return the force at `z`, recorded for autograd, and what linearises it there."""
        z = z.detach()
        closed = evaluates(self, FORCE | {"linearise"}) and not is_watched(self)
        made = self.evaluate(z, x) if closed else None
        if made is None:
            return self(z, x), partial(self.linearise, z, x.detach())
        return record(made, partial(self.linearise, z, x))

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


class Extension(NamedTuple):
    """New tokens beside a cache.

    `force`: of the new tokens alone, `(B, t, C) → (B, t, C)`. `remember`: from their equilibrium to
    the cache with them in it; the cache that was given stays as it is.
    """

    force: Callable[[Tensor], Tensor]
    remember: Callable[[Tensor], Any]


class KeyValues(NamedTuple):
    """The keys and values of earlier tokens, both `(B, H, S, D)`."""

    keys: Tensor
    values: Tensor


class CausalAttention(nn.Module):
    """Multi-head causal softmax attention with independent `W_Q, W_K, W_V, W_O` and no bias.

    **Arguments:** `d_model`, the width `C`; `heads`, which must divide it; `init_std`, the standard
    deviation of the normal initialisation; `qk_norm`, whether queries and keys are normed per head
    (RMS, with a learned gain per channel), which bounds the attention's logits.
    """

    def __init__(self, d_model: int, heads: int, init_std: float, qk_norm: bool = False) -> None:
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

        own = d_model // heads
        self.norm_q = nn.RMSNorm(own, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(own, eps=1e-6) if qk_norm else None

    def forward(self, z: Tensor) -> Tensor:
        """Return the attention's output, `(B, T, C) → (B, T, C)`."""
        return self._merge(nnf.scaled_dot_product_attention(*self._project(z), is_causal=True))

    def extend(self, z: Tensor, cache: KeyValues | None) -> Tensor:
        """Return the output of new tokens, `(B, t, C)`, that attend to a cache and each other."""
        if cache is None:
            return self.forward(z)
        q, k, v = self._project(z)
        t, S = k.shape[2], cache.keys.shape[2]
        scores = torch.cat([q @ cache.keys.mT, q @ k.mT], dim=-1) * q.shape[-1] ** -0.5
        if t > 1:
            future = torch.ones(t, S + t, dtype=torch.bool, device=z.device).triu_(S + 1)
            scores = scores.masked_fill(future, -torch.inf)
        p = scores.softmax(-1)
        return self._merge(p[..., :S] @ cache.values + p[..., S:] @ v)

    def remember(self, z: Tensor, cache: KeyValues | None) -> KeyValues:
        """Return the cache with the keys and values of new tokens, `(B, t, C)`, at its end."""
        _, k, v = self._project(z)
        if cache is None:
            return KeyValues(k, v)
        return KeyValues(torch.cat([cache.keys, k], 2), torch.cat([cache.values, v], 2))

    @torch.no_grad()
    def linearise(self, read: Callable[[], Tensor]) -> LinearisedAttention:
        """Return the attention linearised at the `(B, T, C)` state that `read` returns."""
        weights = self.W_Q, self.W_K, self.W_V, self.W_O
        return LinearisedAttention(read, weights, self.heads, self._norms())

    def _norms(self) -> tuple[nn.RMSNorm, nn.RMSNorm] | None:
        if self.norm_q is None or self.norm_k is None:
            return None
        return self.norm_q, self.norm_k

    def _project(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, C = z.shape
        qkv = nnf.linear(z, torch.cat([self.W_Q, self.W_K, self.W_V]))
        q, k, v = qkv.view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        norms = self._norms()
        if norms is not None:
            q, k = norms[0](q), norms[1](k)
        return q, k, v

    def _merge(self, mixed: Tensor) -> Tensor:
        return nnf.linear(mixed.transpose(1, 2).flatten(2), self.W_O)

    def analytic(self, z: Tensor) -> Tensor:
        """Return the attention's output at a complex state, `(B, T, C)`."""
        weights = self.W_Q, self.W_K, self.W_V, self.W_O
        return analytic.causal_attention(z, *weights, self.heads, self._norms())

    def extra_repr(self) -> str:
        return f"d_model={self.W_Q.shape[0]}, heads={self.heads}"


def feed_forward(x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
    """Return `down(gelu(up(x)))`, `(..., C) → (..., C)`; in place where nobody sees it."""
    h = up(x)
    own = not torch.is_grad_enabled() and type(up) is nn.Linear and not is_watched(up)
    return down(torch.ops.aten.gelu_(h) if own else nnf.gelu(h))


PARTS = (CausalAttention, nn.Linear, nn.LayerNorm, nn.RMSNorm)  # what has closed forms


class AbstractAttentive(AbstractDynamics):
    """Base of the causal dynamics with one attention; from it they get their exact cache.

    An equilibrium of such a dynamics never depends on later tokens, and on earlier ones only
    through the keys and values of their equilibria.
    """

    attention: CausalAttention

    def linearise(self, z: Tensor, x: Tensor) -> AbstractLinearisation:
        # an override that calls this one asks for the products of the force it overrides
        asked = type(self).linearise is not AbstractAttentive.linearise
        made = self.evaluate(z.detach(), x.detach()) if asked else None
        return super().linearise(z, x) if made is None else made

    @abstractmethod
    def attended(self, z: Tensor, x: Tensor) -> Tensor:
        """Return what the attention reads at state `z` under input `x`, all `(B, T, C)`."""

    @abstractmethod
    def combine(self, z: Tensor, x: Tensor, mixed: Tensor) -> Tensor:
        """Return the force, given what the attention made of it, `mixed`, `(B, T, C)`."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.combine(z, x, self.attention(self.attended(z, x)))

    def extend(self, cache: KeyValues | None, x: Tensor) -> Extension:
        return Extension(
            lambda z: self.combine(z, x, self.attention.extend(self.attended(z, x), cache)),
            lambda z: self.attention.remember(self.attended(z, x), cache),
        )


class DampedAttention(AbstractAttentive):
    """Damped attention, `F(z; x) = −(z − x) + s(Attn(z) − c z)`.

    The reference dynamics of the field (Scurria et al., arXiv 2602.03670). Its Jacobian is not
    symmetric, so naive equilibrium propagation is biased on it. To train a language model prefer
    `GatedBlock`: without a stabiliser this one loses its fixed point.

    **Arguments:** `d_model`, the width `C`; `heads`; `scale`, `s`; `damping`, `c`. Weights start at
    `N(0, 1/C)`. **Input and state:** `(B, T, C)`.
    """

    margin = 0.5  # no gate: what pushes the gain back weakens all that the attention does
    prefix = 8  # a quarter fewer evaluations at its initialisation, a sixth fewer once trained

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

    def attended(self, z: Tensor, x: Tensor) -> Tensor:
        return z

    def combine(self, z: Tensor, x: Tensor, mixed: Tensor) -> Tensor:
        pulled = torch.sub(x, z, alpha=1 + self.scale * self.damping)
        return torch.add(pulled, mixed, alpha=self.scale)

    def evaluate(self, z: Tensor, x: Tensor) -> AbstractEvaluation | None:
        return _DampedEvaluation(self, z, x) if consists_of(self, PARTS) else None

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        attended = self.scale * self.attention.analytic(z)
        return x - (1 + self.scale * self.damping) * z + attended

    def extra_repr(self) -> str:
        return f"scale={self.scale}, damping={self.damping}"


class GatedBlock(AbstractAttentive):
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

    @property
    def gate(self) -> nn.Parameter:
        return self.alpha

    def attended(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm1(x + self.alpha * (z - x))

    def combine(self, z: Tensor, x: Tensor, mixed: Tensor) -> Tensor:
        u = x + mixed
        return u + feed_forward(self.norm2(u), self.up, self.down) - z

    def evaluate(self, z: Tensor, x: Tensor) -> AbstractEvaluation | None:
        return _GatedEvaluation(self, z, x) if consists_of(self, PARTS) else None

    def analytic(self, z: Tensor, x: Tensor) -> Tensor:
        w = x + self.alpha * (z - x)
        u = x + self.attention.analytic(analytic.apply_norm(self.norm1, w))
        normed = analytic.apply_norm(self.norm2, u)
        return u + analytic.feed_forward(normed, self.up, self.down) - z


class _DampedEvaluation(AbstractEvaluation):
    """`J = s A − (1 + sc) I` with the attention's Jacobian `A`."""

    tells_tokens = True

    @torch.no_grad()
    def __init__(self, dynamics: DampedAttention, z: Tensor, x: Tensor) -> None:
        self._z, self._x = z, x.detach()
        self._scale, self._leak = dynamics.scale, 1 + dynamics.scale * dynamics.damping
        self._attention = dynamics.attention.linearise(lambda: z)
        self.sources = (x, *self._attention.sources)

    @torch.no_grad()
    def force(self) -> Tensor:
        pulled = torch.sub(self._x, self._z, alpha=self._leak)
        return pulled.add_(self._attention.value, alpha=self._scale)

    @torch.no_grad()
    def vjp(self, a: Tensor) -> Tensor:
        return self._attention.vjp(a).mul_(self._scale).sub_(a, alpha=self._leak)

    @torch.no_grad()
    def own_vjp(self, a: Tensor) -> Tensor:
        return self._attention.own_vjp(a).mul_(self._scale).sub_(a, alpha=self._leak)

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        return self._attention.jvp(v).mul_(self._scale).sub_(v, alpha=self._leak)

    def pull(self, a: Tensor) -> Gradients:
        pulled = a if self._scale == 1 else self._scale * a
        return a, *self._attention.pull(pulled)[1]


class _GatedEvaluation(AbstractEvaluation):
    """`J = (I + E N₂) A N₁ diag(α) − I`, by the parts' own Jacobians."""

    tells_tokens = True

    @torch.no_grad()
    def __init__(self, block: GatedBlock, z: Tensor, x: Tensor) -> None:
        self._z, self._x, self._alpha = z, x.detach(), block.alpha.detach()
        w = self._x + self._alpha * (z - self._x)
        self._norm1 = norm1 = linearise_norm(block.norm1, w)
        self._attention = block.attention.linearise(lambda: norm1.value)
        self._u = self._x + self._attention.value
        self._norm2 = norm2 = linearise_norm(block.norm2, self._u)
        self._feed_forward = LinearisedFeedForward(lambda: norm2.value, block.up, block.down)
        parts = self._norm1, self._attention, self._norm2, self._feed_forward
        self.sources = (x, block.alpha, *(s for part in parts for s in part.sources))

    @torch.no_grad()
    def force(self) -> Tensor:
        return self._u + self._feed_forward.value - self._z

    @torch.no_grad()
    def vjp(self, a: Tensor) -> Tensor:
        du = a + self._norm2.vjp(self._feed_forward.vjp(a))
        return self._alpha * self._norm1.vjp(self._attention.vjp(du)) - a

    @torch.no_grad()
    def own_vjp(self, a: Tensor) -> Tensor:
        du = a + self._norm2.vjp(self._feed_forward.vjp(a))
        return self._alpha * self._norm1.vjp(self._attention.own_vjp(du)) - a

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        du = self._attention.jvp(self._norm1.jvp(self._alpha * v))
        return du + self._feed_forward.jvp(self._norm2.jvp(du)) - v

    def pull(self, a: Tensor) -> Gradients:
        carried, feed_forward = self._feed_forward.pull(a)
        carried, norm2 = self._norm2.pull(carried)
        du = a + carried
        carried, attention = self._attention.pull(du)
        dw, norm1 = self._norm1.pull(carried)
        to_x = du + (1 - self._alpha) * dw
        to_alpha = summed(dw * (self._z - self._x))
        return to_x, to_alpha, *norm1, *attention, *norm2, *feed_forward
