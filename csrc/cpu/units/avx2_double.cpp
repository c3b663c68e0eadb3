// SPDX-License-Identifier: Apache-2.0
#define MSAM_STORAGE double
#include "avx2.h"
