"""What llama.cpp makes of the same file and the same text, to compare with.

`python -m smollm2.llama GGUF` needs llama-cpp-python and numpy, and nothing of PPLLaVA Edge.
"""

from __future__ import annotations

import argparse
import importlib
from importlib.metadata import version
from pathlib import Path

import numpy as np

TEXT = Path(__file__).with_name("alice.txt")


def perplexity(gguf: Path, text: str, threads: int) -> tuple[float, list[int]]:
    """Returns exp of the mean loss of every token but the first, and the tokens.

    Args:
        gguf: The model's file.
        text: Read as it is: no token is put before it.
        threads: Threads to compute with.
    """
    model = importlib.import_module("llama_cpp").Llama(
        str(gguf), n_ctx=2048, logits_all=True, n_threads=threads, verbose=False
    )
    ids = model.tokenize(text.encode(), add_bos=False, special=False)
    model.eval(ids)
    logits = np.asarray(model.scores[: len(ids) - 1], np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(logits)), ids[1:]]
    return float(np.exp(losses.mean())), list(ids)


def main() -> None:
    """Prints the perplexity and the versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    text = TEXT.read_text(encoding="utf-8")
    value, ids = perplexity(arguments.gguf, text, arguments.threads)
    print(f"llama.cpp (llama-cpp-python {version('llama-cpp-python')}): {value:.4f}")
    print(f"{len(ids)} tokens")


if __name__ == "__main__":
    main()
