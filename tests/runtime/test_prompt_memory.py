"""What strangers' words may cost: no more memory, however many they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ppllava_engines.bundle import Bundle

_GROWTH = """
import sys, threading
from pathlib import Path
from ppllava_runtime.prompt import _load

def kept():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))

def read(number):
    for i in range(8000):
        tokenizer.encode(f"{number}x{i}y" * 8)

tokenizer = _load(Path(sys.argv[1]))
tokenizer.encode("once")
before = kept()
threads = [threading.Thread(target=read, args=(i,)) for i in range(int(sys.argv[2]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(kept() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to tell memory by")
@pytest.mark.parametrize(("num_threads", "most"), [(1, 4_000_000), (4, 12_000_000)])
def test_many_different_words_take_no_more_memory(
    bundle: Path, num_threads: int, most: int
) -> None:
    opened = Bundle.open(bundle)
    file = opened.file(opened.manifest.tokenizers["decoder"])
    # In a process of its own, where nothing has grown before.
    command = [sys.executable, "-c", _GROWTH, str(file), str(num_threads)]
    grown = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout
    assert int(grown) < most
