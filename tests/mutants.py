"""Break the library in the ways that matter, one at a time, and see the tests fail.

::

    python tests/mutants.py                           all of them, a table; exit 1 if one survives or no longer applies
    python tests/mutants.py plain-root forget-B1      only these
    python tests/mutants.py --write docs/mutants.md   the table as a page

Each is a textual patch of one file, applied in a copy of the package in a temporary directory; the checkout is not
touched. The tests that must see it run there, stop at their first failure and don't shrink.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAWS, RULES, TABLE = "tests/test_laws.py", "tests/test_rules.py", "tests/test_optimizer_table.py"
FORWARD = "tests/test_forward_laws.py"
KEEPING, COMPILED = "tests/test_keeping.py", "tests/test_compile.py"
CASES, INPUT = "tests/test_cases.py", "tests/test_bad_input.py"
# Appended to the copy's conftest. The library compares its replays with the loop, and pushes of tangents with pulls;
# many mutants would end there. Those checks rest, so that it is the tests which have to see them.
SETTING = """

import metaopt.capture.verify
import metaopt.modes.tangents

hypothesis.settings.register_profile(
    "mutants",
    parent=hypothesis.settings.get_profile("default"),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    max_examples=40,
)
hypothesis.settings.load_profile("mutants")
if {unverified}:
    metaopt.capture.verify.Verifier.check = lambda *args, **options: None
    metaopt.modes.tangents.transposes = lambda *args: True
"""


@dataclass(frozen=True)
class Mutant:
    """A patch, and the tests that have to see it.

    Attributes:
        name: a short name for the command line.
        breaks: what it does, in words.
        file: the file in the package.
        old: the text that is replaced; it occurs there once.
        new: what it is replaced with.
        tests: the file, and a ``-k`` expression.
        unverified: whether the library's own verification rests.
    """

    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]
    unverified: bool = True


MUTANTS = [
    # -- forward mode
    Mutant(
        "reset-tangents",
        "each step begins with Z = 0",
        "modes/carried.py",
        "        before = self.tangents\n        if is_step",
        "        before: dict[int, Tensor] = {}\n        if is_step",
        (FORWARD, "forward_is_unrolled"),
    ),
    Mutant(
        "forget-mixed",
        "the gradient's tangent has the Hessian's part, and not that of the hyperparameters in the loss",
        "modes/tangents.py",
        "return carried + [self._columns.tangent(x, rows) for x in self._hypers]",
        "return carried + [torch.zeros_like(self._columns.tangent(x, rows)) for x in self._hypers]",
        (FORWARD, "forward_is_unrolled"),
    ),
    Mutant(
        "split-what-stops",
        "a step with `detach` in its forward pass is taken for a plain gradient",
        "capture/split.py",
        "    if any(code[index].phased for index in needed(code, set(asked))):\n        return None\n",
        "",
        (CASES, "forward_is_reverse"),
    ),
    Mutant(
        "narrow-tangents",
        "the columns of a hyperparameter that appears later take the place of the first ones",
        "modes/carried.py",
        "torch.cat([tangent, tangent.new_zeros(",
        "torch.cat([tangent.flip(0), tangent.new_zeros(",
        ("tests/test_real_time.py", "appears_later"),
    ),
    Mutant(
        "trust-the-push",
        "tangents are not compared with what reverse mode says",
        "modes/transposes.py",
        "    return not bool(wrong.any())\n",
        "    return True\n",
        ("tests/test_real_time.py", "no_derivative_in_torch"),
        unverified=False,
    ),
    Mutant(
        "old-graphs",
        "the graph of an objective made of old losses is taken to end at the weights as they are",
        "modes/within.py",
        "    return any(moved or not b.fresh or b.epoch <= loop.stepped_at for b in bindings)\n",
        "    return False\n",
        ("tests/test_real_time.py", "made_of_what"),
    ),
    Mutant(
        "sum-of-directions",
        "the estimates along random directions are summed, and not averaged",
        "modes/columns.py",
        "torch.tensordot(along.to(drawn.dtype), drawn, 1) / self.count",
        "torch.tensordot(along.to(drawn.dtype), drawn, 1)",
        ("tests/test_real_time.py", "sign_vectors"),
    ),
    # -- implicit mode
    Mutant(
        "one-term",
        "the series of the implicit hypergradient has its first term only",
        "modes/implicit.py",
        "total[key] = total[key] + value if key in total else value",
        "total[key] = total[key] if key in total else value",
        ("tests/test_implicit.py", "ridge"),
    ),
    # -- rules
    Mutant(
        "dampened-first-step",
        "a first step of SGD with dampening is taken for a step from a buffer of zeros",
        "rules/sgd.py",
        "    return () if damped or settings",
        "    return () if settings",
        ("tests/test_every_rule.py", "step_from_zeros and SGD"),
    ),
    Mutant(
        "verify-from-zeros-only",
        "a program whose first step began with zeros is not looked at again",
        "capture/verify.py",
        "        if last:\n            self._seen.add(program)",
        "        self._seen.add(program)",
        ("tests/test_bad_input.py", "second_step"),
        unverified=False,
    ),
    # -- the reverse sweep
    Mutant(
        "forget-B1",
        "the sweep ends one step early, at the second step, and loses B_1",
        "modes/record.py",
        "for place, segment in walk(self._keeping):\n",
        "for place, segment in list(walk(self._keeping))[:-1]:\n",
        (LAWS, "one_step or unrolled"),
    ),
    Mutant(
        "drop-buffers",
        "the adjoint of the optimizer's buffers is dropped; only that of the weights goes back",
        "modes/adjoint.py",
        "for key, grad in pulled.carried.items():\n",
        "trained = {b.key for w in self.loop.weights() if (b := self.loop.tape.find(w)) is not None}\n"
        "        for key, grad in ((k, g) for k, g in pulled.carried.items() if k in trained):\n",
        (LAWS, "unrolled or linear_recursion"),
    ),
    Mutant(
        "keep-overwritten",
        "the adjoint of an overwritten state is kept, and the new one added to it",
        "modes/adjoint.py",
        "alpha = {key: self.carried.pop(key) for",
        "alpha = {key: self.carried[key] for",
        (LAWS, "one_step or closed_form"),
    ),
    Mutant(
        "forget-direct",
        "the direct derivative ∂E/∂λ is forgotten",
        "modes/hypergradients.py",
        "for leaf, grad in adjoint.direct:",
        "for leaf, grad in adjoint.direct[:0]:",
        (LAWS, "direct or closed_form or unrolled"),
    ),
    Mutant(
        "overwrite-grad",
        "`backward` overwrites the hyperparameter's .grad instead of adding to it",
        "modes/hypergradients.py",
        "leaf.grad = own if leaf.grad is None else leaf.grad + own",
        "leaf.grad = own",
        (LAWS, "accumulates"),
    ),
    Mutant(
        "jacobian-first-row",
        "every row of a Jacobian goes to the first objective",
        "modes/adjoint.py",
        "result.carried[key][place] = value",
        "result.carried[key][0] = value",
        (LAWS, "jacobian"),
    ),
    Mutant(
        "one-step-too-many",
        "truncation keeps one step more than it was asked to",
        "modes/record.py",
        "self._times[0] <= self._loop.steps - self._last",
        "self._times[0] < self._loop.steps - self._last",
        (LAWS, "last_steps"),
    ),
    # -- what is kept, and what is compiled
    Mutant(
        "stale-state",
        "between two checkpoints, a state is taken for the one before it",
        "checkpoints/restoring.py",
        "yield start + action.n0, segments[action.n0].at(state)",
        "yield start + action.n0, segments[action.n0].at(saved.get(action.n0 - 1) or state)",
        (KEEPING, "any_number"),
    ),
    Mutant(
        "forget-carried",
        "what a step does not write is lost between two checkpoints",
        "checkpoints/restoring.py",
        "return {**{key: value for key, value in state.items() if key in read}, **after}",
        "return after",
        (KEEPING, "few_steps"),
    ),
    Mutant(
        "drop-too-much",
        "a state that no kept iteration computes is given up",
        "checkpoints/levels.py",
        "if producer >= start}",
        "if producer >= -1}",
        (KEEPING, "does_not_depend"),
    ),
    Mutant(
        "numbers-baked-in",
        "the number of the step at which a derivative was compiled is used at all steps",
        "modes/versions.py",
        "if len(set(column)) > 1:",
        "if len(set(column)) > 10**6:",
        (COMPILED, "all_runs_and_numbers or inductor"),
    ),
    Mutant(
        "new-random-numbers",
        "a compiled step draws from where the generator stands, and not from where the loop's stood",
        "capture/draws.py",
        "found += seeded(seeds[place], lambda calls=calls: [draw() for draw in calls])",
        "found += [draw() for draw in calls]",
        (COMPILED, "drawn_again"),
    ),
    Mutant(
        "wrong-end",
        "a compiled step takes what it began with for what it left behind",
        "modes/adjoint.py",
        "after = {key: cell.value() for key, cell in segment.inputs}",
        "after = after or {key: cell.value() for key, cell in segment.inputs}",
        (COMPILED, "pull_back"),
    ),
    # -- the step
    Mutant(
        "drop-hessian",
        "the loop's gradient is a constant of the sweep: no Hessian term",
        "capture/primitives.py",
        "create_graph=phase.graph,",
        "retain_graph=True,",
        (LAWS, "one_step or closed_form"),
    ),
    Mutant(
        "stop-is-detach",
        "what `detach` and `no_grad` stop is held constant by the sweep too",
        "capture/primitives.py",
        "return _Stop.apply(x, phase)",
        "return x.detach()",
        (CASES, "finite and (pseudo_labels or detached_norm or teacher)"),
    ),
    Mutant(
        "stop-nothing",
        "`detach` and `no_grad` stop nothing, not even the loop's own gradient",
        "capture/primitives.py",
        "return (None if ctx.phase.inner else grad), None",
        "return grad, None",
        (CASES, "finite and (pseudo_labels or detached_norm or teacher)"),
    ),
    Mutant(
        "dice-again",
        "a replay draws new random numbers",
        "capture/primitives.py",
        "            generator.set_state(state)\n        return func(*args, **kwargs)",
        "            generator.get_state()\n        return func(*args, **kwargs)",
        (LAWS, "unrolled"),
    ),
    Mutant(
        "statistics-constant",
        "the adjoint of batch norm's running statistics is dropped",
        "modes/outer.py",
        "for key, grad in statistics.items():",
        "for key, grad in list(statistics.items())[:0]:",
        (LAWS, "unrolled"),
    ),
    Mutant(
        "gradients-leak",
        "the loop's own `backward` reaches the hyperparameters' .grad",
        "capture/gradients.py",
        "retain_graph, create_graph, inputs=into if trains else inputs)",
        "retain_graph, create_graph)",
        (LAWS, "puts_no_gradient"),
    ),
    Mutant(
        "gradients-overwrite",
        "a second `backward` is replayed as overwriting the gradients, not as adding to them",
        "capture/gradients.py",
        "if id(tensor) in old:",
        "if False:",
        (LAWS, "unrolled"),
    ),
    Mutant(
        "zero-grad-keeps",
        "`zero_grad(set_to_none=False)` is not seen: gradients pile up in the replay",
        "capture/writes.py",
        "        tape.write_whole(target, value)\n    return result\n\n\ndef _copy",
        "        tape.find(target).version = target._version\n    return result\n\n\ndef _copy",
        (LAWS, "unrolled"),
    ),
    Mutant(
        "share-the-state",
        "a recorded state is a reference to the weights, which the next step overwrites",
        "capture/cells.py",
        "self.check()\n            self._held = copy(self.tensor)",
        "self.check()\n            self._held = self.tensor.detach()",
        (LAWS, "closed_form or unrolled"),
    ),
    Mutant(
        "keep-graphs",
        "what is recorded keeps the autograd graph of its step alive",
        "step.py",
        "        segment = self.tape.end(self.library.seal)\n",
        "        keep = [t for b in self.tape.bindings() if (t := b.ref()) is not None and t.grad_fn is not None]\n"
        "        self.kept = [*getattr(self, 'kept', []), *keep]\n"
        "        segment = self.tape.end(self.library.seal)\n",
        (LAWS, "memory"),
    ),
    Mutant(
        "trust-blindly",
        "a replay that differs from the loop is accepted",
        "capture/verify.py",
        "        if wrong:\n            raise",
        "        if False:\n            raise",
        (INPUT, "hidden_state"),
        unverified=False,
    ),
    Mutant(
        "unseen-is-constant",
        "a gradient that another thread computed is a constant",
        "capture/arrivals.py",
        "if grad is None or tape",
        "if True or tape",
        (INPUT, "gradient_from_another_thread"),
    ),
    # -- the rules
    Mutant(
        "plain-root",
        "Adam with autograd's own square root, whose derivative at 0 is infinite",
        "rules/rule.py",
        "return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())",
        "return x.sqrt()",
        (RULES, "finite_at_zero or limit"),
    ),
    Mutant(
        "nesterov",
        "nesterov looks ahead with the gradient and not with the new buffer",
        "rules/sgd.py",
        "g = add_scaled(g, v, momentum) if nesterov else v",
        "g = add_scaled(g, g, momentum) if nesterov else v",
        (RULES, "parity"),
    ),
    Mutant(
        "dampened-start",
        "the first momentum buffer is dampened, which torch's is not",
        "rules/sgd.py",
        "v = g if v is None else add_scaled(",
        "v = (1 - dampening) * g if v is None else add_scaled(",
        (RULES, "parity"),
    ),
    Mutant(
        "maximize",
        "`maximize` minimizes",
        "rules/sgd.py",
        "g = -g if maximize else g",
        "g = g.clone() if maximize else g",
        (RULES, "parity"),
    ),
    Mutant(
        "bias-detached",
        "Adam's second bias correction is computed from a number: no derivative for beta2 through it",
        "rules/moments.py",
        "denominator = root / (1 - beta2**step) ** 0.5 + eps",
        "denominator = root / (1 - float(torch.as_tensor(beta2).detach()) ** step) ** 0.5 + eps",
        (RULES, "every_setting"),
    ),
    Mutant(
        "bias-off-by-one",
        "Adam's bias correction counts steps from 0",
        "rules/moments.py",
        "-lr / (1 - beta1**step)",
        "-lr / (1 - beta1 ** (step + 1))",
        (RULES, "parity"),
    ),
    Mutant(
        "amsgrad",
        "amsgrad keeps the peak, and does not use it",
        "rules/moments.py",
        "root = safe_sqrt(peak if amsgrad and peak is not None else v)",
        "root = safe_sqrt(v)",
        (RULES, "parity"),
    ),
    Mutant(
        "coupled-decay",
        "AdamW's decay goes through the gradient",
        "rules/adamw.py",
        "w = w * (1 - double(lr) * double(weight_decay))",
        "g = g + weight_decay * w",
        (RULES, "parity"),
    ),
    Mutant(
        "own-precision",
        "a rule computes with a setting in the hyperparameter's precision: 1 - beta2 of a float32 loses its digits",
        "rules/rule.py",
        "return value.double() if isinstance(value, Tensor)",
        "return value if isinstance(value, Tensor)",
        (RULES, "given_as_a_tensor"),
    ),
    Mutant(
        "product-detached",
        "NAdam's product of all momenta is a number: it forgets the settings of the steps before",
        "rules/nadam.py",
        "mu if before is None else before * mu",
        "mu if before is None else before.detach() * mu",
        (TABLE, "cell and NAdam"),
    ),
    Mutant(
        "start-constant",
        "Adagrad's sums begin at a number, with no derivative for their initial value",
        "rules/adagrad.py",
        "if s is None or (isinstance(initial_accumulator_value, Tensor) and step == 1):",
        "if s is None:",
        (TABLE, "cell and Adagrad"),
    ),
    Mutant(
        "rate-detached",
        "the rate that ASGD carries from step to step is a number",
        "rules/asgd.py",
        "rate = lr if eta is None else double(eta)",
        "rate = lr if eta is None else double(eta.detach())",
        (TABLE, "cell and ASGD"),
    ),
    Mutant(
        "size-detached",
        "the weights' own size, by which Adafactor scales its step, is a number, as torch has it",
        "rules/adafactor.py",
        "_at_least(norm(w) / size, eps2)",
        "_at_least(norm(w.detach()) / size, eps2)",
        (TABLE, "cell and Adafactor"),
    ),
    Mutant(
        "trust-detached",
        "LAMB's trust ratio is a number",
        "rules/lamb.py",
        "trust = torch.where(zero_ratio, 1.0, size / torch.where(zero_ratio, 1.0, length))",
        "trust = torch.where(zero_ratio, 1.0, size / torch.where(zero_ratio, 1.0, length)).detach()",
        (TABLE, "cell and LAMB"),
    ),
    Mutant(
        "rounded-derivative",
        "Muon's derivative is that of torch's bfloat16 iteration, which has none",
        "rules/muon.py",
        "x = x + (rounded - x).detach()",
        "x = rounded",
        (TABLE, "Muon"),
    ),
    Mutant(
        "flat-allowed",
        "a hyperparameter where the weights have derivative 0 gets a hypergradient of 0",
        "rules/rule.py",
        "if name in self.flat:",
        "if False:",
        (TABLE, "without_a_derivative"),
    ),
    # -- schedules, and the way back
    Mutant(
        "ignore-factor",
        "the scheduler's factor on a hyperparameter is ignored",
        "update.py",
        "if slope != 1.0:",
        "if False:",
        (LAWS, "unrolled"),
    ),
    Mutant(
        "ignore-absolute",
        "a scheduler's absolute setting (eta_min) is taken as proportional to the hyperparameter",
        "update.py",
        "if rest != 0.0:",
        "if False:",
        ("tests/test_schedulers.py", "built_anew"),
    ),
    Mutant(
        "plateau-is-absolute",
        "a rate that ReduceLROnPlateau reduced has no derivative",
        "links.py",
        "    found = _plateau(optimizer, origin, link, number)\n",
        "    found = None\n",
        ("tests/test_schedulers.py", "built_anew and Plateau"),
    ),
    Mutant(
        "plain-root-in-a-step",
        "the root in the step of a wrapped optimizer has an infinite derivative at 0",
        "capture/steps.py",
        "return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())",
        "return x.sqrt()",
        ("tests/test_wrap.py", "zero_gradients"),
    ),
    Mutant(
        "numbers-in-a-step",
        "a number that the step of a wrapped optimizer takes out of a tensor is held constant without a word",
        "capture/watcher.py",
        "if not self.numbers_held and self.stepping():",
        "if False:",
        ("tests/test_wrap.py", "lbfgs"),
    ),
    Mutant(
        "two-sided-kink",
        "the check of a loop takes a kink for a wrong derivative",
        "check/hypergradient.py",
        "if found.spread > near or abs(found.jump) > 2 * near:",
        "if found.spread > near:",
        ("tests/test_check.py", "kink"),
    ),
    Mutant(
        "stale-bases",
        "a scheduler in closed form goes on from the rate that its hyperparameter had when it was made",
        "links.py",
        "state[key][:] = shifted(state[key], origin, change, owner)",
        "pass",
        (RULES, "schedulers_factor"),
    ),
    Mutant(
        "first-of-schedule",
        "a learned schedule is read at its first entry only",
        "links.py",
        "return value[step]",
        "return value[0]",
        (RULES, "learned_schedule"),
    ),
    Mutant(
        "outside-domain",
        "a hyperparameter that left its domain is used all the same",
        "optim/drop_in.py",
        "                rule.check(name, new)\n",
        "",
        (RULES, "outside"),
    ),
    Mutant(
        "keep-generators",
        "`rewind` leaves the random generators where they are",
        "modes/start.py",
        "        set_random_states(self._random)\n",
        "",
        (LAWS, "first_bit"),
    ),
    Mutant(
        "keep-momentum",
        "`rewind` leaves the optimizer's buffers as the loop left them",
        "modes/start.py",
        "self._saved[id(tensor)] = (weakref.ref(tensor), tensor.detach().clone())",
        "value = tensor.detach().clone() if tensor.requires_grad else tensor.detach()\n"
        "        self._saved[id(tensor)] = (weakref.ref(tensor), value)",
        (LAWS, "first_bit"),
    ),
    Mutant(
        "overlapping-states",
        "a copy of a state begins before the one before it has ended",
        "checkpoints/stores.py",
        "        self._used += -(-size // _ALIGNED) * _ALIGNED\n",
        "        self._used += size // 2\n",
        (LAWS, "unrolled"),
    ),
    Mutant(
        "filled-with-ones",
        "what the objective does not read has an adjoint of one at the last step",
        "modes/compiled.py",
        "torch.zeros_like(after[key]) for key in filled",
        "torch.ones_like(after[key]) for key in filled",
        ("tests/test_compile.py", "last_step"),
    ),
    Mutant(
        "dropped-shape",
        "a sum with zeros is left out where the zeros give it its shape",
        "capture/simplify.py",
        "if all(getattr(value, name) == getattr(whole, name) for name in _ALIKE) and value.stride() == whole.stride():",
        "if True:",
        ("tests/test_simplify.py", "zeros"),
    ),
    Mutant(
        "joined-by-rows",
        "two products that are added are joined in another order left than right",
        "capture/simplify.py",
        "([b for _, b in factors], 0)",
        "([b for _, b in factors[::-1]], 0)",
        ("tests/test_simplify.py", "added"),
    ),
    Mutant(
        "sharing-in-a-circle",
        "products that share a factor are joined though one needs the other",
        "capture/sharing.py",
        "if _pays([*together, product]) and _is_apart(together, product):",
        "if _pays([*together, product]):",
        ("tests/test_simplify.py", "needs_another"),
    ),
    Mutant(
        "rounding-of-the-adjoint-alone",
        "what rounding of the state makes of a compiled derivative counts as a wrong compiler",
        "modes/compiled.py",
        "PullBack.__call__(self, segment.nudged(seed),",
        "PullBack.__call__(self, segment,",
        ("tests/test_compile.py", "amplifies"),
    ),
    Mutant(
        "large-is-rounding",
        "what counts as rounding grows with the square of a tensor's size",
        "capture/verify.py",
        "<= rounding * size:",
        "<= rounding * size**2:",
        ("tests/test_verify.py", "relative"),
    ),
    # -- best responses
    Mutant(
        "tangent-of-the-input",
        "a linear layer's tangent has the response of its weight, and not the tangent of its input",
        "stn/rules.py",
        "    dy = None if dx is None else F.linear(dx, weight)\n",
        "    dy = None\n",
        ("tests/test_stn_layers.py", "engines_agree and mlp"),
    ),
    Mutant(
        "open-kinks",
        "a tangent goes through a ReLU where the value does not",
        "stn/tangents.py",
        "    return _threshold_backward(dx.expand_as(y), y.detach(), 0)\n",
        "    return dx.expand_as(y).clone()\n",
        ("tests/test_stn_layers.py", "engines_agree and mlp"),
    ),
    Mutant(
        "other-masks",
        "the response's step draws other dropout masks than the weights' step",
        "stn/training.py",
        "        self.starts.back(state, after)\n",
        "",
        ("tests/test_stn_training.py", "same_dropout_masks"),
    ),
    Mutant(
        "moved-statistics",
        "the response's step starts from the statistics that the weights' step has moved",
        "stn/buffers.py",
        "                k.store[k.place[1]] = k.copy\n",
        "                pass\n",
        ("tests/test_stn_whole.py", "same_buffers"),
    ),
    Mutant(
        "one-rate-for-all",
        "all examples have the first one's dropout rate",
        "stn/randomness.py",
        "    return values[0] if layout is None else layout.spread(values, x.ndim)\n",
        "    return values[0]\n",
        ("tests/test_stn_language.py", "own_rate"),
    ),
    Mutant(
        "old-unit",
        "the response stays fed in the old unit when a scale moves",
        "stn/tuned.py",
        "            self.responses.rescale_(ratio)\n",
        "",
        ("tests/test_stn_training.py", "rescaling"),
    ),
    Mutant(
        "moving-origin",
        "the origin of a centred response moves with the hyperparameters, which then have no gradient through it",
        "stn/steps.py",
        'origin = 0 if tuned.method == "stn" else leaf.detach()',
        'origin = 0 if tuned.method == "stn" else leaf',
        ("tests/test_stn_training.py", "moves_everything"),
    ),
    Mutant(
        "neighbours-perturbation",
        "an example has its neighbour's response",
        "stn/responses.py",
        "            spread = torch.mm(z if z.dtype is weight.dtype else z.to(weight.dtype), weight)\n",
        "            spread = torch.mm(z.to(weight.dtype).roll(1, 0), weight)\n",
        ("tests/test_stn_layers.py", "example_alone and mlp"),
    ),
    Mutant(
        "penalty-without-the-cross-term",
        "an L2 penalty per example is that of the weights and of their change, without their product",
        "stn/penalties.py",
        "        total = total + 2 * (s @ rows(weight if v is None else weight * v))\n",
        "",
        ("tests/test_stn_training.py", "l2_is_exact"),
    ),
    Mutant(
        "stale-present",
        "the values of the weights' step are those of the first step",
        "stn/coordinates.py",
        "if kept is None or not torch.equal(kept.point, point):",
        "if kept is None:",
        ("tests/test_stn_values.py", "follow"),
    ),
    Mutant(
        "rates-of-the-module",
        "a dropout has its module's rate in the weights' step, and not its hyperparameter's",
        "stn/running.py",
        "        p = Pass({}, {}, {name: values.number(name)",
        "        p = Pass({}, {}, {} and {name: values.number(name)",
        ("tests/test_stn_training.py", "law or masks or dropout or rate"),
    ),
    Mutant(
        "values-stay-written",
        "what a loss writes into its values stays for later steps",
        "stn/coordinates.py",
        "{name: v.clone().expand(examples, *v.shape[1:])",
        "{name: v.expand(examples, *v.shape[1:])",
        ("tests/test_stn_training.py", "writes_into"),
    ),
    Mutant(
        "gradient-as-it-lies",
        "a fused optimizer gets a gradient that lies in memory in another order than its parameter",
        "stn/guards.py",
        "        torch.autograd.backward(loss, inputs=tensors)\n",
        "        found = torch.autograd.grad(loss, tensors, allow_unused=True)\n"
        "        for t, g in zip(tensors, found):\n            t.grad = g\n",
        ("tests/test_stn_training.py", "fused"),
    ),
    Mutant(
        "fused-as-it-lies",
        "the default optimizer takes what lies in memory in another order for what it is not",
        "stn/fused.py",
        "        plain = all(map(Tensor.is_contiguous, chain(parameters, gradients, momenta)))\n",
        "        plain = True\n",
        ("tests/test_stn_fused.py", "lies_in_memory"),
    ),
    Mutant(
        "users-hooks-stay-refused",
        "the user's hooks on saved values are refused once a pass ran within them",
        "stn/guards.py",
        "        with suppress(RuntimeError):\n            _open_saving_hooks(before)\n",
        "",
        ("tests/test_stn_users.py", "hooks_on_what"),
    ),
    Mutant(
        "checkpoints-within-hooks",
        "checkpointing goes unseen where the user's hooks on saved values are open",
        "stn/guards.py",
        "    if _here.refused:\n",
        "    if False:\n",
        ("tests/test_stn_users.py", "saves_values_elsewhere"),
    ),
    Mutant(
        "padding-responds",
        "a look-up trains the response of its padding",
        "stn/rules.py",
        "found = found if fixed is None else torch.where(still, fixed, found)",
        "found = found if fixed is None else torch.where(still, found, found)",
        ("tests/test_stn_surrogates.py", "padding"),
    ),
    Mutant(
        "views-of-other-rows",
        "a part of a weight responds by the first rows, whichever part it is",
        "stn/viewing.py",
        "        coefficients = tuple(s.index_select(1, kept) for s in coefficients)\n",
        "        coefficients = tuple(s[:, : len(kept)] for s in coefficients)\n",
        ("tests/test_stn_layers.py", "views"),
    ),
    Mutant(
        "modes-of-evaluation",
        "a model whose own `eval` leaves a part in training mode is evaluated without it",
        "stn/modes.py",
        "if all(map(_switched_by_torch, modules)) else _switched",
        "if True else _switched",
        ("tests/test_stn_altered.py", "own_eval"),
    ),
    Mutant(
        "surrogate-gradients",
        "a validation loss goes by a custom function's backward, and not by the derivative of its values",
        "stn/custom.py",
        "        return by_value(self.nature(cls, args, kwargs), cls, own, args, kwargs)\n",
        "        return self.plain(own, args, kwargs)\n",
        ("tests/test_stn_surrogates.py", "not padding"),
    ),
    Mutant(
        "not-finite-taken",
        "a step is taken whatever its gradient",
        "stn/descent.py",
        "    return all(map(math.isfinite, numbers))\n",
        "    return True\n",
        ("tests/test_stn_training.py", "not_finite"),
    ),
]


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: the test that failed (or None), and by which error."""

    mutant: Mutant
    killer: str | None
    by: str = ""
    problem: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return self.problem or (f"{self.killer}: {self.by}" if self.killer else "SURVIVED")


@contextmanager
def copied(unverified: bool) -> Iterator[Path]:
    """A copy of the package and its tests."""
    with tempfile.TemporaryDirectory(prefix="metaopt-mutant-") as name:
        place = Path(name)
        for folder in ("metaopt", "tests"):
            shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        shutil.copy(ROOT / "pyproject.toml", place)
        with (place / "tests" / "conftest.py").open("a") as file:
            file.write(SETTING.replace("{unverified}", str(unverified)))
        yield place


def run_tests(place: Path, file: str, expression: str) -> tuple[int, str]:
    """Pytest's exit status and output, in a copy."""
    command = [sys.executable, "-m", "pytest", file, "-k", expression, "-x", "-q", "-n", "0", "--tb=no"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(place),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout


def apply(mutant: Mutant, place: Path) -> str:
    """Patch the copy; the reason if that is not possible."""
    path = place / "metaopt" / mutant.file
    text = path.read_text() if path.exists() else ""
    if text.count(mutant.old) != 1:
        return f"NO LONGER APPLIES: its text occurs {text.count(mutant.old)} times in metaopt/{mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new))
    return ""


def failed(output: str) -> tuple[str, str]:
    """The first test that failed, by its name, and the error's class."""
    lines = [line for line in output.splitlines() if line.startswith("FAILED ")]
    name, _, error = lines[0].removeprefix("FAILED ").partition(" - ") if lines else ("", "", "")
    kind = error.partition(":")[0].rpartition(".")[2]
    return name.removeprefix("tests/"), kind if kind.isidentifier() else "AssertionError"


def judge(mutant: Mutant) -> Verdict:
    """Apply a mutant and run its tests."""
    began = time.monotonic()
    with copied(mutant.unverified) as place:
        problem = apply(mutant, place)
        if problem:
            return Verdict(mutant, None, problem=problem)
        status, output = run_tests(place, *mutant.tests)
    seconds = time.monotonic() - began
    killer, by = failed(output)
    if status == 1 and killer:
        return Verdict(mutant, killer, by, seconds=seconds)
    return Verdict(mutant, None, problem="" if status == 0 else f"BROKEN: pytest ended with {status}", seconds=seconds)


def baseline(mutants: Sequence[Mutant]) -> str:
    """The tests have to pass where nothing is broken; what fails, if something does."""
    with copied(unverified=False) as place:
        where = subprocess.run(
            [sys.executable, "-c", "import metaopt; print(metaopt.__file__)"],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(place)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if not where.startswith(str(place)):
            return f"the copy is not what is imported, but {where.strip()}"
        for file, expression in sorted({mutant.tests for mutant in mutants}):
            status, output = run_tests(place, file, expression)
            if status:
                return f"without a mutant, {file} -k {expression!r}: {failed(output)[0] or output[-2000:]}"
    return ""


def page(verdicts: Sequence[Verdict]) -> str:
    """The result as a page of the documentation."""
    killed = sum(verdict.killer is not None for verdict in verdicts)
    lines = [
        "# Mutants",
        "",
        "A test that nothing can fail proves nothing. `tox -e mutants` breaks the library in the ways that matter, one",
        "at a time and in a copy, and runs the tests that have to see it.",
        "",
        f"{killed} of {len(verdicts)} mutants are killed. This page is written by `python tests/mutants.py --write",
        "docs/mutants.md`.",
        "",
        "| mutant | what it breaks | in | killed by | which raised |",
        "|---|---|---|---|---|",
    ]
    for v in verdicts:
        killer = f"`{v.killer}`" if v.killer else f"**{v}**"
        lines.append(f"| {v.mutant.name} | {v.mutant.breaks} | `{v.mutant.file}` | {killer} | {v.by} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="break the library in the ways that matter, and see the tests fail")
    parser.add_argument("names", nargs="*", metavar="NAME", help="the mutants (all of them)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as a page in Markdown")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="how many at a time")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not options.names or mutant.name in options.names]
    problem = baseline(chosen)
    if problem:
        print(f"The tests fail already {problem}")
        return 1
    verdicts = []
    width = max(len(mutant.name) for mutant in chosen)
    with ThreadPoolExecutor(options.jobs) as pool:
        for verdict in pool.map(judge, chosen):
            verdicts.append(verdict)
            print(f"{verdict.mutant.name:{width}}  {verdict.seconds:5.1f} s  {verdict}", flush=True)
    alive = [verdict for verdict in verdicts if verdict.killer is None]
    print(f"{len(verdicts) - len(alive)} of {len(verdicts)} mutants killed")
    if options.write is not None:
        options.write.write_text(page(verdicts))
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
