"""The command line, as a person and as a program use it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ppllava_engines.bundle import Manifest
from ppllava_runtime import chat as chat_module
from ppllava_runtime.video import read_clip
from tiny_videos import numbered_frames, write_audio, write_video

ROOT = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("engines", "runtime"))
# Says on stderr, as its last word, whether torch was imported; exits as the command does.
CHAT = """
import sys
from ppllava_runtime.chat import run
code = run()
banned = {"torch", "transformers", "onnx", "ppllava_export"} & set(sys.modules)
assert not banned, banned
sys.exit(code)
"""


def chat(*arguments: object, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", CHAT, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": PATHS},
        input=typed,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return write_video(path, numbered_frames(40), options={"g": "10"})


def test_answers_a_question_without_torch(bundle: Path, clip: Path) -> None:
    done = chat(bundle, clip, "What moves?", "--max-new-tokens", 12)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    assert done.stdout.count("\n") == 1


def test_answers_a_program(bundle: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    options = ("--frames", 6, "--start", 0.5, "--end", 1, "--tokens", 20, "--max-new-tokens", 7)
    done = chat(bundle, clip, "What moves?", *options, "--json", "--heatmap", out)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert record["question"] == "What moves?"
    assert record["answer"]
    assert record["media"] == "video"
    assert record["was_cut"] is True
    assert record["heatmap"] == str(out)
    assert out.is_file()
    assert len(record["timestamps"]) == 6
    assert 0.48 <= record["timestamps"][0] <= record["timestamps"][-1] <= 1
    accounting = record["accounting"]
    assert accounting["num_frames_encoded"] == 6
    assert accounting["num_tokens_before"] == 96
    assert 10 <= accounting["num_tokens_after"] <= 20
    assert accounting["num_new_tokens"] == 7
    assert accounting["milliseconds"]["total"] > accounting["milliseconds"]["first_token"] > 0


def test_answers_many_questions(bundle: Path, clip: Path, tmp_path: Path) -> None:
    film = tmp_path / "map.mp4"
    typed = f"/heatmap {film}\nfirst?\n<image>\n/what\n/heatmap {film}\nsecond?\n/quit\nthird?\n"
    options = ("--frames", 6, "--max-new-tokens", 5, "--json", "--kernel", "2,2,2")
    done = chat(bundle, clip, *options, typed=typed)
    assert done.returncode == 0
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["question"] for record in records] == ["first?", "<image>", "second?"]
    encoded = [record["accounting"]["num_frames_encoded"] for record in records]
    assert encoded == [6, 0, 0]
    assert film.is_file()
    assert done.stderr.splitlines() == [
        "error: there is no answer yet to draw a heatmap of",
        "error: /what is not understood: type a question, /heatmap PATH for the last answer, or an "
        "empty line to end",
    ]


def test_looks_at_pictures(bundle: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(pictures):
        Image.fromarray(numbered_frames(3, 64, 64)[number]).save(path)
    first, *others = pictures
    told = ("--max-new-tokens", 5, "--json", "--heatmap", tmp_path / "map.mp4")
    alone = chat(bundle, first, "Which?", *told)
    beside = [option for path in others for option in ("--image", path)]
    together = chat(bundle, first, *beside, "Which?", *told)
    records = [json.loads(done.stdout) for done in (alone, together)]
    assert [done.stderr for done in (alone, together)] == ["", ""]
    assert [record["media"] for record in records] == ["image", "images"]
    counts = [record["accounting"]["num_frames_sampled"] for record in records]
    assert counts == [1, 3]
    assert [record["timestamps"] for record in records] == [[0.0], [0.0] * 3]
    assert read_clip(tmp_path / "map.mp4", 1).info.num_frames == 3


def test_talks_about_nothing(bundle: Path, tmp_path: Path) -> None:
    typed = f"one?\n/heatmap {tmp_path / 'map.png'}\ntwo?\n"
    done = chat(bundle, "-", "--max-new-tokens", 5, "--json", typed=typed)
    assert done.returncode == 0
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["question"] for record in records] == ["one?", "two?"]
    assert all(record["media"] is None and record["timestamps"] == [] for record in records)
    assert all(record["accounting"]["num_tokens_after"] == 0 for record in records)
    sentence = f"heatmap {tmp_path / 'map.png'}: there is no video to draw it on"
    assert done.stderr == f"error: {sentence}\n"


def test_a_file_may_be_called_a_dash(
    bundle: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(clip, tmp_path / "-")
    monkeypatch.chdir(tmp_path)
    done = chat(bundle, "./-", "What moves?", "--max-new-tokens", 1, "--json")
    assert json.loads(done.stdout)["media"] == "video"


def test_a_heatmap_that_fails_does_not_end_the_session(
    bundle: Path, clip: Path, tmp_path: Path
) -> None:
    nowhere, long = tmp_path / "nowhere" / "map.png", tmp_path / f"{'x' * 300}.png"
    typed = f"first?\n/heatmap {nowhere}\n/heatmap {long}\nsecond?\n"
    done = chat(bundle, clip, "--frames", 4, "--max-new-tokens", 3, typed=typed)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 2
    first, second = done.stderr.splitlines()
    assert first == f"error: heatmap {nowhere}: there is no folder {nowhere.parent}"
    assert second.startswith(f"error: heatmap {long}: cannot write there (")


def test_a_film_without_its_encoder_does_not_end_the_session(
    bundle: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = ["first?", f"/heatmap {tmp_path / 'map.mp4'}", "second?"]
    monkeypatch.setattr(chat_module, "_lines", lambda: iter(typed))
    monkeypatch.setattr("ppllava_runtime.heatmap._ENCODER", "none")
    chat_module.main([str(bundle), str(clip), "--frames", "4", "--max-new-tokens", "3"])
    told = capsys.readouterr()
    assert told.out.count("\n") == 2
    assert told.err.startswith("error: heatmap: this PyAV has no encoder none: ")


def test_a_heatmap_never_replaces_the_video(bundle: Path, clip: Path, tmp_path: Path) -> None:
    video, link = tmp_path / "clip.mp4", tmp_path / "link.mp4"
    shutil.copy(clip, video)
    link.symlink_to(video)
    sentence = f"error: heatmap {link}: this is what is looked at itself, give another name\n"
    done = chat(bundle, video, "What moves?", "--heatmap", link)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)
    typed = f"first?\n/heatmap {link}\nsecond?\n"
    done = chat(bundle, video, "--frames", 4, "--max-new-tokens", 3, typed=typed)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 2, sentence)
    assert video.read_bytes() == clip.read_bytes()


def test_an_interrupt_leaves_no_empty_line_among_json(
    bundle: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "_lines", lambda: iter(["first?"]))
    monkeypatch.setattr(chat_module, "_show_json", interrupt)
    chat_module.main([str(bundle), str(clip), "--frames", "4", "--json"])
    assert capsys.readouterr() == ("", "\n")


def test_ends_with_an_empty_line(bundle: Path, clip: Path) -> None:
    done = chat(bundle, clip, "--frames", 4, "--max-new-tokens", 3, typed="one?\n\ntwo?\n")
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1


def test_goes_on_after_damage_with_a_warning(bundle: Path, tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "clip.mp4",
        numbered_frames(40),
        options={"g": "10"},
        container_options={"movflags": "faststart"},
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 7 // 10])
    done = chat(bundle, path, "What moves?", "--max-new-tokens", 3)
    assert done.returncode == 0
    assert done.stdout.strip()
    assert done.stderr.startswith(f"warning: video {path}: only ")
    assert done.stderr.endswith(" of its 40 frames can be decoded, the rest is lost\n")


def test_frames_that_are_only_claimed_are_told(bundle: Path, tmp_path: Path) -> None:
    path = write_video(tmp_path / "lie.avi", numbered_frames(40), codec="mjpeg")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, 500)
    path.write_bytes(data)
    done = chat(bundle, path, "What moves?", "--max-new-tokens", 3, "--json")
    sentence = f"video {path}: only 40 of its 500 frames can be decoded, the rest is lost"
    assert (done.returncode, done.stderr) == (0, f"warning: {sentence}\n")
    assert json.loads(done.stdout)["damage"] == sentence


class TestBadInput:
    def assert_fails(
        self, done: subprocess.CompletedProcess[str], code: int, sentence: str
    ) -> None:
        assert done.returncode == code
        assert done.stderr == f"error: {sentence}\n"
        assert done.stdout == ""

    def test_video(self, bundle: Path, tmp_path: Path) -> None:
        missing = tmp_path / "missing.mp4"
        self.assert_fails(chat(bundle, missing, "?"), 66, f"video {missing}: no such file")
        text = tmp_path / "text.mp4"
        text.write_text("not a video", encoding="utf-8")
        self.assert_fails(
            chat(bundle, text, "?"),
            65,
            f"video {text}: not a video that can be read (Invalid data found when processing "
            "input)",
        )
        audio = write_audio(tmp_path / "audio.mp4")
        self.assert_fails(
            chat(bundle, audio, "?"),
            65,
            f"video {audio}: it has no video stream (there is audio)",
        )

    def test_video_without_frames(self, bundle: Path, tmp_path: Path) -> None:
        path = tmp_path / "empty.mp4"
        write_video(path, numbered_frames(0), container_options={"movflags": "empty_moov"})
        self.assert_fails(
            chat(bundle, path, "?"), 65, f"video {path}: it holds no frame that can be decoded"
        )

    def test_video_cut_before_its_index(self, bundle: Path, tmp_path: Path) -> None:
        path = write_video(tmp_path / "cut.mp4", numbered_frames(40))
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"moov") - 4])
        self.assert_fails(
            chat(bundle, path, "?"),
            65,
            f"video {path}: not a video that can be read (Invalid data found when processing "
            "input)",
        )

    def test_bundle_without_tokenizers_before_the_video(self, bundle: Path, tmp_path: Path) -> None:
        mute = tmp_path / "mute"
        shutil.copytree(bundle, mute)
        path = mute / "manifest.json"
        manifest = Manifest.from_json(path.read_text(encoding="utf-8"))
        silent = dataclasses.replace(manifest, tokenizers={})
        path.write_text(silent.to_json(), encoding="utf-8")
        for question in (["?"], []):
            self.assert_fails(
                chat(mute, tmp_path / "missing.mp4", *question),
                78,
                f"bundle {mute}: it was exported without tokenizers, so it takes no questions in "
                "text: export it again without --skip-tokenizer",
            )

    def test_pictures(self, bundle: Path, clip: Path, tmp_path: Path) -> None:
        picture = tmp_path / "picture.png"
        Image.fromarray(numbered_frames(1)[0]).save(picture)
        self.assert_fails(
            chat(bundle, "-", "?", "--image", picture),
            2,
            "--image adds to a first picture: give that one instead of -",
        )
        self.assert_fails(
            chat(bundle, clip, "?", "--image", picture),
            65,
            f"image {clip}: not an image, give a video alone",
        )
        self.assert_fails(
            chat(bundle, tmp_path / "none.png", "?", "--image", picture),
            66,
            f"image {tmp_path / 'none.png'}: no such file",
        )
        self.assert_fails(
            chat(bundle, "-", "?", "--heatmap", tmp_path / "map.png"),
            2,
            "--heatmap: of no meaning without a video, leave it out",
        )

    def test_frames_of_a_picture(self, bundle: Path, tmp_path: Path) -> None:
        picture = tmp_path / "picture.png"
        Image.fromarray(numbered_frames(1)[0]).save(picture)
        self.assert_fails(
            chat(bundle, picture, "?", "--frames", 4, "--end", 1),
            2,
            f"image {picture}: frames, end: of no meaning for a picture, leave it out",
        )

    def test_question_that_is_no_text(self, bundle: Path, clip: Path) -> None:
        self.assert_fails(
            chat(bundle, clip, "caf\udce9"), 2, "the question is not text: expected UTF-8"
        )

    def test_bundle(self, bundle: Path, clip: Path, tmp_path: Path) -> None:
        missing = tmp_path / "missing"
        self.assert_fails(chat(missing, clip, "?"), 66, f"bundle {missing}: no such folder")

        old = tmp_path / "old"
        shutil.copytree(bundle, old)
        manifest = old / "manifest.json"
        text = manifest.read_text(encoding="utf-8")
        manifest.write_text(
            text.replace('"schema_version": 3', '"schema_version": 99'), encoding="utf-8"
        )
        done = chat(old, clip, "?")
        assert done.returncode == 78
        assert "schema_version is 99, this release reads 3" in done.stderr
        assert done.stderr.count("\n") == 1

        broken = tmp_path / "broken"
        shutil.copytree(bundle, broken)
        graph = broken / "graphs" / "vision.onnx"
        graph.write_bytes(graph.read_bytes()[::-1])
        done = chat(broken, clip, "?")
        assert done.returncode == 65
        assert "graphs/vision.onnx is damaged" in done.stderr
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (("--frames", 0), "frames is 0, expected 1 or more"),
            (("--frames", 65), "frames is 65, but checkpoint takes at most 64"),
            (("--tokens", 0), "the number of tokens is 0, expected 1 or more"),
            (("--temperature", -1), "temperature is -1.0, expected 0 or more"),
            (
                ("--heatmap", "map.gif"),
                "heatmap map.gif: expected a name that ends in .png or .mp4",
            ),
            (
                ("--tokens", 4, "--kernel", "1,1,1"),
                "give a number of tokens or kernel and stride, not both",
            ),
        ],
    )
    def test_options(
        self, bundle: Path, clip: Path, options: tuple[object, ...], sentence: str
    ) -> None:
        done = chat(bundle, clip, "What moves?", *options)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.endswith(f"{sentence}\n")

    @pytest.mark.parametrize(
        ("options", "idle"),
        [
            (
                ("-", "?", "--tokens", 4, "--end", 1),
                "--end, --tokens: of no meaning without a video",
            ),
            (
                ("a.png", "?", "--image", "b.png", "--frames", 2),
                "--frames: of no meaning for pictures",
            ),
        ],
    )
    def test_options_about_what_is_not_looked_at(
        self, bundle: Path, options: tuple[object, ...], idle: str
    ) -> None:
        self.assert_fails(chat(bundle, *options), 2, f"{idle}, leave it out")

    def test_kernel(self, bundle: Path, clip: Path) -> None:
        done = chat(bundle, clip, "What moves?", "--kernel", "1,2")
        assert done.returncode == 2
        assert "--kernel: '1,2' is not three whole numbers: t,h,w" in done.stderr
