"""Forward = reverse = finite differences, on the user's own loop."""

from __future__ import annotations

__all__ = ["hypergradcheck"]

from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from metaopt.check.causes import causes
from metaopt.check.differences import Difference, difference
from metaopt.check.report import Report, Row
from metaopt.check.training import Outer, Train, Training, refuse_arguments
from metaopt.errors import CheckError
from metaopt.hyperparameters import name_of
from metaopt.modes.run import Watchable

Hyper = Tensor | Iterable[Tensor | torch.nn.Module] | Mapping[str, Tensor] | torch.nn.Module

_FORWARD_AT_MOST = 1000
_SEARCHED_FOR = 3


@overload
def hypergradcheck(
    train: Train,
    outer: Outer,
    hyper: Hyper,
    *,
    optimizer: Watchable | None = ...,
    entries: int = ...,
    step: float = ...,
    rtol: float = ...,
    atol: float = ...,
    forward: bool | None = ...,
    verify: str = ...,
    raise_exception: Literal[True] = ...,
) -> Literal[True]: ...


@overload
def hypergradcheck(
    train: Train,
    outer: Outer,
    hyper: Hyper,
    *,
    optimizer: Watchable | None = ...,
    entries: int = ...,
    step: float = ...,
    rtol: float = ...,
    atol: float = ...,
    forward: bool | None = ...,
    verify: str = ...,
    raise_exception: Literal[False],
) -> Report: ...


def hypergradcheck(
    train: Train,
    outer: Outer,
    hyper: Hyper,
    *,
    optimizer: Watchable | None = None,
    entries: int = 3,
    step: float = 1e-4,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    forward: bool | None = None,
    verify: str = "first",
    raise_exception: bool = True,
) -> bool | Report:
    """Check the hypergradient of a training loop against finite differences of the bare loop.

    The training runs under `metaopt.record`, under `metaopt.stream`, and bare, with each hyperparameter moved a little
    to both sides, as in ``torch.autograd.gradcheck``. It should be small (some steps, some examples), deterministic,
    and in float64.

    Args:
        train: runs the training from its beginning, and returns what ``outer`` needs (the model, say). It is called
            with ``watch``, to be used where `metaopt.record` would be: ``with watch(optimizer): ...``. With
            ``optimizer=`` it is the loop alone, without arguments, and what it trains is put back after each run.
        outer: the outer objective: a function of what ``train`` returned (or of nothing), to a scalar tensor.
        hyper: the hyperparameters to check: `metaopt.Hyperparameters`, or leaves that require grad, alone, in a list or
            by name.
        optimizer: the optimizer (or several), if it and the model are made outside of ``train``.
        entries: how many entries of a larger hyperparameter are looked at one by one; all of them together are looked
            at along a random direction, and where that differs the entries to blame are searched for.
        step: the finite differences' step, in the unit of each entry.
        rtol: what counts as different, relative to the derivative.
        atol: and relative to the objective, per unit of the entry.
        forward: whether to run forward mode; None for up to a thousand entries.
        verify: as for `metaopt.record`.
        raise_exception: whether to raise if something differs, or to return the report.

    Returns:
        True; or with ``raise_exception=False`` a `Report`, which is true where all agrees and prints as a table.

    Raises:
        CheckError: if something differs, or can't be told; the text is the report, with the likely causes. Or if an
            argument is of the wrong kind.
        CaptureError: if the loop can't be captured at all.

    Example:
        >>> def train(watch):
        ...     torch.manual_seed(0)
        ...     model = torch.nn.Linear(3, 1, dtype=torch.float64)
        ...     optimizer = metaopt.optim.SGD(model.parameters(), lr=lr)
        ...     with watch(optimizer):
        ...         for _ in range(5):
        ...             optimizer.zero_grad()
        ...             loss(model).backward()
        ...             optimizer.step()
        ...     return model
        >>> metaopt.check.hypergradcheck(train, validation_loss, lr)
        True
    """
    refuse_arguments(train, outer, entries, step, rtol, atol)
    named = _named(hyper)
    training = Training(train, outer, optimizer, verify, list(named.values()))
    checked = _Checked(training, named, step, rtol, atol)
    checked.differentiate(forward)
    rows, notes = [], []
    if checked.repeatable:
        for name in named:
            rows += checked.rows(name, entries)
    if checked.forward is None and checked.repeatable:
        notes.append(f"forward mode was left out (more than {_FORWARD_AT_MOST} entries, or `forward=False`).")
    found = causes(training, rows, checked.bare, checked.differences, named)
    report = Report(checked.value, rows, found, notes, training.runs)
    if raise_exception and not report:
        raise CheckError(str(report))
    return True if raise_exception else report


def _named(hyper: Hyper) -> dict[str, Tensor]:
    if isinstance(hyper, torch.nn.Module):
        named: dict[str, Tensor] = dict(hyper.named_parameters())
    elif isinstance(hyper, Mapping):
        named = {str(name): tensor for name, tensor in hyper.items()}
    else:
        entries = list(hyper) if isinstance(hyper, Iterable) and not isinstance(hyper, Tensor) else [hyper]
        leaves = [leaf for e in entries for leaf in (e.parameters() if isinstance(e, torch.nn.Module) else [e])]
        named = {name_of(leaf) or f"hyper[{place}]": leaf for place, leaf in enumerate(leaves)}
    for name, leaf in named.items():
        if not isinstance(leaf, Tensor) or not leaf.is_leaf or not leaf.requires_grad:
            raise CheckError(
                f"{name} is no leaf that requires grad, so it can't be moved. Give the `metaopt.Hyperparameters` "
                "itself, or its leaves (`hyper.parameters()`), and not values such as `hyper.lr`."
            )
        if not leaf.dtype.is_floating_point:
            raise CheckError(f"{name} is of {leaf.dtype}; hyperparameters are real numbers.")
    if not named:
        raise CheckError("there is no hyperparameter to check.")
    return named


class _Checked:
    """The gradients by both modes, and the differences that they are compared with."""

    def __init__(self, training: Training, named: dict[str, Tensor], step: float, rtol: float, atol: float) -> None:
        self.training = training
        self.named = named
        self.step, self.rtol, self.atol = step, rtol, atol
        self.differences: dict[tuple[str, str], Difference] = {}
        self.forward: dict[str, Tensor] | None = None

    def differentiate(self, forward: bool | None) -> None:
        """Run both modes once, and the bare loop twice."""
        leaves = list(self.named.values())
        self.value, gradients = self.training.reverse(leaves)
        self.reverse = dict(zip(self.named, gradients, strict=True))
        starts = []
        self.bare: list[tuple[float, list[Tensor], list[Tensor]]] = []
        for _ in range(2):
            value = self.training.value()
            starts.append(self.training.start)
            self.bare.append((value, self.training.start, self.training.end))
        near = 1e-11 * max(abs(self.value), 1e-6)
        self.repeatable = not abs(self.bare[0][0] - self.bare[1][0]) > near
        count = sum(leaf.numel() for leaf in leaves)
        if self.repeatable and (count <= _FORWARD_AT_MOST if forward is None else forward):
            _, gradients = self.training.forward(leaves)
            self.forward = dict(zip(self.named, gradients, strict=True))

    def rows(self, name: str, entries: int) -> list[Row]:
        """The entries of one hyperparameter: some of them one by one, and all of them together."""
        leaf = self.named[name]
        gradient = self.reverse[name].detach().reshape(-1)
        unit = _units(leaf)
        chosen = self._chosen(name, gradient, entries)
        rows = [self._row(name, _place(leaf, i), _only(leaf, [i], unit)) for i in chosen]
        if len(chosen) == leaf.numel():
            return rows
        together = self._row(name, " along a random direction", _only(leaf, range(leaf.numel()), unit))
        rows.append(together)
        if not together.ok and all(row.ok for row in rows[:-1]):
            rows += self._search(name, list(range(leaf.numel())), unit)
        return rows

    def _chosen(self, name: str, gradient: Tensor, entries: int) -> list[int]:
        count = len(gradient)
        if count <= max(entries, 1):
            return list(range(count))
        # Where the modes differ most, where the gradient is largest, and the ends.
        first = [int(gradient.abs().argmax()), 0, count - 1]
        if self.forward is not None:
            other = self.forward[name].detach().reshape(-1)
            if not torch.allclose(other, gradient, rtol=self.rtol, atol=0.0):
                first.insert(0, int((other - gradient).abs().argmax()))
        rest = torch.linspace(0, count - 1, entries).long().tolist()
        return sorted(list(dict.fromkeys([*first, *rest]))[:entries])

    def _search(self, name: str, places: list[int], unit: Tensor) -> list[Row]:
        """The entries that make a direction wrong, by halving it; some of them."""
        leaf = self.named[name]
        if len(places) == 1:
            return [self._row(name, _place(leaf, places[0]), _only(leaf, places, unit))]
        found: list[Row] = []
        middle = len(places) // 2
        for half in (places[:middle], places[middle:]):
            if len(found) < _SEARCHED_FOR and not self._row(name, f" {half}", _only(leaf, half, unit), keep=False).ok:
                found += self._search(name, half, unit)
        return [row for row in found if not row.ok][:_SEARCHED_FOR]

    def _row(self, name: str, place: str, direction: Tensor, *, keep: bool = True) -> Row:
        leaf = self.named[name]
        origin = leaf.detach().clone()

        def moved(h: float) -> float:
            try:
                with torch.no_grad():
                    leaf.add_(direction, alpha=h)
                return self.training.value()
            finally:
                with torch.no_grad():
                    leaf.copy_(origin)

        found = difference(moved, self.bare[0][0], self.step)
        reverse = float((self.reverse[name].detach() * direction).sum())
        forward = None if self.forward is None else float((self.forward[name].detach() * direction).sum())
        values = [reverse, found.value] + ([] if forward is None else [forward])
        size = max(map(abs, values))
        near = self.rtol * size + self.atol * max(abs(self.value), 1e-6)
        verdict = self._verdict(reverse, forward, found, near)
        error = (max(values) - min(values)) / size if size else 0.0
        # Shown per unit of the entry itself, as `.grad` has it.
        unit = float(direction.sum()) if int((direction != 0).sum()) == 1 else 1.0
        found = found.per(unit)
        if keep:
            self.differences[name, place] = found
        forward = None if forward is None else forward / unit
        return Row(name, place, reverse / unit, forward, found.value, error, verdict)

    @staticmethod
    def _verdict(reverse: float, forward: float | None, found: Difference, near: float) -> str:
        if forward is not None and not abs(forward - reverse) <= near:
            return "forward is not reverse"
        if found.spread > near or abs(found.jump) > 2 * near:
            return "not smooth there"
        return "agrees" if abs(reverse - found.value) <= near else "differs"


def _units(leaf: Tensor) -> Tensor:
    """What an entry is moved in multiples of: its own size, or where that is next to nothing its neighbours'."""
    sizes = leaf.detach().abs()
    typical = float(sizes.square().mean().sqrt()) if sizes.numel() else 0.0
    return torch.where(sizes > 1e-3 * typical, sizes, typical or 1.0)


def _only(leaf: Tensor, places: Any, unit: Tensor) -> Tensor:
    """A displacement of some entries, each in its unit; of several, with random signs."""
    signs = torch.ones(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
    generator = torch.Generator("cpu").manual_seed(0)
    random = torch.randint(0, 2, (leaf.numel(),), generator=generator, device="cpu") * 2 - 1
    chosen = torch.zeros_like(signs)
    chosen[list(places)] = 1.0
    if len(places) > 1:
        signs = signs * random.to(signs)
    return (chosen * signs).view_as(leaf) * unit


def _place(leaf: Tensor, index: int) -> str:
    if not leaf.dim():
        return ""
    where = []
    for size in reversed(leaf.shape):
        where.append(index % size)
        index //= size
    return f"[{', '.join(map(str, reversed(where)))}]"
