"""Manners on a CPU: fast where it is quiet, and not much slower where others work, too.

Networks of a few megabytes, such as those of the pendulum, spend a third of a step on memory that the C library returns to
the system and asks for again, and on threads that wait for each other.
"""

import ctypes
import os
import platform
import time

import torch

THREADS_VARIABLE = "OMP_NUM_THREADS"
LOOK_SECONDS = 0.3
"""How long to look at what others do before threads are chosen."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""

KEEP_BYTES = 2**30
"""Freed memory up to which the C library keeps it for the next step."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, because the next step needs as much again.

    By default it maps each large array anew and returns it when it is freed: all of its pages are cleared in every step.

    Returns:
        Whether it was set: other C libraries have no such setting.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, KEEP_BYTES) and mallopt(M_TRIM_THRESHOLD, KEEP_BYTES))


def idle_cores(before: list[int], after: list[int], cores: int) -> int:
    """How many of a machine's cores were free.

    Args:
        before: Clock ticks by kind of work, of all cores together: the first line of /proc/stat.
        after: Clock ticks of the same kinds, a while later.
        cores: Number of cores.

    Returns:
        At least 1.
    """
    spent = [later - earlier for earlier, later in zip(before, after, strict=True)]
    idle = spent[3] + spent[4]  # and waiting for a disk
    return max(1, round(cores * idle / max(1, sum(spent))))


def ticks() -> list[int]:
    """The first line of /proc/stat."""
    with open("/proc/stat") as file:
        return [int(number) for number in file.readline().split()[1:9]]


def choose_threads() -> int:
    """Take as many threads as cores are free now, unless OMP_NUM_THREADS says how many.

    With one thread more than free cores, each operation waits for the thread whose core is taken: the step of the demo takes
    twice as long as with one thread. The number stays for the whole run, and a resumed run takes it over, since sums depend
    on it in their last bits.

    Returns:
        The number of threads.
    """
    if THREADS_VARIABLE not in os.environ and os.path.exists("/proc/stat"):
        before = ticks()
        time.sleep(LOOK_SECONDS)
        torch.set_num_threads(min(torch.get_num_threads(), idle_cores(before, ticks(), os.cpu_count() or 1)))
    return torch.get_num_threads()
