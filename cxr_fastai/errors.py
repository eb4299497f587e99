"""The errors that users can cause, and the exit code that each one ends with.

    CxrError                    2   could not start, or could not go on
    ├── UsageError              2   an option or argument that makes no sense
    ├── DataError               2   a folder, table or split that cannot be trained on
    ├── UnreadableImage         1   one file that is not a film that can be read
    │   └── NoSuchFrame         1   a frame asked for beyond the last one
    ├── ModelFileError          2   a model file that is missing, damaged or not one
    ├── TrainingError           2   a training run that cannot go on (loss not finite, export differs)
    └── Interrupted           130   Ctrl-C or SIGTERM; what was finished is saved

Library code raises these and never prints; only `cxr_fastai.cli` turns them into one line of text and an
exit code. The message says what is wrong, gives the value, and says what to do.
"""


class CxrError(Exception):
    """Any fault that is reported to the user as one line instead of a traceback."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        """Return the message alone: fastai puts words of its own before it where an error passes a callback."""
        return self.message


class UsageError(CxrError):
    """An option, or a combination of options, that cannot be followed."""


class DataError(CxrError):
    """A dataset (folder, CSV or split) that cannot be used as it is."""


class UnreadableImage(CxrError):
    """One file that cannot be read as a radiograph; the others go on."""

    exit_code = 1


class NoSuchFrame(UnreadableImage):
    """A frame beyond the last one of a file."""


class ModelFileError(CxrError):
    """A model file that is missing, damaged, or not a model of ours."""


class TrainingError(CxrError):
    """A training run that must stop, with everything finished before it kept."""


class Interrupted(CxrError):
    """The user, or the system, asked the work to stop; what was finished is saved."""

    exit_code = 130
