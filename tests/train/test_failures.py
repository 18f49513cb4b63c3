"""What an exception means: a rank is excused only where another one is to blame."""

import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from drumline.errors import CheckpointError, PeerLost
from drumline.train.failures import exit_code_of, kind_of

PAIR = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] "


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{PAIR}Connection closed by peer [127.0.0.1]:4711"),
        RuntimeError(f"{PAIR}Read error [127.0.0.1]:4711: Connection reset by peer"),
        RuntimeError("[gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv"),
        DistBackendError("NCCL error in: x.cpp:1, remote process exited or there was a network error, "
                         "NCCL version 2.27\nncclRemoteError: A call failed possibly due to a network error"),
        DistBackendError("NCCL error: ncclSystemError: Last error: socketProgress: Connection closed by "
                         "remote peer host<1>"),
        DistNetworkError("The client socket has timed out"),
        DistStoreError("wait timeout after 60000ms"),
    ],
)  # fmt: skip
def test_a_lost_peer(error: BaseException) -> None:
    """The other side has ended the connection, the store is gone, or a collective timed out."""
    assert kind_of(error) == "PeerLost"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("set NCCL_DEBUG=INFO and look again"),
        RuntimeError("NCCL is not available in this build"),
        RuntimeError("my model's gloo-my mood: broken pipe dreams"),
        OSError(32, "Broken pipe"),
        DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0"),
        DistBackendError("NCCL error: ncclUnhandledCudaError: Call to CUDA function failed. "
                         "an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered (see NCCL watchdog thread)"),
        KeyError("NCCL"),
    ],
)  # fmt: skip
def test_a_guilty_rank_is_not_excused(error: BaseException) -> None:
    """The name of a communication library in a message proves nothing about another rank."""
    assert kind_of(error) == type(error).__name__
    assert exit_code_of(error) == 4


def test_out_of_memory_and_our_own() -> None:
    """Out of memory by torch's words or Python's class; our errors keep their names and codes."""
    assert kind_of(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")) == "OutOfMemory"
    assert kind_of(MemoryError()) == "OutOfMemory"
    nccl = DistBackendError("NCCL error: Failed to CUDA calloc async: out of memory")
    assert kind_of(nccl) == "OutOfMemory"
    assert kind_of(PeerLost("gone")) == "PeerLost"
    assert kind_of(CheckpointError("NCCL, broken pipe")) == "CheckpointError"
