"""`ppllava-export CHECKPOINT OUT`: a checkpoint folder → a bundle, with its parity table."""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

from ppllava_engines.errors import PPLLaVAError, run_command
from ppllava_engines.progress import stage_bar

from . import STAGES, export_bundle

_M_MMAP_THRESHOLD = -3  # glibc's name for a parameter of malloc
_MAPPED_BLOCK = 1 << 20


def main(argv: Sequence[str]) -> None:
    """Exports one checkpoint and prints how far its graphs are from torch.

    Args:
        argv: The arguments without the program's name.

    Raises:
        PPLLaVAError: The export failed; see `export_bundle`.
        SystemExit: `--help`, or arguments that are not understood.
    """
    args = _parser().parse_args(argv)
    with stage_bar("exporting", len(STAGES)) as show:
        export_bundle(
            args.checkpoint,
            args.out,
            args.dtype,
            vision=args.vision,
            decoder=args.decoder,
            prefill=args.prefill,
            calibration=args.calibrate,
            clip=args.clip,
            skip_tokenizer=args.skip_tokenizer,
            overwrite=args.overwrite,
            on_stage=(lambda stage: show(stage, True)) if show else None,
        )
    _build_plans(args.out)
    from rich.console import Console

    from ppllava_engines.parity import Parity

    Console().print(Parity.read(args.out).table())
    if args.clip:
        from .open_clip_source import OpenClipSpec

        if warning := OpenClipSpec.parse(args.clip).warning():
            print(f"warning: {warning}", file=sys.stderr)


def _build_plans(out: Path) -> None:
    """Builds the bundle's plans where TensorRT and a GPU are; elsewhere it does nothing, at once.

    The bundle is whole already: when the build fails, that is said and the export has succeeded.
    """
    from ppllava_engines.devices import find_gpu
    from ppllava_engines.tensorrt.builder import is_installed

    if not is_installed("tensorrt") or find_gpu() is None:
        return
    from ppllava_engines import build
    from ppllava_engines.bundle import Bundle
    from ppllava_engines.tensorrt.tasks import build_plans

    print("TensorRT and a GPU are here: building plans, as ppllava-build does", file=sys.stderr)
    try:
        bundle = Bundle.open(out)
        task = build.task_here(bundle.manifest, build.machine_here("tensorrt"))
        plans = build_plans(bundle, task)
    except PPLLaVAError as error:
        print(f"warning: no plans were built, the bundle is whole: {error}", file=sys.stderr)
    else:
        print(f"plans: {plans.path}", file=sys.stderr)


def run() -> int:
    """Returns the exit code of the command with the process's arguments."""
    _return_freed_memory()
    return run_command(main)


def _return_freed_memory() -> None:
    """Has memory go back to the system when it is freed, where the C library is glibc."""
    # From itself it keeps freed blocks of up to 32 MiB, the size of many a tensor: after a model
    # was gone through, that is some hundred megabytes.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BLOCK)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppllava-export",
        description="Make a bundle that runs without torch out of a trained PPLLaVA checkpoint.",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder with config.json and weights")
    add("out", type=Path, help="folder of the bundle")
    dtype = parser.add_mutually_exclusive_group()
    dtype.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32",
        help="type of the floats, float32 where it matters (default: %(default)s)")  # fmt: skip
    dtype.add_argument("--fp16", action="store_const", const="fp16", dest="dtype",
        help="the same as --dtype fp16")  # fmt: skip
    add("--vision", choices=("int8",), help="quantize the vision graph's linear layers")
    add("--calibrate", type=Path, nargs="+", action="extend", default=[],
        metavar="VIDEO",
        help="videos like those the model will see: --vision int8 by what they bring, "
             "for TensorRT and OpenVINO")  # fmt: skip
    add("--decoder", choices=("int8", "int4"), help="quantize the decoder's weights")
    add("--prefill", choices=("int8",),
        help="a second decoder graph, for prompts, beside a quantized decoder")  # fmt: skip
    add("--clip", metavar="open_clip:MODEL[:FILE]",
        help="text tower and projections from open_clip instead of the checkpoint's")  # fmt: skip
    add("--skip-tokenizer", action="store_true", help="export a checkpoint without tokenizer files")
    add("--overwrite", action="store_true", help="replace the bundle that is in OUT")
    return parser


if __name__ == "__main__":
    sys.exit(run())
