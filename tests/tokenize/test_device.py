"""Full devices and devices that are not there."""

from __future__ import annotations

import pytest
import torch

from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.tokenize.device import out_of_memory, usable


def test_a_full_cpu_names_the_setting_to_lower() -> None:
    message = r"out of memory \(4\d+ bytes more were asked for\): lower batch \(now 8\)"
    with pytest.raises(UnimodalError, match=message), out_of_memory("batch (now 8)"):
        torch.empty(1 << 60)  # more than any machine's address space


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_every_kind_of_full_is_one(error: Exception) -> None:
    with pytest.raises(UnimodalError, match=r"out of memory.*lower area"), out_of_memory("area"):
        raise error


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory("area"):
        raise RuntimeError("shapes do not match")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="cuda:99 cannot be used"):
        usable("cuda:99")
