"""Masks of weights: drop-connect, and dropped words of an embedding; one draw for a minibatch.

References:
    Wan et al., *Regularization of Neural Networks using DropConnect*, 2013; on the hidden-to-hidden weights of an LSTM,
    and on words, Merity et al., *Regularizing and Optimizing LSTM Language Models*, 2018, Sec. 2 and 4.3.
"""

from __future__ import annotations

__all__ = ["Mask", "masks_of"]

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metaopt.stn.perturbations import Noise


@dataclass(frozen=True)
class Mask:
    """The mask of one use of a weight: a decoder that is tied to a table of words keeps the words dropped there.

    Args:
        name: the weight's first name in the model.
        module: which uses it.
        key: its name there.
        hyper: the hyperparameter that is the rate.
        words: whether whole rows are dropped, and not single entries.
    """

    name: str
    module: nn.Module
    key: str
    hyper: str
    words: bool

    def draw(self, weight: Tensor, values: Mapping[str, Tensor], noise: Noise) -> Tensor:
        """``m / (1 - p)`` with ``m ~ Bernoulli(1 - p)``, in a shape that multiplies the weight."""
        # One draw for a minibatch: its examples have the same rate.
        rate = values[self.hyper].flatten()[0].to(weight.dtype)
        shape = torch.Size([n if d == 0 or not self.words else 1 for d, n in enumerate(weight.shape)])
        return (noise.uniform(shape, weight.detach()) >= rate) / (1 - rate)


def masks_of(model: nn.Module, bound: Mapping[str, str]) -> list[Mask]:
    """The masks of what is bound: weights by their names, tables of words by their modules'."""
    modules = dict(model.named_modules())
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for name, hyper in bound.items():
        owner, _, key = (f"{name}.weight" if name in modules else name).rpartition(".")
        module = modules[owner]
        parameter = module._parameters[key]
        found.append(Mask(first[id(parameter)], module, key, hyper, name in modules))
    return found
