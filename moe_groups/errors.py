"""The errors of this library.

Every message names the parameter, layer or group it is about and says what to do.
All kinds derive from :class:`MoEGroupsError`; those that stand for a bad argument are
``ValueError`` too, so that code which expects the built-in keeps working.
"""

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointWarning",
    "CostlyGroupsWarning",
    "InvalidArgumentError",
    "MeasurementError",
    "MoEGroupsError",
    "OverrideError",
    "ParameterInputError",
    "PlanError",
    "RecomputationError",
    "TagError",
    "UnsupportedDeepSpeedError",
    "VerificationError",
]


class MoEGroupsError(Exception):
    """Base of all errors raised by moe_groups."""


class InvalidArgumentError(MoEGroupsError, ValueError):
    """An argument is out of its range or of a type that cannot be used."""


class ParameterInputError(MoEGroupsError, ValueError):
    """The parameters or group dicts cannot be grouped as they are given."""


class TagError(MoEGroupsError, ValueError):
    """An expert parameter's tag is missing, malformed or contradicts another one."""


class OverrideError(MoEGroupsError, ValueError):
    """An override pattern matches nothing, or two of them set different values."""


class PlanError(MoEGroupsError, ValueError):
    """No plan fits what was asked for, or a plan was made for other parameters."""


class MeasurementError(MoEGroupsError):
    """Memory cannot be measured here, or a measurement is used out of turn."""


class RecomputationError(MoEGroupsError):
    """A checkpointed function cannot be computed again as it was in the forward pass."""


class CheckpointError(MoEGroupsError):
    """A checkpoint cannot be read, converted or written; nothing has been changed by it."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint was saved with other groups than the engine has; it was not loaded.

    Attributes:
        lines: what differs, one line for each.
        target: file that holds the engine's groups, for ``moe-groups regroup-checkpoint``;
            None where converting does not help.
    """

    def __init__(self, message: str, lines: list[str], target: str | None = None) -> None:
        self.message, self.lines, self.target = message, lines, target
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[str, list[str], str | None]]:
        return type(self), (self.message, self.lines, self.target)


class CheckpointWarning(UserWarning):
    """A checkpoint cannot be compared, or was saved without its manifest or some weights."""


class CostlyGroupsWarning(UserWarning):
    """Groups that need much more memory in the optimizer step than the same level of splitting."""


class VerificationError(MoEGroupsError):
    """What an initialized engine steps is not what was asked for.

    Attributes:
        problems: one line for each thing that is wrong.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        shown = problems[:20]
        if len(problems) > len(shown):
            shown = [*shown, f"... and {len(problems) - len(shown)} more (see .problems)"]
        super().__init__(f"verify found {len(problems)} problem(s):\n  " + "\n  ".join(shown))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)


class UnsupportedDeepSpeedError(MoEGroupsError):
    """The installed DeepSpeed lacks something that this library relies on."""
