"""The errors a user sees, and the exit codes that go with them.

Exit code 2: the input was wrong, and the message says what to change. Exit code 1: a fault of ours.
75 (EX_TEMPFAIL of sysexits.h): the run was asked to stop, has saved, and can be started again.
"""

EXIT_USER = 2
EXIT_INTERNAL = 1
EXIT_STOPPED = 75


class RunStopped(Exception):
    """The run ends early because it was asked to; what it has done is saved."""


class UserError(ValueError):
    """Bad input: what was got, what was expected, and how to fix it.

    Raised before any work is lost. The command line prints the message once, without a traceback,
    and ends with exit code 2.
    """

    def __init__(self, got: str, *, expected: str = "", fix: str = "") -> None:
        self.got, self.expected, self.fix = got, expected, fix
        parts = [got]
        if expected:
            parts.append(f"expected: {expected}")
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__("\n  ".join(parts))
