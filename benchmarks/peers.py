# SPDX-License-Identifier: Apache-2.0
"""The same step in plain PyTorch, as a competent user would write it: what the kernels are measured against.

Every peer wraps a ``torch.optim.SGD``, ``Adam`` or ``AdamW`` and does one whole step of SAM or a method of its family in

    loss = peer.step(closures)

``closures`` holds one callable per micro-batch, all of equal weight. Each runs a forward and a backward into ``.grad``,
which is None when it is called, and returns the loss. SAM calls it twice, at w and at w + e:

    e_i = rho * g_i / (||g_i|| + 1e-12)
    w   <- base optimizer(w, mean_i grad L_i(w + e_i))

F-SAM has g_i - sigma * ema in place of g_i in e_i, and after that

    ema <- lmbda * ema + (1 - lmbda) * g_i       it begins as the first g

The step returns the mean loss at w and leaves ``.grad`` None. A peer may write into the gradients that it is given. What
needs more care than a benchmark or a demo takes is left out: parameters without a gradient, uneven micro-batches,
several parameter groups.

Peers, by name in ``PEERS``:

* ``loop``: one parameter at a time, after the most copied implementation, davda54/sam; it knows the whole family.
* ``foreach``: ``torch._foreach_*`` lists, no synchronisation with the host, base optimizer with ``foreach=True``.
* ``foreach+fused``: the same around torch's own fused base optimizer, ``fused=True``.
* ``compile``: ``torch.compile`` over perturb, and over restore and update together.
* ``compile max-autotune``: the same in mode "max-autotune-no-cudagraphs"; for GPUs.
* ``compile cudagraphs``: the same in mode "reduce-overhead", which replays CUDA graphs; for GPUs.
* ``pytorch_optimizer``: the classes of that package; they know no micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Closures = Sequence[Callable[[], Tensor]]

EPS = 1e-12


class Peer:
    """One way to write the step; subclasses say how.

    Args:
        base: a torch optimizer over one parameter group, made with the class's ``base_options``.
        rho: radius of the perturbation.
        method: one of the class's ``methods``, by name.
        sigma, lmbda: F-SAM's share of the mean gradient that is taken out, and the decay of that mean.
        eta: ASAM's, which is added to |w|.
        k, alpha: LookSAM perturbs in every k-th step, and scales what it adds between; alpha is also GSAM's.
        rho_min: radius of Bilateral SAM's second perturbation.
        mask: Sparse SAM's: which elements are perturbed, one tensor per parameter.
        theta: what a new gradient counts in VaSSO's mean.
        gamma: WSAM's weight of the sharpness, decoupled.
        only: SAM-ON's: for each parameter, whether it is perturbed.
    """

    base_options: dict = {}
    methods: tuple[str, ...] = ("SAM", "F-SAM")
    other_rules: tuple[str, ...] = ()  # of its methods, those that compute something else than ours
    micro_batches = True
    for_cpu = True

    def __init__(
        self,
        base: Optimizer,
        *,
        rho: float = 0.05,
        method: str = "SAM",
        sigma: float = 1.0,
        lmbda: float = 0.9,
        eta: float = 0.01,
        k: int = 1,
        alpha: float = 0.0,
        rho_min: float = 0.0,
        mask: Sequence[Tensor] | None = None,
        theta: float = 0.4,
        gamma: float = 0.0,
        only: Sequence[bool] | None = None,
    ):
        if method not in self.methods:
            raise ValueError(f"method must be one of {self.methods}, got {method!r}")
        (group,) = base.param_groups
        self.base, self.params, self.rho, self.method = base, list(group["params"]), rho, method
        self.sigma, self.lmbda, self.eta, self.k, self.alpha, self.rho_min = sigma, lmbda, eta, k, alpha, rho_min
        self.mask = None if mask is None else [m.to(p) for m, p in zip(mask, self.params, strict=True)]
        self.theta, self.gamma, self.only = theta, gamma, only
        self.friendly, self.leans = method == "F-SAM", method == "Momentum-SAM"
        self.steps = 0

    @torch.no_grad()
    def step(self, closures: Closures) -> Tensor:
        losses, total = [], None
        perturbs = self.steps % self.k == 0 and not self.leans
        if self.leans:
            self.lean()
        for i, closure in enumerate(closures):
            loss, grads = self.backward(closure)
            losses.append(loss)
            if perturbs:
                known = self.ascend(grads, first=i == 0)
                del grads  # Only what ``ascend`` keeps outlives the second pass.
                grads = self.descent(known, self.backward(closure)[1], closure, first=i == 0)
            if i + 1 < len(closures):
                total = self.accumulate(total, grads)
        self.update(total, grads, len(closures))
        self.steps += 1
        return losses[0].detach() if len(losses) == 1 else torch.stack(losses).mean()

    def backward(self, closure: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients, which are taken from the parameters."""
        with torch.enable_grad():
            loss = closure()
        grads = []
        for p in self.params:
            grads.append(p.grad)
            p.grad = None
        return loss, grads

    def lean(self) -> None:
        """Momentum-SAM: move the weights to w + e for the whole step; ``update`` brings them back."""
        raise NotImplementedError

    def ascend(self, grads: list[Tensor], *, first: bool) -> object:
        """Move the weights to w + e; what is returned comes to ``descent``."""
        raise NotImplementedError

    def descent(self, known: object, grads: list[Tensor], closure: Callable[[], Tensor], first: bool) -> list[Tensor]:
        """What the base optimizer is to go down, from the gradients at w + e; the weights are brought back."""
        raise NotImplementedError

    def accumulate(self, total: list[Tensor] | None, grads: list[Tensor]) -> list[Tensor]:
        """After all micro-batches but the last: ``grads`` are added to ``total``."""
        raise NotImplementedError

    def update(self, total: list[Tensor] | None, grads: list[Tensor], count: int) -> None:
        """After the last micro-batch: the weights take a step by the mean."""
        raise NotImplementedError

    def _base_step(self, grads: list[Tensor]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.base.step()
        self.base.zero_grad()


class Loop(Peer):
    """A Python loop over the parameters, one small operator after the other.

    As in davda54/sam, but for two things that it does at needless cost: the copy of the weights stays in the state
    instead of being cloned in every step, and the gradient is not multiplied by 1.0 before its norm is taken.
    """

    base_options = {"foreach": False}
    methods = (
        *("SAM", "ASAM", "F-SAM", "Stable SAM", "Sparse SAM", "LookSAM", "Bilateral SAM", "GSAM"),
        *("LE-SAM", "VaSSO", "WSAM", "Momentum-SAM", "SAM-ON"),
    )

    def __init__(self, base: Optimizer, **options):
        super().__init__(base, **options)
        self.perturbed = [p for i, p in enumerate(self.params) if self.only is None or self.only[i]]
        self.saved = [torch.empty_like(p) for p in self.perturbed]
        self.ema: list[Tensor] | None = None
        self.v: list[Tensor] = []
        self.gap: list[Tensor] = []

    def lean(self) -> None:
        v = [self.base.state[p].get("momentum_buffer", self.base.state[p].get("exp_avg")) for p in self.params]
        scale = None if v[0] is None else self.rho / (_norm(v) + EPS)
        for p, w, m in zip(self.params, self.saved, v, strict=True):
            w.copy_(p)
            if scale is not None:
                p.sub_(m * scale)

    def ascend(self, grads: list[Tensor], *, first: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the gradients, and e, where the method needs them again."""
        kept = []
        chosen = grads if self.only is None else [g for g, is_chosen in zip(grads, self.only, strict=True) if is_chosen]
        for p, w, e in zip(self.perturbed, self.saved, self._perturbation(chosen), strict=True):
            w.copy_(p)
            p.add_(e)
            if self.method == "Bilateral SAM":
                kept.append(e)
        return grads if self.method in ("Stable SAM", "LookSAM", "Bilateral SAM", "GSAM", "WSAM") else [], kept

    def _perturbation(self, grads: list[Tensor]) -> Iterator[Tensor]:
        """e, one parameter after the other."""
        if self.method == "ASAM":
            stretches = [p.abs() + self.eta for p in self.params]
            stretched = [t * g for t, g in zip(stretches, grads, strict=True)]
            scale = self.rho / (_norm(stretched) + EPS)
            yield from (t * d * scale for t, d in zip(stretches, stretched, strict=True))
            return
        if self.friendly:
            grads = self._without_ema(grads)
        if self.method == "VaSSO":
            grads = self._averaged(grads)
        norm = _norm(grads) + EPS
        scale = (self.sigma / norm).clamp(max=self.rho) / norm if self.method == "LE-SAM" else self.rho / norm
        if self.mask is None:
            yield from (g * scale for g in grads)
        else:
            yield from (g * scale * m for g, m in zip(grads, self.mask, strict=True))

    def _without_ema(self, grads: list[Tensor]) -> list[Tensor]:
        if self.ema is None:
            self.ema = [g.clone() for g in grads]
            return grads
        residuals = []
        for g, mean in zip(grads, self.ema, strict=True):
            residuals.append(torch.sub(g, mean, alpha=self.sigma))
            mean.mul_(self.lmbda).add_(g, alpha=1 - self.lmbda)
        return residuals

    def _averaged(self, grads: list[Tensor]) -> list[Tensor]:
        if self.ema is None:
            self.ema = [g.clone() for g in grads]
        else:
            for g, mean in zip(grads, self.ema, strict=True):
                mean.mul_(1 - self.theta).add_(g, alpha=self.theta)
        return self.ema

    def descent(
        self, known: tuple[list[Tensor], list[Tensor]], grads: list[Tensor], closure: Callable[[], Tensor], first: bool
    ) -> list[Tensor]:
        at_w, e = known
        behind: list[Tensor] = []
        if self.method == "Bilateral SAM":
            for p, w, d in zip(self.params, self.saved, e, strict=True):
                torch.sub(w, d, alpha=self.rho_min / self.rho, out=p.data)
            _, behind = self.backward(closure)
        self._restore()
        if self.method == "WSAM":
            gap = [g.sub_(a) for a, g in zip(at_w, grads, strict=True)]
            self.gap = gap if first else [a.add_(b) for a, b in zip(self.gap, gap, strict=True)]
            return at_w
        if self.method == "Stable SAM":
            factor = _norm(at_w) / (_norm(grads) + EPS)
            return [g.mul_(factor) for g in grads]
        if self.method == "GSAM":
            along = _dot(at_w, grads) / _dot(grads, grads)
            return [g.sub_(a - along * g, alpha=self.alpha) for a, g in zip(at_w, grads, strict=True)]
        if self.method == "Bilateral SAM":
            factor = _norm(grads) / (_norm(behind) + EPS)
            return [g.add_(a).sub_(b * factor) for a, g, b in zip(at_w, grads, behind, strict=True)]
        if self.method == "LookSAM":
            along = _dot(at_w, grads) / (_dot(at_w, at_w) + EPS)
            v = [g - along * a for a, g in zip(at_w, grads, strict=True)]
            self.v = v if first else [a.add_(b) for a, b in zip(self.v, v, strict=True)]
        return grads

    def _restore(self) -> None:
        for p, w in zip(self.perturbed, self.saved, strict=True):
            p.copy_(w)

    def accumulate(self, total: list[Tensor] | None, grads: list[Tensor]) -> list[Tensor]:
        return grads if total is None else [t.add_(g) for t, g in zip(total, grads, strict=True)]

    def update(self, total: list[Tensor] | None, grads: list[Tensor], count: int) -> None:
        if total is not None:
            grads = [t.add_(g).div_(count) for t, g in zip(total, grads, strict=True)]
        if self.steps % self.k:  # LookSAM's v of another step, whose length does not matter
            factor = self.alpha * _norm(grads) / (_norm(self.v) + EPS)
            grads = [g.add_(v * factor) for g, v in zip(grads, self.v, strict=True)]
        if self.leans:
            self._restore()
        self._base_step(grads)
        (group,) = self.base.param_groups
        for p, gap in zip(self.params, self.gap, strict=False):
            p.sub_(gap, alpha=group["lr"] * self.gamma / (1 - self.gamma) / count)
        self.gap = []


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


def _dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


class Foreach(Peer):
    """Whole lists at a time. Buffers are kept, gradients overwritten where that saves one, the host reads nothing."""

    base_options = {"foreach": True}

    def __init__(self, base: Optimizer, **options):
        super().__init__(base, **options)
        self.saved = [torch.empty_like(p) for p in self.params]
        self.ema: list[Tensor] | None = None

    def ascend(self, grads: list[Tensor], *, first: bool) -> None:
        if self.friendly:
            self._subtract_ema(grads)
        if first:
            torch._foreach_copy_(self.saved, self.params)
        scale = self.rho / (_list_norm(grads) + EPS)
        if grads[0].dtype == scale.dtype and not grads[0].is_cuda:
            # One pass on a CPU. On a GPU a scalar operand leaves the fast path, and two list operators are faster.
            torch._foreach_addcmul_(self.params, grads, [scale] * len(grads))
        else:
            torch._foreach_mul_(grads, scale)
            torch._foreach_add_(self.params, grads)

    def _subtract_ema(self, grads: list[Tensor]) -> None:
        """grads <- g - sigma * ema, in place; then the ema takes g."""
        if self.ema is None:
            self.ema = [g.clone() for g in grads]
        elif self.sigma == 1:
            # lmbda * ema + (1 - lmbda) * g = ema + (1 - lmbda) * (g - ema): no copy of g needed.
            torch._foreach_sub_(grads, self.ema)
            torch._foreach_add_(self.ema, grads, alpha=1 - self.lmbda)
        else:
            raw = torch._foreach_clone(grads) if hasattr(torch, "_foreach_clone") else [g.clone() for g in grads]
            torch._foreach_sub_(grads, self.ema, alpha=self.sigma)
            torch._foreach_lerp_(self.ema, raw, 1 - self.lmbda)

    def descent(self, known: None, grads: list[Tensor], closure: Callable[[], Tensor], first: bool) -> list[Tensor]:
        torch._foreach_copy_(self.params, self.saved)
        return grads

    def accumulate(self, total: list[Tensor] | None, grads: list[Tensor]) -> list[Tensor]:
        if total is None:
            return grads
        torch._foreach_add_(total, grads)
        return total

    def update(self, total: list[Tensor] | None, grads: list[Tensor], count: int) -> None:
        if total is not None:
            grads = self.accumulate(total, grads)
            torch._foreach_mul_(grads, 1 / count)
        self._base_step(grads)


def _list_norm(tensors: list[Tensor]) -> Tensor:
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)))


class ForeachFused(Foreach):
    """``foreach`` around torch's own one-kernel base optimizer."""

    base_options = {"fused": True}

    def __init__(self, base: Optimizer, **options):
        super().__init__(base, **options)
        p = self.params[0]
        if isinstance(base, torch.optim.SGD) and not p.is_cuda and p.element_size() == 2:
            raise ValueError("SGD(fused=True) does not store 16-bit parameters on the CPU, pytorch#191763")


class Compile(Peer):
    """``torch.compile`` over perturb and over restore + base update, each one graph over all parameters.

    The base update is written out, since only so can it fuse with the restore. Shapes are static; what changes from
    step to step (learning rate, bias corrections) comes in 0-d tensors, so that nothing recompiles. The functions are
    shared by all instances; call ``torch.compiler.reset()`` before another set of shapes.
    """

    mode: str | None = None
    _compiled: dict = {}

    def __init__(self, base: Optimizer, **options):
        super().__init__(base, **options)
        (group,) = base.param_groups
        self.weights = [p.data for p in self.params]
        if group["maximize"] or group.get("dampening") or group.get("nesterov") or group.get("amsgrad"):
            raise ValueError("the compiled peer knows the plain update: no maximize, dampening, nesterov or amsgrad")
        self.adam = "betas" in group
        self.saved = [p.detach().clone() for p in self.params]
        self.state = [[torch.zeros_like(p) for p in self.params] for _ in range(2 if self.adam else 1)]
        self.ema = [torch.zeros_like(p) for p in self.params] if self.friendly else None
        wide = torch.promote_types(self.params[0].dtype, torch.float32)
        self.c, self.step_size, self.shrink, self.correction = (
            torch.zeros((), dtype=wide, device=self.params[0].device) for _ in range(4)
        )

    def _run(self, function: Callable, *args) -> None:
        key = function, self.mode
        if key not in self._compiled:
            self._compiled[key] = torch.compile(function, fullgraph=True, dynamic=False, mode=self.mode)
        self._compiled[key](*args)

    def ascend(self, grads: list[Tensor], *, first: bool) -> None:
        saved = self.saved if first else None
        if not self.friendly:
            self._run(_perturb, self.weights, grads, saved, self.rho)
            return
        begins = self.steps == 0 and first
        self._run(_perturb_friendly, self.weights, grads, saved, self.ema, self.rho, self.sigma, self.lmbda)
        if begins:
            torch._foreach_copy_(self.ema, grads)

    def descent(self, known: None, grads: list[Tensor], closure: Callable[[], Tensor], first: bool) -> list[Tensor]:
        return grads  # The weights are brought back by the function that uses these.

    def accumulate(self, total: list[Tensor] | None, grads: list[Tensor]) -> list[Tensor]:
        if total is None:
            torch._foreach_copy_(self.weights, self.saved)
            return self._first_total(grads)
        self._run(_restore_add, self.weights, self.saved, total, grads)
        return total

    def _first_total(self, grads: list[Tensor]) -> list[Tensor]:
        return grads

    def update(self, total: list[Tensor] | None, grads: list[Tensor], count: int) -> None:
        (group,) = self.base.param_groups
        lr, decay, t = group["lr"], group["weight_decay"], self.steps + 1
        self.c.fill_(1 / count)
        args = (self.weights, self.saved, total, grads, self.c, *self.state)
        if not self.adam:
            self.step_size.fill_(lr)
            self._run(_update_sgd, *args, self.step_size, decay, group["momentum"])
            return
        beta1, beta2 = group["betas"]
        decoupled = isinstance(self.base, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        self.step_size.fill_(lr / (1 - beta1**t))
        self.shrink.fill_(1 - lr * decay if decoupled else 1)
        self.correction.fill_((1 - beta2**t) ** 0.5)
        numbers = (self.step_size, self.shrink, self.correction, 0.0 if decoupled else decay)
        self._run(_update_adam, *args, *numbers, beta1, beta2, group["eps"])


class CompileMaxAutotune(Compile):
    """``compile`` with the compiler's longest search, launched one by one."""

    mode = "max-autotune-no-cudagraphs"
    for_cpu = False


class CompileCudagraphs(Compile):
    """``compile`` in graphs, which cost the host next to nothing.

    A graph writes to fixed addresses only: weights and state are declared to stay, and the accumulator is a buffer. It
    reads from fixed addresses too: gradients, which autograd allocates anew, are copied there in every call. The
    compiler sees to that, and the time counts.
    """

    mode = "reduce-overhead"
    for_cpu = False

    def __init__(self, base: Optimizer, **options):
        super().__init__(base, **options)
        self.acc: list[Tensor] | None = None
        scalars = (self.c, self.step_size, self.shrink, self.correction)
        self._stay([*self.weights, *self.saved, *(t for buffers in self.state for t in buffers), *scalars])
        self._stay(self.ema or [])

    @staticmethod
    def _stay(tensors: list[Tensor]) -> None:
        for t in tensors:
            torch._dynamo.mark_static_address(t, guard=False)

    def _first_total(self, grads: list[Tensor]) -> list[Tensor]:
        if self.acc is None:
            self.acc = [torch.empty_like(g) for g in grads]
            self._stay(self.acc)
        torch._foreach_copy_(self.acc, grads)
        return self.acc


def _traced_norm(tensors: list[Tensor]) -> Tensor:
    if tensors[0].is_cuda:
        # A reduction per tensor would be a launch per tensor; torch's list operator takes few.
        return _list_norm(tensors)
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, dtype=wide) for t in tensors]))


# List operators: on a GPU the compiler fuses them across tensors as well, into few launches.


def _perturb(params, grads, saved, rho):
    scale = rho / (_traced_norm(grads) + EPS)
    if saved is not None:
        torch._foreach_copy_(saved, params)
    torch._foreach_add_(params, torch._foreach_mul(grads, scale))


def _perturb_friendly(params, grads, saved, ema, rho, sigma, lmbda):
    residual = torch._foreach_sub(grads, torch._foreach_mul(ema, sigma))
    scale = rho / (_traced_norm(residual) + EPS)
    if saved is not None:
        torch._foreach_copy_(saved, params)
    torch._foreach_add_(params, torch._foreach_mul(residual, scale))
    torch._foreach_copy_(ema, torch._foreach_add(torch._foreach_mul(ema, lmbda), torch._foreach_mul(grads, 1 - lmbda)))


def _restore_add(params, saved, acc, grads):
    torch._foreach_copy_(params, saved)
    torch._foreach_add_(acc, grads)


def _mean_gradient(acc, grads, c):
    return grads if acc is None else torch._foreach_mul(torch._foreach_add(acc, grads), c)


def _update_sgd(params, saved, acc, grads, c, momentum_buffer, lr, weight_decay, momentum):
    grads = torch._foreach_add(_mean_gradient(acc, grads, c), torch._foreach_mul(saved, weight_decay))
    new = torch._foreach_add(torch._foreach_mul(momentum_buffer, momentum), grads)
    torch._foreach_copy_(momentum_buffer, new)
    torch._foreach_copy_(params, torch._foreach_sub(saved, torch._foreach_mul(new, lr)))


def _update_adam(
    params, saved, acc, grads, c, exp_avg, exp_avg_sq, step_size, shrink, correction, weight_decay, beta1, beta2, eps
):
    grads = torch._foreach_add(_mean_gradient(acc, grads, c), torch._foreach_mul(saved, weight_decay))
    torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
    square = torch._foreach_mul(torch._foreach_mul(grads, 1 - beta2), grads)
    torch._foreach_copy_(exp_avg_sq, torch._foreach_add(torch._foreach_mul(exp_avg_sq, beta2), square))
    root = torch._foreach_add(torch._foreach_div(torch._foreach_sqrt(exp_avg_sq), correction), eps)
    way = torch._foreach_div(torch._foreach_mul(exp_avg, step_size), root)
    torch._foreach_copy_(params, torch._foreach_sub(torch._foreach_mul(saved, shrink), way))


class PytorchOptimizer(Peer):
    """The classes of the package pytorch_optimizer, used as its documentation shows."""

    methods = ("SAM", "F-SAM", "LookSAM", "GSAM")
    micro_batches = False
    # Its LookSAM projects and scales tensor by tensor, not globally, and so computes something else.
    other_rules = ("LookSAM",)

    def __init__(self, base: Optimizer, **options):
        super().__init__(base, **options)
        import pytorch_optimizer

        known = ("lr", "momentum", "weight_decay", "betas", "eps")
        kwargs = {name: value for name, value in base.defaults.items() if name in known}
        kind, rho = type(base), self.rho
        if self.method == "SAM":
            self.base = pytorch_optimizer.SAM(self.params, kind, rho=rho, **kwargs)
        elif self.method == "F-SAM":
            friendly = {"sigma": self.sigma, "lmbda": self.lmbda}
            self.base = pytorch_optimizer.FriendlySAM(self.params, kind, rho=rho, **friendly, **kwargs)
        elif self.method == "LookSAM":
            self.base = pytorch_optimizer.LookSAM(self.params, kind, rho=rho, k=self.k, alpha=self.alpha, **kwargs)
        else:
            constant = type("Constant", (), {"step": lambda self: rho})()
            self.base = pytorch_optimizer.GSAM(self.params, base, nn.Module(), constant, alpha=self.alpha)

    @torch.no_grad()
    def step(self, closures: Closures) -> Tensor:
        (closure,) = closures
        if self.method == "GSAM":  # its closure clears the gradients first
            losses = []

            @torch.enable_grad()
            def run() -> tuple[None, None]:
                self.base.base_optimizer.zero_grad()
                losses.append(closure())
                return None, None

            self.base.step(run)
            self.base.base_optimizer.zero_grad()
            return losses[0].detach()
        with torch.enable_grad():
            loss = closure()
        perturbs = self.method != "LookSAM" or self.base.get_step() % self.k == 0
        self.base.first_step(zero_grad=perturbs)
        if perturbs:  # LookSAM's step(closure) would run the second pass in every step.
            with torch.enable_grad():
                closure()
        self.base.second_step(zero_grad=True)
        return loss.detach()


PEERS: dict[str, type[Peer]] = {
    "loop": Loop,
    "foreach": Foreach,
    "foreach+fused": ForeachFused,
    "compile": Compile,
    "compile max-autotune": CompileMaxAutotune,
    "compile cudagraphs": CompileCudagraphs,
    "pytorch_optimizer": PytorchOptimizer,
}


def peers_for(device: torch.device) -> list[str]:
    """Those that make sense on ``device``."""
    return [name for name, kind in PEERS.items() if kind.for_cpu or device.type != "cpu"]
