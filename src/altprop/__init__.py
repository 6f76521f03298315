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
    from altprop.equilibrium.dynamics import (
        AbstractDynamics as AbstractDynamics,
        CausalAttention as CausalAttention,
        AbstractLinearisation as AbstractLinearisation,
        DampedAttention as DampedAttention,
        Extension as Extension,
        GatedBlock as GatedBlock,
    )
    from altprop.equilibrium.function import from_function as from_function
    from altprop.equilibrium.hopfield import HopfieldMemory as HopfieldMemory
    from altprop.equilibrium.layered import Layered as Layered
    from altprop.equilibrium.thick import ThickBlock as ThickBlock
    from altprop.equilibrium.estimators.aep import AEP as AEP
    from altprop.equilibrium.estimators.bptt import BPTT as BPTT
    from altprop.equilibrium.estimators.dyadic import DyadicEP as DyadicEP
    from altprop.equilibrium.estimators.ep import EP as EP
    from altprop.equilibrium.estimators.estimator import (
        AbstractEstimator as AbstractEstimator,
        Certificate as Certificate,
    )
    from altprop.equilibrium.estimators.holomorphic import HolomorphicEP as HolomorphicEP
    from altprop.equilibrium.estimators.implicit import Implicit as Implicit
    from altprop.equilibrium.estimators.one_step import OneStep as OneStep
    from altprop.equilibrium.estimators.published import (
        PublishedAEP as PublishedAEP,
        PublishedEP as PublishedEP,
    )
    from altprop.equilibrium.module import (
        Equilibrium as Equilibrium,
        equilibria as equilibria,
        using as using,
    )
    from altprop.equilibrium.solvers.adaptive import Adaptive as Adaptive, Moment as Moment
    from altprop.equilibrium.solvers.anderson import Anderson as Anderson
    from altprop.equilibrium.solvers.euler import Euler as Euler
    from altprop.equilibrium.solvers.fallback import Fallback as Fallback
    from altprop.equilibrium.solvers.gmres import GMRES as GMRES
    from altprop.equilibrium.solvers.newton import NewtonKrylov as NewtonKrylov
    from altprop.equilibrium.solvers.solver import (
        AbstractSolver as AbstractSolver,
        Result as Result,
        Solution as Solution,
    )
    from altprop.equilibrium.spectra import (
        Spectrum as Spectrum,
        numerical_abscissa as numerical_abscissa,
        spectrum as spectrum,
        token_spectrum as token_spectrum,
    )
    from altprop.equilibrium.stability import (
        AbstractStabiliser as AbstractStabiliser,
        JacobianHinge as JacobianHinge,
    )
    from altprop.equilibrium.stack import (
        convert_stack as convert_stack,
        explain_stack as explain_stack,
        revert_stack as revert_stack,
    )
    from altprop.rule import AbstractRule as AbstractRule

_EXPORTS = {
    "altprop.errors": (
        "AltpropError CheckpointError ConfigError ConvergenceError DataError RuleError"
    ),
    "altprop.rule": "AbstractRule",
    "altprop.equilibrium.dynamics": (
        "AbstractDynamics AbstractLinearisation CausalAttention DampedAttention Extension "
        "GatedBlock"
    ),
    "altprop.equilibrium.function": "from_function",
    "altprop.equilibrium.hopfield": "HopfieldMemory",
    "altprop.equilibrium.layered": "Layered",
    "altprop.equilibrium.thick": "ThickBlock",
    "altprop.equilibrium.spectra": "Spectrum numerical_abscissa spectrum token_spectrum",
    "altprop.equilibrium.stack": "convert_stack explain_stack revert_stack",
    "altprop.equilibrium.module": "Equilibrium equilibria using",
    "altprop.equilibrium.stability": "AbstractStabiliser JacobianHinge",
    "altprop.equilibrium.solvers.solver": "AbstractSolver Result Solution",
    "altprop.equilibrium.solvers.adaptive": "Adaptive Moment",
    "altprop.equilibrium.solvers.anderson": "Anderson",
    "altprop.equilibrium.solvers.euler": "Euler",
    "altprop.equilibrium.solvers.fallback": "Fallback",
    "altprop.equilibrium.solvers.gmres": "GMRES",
    "altprop.equilibrium.solvers.newton": "NewtonKrylov",
    "altprop.equilibrium.estimators.estimator": "AbstractEstimator Certificate",
    "altprop.equilibrium.estimators.aep": "AEP",
    "altprop.equilibrium.estimators.bptt": "BPTT",
    "altprop.equilibrium.estimators.dyadic": "DyadicEP",
    "altprop.equilibrium.estimators.ep": "EP",
    "altprop.equilibrium.estimators.holomorphic": "HolomorphicEP",
    "altprop.equilibrium.estimators.implicit": "Implicit",
    "altprop.equilibrium.estimators.one_step": "OneStep",
    "altprop.equilibrium.estimators.published": "PublishedAEP PublishedEP",
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
