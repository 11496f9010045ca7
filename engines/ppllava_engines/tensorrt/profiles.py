"""For which shapes a graph's plan is built: optimisation profiles, from what the bundle says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ppllava_engines.errors import IncompatibleError, UsageError
from ppllava_engines.manifest import Axes, GraphSpec, Manifest, ModelSpec

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]

DEFAULT_TOKENS = 4096
# As the runtime encodes frames that do not see each other.
FRAMES_PER_RUN = 4
# The runtime takes a longer prompt in parts. Scores of n new tokens with c cached ones take some
# 6·heads·n·(c + n) bytes of activations: half a gigabyte for these, c of 4,096 and 32 heads.
PART_OF_PROMPT = 512


@dataclass(frozen=True)
class Profile:
    """One range of shapes a plan accepts, and the shape it is tuned for.

    Attributes:
        name: "frames" of vision and pool, "question" of text, "prefill" and "step" of the decoder.
        shapes: Input → (smallest, tuned for, largest) shape, of every input but those in `values`.
        values: Input → (smallest, tuned for, largest) content, of the inputs whose values are
            shapes themselves: the pool's kernel and stride where they are inputs of its plugin.
    """

    name: str
    shapes: dict[str, Range]
    values: dict[str, Range]

    def accepts(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether every one of these inputs' shapes is within its range."""
        return all(
            len(shape) == len(self.shapes[name][0])
            and all(
                low <= size <= high
                for low, size, high in zip(
                    self.shapes[name][0], shape, self.shapes[name][2], strict=True
                )
            )
            for name, shape in shapes.items()
            if name in self.shapes
        )


def graph_profiles(
    manifest: Manifest,
    name: str,
    spec: GraphSpec,
    *,
    frames: int | None = None,
    tokens: int | None = None,
) -> tuple[Profile, ...]:
    """The profiles of the graph `name`, in the order in which its plan has them.

    Args:
        manifest: The bundle's.
        name: "vision", "text", "pool" or "decoder".
        spec: The graph as it was lowered for TensorRT, with dynamic axes T, n and c.
        frames: Most frames of a video; None is the model's max_frames.
        tokens: Most tokens of prompt and answer, the capacity of the cache; None is
            `DEFAULT_TOKENS` or what the decoder takes, whichever is less.

    Raises:
        IncompatibleError: A dynamic axis that has no range here.
        UsageError: More frames or tokens than the model takes, or none.
    """
    model = manifest.model
    most_frames = _bounded("frames", frames, model.max_frames, model.max_frames)
    positions = manifest.decoder.max_positions
    capacity = _bounded("tokens", tokens, min(DEFAULT_TOKENS, positions), positions)
    usual_frames = min(model.default_frames, most_frames)
    text = (1, min(16, model.text_positions), model.text_positions)
    if name == "vision":
        at_once = min(FRAMES_PER_RUN, most_frames)
        usual, most = (usual_frames, most_frames) if model.frames_coupled else (at_once, at_once)
        axes = {"frames": {"T": (1, usual, most)}}
    elif name == "pool":
        axes = {"frames": {"T": (1, usual_frames, most_frames)}}
    elif name == "text":
        axes = {"question": {"n": text}}
    else:
        # An empty cache is passed as one masked position: TensorRT has no use for empty tensors.
        usual, part = min(prompt_tokens(model), capacity), min(PART_OF_PROMPT, capacity)
        seen = capacity if usual > part else 1
        axes = {
            "prefill": {"n": (1, min(usual, part), part), "c": (1, seen, capacity)},
            # Where n can only be 1, TensorRT-RTX keeps all weights a second time, laid out for it.
            "step": {"n": (1, 1, 2), "c": (1, capacity, capacity)},
        }
    values = _window_values(model, spec, most_frames) if name == "pool" else {}
    return tuple(_profile(spec, profile, ranges, values) for profile, ranges in axes.items())


def _bounded(what: str, asked: int | None, usual: int, most: int) -> int:
    if asked is None:
        return usual
    if not 1 <= asked <= most:
        raise UsageError(f"profiles: {asked} {what}, expected 1 to {most}: ask for as many")
    return asked


def prompt_tokens(model: ModelSpec) -> int:
    """The tokens of a usual prompt: those of a video of default_frames, and some words."""
    size = (model.default_frames, *model.grid)
    windows = 1
    for axis, extent in enumerate(size):
        windows *= max(0, extent - model.kernel[axis]) // model.stride[axis] + 1
    return windows + 64


def _window_values(model: ModelSpec, spec: GraphSpec, most_frames: int) -> dict[str, Range]:
    """Ranges of the pool's kernel and stride, where they are inputs of the lowered graph."""
    most: Axes = (most_frames, *model.grid)
    windows = {"kernel": model.kernel, "stride": model.stride}
    return {
        tensor.name: ((1, 1, 1), _least(windows[tensor.name], most), most)
        for tensor in spec.inputs
        if tensor.name in windows
    }


def _least(first: Axes, second: Axes) -> Axes:
    return (min(first[0], second[0]), min(first[1], second[1]), min(first[2], second[2]))


def _profile(
    spec: GraphSpec,
    name: str,
    axes: Mapping[str, tuple[int, int, int]],
    values: dict[str, Range],
) -> Profile:
    shapes = {}
    for tensor in spec.inputs:
        if tensor.name in values:
            continue
        unknown = [axis for axis in tensor.shape if isinstance(axis, str) and axis not in axes]
        if unknown:
            raise IncompatibleError(
                f"profiles: {spec.path} has axis {unknown[0]} in {tensor.name}, expected one of "
                f"{', '.join(axes)}: use the release that exported the bundle"
            )
        low, usual, high = (
            tuple(axes[axis][which] if isinstance(axis, str) else axis for axis in tensor.shape)
            for which in range(3)
        )
        shapes[tensor.name] = (low, usual, high)
    return Profile(name, shapes, values)
