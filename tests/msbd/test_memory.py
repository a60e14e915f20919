"""Memory: which errors mean that it ran out, and how many tiles to try."""

import pytest
import torch

from msbd.memory import is_out_of_memory, tiles_at_once


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB). Tried to allocate 2.00 GB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("Unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_tiles_at_once_on_a_cpu() -> None:
    assert tiles_at_once(torch.device("cpu"), 96 * 96) == 4


@pytest.mark.cuda
def test_tiles_at_once_on_a_gpu_shrinks_with_the_tile() -> None:
    small, large = (tiles_at_once(torch.device("cuda"), cells) for cells in (64 * 64, 1024 * 1024))
    assert small >= large >= 1
