// SPDX-License-Identifier: Apache-2.0
// Argument checks of the operators: nothing is touched before all of them hold.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <ostream>

#include "segments.h"
#include "tensor.h"

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

inline void check_device(const Tensor& t, Label label, TorchDevice device) {
  TORCH_CHECK(t.device() == device, label, " must be on ", device,
              " like the table: the tensors of a call must be on one device, got ", device, " and ", t.device());
}

// The byte of its storage that a tensor without gaps reaches.
inline int64_t reach_of(const Tensor& t) {
  return t.numel() ? (t.storage_offset() + t.numel()) * int64_t(t.element_size()) : 0;
}

// That the values of a tensor without gaps are in its memory, all of them.
inline void check_memory(const Tensor& t, Label label) {
  TORCH_CHECK(!is_lazy(t), label, " stands for other values than its memory holds: pass it through resolve_neg() and "
              "resolve_conj(), or a clone of it");
  if (t.numel() == 0) return;
  const int64_t there = storage_bytes(t), reach = reach_of(t);
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

inline Reach check_table(const Tensor& table, bool readable) {
  TORCH_CHECK(table.dim() == 2 && table.size(1) == kChunkColumns && table.scalar_type() == ScalarType::Long &&
                  table.is_contiguous(),
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
inline void check_dense(const Tensor& t, Label label, ScalarType dtype, TorchDevice device) {
  TORCH_CHECK(layout_of(t) == Layout::Strided, label, " must be strided, got ", layout_of(t));
  TORCH_CHECK(t.scalar_type() == dtype, label, " must be ", dtype, " like the others, got ", t.scalar_type());
  check_device(t, label, device);
  TORCH_CHECK(is_non_overlapping_and_dense(t), label, " must be dense in memory, got strides ", t.strides());
  check_memory(t, label);
}

// Whether check_dense would let it pass.
inline bool is_dense(const Tensor& t, ScalarType dtype, TorchDevice device) {
  return layout_of(t) == Layout::Strided && t.scalar_type() == dtype && t.device() == device &&
         is_non_overlapping_and_dense(t) && !is_lazy(t) && reach_of(t) <= (t.numel() ? storage_bytes(t) : 0);
}

// A tensor of plain numbers.
inline void check_plain(const Tensor& t, Label label, ScalarType dtype, TorchDevice device, int64_t dim) {
  TORCH_CHECK(layout_of(t) == Layout::Strided && t.dim() == dim && t.scalar_type() == dtype && t.is_contiguous(), label,
              " must be a contiguous ", dim, "-d ", dtype, " tensor, got ", t.scalar_type(), " of shape ", t.sizes());
  check_device(t, label, device);
  check_memory(t, label);
}

// One tensor per segment, or a stack of several, long enough for every row of the table; an empty one is absent.
inline void check_list(TensorList list, const char* name, int64_t first, const Reach& reach, int64_t stack = 1) {
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
