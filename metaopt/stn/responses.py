"""The response: how the weights follow the hyperparameters, one response for each unique parameter."""

from __future__ import annotations

__all__ = ["Active", "Entry", "Responses", "unrounded"]

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from metaopt.errors import ResponseError
from metaopt.stn.structures import Structure, along, dense, structures


@dataclass(frozen=True)
class Entry:
    """One responding parameter.

    Args:
        name: its first name in the model.
        aliases: all its names, where it is tied.
        structure: its rows.
        start: its first row in ``U``.
        banks: the terms of its response.
        rank: the rank of each term; None where a term has a scalar for each row.
    """

    name: str
    aliases: tuple[str, ...]
    structure: Structure
    start: int
    banks: int
    rank: int | None = None

    @property
    def width(self) -> int:
        """The number of scalars of each term."""
        return self.structure.rows if self.rank is None else self.rank

    @property
    def stop(self) -> int:
        """The row of ``U`` after its last."""
        return self.start + self.banks * self.width


@dataclass(slots=True)
class Active:
    """The response of one parameter within one pass.

    Args:
        entry: whose it is.
        coefficients: a tensor ``(B, o)`` for each bank: ``s = ε Uᵀ``.
        bases: ``V`` of each bank, or None where it is 1; ``C`` of a response of low rank.
        mixers: ``A`` of each bank of a response of low rank, ``(o, r)``; else empty.
        constant: makes the same response with a ``Θ`` that has no gradient; None where it is not at hand.
    """

    entry: Entry
    coefficients: tuple[Tensor, ...]
    bases: tuple[Tensor | None, ...]
    mixers: tuple[Tensor, ...] = ()
    constant: Callable[[], Active] | None = None

    def terms(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Coefficients, base and mixer of each bank."""
        mixers = self.mixers or (None,) * len(self.bases)
        yield from zip(self.coefficients, self.bases, mixers, strict=True)

    def rows(self, start: int, stop: int) -> Active:
        """The response of ``P[start:stop]``, for rows along the first axis."""
        if self.mixers:
            return replace(self, mixers=tuple(mixer[start:stop] for mixer in self.mixers))
        return Active(
            self.entry,
            tuple(s[:, start:stop] for s in self.coefficients),
            tuple(None if base is None else base[start:stop] for base in self.bases),
        )

    def masked(self, mask: Tensor) -> Active:
        """The response of ``m ⊙ P``: the mask of the weights multiplies ``V`` too."""
        bases, constant = tuple(mask if base is None else mask * base for base in self.bases), self.constant
        same = None if constant is None else lambda: constant().masked(mask)
        return Active(self.entry, self.coefficients, bases, constant=same)

    def change(self, example: int = 0) -> Tensor:
        """``ΔP`` of one example, of the parameter's shape."""
        return replace(self, coefficients=tuple(s[example : example + 1] for s in self.coefficients)).changes()[0]

    def changes(self) -> Tensor:
        """``ΔP`` of all examples, along a first axis."""
        terms = [self._term(s, base, mixer) for s, base, mixer in self.terms()]
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def _term(self, scalars: Tensor, base: Tensor | None, mixer: Tensor | None) -> Tensor:
        axis = self.entry.structure.axis
        if mixer is None or base is None or axis is None:
            return self.entry.structure.scale(scalars, base)
        mixed = mixer * scalars.unsqueeze(1)
        return torch.tensordot(mixed, base, ([2], [axis])).movedim(1, axis + 1)


class Responses(nn.Module):
    r"""The response Jacobian of a model's parameters, ``Θ``, in the structure of its layers.

    .. math:: \Delta P_b = \sum_{k=1}^{K} \mathrm{diag}(U_k z_b)\, V_k

    Of a rank ``r``, where one is given, ``diag(U_k z_b) V_k`` is replaced by ``A_k diag(U_k z_b) C_k``, with ``A`` of
    r columns and ``C`` of r rows: ``r (o + i)`` numbers for a matrix, and not ``o i``. ``U`` starts at zero, so the
    response does too; ``V`` is drawn as a layer's weights are.

    Args:
        model: the model; frozen parameters have no response.
        width: H, the number of entries of all hyperparameters.
        banks: K, the number of terms of each matrix. One bank is the papers' form, in which all H response directions
            share one ``V``; H banks impose nothing.
        rank: the rank of each term of a matrix's or a kernel's response; None for the papers' form. Kernels of
            grouped convolutions, whose rows see different inputs, keep that.
        whole: names of parameters that keep it too: a mask of their entries would not leave a low rank.

    Shape:
        ``U`` is (R, H), with a row for each scalar of each parameter and bank; ``weight`` is its transpose, by which a
        batch is multiplied at less cost. A ``V`` has its parameter's shape.

    Raises:
        ResponseError: if no parameter is trained, or they are of several types or on several devices.

    References:
        MacKay et al. 2019, Eq. 10-11; Bae and Grosse 2020, Sec. 3.3. Banks and the low rank are ours.
    """

    def __init__(
        self,
        model: nn.Module,
        width: int,
        banks: int = 1,
        *,
        rank: int | None = None,
        whole: Collection[str] = (),
    ) -> None:
        super().__init__()
        found, padding = _parameters(model), _padding(model)
        kinds = {(p.dtype, p.device) for p, _, _ in found}
        if len(kinds) != 1:
            raise ResponseError(
                "a best response needs trained parameters of one floating-point type on one device, got "
                f"{', '.join(f'{d} on {v}' for d, v in sorted(kinds, key=str)) or 'none'}; convert the model with "
                "`model.to(...)`, or unfreeze the parameters that should respond."
            )
        if not next(iter(kinds))[0].is_floating_point:
            name = found[0][1][0]
            raise ResponseError(
                f"the parameter {name!r} is complex, and responses are of real ones; let the model hold its real and "
                "imaginary parts along a last axis, and use `torch.view_as_complex(parameter)`."
            )
        self.entries: list[Entry] = []
        self.bases, self.mixers = nn.ParameterList(), nn.ParameterList()
        # Of each entry: its pieces of a row of U, its bases and its mixers.
        self._slots: list[tuple[slice, slice, slice]] = []
        rows = 0
        for parameter, names, structure in found:
            count = 1 if structure.axis is None else banks
            low = structure.axis is not None and structure.mixable and names[0] not in whole
            entry = Entry(names[0], names, structure, rows, count, rank if low else None)
            rows = entry.stop
            self.entries.append(entry)
            first, mixing = len(self.bases), len(self.mixers)
            if structure.axis is not None:
                self.bases.extend(Parameter(_base(parameter, entry)) for _ in range(count))
            if entry.rank is not None:
                self.mixers.extend(Parameter(_mixer(parameter, structure.rows, entry.rank)) for _ in range(count))
            pieces = sum(other.banks for other in self.entries)
            self._slots.append(
                (slice(pieces - count, pieces), slice(first, len(self.bases)), slice(mixing, len(self.mixers)))
            )
            if names[0] in padding and structure.axis == 1:
                # A look-up trains no padding, so that its response is zero, unless a tied decoder's is not.
                for base in list(self.bases)[first:]:
                    base.data[padding[names[0]]] = 0
        self._widths = [entry.width for entry in self.entries for _ in range(entry.banks)]
        dtype, device = kinds.pop()
        self.weight = Parameter(torch.zeros(width, rows, dtype=dtype, device=device))

    def active(self, z: Tensor, *, frozen: bool = False, weight: Tensor | None = None) -> Iterator[Active]:
        """The response of each entry, in order.

        Args:
            z: the coordinates ``(B, H)``, such as the perturbations.
            frozen: whether ``U`` and ``V`` are constants.
            weight: another ``U``.
        """
        if weight is None:
            weight = self.weight.detach() if frozen else self.weight
        # A step under autocast must not round the perturbations.
        with unrounded(weight):
            spread = torch.mm(z if z.dtype is weight.dtype else z.to(weight.dtype), weight)
        pieces = torch.split_with_sizes(spread, self._widths, 1)
        bases, mixers = _held(self.bases, frozen), _held(self.mixers, frozen)
        for entry, (own, based, mixing) in zip(self.entries, self._slots, strict=True):
            base, mixed = bases[based] or (None,), mixers[mixing]
            yield Active(entry, pieces[own], base, mixed, partial(self._constant, entry, z, weight, base, mixed))

    @staticmethod
    def _constant(
        entry: Entry, z: Tensor, weight: Tensor, bases: tuple[Tensor | None, ...], mixers: tuple[Tensor, ...]
    ) -> Active:
        with unrounded(weight):
            spread = z.to(weight.dtype) @ weight[:, entry.start : entry.stop].detach()
        fixed = tuple(None if base is None else base.detach() for base in bases)
        return Active(entry, spread.split(entry.width, 1), fixed, tuple(m.detach() for m in mixers))

    def changes(self, z: Tensor) -> dict[str, Tensor]:
        """``ΔP`` for one point ``z`` of shape ``(H,)``, by each parameter's first name."""
        return {active.entry.name: active.change() for active in self.active(z.reshape(1, -1))}

    def jacobian(self, reference: Tensor | None = None) -> dict[str, Tensor]:
        """``∂P/∂λ``, with the H hyperparameters as the first axis, by each parameter's first name.

        Args:
            reference: by what a perturbation is divided before it enters, if it is.
        """
        units = torch.eye(self.weight.shape[0], dtype=self.weight.dtype, device=self.weight.device)
        if reference is not None:
            units = units / reference.to(units)
        columns = [self.changes(unit) for unit in units]
        return {name: torch.stack([column[name] for column in columns]) for name in columns[0]}

    @torch.no_grad()
    def rescale_(self, ratio: Tensor) -> None:
        """Multiply the columns of ``U``: the same response for coordinates that were divided by ``ratio``."""
        self.weight.mul_(ratio.to(self.weight).unsqueeze(1))


def _held(parameters: nn.ParameterList, frozen: bool) -> tuple[Tensor, ...]:
    # From where they are: an index into a list of parameters is looked up as an attribute, by name.
    return tuple([p.detach() if frozen else p for p in parameters._parameters.values() if p is not None])


def unrounded(like: Tensor) -> AbstractContextManager[Any]:
    """Compute without autocast, if there is any: to switch off what is off takes longer than a product of matrices."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _parameters(model: nn.Module) -> list[tuple[Parameter, tuple[str, ...], Structure]]:
    """Each unique trained parameter with all its names, and its structure."""
    seen: dict[int, tuple[Parameter, list[str], list[Structure | None]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        declared: Mapping[str, Structure] = structures(module)
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            _, names, kinds = seen.setdefault(id(parameter), (parameter, [], []))
            names.append(f"{prefix}.{name}" if prefix else name)
            kinds.append(declared.get(name))
    found = []
    for parameter, names, kinds in seen.values():
        given = [kind for kind in kinds if kind is not None]
        # A table of words that is tied to a decoder responds along its columns, in both.
        structure = max(given, key=lambda s: s.axis or 0, default=None)
        found.append((parameter, tuple(names), structure or _bare(parameter)))
    return found


def _padding(model: nn.Module) -> dict[str, int]:
    """The rows that look-ups don't train, by the first names of tables."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    return {names[id(m.weight)]: m.padding_idx for m in tables if m.padding_idx is not None and id(m.weight) in names}


def _bare(parameter: Tensor) -> Structure:
    # A class token (1, 1, d) and the scale of a layer (c, 1, 1) are vectors; axes of one in front are no rows.
    axes = [d for d, n in enumerate(parameter.shape) if n > 1]
    return along(parameter, axes[0]) if len(axes) > 1 else dense(parameter)


def _base(parameter: Tensor, entry: Entry) -> Tensor:
    structure, shape = entry.structure, list(parameter.shape)
    if entry.rank is not None and structure.axis is not None:
        shape[structure.axis] = entry.rank
    bound = 1 / math.sqrt(max(parameter.numel() / max(structure.rows, 1), 1))
    return parameter.new_empty(shape, requires_grad=False).uniform_(-bound, bound)


def _mixer(parameter: Tensor, rows: int, rank: int) -> Tensor:
    bound = 1 / math.sqrt(rank)
    return parameter.new_empty(rows, rank, requires_grad=False).uniform_(-bound, bound)
