"""Capture: watch a training loop and keep each iteration as a function that can be called again.

``cells``        a tensor's value at one moment, copied only when somebody is about to overwrite it
``trace``        one iteration as straight-line code over numbered values
``bindings``     what is known of each tensor object that is followed
``externals``    hyperparameters, and the leaves that look like them
``following``    which tensor objects are followed: by identity, and by the memory that they lie in
``iteration``    the trace that is being written, and what enters it
``tape``         what the loop does to the tensors that are followed, written down in the iteration
``watcher``      the ``TorchFunctionMode`` that shows every torch call to the tape
``surroundings`` what a replayed call needs around it: random numbers, precision, kernels
``notices``      what the loop's author is told
``calls``        the calls that need more than "call it again"
``made``         of these, tensors made of values: leaves, copies, lists of tensors
``functions``    of these, custom ``torch.autograd.Function``s
``stand_ins``    what the replay calls for these, where it is not the function itself
``withheld``     of these, looking for a gradient that hyperparameters don't get
``gradients``    of these, the loop's own `backward` and `grad`
``writes``       calls that write their arguments in place
``primitives``   what replayed programs are made of besides torch: ``stop``, ``inner_gradient``, …
``derivatives``  is the derivative of a replay the derivative of the loop? compared with finite differences
``third``        loops that differentiate their own gradients, and the layers whose third derivative torch has wrong
``program``      iterations of equal structure, stored once, as a ``torch.fx`` graph
``segment``      one recorded iteration: a program, its constants and the state it started from
"""
