"""Every foreseeable failure, as one tree.

    M7Error
    ├── InputError                 what the user gave cannot be used            exit status 2
    │   ├── ConfigError            config.json / params.json
    │   ├── WeightsError           safetensors and GGUF files
    │   ├── TokenizerError         tokenizer files, ids out of range
    │   ├── CacheFileError         a saved cache that is damaged or not of this model
    │   ├── StoreError             stored conversations: in m7mlx_chat/store/errors.py
    │   ├── ChatFormatError        messages or a chat template
    │   ├── PromptTooLongError     more tokens than the context holds
    │   └── NotFoundError          no such folder, repository or alias; no access
    └── RunError                   a sound request that failed on the way       exit status 1
        ├── BusyError              as much is under way as may be
        ├── DownloadError          network, wrong bytes
        ├── DiskError              full disk, no permission
        ├── RollbackError          more tokens than the cache's slack can undo
        └── WorkerError            work on a stranger's input was broken off in its process
            ├── WorkerTimeError    it took too long
            ├── WorkerMemoryError  it took too much memory
            └── WorkerDiedError    its process ended

Each message is one line: the cause, then what to do. The commands print it on stderr and exit with
`exit_status`; a traceback is a bug (`--debug` shows it).
"""


class M7Error(Exception):
    """Base of all errors that this project raises on purpose."""

    exit_status = 1


class InputError(M7Error):
    """What the user gave cannot be used."""

    exit_status = 2


class ConfigError(InputError):
    """A config.json or params.json that is missing, contradictory or not understood."""


class WeightsError(InputError):
    """Weights that are missing, damaged or do not fit their config."""


class TokenizerError(InputError):
    """A tokenizer that is missing or damaged, or ids outside its vocabulary."""


class CacheFileError(InputError):
    """A saved cache that is damaged, foreign, of another model or of a newer version."""


class ChatFormatError(InputError):
    """Messages that the model's chat format cannot express, or a template that fails."""


class PromptTooLongError(InputError):
    """A prompt longer than the context of a full-attention model.

    `room` is how many tokens fit, and `tokens` how many the prompt has, where that is known.
    """

    def __init__(self, message: str, room: int | None = None, tokens: int | None = None) -> None:
        super().__init__(message)
        self.room, self.tokens = room, tokens


class NotFoundError(InputError):
    """A folder, repository or alias that does not exist or may not be read."""


class RunError(M7Error):
    """A sound request that failed on the way."""


class BusyError(RunError):
    """As much is under way as may be; the same request can succeed later."""


class DownloadError(RunError):
    """The network failed, or what came is not what was promised."""


class DiskError(RunError):
    """The disk is full or not writable."""


class RollbackError(RunError):
    """A rollback past the cache's slack; the cache is unchanged."""


class WorkerError(RunError):
    """Work on a stranger's input, in a process of its own, that was broken off."""


class WorkerTimeError(WorkerError):
    """The work took too long."""


class WorkerMemoryError(WorkerError):
    """The work took too much memory."""


class WorkerDiedError(WorkerError):
    """The process that did the work ended or was killed."""
