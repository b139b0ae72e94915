"""The exceptions that a user meets: what is wrong and where, how to mend it, and one exit status for each kind.

An exit status below 64 is that of train.py; the README lists those from 64 on.
"""

from typing import ClassVar


class AmberSafeError(Exception):
    """Ends the command with `exit_status`, after printing `message` and `hint`, without a traceback."""

    exit_status: ClassVar[int] = 70
    kind: ClassVar[str] = "an unexpected failure of ambersafe itself"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AmberSafeError):
    """A flag, a value or a KEY=VALUE that cannot be used."""

    exit_status = 64
    kind = "a wrong command line"


class DataError(AmberSafeError):
    """Preference data that is missing, unreadable or not what get_saferlhf needs."""

    exit_status = 65
    kind = "data that is missing, unreadable, empty, or has not the columns that are needed"


class ArchiveError(AmberSafeError):
    """No policy.pt to start DPO from."""

    exit_status = 66
    kind = "no finished SFT run, or no `policy.pt`, to start DPO from"


class RecipeError(AmberSafeError):
    """A recipe that is missing or malformed."""

    exit_status = 67
    kind = "a recipe that is missing or malformed"


class GitError(AmberSafeError):
    """git is missing, or one of its commands failed."""

    exit_status = 68
    kind = "`git` is missing or failed"


class SourceError(AmberSafeError):
    """Upstream's repository cannot be reached, or has no such commit."""

    exit_status = 69
    kind = "upstream's repository cannot be reached, or has no such commit"


class CloneError(AmberSafeError):
    """The folder of the clone is missing, foreign, edited or at another commit."""

    exit_status = 71
    kind = "the clone is missing, foreign, edited, or at another commit"


class PatchError(AmberSafeError):
    """A patch does not apply, or a file of the series is malformed."""

    exit_status = 72
    kind = "a patch does not apply"


class TrainingEnvironmentError(AmberSafeError):
    """The interpreter that is to run train.py is missing, or lacks packages."""

    exit_status = 73
    kind = "the interpreter for training is missing or lacks packages"


class RunFolderError(AmberSafeError):
    """The run folder cannot be made, read or written."""

    exit_status = 74
    kind = "the run folder cannot be made, read or written"


class PreflightError(AmberSafeError):
    """Preflight found what would stop or spoil the run."""

    exit_status = 76
    kind = "preflight found what would stop or spoil the run"


class NoCheckpointError(AmberSafeError):
    """train.py ended with exit status 0 but left no checkpoint."""

    exit_status = 75
    kind = "`train.py` ended with exit status 0 but left no checkpoint"


class HubError(AmberSafeError):
    """A model or dataset that cannot be fetched from the Hugging Face hub, or was not fetched whole."""

    exit_status = 77
    kind = "a model or data cannot be fetched from the Hugging Face hub into the cache"


class NotReproducedError(AmberSafeError):
    """A run that was done again came to other metrics."""

    exit_status = 78
    kind = "a run was done again, and its metrics are others"


class ExportError(AmberSafeError):
    """An exported folder that cannot be written, is not whole, or cannot be uploaded."""

    exit_status = 79
    kind = "an exported folder cannot be written or uploaded"


class MachinesError(AmberSafeError):
    """Machines that do not find one another, are not alike, or have lost one of them."""

    exit_status = 80
    kind = "machines do not find one another, are not alike, or have lost one"


class SlurmError(AmberSafeError):
    """Slurm is missing, or did not take a job."""

    exit_status = 81
    kind = "Slurm is missing, or did not take a job"
