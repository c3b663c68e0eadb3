// SPDX-License-Identifier: Apache-2.0
// Argument checks of the operators: nothing is touched before all of them hold.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "segments.h"

namespace msam {

inline void check_table(const at::Tensor& chunks) {
  TORCH_CHECK(chunks.dim() == 2 && chunks.size(1) == kChunkColumns && chunks.scalar_type() == at::kLong &&
                  chunks.is_contiguous(),
              "chunks must be a contiguous int64 tensor of shape [n, ", kChunkColumns, "], got ", chunks.scalar_type(),
              " of shape ", chunks.sizes());
}

inline void check_dense(const at::Tensor& t, const char* name, at::ScalarType dtype, at::Device device) {
  TORCH_CHECK(t.layout() == at::kStrided, name, " must be strided, got ", t.layout());
  TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", dtype, " like the weights, got ", t.scalar_type());
  TORCH_CHECK(t.device() == device, name, " must be on ", device, " like the weights, got ", t.device());
  TORCH_CHECK(t.is_non_overlapping_and_dense(), name, " must be dense in memory, got strides ", t.strides());
}

inline void check_device(const at::Tensor& t, const char* name, at::Device device) {
  TORCH_CHECK(t.device() == device, name, " must be on ", device, " like the weights, got ", t.device());
}

// `chunks` are the n rows of the table that the host can look at: none on a GPU.

// One tensor per segment, or a single flat buffer, long enough for every chunk.
inline void check_list(at::TensorList list, const char* name, const Chunk* chunks, int64_t n, bool flat) {
  for (int64_t k = 0; k < n; ++k) {
    const Chunk& c = chunks[k];
    const int64_t index = flat ? 0 : c.segment, begin = flat ? c.offset : c.begin;
    // No sums: begin + numel can wrap round.
    TORCH_CHECK(c.segment >= 0 && begin >= 0 && c.numel >= 0 && index < int64_t(list.size()) &&
                    begin <= list[index].numel() && c.numel <= list[index].numel() - begin,
                "chunk ", k, " reaches past ", name, "[", index, "]");
  }
}

inline void check_flat(const std::optional<at::Tensor>& t, const char* name, const Chunk* chunks, int64_t n,
                       at::ScalarType dtype, at::Device device) {
  if (!t) return;
  check_dense(*t, name, dtype, device);
  check_list(*t, name, chunks, n, true);
}

// A bit for every element of a flat buffer.
inline void check_mask(const std::optional<at::Tensor>& t, const Chunk* chunks, int64_t n) {
  if (!t) return;
  TORCH_CHECK(t->dim() == 1 && t->scalar_type() == at::kByte && t->is_contiguous(), "mask must be a contiguous 1-d uint8 ",
              "tensor, got ", t->scalar_type(), " of shape ", t->sizes());
  for (int64_t k = 0; k < n; ++k)
    TORCH_CHECK((chunks[k].offset + chunks[k].numel + 7) / 8 <= t->numel(), "chunk ", k, " reaches past mask, which has ",
                t->numel(), " bytes");
}

inline void check_hyper(const at::Tensor& hyper, int64_t columns, const Chunk* chunks, int64_t n) {
  TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) >= columns && hyper.scalar_type() == at::kDouble && hyper.is_contiguous(),
              "hyper must be a contiguous float64 tensor of shape [groups, >= ", columns, "], got ", hyper.scalar_type(),
              " of shape ", hyper.sizes());
  for (int64_t k = 0; k < n; ++k)
    TORCH_CHECK(chunks[k].group >= 0 && chunks[k].group < hyper.size(0), "chunk ", k, " names group ", chunks[k].group,
                ", hyper has ", hyper.size(0), " rows");
}

// [segments], indexed by the chunks' segment.
inline void check_per_segment(const std::optional<at::Tensor>& t, const char* name, at::ScalarType dtype,
                              const Chunk* chunks, int64_t n) {
  if (!t) return;
  TORCH_CHECK(t->dim() == 1 && t->scalar_type() == dtype && t->is_contiguous(), name, " must be a contiguous 1-d ",
              dtype, " tensor, got ", t->scalar_type(), " of shape ", t->sizes());
  for (int64_t k = 0; k < n; ++k)
    TORCH_CHECK(chunks[k].segment < t->numel(), "chunk ", k, " names segment ", chunks[k].segment, ", ", name, " has ",
                t->numel());
}

// The lists that grads holds, one for each of coefs.
inline int64_t check_coefs(const std::optional<at::Tensor>& coefs, at::TensorList grads, int64_t most) {
  if (!coefs) return 1;
  TORCH_CHECK(coefs->dim() == 1 && coefs->scalar_type() == at::kDouble && coefs->is_contiguous() &&
                  coefs->numel() >= 1 && coefs->numel() <= most,
              "coefs must be a contiguous float64 tensor of 1 to ", most, " values, got ", coefs->scalar_type(),
              " of shape ", coefs->sizes());
  TORCH_CHECK(!grads.empty() && grads.size() % coefs->numel() == 0, "grads must hold a list of tensors for each of ",
              coefs->numel(), " coefs, got ", grads.size(), " tensors");
  return coefs->numel();
}

inline void check_per_chunk(const at::Tensor& t, const char* name, int64_t n) {
  TORCH_CHECK(t.dim() == 1 && t.numel() == n && t.scalar_type() == at::kDouble && t.is_contiguous(), name,
              " must be a contiguous float64 tensor of shape [", n, "], one value per chunk, got ", t.scalar_type(),
              " of shape ", t.sizes());
}

// The terms of a sum, at least one.
inline void check_sum(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 1 && t.numel() > 0 && t.scalar_type() == at::kDouble && t.is_contiguous(), name,
              " must be a contiguous 1-d float64 tensor, got ", t.scalar_type(), " of shape ", t.sizes());
}

}  // namespace msam
