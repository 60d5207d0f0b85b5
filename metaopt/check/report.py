"""What a check found: which derivatives differ, by how much, and why they may."""

from __future__ import annotations

__all__ = ["Cause", "Report", "Row"]

from dataclasses import dataclass, field
from typing import NamedTuple


class Cause(NamedTuple):
    """A likely cause: a word to know it by, and a sentence that says what to do."""

    kind: str
    text: str


@dataclass(frozen=True)
class Row:
    """One derivative in three ways.

    Attributes:
        name: the hyperparameter.
        place: which entry of it (an index, or the words for a direction).
        reverse: by `metaopt.record`.
        forward: by `metaopt.stream`; None where forward mode was not asked.
        expected: by finite differences of the bare loop.
        error: the largest difference between them, relative to the larger value.
        verdict: ``"agrees"``, or what is wrong.
    """

    name: str
    place: str
    reverse: float
    forward: float | None
    expected: float
    error: float
    verdict: str

    @property
    def ok(self) -> bool:
        """Whether the three agree."""
        return self.verdict == "agrees"

    def __str__(self) -> str:
        forward = "" if self.forward is None else f"{self.forward: .8g}"
        where = f"{self.name}{self.place}"
        verdict = "agrees" if self.ok else f"{self.verdict} ({self.error:.1e})"
        return f"{where:32}  {self.reverse:< 16.8g}{forward:<16}{self.expected:< 16.8g}{verdict}"


@dataclass(frozen=True)
class Report:
    """The result of `hypergradcheck`; true where everything agrees, and a table in print.

    Attributes:
        value: the outer objective.
        rows: the derivatives that were looked at.
        causes: what is likely to be wrong, the surest first; empty if all is well.
        notes: what was not looked at.
        runs: how often the training ran.
    """

    value: float
    rows: list[Row] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: int = 0

    def __bool__(self) -> bool:
        return not self.causes and all(row.ok for row in self.rows)

    @property
    def wrong(self) -> list[Row]:
        """The rows that disagree."""
        return [row for row in self.rows if not row.ok]

    def __str__(self) -> str:
        found = f"{len(self.wrong)} of {len(self.rows)} derivatives disagree" if self.wrong else "all derivatives agree"
        lines = [f"hypergradcheck: {found} (E = {self.value:.8g}, {self.runs} runs of the training)"]
        if self.rows:
            lines.append(f"{'':32}  {' reverse':16}{' forward':16}{' differences':16}")
            lines += map(str, self.rows)
        if self.causes:
            lines.append("Likely cause:" if len(self.causes) == 1 else "Likely causes, the surest first:")
            lines += [f"- {cause.text}" for cause in self.causes]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__
