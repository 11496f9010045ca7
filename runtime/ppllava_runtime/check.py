"""ppllava-check: whether a bundle computes what was exported, and sees the video it is asked about.

Hashes first; then the samples in the bundle, replayed on the backend at hand against what torch
answered; then three clips through the real assistant. What makes a model answer nonsense without
any error is found here and said in the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ppllava_engines.bundle import Bundle
from ppllava_engines.engine import DEVICES
from ppllava_engines.errors import DataError, InternalError, UsageError, run_command
from ppllava_engines.parity import STAGES, Stage, replay
from ppllava_engines.samples import Samples
from ppllava_runtime import trial
from ppllava_runtime.arrays import load_array
from ppllava_runtime.assistant import Assistant
from ppllava_runtime.prompt import Prompt
from ppllava_runtime.trial import Seen
from ppllava_runtime.video import read_clip

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["ok", "bad", "untold"]
_STYLES: dict[Status, str | None] = {"ok": None, "bad": "red", "untold": "yellow"}
_QUESTION = "What happens in this video?"
# Of 256 levels: the clips are written without loss, but colours may be rounded on their way.
_FRAME_ERROR = 2.0
# Of 256 levels: what a codec may add to any one pixel, and to all on average.
_CODEC_PEAK = 32
_CODEC_ERROR = 1.0
_ROWS = 4096
# Of the largest magnitude: logits closer together than this prefer nothing.
_LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: "untold" when it cannot be known of this bundle or clip.
        detail: The numbers, and what they mean when it is bad.
    """

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Report:
    """All that was found out about a bundle.

    Attributes:
        bundle: Its folder.
        precision: As it says of itself.
        stages: The samples' distance from torch.
        findings: Everything, the stages included, in the order of looking.
        answers: Clip → its answer, ids where the bundle has no tokenizers.
    """

    bundle: str
    precision: str
    stages: tuple[Stage, ...]
    findings: tuple[Finding, ...]
    answers: dict[str, str]

    @property
    def verdict(self) -> str:
        """`sound`, or `unsound: ` with every reason."""
        reasons = [f"{found.name}: {found.detail}" for found in self.findings if _is_bad(found)]
        return f"unsound: {'; '.join(reasons)}" if reasons else "sound"

    def table(self) -> Table:
        """The findings for a terminal."""
        from rich.table import Table

        table = Table("what", "", "found", title=f"{self.bundle}, {self.precision}")
        for found in self.findings:
            table.add_row(found.name, found.status, found.detail, style=_STYLES[found.status])
        return table

    def to_json(self) -> str:
        """The report on one line."""
        return json.dumps(dataclasses.asdict(self) | {"verdict": self.verdict}, ensure_ascii=False)


def run() -> int:
    """The exit code of ppllava-check, run with the arguments of this process."""
    return run_command(main)


def main(argv: Sequence[str]) -> int:
    """The exit code, after the verdict was printed: 0 for sound, 70 for unsound.

    Args:
        argv: The arguments without the program's name.

    Raises:
        DataError: Some file is damaged.
        PPLLaVAError: The check could not be made.
    """
    options = _parser().parse_args(argv)
    try:
        report = check_bundle(
            options.bundle, video=options.video, threads=options.threads, device=options.device
        )
    except DataError as error:
        verdict = f"unsound: {error}"
        record = {"bundle": str(options.bundle), "verdict": verdict}
        print(json.dumps(record, ensure_ascii=False) if options.json else f"verdict: {verdict}")
        raise
    if options.json:
        print(report.to_json())
    else:
        from rich.console import Console

        Console().print(report.table())
        for clip, answer in report.answers.items():
            print(f"{clip}: {answer}")
        print(f"verdict: {report.verdict}")
    return 0 if report.verdict == "sound" else InternalError.exit_code


def check_bundle(
    path: Path, *, video: Path | None = None, threads: int | None = None, device: str = "cpu"
) -> Report:
    """What there is to find out about the bundle in the folder `path`.

    Args:
        path: The bundle.
        video: A clip to look at instead of a made one.
        threads: Threads that work on one operator; None is one per core.
        device: The one to check, as in `Assistant`.

    Raises:
        DataError: A file that is not the one that was exported, or not what it must be.
        IncompatibleError: Another schema version, or a type that this backend has no kernels for.
        NotFoundError: No such folder or video, or no plans for the device.
        UnavailableError: A package or the device is missing.
    """
    bundle = Bundle.open(path, verify="full")
    manifest = bundle.manifest
    samples = Samples.read(bundle.file(manifest.samples))
    size = sum(spec.size for spec in manifest.files.values())
    findings = [Finding("files", "ok", f"{len(manifest.files)} whole, {size / 1e6:.1f} MB")]
    findings += _table_findings(bundle)
    if device == "openvino":
        from ppllava_engines.openvino import compute_dtype

        findings.append(Finding(device, "ok", f"computes the towers in {compute_dtype()}"))
    stages: list[Stage] = []
    answers: dict[str, str] = {}
    try:
        for stage in replay(
            bundle.path,
            samples,
            model=manifest.model,
            graphs=manifest.graphs,
            decoder=manifest.decoder,
            precision=manifest.precision,
            device=device,
            threads=threads,
        ):
            stages.append(stage)
            findings.append(_stage_finding(stage))
        findings += _watch(Assistant(bundle, threads, device), samples, stages, video, answers)
    except InternalError as error:
        findings.append(Finding("running", "bad", str(error)))
    return Report(str(path), str(manifest.precision), tuple(stages), tuple(findings), answers)


def _is_bad(finding: Finding) -> bool:
    return finding.status == "bad"


def _finding(name: str, good: bool, detail: str, meaning: str) -> Finding:
    return Finding(name, "ok", detail) if good else Finding(name, "bad", f"{detail}: {meaning}")


def _stage_finding(stage: Stage) -> Finding:
    return _finding(
        f"replay {stage.name}",
        stage.passed,
        f"max error {stage.max_error:.1e}, cosine {stage.cosine:.5f}, expected {stage.limit}",
        "this backend computes something else than was exported",
    )


def _table_findings(bundle: Bundle) -> Iterator[Finding]:
    """Yields what is wrong with rows of the embeddings that no sample happens to use."""
    spec = bundle.manifest.decoder
    table = load_array(bundle.file(spec.embedding), spec.dtype, (spec.vocab_size, spec.width))
    starts = range(0, len(table), _ROWS)  # some at a time: it may be larger than memory
    broken = sum(
        int((~np.isfinite(table[start : start + _ROWS])).any(axis=1).sum()) for start in starts
    )
    detail = f"{broken} of {len(table)} rows are not finite"
    yield _finding("embeddings", not broken, detail, "tokens without a meaning")


def _watch(
    assistant: Assistant,
    samples: Samples,
    stages: Sequence[Stage],
    video: Path | None,
    answers: dict[str, str],
) -> Iterator[Finding]:
    """Yields what the clips show; `answers` takes what the assistant said of them."""
    question = _question(assistant, samples)
    if isinstance(question, Finding):
        yield question
        return
    num_frames = trial.num_frames_for(assistant)
    frames = _frames_of(video, num_frames) if video else trial.moving_frames(num_frames)
    clips = {"clip": frames, "reversed": frames[::-1], "blank": trial.blank_frames(frames)}
    seen: dict[str, Seen] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shown in clips.items():
            seen[name] = trial.watch(assistant, Path(folder, f"{name}.mkv"), shown, question)
            answers[name] = seen[name].text or " ".join(map(str, seen[name].ids))
        still = trial.look(assistant, Path(folder, "still.png"), frames[0], question)
        answers["still"] = still.text or " ".join(map(str, still.ids))
    told_apart = trial.mean_error(frames, clips["blank"]) >= _CODEC_ERROR
    yield from _answer_findings(seen, still, told_apart)
    if all(one.is_finite for one in seen.values()):
        # Differences as small as those that backends may have between them show nothing.
        # (What the pooling may magnify is no measure of what logits may differ by.)
        noise = max(
            stage.tolerance
            for stage in stages
            if stage.tolerance is not None and stage.name in STAGES and stage.name != "pooled"
        )
        yield _blank_finding(seen["clip"], seen["blank"], told_apart, noise)
        yield _order_finding(seen["clip"], seen["reversed"], frames, noise)


def _question(assistant: Assistant, samples: Samples) -> str | Prompt | Finding:
    """What to ask, or what is wrong with how questions are put."""
    manifest = assistant.bundle.manifest
    template, place = manifest.model.chat_template, manifest.model.image_token_index
    if template.count("<image>\n") != 1 or template.count("{question}") != 1:
        detail = f"{template!r} has not one place for the video and one for the question"
        return Finding("template", "bad", detail)
    if not manifest.tokenizers:
        around = samples.prompt_before.tolist(), samples.prompt_after.tolist()
        before, after = ([id_ for id_ in ids if id_ != place] for ids in around)
        return Prompt(samples.text_ids, (*before, place, *after))
    try:
        assistant.prompts.build(_QUESTION).check(manifest, num_places=1, guides=True)
    except DataError as error:
        return Finding("template", "bad", str(error))
    except UsageError as error:  # ids that the decoder has not
        return Finding("tokenizer", "bad", f"its question is not understood: {error}")
    return _QUESTION


def _frames_of(video: Path, num_frames: int) -> NDArray[np.uint8]:
    clip = read_clip(video, num_frames)
    if clip.info.is_still:
        raise UsageError(f"video {video}: it is a picture, and only videos go forth and back")
    return clip.frames


def _answer_findings(seen: dict[str, Seen], still: Seen, told_apart: bool) -> Iterator[Finding]:
    """Yields what each clip, and a picture, show by themselves."""
    error = max(one.frame_error for one in seen.values())
    yield _finding(
        "decoding",
        error <= _FRAME_ERROR,
        f"frames are {error:.1f} of 256 levels from what was written",
        "videos are decoded wrongly on this machine",
    )
    lost = [name for name, one in (seen | {"still": still}).items() if not one.is_finite]
    detail = f"NaN or infinite in {', '.join(lost)}" if lost else "every value"
    yield _finding("finite", not lost, detail, "the arithmetic overflows")
    spread = min(one.spread for one in seen.values())
    yield _finding(
        "logits", spread > _LEAST_SPREAD, f"spread over {spread:.1e} of the largest",
        "the decoder prefers no token to another",
    )  # fmt: skip
    lengths = [len(one.ids) for one in seen.values()]
    detail = f"{', '.join(map(str, lengths))} ids"
    yield _finding("answers", any(lengths), detail, "it says nothing, whatever it is shown")
    said = {id_ for one in seen.values() for id_ in one.ids}
    always_one = told_apart and len(said) == 1 and min(lengths) == trial.MAX_NEW_TOKENS
    detail = f"{len(said)} different ids"
    yield _finding("variety", not always_one, detail, "one token for ever, whatever it is shown")


def _blank_finding(clip: Seen, blank: Seen, told_apart: bool, noise: float) -> Finding:
    name, apart = "clip or blank", trial.difference(clip, blank)
    detail = f"logits differ by {apart:.1e} of the largest, noise is {noise:.0e}"
    if not told_apart:
        return Finding(name, "untold", f"{detail}: there is nothing in this clip")
    return _finding(name, apart > noise, detail, _where(clip, blank, noise))


def _order_finding(clip: Seen, back: Seen, frames: NDArray[np.uint8], noise: float) -> Finding:
    name, apart = "clip or reversed", trial.difference(clip, back)
    detail = f"logits differ by {apart:.1e} of the largest, noise is {noise:.0e}"
    if np.abs(frames.astype(np.int16) - frames[::-1]).max() < _CODEC_PEAK:
        return Finding(name, "untold", f"{detail}: this clip looks the same backwards")
    if apart > noise:
        return Finding(name, "ok", detail)
    if clip.window.output(clip.memory.size)[0] == 1:
        reason = f"one window spans all {len(frames)} frames, so their order is pooled away"
        return Finding(name, "untold", f"{detail}: {reason}")
    return Finding(name, "bad", f"{detail}: {_where(clip, back, noise)}")


def _where(first: Seen, second: Seen, noise: float) -> str:
    """Where two clips become the same on their way through the model."""
    pairs = (
        ("the runtime drops the video before the vision graph", first.memory.thumbnails,
         second.memory.thumbnails),
        ("the vision graph gives the same for both", first.memory.arrays["hidden"],
         second.memory.arrays["hidden"]),
        ("pooling gives the same for both", first.prompt_embeds, second.prompt_embeds),
    )  # fmt: skip
    for meaning, a, b in pairs:
        if trial.share(np.asarray(a), np.asarray(b)) <= noise:
            return meaning
    return "the decoder ignores what it is shown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppllava-check",
        description="Finds out whether a bundle computes here what was exported.",
        epilog="Exit code 0: sound; 70: unsound; 65: damaged files; 78: not for this backend.",
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="folder made by ppllava-export")
    add("--video", type=Path, metavar="PATH", help="clip to look at (default: one that is made)")
    add("--json", action="store_true", help="one JSON object instead of the table")
    add("--device", choices=DEVICES, default="cpu", help="openvino is a CPU too, tensorrt a GPU "
        "that needs ppllava-build (default: %(default)s)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="default: one per core")
    return parser


if __name__ == "__main__":
    sys.exit(run())
