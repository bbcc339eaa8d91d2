"""What is asked of the CUDA driver itself, so that no package is needed for it."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any


def cuda_device_count() -> int:
    """GPUs that the CUDA driver offers; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def copy_on_device(device_id: int, places: Sequence[tuple[int, int]], nbytes: int) -> None:
    """Copy `nbytes` bytes within device memory to each (address, from address), in order, and wait for it.

    Addresses are of the device's primary context, which is the one that libraries share. No (address, from address) may
    overlap, and nothing else may be at work on that memory.

    Raises:
        RuntimeError: the driver refuses.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call(driver.cuInit, 0)
    _call(driver.cuDeviceGet, ctypes.byref(device), device_id)
    _call(driver.cuDevicePrimaryCtxRetain, ctypes.byref(context), device)
    try:
        _call(driver.cuCtxPushCurrent_v2, context)
        try:
            for target, source in places:
                _call(driver.cuMemcpyDtoD_v2, ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes))
            _call(driver.cuCtxSynchronize)
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _call(function: Callable[..., int], *args: Any) -> None:
    if code := function(*args):
        raise RuntimeError(f"the CUDA driver's {function.__name__} failed with error {code}")
