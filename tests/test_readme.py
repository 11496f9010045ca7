"""Every command and program in the README is run, in its order, as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PAGES = [
    *("README.md", "CHANGELOG.md"),
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")),
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*/README.md")),
]
# These two install everything anew: CI is the second, and the first is its demo.sh.
MAKE = {"make demo", "make test"}


def test_the_two_commands_are_there_and_are_targets() -> None:
    commands = {
        line for language, block in BLOCKS if language == "sh" for line in block.split("\n")
    }
    assert commands >= MAKE
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:.*\n\t.*examples/tiny_world/demo\.sh$", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    missing = [link for link in links if not ((ROOT / page).parent / link).is_file()]
    assert missing == []


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path) -> None:
    """Runs in a folder that has the repository's examples and none of its source."""
    for folder in ("examples", "docs", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "build").mkdir()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    ran = 0
    for language, block in BLOCKS:
        script = "\n".join(line for line in block.splitlines() if line not in MAKE)
        if not script.strip():
            continue
        command = ["sh", "-euc", script] if language == "sh" else [sys.executable, "-c", script]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{script}\n{done.stderr}"
        ran += 1
    assert ran >= 3
    assert (tmp_path / "build" / "square.png").is_file()
    assert (tmp_path / "build" / "square.mp4").is_file()


@pytest.mark.slow
def test_the_demo_answers_right_and_leaves_heatmaps(tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    done = subprocess.run(
        [ROOT / "examples" / "tiny_world" / "demo.sh", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.split("\n")
    answers = {said[i][2:]: said[i + 1] for i, line in enumerate(said) if line.startswith("> ")}
    assert answers == {
        "Which way does the red circle move?": "left",
        "What colour is the square?": "purple",
        "Which leaves first, the purple square or the red circle?": "the purple square",
        "Describe the video.": "a red circle, a blue cross and a purple square",
    }
    assert (tmp_path / "red_circle.png").stat().st_size > 10_000
    assert (tmp_path / "square.png").stat().st_size > 10_000
