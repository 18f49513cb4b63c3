"""What kind of failure an exception is: it decides what the supervisor does next."""

from drumline.errors import DrumlineError, RunError

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
"""Words for a connection that another process has ended; they count in errors of communication only."""
_STORE_GONE = ("DistNetworkError", "DistStoreError")
"""torch's errors of the key-value store, which lives in another process."""
_COMMUNICATION = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
_TIMED_OUT = ("timed out waiting", "watchdog caught collective operation timeout")


def kind_of(error: BaseException) -> str:
    """The exception's own name, or what it means: this rank ran out of memory, or lost another one.

    A rank that lost another is excused, because the cause is elsewhere. So an error counts as that only where
    it says that a connection was ended by the other side or that a collective timed out; the mere name of a
    communication library in it does not: NCCL also reports this rank's own mistakes.
    """
    name, text = type(error).__name__, str(error).lower()
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
    """The code that belongs to the error's class; that of a failed run for everything unforeseen."""
    return error.exit_code if isinstance(error, DrumlineError) else RunError.exit_code
