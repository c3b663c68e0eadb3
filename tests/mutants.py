# SPDX-License-Identifier: Apache-2.0
"""Plants one fault at a time and shows that a test catches it. Not part of ``make test``: it takes an hour.

    python tests/mutants.py               # all, in copies of the checkout; the exit status counts those that survive
    python tests/mutants.py --only flat   # those whose file or fault has that in it
    python tests/mutants.py --list

Each fault is a text of one file and what stands in its place; the text must be there exactly once, so that a fault that no
longer fits is noticed. ``tests`` are what has to fail. A fault in the C++ of the CPU names the object files that are compiled
anew, as the last build compiled them; the baseline's kernels then run. Faults in csrc/update_math.h and csrc/cuda run in the
emulated CUDA kernels, beside the CPU kernels as they are built.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    fault: str
    file: str
    old: str
    new: str
    tests: str
    objects: tuple[str, ...] = ()


GOLDEN = "tests/test_golden.py -k cpu"
REFERENCE = "tests/test_golden.py -k reference"
KERNELS = "tests/test_kernels.py -m 'not slow'"
EMULATED = "tests/test_cuda_emulated.py -k 'bits_of_the_cpu'"
ALL_EMULATED = "tests/test_cuda_emulated.py"
SPECIFIED = "tests/test_kernels.py -k 'bits_of_the_specification and fp32'"
SPECIFIED_16 = "tests/test_kernels.py -k 'bits_of_the_specification and bf16'"
MASTERS_16 = "tests/test_kernels.py -k 'bits_of_the_specification and masters and bf16'"
MASTERS = "tests/test_masters.py -k "
RANDOM_16 = "tests/test_kernels.py -k 'bits_of_the_specification and stochastic and bf16'"
STABLE_OPERATORS, STABLE = ("stable/operators",), "tests/test_stable.py -m 'not exhaustive' -k "
FLOAT, BF16, OPERATORS = ("cpu/units/baseline_float",), ("cpu/units/baseline_bf16",), ("cpu/operators",)
CALLS = "tests/test_kernels.py -k 'operator_does_not_take or of_a_call_are'"
LOOPS_OVER_PARAMETERS, PARAMETERS = "csrc/parameters.cpp", ("parameters",)
LOOPS, DEVICE = "csrc/cpu/loops.h", "csrc/cuda/kernels.cuh"
SHARDED = "tests/test_sharded.py -m 'not exhaustive' -k "
TRITON = "tests/test_triton.py -k 'bits_of_the_specification'"
OWN_ASCENTS, SCENARIOS, ACCUMULATED = (
    f"tests/test_distributed.py -m 'not exhaustive' -k {name}"
    for name in ("own_ascents", "scenarios", "others_accumulate")
)
FOLLOW = "tests/test_follow.py -m 'not exhaustive'"
COMPAT, OPTIM_DB = "tests/test_compat.py", "tests/test_optim_db.py -m 'not exhaustive'"
MISTAKES = "tests/test_mistakes.py"
# These need what `make frameworks` installs.
ON_RANKS = "tests/test_frameworks.py -k two_ranks"
FRAMEWORK = "tests/test_frameworks.py -k 'lightning_trains_as and accumulation'"
P, B = "msam_kernels/", "msam_kernels/backends/"

MUTANTS = [
    # -- what was loaded, on ranks and before wrapping
    Mutant(
        "an empty shard has not begun",
        P + "flat.py",
        "return memory.numel() == 0 or not",
        "return memory.numel() > 0 and not",
        SHARDED + "reused_by_all_ranks",
    ),
    Mutant(
        "a direction is not that of empty buffers",
        P + "checkpoint.py",
        'tensors["v"] if name == "v" else there',
        "there",
        "tests/test_resume.py -k nothing_but_empty",
    ),
    Mutant(
        "what was loaded before wrapping begins anew",
        P + "optimizer.py",
        "        if loaded:",
        "        if False:",
        "tests/test_resume.py -k before_the_optimizer_was_wrapped",
    ),
    Mutant(
        "what an earlier wrapper remembered is taken over",
        P + "optimizer.py",
        "loaded = base_optimizer not in RHO_OF_OURS and",
        "loaded =",
        "tests/test_resume.py -k before_the_optimizer_was_wrapped",
    ),
    Mutant(
        "what was loaded before wrapping is not looked at first",
        P + "checkpoint.py",
        "        check(state_dict, engine.store)\n    return found",
        "        pass\n    return found",
        "tests/test_resume.py -k before_anything_moves",
    ),
    Mutant(
        "whole state replaces that of sharded parameters",
        P + "checkpoint.py",
        "        check_alike(value, params[i])",
        "        pass",
        SHARDED + "refused_in",
    ),
    Mutant(
        "a copy's process group is another one",
        P + "ranks.py",
        "    def __deepcopy__(self, memo: object)",
        "    def copied(self, memo: object)",
        "tests/test_resume.py -k same_process_group",
    ),
    # -- a model that moves, other people's state
    Mutant(
        "what methods remember stays behind when the model is converted",
        P + "flat.py",
        "memory.parts[i].copy_(flat.memories[name].parts[at])",
        "pass",
        FOLLOW,
    ),
    Mutant(
        "LookSAM's direction is not measured anew",
        P + "flat.py",
        """memory.parts[i].copy_(flat.memories[name].parts[at])
            if name == "v":""",
        """memory.parts[i].copy_(flat.memories[name].parts[at])
            if name == "w":""",
        FOLLOW,
    ),
    Mutant(
        "a mask stays behind when the model is converted",
        P + "flat.py",
        "if all(home and home[0].mask is not None for home in old):",
        "if False:",
        FOLLOW,
    ),
    Mutant(
        "state stays behind when the model is converted",
        P + "store.py",
        "if p in stay:",
        "if p not in stay:",
        FOLLOW,
    ),
    Mutant(
        "state of another dtype is converted with its parameter",
        P + "store.py",
        "follows = value.dim() and value.dtype == was.dtype",
        "follows = True",
        FOLLOW,
    ),
    Mutant(
        "a part of a flat that is converted takes the others along",
        P + "store.py",
        "group_of.update({id(p): flat.groups[i] for p, (flat, i) in homes.items()})",
        "group_of.update({id(p): 0 for p, (flat, i) in homes.items()})",
        FOLLOW + " tests/test_conventions.py",
    ),
    Mutant(
        "a flat of before the conversion is perturbed",
        P + "store.py",
        "self._parts = None, -1, []",
        "pass",
        FOLLOW,
    ),
    Mutant(
        "what is frozen and of no kind that kernels know is kept",
        P + "store.py",
        "for p in flat.params if is_servable(shard(p))}",
        "for p in flat.params}",
        FOLLOW,
    ),
    Mutant(
        "what is loaded after a conversion is rounded",
        P + "optimizer.py",
        "engine.take_in(moved=True)  # what",
        "engine.take_in()  # what",
        FOLLOW,
    ),
    Mutant(
        "stats of flats that are gone",
        P + "step.py",
        "self.norms_sq = []  # of flats that are gone",
        "pass",
        FOLLOW,
    ),
    Mutant(
        "foreign state is judged by its shape",
        P + "checkpoint.py",
        "if type(store.base) in RULES:",
        "if True:",
        OPTIM_DB,
    ),
    Mutant(
        "a base optimizer that saves itself is not asked to",
        P + "rules.py",
        "return kind.state_dict is not Optimizer.state_dict or kind.load_state_dict is not Optimizer.load_state_dict",
        "return False",
        OPTIM_DB,
    ),
    Mutant(
        "a base optimizer that asks for a closure is taken",
        P + "rules.py",
        "    if asked:\n",
        "    if False:\n",
        OPTIM_DB,
    ),
    Mutant(
        "F-SAM's mean in other people's checkpoints is dropped",
        P + "checkpoint.py",
        '"state": state, KEY: {"ema": means}}',
        '"state": state}',
        COMPAT,
    ),
    Mutant(
        "other people's saved weights stay in the state",
        P + "checkpoint.py",
        '_THEIRS = ("old_p", "e_w", "momentum")',
        '_THEIRS = ("momentum",)',
        COMPAT,
    ),
    Mutant(
        "adaptive of a checkpoint is not looked at",
        P + "compat.py",
        "if adaptive and adaptive != {self._is_adaptive}:",
        "if False:",
        COMPAT,
    ),
    Mutant(
        "a forgotten backward before first_step",
        P + "compat.py",
        "if not step.had_gradients and engine.store.flats:",
        "if False:",
        COMPAT,
    ),
    Mutant(
        "a broken extension is called missing",
        B + "__init__.py",
        "if isinstance(missing_extension, ModuleNotFoundError):",
        "if True:",
        "tests/test_cli.py -k extension",
    ),
    Mutant(
        "the reference in silence",
        B + "__init__.py",
        "    warnings.warn(text, RuntimeWarning, stacklevel=3)",
        "    pass",
        "tests/test_cli.py -k 'extension or fall_back'",
    ),
    Mutant(
        "repr says what was asked for",
        P + "optimizer.py",
        "chosen = self.engine.store.backends or [self.backend]",
        "chosen = [self.backend]",
        "tests/test_conventions.py -k representation",
    ),
    Mutant(
        "workers that nobody ends",
        "examples/training.py",
        "            process.terminate()\n",
        "            pass\n",
        "tests/test_demo.py -k ctrl_c",
    ),
    # -- methods: the plans
    Mutant("a wrong sign in GSAM", P + "methods.py", "Coefficient(-self.alpha)", "Coefficient(self.alpha)", GOLDEN),
    Mutant(
        "GSAM along the other vector",
        P + "methods.py",
        "p=dot(0, 1), q=dot(0, 0), eps=0.0",
        "p=dot(0, 1), q=dot(1, 1), eps=0.0",
        GOLDEN,
    ),
    Mutant(
        "Bilateral's lengths swapped",
        P + "methods.py",
        "p=dot(1, 1), q=dot(0, 0), root=True",
        "p=dot(0, 0), q=dot(1, 1), root=True",
        GOLDEN,
    ),
    Mutant("no root in Bilateral", P + "methods.py", "q=dot(0, 0), root=True", "q=dot(0, 0), root=False", GOLDEN),
    Mutant(
        "LookSAM's projection onto the other vector",
        P + "methods.py",
        "p=dot(0, 1), q=dot(1, 1))",
        "p=dot(0, 1), q=dot(0, 0))",
        GOLDEN,
    ),
    Mutant(
        "v has the wrong sign",
        P + "methods.py",
        "v = (Coefficient(), Coefficient(0.0, -1.0",
        "v = (Coefficient(), Coefficient(0.0, 1.0",
        GOLDEN,
    ),
    Mutant(
        "alpha is lost", P + "methods.py", "reuses=Coefficient(0.0, self.alpha,", "reuses=Coefficient(0.0, 1.0,", GOLDEN
    ),
    Mutant(
        "a period off by one", P + "methods.py", "if since % self.period == 0:", "if since % self.period == 1:", GOLDEN
    ),
    Mutant("start off by one", P + "methods.py", "if since < 0", "if since <= 0", GOLDEN),
    Mutant("sigma is lost", P + "methods.py", "sigma=float(self.sigma)", "sigma=1.0", GOLDEN),
    Mutant("lmbda is lost", P + "methods.py", "lmbda=float(self.lmbda)", "lmbda=0.5", GOLDEN),
    Mutant("eta is lost", P + "methods.py", "eta=float(self.eta)", "eta=0.0", GOLDEN),
    Mutant(
        "the length of another vector",
        P + "methods.py",
        "return dot(self.holds, self.holds) if self.holds else 1",
        "return 0",
        GOLDEN,
    ),
    Mutant(
        "Stable SAM forgets another direction's g",
        P + "methods.py",
        "if plan.rescale and not plan.knows_length and not plan.holds:",
        "if False:",
        "tests/test_methods.py -k cpu",
    ),
    Mutant(
        "Stable SAM takes the length of a part of g",
        P + "methods.py",
        "return self.is_plain and self.only is None",
        "return self.is_plain",
        "tests/test_methods.py -k 'chosen_part and cpu'",
    ),
    Mutant("VaSSO with F-SAM's sign", P + "methods.py", "sigma=-(1 - self.theta)", "sigma=(1 - self.theta)", GOLDEN),
    Mutant("VaSSO forgets too fast", P + "methods.py", "lmbda=1 - self.theta)", "lmbda=self.theta)", GOLDEN),
    Mutant("WSAM weighs by gamma", P + "methods.py", "a = self.gamma / (1 - self.gamma)", "a = self.gamma", GOLDEN),
    Mutant(
        "WSAM coupled leaves g out",
        P + "methods.py",
        "descent=(Coefficient(a), Coefficient(1 - a))",
        "descent=(Coefficient(a), Coefficient(0.0))",
        GOLDEN,
    ),
    Mutant(
        "WSAM goes off the weights of what took no step",
        P + "step.py",
        "gap.present(stepped)",
        "gap",
        "tests/test_methods.py -k 'gap_of_gradients and cpu'",
    ),
    Mutant(
        "WSAM's gap is written over what is held",
        P + "step.py",
        "own = own_memory_of_lists([*latest.lists, *held.lists], whole=True)",
        "own = [*latest.lists, *held.lists]",
        "tests/test_methods.py -k 'same_tensor and WSAM and cpu'",
    ),
    Mutant(
        "an update shifts what is not in both passes",
        P + "step.py",
        "descent.is_plain(vectors[1]) and not any(vector.absent for vector in vectors)",
        "descent.is_plain(vectors[1])",
        "tests/test_optimizer.py -k 'some_passes_only and cpu'",
    ),
    Mutant(
        "an update's shift is not by the factor",
        P + "store.py",
        "flat.device), factor=factor)",
        "flat.device), factor=1.0)",
        GOLDEN,
    ),
    Mutant("a shift the other way", LOOPS, "there[j] - g[j]", "there[j] + g[j]", SPECIFIED, FLOAT),
    Mutant(
        "a shift of what is not rounded", LOOPS, "as_stored<S>(gap, n), as_stored<S>(w_new, n);", "", SPECIFIED_16, BF16
    ),
    Mutant(
        "a shift of what is not rounded, on a GPU",
        DEVICE,
        "    Convert<S, N>::widen(Convert<S, N>::narrow(w), w);\n",
        "",
        EMULATED,
    ),
    Mutant("a shift of half, in Triton", B + "triton_kernels.py", "weighted(gap, rate)", "gap", TRITON),
    Mutant(
        "maximised groups get the gap of others",
        P + "rules.py",
        "lr if maximizes else -lr for lr,",
        "-lr for lr,",
        GOLDEN,
    ),
    Mutant(
        "momentum of a maximised group is turned",
        P + "rules.py",
        "plan.momentum or maximizes for",
        "plan.momentum != maximizes for",
        GOLDEN,
    ),
    Mutant(
        "Momentum-SAM returns after each micro-batch",
        P + "step.py",
        "self.perturbed and (last or self.plan.climbs)",
        "self.perturbed",
        GOLDEN,
    ),
    Mutant(
        "frozen parameters follow their momentum",
        P + "flat.py",
        "[m if p.requires_grad else self.absent for m, p",
        "[m for m, p",
        "tests/test_methods.py -k 'frozen_stays and cpu'",
    ),
    Mutant(
        "Momentum-SAM masks by gradients it has not",
        P + "methods.py",
        "isinstance(part, SparseSAM) and part.update_every is not None",
        "False",
        "tests/test_methods.py -k 'masks_of_others and cpu'",
    ),
    Mutant(
        "what is left out is perturbed",
        P + "store.py",
        "        tensors[i] = flat.absent\n",
        "        pass\n",
        "tests/test_methods.py -k 'chosen and cpu'",
    ),
    Mutant(
        "what is left out is saved",
        P + "store.py",
        "kind = p.device, p.dtype, only is None or p in only",
        "kind = p.device, p.dtype, True",
        "tests/test_methods.py -k 'neither_read and cpu'",
    ),
    Mutant(
        "stats of what was perturbed before",
        P + "step.py",
        "self.store.achieved(self.latest.only, len(norms_sq))",
        "self.store.achieved(None, len(norms_sq))",
        "tests/test_methods.py -k 'statistics_of_its_own and cpu'",
    ),
    Mutant(
        "only is lost in sums",
        P + "methods.py",
        "only = chosen[0] if chosen else None",
        "only = None",
        "tests/test_methods.py -k one_choice",
    ),
    # -- step and store
    Mutant(
        "micro-batches weigh the same",
        P + "batches.py",
        "[size / samples for size in sizes]",
        "[1 / len(sizes) for size in sizes]",
        "tests/test_golden.py tests/test_optimizer.py -k cpu",
    ),
    Mutant(
        "the tail is dropped",
        P + "batches.py",
        "[min(self.size, samples - start) for start in range(0, samples, self.size)]",
        "[self.size for start in range(0, samples - self.size + 1, self.size)]",
        "tests/test_golden.py tests/test_optimizer.py -k cpu",
    ),
    Mutant(
        "a wrong share of the first micro-batch",
        P + "step.py",
        "self.shares[0] if i == 1 else 1.0",
        "self.shares[0] if i == 2 else 1.0",
        GOLDEN,
    ),
    Mutant(
        "the share of v is lost",
        P + "step.py",
        "coefficient.row(self.shares[i] if len(self.shares) > 1 else 1.0)",
        "coefficient.row(1.0)",
        GOLDEN,
    ),
    Mutant(
        "v begins anew in every micro-batch",
        P + "step.py",
        "if self.adds_to_v or not begins:",
        "if self.adds_to_v:",
        GOLDEN,
    ),
    Mutant(
        "v is never begun anew",
        P + "step.py",
        "if self.adds_to_v or not begins:",
        "if True:",
        "tests/test_optimizer.py -k 'cpu and LookSAM'",
    ),
    Mutant(
        "a forgotten restore",
        P + "step.py",
        "                self.store.restore()\n                self.broken = False",
        "                self.broken = False",
        "tests/test_restore.py -m 'not slow'",
    ),
    Mutant(
        "gradients of before are not given back",
        P + "step.py",
        "        if step is not None:\n            step.give_back_grads(values=ran)",
        "        if step is not None:",
        "tests/test_restore.py -m 'not slow'",
    ),
    Mutant(
        "the EMA moves in the first of two perturbations",
        P + "store.py",
        "renew = plan.opposite is None",
        "renew = True",
        "tests/test_methods.py tests/test_golden.py -k cpu",
    ),
    Mutant("the EMA never moves", P + "store.py", "if renew and plan.lmbda is not None:", "if False:", GOLDEN),
    Mutant(
        "the norm of one flat only",
        P + "store.py",
        "return torch.cat([moved(t, self.device) for _, t in parts], -1)",
        "return parts[0][1]",
        "tests/test_optimizer.py tests/test_methods.py -k cpu",
    ),
    Mutant("the mask is lost", P + "store.py", 'options["mask"] = flat.mask', "pass", GOLDEN),
    Mutant(
        "shared gradients are written to",
        P + "gradients.py",
        "    if not copied:\n        return grads",
        "    return grads",
        "tests/test_optimizer.py tests/test_conventions.py -k cpu",
    ),
    Mutant(
        "gradients that overlap partly are written to",
        P + "gradients.py",
        "copied = without_own_memory(grads, whole)",
        "copied = [i for i in without_own_memory(grads, whole) if whole]",
        "tests/test_optimizer.py -k 'cpu and lie_in_memory'",
    ),
    Mutant(
        "a lazily negated gradient is taken as it is",
        P + "gradients.py",
        " and not _torch.is_lazy(g)",
        "",
        "tests/test_optimizer.py -k 'cpu and lie_in_memory'",
    ),
    Mutant(
        "what torch cannot write to is written to",
        P + "step.py",
        "if not is_writable(old):",
        "if False:",
        "tests/test_optimizer.py -k 'cpu and can_be_written_to'",
    ),
    Mutant(
        "gradients of several flats share memory",
        P + "store.py",
        "lists = own_memory_of_lists(lists, whole=False)",
        "pass",
        "tests/test_optimizer.py tests/test_methods.py -k cpu",
    ),
    Mutant(
        "held gradients are not the step's own",
        P + "step.py",
        "Vectors([own_memory(tensors) for tensors in grads.lists], grads.absent)",
        "grads",
        "tests/test_conventions.py tests/test_methods.py -k cpu",
    ),
    Mutant(
        "re-pointed parameters are not noticed",
        P + "step.py",
        "if have_grads is None:",
        "if False:",
        "tests/test_flatten.py",
    ),
    Mutant(
        "buffers are not remembered",
        P + "buffers.py",
        "if self.model is None:",
        "if True:",
        "tests/test_batchnorm.py",
    ),
    Mutant(
        "buffers that were replaced stay so",
        P + "buffers.py",
        "if name not in table or table[name] is not t:",
        "if False:",
        "tests/test_batchnorm.py",
    ),
    Mutant(
        "buffers that were pointed elsewhere stay there",
        P + "buffers.py",
        "t.data = data",
        "pass",
        "tests/test_batchnorm.py",
    ),
    Mutant(
        "every buffer counts as changed",
        P + "buffers.py",
        "if v != old])",
        "])",
        "tests/test_batchnorm.py",
    ),
    Mutant(
        "no buffer counts as changed",
        P + "buffers.py",
        "if versions != now.versions:",
        "if False:",
        "tests/test_batchnorm.py",
    ),
    Mutant(
        "passes share their containers",
        P + "step.py",
        "yield part if renewed is None else renewed(part)",
        "yield part",
        "tests/test_optimizer.py",
    ),
    Mutant(
        "what passes() returns keeps the loop",
        P + "optimizer.py",
        "self._turns = None\n",
        "pass\n",
        "tests/test_restore.py",
    ),
    Mutant(
        "the drop-in takes old gradients for new",
        P + "compat.py",
        "if not self._has_gradients_of_this_step():",
        "if False:",
        "tests/test_compat.py",
    ),
    Mutant(
        "steps are not counted",
        P + "step.py",
        "            self.steps += 1",
        "            pass",
        "tests/test_schedules.py",
    ),
    Mutant(
        "a stale table of radii",
        P + "rules.py",
        'if plan is self._plan and not self._radii.schedules and self._noted["radii"].stands():',
        "if plan is self._plan and not self._radii.schedules:",
        "tests/test_conventions.py tests/test_schedules.py",
    ),
    Mutant(
        "opposite without its sign",
        P + "rules.py",
        "[-float(rho_min) if rho else 0.0 for rho in radii]",
        "[float(rho_min) if rho else 0.0 for rho in radii]",
        GOLDEN,
    ),
    Mutant(
        "a budget that is divided by nothing",
        "csrc/update_math.h",
        "most = radius[1] / norm;",
        "most = radius[1];",
        "tests/test_cuda_emulated.py -k budget",
    ),
    Mutant(
        "a budget whose table goes stale",
        P + "rules.py",
        " or callable(plan.budget):\n            self._noted",
        ":\n            self._noted",
        "tests/test_schedules.py -k budget",
    ),
    Mutant(
        "a budget for the other side too",
        P + "rules.py",
        '("opposite", opposite, math.inf)',
        '("opposite", opposite, float(budget))',
        "tests/test_methods.py -k 'Bilateral and LE'",
    ),
    Mutant(
        "the exact weights of a sweep are the model's",
        P + "flatness.py",
        "p.detach().to(torch.float64, copy=True)",
        "p.detach().to(torch.float64)",
        "tests/test_flatness.py -k 'sweep or worth or arrives'",
    ),
    Mutant(
        "every rho of a sweep moves the mean gradient",
        P + "flatness.py",
        "                for recall in recalls:\n                    recall()\n",
        "",
        "tests/test_flatness.py -k 'sweep or worth or arrives'",
    ),
    Mutant(
        "a sweep whose mean gradient never moves",
        P + "flatness.py",
        "last = r + 1 == len(values)",
        "last = False",
        "tests/test_flatness.py -k 'sweep or worth or arrives'",
    ),
    Mutant(
        "memories that a sweep made stay filled",
        P + "store.py",
        "memory.buffer.fill_(memory.begin)",
        "None",
        "tests/test_flatness.py -k 'sweep or worth or arrives'",
    ),
    Mutant(
        "batches of a sweep count by their number of micro-batches",
        P + "flatness.py",
        "[share / len(batches) for share in shares]",
        "[1 / len(batches) / len(shares) for share in shares]",
        "tests/test_flatness.py -k 'sweep or worth or arrives'",
    ),
    Mutant(
        "what arrives is measured against itself",
        P + "flatness.py",
        "dot / e_sq, moved",
        "dot / a_sq, moved",
        "tests/test_flatness.py -k 'sweep or worth or arrives'",
    ),
    Mutant(
        "what does not arrive is worth trying",
        P + "flatness.py",
        "(share <= most) & (self.along @ self.shares >= along)",
        "(share <= most)",
        "tests/test_flatness.py -k 'sweep or worth or arrives'",
    ),
    Mutant(
        "nesterov in the place of maximize",
        P + "rules.py",
        "itemgetter(*reference.SGD_COLUMNS)",
        "itemgetter(*sorted(reference.SGD_COLUMNS))",
        "tests/test_optimizer.py -k cpu",
    ),
    Mutant(
        "AdamW decays like Adam",
        P + "rules.py",
        "return _adam_settings(group, True)",
        "return _adam_settings(group, False)",
        "tests/test_optimizer.py -k cpu",
    ),
    Mutant(
        "what is maximised is perturbed uphill",
        P + "rules.py",
        "-r if turn and r else r",
        "r",
        GOLDEN,
    ),
    Mutant(
        "settings are read once",
        P + "rules.py",
        "if len(before) == 1 and not after and noted.stands():",
        "if self._rule is not None:",
        "tests/test_optimizer.py -k within_a_step",
    ),
    Mutant(
        "a hook that came later is not seen",
        P + "rules.py",
        "if len(before) == 1 and not after and noted.stands():",
        "if noted.stands():",
        "tests/test_conventions.py",
    ),
    Mutant(
        "a tensor is held to be constant",
        P + "rules.py",
        "return x is None or type(x) in",
        "return True or type(x) in",
        "tests/test_conventions.py tests/test_schedules.py",
    ),
    Mutant(
        "groups that were exchanged are not seen",
        "csrc/parameters.cpp",
        "    if (entry != PyList_GET_ITEM(entries.ptr(), i)) return false;",
        "    if (is_dict && entry != PyList_GET_ITEM(entries.ptr(), i)) return false;",
        "tests/test_conventions.py tests/test_schedules.py tests/test_checkpoint.py",
        PARAMETERS,
    ),
    *(
        Mutant(name, "csrc/module.cpp", before, after, CALLS, ("module",))
        for name, before, after in (
            ("an argument is given twice", "      TORCH_CHECK_TYPE(!slots[i], ", "      TORCH_CHECK_TYPE(true, "),
            (
                "an unknown argument is another one",
                "if (PyUnicode_Compare(names_[i], name) == 0) return i;",
                "return i;",
            ),
            (
                "a missing argument is its default",
                "slots[i] = default_[i];",
                "slots[i] = default_[i] ? default_[i] : Py_None;",
            ),
            (
                "a number is of any type",
                "CHECK_TYPE(Argument::is(o), ",
                "CHECK_TYPE((std::is_same_v<T, double>) || Argument::is(o), ",
            ),
            ("numbers alone are not looked at", "if (!Argument<double>::is(PyList_GET_ITEM(o, i)))", "if (false)"),
            (
                "there is room for any number of arguments",
                "size_t(count) <= positional_",
                "size_t(count) <= kArguments",
            ),
        )
    ),
    Mutant("a patched step is not called", P + "rules.py", "or _is_listened_to(base)", "", "tests/test_conventions.py"),
    # -- what would train something else than the method
    Mutant(
        "a plain step is not told",
        P + "step.py",
        "if not self.has_mean:\n            self.check_plain()\n        self.up",
        "self.up",
        MISTAKES,
    ),
    Mutant(
        "a loop counts for ever",
        P + "step.py",
        "self.unreduced = self.has_mean = False\n        self.store",
        "self.unreduced = False\n        self.store",
        MISTAKES,
    ),
    Mutant(
        "cleared gradients are those of a loop",
        P + "step.py",
        "            self.unreduced = self.has_mean = False\n",
        "",
        MISTAKES,
    ),
    Mutant("a mistake is told every time", P + "mistakes.py", "self._said.add(kind)", "pass", MISTAKES),
    Mutant(
        "a plain step is told where rho is 0",
        P + "step.py",
        'and any(group.get("rho") for group in self.base.param_groups)',
        "",
        MISTAKES,
    ),
    Mutant("a step of the base is not counted", P + "rules.py", "if not self.ours:", "if False:", MISTAKES),
    Mutant(
        "a step of the base that asks for state is counted",
        P + "step.py",
        "if self._is_asked_for_state():\n            return\n",
        "pass\n",
        MISTAKES,
    ),
    Mutant(
        "a closure may drop gradients for nothing",
        P + "step.py",
        "if self.clear and self.had_gradients and not self.accumulates:",
        "if False:",
        MISTAKES,
    ),
    Mutant("our steps of the base count twice", P + "step.py", "hook.ours = True", "hook.ours = False", MISTAKES),
    Mutant(
        "the hook on the base stops the fused update", P + "rules.py", "type(hook) is not StepHook", "True", MISTAKES
    ),
    Mutant(
        "a pass without a gradient is none",
        P + "step.py",
        "            self._check_any(vectors[0])\n        products",
        "            pass\n        products",
        MISTAKES,
    ),
    Mutant(
        "dropped gradients are not told",
        P + "step.py",
        "if step.had_gradients and not self.left and not isinstance(closures, MicroBatches):",
        "if False:",
        MISTAKES,
    ),
    Mutant("a closure after a loop may run backward", P + "step.py", "itertools.islice(trained, 1)", "()", MISTAKES),
    Mutant(
        "a split mapping loses its class",
        P + "batches.py",
        "if not isinstance(mapping, MutableMapping):",
        "if True:",
        MISTAKES,
    ),
    Mutant(
        "a wrapper in a wrapper is not opened",
        P + "optimizer.py",
        "inner = next((v for name",
        "inner = found and next((v for name",
        MISTAKES,
    ),
    Mutant(
        "a part divides by the items of all parts",
        P + "integrations/transformers.py",
        "num_items_in_batch * share",
        "num_items_in_batch",
        "tests/test_frameworks.py -k count_the_items",
    ),
    Mutant(
        "later passes log",
        P + "integrations/lightning.py",
        "log=_no_log, log_dict=_no_log",
        "",
        FRAMEWORK,
    ),
    Mutant(
        "later passes are not divided by the accumulation",
        P + "integrations/lightning.py",
        "loss = loss / trainer.accumulate_grad_batches",
        "pass",
        FRAMEWORK,
    ),
    Mutant(
        "later passes get what the first one left of the batch",
        P + "integrations/lightning.py",
        "(rebuilt(batch), batch_idx)",
        "(batch, batch_idx)",
        FRAMEWORK,
    ),
    Mutant(
        "a rank does not save the mean gradient of its own passes",
        P + "integrations/transformers.py",
        "if not args.save_only_model and not state.is_hyper_param_search and _keeps_own(args, opt):",
        "if False:",
        ON_RANKS,
    ),
    Mutant(
        "a rank does not load the mean gradient of its own passes",
        P + "integrations/transformers.py",
        '            if (own.get("world_size"), own.get("steps")) == (self.args.world_size, opt.steps):',
        "            if False:",
        ON_RANKS,
    ),
    Mutant(
        "every rank's perturbation is that of all",
        P + "integrations/transformers.py",
        'ascent = self._sam.get("ascent", "global")',
        'ascent = "global"',
        ON_RANKS,
    ),
    Mutant(
        "the Trainer does not say what it trains",
        P + "integrations/transformers.py",
        "        if opt.model is not model:",
        "        if False:",
        "tests/test_frameworks.py -k give_the_optimizer_the_model",
    ),
    Mutant(
        "the mixin may stand behind the Trainer",
        P + "integrations/transformers.py",
        "        if before and not behind:",
        "        if False:",
        "tests/test_frameworks.py -k behind_the_trainer",
    ),
    Mutant(
        "the mixin takes a class beside the Trainer for one",
        P + "integrations/transformers.py",
        "        if before and not behind:",
        "        if before:",
        "tests/test_frameworks.py -k behind_the_trainer",
    ),
    Mutant(
        "a framework's wrapper is taken as a base optimizer",
        P + "rules.py",
        "    try:\n        step_hooks(base)\n    except AttributeError:",
        "    if False:",
        "tests/test_errors.py -k wrong_base",
    ),
    Mutant(
        "the drop-in says of two first steps that a loop has not ended",
        P + "compat.py",
        "        if engine.step is not None and engine.step.perturbed:",
        "        if False:",
        "tests/test_mistakes.py -k half_done",
    ),
    Mutant(
        "the Trainer's scale stays in what the method remembers",
        P + "integrations/transformers.py",
        "scaler=self.accelerator.scaler",
        "scaler=None",
        "tests/test_frameworks.py -k 'transformers and fp16'",
    ),
    Mutant(
        "the Trainer saves what a skipped step has moved",
        P + "integrations/transformers.py",
        "        find(optimizer).zero_grad()\n",
        "        pass\n",
        "tests/test_frameworks.py -k no_trace",
    ),
    Mutant(
        "the Trainer wraps the optimizer again in another training",
        P + "integrations/transformers.py",
        "            there = find(base)",
        "            pass",
        "tests/test_frameworks.py -k 'train_again'",
    ),
    Mutant(
        "Lightning's scale stays in what the method remembers",
        P + "integrations/lightning.py",
        "passes(scaler=_scaler(trainer))",
        "passes()",
        "tests/test_frameworks.py -k 'lightning and fp16 and automatic'",
    ),
    Mutant(
        "Lightning shows what a skipped step has moved",
        P + "integrations/lightning.py",
        "            opt.zero_grad()  # as",
        "            pass  # as",
        "tests/test_frameworks.py -k no_trace",
    ),
    Mutant(
        "Lightning's functions stay replaced where a loop does not close",
        P + "integrations/lightning.py",
        """        with self._undo.pop_all():
            if turns is not None:
                turns.close()
""",
        """        if turns is not None:
            turns.close()
        self._undo.close()
""",
        "tests/test_frameworks.py -k training_that_fails",
    ),
    Mutant(
        "a function that was replaced already is gone",
        P + "integrations/lightning.py",
        "        vars(holder).update(own)\n",
        "",
        "tests/test_frameworks.py -k training_that_fails",
    ),
    Mutant(
        "a training with Lightning goes on with what the one before left",
        P + "integrations/lightning.py",
        "        self._leave()  # a training whose",
        "        pass  # a training whose",
        "tests/test_frameworks.py -k training_that_fails",
    ),
    Mutant(
        "DDP reduces Lightning's pass at w",
        P + "integrations/lightning.py",
        "        ranks.hold_back()",
        "        pass",
        ON_RANKS,
    ),
    Mutant(
        "passes of a wrapper forget the scaler",
        P + "optimizer.py",
        "find(optimizer).passes(*batch, scaler=scaler)",
        "find(optimizer).passes(*batch)",
        "tests/test_frameworks.py -k 'accelerate and fp16'",
    ),
    Mutant(
        "a model is exchanged in the middle of a loop",
        P + "optimizer.py",
        '        self.engine.check_idle("another model")',
        "        pass",
        SCENARIOS,
    ),
    Mutant(
        "an ascent is exchanged in the middle of a loop",
        P + "optimizer.py",
        '        self.engine.check_idle("another ascent")',
        "        pass",
        SCENARIOS,
    ),
    Mutant(
        "an ascent that is set is not looked at",
        P + "optimizer.py",
        "        ranks = Ranks(ascent, self.model)\n        ranks.check()",
        "        ranks = Ranks(ascent, self.model)",
        SCENARIOS,
    ),
    # -- flat and checkpoint
    Mutant(
        "what lies among other things moves",
        P + "flat.py",
        "0 < p.nbytes < p.untyped_storage().nbytes()",
        "False",
        "tests/test_holders.py",
    ),
    Mutant(
        "what waits on ranks of what they remember is not told",
        P + "store.py",
        "sum(len(memory.flat.waiting) for memory in memories)",
        "0",
        "tests/test_waiting.py -k alike",
    ),
    Mutant(
        "a mask stays where one has ceased to wait",
        P + "flat.py",
        "self.mask = self._moved_mask(self.mask, old, self.offsets)",
        "pass",
        "tests/test_waiting.py -k mask_follows",
    ),
    Mutant(
        "masks of several flats change one after the other",
        P + "masks.py",
        "    chosen_masks = [flat.mask_as_now(new[id(flat)]) for flat in flats]\n",
        "    chosen_masks = (flat.mask_as_now(new[id(flat)]) for flat in flats)\n",
        "tests/test_masks.py -k all_at_once",
    ),
    Mutant(
        "what moves in inference mode stays of that mode",
        P + "flat.py",
        "    @torch.inference_mode(False)\n    @torch.no_grad()\n    def wait_for(",
        "    @torch.no_grad()\n    def wait_for(",
        "tests/test_waiting.py -k inference",
    ),
    Mutant(
        "what a method begins to remember in inference mode stays of that mode",
        P + "flat.py",
        "    @torch.inference_mode(False)  # what is made in that mode could not be written to outside of it\n",
        "",
        "tests/test_compat.py -k inference",
    ),
    Mutant(
        "what waits is shown as one number in many places",
        P + "checkpoint.py",
        "if short else entry",
        "if False else entry",
        "tests/test_waiting.py -k in_place",
    ),
    Mutant(
        "a container is taken for another one that is gone",
        P + "batches.py",
        "known[id(old)] = old, container",
        "known[id(old)] = None, container",
        "tests/test_optimizer.py -k as_it_came",
    ),
    Mutant(
        "a mask is chosen where parameters lie, and not where they would if none waited",
        P + "masks.py",
        "offsets = flat.offsets_of_all",
        "offsets = flat.offsets",
        "tests/test_waiting.py -k costs_nothing",
    ),
    Mutant(
        "a skipped step's mask comes back as it lay before one ceased to wait",
        P + "units.py",
        "(flat, flat.mask_of_all)",
        "(flat, flat.mask)",
        "tests/test_waiting.py -k scaler",
    ),
    Mutant(
        "the mask of before is shown after another was loaded in its place",
        P + "checkpoint.py",
        "flat.shown[0] is not flat.mask or flat.shown[1] != version",
        "flat.shown[1] != version",
        "tests/test_masks.py -k loaded_last",
    ),
    Mutant(
        "an entry of the state that is only ours counts as one of the base optimizer's",
        P + "store.py",
        "theirs_in(state.get(flat.params[i]))",
        "state.get(flat.params[i])",
        "tests/test_waiting.py -k looks_at",
    ),
    Mutant(
        "what is shown of one that waits is still the old memory",
        P + "store.py",
        "entry[OURS + name] = shown(part, p)",
        "entry[OURS + name] = entry[OURS + name] if i in waiting else shown(part, p)",
        "tests/test_waiting.py -k looks_at",
    ),
    Mutant(
        "the base optimizer's state begins anew where one has ceased to wait",
        P + "flat.py",
        "i >= 0 and i not in waiting:",
        "False:",
        "tests/test_waiting.py -k scaler",
    ),
    Mutant(
        "masters of plain SGD are no reason not to wait",
        P + "store.py",
        " and not flat.remembers(i)}",
        "}",
        "tests/test_waiting.py -k 16_bits",
    ),
    Mutant(
        "what is loaded hides weights that somebody exchanged",
        P + "checkpoint.py",
        "        engine.follow()\n",
        "",
        "tests/test_waiting.py -k keeps_no_parameter",
    ),
    Mutant(
        "nobody waits for a first gradient",
        P + "flat.py",
        "sorted(self.order, key=lambda i: i in waiting)",
        "self.order",
        "tests/test_waiting.py -k costs_nothing",
    ),
    Mutant(
        "a first gradient that comes late is not seen",
        P + "store.py",
        "        if self._waits:\n",
        "        if False:\n",
        "tests/test_waiting.py -k costs_nothing",
    ),
    Mutant(
        "weights that were perturbed when one ceased to wait are not known to be",
        P + "flat.py",
        " = status[stay[rows]]",
        " = 0",
        "tests/test_waiting.py -k costs_nothing",
    ),
    Mutant(
        "what was saved does not follow when one ceases to wait",
        P + "flat.py",
        "self.moved(self.saved, old, waited)",
        "self.new_buffer(self.saved.dtype)",
        "tests/test_waiting.py -k costs_nothing",
    ),
    Mutant(
        "what was loaded for one that waits is lost",
        P + "checkpoint.py",
        "if any(_holds(own, name, at) for name in _TENSORS)",
        "if False",
        "tests/test_waiting.py -k resumes",
    ),
    Mutant(
        "ranks that wait send something",
        P + "ranks.py",
        "lists[f][i].zero_()",
        "lists[f][i].fill_(1.0)",
        "tests/test_waiting.py -k alike",
    ),
    Mutant(
        "a step that is skipped leaves something of one that has ceased to wait",
        P + "flat.py",
        "fill = 0.0 if held.started else self.begin",
        "fill = 0.5",
        "tests/test_waiting.py -k scaler",
    ),
    Mutant(
        "a parameter off by one row",
        P + "flat.py",
        "for begin in range(0, self._shapes[i].numel(), length)",
        "for begin in range(0, self._shapes[i].numel() - 1, length)",
        "tests/test_golden.py tests/test_flatten.py -k cpu",
    ),
    Mutant(
        "off by one at chunk borders",
        P + "flat.py",
        "min(length, self._shapes[i].numel() - begin)",
        "min(length - 1, self._shapes[i].numel() - begin)",
        "tests/test_optimizer.py -k 'several_rows'",
    ),
    Mutant(
        "lost momentum",
        P + "flat.py",
        'memory.copy_(old if name == "step" else values(old, p))\n                        loaded.append(i)',
        "loaded.append(i)",
        "tests/test_resume.py",
    ),
    Mutant(
        "a loaded momentum begins anew",
        P + "flat.py",
        "step[torch.tensor(loaded, dtype=torch.int64, device=self.device)] = 1",
        "pass",
        "tests/test_resume.py",
    ),
    Mutant(
        "exchanged state is overwritten",
        P + "store.py",
        "entry[name] = t.clone()",
        "pass",
        "tests/test_resume.py -k exchanged",
    ),
    Mutant(
        "state in new memory is not noticed",
        P + "flat.py",
        "self.names, self.views, self._layout)",
        "self.names, self.views)",
        "tests/test_resume.py -k by_hand",
    ),
    Mutant(
        "what is unfrozen is not noticed",
        P + "gradients.py",
        "return p.requires_grad or p.grad is not None",
        "return p.grad is not None",
        "tests/test_frozen.py",
    ),
    Mutant(
        "memory that somebody took is overwritten",
        P + "flat.py",
        "elif all(self._places[i].expired() for i in moved):",
        "elif True:",
        "tests/test_flatten.py",
    ),
    Mutant(
        "memory order is not followed",
        P + "flat.py",
        "buffer.as_strided(p.size(), p.stride(), offset).copy_(values)",
        "pass",
        "tests/test_flatten.py",
    ),
    Mutant(
        "parameters that overlap are taken",
        P + "flat.py",
        "if first < end:",
        "if False:",
        "tests/test_errors.py",
    ),
    Mutant(
        "a saved EMA is not loaded",
        P + "checkpoint.py",
        "memory.parts[i].copy_(values(t, flat.params[i]))",
        "pass",
        "tests/test_resume.py",
    ),
    Mutant(
        "v is not measured when it is loaded",
        P + "checkpoint.py",
        "memory.measure()",
        "pass",
        "tests/test_resume.py tests/test_old_files.py",
    ),
    Mutant(
        "shapes of a state dict are not looked at",
        P + "checkpoint.py",
        "if value.shape != shape:",
        "if False:",
        "tests/test_errors.py",
    ),
    Mutant(
        "a mask bit",
        P + "flat.py",
        "return (mask[:, None] & places != 0).view(-1)",
        "return (mask[:, None] & places > 1).view(-1)",
        "tests/test_masks.py -m 'not slow'",
    ),
    Mutant(
        "one element too many in a mask",
        P + "masks.py",
        "count = round((1 - sparse.sparsity) * whole)",
        "count = round((1 - sparse.sparsity) * whole) + 1",
        "tests/test_masks.py -m 'not slow'",
    ),
    Mutant(
        "a dynamic mask drops nothing",
        P + "masks.py",
        "dropped = min(round(sparse.share_dropped(step) * count), whole - count)",
        "dropped = 0",
        "tests/test_masks.py -m 'not slow'",
    ),
    Mutant(
        "a graph of stale addresses",
        P + "capture.py",
        "return kept and self._current_addresses() == graph.addresses",
        "return kept",
        "tests/test_graphs.py",
    ),
    Mutant(
        "autocast's casts outlive a replay",
        P + "capture.py",
        "    forget_casts()  # of the weights as they were",
        "    pass",
        "tests/test_graphs.py",
    ),
    Mutant(
        "autocast's casts get into a graph",
        P + "capture.py",
        "        forget_casts()  # autocast's were made outside, once and for all",
        "        pass",
        "tests/test_graphs.py",
    ),
    Mutant(
        "gradients outlive a replay",
        P + "capture.py",
        "    graph.replay()\n    engine.store.set_grads(None)",
        "    graph.replay()",
        "tests/test_graphs.py",
    ),
    Mutant(
        "one graph for all shapes", P + "capture.py", "kind = shapes, plan", "kind = (), plan", "tests/test_graphs.py"
    ),
    Mutant(
        "a capture that failed counts as v's",
        P + "capture.py",
        "engine.v_step, engine.norms_sq = v_step, norms_sq",
        "engine.norms_sq = norms_sq",
        "tests/test_graphs.py",
    ),
    Mutant(
        "a replay does not say what it found",
        P + "capture.py",
        "self._between.found_infs = graph.found_infs",
        "pass",
        "tests/test_graphs.py",
    ),
    Mutant(
        "buffers are written in a capture that failed",
        P + "step.py",
        "self.buffers.thaw(values=ran)",
        "self.buffers.thaw()",
        "tests/test_graphs.py",
    ),
    Mutant(
        "gradients are written in a capture that failed",
        P + "step.py",
        "step.give_back_grads(values=ran)",
        "step.give_back_grads(values=True)",
        "tests/test_graphs.py",
    ),
    # -- loss scales
    Mutant(
        "a direction that has not begun is NaN",
        P + "units.py",
        "                held.buffer.zero_()",
        "                pass",
        "tests/test_amp.py -k first_direction",
    ),
    Mutant(
        "a skipped loop's memories stay moved",
        P + "units.py",
        "            memory.put_back(held)",
        "            pass",
        "tests/test_amp.py -k 'overflow and passes and (F-SAM or Look)'",
    ),
    Mutant(
        "a skipped whole step's memories stay moved",
        P + "units.py",
        "moved(found_inf, flat.device) != 0",
        "moved(found_inf, flat.device) > 1",
        "tests/test_amp.py -k 'overflow and train_step'",
    ),
    Mutant(
        "a skipped step's mask stays chosen",
        P + "step.py",
        "self.mask_step = self.undo.mask_step",
        "pass",
        "tests/test_amp.py -k 'overflow and passes and Sparse'",
    ),
    Mutant(
        "a mean in units of the scale of before",
        P + "units.py",
        'self._store.multiply("ema", to / self._of_means)',
        "pass",
        "tests/test_amp.py -k 'F-SAM or VaSSO'",
    ),
    Mutant(
        "a mean stays in units of the loss for the rest of a step in which somebody looked",
        P + "units.py",
        "            self.bring_means_to(None)\n            self._brought = False",
        "            self.bring_means_to(None)",
        "tests/test_amp.py -k look_at_any_time",
    ),
    Mutant(
        "the values of before a skipped loop in the units of whoever looked",
        P + "units.py",
        "            self._units.bring_means_to(self._scale)",
        "            pass",
        "tests/test_amp.py -k look_at_any_time",
    ),
    Mutant(
        "the values of before a skipped whole step in the units of whoever looked",
        P + "units.py",
        "            self._units.bring_means()",
        "            pass",
        "tests/test_amp.py -k look_inside",
    ),
    Mutant(
        "what a loop of a step has changed is undone where the model is converted",
        P + "step.py",
        "                self.undo = None\n            self.skipped()",
        "                pass\n            self.skipped()",
        "tests/test_amp.py -k converted",
    ),
    Mutant(
        "a skipped loop's random numbers count",
        P + "step.py",
        "        self.store.drawn = 0\n        if self.undo is not None:",
        "        if self.undo is not None:",
        "tests/test_amp.py -k rounds_alike",
    ),
    Mutant(
        "gradients that are cleared in a loop leave what an earlier one moved",
        P + "step.py",
        "        if not self._has_looked:\n            self.engine.skipped()",
        "        if False:\n            self.engine.skipped()",
        "tests/test_amp.py -k rounds_alike",
    ),
    Mutant(
        "a captured step keeps what a loop moved whose gradients it drops",
        P + "capture.py",
        "        engine.skipped()  # gradients of before take no part",
        "        pass",
        "tests/test_graphs.py -k forgets_a_loop",
    ),
    Mutant(
        "stages of a pipeline clip and skip by themselves",
        P + "between.py",
        "if self._engine.store.has_ranks else",
        "if self._engine.store.is_sharded else",
        "tests/test_sharded.py -k clip_and_skip",
    ),
    Mutant(
        "numbers that wait are measured anew in every step",
        P + "precision.py",
        "if self.is_over or self._copied is not None:",
        "if self.is_over:",
        "tests/test_precision.py -k watch_on_a_gpu",
    ),
    Mutant(
        "stages of a pipeline watch what arrives",
        P + "step.py",
        "not all_arrives and self.store.process_group is None",
        "not all_arrives",
        "tests/test_sharded.py -k all_ranks_are_warned",
    ),
    Mutant(
        "no rank of shards watches what arrives",
        P + "step.py",
        "not all_arrives and self.store.process_group is None",
        "not all_arrives and not self.store.has_ranks",
        "tests/test_sharded.py -k all_ranks_are_warned",
    ),
    Mutant(
        "of several ranks some measure what arrives",
        P + "precision.py",
        "            self._event.synchronize()\n",
        "            pass\n",
        "tests/test_precision.py -k watch_on_a_gpu",
    ),
    Mutant(
        "every shard draws the same numbers",
        P + "flat.py",
        "(number[id(p)], first_draw(p))",
        "(number[id(p)], 0)",
        SHARDED + "'FSDP2 and 16 or equal_shards'",
    ),
    Mutant(
        "shards that are no runs draw the same numbers",
        P + "sharded.py",
        "    return number * math.prod(shape)\n",
        "    return 0\n",
        SHARDED + "'no_runs or equal_shards'",
    ),
    Mutant(
        "shards that are no runs draw each other's numbers",
        P + "sharded.py",
        "        shape[placement.dim] = -(-shape[placement.dim] // n)\n",
        "        shape[placement.dim] = shape[placement.dim] // n\n",
        SHARDED + "no_runs",
    ),
    Mutant(
        "columns are taken for a run",
        P + "sharded.py",
        "        if math.prod(shape[:dim]) == 1:\n",
        "        if True:\n",
        SHARDED + "no_runs",
    ),
    Mutant(
        "every other part is taken for a run",
        P + "sharded.py",
        'and not any(hasattr(cut[2], "split_factor") for cut in cuts):',
        "and cuts:",
        SHARDED + "no_runs",
    ),
    Mutant(
        "replicas are rounded by seeds of their own",
        P + "sharded.py",
        "numbers if is_first else torch.zeros_like(numbers)",
        "numbers",
        SHARDED + "equal_shards",
    ),
    Mutant(
        "stages of a pipeline share a seed",
        P + "sharded.py",
        "torch.zeros_like(numbers), self._of_mesh)",
        "torch.zeros_like(numbers), self._groups)",
        SHARDED + "equal_shards",
    ),
    Mutant(
        "half of a seed is shared",
        P + "store.py",
        "return int(high) << 32 | int(low)",
        "return int(low)",
        SHARDED + "equal_shards",
    ),
    Mutant(
        "the seed is sent in every step",
        P + "step.py",
        "self.store.shared_seed(self.store.seed), True",
        "self.store.shared_seed(self.store.seed), False",
        SHARDED + "all_ranks_are_warned",
    ),
    Mutant(
        "masters: whole ones are taken for shards",
        P + "checkpoint.py",
        "flat.set_master(i, None if master is None else values(master, flat.params[i]))",
        "flat.set_master(i, master)",
        SHARDED + "masters_go",
    ),
    Mutant(
        "masters: state that torch's checkpoints ask for has 16 bits",
        P + "checkpoint.py",
        "entry[name] = entry[name].to(flat.dtype_kept)\n",
        "pass\n",
        "tests/test_masters.py -k distributed_checkpoints",
    ),
    Mutant(
        "a mean is shown in units of the scale",
        P + "checkpoint.py",
        "        return left\n    engine.units.bring_back()\n",
        "        return left\n",
        "tests/test_amp.py -k without_the_scale",
    ),
    Mutant(
        "a loop that adds to another forgets what that moved",
        P + "step.py",
        "        if not had_gradients:\n            self.skipped()",
        "        self.skipped()",
        "tests/test_amp.py -k accumulated",
    ),
    Mutant(
        "a scaler does not see an overflow in WSAM's last pass",
        P + "step.py",
        "return torch.cat([norm_sq, self.store.gram([latest], stack).sum(-1)], -1)",
        "return norm_sq",
        "tests/test_amp.py -k 'overflow and WSAM'",
    ),
    Mutant(
        "WSAM's own step is scaled",
        P + "step.py",
        "self.method.full.after, self.tables, scale)",
        "self.method.full.after, self.tables, None)",
        "tests/test_amp.py -k 'overflow and WSAM'",
    ),
    Mutant(
        "a budget of the unscaled gradient",
        P + "rules.py",
        "table[:, 1:] * moved(self.scale, device)",
        "table[:, 1:]",
        "tests/test_amp.py -k LE-SAM",
    ),
    Mutant(
        "norms of scaled gradients",
        P + "step.py",
        "length = length / self.units.scale",
        "pass",
        "tests/test_amp.py -k norms_are",
    ),
    Mutant(
        "a short gradient is made as long as it may be",
        P + "store.py",
        "(most / (length + 1e-6)).clamp(max=1)",
        "(most / (length + 1e-6))",
        "tests/test_amp.py -k after_a_loop",
    ),
    Mutant(
        "the length of the scaled gradient is clipped",
        P + "store.py",
        "length, factor = length / scale, factor / scale",
        "factor = factor / scale",
        "tests/test_amp.py -k max_grad_norm_is",
    ),
    # -- checkpoints
    Mutant(
        "a step that asks for state is counted",
        P + "step.py",
        "if self._is_asked_for_state():\n            return self._b",
        "if False:\n            return self._b",
        "tests/test_checkpoint.py -k asking",
    ),
    Mutant(
        "momentum that is loaded in place begins anew",
        P + "checkpoint.py",
        "flat.count_loaded(engine.base.state)",
        "pass",
        "tests/test_checkpoint.py -k bit_for_bit",
    ),
    Mutant(
        "an entry that the base optimizer has yet to begin is begun for it",
        P + "checkpoint.py",
        "return state[p] if free else None",
        "return state[p]",
        "tests/test_checkpoint.py -k yet_to_begin",
    ),
    Mutant(
        "steps stand in the first group only",
        P + "step.py",
        "for group in engine.base.param_groups:\n            group[key]",
        "for group in engine.base.param_groups[:1]:\n            group[key]",
        "tests/test_checkpoint.py -k bit_for_bit",
    ),
    Mutant(
        "what a model wraps is saved perturbed",
        P + "checkpoint.py",
        "model = children[0] if len(children) == 1 and not parameters_of(model) else None",
        "model = None",
        "tests/test_checkpoint.py -k refused",
    ),
    Mutant(
        "a pickled model needs this package",
        P + "checkpoint.py",
        "return partial, (slice,)",
        "return partial, (show,)",
        "tests/test_checkpoint.py -k pickled",
    ),
    # -- what comes before the update
    Mutant(
        "what a scaler found is lost",
        P + "between.py",
        "found_inf = found if found_inf is None else found_inf + found",
        "pass",
        "tests/test_before_update.py",
    ),
    Mutant(
        "a step without the scaler's update",
        P + "between.py",
        "if not self.scaled.is_ready:",
        "if False:",
        "tests/test_before_update.py tests/test_graphs.py",
    ),
    Mutant(
        "a step that failed is the scaler's",
        P + "between.py",
        "        else:\n            self.forget()",
        "",
        "tests/test_before_update.py",
    ),
    Mutant(
        "one device's flag for all",
        P + "store.py",
        'options["found_inf"] = moved(found_inf, flat.device)',
        'options["found_inf"] = moved(found_inf, flat.device) * (f == 0)',
        "tests/test_before_update.py",
    ),
    # -- the specification
    Mutant(
        "found_inf is not looked at",
        B + "reference.py",
        "if found_inf is not None and bool(found_inf != 0):",
        "if False:",
        "tests/test_kernels.py -k 'found_inf and reference'",
    ),
    Mutant(
        "a missing epsilon",
        B + "reference.py",
        "norm_sq.sqrt() + EPS",
        "norm_sq.sqrt()",
        "tests/test_kernels.py tests/test_methods.py -k reference",
    ),
    Mutant(
        "the stretch is applied once",
        B + "reference.py",
        "d = _stretch(shown, eta).square() * d",
        "d = _stretch(shown, eta) * d",
        REFERENCE,
    ),
    Mutant("a stale EMA", B + "reference.py", "_wide(ema) * lmbda + g * (1 - lmbda)", "_wide(ema)", REFERENCE),
    Mutant(
        "dampening is lost",
        B + "reference.py",
        "_wide(buffer) * momentum + g * (1 - dampening)",
        "_wide(buffer) * momentum + g",
        "tests/test_kernels.py",
    ),
    Mutant(
        "Adam counts from 0", B + "reference.py", "t = int(count) + 1", "t = int(count) or 1", "tests/test_kernels.py"
    ),
    # -- Triton
    # -- parallel passes
    Mutant(
        "parallel: the padding trains",
        "msam_kernels/parallel.py",
        "return torch.where(padding, out.detach(), out)",
        "return out",
        "tests/test_parallel.py -m 'not exhaustive'",
    ),
    Mutant(
        "parallel: gradients that share memory",
        "msam_kernels/parallel.py",
        "own = own_memory(found[: len(trained)], whole=True)",
        "own = found[: len(trained)]",
        "tests/test_parallel.py -m 'not exhaustive'",
    ),
    Mutant(
        "parallel: statistics of the last micro-batch alone",
        "msam_kernels/parallel.py",
        "now = keep**n * now +",
        "now = 0 * now +",
        "tests/test_parallel.py -m 'not exhaustive'",
    ),
    Mutant(
        "parallel: a BatchNorm that runs twice counts once",
        "msam_kernels/parallel.py",
        "(1 - self.momentum) ** times",
        "(1 - self.momentum) ** 1",
        "tests/test_parallel.py -m 'not exhaustive'",
    ),
    Mutant(
        "parallel: each turn of several forgets the mean so far",
        "msam_kernels/step.py",
        "            descent.add(self._mean, PLAIN)\n        return descent\n",
        "            pass\n        return descent\n",
        "tests/test_parallel.py -k 'so_many_at_once'",
    ),
    Mutant(
        "parallel: the other side begins with a mean that has moved on",
        "msam_kernels/store.py",
        "mean.buffer.copy_(old)",
        "pass",
        "tests/test_parallel.py -k compose",
    ),
    Mutant(
        "parallel: all directions of several dtypes are made of one mean",
        "msam_kernels/store.py",
        "plan.lmbda is not None and len(which) > 1",
        "False",
        "tests/test_parallel.py -k two_dtypes",
    ),
    Mutant(
        "stacks: a micro-batch without a gradient has no weights",
        LOOPS,
        "(!grads && !a.copies)",
        "!grads",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "stacks: every micro-batch takes the first gradient",
        LOOPS,
        "grads + i * size_of(x, c), base, out,",
        "grads, base, out,",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "stacks: later terms replace the sum",
        LOOPS,
        "begun = true, group.live = 0",
        "group.live = 0",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "stacks: F-SAM's directions are all made of one mean",
        "csrc/cpu/operators.cpp",
        "a.last == 1 || !a.ema_out",
        "true",
        SPECIFIED,
        OPERATORS,
    ),
    Mutant(
        "stacks: coefficients of the first micro-batch for all",
        "csrc/cpu/operators.cpp",
        "s.data + (i * s.rows + r) * s.terms",
        "s.data + r * s.terms",
        "tests/test_kernels.py -k coefficients_of_all",
        OPERATORS,
    ),
    Mutant(
        "CUDA stacks: every micro-batch takes the norm of the first",
        DEVICE,
        "a.norm_sq.data + micro_batch * a.norm_sq.terms",
        "a.norm_sq.data",
        EMULATED,
    ),
    Mutant(
        "CUDA stacks: terms beyond the loads that are ahead are left out",
        DEVICE,
        "t < count * stacked; t += kAhead",
        "t < kAhead; t += kAhead",
        EMULATED,
    ),
    Mutant(
        "Triton stacks: every micro-batch takes the first gradient",
        B + "triton_kernels.py",
        "w, g = in_flat(copies, i * stride + offset, S), of_micro_batch(of_all, bytes, i)",
        "w, g = in_flat(copies, i * stride + offset, S), of_micro_batch(of_all, bytes, 0)",
        TRITON,
    ),
    Mutant(
        "parallel: attention sees its neighbours",
        "msam_kernels/parallel.py",
        "stacks = [t.reshape(n, *(1,) * (rank - t.dim()), *t.shape[1:]) for t in stacks]",
        "stacks = [t.roll(1, 0).reshape(n, *(1,) * (rank - t.dim()), *t.shape[1:]) for t in stacks]",
        "tests/test_parallel.py -m 'not exhaustive'",
    ),
    Mutant(
        "parallel: a mean of gradients moves on by passes that fail",
        "msam_kernels/step.py",
        "            memory.put_back(held)",
        "            pass",
        "tests/test_parallel.py -k mean_of_gradients",
    ),
    Mutant(
        "parallel: an interruption leaves a mode on",
        "msam_kernels/parallel.py",
        "        leave_mode(self._supplied)\n",
        "",
        "tests/test_parallel.py -k 'interruption and GSAM'",
    ),
    Mutant(
        "parallel: what is ignored counts in a mean",
        "msam_kernels/parallel.py",
        "weight[target.masked_fill(ignored, 0)].masked_fill(ignored, 0).sum()",
        "weight[target.masked_fill(ignored, 0)].sum()",
        "tests/test_parallel_layers.py -k cross_entropy",
    ),
    Mutant(
        "parallel: an LSTM cell forgets by its input gate",
        "msam_kernels/parallel.py",
        "c = f.sigmoid() * c + i.sigmoid() * g.tanh()",
        "c = i.sigmoid() * c + f.sigmoid() * g.tanh()",
        "tests/test_parallel_layers.py -k LSTMCell",
    ),
    Mutant(
        "parallel: a GRU cell resets its input",
        "msam_kernels/parallel.py",
        "(n + (r + h_r).sigmoid() * h_n)",
        "((r + h_r).sigmoid() * n + h_n)",
        "tests/test_parallel_layers.py -k GRUCell",
    ),
    Mutant(
        "parallel: an InstanceNorm that runs twice counts once",
        "msam_kernels/parallel.py",
        "int(times) if self.counts else versions_of(running)[0]",
        "int(times) if self.counts else 1",
        "tests/test_parallel_layers.py -k InstanceNorm",
    ),
    Mutant(
        "compiled: what vmap lacks stays",
        "msam_kernels/compiled.py",
        "node.target = self._supplied.get(node.target, node.target)",
        "pass",
        "tests/test_parallel.py -k supplied",
    ),
    Mutant(
        "compiled: what cannot be is tried in every step",
        "msam_kernels/compiled.py",
        "        self.works = False\n",
        "",
        "tests/test_parallel.py -k says_so_once",
    ),
    Mutant(
        "compiled: one code for all",
        "msam_kernels/compiled.py",
        "torch.compile(_apart(stacked),",
        "torch.compile(stacked,",
        "tests/test_parallel.py -k stay_compiled",
    ),
    Mutant(
        "compiled: a limit switches all off",
        "msam_kernels/compiled.py",
        "if isinstance(error, TooMany):",
        "if False:",
        "tests/test_parallel.py -k told_once",
    ),
    Mutant(
        "parallel: gradients at w stay beside the pass at w + e",
        "msam_kernels/step.py",
        "if plan.opposite is None:\n                        del vectors[plan.holds :]",
        "if plan.opposite is None:\n                        pass",
        "tests/test_parallel.py -k beside_a_pass",
    ),
    Mutant(
        "parallel: the mean is a part of a stack",
        "msam_kernels/step.py",
        "if whole and descent.shares is not None:",
        "if False:",
        "tests/test_parallel.py -k beside_a_pass",
    ),
    Mutant(
        "parallel: moved parameters are not noticed",
        "msam_kernels/step.py",
        "        if not self.store.is_current():\n",
        "        if False:\n",
        "tests/test_parallel.py -k move_between",
    ),
    Mutant(
        "capture: norms of e are those of the last eager step",
        "msam_kernels/capture.py",
        "flat.achieved[: len(rows)] = rows",
        "pass",
        "tests/test_graphs.py -k stats_are",
    ),
    Mutant(
        "compiled: statistics that a failed compiler moved on",
        "msam_kernels/parallel.py",
        "running[:] = [s.stacks(n) for s in self._statistics]",
        "pass",
        "tests/test_parallel.py -k fails_halfway",
    ),
    Mutant(
        "parallel: modules keep the stacks",
        "msam_kernels/parallel.py",
        "table, key, value = self._kept[-1]",
        "table, key, value = self._kept[0]",
        "tests/test_parallel.py -m 'not exhaustive'",
    ),
    Mutant(
        "CUDA: a perturbation that does not wait for the norm",
        DEVICE,
        "if (threadIdx.x == 0) wait_for(a.arrived, terms);",
        "",
        "tests/test_cuda_emulated.py -k every_order_of_its_blocks",
    ),
    Mutant(
        "CUDA: a row without a gradient that does not wait for the norm",
        DEVICE,
        "return wait();",
        "return;",
        "tests/test_cuda_emulated.py -k every_order_of_its_blocks",
    ),
    Mutant(
        "CUDA: blocks that stay counted",
        DEVICE,
        "atomicInc(a.arrived, gridDim.x - 1)",
        "atomicInc(a.arrived, gridDim.x)",
        "tests/test_cuda_emulated.py -k every_order_of_its_blocks",
    ),
    Mutant(
        "Triton: without C++ gaps are not seen",
        B + "triton_kernels.py",
        " or not t.is_contiguous()\n\n",
        "\n\n",
        "tests/test_triton.py -k looked_at",
    ),
    Mutant(
        "stacks: copies in any memory order",
        B + "checks.py",
        "t.is_contiguous() if contiguous else",
        "True if contiguous else",
        "tests/test_triton.py -k stack_is_one",
    ),
    Mutant(
        "a gradient of a graph is collected as it is",
        "msam_kernels/gradients.py",
        "[none if g is none else regular_gradient(shard(p), g) for",
        "[g for",
        "tests/test_gradients.py -k has_the_values",
    ),
    Mutant(
        "Triton: programs that stay counted",
        B + "triton_kernels.py",
        "% 65536 == 2 * half - 1:",
        "% 65536 == 2 * half:",
        TRITON,
    ),
    Mutant(
        "Triton: lmbda for its complement",
        B + "triton_kernels.py",
        "lmbda * ema + one_minus_lmbda * g",
        "lmbda * ema + lmbda * g",
        TRITON,
    ),
    Mutant(
        "Triton: nothing is saved",
        B + "triton_kernels.py",
        "store(saved, at, here & (status == UNTOUCHED), stored, S, ALIGNED)",
        "pass",
        TRITON,
    ),
    Mutant(
        "Triton: the EMA of a step that is not finite",
        B + "triton_kernels.py",
        "store(ema, at, here & finite & renew,",
        "store(ema, at, here & renew,",
        TRITON,
    ),
    Mutant(
        "Triton: a step that is skipped counts",
        B + "triton_kernels.py",
        "if updates & (step != 0):",
        "if step != 0:",
        TRITON,
    ),
    Mutant("Triton: sigma is lost", B + "triton_kernels.py", "g - sigma * ema", "g - ema", TRITON),
    # -- formulas, in the emulated CUDA kernels
    Mutant(
        "a wrong sign in the residual",
        "csrc/update_math.h",
        "return g - sigma * (ema",
        "return g + sigma * (ema",
        EMULATED,
    ),
    Mutant("VaSSO's first d is too short", "csrc/update_math.h", "sigma < 0 ? g : T{}", "T{}", EMULATED),
    Mutant(
        "Triton: VaSSO's first d is too short",
        B + "triton_kernels.py",
        "tl.where(sigma < 0, g - sigma * g, g)",
        "g",
        TRITON,
    ),
    Mutant("VaSSO's first d is too short", B + "reference.py", "first = g if sigma < 0 else", "first =", SPECIFIED),
    Mutant(
        "no epsilon under the norm",
        "csrc/update_math.h",
        "norm = std::sqrt(norm_sq) + 1e-12",
        "norm = std::sqrt(norm_sq)",
        EMULATED,
    ),
    Mutant(
        "a ratio of 0 and 0",
        "csrc/update_math.h",
        "below == 0 || !is_finite(below) ? 0. : above / below",
        "above / below",
        EMULATED,
    ),
    Mutant("products counted once beside the diagonal", "csrc/update_math.h", "(u == v ? 1 : 2)", "1", EMULATED),
    Mutant(
        "weight decay of the old sign",
        "csrc/update_math.h",
        "return weight_decay != 0 ? g + weight_decay * w : g;",
        "return weight_decay != 0 ? g - weight_decay * w : g;",
        EMULATED,
    ),
    Mutant(
        "AMSGrad takes the smaller", "csrc/update_math.h", "v <= max_exp_avg_sq ?", "v >= max_exp_avg_sq ?", EMULATED
    ),
    Mutant(
        "Adam squares first", "csrc/update_math.h", "one_minus_beta2 * g * g;", "one_minus_beta2 * (g * g);", EMULATED
    ),
    Mutant(
        "a lazily negated argument is read",
        "csrc/checks.h",
        "TORCH_CHECK(!is_lazy(t),",
        "TORCH_CHECK(true,",
        ALL_EMULATED + " -k refused",
    ),
    # -- the CPU's loops and operators
    Mutant(
        "CPU: the tail is skipped",
        LOOPS,
        "if (i < numel) body(i, int(numel - i));",
        "if (i < numel) body(i, int(numel - i - 1));",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "CPU: the first block is not saved",
        LOOPS,
        "if (saved_new) store_pack(saved_new + j, old);",
        "if (saved_new && i) store_pack(saved_new + j, old);",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "CPU: what is saved already is saved again",
        LOOPS,
        "untouched || kMasters<S, M> ? saved : nullptr, achieved)",
        "saved, achieved)",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "CPU: perturbed from where the weights are",
        LOOPS,
        "base = perturbed ? saved : weights;",
        "base = weights;",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "CPU: the mask's complement",
        LOOPS,
        "next, stays);\n      store_pack",
        "stays, next);\n      store_pack",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "CPU: the mask of another row",
        LOOPS,
        "block_bits(a.mask, c.offset + i,",
        "block_bits(a.mask, c.begin + i,",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "CPU: rows are restored that are not perturbed, and no others",
        LOOPS,
        "if (a.status[k] == kPerturbed) bring_back(",
        "if (a.status[k] == kSaved) bring_back(",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "CPU: a row stays saved",
        LOOPS,
        "a.status[k] = a.last ? kUntouched : kSaved;",
        "a.status[k] = kSaved;",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "CPU: swapped coefficients",
        LOOPS,
        "body(p, T(x.coefficients[k]));",
        "body(p, T(x.coefficients[a.combination.count - 1 - k]));",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "CPU: a fourth term is left out",
        LOOPS,
        "combine<4, on>(i, out, n, ahead)",
        "combine<3, on>(i, out, n, ahead)",
        SPECIFIED,
        FLOAT,
    ),
    Mutant(
        "CPU: the norm of what was not rounded yet",
        LOOPS,
        "const T* stored = padded(load(weights + i, w_result, n), w_result, n);",
        "const T* stored = padded<T>(w_result, w_result, n);",
        SPECIFIED_16,
        BF16,
    ),
    Mutant(
        "CPU: bf16 is cut off",
        "csrc/cpu/storage.h",
        "(u + 0x7fff + ((u >> 16) & 1)) >> 16",
        "u >> 16",
        SPECIFIED_16,
        BF16,
    ),
    Mutant(
        "CPU: a step is counted for every row",
        "csrc/cpu/operators.cpp",
        "if (a.table[k].begin == 0 && has_term(",
        "if (has_term(",
        KERNELS,
        OPERATORS,
    ),
    Mutant(
        "CPU: what the sum lost stays lost",
        "csrc/cpu/operators.cpp",
        "return rounded(sum);",
        "return sum.value;",
        KERNELS,
        OPERATORS,
    ),
    Mutant(
        "CPU: the last piece of the work is left out",
        "csrc/cpu/operators.cpp",
        "if (sum >= kGrain || k + 1 == rows())",
        "if (sum >= kGrain)",
        KERNELS,
        OPERATORS,
    ),
    Mutant(
        "C++: gradients that overlap are each other's",
        LOOPS_OVER_PARAMETERS,
        "    if (span.first < end)",
        "    if (false)",
        "tests/test_gradients.py",
        PARAMETERS,
    ),
    Mutant(
        "C++: a parameter that was re-pointed goes unnoticed",
        LOOPS_OVER_PARAMETERS,
        "memory != reinterpret_cast<int64_t>(t.const_data_ptr())",
        "false",
        "tests/test_gradients.py",
        PARAMETERS,
    ),
    Mutant(
        "C++: another memory order counts as regular",
        LOOPS_OVER_PARAMETERS,
        "(sizes[d] == 1 || strides[d] == of_strides[d])",
        "true",
        "tests/test_gradients.py",
        PARAMETERS,
    ),
    Mutant(
        "C++: a gradient that is there twice has memory of its own",
        LOOPS_OVER_PARAMETERS,
        "storages.add(grad.storage().unsafeGetStorageImpl())",
        "true",
        "tests/test_gradients.py",
        PARAMETERS,
    ),
    Mutant(
        "C++: another storage is other memory",
        LOOPS_OVER_PARAMETERS,
        "storage.data_ptr().get() == storage.data_ptr().get_context()",
        "true",
        "tests/test_gradients.py",
        PARAMETERS,
    ),
    Mutant(
        "C++: an entry of the state that was exchanged goes unnoticed",
        LOOPS_OVER_PARAMETERS,
        "if (entry != PyList_GET_ITEM(entries.ptr(), i)) return false;",
        ";",
        "tests/test_gradients.py",
        PARAMETERS,
    ),
    Mutant(
        "C++: a frozen parameter that is trained goes unnoticed",
        LOOPS_OVER_PARAMETERS,
        "if (known.list < 0) return !param.requires_grad() && !param.grad().defined();",
        "if (known.list < 0) return true;",
        "tests/test_gradients.py",
        PARAMETERS,
    ),
    Mutant(
        "CPU: a list too short for the table is taken",
        "csrc/checks.h",
        "TORCH_CHECK(size == 0 || c.begin + c.numel <= size,",
        "TORCH_CHECK(true,",
        KERNELS,
        OPERATORS,
    ),
    Mutant(
        "CPU: a list of another dtype is taken",
        "csrc/checks.h",
        "TORCH_CHECK(t.scalar_type() == dtype, label,",
        "TORCH_CHECK(true, label,",
        KERNELS,
        OPERATORS,
    ),
    Mutant(
        "CPU: found_inf is not looked at",
        "csrc/cpu/operators.cpp",
        "if (a.found_inf && *a.found_inf != 0)",
        "if (false)",
        KERNELS,
        OPERATORS,
    ),
    # -- ranks
    Mutant(
        "DDP is not held back",
        P + "ranks.py",
        "module.require_backward_grad_sync = module.require_forward_param_sync = False",
        "module.require_forward_param_sync = False",
        OWN_ASCENTS,
    ),
    Mutant(
        "ranks count equally",
        P + "ranks.py",
        "torch.where(known, mine[place], 1.0)",
        "mine[place] * 0 + 1",
        OWN_ASCENTS,
    ),
    Mutant("v is each rank's own", P + "step.py", "if self.plan.keeps:", "if False:", OWN_ASCENTS),
    Mutant(
        "other numbers of micro-batches in a group, and nobody says so",
        P + "ranks.py",
        "if (total, squares) != (size * n, size * n * n):",
        "if False:",
        SCENARIOS,
    ),
    Mutant(
        "numbers of micro-batches are compared in every step",
        P + "ranks.py",
        "        self._compared = n\n",
        "",
        SCENARIOS,
    ),
    Mutant("masks by own scores", P + "ranks.py", "dist.all_reduce(squares, group=self.all)", "pass", OWN_ASCENTS),
    Mutant(
        "a group shares the ascent alone",
        P + "step.py",
        "(self.turn == 0 or plan.combines)",
        "self.turn == 0",
        OWN_ASCENTS,
    ),
    Mutant(
        "flags stay as they were in the step",
        P + "ranks.py",
        "before, self._before = self._before, []\n",
        "before, self._before = [], []\n",
        SCENARIOS,
    ),
    Mutant("a gradient of other ranks is dropped", P + "ranks.py", "if not there[i]:", "if True:", SCENARIOS),
    Mutant("what nobody has is zero", P + "ranks.py", "if not there[i]:", "if False:", SCENARIOS),
    Mutant(
        "an ascent's overflow is one rank's", P + "step.py", "marks = bool(self._lacking)", "marks = False", SCENARIOS
    ),
    Mutant(
        "train_step in no_sync",
        P + "step.py",
        "        if self._several and ranks.synchronised is False:\n",
        "        if False:\n",
        SCENARIOS,
    ),
    Mutant(
        "mixed synchronisation is taken",
        P + "step.py",
        "plan.combines and not all(before == synced for before in self._synced)",
        "False",
        SCENARIOS,
    ),
    Mutant(
        "the state of a base with its own dict is lost",
        P + "optimizer.py",
        "**self.base_optimizer.state_dict(), checkpoint",
        "checkpoint",
        SCENARIOS,
    ),
    Mutant(
        "what is handed over is not scaled",
        P + "step.py",
        "descent.add(before, Coefficient().row(1 / share))",
        "descent.add(before, PLAIN)",
        ACCUMULATED,
    ),
    Mutant(
        "a loop in no_sync averages",
        P + "ranks.py",
        "self.reduces = all(reduces for _, reduces, _ in self._before)",
        "self.reduces = True",
        ACCUMULATED,
    ),
    Mutant(
        "accumulated gradients are combined", P + "step.py", "synced and engine.unreduced and", "False and", ACCUMULATED
    ),
    Mutant(
        "FSDP1 is taken",
        P + "_torch.py",
        'bool(getattr(p, "_fsdp_flattened", False))',
        "False",
        "tests/test_holders.py -k fsdp",
    ),
    # -- the CUDA kernels, emulated
    Mutant(
        "CUDA: the tail is skipped",
        DEVICE,
        "int i = vectors * N + threadIdx.x;",
        "int i = vectors * N + 1 + threadIdx.x;",
        EMULATED,
    ),
    Mutant(
        "CUDA: a warp is not added up",
        DEVICE,
        "for (int i = 1; i < kWarps; ++i)",
        "for (int i = 1; i < kWarps - 1; ++i)",
        EMULATED,
    ),
    Mutant(
        "CUDA: the norm of the last launch's parameters alone",
        DEVICE,
        "if (a.begin > 0) sum =",
        "if (false) sum =",
        ALL_EMULATED,
    ),
    Mutant(
        "CUDA: what warps lost stays lost",
        DEVICE,
        "if constexpr (careful) other.lost = __shfl_down_sync",
        "if constexpr (false) other.lost = __shfl_down_sync",
        "tests/test_cuda_emulated.py -k 'rounded_once or (bits_of_the_cpu and fp64)'",
    ),
    Mutant(
        "sums of doubles are as careless as those of floats",
        "csrc/update_math.h",
        "constexpr bool kCareful = sizeof(T) == 8;",
        "constexpr bool kCareful = false;",
        "tests/test_cuda_emulated.py -k rounded_once",
    ),
    Mutant(
        "CUDA: the mask of another row",
        DEVICE,
        "uint64_t(address(a.mask)) * 8 + c.offset",
        "uint64_t(address(a.mask)) * 8 + c.begin",
        EMULATED,
    ),
    Mutant(
        "CUDA: perturbed from where the weights are",
        DEVICE,
        "before == kPerturbed ? saved : nullptr,",
        "nullptr,",
        EMULATED,
    ),
    Mutant(
        "CUDA: nothing is saved",
        DEVICE,
        "before == kUntouched ? saved : nullptr,",
        "nullptr,",
        EMULATED,
    ),
    Mutant(
        "CUDA: a step that is skipped counts",
        DEVICE,
        "if (shared.is_last && is_wanted(a)) count_steps<stacked>(p);",
        "if (shared.is_last) count_steps<stacked>(p);",
        EMULATED,
    ),
    Mutant(
        "CUDA: products of one vector alone", DEVICE, ".add(j, wide[u], wide[v])", ".add(j, wide[v], wide[v])", EMULATED
    ),
    Mutant(
        "CUDA: the squared norm of a sum that stays is not made",
        DEVICE,
        "op.writes = stays ? op.gradient.coefs[0] != 1 : op.squares || !op.stays();",
        "op.writes = stays ? op.gradient.coefs[0] != 1 : !op.stays();",
        EMULATED,
    ),
    Mutant(
        "CUDA: a step is counted where there is no gradient",
        DEVICE,
        "if (any) a.step[a.begin + i] += 1;",
        "a.step[a.begin + i] += 1;",
        ALL_EMULATED,
    ),
    Mutant(
        "CUDA: small numbers take the way of ordinary ones",
        DEVICE,
        "least >= 0x1p-100f",
        "least >= 0.f",
        ALL_EMULATED,
    ),
    Mutant(
        "CUDA: a row's weights are used before their coefficients are there",
        DEVICE,
        "if (done == 0) ready();",
        "",
        EMULATED,
    ),
    Mutant(
        "CUDA: a missing state is made do without",
        DEVICE,
        "(a, rows, !missing, shared);",
        "(a, rows, true, shared);",
        ALL_EMULATED,
    ),
    Mutant(
        "CUDA: nothing is saved of a gradient that is not finite",
        DEVICE,
        "else if (saved)\n      in.w",
        "else if (saved && is_known)\n      in.w",
        EMULATED,
    ),
    Mutant(
        "random rounding: both sides draw the same",
        P + "store.py",
        'OPPOSITE if radii == "opposite" else 0',
        "0",
        "tests/test_precision.py -k two_sides",
    ),
    Mutant(
        "random rounding: every loop of a step draws the same",
        P + "step.py",
        "self.store.drawn += len(parts)",
        "pass",
        "tests/test_precision.py -k every_pass",
    ),
    Mutant(
        "random rounding: loops are counted over all steps",
        P + "step.py",
        "        self.store.drawn = 0\n        if not",
        "        if not",
        "tests/test_precision.py -k goes_on",
    ),
    Mutant(
        "random rounding: every step draws the same",
        P + "flat.py",
        "if self._head == head:",
        "if self._head is not None:",
        "tests/test_precision.py -k reads_the_step",
    ),
    Mutant(
        "random rounding: a capture copies from the host",
        P + "flat.py",
        "elif not self.is_capturing():  # what",
        "elif True:  # what",
        "tests/test_precision.py -k reads_the_step",
    ),
    Mutant(
        "random rounding: the seed of a file is not taken",
        P + "checkpoint.py",
        'own.get("seed", engine.store.seed)',
        "engine.store.seed",
        "tests/test_precision.py -k goes_on",
    ),
    Mutant(
        "random rounding: halves of a word swapped",
        B + "reference.py",
        "word >> k % 2 * 16",
        "word >> (1 - k % 2) * 16",
        RANDOM_16,
    ),
    Mutant(
        "random rounding: one round fewer",
        B + "reference.py",
        "rounds: int = 7",
        "rounds: int = 6",
        RANDOM_16,
    ),
    Mutant(
        "random rounding: subnormals of fp16 by parts of 2^-15",
        B + "reference.py",
        "* 2.0**40",
        "* 2.0**39",
        "tests/test_precision.py -k every_share",
    ),
    Mutant(
        "random rounding: a row's first bits are those of its call",
        LOOPS,
        "return to + before;",
        "return to;",
        "tests/test_precision.py -k neither_rows",
        BF16,
    ),
    Mutant(
        "random rounding: infinity above the largest number",
        "csrc/update_math.h",
        "magnitude >= 0x7f7f0000",
        "magnitude >= 0x7f800000",
        "tests/test_precision.py -k 'no_ordinary and bf16'",
        BF16,
    ),
    Mutant(
        "random rounding: eight elements of two calls at once",
        DEVICE,
        "(stochastic ? first % kDraws : 0)",
        "0",
        "tests/test_cuda_emulated.py -k 'bits_of_the_cpu and stochastic'",
    ),
    Mutant(
        "masters: held against values, not bits",
        B + "reference.py",
        ".view(torch.int16) == weight.view(torch.int16)",
        " == weight",
        MASTERS_16,
    ),
    Mutant(
        "masters: what does not move is rounded at random",
        B + "reference.py",
        "weight.copy_(torch.where(moves, x, shown))",
        "weight.copy_(torch.where(finite, x, shown))",
        MASTERS_16,
    ),
    Mutant(
        "masters: ASAM's stretch of the master",
        LOOPS,
        "stays = kMasters<S, M> ? load_pack(rounded + j) : old",
        "stays = old",
        MASTERS_16,
        BF16,
    ),
    Mutant(
        "masters: weights that somebody wrote are not looked at",
        LOOPS,
        "  if (others == 0) return;\n",
        "  return;\n",
        MASTERS + "'follow_weights or leaves_the_other'",
        BF16,
    ),
    Mutant(
        "masters: the weight is always the master",
        "csrc/update_math.h",
        "float_to_bits(rounded) == float_to_bits(w) ? kept : w",
        "w",
        "tests/test_cuda_emulated.py -k 'bits_of_the_cpu and masters'",
    ),
    Mutant(
        "masters: CUDA keeps none that is another",
        DEVICE,
        "  in.store(kept);\n",
        "",
        "tests/test_cuda_emulated.py -k 'bits_of_the_cpu and masters'",
    ),
    Mutant(
        "masters: CUDA rounds what does not move at random",
        DEVICE,
        "masters && !(bits >> j & 1) ? stays : w[j] + e[j]",
        "w[j] + e[j]",
        "tests/test_cuda_emulated.py -k 'bits_of_the_cpu and masters'",
    ),
    Mutant(
        "masters: CUDA updates the weights alone",
        DEVICE,
        "      after.store(kept + i);\n",
        "",
        "tests/test_cuda_emulated.py -k 'bits_of_the_cpu and masters'",
    ),
    Mutant(
        "masters: Triton starts from what was written before",
        B + "triton_kernels.py",
        "rounded = tl.where(perturbed, rounded, now)",
        "rounded = rounded",
        "tests/test_triton.py -k 'bits_of_the_specification and masters'",
    ),
    Mutant(
        "masters: Triton keeps none that is another",
        B + "triton_kernels.py",
        "here & changes, start, M",
        "here & (start != start), start, M",
        "tests/test_triton.py -k 'bits_of_the_specification and masters'",
    ),
    Mutant(
        "masters: state in 16 bits out of a file",
        P + "checkpoint.py",
        "entry[name] = wide[name].to(flat.device, flat.dtype_kept)",
        "pass",
        MASTERS + "goes_on",
    ),
    Mutant(
        "masters: those of a file are not taken",
        P + "checkpoint.py",
        "flat.set_master(i, None if master is None else values(master, flat.params[i]))",
        "flat.set_master(i, None)",
        MASTERS + "goes_on",
    ),
    Mutant(
        "masters: a file without any leaves the old ones",
        P + "flat.py",
        "        elif self.saved is not None:\n            self.alias",
        "        elif False:\n            self.alias",
        MASTERS + "plain_state_dict",
    ),
    Mutant(
        "masters: lost where others are converted",
        P + "flat.py",
        "if self.has_masters and home and",
        "if False and home and",
        MASTERS + "stay_where_others",
    ),
    Mutant(
        "masters: a copy has none",
        P + "optimizer.py",
        '            "masters",\n',
        "",
        MASTERS + "goes_on",
    ),
    Mutant(
        "masters: only of what is perturbed",
        P + "store.py",
        "            if flat.has_masters:\n                flat.save_buffer()\n            states",
        "            states",
        MASTERS + "every_way",
    ),
    Mutant(
        "masters: a rank's own memory takes them away",
        P + "checkpoint.py",
        ', "master": masters})',
        "})",
        MASTERS + "own_memory",
    ),
    Mutant(
        "masters: a method that is put there later is let through",
        P + "step.py",
        "            check_masters(True, self.method, self.base, False)\n",
        "",
        MASTERS + "put_there_later",
    ),
    Mutant(
        "masters: none in what a new optimizer shows",
        P + "checkpoint.py",
        "                flat.save_buffer()\n",
        "                pass\n",
        MASTERS + "distributed_checkpoints",
    ),
    Mutant(
        "a schedule that begins with the number of before does not begin",
        P + "rules.py",
        "if plan is self._plan and not self._radii.schedules and self._noted",
        "if plan is self._plan and self._noted",
        "tests/test_schedules.py -k very_number",
    ),
    Mutant(
        "a captured step goes on with another ascent",
        P + "capture.py",
        "            engine.ranks,\n",
        "",
        "tests/test_graphs.py -k is_no_longer_replayed",
    ),
    Mutant(
        "masters: beside another step than the fused one",
        P + "step.py",
        "if rule is None and self.store.has_masters:",
        "if False:",
        MASTERS + "not_the_fused_one",
    ),
    Mutant(
        "masters: the base optimizer steps by itself",
        P + "step.py",
        "        if self.store.has_masters:\n            raise",
        "        if False:\n            raise",
        MASTERS + "not_the_fused_one",
    ),
    Mutant(
        "masters: refused only at the end of the step",
        P + "step.py",
        "            self.rule()  # which refuses",
        "            pass",
        MASTERS + "not_the_fused_one",
    ),
    Mutant(
        "along: of what arrived",
        P + "step.py",
        "product / asked_sq)",
        "product / achieved_sq)",
        "tests/test_precision.py -k along",
    ),
    Mutant(
        "along: nobody warns",
        P + "precision.py",
        "LEAST = 0.5",
        "LEAST = 0.0",
        "tests/test_precision.py -k warn",
    ),
    Mutant(
        "along: the GPU is waited for",
        P + "precision.py",
        "(self._event is not None and not self._event.query())",
        "False",
        "tests/test_precision.py -k on_a_gpu",
    ),
    # -- sharded parameters
    Mutant(
        "every rank its own norm",
        P + "store.py",
        "if len(parts) == 1 and self._ranks is None:",
        "if len(parts) == 1:",
        SHARDED + "'ASAM and SGD and not kept'",
    ),
    Mutant(
        "sums of this rank alone",
        P + "store.py",
        "return self._ranks.add_up(sums[0] if len(sums) == 1 else torch.cat(sums, -1).sum(-1, keepdim=True))",
        "return torch.cat(sums, -1).sum(-1, keepdim=True)",
        SHARDED + "'Bilateral and AdamW'",
    ),
    Mutant(
        "v is as long as this rank's part of it",
        P + "store.py",
        "terms = self._together([(flat, m.square) for flat, m in zip(self.flats, memories, strict=True)])",
        "terms = torch.cat([m.square for m in memories])",
        SHARDED + "'LookSAM and SGD and passes'",
    ),
    Mutant(
        "the perturbation that arrived is this rank's",
        P + "store.py",
        "return self._together(sums).sum(-1)\n",
        "return torch.cat([t for _, t in sums], -1).sum(-1)\n",
        SHARDED + "'ASAM and SGD and not kept'",
    ),
    Mutant(
        "replicas count each",
        P + "sharded.py",
        "return sums if parts == ranks else sums * (parts / ranks)",
        "return sums",
        SHARDED + "'TP and not FSDP2'",
    ),
    Mutant(
        "replicas are held to be shards",
        P + "sharded.py",
        "for n, placement in pairs if not placement.is_replicate())",
        "for n, placement in pairs)",
        SHARDED + "'TP and not FSDP2'",
    ),
    Mutant(
        "ordinary parameters count on every rank",
        P + "sharded.py",
        "parts = 1 if spread is None else spread.parts",
        "parts = ranks if spread is None else spread.parts",
        SHARDED + "beside",
    ),
    Mutant(
        "partial sums are taken for gradients",
        P + "sharded.py",
        "if t.placements != p.placements or t.device_mesh != p.device_mesh:",
        "if t.device_mesh != p.device_mesh:",
        SHARDED + "'TP and not FSDP2'",
    ),
    Mutant(
        "gathered copies of other weights stay",
        P + "sharded.py",
        "            module.reshard()\n",
        "            pass\n",
        SHARDED + "'gathered or backward'",
    ),
    Mutant(
        "only the perturbation drops gathered copies",
        P + "step.py",
        "            self.saves = not last\n        self.store.forget_copies()\n",
        "            self.saves = not last\n",
        SHARDED + "'gathered or backward'",
    ),
    Mutant(
        "updates of empty shards are not counted",
        P + "flat.py",
        "step[index] += 1.0 if found_inf is None else (found_inf == 0).to(step.dtype)",
        "return",
        SHARDED + "'WSAM and AdamW and passes'",
    ),
    Mutant(
        "updates of empty shards are counted where they are skipped",
        P + "flat.py",
        "step[index] += 1.0 if found_inf is None else (found_inf == 0).to(step.dtype)",
        "step[index] += 1.0",
        SHARDED + "scaler",
    ),
    Mutant(
        "a rank that has no elements takes no step",
        P + "store.py",
        "if len(absent) == len(flat.params):",
        "if all(g.numel() == 0 for g in present.lists[f]):",
        SHARDED + "nothing_at_all",
    ),
    Mutant(
        "stages of a pipeline have a norm each",
        P + "sharded.py",
        "self._groups = [*self._groups, group]",
        "pass",
        SHARDED + "pipeline",
    ),
    Mutant(
        "a partial sum is no parameter, and nobody says so",
        P + "store.py",
        "            check_placements(name, p)\n",
        "            pass\n",
        SHARDED + "refused",
    ),
    Mutant(
        "no gradient, and nobody says so",
        P + "step.py",
        "        if store.is_sharded:\n            raise RuntimeError(",
        "        if False:\n            raise RuntimeError(",
        SHARDED + "refused",
    ),
    Mutant(
        "what a method remembers is saved as this rank's part",
        P + "checkpoint.py",
        "entry[OURS + name] = shown(part, flat.params[i])",
        "entry[OURS + name] = part",
        SHARDED + "own_state_dicts",
    ),
    Mutant(
        "memory that was freed is not noticed through the stable ABI",
        "csrc/tensor.h",
        "  return bytes;\n",
        "  return INT64_MAX;\n",
        STABLE + "bad",
        STABLE_OPERATORS,
    ),
    Mutant(
        "gaps in memory are not noticed through the stable ABI",
        "csrc/tensor.h",
        "if (k == sizes.size()) return false;",
        "if (k == sizes.size()) return true;",
        STABLE + "bad",
        STABLE_OPERATORS,
    ),
    Mutant(
        "every other order in memory is refused through the stable ABI",
        "csrc/tensor.h",
        "  if (t.is_contiguous()) return true;\n",
        "  return t.is_contiguous();\n",
        STABLE + "dense",
        STABLE_OPERATORS,
    ),
    Mutant(
        "sums of several micro-batches overlap through the stable ABI",
        "csrc/tensor.h",
        "strides[k - 1] = strides[k] * sizes[k];",
        "strides[k - 1] = strides[k];",
        STABLE + "specification",
        STABLE_OPERATORS,
    ),
    Mutant(
        "the stable ABI takes lazy tensors",
        P + "backends/__init__.py",
        "refuse(name) if refuse else torch.library.fallthrough_kernel",
        "torch.library.fallthrough_kernel",
        STABLE + "bad",
    ),
    Mutant(
        "a file for the stable ABI that is of other sources is used",
        P + "backends/__init__.py",
        "        extension.check_schemas(_SCHEMAS)",
        "        pass",
        STABLE + "other_sources",
    ),
    Mutant(
        "of operators through the stable ABI only the name is looked at",
        P + "backends/stable.py",
        "if types not in found:",
        'if types.split("(")[0] not in {line.split("(")[0] for line in found}:',
        STABLE + "'other_sources or counts'",
    ),
    Mutant(
        "an operator's type that changes is not told of the stable ABI",
        "csrc/stable/operators.cpp",
        'nullptr)) + "?";',
        "nullptr));",
        STABLE + "info",
        STABLE_OPERATORS,
    ),
    Mutant(
        "autograd looks at what goes through the stable ABI",
        P + "backends/stable.py",
        "if not torch.is_grad_enabled():",
        "if True:",
        STABLE + "grad_mode",
    ),
    Mutant(
        "what torch refuses by itself stays without a name",
        P + "backends/stable.py",
        "            look(*args, **kwargs)  # what torch refuses by itself, it does not name\n",
        "",
        STABLE + "bad",
    ),
    Mutant(
        "what an earlier build for another choice left stays",
        "setup.py",
        "for suffix in EXTENSION_SUFFIXES:",
        "for suffix in ():",
        "tests/test_cpu_build.py -k another_choice",
    ),
    Mutant(
        "a build without kernels removes those that are there",
        "setup.py",
        "if self.inplace and not self.extensions:",
        "if False:",
        "tests/test_cpu_build.py -k another_choice",
    ),
    Mutant(
        "the extension for this torch is used only without the other one",
        P + "backends/__init__.py",
        'extension = importlib.import_module("msam_kernels._C")',
        'extension = importlib.import_module("msam_kernels.backends.stable")',
        "tests/test_gradients.py",
    ),
]


def command(tests: str) -> list[str]:
    import shlex

    return [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", *shlex.split(tests)]


class Copy:
    """A copy of the checkout's files as git knows them, with what is built."""

    def __init__(self, folder: Path):
        self.folder = folder
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        built = [p.relative_to(ROOT) for p in (ROOT / "msam_kernels").glob("*.so")]
        for name in [*map(Path, listed.splitlines()), *built]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        (self.objects,) = ROOT.glob(f"build/temp.*-{sys.implementation.cache_tag}")

    def library(self, names: Sequence[str]) -> Path:
        """That which these objects are part of."""
        (found,) = (self.folder / "msam_kernels").glob("_stable.*" if names == STABLE_OPERATORS else "_C.*")
        return found

    def rebuild(self, names: Sequence[str]) -> None:
        """Compile these objects anew, from the copy's sources, and link them with the others of the last build."""
        import torch

        own, shared = self.objects, []
        if names == STABLE_OPERATORS:  # what knows no torch is there once
            own = self.objects.with_name(f"{self.objects.name}-stable")
            shared = [p for p in (self.objects / "csrc" / "cpu").rglob("*.o") if p.stem != "operators"]
        told = subprocess.run(["ninja", "-C", own, "-t", "commands"], capture_output=True, text=True, check=True).stdout
        built = self.folder / "objects"
        objects = shared
        for made in sorted(own.rglob("*.o")):
            name = made.relative_to(own / "csrc").with_suffix("").as_posix()
            if name not in names:
                objects.append(made)
                continue
            (line,) = (line for line in told.splitlines() if f" -o {made} " in line)
            objects.append(built / made.relative_to(own))
            objects[-1].parent.mkdir(parents=True, exist_ok=True)
            line = line.replace(str(own), str(built)).replace(str(ROOT / "csrc"), str(self.folder / "csrc"))
            subprocess.run(line, shell=True, check=True, capture_output=True)
        library = Path(torch.__file__).parent / "lib"
        link = [line.split()[0], "-shared", *objects, "-fopenmp", f"-L{library}", f"-Wl,-rpath,{library}"]
        link += [f"-l{name}" for name in ("c10", "torch", "torch_cpu", "torch_python")]
        subprocess.run([*link, "-o", self.library(names)], check=True, capture_output=True)

    def run(self, words: Sequence[str], limit: float) -> subprocess.CompletedProcess:
        return subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=limit
        )

    def verdict(self, mutant: Mutant, limit: float) -> str:
        path = self.folder / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return f"does not fit: its text is there {text.count(mutant.old)} times"
        try:
            path.write_text(text.replace(mutant.old, mutant.new))
            if mutant.objects:
                try:
                    self.rebuild(mutant.objects)
                except subprocess.CalledProcessError as error:
                    return f"does not compile: {error.stderr.decode()[:300]}"
                self.environment["MSAM_KERNELS_ISA"] = "baseline"
            try:
                done = self.run(command(mutant.tests), limit)
            except subprocess.TimeoutExpired:
                return "caught: no end"
        finally:
            path.write_text(text)
            if mutant.objects:
                library = self.library(mutant.objects)
                shutil.copy2(ROOT / "msam_kernels" / library.name, library)
                self.environment.pop("MSAM_KERNELS_ISA", None)
        if done.returncode == 1:
            return "caught"
        return "survives" if done.returncode == 0 else f"pytest ended with {done.returncode}: {done.stdout[-300:]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those that have this in their fault or file")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--limit", type=float, default=600, help="seconds for the tests of one fault")
    parser.add_argument("--jobs", type=int, default=2, help="faults side by side")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if args.only in m.fault or args.only in m.file]
    if args.list:
        print(*(f"{m.file}: {m.fault}" for m in chosen), sep="\n")
        return 0
    left = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for k in range(args.jobs):
            copies.put(Copy(Path(folder, str(k))))

        def verdict_of(mutant: Mutant) -> tuple[str, float]:
            copy, start = copies.get(), time.monotonic()
            try:
                return copy.verdict(mutant, args.limit), time.monotonic() - start
            finally:
                copies.put(copy)

        for i, (mutant, (verdict, seconds)) in enumerate(zip(chosen, pool.map(verdict_of, chosen), strict=True), 1):
            print(f"{i}/{len(chosen)} {mutant.file}: {mutant.fault}: {verdict}, {seconds:.0f} s", flush=True)
            if not verdict.startswith("caught"):
                left.append(mutant)
    print(f"{len(chosen) - len(left)} of {len(chosen)} faults caught")
    for mutant in left:
        print(f"survivor: {mutant.file}: {mutant.fault}")
    return len(left)


if __name__ == "__main__":
    sys.exit(main())
