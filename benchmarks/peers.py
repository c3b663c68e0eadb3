# SPDX-License-Identifier: Apache-2.0
"""The same step in plain PyTorch, as a competent user would write it: what the kernels are measured against.

Every peer wraps a ``torch.optim.SGD``, ``Adam`` or ``AdamW`` and does one whole step of SAM, mSAM or F-SAM in

    loss = peer.step(closures)

``closures`` holds one callable per micro-batch, all of equal weight. Each runs a forward and a backward into ``.grad``,
which is None when it is called, returns the loss, and is called twice, at w and at w + e:

    e_i = rho * d_i / (||d_i|| + 1e-12)          d_i = g_i (SAM), or g_i - sigma * ema (F-SAM)
    ema <- lmbda * ema + (1 - lmbda) * g_i       after its old value was used; it begins as the first g (whose d is g)
    w   <- base optimizer(w, mean_i grad L_i(w + e_i))

It returns the mean loss at w and leaves ``.grad`` None. A peer may write into the gradients that it is given. What
needs more care than a benchmark or a demo takes is left out: parameters without a gradient, uneven micro-batches,
several parameter groups.

Peers, by name in ``PEERS``:

* ``loop``: one parameter at a time, after the most copied implementation, davda54/sam.
* ``foreach``: ``torch._foreach_*`` lists, no synchronisation with the host, base optimizer with ``foreach=True``.
* ``foreach+fused``: the same around torch's own fused base optimizer, ``fused=True``.
* ``compile``: ``torch.compile`` over perturb, and over restore and update together.
* ``compile max-autotune``: the same in mode "max-autotune-no-cudagraphs"; for GPUs.
* ``compile cudagraphs``: the same in mode "reduce-overhead", which replays CUDA graphs; for GPUs.
* ``pytorch_optimizer``: ``SAM`` and ``FriendlySAM`` of that package; it knows no micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

Closures = Sequence[Callable[[], Tensor]]

EPS = 1e-12


class Peer:
    """One way to write the step; subclasses say how.

    Args:
        base: a torch optimizer over one parameter group, made with the class's ``base_options``.
        rho: radius of the perturbation.
        friendly: F-SAM instead of SAM.
        sigma, lmbda: F-SAM's share of the mean gradient that is taken out, and the decay of that mean.
    """

    base_options: dict = {}
    micro_batches = True
    for_cpu = True

    def __init__(
        self, base: Optimizer, *, rho: float = 0.05, friendly: bool = False, sigma: float = 1.0, lmbda: float = 0.9
    ):
        (group,) = base.param_groups
        self.base, self.params = base, list(group["params"])
        self.rho, self.friendly, self.sigma, self.lmbda = rho, friendly, sigma, lmbda

    def step(self, closures: Closures) -> Tensor:
        raise NotImplementedError


def _mean(losses: list[Tensor]) -> Tensor:
    return losses[0].detach() if len(losses) == 1 else torch.stack(losses).mean()


class Loop(Peer):
    """A Python loop over the parameters, one small operator after the other.

    As in davda54/sam, but for two things that it does at needless cost: the copy of the weights stays in the state
    instead of being cloned in every step, and the gradient is not multiplied by 1.0 before its norm is taken.
    """

    base_options = {"foreach": False}

    def __init__(self, base: Optimizer, **options):
        super().__init__(base, **options)
        self.state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self.params}

    @torch.no_grad()
    def step(self, closures: Closures) -> Tensor:
        losses = []
        for i, closure in enumerate(closures):
            with torch.enable_grad():
                losses.append(closure())
            if self.friendly:
                self._subtract_ema()
            self._first_step()
            with torch.enable_grad():
                closure()
            for p in self.params:
                state = self.state[p]
                p.copy_(state["old_p"])
                if len(closures) > 1:
                    if i == 0:
                        state["acc"] = p.grad
                    else:
                        state["acc"].add_(p.grad)
                    p.grad = None
        if len(closures) > 1:
            for p in self.params:
                p.grad = self.state[p].pop("acc").div_(len(closures))
        self.base.step()
        self.base.zero_grad()
        return _mean(losses)

    def _subtract_ema(self) -> None:
        for p in self.params:
            state = self.state[p]
            if "ema" not in state:
                state["ema"] = p.grad.clone()
            else:
                residual = torch.sub(p.grad, state["ema"], alpha=self.sigma)
                state["ema"].mul_(self.lmbda).add_(p.grad, alpha=1 - self.lmbda)
                p.grad = residual

    def _first_step(self) -> None:
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in self.params]), p=2)
        scale = self.rho / (norm + EPS)
        for p in self.params:
            state = self.state[p]
            if "old_p" not in state:
                state["old_p"] = torch.empty_like(p)
            state["old_p"].copy_(p)
            e_w = p.grad * scale
            p.add_(e_w)
            p.grad = None


class Foreach(Peer):
    """Whole lists at a time. Buffers are kept, gradients overwritten where that saves one, the host reads nothing."""

    base_options = {"foreach": True}

    def __init__(self, base: Optimizer, **options):
        super().__init__(base, **options)
        self.saved: list[Tensor] | None = None
        self.ema: list[Tensor] | None = None

    @torch.no_grad()
    def step(self, closures: Closures) -> Tensor:
        losses, acc = [], []
        for i, closure in enumerate(closures):
            with torch.enable_grad():
                losses.append(closure())
            self._perturb(self._take_grads(), first=i == 0)
            with torch.enable_grad():
                closure()
            torch._foreach_copy_(self.params, self.saved)
            if len(closures) > 1:
                if i == 0:
                    acc = self._take_grads()
                else:
                    torch._foreach_add_(acc, self._take_grads())
        if len(closures) > 1:
            torch._foreach_mul_(acc, 1 / len(closures))
            for p, g in zip(self.params, acc, strict=True):
                p.grad = g
        self.base.step()
        self.base.zero_grad()
        return _mean(losses)

    def _take_grads(self) -> list[Tensor]:
        grads = []
        for p in self.params:
            grads.append(p.grad)
            p.grad = None
        return grads

    def _perturb(self, grads: list[Tensor], *, first: bool) -> None:
        if self.friendly:
            self._subtract_ema(grads)
        if self.saved is None:
            self.saved = [torch.empty_like(p) for p in self.params]
        if first:
            torch._foreach_copy_(self.saved, self.params)
        wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=wide)))
        scale = self.rho / (norm + EPS)
        if grads[0].dtype == wide and not grads[0].is_cuda:
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
            raw = torch._foreach_clone(grads)
            torch._foreach_sub_(grads, self.ema, alpha=self.sigma)
            torch._foreach_lerp_(self.ema, raw, 1 - self.lmbda)


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
        self.steps = 0
        wide = torch.promote_types(self.params[0].dtype, torch.float32)
        self.c, self.step_size, self.shrink, self.correction = (
            torch.zeros((), dtype=wide, device=self.params[0].device) for _ in range(4)
        )

    def _run(self, function: Callable, *args) -> None:
        key = function, self.mode
        if key not in self._compiled:
            self._compiled[key] = torch.compile(function, fullgraph=True, dynamic=False, mode=self.mode)
        self._compiled[key](*args)

    @torch.no_grad()
    def step(self, closures: Closures) -> Tensor:
        params = self.weights
        losses, acc, count = [], None, len(closures)
        for i, closure in enumerate(closures):
            with torch.enable_grad():
                losses.append(closure())
            self._perturb(params, self._take_grads(), self.saved if i == 0 else None)
            with torch.enable_grad():
                closure()
            grads = self._take_grads()
            if i + 1 < count:
                if i == 0:
                    acc = self._accumulator(grads)
                    torch._foreach_copy_(params, self.saved)
                else:
                    self._run(_restore_add, params, self.saved, acc, grads)
        self.c.fill_(1 / count)
        self._update(params, acc, grads)
        return _mean(losses)

    _take_grads = Foreach._take_grads

    def _accumulator(self, grads: list[Tensor]) -> list[Tensor]:
        return grads

    def _perturb(self, params: list[Tensor], grads: list[Tensor], saved: list[Tensor] | None) -> None:
        if not self.friendly:
            self._run(_perturb, params, grads, saved, self.rho)
            return
        begins = self.steps == 0 and saved is not None
        self._run(_perturb_friendly, params, grads, saved, self.ema, self.rho, self.sigma, self.lmbda)
        if begins:
            torch._foreach_copy_(self.ema, grads)

    def _update(self, params: list[Tensor], acc: list[Tensor] | None, grads: list[Tensor]) -> None:
        (group,) = self.base.param_groups
        self.steps += 1
        lr, decay = group["lr"], group["weight_decay"]
        if not self.adam:
            self.step_size.fill_(lr)
            args = (self.state[0], self.step_size, decay, group["momentum"])
            self._run(_update_sgd, params, self.saved, acc, grads, self.c, *args)
            return
        beta1, beta2 = group["betas"]
        decoupled = isinstance(self.base, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        self.step_size.fill_(lr / (1 - beta1**self.steps))
        self.shrink.fill_(1 - lr * decay if decoupled else 1)
        self.correction.fill_((1 - beta2**self.steps) ** 0.5)
        args = (*self.state, self.step_size, self.shrink, self.correction, 0.0 if decoupled else decay)
        self._run(_update_adam, params, self.saved, acc, grads, self.c, *args, beta1, beta2, group["eps"])


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

    def _accumulator(self, grads: list[Tensor]) -> list[Tensor]:
        if self.acc is None:
            self.acc = [torch.empty_like(g) for g in grads]
            self._stay(self.acc)
        torch._foreach_copy_(self.acc, grads)
        return self.acc


def _norm(tensors: list[Tensor]) -> Tensor:
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    if tensors[0].is_cuda:
        # A reduction per tensor would be a launch per tensor; torch's list operator takes few.
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)))
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, dtype=wide) for t in tensors]))


# List operators: on a GPU the compiler fuses them across tensors as well, into few launches.


def _perturb(params, grads, saved, rho):
    scale = rho / (_norm(grads) + EPS)
    if saved is not None:
        torch._foreach_copy_(saved, params)
    torch._foreach_add_(params, torch._foreach_mul(grads, scale))


def _perturb_friendly(params, grads, saved, ema, rho, sigma, lmbda):
    residual = torch._foreach_sub(grads, torch._foreach_mul(ema, sigma))
    scale = rho / (_norm(residual) + EPS)
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
    """``SAM`` and ``FriendlySAM`` of the package pytorch_optimizer, used as its documentation shows."""

    micro_batches = False

    def __init__(self, base: Optimizer, **options):
        super().__init__(base, **options)
        import pytorch_optimizer

        kwargs = {k: v for k, v in base.defaults.items() if k in ("lr", "momentum", "weight_decay", "betas", "eps")}
        if self.friendly:
            kwargs.update(sigma=self.sigma, lmbda=self.lmbda)
        kind = pytorch_optimizer.FriendlySAM if self.friendly else pytorch_optimizer.SAM
        self.base = kind(self.params, type(base), rho=self.rho, **kwargs)

    @torch.no_grad()
    def step(self, closures: Closures) -> Tensor:
        (closure,) = closures
        with torch.enable_grad():
            loss = closure()
        self.base.step(closure)
        self.base.zero_grad()
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
