# SPDX-License-Identifier: Apache-2.0
"""Fused kernels and one thin optimizer for micro-batch SAM (mSAM), Friendly SAM (F-SAM) and their family."""

from . import flatness, methods
from .compat import SAM
from .optimizer import MicroBatchSAM, passes

__version__ = "0.1.0"

__all__ = ["SAM", "MicroBatchSAM", "flatness", "methods", "passes"]
