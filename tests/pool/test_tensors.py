from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from millpond.pool.tensors import use_huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MIB = 1 << 20


def huge_bytes_at(address):
    """Return how much of the mapping with an address is in huge pages."""
    is_it = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_it = int(found[1], 16) <= address < int(found[2], 16)
        elif is_it and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel lists no mapping with this address")


def machine_gives_huge_pages():
    """Return whether plain mmap(2) and madvise(2) come to huge pages here: a full memory may have none left."""
    with mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as control:
        control.madvise(mmap.MADV_HUGEPAGE)
        control.write(bytes(64 * MIB))
        return huge_bytes_at(torch.frombuffer(control, dtype=torch.uint8).data_ptr() + 32 * MIB) > 0


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text() or mmap.PAGESIZE != 4096,
    reason="this kernel gives no huge pages of 2 MiB",
)
def test_new_memory_of_the_host_comes_in_huge_pages_if_it_is_large():
    if not machine_gives_huge_pages():
        pytest.skip("this machine has no 2 MiB of memory in one piece left")
    large = torch.empty(64 * MIB, dtype=torch.uint8)
    use_huge_pages(large)
    large.zero_()
    assert huge_bytes_at(large.data_ptr() + 32 * MIB) > 0


def test_asking_for_huge_pages_leaves_what_lies_beside():
    around = torch.arange(4 * MIB)
    part = around[3 : 2 * MIB + 5]
    use_huge_pages(part)
    assert torch.equal(around, torch.arange(4 * MIB))
    use_huge_pages(torch.empty(0))
