// SPDX-License-Identifier: Apache-2.0
#define MSAM_STORAGE half
#include "avx512.h"
