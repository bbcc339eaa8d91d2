"""Is there a GPU? Asked of the driver itself, so that no package is needed to learn that there is none."""

import ctypes


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
