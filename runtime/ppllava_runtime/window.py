"""How much is pooled: kernel and stride over (T,h,w), given or derived from a budget of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from ppllava_engines.errors import UsageError
from ppllava_runtime.anyres import Tiling

Axes = tuple[int, int, int]


@dataclass(frozen=True)
class Window:
    """The extent and the step of the pooling windows, over (T,h,w)."""

    kernel: Axes
    stride: Axes

    def output(self, size: Axes) -> Axes:
        """The number of windows per axis on `size` tokens: floor((I-k)/s)+1."""
        axes = zip(size, self.kernel, self.stride, strict=True)
        t, h, w = ((i - k) // s + 1 for i, k, s in axes)
        return (t, h, w)

    def num_tokens(self, size: Axes) -> int:
        """The number of windows in all, N."""
        return math.prod(self.output(size))


def choose_window(
    size: Axes,
    default: Window,
    kernel: Axes | None = None,
    stride: Axes | None = None,
    num_tokens: int | None = None,
) -> Window:
    """The window that a caller asked for, or the model's own.

    The model's own shrinks to fit a video of fewer tokens; one that is asked for must fit. Of
    kernel and stride, the one not given equals the other: windows side by side.

    Args:
        size: Tokens (T,h,w) of the video.
        default: The model's own.
        kernel: The extent of a window.
        stride: Its step.
        num_tokens: Instead of these, the most tokens after pooling (see `window_within`).

    Raises:
        UsageError: Both a budget and a window, a value below 1, or a kernel larger than the video.
    """
    if num_tokens is not None:
        if kernel or stride:
            raise UsageError("give a number of tokens or kernel and stride, not both")
        return window_within(num_tokens, size, default)
    if kernel is None and stride is None:
        return Window(_fitted(default.kernel, size), default.stride)
    window = Window(kernel or stride or size, stride or kernel or size)
    for name, values in (("kernel", window.kernel), ("stride", window.stride)):
        if len(values) != 3 or min(values) < 1:
            raise UsageError(f"{name} is {_shown(values)}, expected three numbers of 1 or more")
    if window.kernel != _fitted(window.kernel, size):
        raise UsageError(
            f"kernel {_shown(window.kernel)} does not fit into the {_shown(size)} tokens (t,h,w) "
            "that were seen: make it smaller"
        )
    return window


def choose_pictures_window(
    size: Axes,
    default: Window,
    kernel: Axes | None = None,
    stride: Axes | None = None,
    num_tokens: int | None = None,
) -> Window:
    """The window for several pictures, of which a budget gives each the same share.

    Only a `kernel`, asked for or the model's own, that extends over T pools different pictures
    together.

    Args:
        size: Tokens (T,h,w) of the pictures.
        default: The model's own.
        kernel: The extent of a window.
        stride: Its step.
        num_tokens: Instead of these, the most tokens of all pictures together.

    Raises:
        UsageError: See `choose_window`; or a budget that not even one token per picture keeps.
    """
    if num_tokens is None or kernel or stride or default.kernel[0] > 1:
        return choose_window(size, default, kernel, stride, num_tokens)
    count, *grid = size
    if num_tokens < count:
        raise UsageError(
            f"the number of tokens is {num_tokens}, but these {count} pictures take {count} or more"
        )
    alone = Window((1, *default.kernel[1:]), (1, *default.stride[1:]))
    return window_within(num_tokens // count, (1, grid[0], grid[1]), alone)


def choose_tile_window(
    tiling: Tiling,
    grid: tuple[int, int],
    default: Window,
    kernel: Axes | None = None,
    stride: Axes | None = None,
    num_tokens: int | None = None,
) -> Window:
    """The window for each view of a picture in tiles. It extends over one view and steps by one.

    Args:
        tiling: How the picture was cut.
        grid: Patches (h,w) of a view.
        default: The model's own; over T it counts as 1.
        kernel: The extent of a window; over T it must be 1.
        stride: Its step; over T it counts as 1.
        num_tokens: Instead of these, the most tokens of all views and their newlines together.

    Raises:
        UsageError: See `choose_window`; or a budget that no window keeps.
    """
    size = (1, *grid)
    if num_tokens is None or kernel or stride:
        window = choose_window(size, default, kernel, stride, num_tokens)
        return Window((1, *window.kernel[1:]), (1, *window.stride[1:]))
    # Not always of 1×1: what a larger output leaves of thin pictures may be nothing.
    rows, columns = map(_outputs, grid)
    fewest = min(product(rows, columns), key=lambda output: tiling.num_tokens(*output))
    if num_tokens < tiling.num_tokens(*fewest):
        raise UsageError(
            f"the number of tokens is {num_tokens}, but this picture in {tiling.num_views} views "
            f"takes {tiling.num_tokens(*fewest)} or more"
        )
    per_view = math.prod(size)
    while per_view:
        window = window_within(min(per_view, num_tokens), size, default)
        _, h, w = window.output(size)
        if tiling.num_tokens(h, w) <= num_tokens:
            return window
        per_view = h * w - 1
    return _covering((1, *fewest), size)


def window_within(num_tokens: int, size: Axes, default: Window) -> Window:
    """The window that pools `size` tokens to at most `num_tokens`, in the default's proportions.

    The ideal output is the default's, scaled alike on all axes until it fills the budget or the
    video. Of the outputs within the budget the one is taken with the smallest sum of squared log
    ratios: of each axis to the ideal, and of all tokens to the budget. Ties go to more tokens, then
    to more frames, then to more rows. An output O gets stride I//O and kernel I-(O-1)·stride, so
    that no token is left out; outputs whose windows would overlap by more than half are not
    considered.

    Args:
        num_tokens: The budget.
        size: Tokens (T,h,w) of the video.
        default: The model's own window; its own budget gives it back where it leaves no token out.

    Raises:
        UsageError: A budget below 1.
    """
    if num_tokens < 1:
        raise UsageError(f"the number of tokens is {num_tokens}, expected 1 or more")
    natural = Window(_fitted(default.kernel, size), default.stride).output(size)
    ideal = _scaled(natural, size, num_tokens)
    t, h, w = (_outputs(axis) for axis in size)
    choices = [output for output in product(t, h, w) if math.prod(output) <= num_tokens]

    def preference(output: Axes) -> tuple[float, int, Axes]:
        ratios = [o / best for o, best in zip(output, ideal, strict=True)]
        ratios.append(math.prod(output) / math.prod(ideal))
        distance = sum(math.log(ratio) ** 2 for ratio in ratios)
        return (-round(distance, 9), math.prod(output), output)

    return _covering(max(choices, key=preference), size)


def _covering(output: Axes, size: Axes) -> Window:
    """The window that makes `output` of `size` tokens and leaves none of them out."""
    (kt, st), (kh, sh), (kw, sw) = (_span(i, o) for i, o in zip(size, output, strict=True))
    return Window((kt, kh, kw), (st, sh, sw))


def _scaled(natural: Axes, size: Axes, num_tokens: int) -> list[float]:
    """`natural` scaled alike on all axes to `num_tokens`; what one axis cannot take, others do."""
    ideal = [float(axis) for axis in size]
    free = [0, 1, 2]
    while free:
        taken = math.prod(size[axis] for axis in range(3) if axis not in free)
        wanted = num_tokens / taken / math.prod(natural[axis] for axis in free)
        scale = wanted ** (1 / len(free))
        fitting = [axis for axis in free if natural[axis] * scale <= size[axis]]
        if fitting == free:
            for axis in free:
                ideal[axis] = natural[axis] * scale
            break
        free = fitting
    return ideal


def _outputs(size: int) -> list[int]:
    spans = ((output, *_span(size, output)) for output in range(1, size + 1))
    return [output for output, kernel, stride in spans if kernel <= 2 * stride]


def _span(size: int, output: int) -> tuple[int, int]:
    stride = size // output
    return size - (output - 1) * stride, stride


def _fitted(axes: Axes, size: Axes) -> Axes:
    t, h, w = (min(axis, most) for axis, most in zip(axes, size, strict=True))
    return (t, h, w)


def _shown(axes: tuple[int, ...]) -> str:
    return ",".join(map(str, axes))
