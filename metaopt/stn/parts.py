"""Parts of a batch: which arguments they share, and whether the model's output for them depends on the others."""

from __future__ import annotations

__all__ = ["MOST", "Parted"]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from metaopt.stn.attributes import Attributes
from metaopt.stn.batches import Shared, count, join, split
from metaopt.stn.generators import other_state, random_state, same_randomness
from metaopt.stn.modes import evaluation
from metaopt.stn.outputs import close, moved, rows, shapes
from metaopt.stn.running import Running
from metaopt.stn.substitution import substituted
from metaopt.stn.trees import objects

# Examples on which it is seen whether a model keeps their order, or mixes them.
MOST = 16


class Parted(Running):
    """The part of `Tuned` that runs the model on some of the examples."""

    batch_dim: int
    mixes: bool
    # Whether that was looked at, and the rounding within the model, where that was found out.
    looked: bool
    epsilon: float | None
    # What the model is called with beside examples.
    shared: Shared

    def _part(self, args: Any, kwargs: Any, part: Tensor) -> tuple[Any, Any]:
        """The arguments for some of the examples."""
        return split(args, kwargs, part, self.batch_dim, count(args, kwargs, self.batch_dim), self.shared)

    @contextmanager
    def _unmoved(self) -> Iterator[None]:
        """Leave random generators and modules as they are."""
        attributes, drawn = Attributes(self.slots.modules), other_state()
        kept = attributes.now()
        try:
            with same_randomness(self.device):
                try:
                    yield
                finally:
                    if other_state() != drawn:
                        self.draws = True
        finally:
            attributes.back(kept)

    def _look_for_mixing(self, args: Any, kwargs: Any) -> None:
        """Once there are groups, which may be later: whether the model's output for some examples depends on others."""
        if not self.fallback or self.epsilon is None or self.looked:
            return
        self.looked = True
        with self._unmoved(), torch.no_grad():
            self.mixes = self.mixes or self._mixes(args, kwargs, self.epsilon)

    def _mixes(self, args: Any, kwargs: Any, epsilon: float) -> bool:
        """Whether groups of examples have another output than all at once, as with negatives from the batch."""
        whole = count(args, kwargs, self.batch_dim)
        examples = torch.arange(min(whole, MOST))
        if len(examples) < 2:
            return False
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            return self._depends(args, kwargs, examples, epsilon) or self._mixes_in_evaluation(
                args, kwargs, examples, epsilon
            )
        finally:
            for module, mode in modes:
                module.training = mode

    def _depends(self, args: Any, kwargs: Any, examples: Tensor, epsilon: float) -> bool:
        """Whether examples have another output beside others, at the same random numbers; in training, it may be."""
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()  # as is known of it, and matters in training alone
        half = len(examples) // 2
        try:
            # In their order, which a model may insist on, such as sequences of falling length.
            found = [self._once(args, kwargs, part)[0] for part in (examples, examples.clamp(max=half - 1))]
            first, second = ([rows(y, len(examples), i, self.batch_dim) for i in range(half)] for y in found)
            return not close(first, second, epsilon)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return True  # the others matter, if it can't be run beside copies of one

    def _once(self, args: Any, kwargs: Any, part: Tensor) -> tuple[Any, bool]:
        """The output for some examples, each time from the same state; and whether random numbers were drawn."""
        inputs, options = self._part(args, kwargs, part)
        with self._unmoved(), substituted(self.slots, {}, buffers=True, rates=False):
            before = random_state(self.device)
            return self.model(*inputs, **options), moved(before, random_state(self.device))

    def _mixes_in_evaluation(self, args: Any, kwargs: Any, examples: Tensor, epsilon: float) -> bool:
        with evaluation(self.model):
            runs = [self._once(args, kwargs, part) for part in (examples, *examples.tensor_split(2))]
        (together, drawn), *halves = runs
        if objects(together) or any(len(shape) <= self.batch_dim for shape in shapes(together)):
            # It has no axis of examples, such as a loss; or is of a kind that can't be put together from groups.
            return True
        joined = join([half for half, _ in halves], self.batch_dim)
        # Where the model draws random numbers in evaluation, no two runs agree, and shapes must do.
        return shapes(together) != shapes(joined) or not (drawn or close(together, joined, epsilon))
