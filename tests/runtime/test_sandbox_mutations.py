"""500 videos with something done to their bytes: frames or a MediaError, and no harm to others.

`make fuzz` does the same with more of them, and others; see `tests/mutations.py`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from mutations import NUM_FRAMES, SIZE, decode_all, sound_pictures, sound_videos
from ppllava_runtime.choosing import Sample
from ppllava_runtime.leaving import Leaving
from ppllava_runtime.local import LOCAL
from ppllava_runtime.sandbox import Sandbox

SEED = 6
NUM_VIDEOS, NUM_PICTURES = 500, 60
MOST_MEMORY = 512 << 20


def frames_of(opener: Sandbox | None, path: Path) -> list[bytes]:
    frames = (opener or LOCAL).clip(path, Sample(NUM_FRAMES), SIZE, Leaving())
    try:
        return [np.asarray(square).tobytes() for _, square, _ in frames]
    finally:
        frames.close()


def test_mutated_files_are_frames_or_a_media_error(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    videos, pictures = sound_videos(tmp_path), sound_pictures()
    good = tmp_path / "h264.mp4"
    expected = frames_of(None, good)
    with Sandbox() as sandbox:
        pid = sandbox.start()._zygote
        for sound, count in ((videos, NUM_VIDEOS), (pictures, NUM_PICTURES)):
            outcomes = decode_all(sandbox, sound, SEED, count, tmp_path)
            found = Counter(outcome.result for outcome in outcomes)
            print(dict(found), f"{sandbox.num_broken} broke their process")
            assert found.total() == count
            # Of many of either kind: else nothing is tried here.
            assert found["frames"] >= count // 5
            assert found["MediaError"] >= count // 5
            assert frames_of(sandbox, good) == expected
        assert sandbox._zygote is pid, "the process that forks was started again"
        assert 0 < sandbox.peak_bytes <= MOST_MEMORY
