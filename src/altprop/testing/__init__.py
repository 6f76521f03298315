"""The contracts that every part of altprop keeps, as functions to call on parts of your own.

`check_rule(MyRule())` in a test of yours says, in words, which promise is broken.
"""

from altprop.testing.dynamics import check_dynamics as check_dynamics
from altprop.testing.equilibrium import check_estimator as check_estimator
from altprop.testing.equilibrium import check_solver as check_solver
from altprop.testing.rules import check_distributed as check_distributed
from altprop.testing.rules import check_rule as check_rule

__all__ = ["check_distributed", "check_dynamics", "check_estimator", "check_rule", "check_solver"]
