# SPDX-License-Identifier: Apache-2.0
"""The parameters of well-known networks: a list of shapes each, in the order of the modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

Shapes = list[tuple[int, ...]]


def cnn() -> Shapes:
    """Seven 3x3 convolutions with BatchNorm and two linear layers: 25 tensors, 59k parameters."""
    shapes, width = [], 1
    for out in (12, 12, 24, 24, 32, 32, 48):
        shapes += [(out, width, 3, 3), (out,), (out,)]
        width = out
    return [*shapes, (96, 4 * width), (96,), (10, 96), (10,)]


def resnet18() -> Shapes:
    """ResNet-18 for ImageNet: 62 tensors, 11.7M parameters."""
    shapes, width = [(64, 3, 7, 7), (64,), (64,)], 64
    for out in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if block == 0 and width != out:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (1000, 512), (1000,)]


def resnet50() -> Shapes:
    """ResNet-50 for ImageNet: 161 tensors, 25.6M parameters."""
    shapes, width = [(64, 3, 7, 7), (64,), (64,)], 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * inner
            for convolution in ((inner, width, 1, 1), (inner, inner, 3, 3), (out, inner, 1, 1)):
                shapes += [convolution, (convolution[0],), (convolution[0],)]
            if block == 0:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (1000, 2048), (1000,)]


def block(d: int) -> Shapes:
    """LayerNorm, attention, LayerNorm, MLP: 12 tensors."""
    return [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]


def vit_b(d: int = 768, layers: int = 12) -> Shapes:
    """ViT-B/16 for ImageNet: 152 tensors, 86.6M parameters."""
    begin = [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,)]
    return [*begin, *(block(d) * layers), (d,), (d,), (1000, d), (1000,)]


def transformer(vocabulary: int, d: int, layers: int, context: int) -> Shapes:
    """A GPT-2 with tied embeddings."""
    return [(vocabulary, d), (context, d), *(block(d) * layers), (d,), (d,)]


SHAPES: dict[str, Callable[[], Shapes]] = {
    "cnn": cnn,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vit_b": vit_b,
    # GPT-2 small with fewer words: 148 tensors, 101.6M parameters.
    "transformer100m": partial(transformer, 20480, 768, 12, 1024),
    # GPT-2 medium: 292 tensors, 354.8M parameters.
    "transformer350m": partial(transformer, 50257, 1024, 24, 1024),
    # GPT-3 XL: 292 tensors, 1.3G parameters.
    "transformer1_3b": partial(transformer, 50257, 2048, 24, 2048),
}
CPU_SHAPES = ("cnn", "resnet18", "transformer100m")
GPU_SHAPES = ("resnet18", "resnet50", "vit_b", "transformer350m", "transformer1_3b")
