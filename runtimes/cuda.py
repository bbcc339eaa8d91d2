"""What is asked of the CUDA driver itself, so that no package is needed for it."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


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
    with _primary_context(device_id) as driver:
        for target, source in places:
            _call(driver.cuMemcpyDtoD_v2, ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes))


def copy_to_device(device_id: int, address: int, array: np.ndarray) -> None:
    """Copy a contiguous host array to device memory, and wait for it; as copy_on_device."""
    with _primary_context(device_id) as driver:
        place, size = ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes)
        _call(driver.cuMemcpyHtoD_v2, place, ctypes.c_void_p(array.ctypes.data), size)


def copy_to_host(device_id: int, address: int, array: np.ndarray) -> None:
    """Fill a contiguous host array from device memory; as copy_on_device."""
    with _primary_context(device_id) as driver:
        place, size = ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes)
        _call(driver.cuMemcpyDtoH_v2, ctypes.c_void_p(array.ctypes.data), place, size)


@contextlib.contextmanager
def _primary_context(device_id: int) -> Iterator[ctypes.CDLL]:
    """The driver, in the context that libraries share; what is started inside has ended after the block."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call(driver.cuInit, 0)
    _call(driver.cuDeviceGet, ctypes.byref(device), device_id)
    _call(driver.cuDevicePrimaryCtxRetain, ctypes.byref(context), device)
    try:
        _call(driver.cuCtxPushCurrent_v2, context)
        try:
            yield driver
            _call(driver.cuCtxSynchronize)
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _call(function: Callable[..., int], *args: Any) -> None:
    if code := function(*args):
        raise RuntimeError(f"the CUDA driver's {function.__name__} failed with error {code}")
