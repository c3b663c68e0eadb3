// SPDX-License-Identifier: Apache-2.0
#include "parameters.h"

#include <c10/core/InferenceMode.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "checks.h"

namespace py = pybind11;

namespace msam {

// The memory of lists that are gone, for those to come. A step frees hundreds of small tensors, and the next larger piece of
// memory that glibc is asked for waits until all of them are merged. Whoever makes or frees a list holds the GIL.
static std::vector<std::vector<at::Tensor>>& spare() {
  static auto* lists = new std::vector<std::vector<at::Tensor>>;  // never freed: Python may outlive what is static
  return *lists;
}
constexpr size_t kSpare = 8;

static PyTypeObject* tensors_type;  // there from define_parameters on, for good

// An empty list with room for so many.
static py::object new_tensors(size_t size) {
  auto* self = PyObject_New(Tensors, tensors_type);
  if (!self) throw py::error_already_set();
  new (&self->all) std::vector<at::Tensor>;
  if (!spare().empty()) {
    self->all = std::move(spare().back());
    spare().pop_back();
  }
  self->all.reserve(size);
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(self));
}
static std::vector<at::Tensor>& tensors_in(PyObject* self) { return reinterpret_cast<Tensors*>(self)->all; }

static void free_tensors(PyObject* self) {
  auto& all = tensors_in(self);
  all.clear();
  if (all.capacity() && spare().size() < kSpare) spare().push_back(std::move(all));
  all.~vector();
  PyObject_Free(self);
  Py_DECREF(tensors_type);
}
static Py_ssize_t count_tensors(PyObject* self) { return Py_ssize_t(tensors_in(self).size()); }
static PyObject* get_tensor(PyObject* self, Py_ssize_t i) {
  const auto& all = tensors_in(self);
  if (i >= 0 && size_t(i) < all.size()) return THPVariable_Wrap(all[i]);
  PyErr_Format(PyExc_IndexError, "there are %zu tensors", all.size());
  return nullptr;
}
static PyObject* get_tensors(PyObject* self, PyObject* index) {  // by an integer of either sign, or a slice
  if (PyIndex_Check(index)) {
    const Py_ssize_t i = PyNumber_AsSsize_t(index, PyExc_IndexError);
    if (i == -1 && PyErr_Occurred()) return nullptr;
    return get_tensor(self, i < 0 ? i + count_tensors(self) : i);
  }
  PyObject* list = PySequence_List(self);
  PyObject* found = list ? PyObject_GetItem(list, index) : nullptr;
  Py_XDECREF(list);
  return found;
}

static PyTypeObject* make_tensors_type() {
  static const char doc[] = "Tensors that become Python objects only where Python looks at them.";
  static PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&free_tensors)},
                                {Py_sq_length, reinterpret_cast<void*>(&count_tensors)},
                                {Py_sq_item, reinterpret_cast<void*>(&get_tensor)},
                                {Py_mp_subscript, reinterpret_cast<void*>(&get_tensors)},
                                {Py_tp_doc, const_cast<char*>(doc)},
                                {0, nullptr}};
  static PyType_Spec spec = {"msam_kernels.Tensors", sizeof(Tensors), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (!type) throw py::error_already_set();
  return reinterpret_cast<PyTypeObject*>(type);
}

TensorsOf::TensorsOf(py::handle sequence, bool or_none) {
  if (Py_TYPE(sequence.ptr()) == tensors_type) {
    own_ = tensors_in(sequence.ptr());
    return;
  }
  TORCH_CHECK_TYPE(PyList_Check(sequence.ptr()), "expected a list of tensors, got ", Py_TYPE(sequence.ptr())->tp_name);
  made_ = true;
  const Py_ssize_t size = PyList_GET_SIZE(sequence.ptr());
  borrowed_.reserve(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* t = PyList_GET_ITEM(sequence.ptr(), i);
    if (or_none && t == Py_None) {
      borrowed_.emplace_back();
    } else if (THPVariable_Check(t)) {
      borrowed_.push_back(Traits::createBorrow(THPVariable_Unpack(t)));
    } else {
      release();
      TORCH_CHECK_TYPE(false, "expected a list of tensors, got ", Py_TYPE(t)->tp_name, " in it");
    }
  }
}

void TensorsOf::release() {
  for (at::Tensor& t : borrowed_) Traits::destroyBorrow(t);
  borrowed_.clear();
}

namespace {

// After a forward and a backward pass no cache holds what is read of a parameter: its Python object, which leads to the tensor,
// which leads to its storage, its version and its autograd data, which leads to its gradient, and that to a storage. Each is
// asked for some iterations ahead.
constexpr Py_ssize_t kAhead = 4;

template <class T>
void fetch(const T* p) {
#if defined(__GNUC__) || defined(__clang__)
  for (size_t byte = 0; byte < sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
#endif
}

// Where a tensor's version is counted; VariableVersion is a pointer to it, which it does not show.
const void* version_of(const at::TensorImpl* t) {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*));
  return *reinterpret_cast<const void* const*>(&t->version_counter());
}

// Torch's own way to it is two calls, of which one is virtual.
at::Tensor* grad_of(const at::TensorImpl* t) {
  auto* autograd = static_cast<torch::autograd::AutogradMeta*>(t->autograd_meta());
  return autograd ? &autograd->grad_ : nullptr;
}

// visit(object, grad) for every item, until it returns false. `grad`: where the object's gradient is, null where it is no tensor
// or has none, or they are not asked for, `of_grads`.
template <class Visit>
bool each(PyObject* const* items, Py_ssize_t size, bool of_grads, const Visit& visit) {
  struct Ahead {
    const at::TensorImpl* tensor = nullptr;
    at::Tensor* grad = nullptr;
  };
  constexpr Py_ssize_t kStages = 5, kRing = 32;
  static_assert(kStages * kAhead < kRing);
  Ahead ring[kRing];
  for (Py_ssize_t i = -kStages * kAhead; i < size; ++i) {
    const auto ahead = [&](Py_ssize_t stages) {
      const Py_ssize_t k = i + stages * kAhead;
      return k >= 0 && k < size ? &ring[k % kRing] : nullptr;
    };
    if (ahead(5)) fetch(reinterpret_cast<const THPVariable*>(items[i + 5 * kAhead]));
    if (Ahead* a = ahead(4)) {
      PyObject* p = items[i + 4 * kAhead];
      *a = {THPVariable_Check(p) ? THPVariable_Unpack(p).unsafeGetTensorImpl() : nullptr, nullptr};
      if (a->tensor) fetch(a->tensor);
    }
    if (Ahead* a = ahead(3); a && a->tensor) {
      fetch(a->tensor->unsafe_storage().unsafeGetStorageImpl());
      if (of_grads && (a->grad = grad_of(a->tensor))) {
        fetch(a->grad);
        fetch(static_cast<const uint64_t*>(version_of(a->tensor)));
      }
    }
    if (Ahead* a = ahead(2); a && a->grad && a->grad->defined()) fetch(a->grad->unsafeGetTensorImpl());
    if (Ahead* a = ahead(1); a && a->grad && a->grad->defined())
      fetch(a->grad->unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
    if (i >= 0 && !visit(items[i], ring[i % kRing].grad)) return false;
  }
  return true;
}
template <class Visit>
bool each(const py::list& list, bool of_grads, const Visit& visit) {
  return each(PySequence_Fast_ITEMS(list.ptr()), PyList_GET_SIZE(list.ptr()), of_grads, visit);
}

const at::Tensor& unpacked(PyObject* p, const char* function) {
  TORCH_CHECK(THPVariable_Check(p), function, " takes tensors");
  return THPVariable_Unpack(p);
}

// Same device, dtype and memory order as the parameter, so that both can be walked as one run of memory, which holds the
// values and may be written to.
bool is_regular(const at::Tensor& grad, const at::Tensor& param) {
  if (grad.layout() != at::kStrided || grad.scalar_type() != param.scalar_type() || grad.device() != param.device() ||
      grad.requires_grad() || msam::is_lazy(grad) || (grad.is_inference() && !c10::InferenceMode::is_enabled()))
    return false;
  const at::IntArrayRef sizes = grad.sizes(), strides = grad.strides(), of_sizes = param.sizes(), of_strides = param.strides();
  bool same = sizes.size() == of_sizes.size();
  for (size_t d = 0; same && d < sizes.size(); ++d)
    same = sizes[d] == of_sizes[d] && (sizes[d] == 1 || strides[d] == of_strides[d]);
  return same;
}

// Every p.grad or None; an empty list where all are None.
py::list current_grads(const py::list& params) {
  const bool none = each(params, true, [](PyObject* p, at::Tensor*) { return !unpacked(p, "current_grads").grad().defined(); });
  py::list grads;
  if (!none)
    for (py::handle p : params) grads.append(p.attr("grad"));
  return grads;
}

// Whether another tensor holds a gradient's memory. What autograd.grad returns may be a view whose base it alone holds.
bool is_shared(const at::Tensor& grad) {
  const size_t holders = grad.storage().use_count();
  return holders > 1 && (holders > 2 || !(grad.is_view() && grad._base().use_count() == 1));
}

// Whether it frees its memory itself, so that no other storage has it; one that only stands for an owner names that instead.
bool owns_memory(const c10::Storage& storage) { return storage.data_ptr().get() == storage.data_ptr().get_context(); }

// Tells addresses that come for the first time.
class Addresses {
 public:
  explicit Addresses(size_t most) {
    while ((size_t(1) << bits_) < 2 * most) ++bits_;
    slots_.resize(size_t(1) << bits_, nullptr);
  }
  bool add(const void* address) {
    const size_t mask = slots_.size() - 1;
    size_t k = size_t(reinterpret_cast<uintptr_t>(address) * 0x9E3779B97F4A7C15u >> (64 - bits_));
    while (slots_[k] && slots_[k] != address) k = (k + 1) & mask;
    return std::exchange(slots_[k], address) == nullptr;
  }

 private:
  int bits_ = 4;
  c10::SmallVector<const void*, 512> slots_;
};

// From the first byte of a tensor that has elements to the end of its last one; and its place in a list.
struct Span {
  Span(const at::Tensor& t, size_t index) : first(static_cast<const char*>(t.const_data_ptr())), index(index) {
    const at::IntArrayRef sizes = t.sizes(), strides = t.strides();
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    end = first + (last + 1) * int64_t(t.itemsize());
  }
  bool operator<(const Span& other) const { return first != other.first ? first < other.first : index < other.index; }

  const char *first, *end;
  size_t index;
};

// The indices of all but one of those gradients that have memory in common, and with `whole` of those whose memory another
// tensor holds; Nones are ignored.
py::list without_own_memory(py::handle grads, bool whole) {
  py::list found;
  c10::SmallVector<Span, 256> spans;  // mostly without the heap, see spare()
  const TensorsOf tensors(grads, true);
  const auto has_memory = [](const at::Tensor& grad) { return grad.defined() && grad.has_storage() && grad.numel() != 0; };
  Addresses storages(tensors.list().size());
  const auto is_apart = [&](const at::Tensor& grad) {
    return !has_memory(grad) || (owns_memory(grad.storage()) && storages.add(grad.storage().unsafeGetStorageImpl()) &&
                                 !(whole && is_shared(grad)));
  };
  if (std::all_of(tensors.list().begin(), tensors.list().end(), is_apart)) return found;  // as backward mostly leaves them
  for (size_t i = 0; i < tensors.list().size(); ++i) {
    const at::Tensor& grad = tensors.list()[i];
    if (!has_memory(grad)) continue;
    if (whole && is_shared(grad))
      found.append(i);
    else
      spans.emplace_back(grad, i);
  }
  std::sort(spans.begin(), spans.end());
  const char* end = nullptr;  // of the last one with memory of its own
  for (const Span& span : spans)
    if (span.first < end)
      found.append(span.index);
    else
      end = span.end;
  return found;
}

// p.grad by parameter, None for all where grads is empty. The gradients were some p.grad before: nothing is checked.
void set_grads(const py::list& params, py::handle grads) {
  const TensorsOf tensors(grads, true);
  const at::TensorList list = tensors.list();
  TORCH_CHECK(list.empty() || list.size() == params.size(), "set_grads takes a gradient or None per parameter");
  size_t i = 0;
  each(params, true, [&](PyObject* p, at::Tensor*) {
    at::Tensor& place = unpacked(p, "set_grads").mutable_grad();
    if (list.empty() || !list[i].defined())
      place.reset();
    else if (!place.is_same(list[i]))
      place = list[i];
    ++i;
    return true;
  });
}

// The tensors of all lists, one list after the other.
py::object joined(const py::list& lists) {
  size_t size = 0;
  for (py::handle list : lists) size += py::len(list);
  py::object out = new_tensors(size);
  auto& all = tensors_in(out.ptr());
  for (py::handle list : lists) {
    const TensorsOf tensors(list);
    all.insert(all.end(), tensors.list().begin(), tensors.list().end());
  }
  return out;
}

// Where the tensors of all lists are, one list after the other, as bytes: words, 0 for a tensor that is empty. None where one
// is not as kernels take it: whoever asks finds out what is wrong.
py::object addresses(const py::list& lists, at::ScalarType dtype, at::Device device) {
  c10::SmallVector<int64_t, 512> words;
  for (py::handle list : lists) {
    const TensorsOf tensors(list);
    for (const at::Tensor& t : tensors.list()) {
      if (t.unsafeGetTensorImpl()->is_python_dispatch() || !is_dense(t, dtype, device)) return py::none();
      words.push_back(t.numel() ? reinterpret_cast<int64_t>(t.const_data_ptr()) : 0);
    }
  }
  return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
}

// What a step relies on, as words for comparing: of every group how many tensors it holds, and of each of those which it is
// and, if it is served, its place in the lists of those that are, where its memory is and how it is laid out. Of others nothing
// is asked: they may be of any kind. Before all that, how long the lists are. `count` sees the groups, `parameter` the tensors,
// until one returns false. Groups that hold something else end it too: they are refused, by name, when they are looked at.
template <class Count, class Parameter>
bool all_parameters(const py::list& groups, bool of_grads, const Count& count, const Parameter& parameter) {
  for (py::handle group : groups) {
    const py::object params = py::reinterpret_borrow<py::dict>(group)["params"];
    if (!PyList_Check(params.ptr()) && !PyTuple_Check(params.ptr())) return false;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(params.ptr());
    if (!count(static_cast<int64_t>(size))) return false;
    const auto visit = [&](PyObject* p, at::Tensor* grad) {
      return THPVariable_Check(p) && parameter(p, THPVariable_Unpack(p), grad);
    };
    if (!each(PySequence_Fast_ITEMS(params.ptr()), size, of_grads, visit)) return false;
  }
  return true;
}

// A tensor in those words.
struct Known {
  int64_t tensor, list, index, memory, dtype, dim;  // list < 0 where it is not served, and the rest is missing

  static constexpr int kOther = 2, kServed = 6;
  int64_t words() const { return list < 0 ? kOther : kServed + 2 * dim; }

  // Whether the tensor, which is served, lies so.
  bool lies(const at::Tensor& t) const {
    const at::IntArrayRef now = t.sizes(), strides = t.strides();
    if (tensor != reinterpret_cast<int64_t>(t.unsafeGetTensorImpl()) ||
        memory != reinterpret_cast<int64_t>(t.const_data_ptr()) || dtype != int64_t(t.scalar_type()) ||
        dim != int64_t(now.size()))
      return false;
    const int64_t* of_sizes = &tensor + kServed;
    bool same = true;
    for (int64_t d = 0; d < dim; ++d) same = same && of_sizes[d] == now[d] && of_sizes[dim + d] == strides[d];
    return same;
  }
};
struct Words {
  explicit Words(const py::bytes& known) {
    const auto bytes = std::string_view(known);
    next = reinterpret_cast<const int64_t*>(bytes.data());  // aligned: what memory_layout returned
    end = next + bytes.size() / sizeof(int64_t);
  }
  int64_t left() const { return end - next; }

  const int64_t *next, *end;
};

py::bytes memory_layout(const py::list& groups, const py::list& served) {
  std::vector<int64_t> words{int64_t(served.size())};
  std::unordered_map<const void*, std::pair<int64_t, int64_t>> places;
  for (size_t l = 0; l < served.size(); ++l) {
    const py::list list = served[l];
    words.push_back(int64_t(list.size()));
    for (size_t i = 0; i < list.size(); ++i) places[PyList_GET_ITEM(list.ptr(), i)] = {l, i};
  }
  const auto count = [&](int64_t size) {
    words.push_back(size);
    return true;
  };
  all_parameters(groups, false, count, [&](PyObject* p, const at::Tensor& param, at::Tensor*) {
    const auto place = places.find(p);
    words.push_back(reinterpret_cast<int64_t>(param.unsafeGetTensorImpl()));
    words.push_back(place == places.end() ? -1 : place->second.first);
    if (place == places.end()) return true;
    words.push_back(place->second.second);
    words.push_back(reinterpret_cast<int64_t>(param.const_data_ptr()));
    words.push_back(int64_t(param.scalar_type()));
    words.push_back(param.dim());
    words.insert(words.end(), param.sizes().begin(), param.sizes().end());
    words.insert(words.end(), param.strides().begin(), param.strides().end());
    return true;
  });
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)};
}

// Whether all is as known, and nothing that is not served is trained by now. Meanwhile visit(tensor, known, grad) for what is
// served, see `each`.
template <class Visit>
bool is_as_known(const py::list& groups, Words words, bool of_grads, const Visit& visit) {
  words.next += 1 + *words.next;
  const auto count = [&](int64_t size) { return words.left() && *words.next++ == size; };
  const bool all = all_parameters(groups, of_grads, count, [&](PyObject*, const at::Tensor& param, at::Tensor* grad) {
    if (words.left() < Known::kOther) return false;
    const auto& known = *reinterpret_cast<const Known*>(words.next);
    if (known.tensor != reinterpret_cast<int64_t>(param.unsafeGetTensorImpl())) return false;
    words.next += known.words();
    if (known.list < 0) return !param.requires_grad() && !param.grad().defined();
    const bool same = known.lies(param);
    if (same) visit(param, known, grad);
    return same;
  });
  return all && words.next == words.end;
}

bool has_layout(const py::list& groups, const py::bytes& known) {
  return is_as_known(groups, Words(known), false, [](const at::Tensor&, const Known&, at::Tensor*) {});
}

// Whether one that is served has a gradient; None where not all is as known.
py::object have_grads(const py::list& groups, const py::bytes& known) {
  bool any = false;
  const auto look = [&](const at::Tensor&, const Known&, at::Tensor* grad) { any = any || (grad && grad->defined()); };
  if (!is_as_known(groups, Words(known), true, look)) return py::none();
  return py::bool_(any);
}

// Every p.grad of the served, by list, with the list's placeholder for None; whether all are regular; how many are None. Or
// None where not all is as known. Where all are regular, counts the parameters that have one as modified in place and, with
// `clear`, makes every p.grad None.
py::object collect_grads(const py::list& groups, const py::bytes& known, const py::list& placeholders, bool clear) {
  const Words words(known);
  TORCH_CHECK(int64_t(placeholders.size()) == words.next[0], "collect_grads takes a placeholder for each list of the served");
  struct List {
    std::vector<at::Tensor>& grads;
    const at::Tensor& placeholder;
  };
  py::list lists;
  c10::SmallVector<List, 4> out;
  for (size_t l = 0; l < placeholders.size(); ++l) {
    py::object list = new_tensors(words.next[1 + l]);
    auto& grads = tensors_in(list.ptr());
    grads.resize(words.next[1 + l]);
    out.push_back({grads, unpacked(PyList_GET_ITEM(placeholders.ptr(), l), "collect_grads")});
    lists.append(std::move(list));
  }
  struct Found {
    c10::TensorImpl* param;
    at::Tensor *grad, *place;
  };
  c10::SmallVector<Found, 256> found;  // mostly without the heap, see spare()
  size_t absent = 0;
  bool regular = true;
  const bool as_known = is_as_known(groups, words, true, [&](const at::Tensor& param, const Known& k, at::Tensor* grad) {
    List& list = out[k.list];
    if (grad && grad->defined()) {
      regular = regular && is_regular(*grad, param);
      found.push_back({param.unsafeGetTensorImpl(), grad, &list.grads[k.index]});
    } else {
      ++absent;
      list.grads[k.index] = list.placeholder;
    }
  });
  if (!as_known) return py::none();
  for (const Found& f : found) {
    if (regular) f.param->bump_version();
    if (regular && clear)
      *f.place = std::move(*f.grad);
    else
      *f.place = *f.grad;
  }
  return py::make_tuple(std::move(lists), regular, absent);
}

// Whether the values of a dict, or of a list, are these very entries, and each dict has the very value under its key, or has
// not that key where the value is None; and with a memory_layout of the values, whether they lie so.
bool holds(py::handle whole, const py::list& entries, const py::list& dicts, const py::list& keys, const py::list& values,
           const std::optional<py::bytes>& layout) {
  TORCH_CHECK(dicts.size() == values.size() && keys.size() == values.size(), "holds takes a dict and a key per value");
  const bool is_dict = PyDict_Check(whole.ptr());
  TORCH_CHECK_TYPE(is_dict || PyList_Check(whole.ptr()), "holds takes a dict or a list");
  if (py::len(whole) != entries.size()) return false;
  Py_ssize_t place = 0;
  PyObject* entry;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (!is_dict)
      entry = PyList_GET_ITEM(whole.ptr(), i);
    else if (!PyDict_Next(whole.ptr(), &place, nullptr, &entry))
      return false;
    if (entry != PyList_GET_ITEM(entries.ptr(), i)) return false;
  }
  struct Table {  // of a small dict
    char bytes[128];
  };
  const Py_ssize_t size = Py_ssize_t(values.size());
  PyObject* const* const all = PySequence_Fast_ITEMS(dicts.ptr());
  for (Py_ssize_t i = -2 * kAhead; i < size; ++i) {
    if (i + 2 * kAhead < size) fetch(reinterpret_cast<const PyDictObject*>(all[i + 2 * kAhead]));
    if (const Py_ssize_t next = i + kAhead; next >= 0 && next < size && PyDict_Check(all[next]))
      fetch(reinterpret_cast<const Table*>(reinterpret_cast<const PyDictObject*>(all[next])->ma_keys));
    if (i < 0) continue;
    TORCH_CHECK_TYPE(PyDict_Check(all[i]), "holds takes dicts");
    PyObject* value = PyDict_GetItemWithError(all[i], PyList_GET_ITEM(keys.ptr(), i));
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    if ((value ? value : Py_None) != PyList_GET_ITEM(values.ptr(), i)) return false;
  }
  if (!layout) return true;
  Words words(*layout);
  words.next += 3;  // one list, its length, that of the only group
  return each(values, false, [&](PyObject* value, at::Tensor*) {
    if (words.left() < Known::kServed) return false;
    const auto& known = *reinterpret_cast<const Known*>(words.next);
    words.next += known.words();
    return known.lies(unpacked(value, "holds"));
  });
}

// A function as Python calls it, with as many arguments as it has, by place. The way through pybind11 is in no cache either, and
// costs 1 to 2 us then.
template <auto function>
struct Called;
template <class Result, class... Args, Result (*function)(Args...)>
struct Called<function> {
  static void define(py::module_& m, const char* name, const char* doc) {
    static PyMethodDef method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL, doc};
    PyObject* callable = PyCFunction_NewEx(&method, nullptr, py::str(m.attr("__name__")).ptr());
    if (!callable) throw py::error_already_set();
    m.attr(name) = py::reinterpret_steal<py::object>(callable);
  }

 private:
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    try {
      TORCH_CHECK_TYPE(count == Py_ssize_t(sizeof...(Args)), "expected ", sizeof...(Args), " arguments, got ", count);
      return with(args, std::index_sequence_for<Args...>());
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (...) {
      torch::translate_exception_to_python(std::current_exception());
    }
    return nullptr;
  }
  template <size_t... i>
  static PyObject* with(PyObject* const* args, std::index_sequence<i...>) {
    if constexpr (std::is_void_v<Result>)
      return function(of<std::decay_t<Args>>(args[i])...), py::none().release().ptr();
    else if constexpr (std::is_same_v<Result, bool>)
      return PyBool_FromLong(function(of<std::decay_t<Args>>(args[i])...));
    else
      return function(of<std::decay_t<Args>>(args[i])...).release().ptr();
  }
  template <class T>
  static T of(PyObject* o) {
    if constexpr (std::is_same_v<T, std::optional<py::bytes>>) {
      return o == Py_None ? T() : T(of<py::bytes>(o));
    } else if constexpr (std::is_same_v<T, bool>) {
      return o == Py_True;
    } else if constexpr (std::is_same_v<T, py::handle>) {
      return o;
    } else {
      const char* wanted = std::is_same_v<T, py::list> ? "a list" : "bytes";
      TORCH_CHECK_TYPE(T::check_(o), "expected ", wanted, ", got ", Py_TYPE(o)->tp_name);
      return py::reinterpret_borrow<T>(o);
    }
  }
};

}  // namespace

void define_parameters(py::module_& m) {
  tensors_type = make_tensors_type();
  m.attr("Tensors") = py::handle(reinterpret_cast<PyObject*>(tensors_type));
  m.def("addresses", &addresses, "(lists, dtype, device) -> bytes: where the tensors are; None where one is not as it must be");
  Called<&collect_grads>::define(m, "collect_grads",
      "(parameter groups, bytes of memory_layout, placeholders, clear) -> (lists of gradients, regular, absent), or None");
  Called<&have_grads>::define(m, "have_grads",
      "(parameter groups, bytes of memory_layout) -> whether one has a gradient, or None");
  Called<&current_grads>::define(m, "current_grads", "(params) -> every p.grad, or an empty list where all are None");
  Called<&without_own_memory>::define(m, "without_own_memory",
      "(grads, whole) -> the indices of those to copy before they are written to");
  Called<&set_grads>::define(m, "set_grads", "(params, grads): p.grad by parameter, None for all where grads is empty");
  Called<&joined>::define(m, "joined", "(lists) -> the tensors of all of them, one list after the other");
  Called<&memory_layout>::define(m, "memory_layout",
      "(parameter groups, lists of the served) -> bytes that say which they are and where these lie");
  Called<&has_layout>::define(m, "has_layout",
      "(parameter groups, bytes) -> whether they say so still, and no others are trained");
  Called<&holds>::define(m, "holds",
      "(dict or list, entries, dicts, keys, values, layout) -> whether these are its values, and each dict's, and lie so");
}

}  // namespace msam
