"""The contracts of altprop's parts, public, so that anyone can test a part of their own."""

from altprop.testing.rules import check_distributed, check_rule

__all__ = ["check_distributed", "check_rule"]
