// SPDX-License-Identifier: Apache-2.0
// Work in pieces, done by this thread and by those of torch that come in time.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace msam::cpu {

// Every thread has an even share of the pieces, and then helps with what others have left: neither memory nor other processes
// leave the cores equally fast.
class Pieces {
 public:
  Pieces(int64_t count, int64_t threads) : count_(count), threads_(threads), shares_(new Share[threads]) {
    for (int64_t t = 0; t < threads; ++t) shares_[t].next = begin(t);
  }

  // Takes pieces, those of share t first, until none is left. Where none is, `run` is not touched: it may be gone.
  template <class Run>
  void work(int64_t t, const Run& run) {
    for (int64_t k = 0; k < threads_; ++k) {
      const int64_t share = (t + k) % threads_;
      for (int64_t p; (p = shares_[share].next.fetch_add(1, std::memory_order_relaxed)) < begin(share + 1);) {
        run(p);
        done_.fetch_add(1, std::memory_order_release);
      }
    }
  }
  // All have been taken: until the last ones are done, which is soon.
  void wait() const {
    while (done_.load(std::memory_order_acquire) < count_) std::this_thread::yield();
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
  };
  int64_t begin(int64_t t) const { return count_ * t / threads_; }

  int64_t count_, threads_;
  std::unique_ptr<Share[]> shares_;
  std::atomic<int64_t> done_{0};
};

// run(p) for every p below count, once, by at most so many threads. Unlike a region of OpenMP it does not wait for threads that
// have not come: one whose core another process has, or that a fork has left behind, may come when all is done.
template <class Run>
void in_pieces(int64_t count, int64_t threads, const Run& run) {
  const auto pieces = std::make_shared<Pieces>(count, threads);
  for (int64_t t = 1; t < threads; ++t) at::launch([pieces, t, &run] { pieces->work(t, run); });
  pieces->work(0, run);
  pieces->wait();
}

}  // namespace msam::cpu
