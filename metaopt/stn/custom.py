"""What a pass does about custom ``autograd.Function``s of the model, and about its hooks on gradients."""

from __future__ import annotations

__all__ = ["Custom"]

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from metaopt.capture.stand_ins import Nature
from metaopt.errors import ResponseError
from metaopt.stn.arguments import among
from metaopt.stn.functions import by_value, nature_of
from metaopt.stn.guards import CHECKPOINT, unhooked
from metaopt.stn.handing import Handed
from metaopt.stn.instances import Instances
from metaopt.stn.layouts import NeedsGroups
from metaopt.stn.orders import Orders
from metaopt.stn.responses import Active


class Custom(Handed):
    """The part of a pass that is shown custom functions.

    Attributes:
        marks: the responses by ``id`` of the parameter's alias.
        held: what tensors are for each example, by their ``id``.
        orders: which tensors have the examples in another order.
        trained: whether gradients are those of training, and not of a validation loss.
    """

    recording: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[int, Active] = {}
        self.held: dict[int, Instances] = {}
        self.orders: Orders | None = None
        self.trained = False
        # Whether a custom function of the model's is computing.
        self._within = False

    def apply(self, cls: type, original: Any, args: Any, kwargs: Any) -> Any:
        """A custom ``autograd.Function`` of the model: what it calls has no gradient, its own ``backward`` has.

        Raises:
            NeedsGroups: if it is given a parameter that responds per example.
        """
        if cls is CheckpointFunction:
            raise ResponseError(CHECKPOINT)
        name, within = f"{cls.__name__}.apply", self._within
        for known in (self.marks, self.held) if not (within or self.recording) else ():
            for key in among(known, args, kwargs):
                owner = self.marks[key].entry.name if key in self.marks else self.held[key].name
                raise NeedsGroups(owner, f"it is used by `{name}`, a custom autograd.Function")

        def own(*inputs: Any, **options: Any) -> Any:
            self._within = True
            try:
                return original(*inputs, **options)
            finally:
                self._within = within

        own.__name__, own.__module__ = name, cls.__module__
        result = own(*args, **kwargs) if within else self.custom(cls, own, args, kwargs)
        if self.orders is not None and not within:
            self.orders.follow(own, args, kwargs, result)
        return result

    def custom(self, cls: type, own: Any, args: Any, kwargs: Any) -> Any:
        """Call a custom function: its own backward is what training goes by, and a validation loss by its values."""
        if self.trained or not torch.is_grad_enabled():
            return self.plain(own, args, kwargs)
        return by_value(self.nature(cls, args, kwargs), cls, own, args, kwargs)

    def nature(self, cls: type, args: Any, kwargs: Any) -> Nature:
        """What a custom function's backward is to its forward."""
        within, self._within = self._within, True
        try:
            return nature_of(cls, args, kwargs)
        finally:
            self._within = within

    def hook(self, tensor: Tensor, hook: Any) -> Any:
        """A hook of the model's on the gradient of a value; it belongs to training, as custom backwards do."""
        return tensor.register_hook(hook) if self.trained and tensor.requires_grad else RemovableHandle(OrderedDict())

    def begin(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Run the model; the hooks of its modules on gradients belong to training too."""
        return nullcontext() if self.trained else unhooked(modules)

    def within(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Look at what a custom function calls."""

    def plain(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function for which there is nothing to respond."""
        return func(*args, **kwargs)
