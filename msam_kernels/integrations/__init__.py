# SPDX-License-Identifier: Apache-2.0
"""What frameworks need to run every pass. Each module is for one of them, and imports it; nothing else of the package does.

Accelerate and Fabric need none: ``for xb, yb in msam_kernels.passes(optimizer, x, y)`` is the only line that changes.
"""
