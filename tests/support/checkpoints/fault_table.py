"""What fault campaigns count, and the table of it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

RIGHT = "right at once"
AGAIN = "right when called again"
REFUSED = "refused by name"
WRONG = "wrong, lost or hung"
COLUMNS = (RIGHT, AGAIN, REFUSED, WRONG)


@dataclass(slots=True)
class Tally:
    """How often a fault ended in which way.

    Attributes:
        what: "converting", "saving" or "loading".
        fault: that was made.
        ends: one of :data:`COLUMNS` for each time.
        problems: a line for each that is wrong.
    """

    what: str
    fault: str
    ends: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, end: str) -> None:
        self.ends[end] += 1

    def wrong(self, problem: str) -> None:
        self.ends[WRONG] += 1
        self.problems.append(f"{self.what}, {self.fault}: {problem}")

    @property
    def times(self) -> int:
        return self.ends.total()

    def row(self) -> dict[str, Any]:
        counts = {name: self.ends[name] for name in COLUMNS}
        return {"while": self.what, "fault": self.fault, "times": self.times, **counts}


def check(*tallies: Tally) -> None:
    """Nothing was wrong, and something was tried."""
    assert [problem for tally in tallies for problem in tally.problems] == []
    assert all(tally.times and not tally.ends[WRONG] for tally in tallies)
