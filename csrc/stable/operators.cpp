// SPDX-License-Identifier: Apache-2.0
// The operators on the CPU, once more: setup.py compiles this file against torch's stable ABI.
#include "../cpu/operators.cpp"
