// SPDX-License-Identifier: Apache-2.0
// From the arguments of an operator to those of its kernels: checks, and pointers that live as long as the call. The same for
// every device.
#pragma once

#include <optional>

#include "arguments.h"
#include "checks.h"
#include "tensor.h"

namespace msam {

inline Storage storage_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kHalf;
    default:
      TORCH_CHECK(false, "dtype must be float32, float64, bfloat16 or float16, got ", dtype);
  }
}

// Of the first tensor that is there.
inline ScalarType dtype_of(TensorList first, TensorList second, const char* names) {
  TORCH_CHECK(!first.empty() || !second.empty(), names, " missing: the lists are empty");
  return (first.empty() ? second : first)[0].scalar_type();
}

class Call {
 public:
  // `readable`: the host can look at the table's rows.
  Call(const Tensor& table, ScalarType dtype, bool readable)
      : table_(table), dtype_(dtype), reach_(check_table(table, readable)) {}
  Call(const Call&) = delete;  // kernels hold pointers into it

  TorchDevice device() const { return table_.device(); }
  int64_t rows() const { return table_.size(0); }
  const Reach& reach() const { return reach_; }
  const Lists& lists() const { return lists_; }

  void begin(Common& a) const {
    a.storage = storage_of(dtype_);
    a.table = reinterpret_cast<const Chunk*>(table_.const_data_ptr<int64_t>());
    a.rows = rows();
  }

  // One tensor per parameter, or a stack of as many micro-batches; `first`: the index of this part of a longer list.
  Place list(TensorList tensors, const char* name, int64_t first = 0, std::optional<int64_t> stack = {}) {
    if (tensors.empty()) return {};
    const int64_t size = int64_t(tensors.size());
    TORCH_CHECK(lists_.count == 0 || lists_.segments == size, name, " has ", size, " tensors, another list ", lists_.segments,
                ": every list has one per parameter");
    for (int k = 0; k < lists_.count && !stack; ++k)  // as where a gradient is what the descent is written to
      if (list_[k] == tensors.data()) return {nullptr, k};
    TORCH_INTERNAL_ASSERT(lists_.count < kLists);
    list_[lists_.count] = tensors.data();
    auto& pointers = pointers_[lists_.count];
    pointers.reserve(size);
    for (int64_t k = 0; k < size; ++k) {
      check_dense(tensors[k], {name, first + k}, dtype_, device());
      pointers.push_back(tensors[k].numel() ? tensors[k].data_ptr() : nullptr);
    }
    if (stack) sizes(tensors, {name, first}, *stack);
    check_list(tensors, name, first, reach_, stack.value_or(1));
    lists_.segments = size;
    lists_.data[lists_.count] = pointers.data();
    return {nullptr, lists_.count++};
  }
  // `terms` has `stacked` lists of stacks of `stack` micro-batches, and `count` others, one after the other.
  void terms(TensorList tensors, int64_t stacked, int64_t stack, Place* stacks, int64_t count, Place* out) {
    const int64_t all = stacked + count;
    TORCH_CHECK(all ? tensors.size() % all == 0 && !tensors.empty() : tensors.empty(),
                "terms must be as many lists of tensors, one after the other, as there are coefficients, ", all, "; got ",
                tensors.size(), " tensors");
    const int64_t size = all ? int64_t(tensors.size()) / all : 0;
    for (int64_t k = 0; k < all; ++k) {
      const TensorList part = tensors.slice(k * size, size);
      if (k < stacked)
        stacks[k] = list(part, "terms", k * size, stack);
      else
        out[k - stacked] = list(part, "terms", k * size);
    }
  }
  // A buffer of the weights' dtype, unless told.
  void* flat(const Tensor& t, Label label) const { return flat(t, label, dtype_); }
  void* flat(const Tensor& t, Label label, ScalarType dtype) const {
    check_dense(t, label, dtype, device());
    TORCH_CHECK(t.numel() >= reach_.flat, label, " has ", t.numel(), " elements, the table reaches ", reach_.flat);
    return t.data_ptr();
  }
  void* flat(const MaybeTensor& t, Label label) const { return t ? flat(*t, label) : nullptr; }
  // Whether it holds masters is told by its dtype.
  void* saved(const Tensor& t, bool& masters) const {
    masters = t.scalar_type() == ScalarType::Float && achieved_of(storage_of(dtype_)) > 1;
    return flat(t, {"saved"}, masters ? ScalarType::Float : dtype_);
  }
  // One flat buffer, or a tensor per parameter.
  Place weights(TensorList tensors, const char* name = "weights") {
    return tensors.size() == 1 ? Place{flat(tensors[0], {name}), -1} : list(tensors, name);
  }

  template <class T>
  T* per_row(const Tensor& t, const char* name, std::optional<int64_t> stack = {}) const {
    check_plain(t, {name}, CppTypeToScalarType<T>::value, device(), stack ? 2 : 1);
    TORCH_CHECK(t.size(-1) == rows(), name, " must have one element per row of the table, ", rows(), ", got ", t.size(-1));
    if (stack) check_stack(t, {name}, *stack);
    return t.mutable_data_ptr<T>();
  }
  template <class T>
  T* per_row(const MaybeTensor& t, const char* name) const {
    return t ? per_row<T>(*t, name) : nullptr;
  }
  const float* flag(const MaybeTensor& t, const char* name) const {
    if (!t) return nullptr;
    check_plain(*t, {name}, ScalarType::Float, device(), t->dim());
    TORCH_CHECK(t->numel() == 1, name, " must have one element, got shape ", t->sizes());
    return t->const_data_ptr<float>();
  }
  unsigned* counter(const MaybeTensor& t, const char* name) const {
    if (!t) return nullptr;
    check_plain(*t, {name}, ScalarType::Int, device(), 1);
    TORCH_CHECK(t->numel() == 1, name, " must have one element, got shape ", t->sizes());
    return reinterpret_cast<unsigned*>(t->mutable_data_ptr<int>());
  }
  const uint8_t* mask(const MaybeTensor& t) const {
    if (!t) return nullptr;
    check_plain(*t, {"mask"}, ScalarType::Byte, device(), 1);
    const int64_t bytes = reach_.flat / 8 + (reach_.flat % 8 != 0);
    TORCH_CHECK(t->numel() >= bytes, "mask has ", t->numel(), " bytes, the table reaches ", bytes);
    return t->const_data_ptr<uint8_t>();
  }
  // A sum by row, or several.
  double* achieved(const Tensor& t, int sums, std::optional<int64_t> stack) const {
    if (sums == 1) return per_row<double>(t, "achieved_sq", stack);
    check_plain(t, {"achieved_sq"}, ScalarType::Double, device(), stack ? 3 : 2);
    TORCH_CHECK(t.size(-2) == sums && t.size(-1) == rows(), "achieved_sq of 16-bit weights must have ", sums,
                " sums for every row of the table, ", rows(), ", got shape ", t.sizes());
    if (stack) check_stack(t, {"achieved_sq"}, *stack);
    return t.mutable_data_ptr<double>();
  }
  const int64_t* noise(const MaybeTensor& t, Storage storage) const {
    if (!t) return nullptr;
    TORCH_CHECK(achieved_of(storage) > 1, "noise is for weights of 16 bits, got ", dtype_, ", where w + e is not rounded");
    check_plain(*t, {"noise"}, ScalarType::Long, device(), 2);
    const int64_t least = std::max(lists_.segments, reach_.segments) + 1;
    TORCH_CHECK(t->size(1) == kNoiseColumns && t->size(0) >= least, "noise must have a row of ", kNoiseColumns,
                " numbers, and one for each parameter, ", least, " in all, got shape ", t->sizes());
    return t->const_data_ptr<int64_t>();
  }
  // One row, or one number, per group.
  const double* per_group(const Tensor& t, const char* name, int64_t dim) const {
    check_plain(t, {name}, ScalarType::Double, device(), dim);
    TORCH_CHECK(t.size(0) >= reach_.groups, name, " has ", t.size(0), " groups, the table names group ", reach_.groups - 1);
    return t.const_data_ptr<double>();
  }
  // [rows, terms] or [terms]; of a stack one for each.
  Sums sums(const Tensor& t, Label label, std::optional<int64_t> stack = {}) const {
    const int64_t more = stack ? 1 : 0, dim = t.dim() == 2 + more ? 2 : 1;
    check_plain(t, label, ScalarType::Double, device(), dim + more);
    TORCH_CHECK(t.numel() > 0, label, " is empty, of shape ", t.sizes());
    if (stack) check_stack(t, label, *stack);
    return {t.const_data_ptr<double>(), dim == 2 ? t.size(-2) : 1, t.size(-1)};
  }

  // What the direction d is made of.
  void direction(Norm& a, TensorList weights_, TensorList grads, const MaybeTensor& ema, double sigma, MaybeDouble eta,
                 std::optional<int64_t> stack, const char* name = "weights") {
    begin(a);
    each(a, stack);
    a.grads = list(grads, "grads", 0, stack);
    a.weights = weights(weights_, name);
    TORCH_CHECK(!eta || !weights_.empty(), "eta needs the weights, and the list of weights is empty");
    a.ema = flat(ema, {"ema"});
    a.sigma = sigma;
    a.adaptive = eta.has_value();
    a.eta = eta.value_or(0);
  }
  // And what w + e is made of, but for the norm.
  void perturbation(Perturb& a, TensorList weights_, TensorList grads, const Tensor& radii, const Tensor& saved_,
                    const Tensor& achieved_sq, const MaybeTensor& status, const MaybeTensor& ema, const MaybeTensor& mask_,
                    const MaybeTensor& noise_, int64_t draw, double sigma, MaybeDouble lmbda, MaybeDouble eta,
                    std::optional<int64_t> stack) {
    TORCH_CHECK(!weights_.empty() && !grads.empty(), "a perturbation needs weights and grads, and one of the lists is empty");
    TORCH_CHECK(status.has_value() != stack.has_value(), "status says how it stands with weights that are perturbed in place, "
                "and stack that they are copies: give one of them");
    direction(a, stack ? TensorList(saved_) : weights_, grads, ema, sigma, eta, stack, stack ? "saved" : "weights");
    if (stack) {
      TORCH_CHECK(weights_.size() == 1, "weights must be one stack of flat buffers, got ", weights_.size(), " tensors");
      check_dense(weights_[0], {"weights"}, dtype_, device());
      check_stack(weights_[0], {"weights"}, *stack);
      check_in_order(weights_[0], {"weights"}, weights_[0].is_contiguous());
      a.stride = weights_[0].numel() / *stack;
      TORCH_CHECK(a.stride >= reach_.flat, "weights has ", a.stride, " elements of a micro-batch, the table reaches ",
                  reach_.flat);
      a.copies = weights_[0].data_ptr();
    } else {
      a.saved = this->saved(saved_, a.masters);
      a.status = per_row<uint8_t>(*status, "status");
    }
    a.radii = per_group(radii, "radii", 2);
    TORCH_CHECK(radii.size(1) == kRadiusColumns, "radii must have ", kRadiusColumns, " columns, got ", radii.size(1));
    a.achieved_sq = achieved(achieved_sq, achieved_of(a.storage), stack);
    a.mask = mask(mask_);
    a.noise = noise(noise_, a.storage);
    TORCH_CHECK(draw >= 0 && draw <= UINT32_MAX, "draw must be a number of 32 bits, got ", draw);
    a.draw = uint32_t(draw);
    a.ema_out = lmbda && ema ? flat(ema, {"ema"}) : nullptr;
    a.lmbda = lmbda.value_or(0);
    a.one_minus_lmbda = 1 - lmbda.value_or(0);
  }

  // The weights' return, and the linear combination.
  void descent(Descent& a, TensorList weights_, TensorList terms_, ArrayRef<double> coefs, TensorList sums_,
               int64_t rescale, const MaybeTensor& norm_sq, const MaybeTensor& saved_, const MaybeTensor& status,
               const MaybeTensor& shares) {
    begin(a);
    TORCH_CHECK(saved_.has_value() == status.has_value(), "saved and status go together: give both or neither");
    a.weights = weights(weights_);
    if (saved_) a.saved = saved(*saved_, a.masters);
    a.status = per_row<uint8_t>(status, "status");
    made_of(a, coefs, sums_, rescale, norm_sq, {});
    if (shares) {
      check_no_masters(a, "shares");
      check_plain(*shares, {"shares"}, ScalarType::Double, device(), 2);
      TORCH_CHECK(shares->numel() > 0 && shares->size(0) <= kVectors, "shares must be of 1 to ", kVectors,
                  " stacks of micro-batches, got shape ", shares->sizes());
      a.stacked = int(shares->size(0)), a.count = shares->size(1), a.shares = shares->const_data_ptr<double>();
    }
    terms(terms_, a.stacked, a.count, a.stacks, a.combination.count, a.terms);
  }
  void weighing(Weigh& a, ArrayRef<double> coefs, TensorList sums_, int64_t rescale, const MaybeTensor& norm_sq) {
    check_plain(table_, {"shares"}, ScalarType::Double, device(), 1);
    a.shares = table_.const_data_ptr<double>();
    a.count = table_.numel();
    made_of(a, coefs, sums_, rescale, norm_sq, a.count);
  }
  // Each of a stack of micro-batches, or the only one.
  void each(Each& a, std::optional<int64_t> stack) const {
    TORCH_CHECK(!stack || (*stack > 0 && *stack <= 65535), "stack must be 1 to 65535 micro-batches, got ", stack.value_or(1));
    a.last = stack.value_or(1);
  }
  void rule(Update& a, TensorList states, int64_t rule, const Tensor& settings, const MaybeTensor& step) {
    TORCH_CHECK(rule == kSgd || rule == kAdam, "rule must be ", int(kSgd), " (SGD) or ", int(kAdam), " (Adam), got ", rule);
    a.rule = Rule(rule);
    a.settings = per_group(settings, "settings", 2);
    a.columns = settings.size(1);
    const int64_t columns = rule == kSgd ? int64_t(kSgdColumns) : int64_t(kAdamColumns);
    TORCH_CHECK(a.columns >= columns, "settings must have ", columns, " columns for this rule, got ", a.columns);
    const int64_t count = int64_t(states.size()), few = rule == kSgd ? 0 : 2;
    TORCH_CHECK(count == few || count == few + 1, rule == kSgd ? "SGD has states [] or [momentum_buffer], got "
                    : "Adam has states [exp_avg, exp_avg_sq] or [exp_avg, exp_avg_sq, max_exp_avg_sq], got ", count);
    for (int64_t k = 0; k < count; ++k) a.states[k] = flat(states[k], {"states", k}, a.masters ? ScalarType::Float : dtype_);
    TORCH_CHECK(count == 0 || step, "states need step, which is missing");
    if (step) {
      check_plain(*step, {"step"}, ScalarType::Float, device(), 1);
      const int64_t least = std::max(lists_.segments, reach_.segments) + 1;
      TORCH_CHECK(lists_.count ? step->numel() == least : step->numel() >= least,
                  "step must have one element per parameter and one more, ", least, ", got ", step->numel());
      a.step = step->mutable_data_ptr<float>();
    }
    for (int64_t k = 0; k < reach_.count; ++k) {
      const double* row = a.settings + reach_.rows[k].group * a.columns;
      TORCH_CHECK(count > few || row[rule == kSgd ? int(kMomentum) : int(kAmsgrad)] == 0,
                  rule == kSgd ? "momentum needs states [momentum_buffer]" : "amsgrad needs a third state, max_exp_avg_sq");
    }
  }

  // What is behind an update's term, where it has rates.
  static TensorList split_ahead(TensorList& terms, const MaybeTensor& rates, ArrayRef<double> coefs,
                                const MaybeTensor& shares) {
    if (!rates) return {};
    TORCH_CHECK(coefs.size() == kCoefficientColumns && !shares && terms.size() % 2 == 0,
                "rates go with one term and one list more behind it, and no shares, got ", coefs.size() / kCoefficientColumns,
                " coefficients for ", terms.size(), " tensors, shares ", shares ? "there" : "missing");
    const TensorList ahead = terms.slice(terms.size() / 2);
    terms = terms.slice(0, terms.size() / 2);
    return ahead;
  }
  void shift(Update& a, TensorList ahead, const MaybeTensor& rates, double factor, const Tensor& settings) {
    if (!rates) return;
    check_no_masters(a, "rates");
    TORCH_CHECK(rates->dim() == 1 && rates->size(0) >= settings.size(0), "rates must have one number per group, ",
                settings.size(0), ", got shape ", rates->sizes());
    a.ahead = list(ahead, "terms", int64_t(ahead.size()));
    a.rates = per_group(*rates, "rates", 1);
    a.factor = factor;
  }

 protected:
  // Without a table: what is like `shares`.
  explicit Call(const Tensor& shares) : table_(shares), dtype_(ScalarType::Double) {}

 private:
  void check_no_masters(const Descent& a, const char* name) const {
    TORCH_CHECK(!a.masters, name, " are not there for masters: saved must be ", dtype_, " like the weights then, got ",
                ScalarType::Float);
  }
  static void check_stack(const Tensor& t, Label label, int64_t stack) {
    TORCH_CHECK(t.dim() > 0 && t.size(0) == stack, label, " must have one row for each of ", stack,
                " micro-batches, got shape ", t.sizes());
  }
  static void check_in_order(const Tensor& t, Label label, bool in_order) {
    TORCH_CHECK(in_order, label, " must have one micro-batch after the other in memory, got strides ", t.strides());
  }
  // The elements of a micro-batch of every stack, which must be the same in all lists.
  void sizes(TensorList tensors, Label label, int64_t stack) {
    sizes_.resize(tensors.size());
    for (const Tensor& t : tensors) {
      int64_t& size = sizes_[&t - tensors.data()];
      if (t.numel()) {
        const Label each{label.name, label.index + (&t - tensors.data())};
        check_stack(t, each, stack);
        check_in_order(t, each, stack == 1 || t.stride(0) * stack == t.numel());
        TORCH_CHECK(size == 0 || size == t.numel() / stack, each, " has ", t.numel() / stack,
                    " elements of a micro-batch, in another list it has ", size);
        size = t.numel() / stack;
      }
    }
    lists_.sizes = sizes_.data();
  }
  void made_of(Coefficients& a, ArrayRef<double> coefs, TensorList sums_, int64_t rescale,
                    const MaybeTensor& norm_sq, std::optional<int64_t> stack) const {
    TORCH_CHECK(coefs.size() % kCoefficientColumns == 0 && coefs.size() <= kTerms * kCoefficientColumns, "coefs must be ",
                kCoefficientColumns, " numbers for each of at most ", kTerms, " terms, got ", coefs.size());
    a.combination.count = int(coefs.size()) / kCoefficientColumns;
    const int64_t rows = sums_of(a, sums_, stack);
    combination(a.combination, coefs, rows, rescale);
    if (norm_sq) a.norm_sq = sums(*norm_sq, {"norm_sq"}, stack);
    TORCH_CHECK(a.norm_sq.rows <= 1, "norm_sq must be one row, got ", a.norm_sq.rows);
  }
  // Into the first places of a.sums; how many rows they are in all.
  int64_t sums_of(Coefficients& a, TensorList tensors, std::optional<int64_t> stack) const {
    TORCH_CHECK(tensors.size() <= kSums, "sums must be at most ", kSums, " tensors, got ", tensors.size());
    int64_t rows = 0;
    for (size_t k = 0; k < tensors.size(); ++k) {
      a.sums[k] = sums(tensors[k], {"sums", int64_t(k)}, stack);
      rows += a.sums[k].rows;
    }
    TORCH_CHECK(rows <= kRows, "sums must be at most ", kRows, " rows in all, got ", rows);
    while (a.combination.gram * (a.combination.gram + 1) / 2 < a.sums[0].rows) ++a.combination.gram;
    const int n = a.combination.gram;
    TORCH_CHECK(n * (n + 1) / 2 == a.sums[0].rows && n <= kVectors && n <= a.combination.count,
                "sums[0] must be the Gram matrix of the first terms, 1, 3 or 6 rows for 1, 2 or 3 of ", a.combination.count,
                ", got ", a.sums[0].rows, " rows");
    return rows;
  }
  static void combination(Combination& out, ArrayRef<double> coefs, int64_t rows, int64_t rescale) {
    for (int k = 0; k < out.count; ++k) {
      const double* row = coefs.data() + k * kCoefficientColumns;
      const double p = row[3], q = row[4];
      const bool there = p >= 0 && p < double(rows) && q >= 0 && q < double(rows);
      TORCH_CHECK(there || row[2] == 0, "coefs name the sums ", p, " and ", q, " for term ", k, ", there are ", rows);
      out.of[k] = {row[0], row[1], row[2], row[6], there ? int(p) : 0, there ? int(q) : 0, row[5] != 0};
    }
    TORCH_CHECK(rescale >= -1 && rescale < rows, "rescale must be -1 or one of the ", rows, " sums, got ", rescale);
    out.rescale = int(rescale);
  }

  const Tensor& table_;
  ScalarType dtype_;
  Reach reach_;
  Lists lists_;
  const Tensor* list_[kLists];
  SmallVector<void*, 256> pointers_[kLists];  // mostly without the heap, see parameters.cpp
  SmallVector<int64_t, 64> sizes_;
};

}  // namespace msam
