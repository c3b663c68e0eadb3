// SPDX-License-Identifier: Apache-2.0
#define MSAM_STORAGE bf16
#include "baseline.h"
