// SPDX-License-Identifier: Apache-2.0
// The segment table: which part of which parameter a piece of work covers. Plain structs, shared by CPU and CUDA.
#pragma once

#include <cstdint>

namespace msam {

enum class Storage { kFloat, kDouble, kBFloat16, kHalf };
struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

constexpr int64_t bytes_of(Storage storage) {
  return storage == Storage::kDouble ? 8 : storage == Storage::kFloat ? 4 : 2;
}

// One row of the table (int64, built by flat.py): a run of at most CHUNK elements of one parameter.
struct Chunk {
  int64_t segment;  // index into the gradient list
  int64_t begin;    // first element, counted within the parameter
  int64_t offset;   // first element, counted within a flat buffer
  int64_t numel;
  int64_t group;  // parameter group
};
constexpr int64_t kChunkColumns = 5;
static_assert(sizeof(Chunk) == kChunkColumns * sizeof(int64_t), "a chunk is one row of the table");

}  // namespace msam
