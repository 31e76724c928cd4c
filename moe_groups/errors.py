"""The errors of this library.

Every message names the parameter, layer or group and says what to do. All kinds derive from
:class:`MoEGroupsError`. Those for a bad argument derive from ``ValueError`` too, so code that
expects the built-in works; a missing package is an ``ImportError``.
"""

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointWarning",
    "CostlyGroupsWarning",
    "InvalidArgumentError",
    "MeasurementError",
    "MissingPackageError",
    "MoEGroupsError",
    "OverrideError",
    "ParameterInputError",
    "PlanError",
    "RecomputationError",
    "TagError",
    "UnmarkedExpertsWarning",
    "UnsupportedDeepSpeedError",
    "VerificationError",
]


class MoEGroupsError(Exception):
    """Base of all errors raised by moe_groups."""


class InvalidArgumentError(MoEGroupsError, ValueError):
    """An argument is out of its range or has a type that cannot be used."""


class MissingPackageError(ImportError, InvalidArgumentError):
    """A package of an extra of moe-groups is not installed."""


class ParameterInputError(MoEGroupsError, ValueError):
    """The given parameters or group dicts cannot be grouped."""


class TagError(MoEGroupsError, ValueError):
    """The tag of an expert parameter is missing, malformed or contradicts another tag."""


class OverrideError(MoEGroupsError, ValueError):
    """An override pattern matches nothing, or two patterns set different values."""


class PlanError(MoEGroupsError, ValueError):
    """No plan fits the request, or a plan was made for other parameters."""


class MeasurementError(MoEGroupsError):
    """Memory cannot be measured here, or methods of a measurement are called in a wrong order."""


class RecomputationError(MoEGroupsError):
    """A recomputation in activation checkpointing differs from the forward pass."""


class CheckpointError(MoEGroupsError):
    """A checkpoint cannot be read, converted or written; nothing has been changed."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint was saved with other groups than the engine has; it was not loaded.

    Attributes:
        lines: one line for each difference.
        target: file with the engine's groups, for ``moe-groups regroup-checkpoint``; None if
            conversion does not help.
    """

    def __init__(self, message: str, lines: list[str], target: str | None = None) -> None:
        self.message, self.lines, self.target = message, lines, target
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[str, list[str], str | None]]:
        return type(self), (self.message, self.lines, self.target)


class CheckpointWarning(UserWarning):
    """A checkpoint cannot be compared, lacks something, is not there, or was converted in part."""


class CostlyGroupsWarning(UserWarning):
    """Groups need much more memory in the optimizer step than others of the same ``split_by``.

    Also, with ``lean_step``, if a hook keeps it from stepping them in tiles.
    """


class UnmarkedExpertsWarning(UserWarning):
    """No parameter is marked as an expert's where some are meant, or no group of experts is."""


class VerificationError(MoEGroupsError):
    """The groups of an initialized engine differ from those that were given.

    Attributes:
        problems: one line for each problem.
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
    """The installed DeepSpeed lacks a function that this library needs."""
