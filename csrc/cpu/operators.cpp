// SPDX-License-Identifier: Apache-2.0
// The operators on the CPU: their kernels run over torch's thread pool.
#include "../operators.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "kernels.h"

namespace msam::cpu {
namespace {

// Elements of a piece of work, and those that a thread of its own is worth: with fewer, waking it costs what it saves.
constexpr int64_t kGrain = 32768;
constexpr int64_t kShare = 2 * kGrain;
// Stores past the cache pay once a buffer, or copies of one, no longer fit the one that the cores share.
constexpr int64_t kLargeBytes = int64_t(8) << 20;

using Clock = std::chrono::steady_clock;

// Whether to ask other threads for help. Where one is kept from its core by another process, all wait for it at the end, for
// milliseconds: after a wait that was longer than the work, so many elements are worked on alone, each time twice as many.
// A call that is long itself is always shared.
class Help {
 public:
  bool is_wanted(int64_t elements) {
    const int64_t left = alone_.load(std::memory_order_relaxed);
    if (left <= 0 || elements >= kLong) return true;
    alone_.store(left - elements, std::memory_order_relaxed);
    return false;
  }
  void came(bool in_time) {
    const int64_t next = next_.load(std::memory_order_relaxed);
    if (!in_time) alone_.store(next, std::memory_order_relaxed);
    next_.store(in_time ? kFew : std::min(2 * next, kMany), std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kLong = int64_t(1) << 22, kFew = 8 * kShare, kMany = 512 * kShare;
  std::atomic<int64_t> alone_{0}, next_{kFew};
};
Help help;

double total(const double* terms, int64_t n) {
  Sum<double, true> sum;
  for (int64_t k = 0; k < n; ++k) sum.add(terms[k]);
  return rounded(sum);
}

double total(const Sums& row, int64_t i) { return row.data ? total(row.data + i * row.terms, row.terms) : 0; }

class Device : public Call {
 public:
  Device(const Tensor& table, ScalarType dtype) : Call(table, dtype, table.is_cpu()) {
    TORCH_CHECK(table.is_cpu(), "table must be on the CPU, got ", table.device());
    context_.lists = &lists();
  }

  explicit Device(const Tensor& shares) : Call(shares) {}

  Tensor run(Norm& a, bool stacked) {
    const int64_t count = a.last - a.first;
    const Tensor norm_sq = stacked ? summed(a, kernels(a.storage).norm, {count, 1}) : summed(a, kernels(a.storage).norm, {1});
    context_.norm_sq = norm_sq.const_data_ptr<double>();
    return norm_sq;
  }
  Tensor run(Gram& a, bool stacked) {
    const int64_t count = a.count * (a.count + 1) / 2;
    return stacked ? summed(a, kernels(a.storage).gram, {a.last, count, 1}) : summed(a, kernels(a.storage).gram, {count, 1});
  }
  void run(Perturb& a) {
    SmallVector<double, 16> norm_sq;
    for (int64_t i = 0; i < a.last; ++i) norm_sq.push_back(total(a.norm_sq, i));
    context_.norm_sq = norm_sq.data();
    // Backwards: the end of the gradient, which norm read last, may still be in cache.
    share(a, kernels(a.storage).perturb, true);
  }
  Tensor ascend(Perturb& a, bool stacked) {
    if (a.last == 1 || !a.ema_out) return ascend_at_once(a, stacked);
    // One after the other: whether a gradient enters the EMA, of which the next direction is made, depends on its norm.
    const int64_t count = a.last;
    const Tensor norm_sq = empty_doubles({count, 1});
    double* const achieved_sq = a.achieved_sq;
    for (int64_t i = 0; i < count; ++i) {
      a.first = i, a.last = i + 1, a.achieved_sq = achieved_sq + i * achieved_of(a.storage) * rows();
      norm_sq.mutable_data_ptr<double>()[i] = *ascend_at_once(a, false).const_data_ptr<double>();
    }
    return norm_sq;
  }
  Tensor run(Weigh& a) const {
    const int64_t terms = a.combination.count;
    const Tensor out = empty_doubles({terms, a.count});
    double found[kTerms];
    for (int64_t i = 0; i < a.count; ++i) {
      evaluate(a, i, found);
      for (int64_t k = 0; k < terms; ++k) out.mutable_data_ptr<double>()[k * a.count + i] = found[k] * a.shares[i];
    }
    return out;
  }
  void run(Descend& a) {
    evaluate(a, 0, context_.coefficients);
    share(a, kernels(a.storage).descend);
  }
  void run(Update& a) {
    evaluate(a, 0, context_.coefficients);
    if (a.found_inf && *a.found_inf != 0) a.combination.count = a.stacked = 0;
    share(a, kernels(a.storage).update);
    for (int64_t k = 0; a.step && k < a.rows; ++k)
      if (a.table[k].begin == 0 && has_term(a, a.table[k].segment)) a.step[a.table[k].segment] += 1;
  }

 private:
  Tensor ascend_at_once(Perturb& a, bool stacked) {
    const Tensor norm_sq = run(static_cast<Norm&>(a), stacked);
    share(a, kernels(a.storage).perturb, true);
    return norm_sq;
  }
  // Of micro-batch i.
  static void evaluate(const Coefficients& a, int64_t i, double* out) {
    double sums[kRows] = {};
    int rows = 0;
    for (const Sums& s : a.sums)
      for (int64_t r = 0; r < s.rows; ++r) sums[rows++] = total(s.data + (i * s.rows + r) * s.terms, s.terms);
    coefficients(a.combination, sums, total(a.norm_sq, i), out);
  }
  bool has_term(const Update& a, int64_t segment) const {
    const auto is_there = [&](const Place& p) { return p && lists().data[p.list][segment]; };
    return std::any_of(a.terms, a.terms + a.combination.count, is_there) ||
           std::any_of(a.stacks, a.stacks + a.stacked, is_there);
  }

  // Runs a kernel that leaves a term for every row of the table in each row of a.partials, see put(), and adds them up.
  template <class Arguments>
  Tensor summed(Arguments& a, Kernel<Arguments> kernel, ArrayRef<int64_t> sizes) {
    const int64_t terms = rows() * parts_of(a.storage);
    const Tensor sums = empty_doubles(sizes);
    SmallVector<double, 256> partials(sums.numel() * terms);
    a.partials = partials.data();
    share(a, kernel);
    for (int64_t r = 0; r < sums.numel(); ++r) sums.mutable_data_ptr<double>()[r] = total(a.partials + r * terms, terms);
    return sums;
  }

  // How often every element is worked on: by each micro-batch.
  static int64_t times_of(const Each& a) { return a.last - a.first; }
  static int64_t times_of(const Descent& a) { return std::max<int64_t>(1, a.stacked * a.count); }
  // How many flat buffers are written: copies of w by each micro-batch.
  static int64_t buffers_of(const Perturb& a) { return a.copies ? times_of(a) : 1; }
  static int64_t buffers_of(const Common&) { return 1; }

  // Every thread has an even share of the elements, in pieces of kGrain, and then helps with what others have left: neither
  // memory nor other processes leave the cores equally fast.
  template <class Arguments>
  void share(const Arguments& a, Kernel<Arguments> kernel, bool backwards = false) {
    const int64_t times = times_of(a), elements = reach().elements * times;
    context_.large = reach().elements * buffers_of(a) * bytes_of(a.storage) >= kLargeBytes;
    const int64_t threads = std::min<int64_t>(get_num_threads(), elements / kShare);
    if (threads < 2 || !help.is_wanted(elements)) return kernel(a, context_, 0, rows());
    SmallVector<int64_t, 64> pieces{0};  // where each begins, and the end
    for (int64_t k = 0, sum = 0; k < rows(); ++k) {
      sum += a.table[k].numel * times;
      if (sum >= kGrain || k + 1 == rows()) pieces.push_back(k + 1), sum = 0;
    }
    const int64_t count = int64_t(pieces.size()) - 1;
    struct alignas(64) Share {
      int64_t begin, end;
      std::atomic<int64_t> taken{0};
    };
    std::vector<Share> shares(threads);
    for (int64_t t = 0; t < threads; ++t) shares[t].begin = count * t / threads, shares[t].end = count * (t + 1) / threads;
    const auto start = Clock::now();
    auto done = start;
    parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        for (int64_t k = 0; k < threads; ++k) {
          Share& share = shares[(t + k) % threads];
          for (int64_t p; (p = share.taken.fetch_add(1, std::memory_order_relaxed)) < share.end - share.begin;) {
            const int64_t piece = backwards ? share.end - 1 - p : share.begin + p;
            kernel(a, context_, pieces[piece], pieces[piece + 1]);
          }
        }
      if (first == 0) done = Clock::now();  // the caller's own
    });
    help.came(Clock::now() - done <= done - start);
  }

  Context context_;
};

}  // namespace

MSAM_LIBRARY_IMPL(msam_kernels, CPU, m) { Operators<Device>::implement(m); }

}  // namespace msam::cpu
