"""Classifies exceptions; the kind of failure decides what the supervisor does next."""

from drumline.errors import CheckpointError, DrumlineError, RunError

OUT_OF_MEMORY = "OutOfMemory"
PEER_LOST = "PeerLost"

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_GONE = (
    "connection closed by peer",  # gloo
    "connection closed by remote peer",  # NCCL's sockets
    "connection reset by peer",
    "broken pipe",
    "ncclremoteerror",
    "remote process exited",
)
"""Messages of a connection closed by another process; used for communication errors only."""
_STORE_GONE = ("DistNetworkError", "DistStoreError")
"""torch's errors of the key-value store, which another process hosts."""
_COMMUNICATION = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
_TIMED_OUT = ("timed out waiting", "watchdog caught collective operation timeout")


def kind_of(error: BaseException) -> str:
    """`OutOfMemory`, `PeerLost` (the connection to another rank was lost), or the exception's own name.

    `PeerLost` says that the cause is another rank. So a communication error counts as that only if it is the
    store's, or if its message says that the other side closed the connection or that a collective timed out.
    Naming the library is not enough, because NCCL also reports this rank's own errors.
    """
    name, text = type(error).__name__, str(error).lower()
    if isinstance(error, CheckpointError):
        return CheckpointError.__name__
    if isinstance(error, DrumlineError):
        return name
    if isinstance(error, MemoryError) or any(words.lower() in text for words in _OUT_OF_MEMORY):
        return OUT_OF_MEMORY
    is_of_gloo = isinstance(error, RuntimeError) and ("gloo/" in text or "gloo " in text)
    if name in _STORE_GONE:
        return PEER_LOST
    says_gone = any(words in text for words in (*_GONE, *_TIMED_OUT))
    return PEER_LOST if (name in _COMMUNICATION or is_of_gloo) and says_gone else name


def exit_code_of(error: BaseException) -> int:
    """The exit code of the error's class; `RunError`'s for any exception that is not drumline's."""
    return error.exit_code if isinstance(error, DrumlineError) else RunError.exit_code
