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

// The lists of tensors of a call: data[list][segment], null where a parameter is absent. Where a list is of stacks, `sizes` has
// the elements from one micro-batch to the next, by segment.
constexpr int kLists = 2 + kVectors + kTerms;  // weights, out or ahead, stacks, terms
struct Lists {
  void* const* data[kLists] = {};
  int count = 0;
  int64_t segments = 0;
  const int64_t* sizes = nullptr;
};

// A number in both arithmetic types: the host rounds, once.
struct Number {
  double wide = 0;
  float narrow = 0;

  Number(double x = 0) : wide(x), narrow(float(x)) {}
  MSAM_FN void get(double* x) const { *x = wide; }
  MSAM_FN void get(float* x) const { *x = narrow; }
};

// The terms of several sums: rows x terms, of each micro-batch.
struct Sums {
  const double* data = nullptr;
  int64_t rows = 0, terms = 0;
};

// Sums of a perturbation by row: ||e||^2 as it was stored; of 16 bits beside it the product with e before rounding, and that
// one's ||e||^2.
constexpr int kAchieved = 3;
inline int achieved_of(Storage storage) {
  return storage == Storage::kBFloat16 || storage == Storage::kHalf ? kAchieved : 1;
}

// Doubles that a term of a sum takes.
inline int parts_of(Storage storage) { return storage == Storage::kDouble ? kParts<kCareful<double>> : 1; }

struct Common {
  Storage storage;
  const Chunk* table = nullptr;
  int64_t rows = 0;  // of the table
};

// What is done for each of the micro-batches [first, last): of one that is no stack, or of some of a stack. What they leave has
// a place for each of these, beginning with the first.
struct Each : Common {
  int64_t first = 0, last = 1;
};

struct Norm : Each {
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
  bool masters = false;            // of weights of 16 bits, in fp32, are in `saved`
  uint8_t* status = nullptr;       // [rows]
  void* copies = nullptr;          // of a stack: where w + e of micro-batch 0 goes; the weights, w, are only read
  int64_t stride = 0;              // from one to the next
  double* achieved_sq = nullptr;   // [rows] of each, or [kAchieved, rows]
  const int64_t* noise = nullptr;  // [1 + segments, kNoiseColumns]; null where w + e is rounded to nearest
  uint32_t draw = 0;               // of the first micro-batch
  const uint8_t* mask = nullptr;   // a bit for every element of a flat buffer
  void* ema_out = nullptr;         // null where the EMA is only read
  Number lmbda, one_minus_lmbda;
  unsigned* arrived = nullptr;  // one element, zero between calls
};

struct Gram : Each {
  Place terms[kVectors];
  int count = 0;
  double* partials = nullptr;
};

// What coefficients are made of.
struct Coefficients {
  Combination combination;
  Sums sums[kSums], norm_sq;
};

struct Weigh : Coefficients {
  const double* shares = nullptr;  // [count]
  int64_t count = 0;               // of micro-batches
  double* out = nullptr;           // [terms, count]
};

// What descend and update have in common: the weights' return, and the linear combination.
struct Descent : Common, Coefficients {
  Place weights, stacks[kVectors], terms[kTerms];
  int stacked = 0;                 // how many stacks
  int64_t count = 0;               // micro-batches of each
  const double* shares = nullptr;  // their coefficients, [stacked, count]
  void* saved = nullptr;
  bool masters = false;       // see Perturb; the states of an update are in fp32 then, too
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
  Place ahead;  // y of w + factor rates[group] (y - the combination), after the rule
  const double* rates = nullptr;     // [groups]
  double factor = 0;
};

}  // namespace msam
