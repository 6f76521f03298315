"""How the leading axes of an error lie on those of a tap, and which of them counts the samples.

A *layout* `(a, b)` says that axis `a` of the error and axis `b` of the tap count the samples. All
other leading axes correspond in order; where the error has none, or one of size 1, it is repeated,
and either of the two may have joined neighbouring axes, as a head on flattened tokens does.
Shapes: error (..., k), tap (..., features).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from altprop.errors import ConfigError, RuleError

# why it may stay open which axis counts the samples
SEVERAL = "it runs several times, with the samples on different axes"
MIXED = "no axis was found along which the samples are independent of one another"
OTHERWISE = "in evaluation mode it ran otherwise, or not at all"

Layout = tuple[int, int]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """An error laid on a tap by one layout."""

    layout: Layout
    view: Shape
    """The error's leading axes in its own order, one for each of the tap's, 1 where repeated."""
    fine: Shape
    """The tap's leading axes before it joined any."""
    want: Shape
    """The tap's leading axes."""

    def turn(self, tap: Tensor) -> Tensor:
        """Return a tap (..., features) with its leading axes in the order of the error's."""
        if self.fine != self.want:
            tap = tap.reshape(*self.fine, tap.shape[-1])
        error_axis, tap_axis = self.layout
        return tap if error_axis == tap_axis else tap.movedim(tap_axis, error_axis)

    def pairs(self) -> list[tuple[int, int]]:
        """Return, for each axis of the tap, its size and the step that it makes in the error.

        Two fits pair the same positions if these are equal; axes of size 1 do not count.
        """
        if 0 in self.fine:
            return []
        steps: list[int] = []
        step = 1
        for size in reversed(self.view):
            steps.insert(0, 0 if size == 1 else step)
            step *= size
        moved = _moved(tuple(steps), *self.layout)
        return [(size, step) for size, step in zip(self.fine, moved, strict=True) if size != 1]


def _moved(axes: Shape, source: int, target: int) -> Shape:
    moved = list(axes)
    if moved:
        moved.insert(target, moved.pop(source))
    return tuple(moved)


def _joins(fine: Shape, coarse: Shape) -> bool:
    """Say whether `coarse` is `fine` with some neighbouring axes multiplied."""
    left, product = list(fine), 1
    for size in coarse:
        product = 1
        while product != size:
            if not left:
                return False
            product *= left.pop(0)
    return all(product * size == product for size in left)


def _in_order(have: Shape, want: Shape) -> Shape | None:
    """Return the axes, 1 where repeated, as which `have` broadcasts against `want`; or nothing."""
    if _joins(want, have):
        return want
    padded = have + (1,) * (len(want) - len(have))
    pairs = zip(padded, want, strict=True) if len(padded) == len(want) else ()
    return padded if pairs and all(mine == 1 or mine == size for mine, size in pairs) else None


def fit(have: Shape, want: Shape, layout: Layout) -> Fit | None:
    """Lay leading axes `have` of an error on those of a tap, `want`; or return nothing."""
    a, b = layout
    if max(a, b) >= max(len(have), len(want), 1):
        return None
    if len(have) > len(want):
        fine = _moved(have, a, b)
        return Fit(layout, have, fine, want) if _joins(fine, want) else None
    turned = _moved(want, b, a)
    view = _in_order(have, turned)
    # a sample is repeated over its tokens, and never over samples; () is one sample by itself
    if view is None or (len(have) > 0 and view[a] != turned[a]):
        return None
    return Fit(layout, view, want, want)


def fits(have: Shape, want: Shape) -> list[list[Fit]]:
    """Return all ways to lay an error on a tap, those together that pair the same positions."""
    groups: list[list[Fit]] = []
    rank = max(len(have), len(want), 1)
    for layout in ((a, b) for a in range(rank) for b in range(rank)):
        found = fit(have, want, layout)
        if found is None:
            continue
        for group in groups:
            if group[0].pairs() == found.pairs():
                group.append(found)
                break
        else:
            groups.append([found])
    return groups


def allowed_layouts(batch_axis: int | tuple[int, int] | None) -> tuple[Layout, ...]:
    """Return the layouts that a user's `batch_axis` allows, the first that fits to be taken.

    One axis is that of taps and error alike, or the error has no other axis than the samples'; a
    pair is the error's and the taps'. **Raises:** `ConfigError` for anything else.
    """
    if batch_axis is None:
        return ()
    axes = batch_axis if isinstance(batch_axis, tuple) else (batch_axis, batch_axis)
    whole = all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes)
    if not whole or len(axes) != 2 or min(axes) < 0:
        raise ConfigError(
            f"batch_axis must be an axis counted from 0, or two: (the error's, the taps'), not "
            f"{batch_axis!r}"
        )
    return (axes,) if isinstance(batch_axis, tuple) else (axes, (0, batch_axis))


def spread_error(e: Tensor, shape: Shape) -> Tensor:
    """Return `e` (..., k) with axes that broadcast against the leading axes of `shape`.

    The axes correspond in order; an error with fewer has joined some of them, or lacks the last.

    **Raises:** `RuleError` when neither fits.
    """
    have, want = tuple(e.shape[:-1]), tuple(shape[:-1])
    if have == want:
        return e
    view = _in_order(have, want)
    if view is None:
        raise misfit("", e.shape, shape, ())
    return e.reshape(*view, e.shape[-1])


def spread_given(e: Tensor, shape: Shape) -> Tensor:
    """Return an error that a user hands over as `spread_error` does, where its axes are certain.

    **Raises:** `RuleError` when nothing fits, or when the shapes leave open which axes it lacks.
    """
    have, want = tuple(e.shape[:-1]), tuple(shape[:-1])
    if len(have) < len(want) and not _joins(want, have) and len(fits(have, want)) > 1:
        raise RuleError(
            f"an error of shape {tuple(e.shape)} may lack the first or a later axis of "
            f"{tuple(shape)}: write e.unsqueeze(1) if samples come first, or e.unsqueeze(0)"
        )
    return spread_error(e, shape)


def misfit(path: str, error: Shape, tap: Shape, layouts: tuple[Layout, ...]) -> RuleError:
    """Say that an error does not lie on a tap, by the `layouts` that were given if there were."""
    given = f" by (error's, tap's) batch axes {' or '.join(map(str, layouts))}" if layouts else ""
    return RuleError(
        f"{path}{': ' * bool(path)}an error of shape {tuple(error)} does not fit a tap of shape "
        f"{tuple(tap)}{given}: it must have the tap's samples, and its tokens or none; what sees "
        f"another sequence stays on backprop with {path or 'its path'!r}: Backprop() as the first "
        "pattern"
    )


def undecided(path: str, error: Shape, tap: Shape, why: str) -> RuleError:
    """Say that shapes leave several layouts open, and why measuring left them open too."""
    return RuleError(
        f"{path}: an error of shape {tuple(error)} can lie on a tap of shape {tuple(tap)} in more "
        f"than one way, and {why}: write convert(..., batch_axis=0) if the first axis counts the "
        "samples, batch_axis=1 for (T, N, C)"
    )
