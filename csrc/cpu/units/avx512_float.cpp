// SPDX-License-Identifier: Apache-2.0
#define MSAM_STORAGE float
#include "avx512.h"
