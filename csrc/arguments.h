// SPDX-License-Identifier: Apache-2.0
// Arguments of the kernels, the same for every device. Knows no torch. Pointers are to the device's memory, but for those in
// Lists, which the host holds.
#pragma once

#include <cstdint>

#include "segments.h"
#include "update_math.h"

namespace msam {

// A tensor argument: one flat buffer, or a list by segment; which of the lists it is.
struct Place {
  void* flat = nullptr;
  int list = -1;

  MSAM_FN explicit operator bool() const { return flat != nullptr || list >= 0; }
};

// The lists of tensors of a call: data[list][segment], null where a parameter is absent.
constexpr int kLists = 2 + kTerms;  // weights, out, terms
struct Lists {
  void* const* data[kLists] = {};
  int count = 0;
  int64_t segments = 0;
};

// A number in both arithmetic types: the host rounds, once.
struct Number {
  double wide = 0;
  float narrow = 0;

  Number(double x = 0) : wide(x), narrow(float(x)) {}
  MSAM_FN void get(double* x) const { *x = wide; }
  MSAM_FN void get(float* x) const { *x = narrow; }
};

// The terms of several sums: rows x terms.
struct Sums {
  const double* data = nullptr;
  int64_t rows = 0, terms = 0;
};

// Doubles that a term of a sum takes.
inline int parts_of(Storage storage) { return storage == Storage::kDouble ? kParts<kCareful<double>> : 1; }

struct Common {
  Storage storage;
  const Chunk* table = nullptr;
  int64_t rows = 0;  // of the table
};

struct Norm : Common {
  Place weights, grads;
  const void* ema = nullptr;
  Number sigma, eta;
  bool adaptive = false;
  double* partials = nullptr;
};

struct Perturb : Norm {
  Sums norm_sq;  // one row
  const double* radii = nullptr;  // [groups, kRadiusColumns]
  void* saved = nullptr;
  uint8_t* status = nullptr;       // [rows]
  double* achieved_sq = nullptr;   // [rows]
  const uint8_t* mask = nullptr;   // a bit for every element of a flat buffer
  void* ema_out = nullptr;         // null where the EMA is only read
  Number lmbda, one_minus_lmbda;
  unsigned* arrived = nullptr;  // one element, zero between calls
};

struct Gram : Common {
  Place terms[kVectors];
  int count = 0;
  double* partials = nullptr;
};

// What descend and update have in common: the weights' return, and the linear combination.
struct Descent : Common {
  Place weights, terms[kTerms];
  Combination combination;
  Sums sums[kSums], norm_sq;
  const void* saved = nullptr;
  uint8_t* status = nullptr;  // [rows]
};

struct Descend : Descent {
  Place out;
  bool last = true;
  double* out_sq = nullptr;  // [rows]
};

struct Update : Descent {
  Rule rule;
  const double* settings = nullptr;  // [groups, columns]
  int64_t columns = 0;
  void* states[kStates] = {};
  float* step = nullptr;  // [segments + 1]
  const float* found_inf = nullptr;  // one element; where it is not 0 no row has a term
};

}  // namespace msam
