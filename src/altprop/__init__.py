"""Learning rules other than backprop, for PyTorch.

The forward pass is untouched; a learning rule decides what `.backward()` writes into `.grad`.
The names below are the whole public product. They are resolved on first use, so that
`import altprop` costs no more than reading this list.
"""

from __future__ import annotations

import ast
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:  # read by type checkers, by editors, and by the function below
    from altprop.auditing.agreement import Agreement as Agreement, compare as compare
    from altprop.auditing.arms import (
        AbstractArm as AbstractArm,
        Arm as Arm,
        Installed as Installed,
        RuleArm as RuleArm,
    )
    from altprop.auditing.audit import audit as audit, audit_trials as audit_trials
    from altprop.auditing.measure import (
        Trial as Trial,
        finite_difference_errors as finite_difference_errors,
    )
    from altprop.auditing.report import AuditReport as AuditReport
    from altprop.auditing.step import (
        StepAudit as StepAudit,
        StepRow as StepRow,
        Verdict as Verdict,
        audit_step as audit_step,
    )
    from altprop.auditing.watch import (
        Read as Read,
        Reading as Reading,
        Watched as Watched,
        watch as watch,
    )
    from altprop.conversion.convert import (
        convert as convert,
        revert as revert,
        rules_off as rules_off,
    )
    from altprop.conversion.layers import register_layer as register_layer
    from altprop.conversion.targets import (
        Target as Target,
        Targets as Targets,
        targets as targets,
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
    from altprop.equilibrium.dynamics.thick import ThickBlock as ThickBlock
    from altprop.errors import (
        AltpropError as AltpropError,
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        ConvergenceError as ConvergenceError,
        DataError as DataError,
        ProcessError as ProcessError,
        RuleError as RuleError,
        RuleWarning as RuleWarning,
    )
    from altprop.parts import Part as Part, seeing as seeing
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
    from altprop.loading import LoadedRun as LoadedRun, load as load
    from altprop.sharing.pretrained import (
        from_pretrained as from_pretrained,
        save_pretrained as save_pretrained,
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


def _listed() -> dict[str, str]:
    """Return the names of the list above and the module of each, importing none of them."""
    with open(__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    table = {alias.name: node.module or "" for node in nodes for alias in node.names}
    return {name: module for name, module in table.items() if module.startswith("altprop.")}


_WHERE = _listed()

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'altprop' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
