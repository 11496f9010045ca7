"""`open_clip:MODEL[:FILE]` → that model's alignment in the place of a checkpoint's."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    NotFoundError,
    UnavailableError,
    UsageError,
)

from .mapped import release
from .modules.config import ModelConfig
from .open_clip_alignment import OpenClipAlignment
from .quiet import quiet
from .weights import check_values, differences, read_tensors, refuse_hard_links

_SCHEME = "open_clip"
_SEED = 0
_PACKAGE = "pip install 'ppllava-edge[open-clip]'"
_PART = "state_dict"  # of what open_clip's own training saves
_PARALLEL = "module."  # before each name where that ran on several devices
# Numbers that a file may hold in either shape, of which the second is not in every file.
_SCALE, _BIAS = "logit_scale", "logit_bias"


@dataclass(frozen=True)
class OpenClipSpec:
    """What `--clip` says.

    Attributes:
        model: A name that open_clip knows.
        file: Its weights; None for random ones, the same every time.
    """

    model: str
    file: Path | None

    @staticmethod
    def parse(text: str) -> OpenClipSpec:
        """Returns what `text` says.

        Raises:
            UsageError: Not of the form open_clip:MODEL or open_clip:MODEL:FILE.
        """
        scheme, _, rest = text.partition(":")
        model, colon, file = rest.partition(":")
        if scheme != _SCHEME or not model or (colon and not file):
            raise UsageError(
                f"--clip is {text!r}, expected {_SCHEME}:MODEL or {_SCHEME}:MODEL:FILE"
            )
        return OpenClipSpec(model, Path(file) if file else None)

    def warning(self) -> str | None:
        """Returns a sentence for people when the weights will be random."""
        if self.file is not None:
            return None
        return (
            f"{self.model} of open_clip has random weights, so the question guides the pooling at "
            "random: name a file of its weights unless this is a test"
        )


def replace_alignment(config: ModelConfig, clip: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Returns the config with an open_clip model's alignment, and the alignment's tensors.

    That is all that brings questions and patches together: text tower, both projections or heads,
    and logit scale; every tensor that a checkpoint names `multi_modal_projector.clip_*` or
    `.logit_*`. The vision tower stays, and the text tower's context is the model's own.

    Args:
        config: Of a checkpoint whose vision tower is of the model's kind and width.
        clip: `open_clip:MODEL[:FILE]`. FILE is safetensors, or what torch's safe loader reads;
            it is mapped. Without it the weights are random, which is warned of.

    Raises:
        DataError: A file that is malformed or asks to run code, or whose tensors are not the
            model's or not finite; names them all.
        IncompatibleError: A model of another kind or width, or of parts that PPLLaVA's graphs do
            not have; names every reason.
        NotFoundError: There is no such file.
        UnavailableError: open_clip, or what it needs for this model, is not installed.
        UsageError: Not such a text, or a model that open_clip does not know.
    """
    spec = OpenClipSpec.parse(clip)
    if spec.file is not None and not spec.file.is_file():
        raise NotFoundError(f"--clip {clip}: there is no file {spec.file}")
    model = _build(spec.model, "meta")
    reasons = list(OpenClipAlignment(model, config).reasons())
    if reasons:
        raise IncompatibleError(
            f"--clip: {spec.model} of open_clip does not fit {config.name}: {'; '.join(reasons)}"
        )
    if (sentence := spec.warning()) is not None:
        warnings.warn(sentence, stacklevel=2)
        model = _build(spec.model, "cpu")
    else:
        assert spec.file is not None
        _load(model, spec.file)
    alignment = OpenClipAlignment(model, config)
    tensors = alignment.tensors()
    files = [spec.file] if spec.file else []
    limit = torch.finfo(torch.float32).max
    check_values(tensors, str(spec.file or spec.model), limit, lambda: release(files))
    return alignment.config(), tensors


def _build(name: str, device: str) -> nn.Module:
    """Returns the model on `device`: with random weights, or on meta without any."""
    # timm warns of what it deprecates, open_clip of weights that nobody asked for.
    with quiet():
        try:
            import open_clip
        except ModuleNotFoundError as error:
            raise UnavailableError(
                f"--clip needs the package {error.name!r}, which is missing: {_PACKAGE}"
            ) from error
        known = open_clip.list_models()
        if name not in known:
            near = difflib.get_close_matches(name, known) or ["ViT-L-14-336"]
            raise UsageError(
                f"--clip: open_clip has no model {name!r}, expected e.g. {' or '.join(near)}"
            )
        text = open_clip.get_model_config(name)["text_cfg"].get("hf_model_name")
        if text:  # whose config open_clip would get from a hub
            raise IncompatibleError(
                f"--clip: the text tower of {name} is {text!r}, expected open_clip's own"
            )
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                torch.manual_seed(_SEED)
                model: nn.Module = open_clip.create_model(
                    name, load_weights=False, pretrained_text=False, device=device
                )
        except RuntimeError as error:
            if "timm" not in str(error):
                raise
            raise UnavailableError(
                f"--clip: {name} needs the package 'timm', which is missing: {_PACKAGE}"
            ) from error
    return model.requires_grad_(False).eval()


def _load(model: nn.Module, path: Path) -> None:
    """Maps the file's tensors into `model`.

    Raises:
        DataError: It is malformed, or not of this model; names every tensor concerned.
    """
    refuse_hard_links([path])
    tensors = read_tensors(path, _PART)
    if all(name.startswith(_PARALLEL) for name in tensors):
        tensors = {name.removeprefix(_PARALLEL): tensor for name, tensor in tensors.items()}
    expected = model.state_dict()
    for name in (_SCALE, _BIAS):
        if name in tensors and name in expected and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(expected[name].shape)
    if _BIAS in expected:  # no softmax sees it
        tensors.setdefault(_BIAS, torch.zeros(expected[_BIAS].shape))
    problems = differences(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )
    if problems:
        raise DataError(f"{path}: not the weights of this model, {problems}")
    model.load_state_dict(tensors, assign=True)
