"""Is the hypergradient right, on the user's own loop? And is a rule the step that its optimizer takes?"""

from __future__ import annotations

__all__ = ["Report", "RuleReport", "Watch", "hypergradcheck", "rulecheck"]

from metaopt.check.hypergradient import hypergradcheck
from metaopt.check.report import Report
from metaopt.check.rule import RuleReport, rulecheck
from metaopt.check.training import Watch


def __dir__() -> list[str]:
    return __all__
