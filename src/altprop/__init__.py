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
    from altprop.auditing.agreement import Agreement as Agreement, compare as compare
    from altprop.auditing.report import AuditReport as AuditReport
    from altprop.auditing.audit import (
        AbstractArm as AbstractArm,
        Arm as Arm,
        RuleArm as RuleArm,
        Trial as Trial,
        audit as audit,
        audit_trials as audit_trials,
        finite_difference_errors as finite_difference_errors,
    )
    from altprop.conversion.convert import (
        convert as convert,
        revert as revert,
        rules_off as rules_off,
    )
    from altprop.equilibrium.dynamics.attention import CausalAttention as CausalAttention
    from altprop.equilibrium.gate_hinge import GateHinge as GateHinge
    from altprop.equilibrium.dynamics.damped import DampedAttention as DampedAttention
    from altprop.equilibrium.dynamics.dynamics import AbstractDynamics as AbstractDynamics
    from altprop.equilibrium.dynamics.system import Extension as Extension
    from altprop.equilibrium.estimators.aep import AEP as AEP
    from altprop.equilibrium.estimators.bptt import BPTT as BPTT
    from altprop.equilibrium.estimators.dyadic import DyadicEP as DyadicEP
    from altprop.equilibrium.estimators.ep import EP as EP
    from altprop.equilibrium.estimators.estimator import (
        AbstractAdjointEstimator as AbstractAdjointEstimator,
        AbstractEstimator as AbstractEstimator,
    )
    from altprop.equilibrium.estimators.holomorphic import HolomorphicEP as HolomorphicEP
    from altprop.equilibrium.estimators.implicit import Implicit as Implicit
    from altprop.equilibrium.estimators.one_step import OneStep as OneStep
    from altprop.equilibrium.estimators.problem import Certificate as Certificate
    from altprop.equilibrium.estimators.published import (
        PublishedAEP as PublishedAEP,
        PublishedEP as PublishedEP,
    )
    from altprop.equilibrium.dynamics.function import from_function as from_function
    from altprop.equilibrium.dynamics.gated import GatedBlock as GatedBlock
    from altprop.equilibrium.dynamics.gated_stack import GatedStack as GatedStack
    from altprop.equilibrium.dynamics.hopfield import HopfieldMemory as HopfieldMemory
    from altprop.equilibrium.dynamics.layered import Layered as Layered
    from altprop.equilibrium.module import (
        Equilibrium as Equilibrium,
        equilibria as equilibria,
        using as using,
    )
    from altprop.equilibrium.dynamics.products import (
        AbstractEvaluation as AbstractEvaluation,
        AbstractLinearisation as AbstractLinearisation,
    )
    from altprop.equilibrium.solvers.adaptive import Adaptive as Adaptive, Moment as Moment
    from altprop.equilibrium.solvers.anderson import Anderson as Anderson
    from altprop.equilibrium.solvers.euler import Euler as Euler
    from altprop.equilibrium.solvers.fallback import Fallback as Fallback
    from altprop.equilibrium.solvers.fixed_point import FixedPoint as FixedPoint
    from altprop.equilibrium.solvers.gmres import GMRES as GMRES
    from altprop.equilibrium.solvers.newton import NewtonKrylov as NewtonKrylov
    from altprop.equilibrium.solvers.scattered import Scattered as Scattered
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
    from altprop.equilibrium.hinge import (
        AbstractStabiliser as AbstractStabiliser,
        JacobianHinge as JacobianHinge,
    )
    from altprop.conversion.stack import (
        convert_stack as convert_stack,
        explain_stack as explain_stack,
        revert_stack as revert_stack,
    )
    from altprop.equilibrium.dynamics.thick import ThickBlock as ThickBlock
    from altprop.errors import (
        AltpropError as AltpropError,
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        ConvergenceError as ConvergenceError,
        DataError as DataError,
        RuleError as RuleError,
        RuleWarning as RuleWarning,
    )
    from altprop.conversion.explain import explain as explain
    from altprop.conversion.learned import (
        add_feedback as add_feedback,
        feedback_parameters as feedback_parameters,
    )
    from altprop.linear import (
        LinearFA as LinearFA,
        LinearSignSym as LinearSignSym,
        LocalLinear as LocalLinear,
        apply_dfa_block_update as apply_dfa_block_update,
        apply_dfa_update as apply_dfa_update,
        initialize_dfa_block_targets as initialize_dfa_block_targets,
        initialize_dfa_targets as initialize_dfa_targets,
    )
    from altprop.rule import (
        AbstractBroadcast as AbstractBroadcast,
        AbstractRule as AbstractRule,
        AbstractTransport as AbstractTransport,
        Site as Site,
    )
    from altprop.rules.aligned import AlignedFeedback as AlignedFeedback
    from altprop.rules.backprop import Backprop as Backprop
    from altprop.rules.block_direct import BlockDirectFeedback as BlockDirectFeedback
    from altprop.rules.direct import DirectFeedback as DirectFeedback
    from altprop.rules.feedback_alignment import FeedbackAlignment as FeedbackAlignment
    from altprop.rules.grape import GrAPE as GrAPE
    from altprop.rules.kolen_pollack import KolenPollack as KolenPollack
    from altprop.rules.sign_symmetry import SignSymmetry as SignSymmetry
    from altprop.rules.weight_mirror import WeightMirror as WeightMirror

_EXPORTS = {
    "altprop.auditing.agreement": "Agreement compare",
    "altprop.auditing.report": "AuditReport",
    "altprop.auditing.audit": (
        "AbstractArm Arm RuleArm Trial audit audit_trials finite_difference_errors"
    ),
    "altprop.conversion.convert": "convert revert rules_off",
    "altprop.equilibrium.dynamics.attention": "CausalAttention",
    "altprop.equilibrium.gate_hinge": "GateHinge",
    "altprop.equilibrium.dynamics.damped": "DampedAttention",
    "altprop.equilibrium.dynamics.dynamics": "AbstractDynamics",
    "altprop.equilibrium.dynamics.system": "Extension",
    "altprop.equilibrium.estimators.aep": "AEP",
    "altprop.equilibrium.estimators.bptt": "BPTT",
    "altprop.equilibrium.estimators.dyadic": "DyadicEP",
    "altprop.equilibrium.estimators.ep": "EP",
    "altprop.equilibrium.estimators.estimator": "AbstractAdjointEstimator AbstractEstimator",
    "altprop.equilibrium.estimators.problem": "Certificate",
    "altprop.equilibrium.estimators.holomorphic": "HolomorphicEP",
    "altprop.equilibrium.estimators.implicit": "Implicit",
    "altprop.equilibrium.estimators.one_step": "OneStep",
    "altprop.equilibrium.estimators.published": "PublishedAEP PublishedEP",
    "altprop.equilibrium.dynamics.function": "from_function",
    "altprop.equilibrium.dynamics.gated": "GatedBlock",
    "altprop.equilibrium.dynamics.gated_stack": "GatedStack",
    "altprop.equilibrium.dynamics.hopfield": "HopfieldMemory",
    "altprop.equilibrium.dynamics.layered": "Layered",
    "altprop.equilibrium.module": "Equilibrium equilibria using",
    "altprop.equilibrium.dynamics.products": "AbstractEvaluation AbstractLinearisation",
    "altprop.equilibrium.solvers.adaptive": "Adaptive Moment",
    "altprop.equilibrium.solvers.anderson": "Anderson",
    "altprop.equilibrium.solvers.euler": "Euler",
    "altprop.equilibrium.solvers.fallback": "Fallback",
    "altprop.equilibrium.solvers.fixed_point": "FixedPoint",
    "altprop.equilibrium.solvers.gmres": "GMRES",
    "altprop.equilibrium.solvers.newton": "NewtonKrylov",
    "altprop.equilibrium.solvers.scattered": "Scattered",
    "altprop.equilibrium.solvers.solver": "AbstractSolver Result Solution",
    "altprop.equilibrium.spectra": "Spectrum numerical_abscissa spectrum token_spectrum",
    "altprop.equilibrium.hinge": "AbstractStabiliser JacobianHinge",
    "altprop.conversion.stack": "convert_stack explain_stack revert_stack",
    "altprop.equilibrium.dynamics.thick": "ThickBlock",
    "altprop.errors": (
        "AltpropError CheckpointError ConfigError ConvergenceError DataError RuleError RuleWarning"
    ),
    "altprop.conversion.explain": "explain",
    "altprop.conversion.learned": "add_feedback feedback_parameters",
    "altprop.linear": (
        "LinearFA LinearSignSym LocalLinear apply_dfa_block_update apply_dfa_update "
        "initialize_dfa_block_targets initialize_dfa_targets"
    ),
    "altprop.rule": "AbstractBroadcast AbstractRule AbstractTransport Site",
    "altprop.rules.aligned": "AlignedFeedback",
    "altprop.rules.backprop": "Backprop",
    "altprop.rules.block_direct": "BlockDirectFeedback",
    "altprop.rules.direct": "DirectFeedback",
    "altprop.rules.feedback_alignment": "FeedbackAlignment",
    "altprop.rules.grape": "GrAPE",
    "altprop.rules.kolen_pollack": "KolenPollack",
    "altprop.rules.sign_symmetry": "SignSymmetry",
    "altprop.rules.weight_mirror": "WeightMirror",
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
