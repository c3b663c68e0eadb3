// SPDX-License-Identifier: Apache-2.0
// Argument checks of the operators: nothing is touched before all of them hold.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <ostream>

#include "segments.h"

namespace msam {

// An argument in a message: its name, or name[index] for a tensor of a list.
struct Label {
  const char* name;
  int64_t index = -1;
};
inline std::ostream& operator<<(std::ostream& out, const Label& label) {
  out << label.name;
  return label.index < 0 ? out : out << "[" << label.index << "]";
}

// Whether torch is to negate or conjugate what the memory holds, or there is no memory, only zeros: kernels do not know.
inline bool is_lazy(const at::Tensor& t) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet keys{Key::Negative, Key::Conjugate, Key::ZeroTensor};
  return t.key_set().has_any(keys);
}

inline void check_device(const at::Tensor& t, Label label, at::Device device) {
  TORCH_CHECK(t.device() == device, label, " must be on ", device,
              " like the table: the tensors of a call must be on one device, got ", device, " and ", t.device());
}

// The byte of its storage that a tensor without gaps reaches.
inline int64_t reach_of(const at::Tensor& t) {
  return t.numel() ? (t.storage_offset() + t.numel()) * int64_t(t.itemsize()) : 0;
}

// That the values of a tensor without gaps are in its memory, all of them.
inline void check_memory(const at::Tensor& t, Label label) {
  TORCH_CHECK(!is_lazy(t), label, " stands for other values than its memory holds: pass it through resolve_neg() and "
              "resolve_conj(), or a clone of it");
  if (t.numel() == 0) return;
  const int64_t there = int64_t(t.storage().nbytes()), reach = reach_of(t);
  TORCH_CHECK(reach <= there, label, " reaches byte ", reach, " of a storage of ", there,
              ": it was freed or shrunk, and must have its size and its values again");
}

// How far the rows of a table reach. The host cannot look at a table on a GPU, so that there nothing is checked against it.
struct Reach {
  const Chunk* rows = nullptr;
  int64_t count = 0;     // of the rows that the host can look at
  int64_t segments = 0;  // each of these four is one more than the largest index
  int64_t groups = 0;
  int64_t flat = 0;      // elements of a flat buffer
  int64_t elements = 0;  // of all rows together
};

inline Reach check_table(const at::Tensor& table, bool readable) {
  TORCH_CHECK(table.dim() == 2 && table.size(1) == kChunkColumns && table.scalar_type() == at::kLong && table.is_contiguous(),
              "table must be a contiguous int64 tensor of shape [rows, ", kChunkColumns, "], got ", table.scalar_type(),
              " of shape ", table.sizes());
  check_memory(table, {"table"});
  Reach reach;
  if (!readable) return reach;
  reach.rows = reinterpret_cast<const Chunk*>(table.const_data_ptr<int64_t>());
  reach.count = table.size(0);
  for (int64_t k = 0; k < reach.count; ++k) {
    const Chunk& c = reach.rows[k];
    const int64_t room = std::numeric_limits<int64_t>::max() - std::max<int64_t>(c.numel, 0);  // no sum may wrap round
    TORCH_CHECK(c.segment >= 0 && c.group >= 0 && c.numel >= 0 && c.begin >= 0 && c.offset >= 0 && c.begin <= room &&
                    c.offset <= room && c.numel <= room - reach.elements,
                "row ", k, " of the table, (segment ", c.segment, ", begin ", c.begin, ", offset ", c.offset, ", numel ",
                c.numel, ", group ", c.group, "), has a negative number or one too large");
    reach.segments = std::max(reach.segments, c.segment + 1);
    reach.groups = std::max(reach.groups, c.group + 1);
    reach.flat = std::max(reach.flat, c.offset + c.numel);
    reach.elements += c.numel;
  }
  return reach;
}

// A tensor of weights, gradients and what is like them.
inline void check_dense(const at::Tensor& t, Label label, at::ScalarType dtype, at::Device device) {
  TORCH_CHECK(t.layout() == at::kStrided, label, " must be strided, got ", t.layout());
  TORCH_CHECK(t.scalar_type() == dtype, label, " must be ", dtype, " like the others, got ", t.scalar_type());
  check_device(t, label, device);
  TORCH_CHECK(t.is_non_overlapping_and_dense(), label, " must be dense in memory, got strides ", t.strides());
  check_memory(t, label);
}

// Whether check_dense would let it pass.
inline bool is_dense(const at::Tensor& t, at::ScalarType dtype, at::Device device) {
  return t.layout() == at::kStrided && t.scalar_type() == dtype && t.device() == device && t.is_non_overlapping_and_dense() &&
         !is_lazy(t) && reach_of(t) <= int64_t(t.numel() ? t.storage().nbytes() : 0);
}

// A tensor of plain numbers.
inline void check_plain(const at::Tensor& t, Label label, at::ScalarType dtype, at::Device device, int64_t dim) {
  TORCH_CHECK(t.layout() == at::kStrided && t.dim() == dim && t.scalar_type() == dtype && t.is_contiguous(), label,
              " must be a contiguous ", dim, "-d ", dtype, " tensor, got ", t.scalar_type(), " of shape ", t.sizes());
  check_device(t, label, device);
  check_memory(t, label);
}

// One tensor per segment, or a stack of several, long enough for every row of the table; an empty one is absent.
inline void check_list(at::TensorList list, const char* name, int64_t first, const Reach& reach, int64_t stack = 1) {
  TORCH_CHECK(int64_t(list.size()) >= reach.segments, name, " has ", list.size(), " tensors, the table names segment ",
              reach.segments - 1);
  for (int64_t k = 0; k < reach.count; ++k) {
    const Chunk& c = reach.rows[k];
    const int64_t size = list[c.segment].numel() / stack;
    TORCH_CHECK(size == 0 || c.begin + c.numel <= size, "row ", k, " of the table reaches element ", c.begin + c.numel,
                " of ", Label{name, first + c.segment}, ", which has ", size);
  }
}

}  // namespace msam
