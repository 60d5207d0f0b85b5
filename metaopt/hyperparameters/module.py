"""The module that holds hyperparameters by name."""

from __future__ import annotations

__all__ = ["Hyperparameters"]

import functools
from collections.abc import Iterator, KeysView, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from metaopt.errors import DomainError
from metaopt.hyperparameters.domains import Domain, Value
from metaopt.hyperparameters.factories import Constrained, real
from metaopt.hyperparameters.history import History
from metaopt.hyperparameters.projections import widen
from metaopt.hyperparameters.registry import enroll
from metaopt.hyperparameters.transformed import refuse_other, signature

# Before the names of domains, which are saved among the series of a history.
_DOMAIN = ":"

# The most entries that `repr` spells out.
SHORT = 6


class Hyperparameters(torch.nn.Module):
    """Named hyperparameters: constrained values over leaves that a hyper-optimizer moves.

    ``hyper.lr`` is the constrained value, computed anew from the leaf at each access and differentiable;
    where the leaf is the value (``real``, ``box``, ``nonnegative``, ``l1_box``) it is the leaf itself. The
    leaves are this module's parameters, under the plain names: ``parameters()``, ``to`` and ``state_dict``
    are those of any module.

    Args:
        entries: the hyperparameters by name: a ``Constrained`` such as ``positive(0.1)``, or a value (real).

    Raises:
        DomainError: if a value is outside its domain, or a name is taken by the module itself.

    Example:
        >>> hyper = Hyperparameters(lr=positive(0.1), weights=l1_box(torch.full((100,), 0.5), radius=50))
        >>> hyper_optimizer = torch.optim.Adam(hyper.parameters(), lr=1e-2)
        >>> handle = hyper.attach(hyper_optimizer)  # project after each hyper-step

    References:
        Franceschi et al., *Forward and Reverse Gradient-Based Hyperparameter Optimization*, 2017: a step of
        the hyper-optimizer, then a Euclidean projection; its moments are not projected.
    """

    history: History
    _domains: dict[str, Domain]
    _scales: dict[str, float]

    def __init__(self, /, **entries: Constrained | Value) -> None:
        super().__init__()
        self.history = History()
        self._domains = {}
        self._scales = {}
        for name, entry in entries.items():
            self._add(name, entry)
        enroll(self)

    def _add(self, name: str, entry: Constrained | Value) -> None:
        if not name.isidentifier() or hasattr(self, name):
            raise DomainError(
                f"a hyperparameter can't be named {name!r}: it is no identifier, or an attribute of every "
                f"Hyperparameters module; choose another name, such as {name + '_value'!r}."
            )
        with _named(name):
            spec = entry if isinstance(entry, Constrained) else real(entry)
        # In this order: torch refuses to register a name that can be read already.
        self.register_parameter(name, Parameter(spec.leaf.detach().clone()))
        self._domains[name] = spec.domain
        self._scales[name] = spec.scale

    def __getattr__(self, name: str) -> Tensor:
        # Reached only where normal look-up fails, and before __init__ or __setstate__ there are no domains.
        domain = self.__dict__.get("_domains", {}).get(name)
        if domain is None:
            return super().__getattr__(name)  # type: ignore[return-value]
        return self._read(name, domain)

    def _read(self, name: str, domain: Domain) -> Tensor:
        leaf = self._leaf(name)
        value = domain.to_value(leaf)
        if value is not leaf:
            # The drop-in optimizers keep a constructor's argument, and read it again when the leaf has moved.
            value._metaopt_source = functools.partial(getattr, self, name)  # type: ignore[attr-defined]
        return value

    def _leaf(self, name: str) -> Parameter:
        leaf = self._parameters[name]
        assert leaf is not None
        return leaf

    def __setattr__(self, name: str, value: Any) -> None:
        # A Parameter is a new leaf, as `load_state_dict(assign=True)` sets it; all else is a value.
        if name in self.__dict__.get("_domains", {}) and not isinstance(value, Parameter):
            self.set(**{name: value})
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._domains.pop(name, None)
        self._scales.pop(name, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        enroll(self)

    def keys(self) -> KeysView[str]:
        """The names."""
        return self._domains.keys()

    def values(self) -> Iterator[Tensor]:
        """The constrained values, each computed as it is reached."""
        return (self[name] for name in self._domains)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """The names and constrained values, each computed as it is reached."""
        return ((name, self[name]) for name in self._domains)

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    def __contains__(self, name: object) -> bool:
        return name in self._domains

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, self._domain(name))

    def __setitem__(self, name: str, value: Value) -> None:
        self.set(**{name: value})

    def set(self, /, **values: Value) -> None:
        """Set constrained values, in place on their leaves; all of them, or none if one is refused.

        Args:
            values: the new values by name, each of a shape that expands to its hyperparameter's.

        Raises:
            KeyError: if there is no such hyperparameter.
            DomainError: if a value is outside its domain, or of another shape.
        """
        leaves = {name: self._leaf_for(name, value) for name, value in values.items()}
        with torch.no_grad():
            for name, leaf in leaves.items():
                self._leaf(name).copy_(leaf)

    def _leaf_for(self, name: str, value: Value) -> Tensor:
        with _named(name):
            return self._domain(name).leaf_for(value, self._leaf(name))

    def _domain(self, name: str) -> Domain:
        try:
            return self._domains[name]
        except KeyError:
            known = ", ".join(self._domains) or "none"
            raise KeyError(f"no hyperparameter {name!r}; there are: {known}") from None

    def get_leaf(self, name: str) -> Parameter:
        """The leaf of a hyperparameter: the parameter that a hyper-optimizer moves.

        Args:
            name: its name.

        Raises:
            KeyError: if there is no such hyperparameter.
        """
        self._domain(name)
        return self._leaf(name)

    @property
    def domains(self) -> dict[str, Domain]:
        """The domains by name."""
        return dict(self._domains)

    @property
    def scales(self) -> dict[str, float]:
        """The initial perturbation scales σ by name, which `metaopt.stn` starts from."""
        return dict(self._scales)

    def project_(self) -> Hyperparameters:
        r"""Put each projected leaf back into its set, in place.

        .. math:: x \leftarrow \arg\min_{y \in \Lambda} \|y - x\|_2

        To be called after each ``hyper_optimizer.step()``, or left to `attach`. Nothing else of the
        optimizer is touched: its moments are not projected.

        Returns:
            This module.

        Raises:
            DomainError: if a leaf is NaN (or infinite, where that has no projection).
        """
        with torch.no_grad():
            for name, domain in self._domains.items():
                if domain.projected:
                    self._project_leaf(name, domain)
        return self

    def _project_leaf(self, name: str, domain: Domain) -> None:
        leaf = self._leaf(name)
        with _unwatched():
            projected = domain.project(leaf)
            broken = bool(torch.isnan(projected).any())
        if broken:
            raise DomainError(
                f"hyperparameter {name!r} can't be projected, an entry is not finite: the hyper-step "
                "diverged. Lower the hyper-optimizer's lr, or skip steps whose hypergradient is not finite."
            )
        leaf.copy_(projected)

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Project after each step of the hyper-optimizer, ``optimizer``.

        Args:
            optimizer: an optimizer over these leaves.

        Returns:
            A handle whose ``remove()`` ends it; as a context manager, it ends with the block.

        Raises:
            DomainError: if the optimizer moves none of these leaves.
        """
        if not isinstance(optimizer, Optimizer):
            raise DomainError(
                f"attach(optimizer) needs the hyper-optimizer, a torch.optim.Optimizer, and this is a "
                f"{type(optimizer).__name__}; call `hyper.project_()` after each hyper-step that is none of an "
                "optimizer's."
            )
        moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(leaf) in moved for leaf in self.parameters()):
            raise DomainError(
                "attach(optimizer) needs the hyper-optimizer, and this one moves none of these "
                "hyperparameters; build it over `hyper.parameters()`."
            )

        def project(*_: object) -> None:
            self.project_()

        return optimizer.register_step_post_hook(project)

    def record(self, *, full: bool = False) -> None:
        """Append the values, and the norms of the leaves' gradients, to ``history``.

        Args:
            full: keep all the entries of tensors of more than one element, not their mean and quantiles
                alone.
        """
        with _unwatched():
            for name, value in self.items():
                self.history.append(name, value, self._leaf(name).grad, full=full)

    def get_extra_state(self) -> dict[str, list[Any]]:
        """The history and the domains, as ``state_dict`` keeps them."""
        return self.history.state_dict() | {_DOMAIN + name: signature(d) for name, d in self._domains.items()}

    def set_extra_state(self, state: Mapping[str, list[Any]]) -> None:
        """Load the history that ``state_dict`` kept."""
        self.history.load_state_dict({key: series for key, series in state.items() if key[:1] != _DOMAIN})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # First of all: a leaf says nothing without the domain that it is read in.
        saved = state_dict.get(f"{prefix}_extra_state", {})
        for name, domain in self._domains.items():
            refuse_other(name, domain, saved.get(_DOMAIN + name, []))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        with _unwatched():
            lines = [f"  ({name}): {self._domains[name]}, {_summary(self[name])}" for name in self._domains]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"]) if lines else f"{type(self).__name__}()"


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Let a domain's error say which hyperparameter it is about."""
    try:
        yield
    except DomainError as error:
        raise DomainError(f"hyperparameter {name!r}: {error}") from error


@contextmanager
def _unwatched() -> Iterator[None]:
    """Read for people to look at: no graph, and no part of a loop that a context is watching."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        yield


def _summary(value: Tensor) -> str:
    if value.numel() == 1 and value.ndim == 0:
        return f"{value.item():.6g}"
    shape = f"shape {tuple(value.shape)}"
    if value.numel() <= SHORT:
        return f"{shape}, [{', '.join(f'{entry:.6g}' for entry in value.flatten().tolist())}]"
    wide = widen(value)
    return f"{shape}, mean {wide.mean().item():.4g}, from {wide.min().item():.4g} to {wide.max().item():.4g}"
