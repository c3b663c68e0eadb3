// SPDX-License-Identifier: Apache-2.0
// What every processor of the architecture has.
#define MSAM_ISA baseline
#include "../unit.h"
