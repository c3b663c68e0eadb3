# SPDX-License-Identifier: Apache-2.0
"""The same step in JAX, where ``vmap`` over micro-batches and one compiled function are how one writes it.

Two models of ``bench_train.py`` are written here, on the weights of torch's: the MLP and the transformer; and SGD. The step is

    g_i = grad L_i(w)                  vmap over micro-batches
    ĝ_i = grad L_i(w + e_i)            vmap over micro-batches and weights,  e_i = rho * g_i / (||g_i|| + 1e-12)
    w   <- SGD(w, mean_i ĝ_i)

in one ``jax.jit``, which may overwrite the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn

Weights = dict[str, jax.Array]


def linear(w: Weights, name: str, x: jax.Array) -> jax.Array:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def layer_norm(w: Weights, name: str, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def mlp(w: Weights, x: jax.Array) -> jax.Array:
    x = x.reshape(len(x), -1)
    first, second, last = sorted({name.split(".")[0] for name in w}, key=int)
    x = jax.nn.relu(linear(w, first, x))
    return linear(w, last, jax.nn.relu(linear(w, second, x)))


def transformer(layers: int, heads: int, w: Weights, x: jax.Array) -> jax.Array:
    x = w["words.weight"][x] + w["places"]
    length, d = x.shape[-2:]
    causal = jnp.tril(jnp.ones((length, length), bool))
    for i in range(layers):
        of = f"layers.{i}."
        qkv = linear(w, of + "qkv", layer_norm(w, of + "norm1", x)).reshape(*x.shape[:-1], 3, heads, -1)
        q, k, v = (qkv[..., j, :, :].swapaxes(-3, -2) for j in range(3))
        scores = q @ k.swapaxes(-1, -2) / jnp.sqrt(d / heads)
        mixed = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ v
        x = x + linear(w, of + "out", mixed.swapaxes(-3, -2).reshape(x.shape))
        hidden = jax.nn.gelu(linear(w, of + "mlp.0", layer_norm(w, of + "norm2", x)), approximate=False)
        x = x + linear(w, of + "mlp.2", hidden)
    return linear(w, "head", layer_norm(w, "norm", x)).reshape(-1, len(w["head.bias"]))


class Step:
    """``step(x, y)``: one step of mSAM; the mean loss at w.

    Args:
        model: torch's, of which the weights are copied.
        base: torch's SGD, of which the settings are.

    Raises:
        NotImplementedError: a model or an optimizer that is not written here.
    """

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, micro_batches: int, rho: float):
        self.model, self.base = model, base
        if not isinstance(base, torch.optim.SGD):
            raise NotImplementedError(f"{type(base).__name__} is not written in JAX here")
        kind = type(model).__name__
        if kind == "Transformer":
            apply = partial(transformer, len(model.layers), model.layers[0].heads)
        elif isinstance(model, nn.Sequential) and all(isinstance(m, (nn.Flatten, nn.Linear, nn.ReLU)) for m in model):
            apply = mlp
        else:
            raise NotImplementedError(f"{kind} is not written in JAX here")
        self.weights = {name: jnp.array(p.detach().numpy()) for name, p in model.named_parameters()}
        self.momenta = jax.tree.map(jnp.zeros_like, self.weights)
        self.run = jax.jit(partial(one_step, apply, base.defaults, micro_batches, rho), donate_argnums=(0, 1))

    def __call__(self, x: Tensor, y: Tensor) -> jax.Array:
        self.weights, self.momenta, loss = self.run(self.weights, self.momenta, x.numpy(), y.numpy())
        jax.block_until_ready(self.weights)
        return loss

    def write_back(self) -> None:
        """The weights into torch's model."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(torch.tensor(jax.device_get(self.weights[name])))


def one_step(
    apply: Callable[[Weights, jax.Array], jax.Array], settings: dict, m: int, rho: float, w: Weights, momenta: Weights,
    x: jax.Array, y: jax.Array,
) -> tuple[Weights, Weights, jax.Array]:  # fmt: skip
    def loss(w: Weights, x: jax.Array, y: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(apply(w, x))
        return -jnp.take_along_axis(logs, y.reshape(-1, 1), 1).mean()

    def perturbed(g: Weights) -> Weights:
        norm = jnp.sqrt(sum((t * t).sum() for t in jax.tree.leaves(g)))
        return jax.tree.map(lambda p, t: p + rho / (norm + 1e-12) * t, w, g)

    xs, ys = (t.reshape(m, -1, *t.shape[1:]) for t in (x, y))
    losses, at_w = jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(w, xs, ys)
    beside = jax.vmap(jax.grad(loss))(jax.vmap(perturbed)(at_w), xs, ys)
    g = jax.tree.map(lambda t, p: t.mean(0) + settings["weight_decay"] * p, beside, w)
    momenta = jax.tree.map(lambda b, t: settings["momentum"] * b + t, momenta, g)  # from zeros it begins as the first
    return jax.tree.map(lambda p, b: p - settings["lr"] * b, w, momenta), momenta, losses.mean()
