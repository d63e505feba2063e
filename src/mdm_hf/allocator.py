"""What the allocator does with freed memory: a tenth of a large batch's time hangs on it, on a busy CPU 40%."""

import ctypes
import platform


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory instead of returning each large tensor to the system.

    Large batches on a CPU otherwise spend much of their time in page faults. It holds for the whole process, whose
    memory then stays at its peak: `mdm` and `run_recipe` call it, `import mdm_hf` does not. Returns whether the
    allocator is glibc's and took all three settings; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # names of mallopt(3)
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(*s) for s in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)))
