"""How much a bundle's decoder loses to its precision, on a text it did not write.

`python -m smollm2.perplexity BUNDLE...` feeds alice.txt token by token, through the cache, to the
decoder of each bundle and prints a row for each; llama.cpp's is printed by `smollm2.llama`.
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from ppllava_engines.bundle import Bundle, DecoderSpec
from ppllava_engines.onnxruntime import open_session

from .llama import TEXT

_TOOLS = ("ppllava-edge", "onnxruntime", "onnxruntime-genai", "numpy")


def losses(folder: Path, decoder: DecoderSpec, ids: list[int]) -> NDArray[np.float64]:
    """Returns -log p of every token but the first, given those before it.

    Args:
        folder: The bundle.
        decoder: What its manifest says of the decoder.
        ids: The text.
    """
    session = open_session(folder / decoder.path)
    table = np.load(folder / decoder.embedding, mmap_mode="r")
    names = [output.name for output in session.get_outputs()]
    empty = np.zeros((1, decoder.num_kv_heads, 0, decoder.head_dim), table.dtype)
    past = {name: empty for name in names if name != "logits"}
    out = np.empty(len(ids) - 1)
    for at, (token, following) in enumerate(pairwise(ids)):
        mask = np.ones((1, at + 1), np.int64)
        feeds = {name.replace("present", "past_key_values"): past[name] for name in past}
        feeds |= {"inputs_embeds": table[[token]][None], "attention_mask": mask}
        past = dict(zip(names, session.run(names, feeds), strict=True))
        logits = past.pop("logits")[0, 0].astype(np.float64)
        peak = logits.max()
        out[at] = np.log(np.exp(logits - peak).sum()) + peak - logits[following]
    return out


def main() -> None:
    """Prints the table, with the versions of what was used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    text = TEXT.read_text(encoding="utf-8")
    rows = Table("bundle", "precision", "decoder, MB", "perplexity", "ms per token", box=None)
    for path in parser.parse_args().bundles:
        bundle = Bundle.open(path)
        decoder = bundle.manifest.decoder
        tokenizer = Tokenizer.from_file(str(bundle.file(bundle.manifest.tokenizers["decoder"])))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        started = time.perf_counter()
        value = np.exp(losses(path, decoder, ids).mean())
        each = (time.perf_counter() - started) / len(ids) * 1000
        size = sum(file.stat().st_size for file in bundle.file(decoder.path).parent.glob("model*"))
        megabytes = f"{size / 1e6:.0f}"
        precision = str(bundle.manifest.precision)
        rows.add_row(path.name, precision, megabytes, f"{value:.4f}", f"{each:.1f}")
    console = Console()
    console.print(rows)
    console.print(f"{TEXT.name}; " + ", ".join(f"{tool} {version(tool)}" for tool in _TOOLS))


if __name__ == "__main__":
    main()
