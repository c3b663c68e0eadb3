# SPDX-License-Identifier: Apache-2.0
"""Every kernel on its own: the operators as ``MicroBatchSAM`` calls them. All that the benchmarks know of operators is here."""

from __future__ import annotations

import contextlib

import torch

from gradients import Gradients
from measure import Call
from msam_kernels import ops
from msam_kernels.flat import Flat

SIGMA, LMBDA = 1.0, 0.9


def chosen_backend(name: str, device: torch.device) -> str:
    """What "auto" stands for on ``device``."""
    if name != "auto":
        return name
    chosen = ops.get_backend(name, device)
    for name in ops.BACKENDS:
        # One that is not there, or is not for this device, says so by raising.
        with contextlib.suppress(RuntimeError):
            if ops.get_backend(name, device) is chosen:
                break
    return name


def kernel_calls(gradients: Gradients, backend: str) -> dict[str, tuple[float, Call]]:
    """P and the call of every kernel, by name."""
    params = gradients.parameters()
    k = ops.get_backend(backend, params[0].device)
    flat = Flat(params, [0] * len(params), flatten=True, backend=k)
    table, w = flat.chunks(), flat.weights
    acc, g, other = ([t.clone() for t in master] for master in gradients.masters)
    saved, ema, m, v = (flat.new_buffer() for _ in range(4))
    saved.copy_(w[0])
    v_parts = flat.aliases(ema)
    mask = torch.full((flat.size // 8,), 255, dtype=torch.uint8, device=flat.device)
    step = torch.zeros(len(params) + 1, device=flat.device)

    def row(*values):
        return torch.tensor([values], dtype=torch.float64, device=flat.device)

    sgd = dict(hyper=row(gradients.rho, 1e-3, 0.9, 0, 5e-4, 0, 0), momentum_buffer=m)
    adam = dict(hyper=row(gradients.rho, 1e-4, 0.9, 0.999, 1e-8, 0.01, 0, 0, 1), exp_avg=m, exp_avg_sq=v, step=step)
    norm_sq = torch.full((1,), float(gradients.numel) * 1e-2, dtype=torch.float64, device=flat.device)
    achieved_sq, acc_sq = (torch.empty(len(table), dtype=torch.float64, device=flat.device) for _ in range(2))
    outputs = dict(hyper=sgd["hyper"], achieved_sq=achieved_sq)
    ascent = dict(norm_sq=norm_sq, **outputs)
    friendly, moving = dict(ema=ema, sigma=SIGMA), dict(ema=ema, sigma=SIGMA, lmbda=LMBDA)
    two, three = (row(0.7, 0.2, -0.4)[0, :n].contiguous() for n in (2, 3))
    back, mean = dict(saved=saved, norm_sq=norm_sq), dict(saved=saved, norm_sq=norm_sq, c_acc=0.5, c=0.5)
    calls = [
        ("inner_products", 1, lambda: k.inner_products(w, g, table)),
        ("inner_products friendly", 2, lambda: k.inner_products(w, g, table, **friendly)),
        ("inner_products adaptive", 2, lambda: k.inner_products(w, g, table, eta=0.01)),
        ("perturb first", 4, lambda: k.perturb(w, [], g, table, saved=saved, **ascent)),
        ("perturb later", 3, lambda: k.perturb(w, [], g, table, **ascent)),
        ("perturb first friendly", 6, lambda: k.perturb(w, [], g, table, saved=saved, **ascent, **moving)),
        ("perturb later friendly", 5, lambda: k.perturb(w, [], g, table, **ascent, **moving)),
        ("perturb first adaptive", 4, lambda: k.perturb(w, [], g, table, saved=saved, **ascent, eta=0.01)),
        ("ascend", 5, lambda: k.ascend(w, g, table, saved=saved, **outputs)),
        ("ascend friendly", 8, lambda: k.ascend(w, g, table, saved=saved, **outputs, **moving)),
        ("restore", 2, lambda: k.restore(w, [], [], table, saved=saved)),
        ("restore + accumulate", 5, lambda: k.restore(w, acc, g, table, **back)),
        ("sgd", 5, lambda: k.sgd(w, [], g, table, **sgd)),
        ("restore + sgd", 5, lambda: k.sgd(w, [], g, table, **sgd, **back)),
        ("restore + accumulate + sgd", 6, lambda: k.sgd(w, acc, g, table, **sgd, **mean)),
        ("adamw", 7, lambda: k.adam(w, [], g, table, **adam)),
        ("restore + adamw", 7, lambda: k.adam(w, [], g, table, **adam, **back)),
        ("restore + accumulate + adamw", 8, lambda: k.adam(w, acc, g, table, **adam, **mean)),
        (
            "perturb first masked",
            4 + mask.nbytes / saved.nbytes,
            lambda: k.perturb(w, [], g, table, saved=saved, **ascent, mask=mask),
        ),
        ("perturb to the other side", 3, lambda: k.perturb(w, [], g, table, origin=saved, **ascent)),
        (
            "perturb to the other side, adding",
            5,
            lambda: k.perturb(w, acc, g, table, origin=saved, acc_sq=acc_sq, **ascent),
        ),
        ("dots of two", 2, lambda: k.dots(g, acc, [], table)),
        ("dots of three", 3, lambda: k.dots(g, acc, other, table)),
        ("v of LookSAM", 3, lambda: k.restore([], v_parts, [*g, *acc], table, coefs=two, c_acc=0.0)),
        ("restore + sgd, two combined", 6, lambda: k.sgd(w, [], [*g, *acc], table, **sgd, **back, coefs=two)),
        (
            "restore + sgd, three combined",
            7,
            lambda: k.sgd(w, [], [*g, *acc, *other], table, **sgd, **back, coefs=three),
        ),
    ]
    return {name: (passes, Call(run)) for name, passes, run in calls}
