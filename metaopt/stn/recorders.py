"""Passes that change nothing, and note what is to be known of a model before it is relied on."""

from __future__ import annotations

__all__ = ["Recorder", "Tracer"]

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metaopt.errors import ResponseError
from metaopt.stn.arguments import function_name, reads_no_values
from metaopt.stn.calls import Noted, flat
from metaopt.stn.layouts import Layout, Site
from metaopt.stn.orders import reads
from metaopt.stn.passes import Pass
from metaopt.stn.responses import Active


class Recorder(Pass):
    """A pass that changes nothing and notes what each site was given."""

    recording = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[Site, list[Tensor]] = {}

    def locate(self, site: Site, value: Tensor, examples: int) -> Layout | None:
        self.seen.setdefault(site, []).append(value.detach())
        return None

    def layout(self, active: Active, func: Any, value: Tensor) -> Layout | None:
        self.used.add(active.entry.name)
        # In a composite rule the axis is known; what counts is that the composite's own input has it.
        return None if self.fixed else self.locate((active.entry.name, func.__name__), value, 0)

    def refuse(self, func: Any, known: Sequence[int]) -> None:
        return


class Tracer(Recorder):
    """A recorder that also notes the calls to which parameters lead."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.starts = {key: active.entry.name for key, active in self.marks.items()}
        # The parameters that the aliases stand in for: a model that keeps them elsewhere uses them without a response.
        self.originals: dict[int, str] = {}
        self.noted: list[Noted] = []
        self.read: list[Any] = []
        self._reached = set(self.starts)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        self.read += reads(func, args, kwargs or {})
        inputs = flat((args, kwargs or {}))
        self._refuse_originals(func, inputs)
        if not self._reached.isdisjoint(map(id, inputs)) and not reads_no_values(func):
            self.noted.append(Noted(function_name(func), inputs, flat(result)))
            self._reached.update(id(v) for v in self.noted[-1].outputs if isinstance(v, Tensor))
        return result

    def depends(self, tensor: Any) -> bool:
        # Not of parameters alone, perhaps; the functions called are noted all the same.
        return id(tensor) in self._reached

    def apply(self, cls: type, original: Any, args: Any, kwargs: Any) -> Any:
        self._refuse_originals(cls, flat((args, kwargs)))
        return super().apply(cls, original, args, kwargs)

    def _refuse_originals(self, func: Any, inputs: list[Any]) -> None:
        found = next((self.originals[id(v)] for v in inputs if id(v) in self.originals), None)
        if found is not None and not reads_no_values(func):
            raise ResponseError(
                f"the model uses its parameter {found!r} by another way than its modules' parameters, such as a list "
                "or a closure that holds it, where its response can't be seen; let a module have it as an attribute, "
                "as in `self.tied = self.embedding.weight`, or as a part of an `nn.ParameterList`."
            )
