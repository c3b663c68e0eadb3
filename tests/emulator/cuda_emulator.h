// SPDX-License-Identifier: Apache-2.0
// As much of CUDA as csrc/cuda uses, for a C++ compiler on the CPU: every thread of a block is a fiber, every barrier and
// shuffle a place where fibers wait for each other. Stops the process where threads of a block wait at different barriers.
//
// A block's fibers share an operating system thread, so that __shared__ is thread_local. Blocks run one after the other; one
// that waits runs those that it may wait for, which a GPU has begun before it. Fibers and blocks run in an order that
// MSAM_EMULATOR_ORDER shuffles: results that depend on it lack a barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __isGlobal(p) true
#define __builtin_assume(condition)

// ---- types ------------------------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(4) __nv_bfloat162 {
  uint16_t x, y;
};
struct alignas(4) __half2 {
  _Float16 x, y;
};

// ---- one block ----------------------------------------------------------------------------------------------------

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

struct Barrier {
  int waiting = 0, line = 0;
  uint64_t passed = 0;
};

class Block {
 public:
  static constexpr size_t kStack = 192 << 10;
  static constexpr int kMostThreads = 256;

  void run(unsigned threads, const std::vector<unsigned>& order, const std::function<void()>& body) {
    threads_ = threads, body_ = &body, finished_ = 0;
    whole_ = {};
    for (auto& w : warps_) w = {};
    if (!stacks_) stacks_.reset(new char[kStack * kMostThreads]);  // not cleared: pages that nobody uses cost nothing
    fibers_.assign(threads, {});
    while (finished_ < threads) {
      for (unsigned t : order) {
        if (fibers_[t].done) continue;
        threadIdx.x = current_ = t;
        if (_setjmp(scheduler_)) continue;
        if (fibers_[t].started) _longjmp(fibers_[t].where, 1);
        fibers_[t].started = true;
        ucontext_t context, back;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks_.get() + kStack * t;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        const auto self = reinterpret_cast<uintptr_t>(this);
        makecontext(&context, reinterpret_cast<void (*)()>(&Block::enter), 2, unsigned(self), unsigned(self >> 32));
        swapcontext(&back, &context);
      }
    }
  }

  void sync_block(int line) { wait(whole_, threads_, line); }
  void sync_warp(int line) { wait(warps_[current_ / 32], lanes(), line); }
  template <class T>
  T shuffle_down(T x, unsigned distance, int line) {
    const unsigned warp = current_ / 32, lane = current_ % 32, lanes = this->lanes();
    static_assert(sizeof(T) <= sizeof(double), "one value");
    std::memcpy(&values_[current_], &x, sizeof x);
    wait(warps_[warp], lanes, line);
    if (lane + distance < lanes) std::memcpy(&x, &values_[current_ + distance], sizeof x);
    wait(warps_[warp], lanes, -line);
    return x;
  }

  static Block*& here() {
    static thread_local Block* block = nullptr;
    return block;
  }

 private:
  struct Fiber {
    jmp_buf where;
    bool started = false, done = false;
  };

  unsigned lanes() const { return std::min(threads_ - current_ / 32 * 32, 32u); }  // of this thread's warp
  static void enter(unsigned low, unsigned high) {
    auto* block = reinterpret_cast<Block*>(uintptr_t(low) | uintptr_t(high) << 32);
    (*block->body_)();
    block->fibers_[block->current_].done = true;
    ++block->finished_;
    if (block->whole_.waiting) fail("a thread ended while others wait at a barrier");
    for (const auto& w : block->warps_)
      if (w.waiting && &w == &block->warps_[block->current_ / 32]) fail("a thread ended while its warp waits for it");
    _longjmp(block->scheduler_, 1);
  }
  void wait(Barrier& b, unsigned count, int line) {
    if (b.waiting && b.line != line) fail("threads wait at different barriers");
    b.line = line;
    const uint64_t passed = b.passed;
    if (unsigned(++b.waiting) == count) {
      b.waiting = 0, ++b.passed;
      return;
    }
    const unsigned self = current_;
    while (b.passed == passed)
      if (!_setjmp(fibers_[self].where)) _longjmp(scheduler_, 1);
  }

  unsigned threads_ = 0, finished_ = 0, current_ = 0;
  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
  Barrier whole_, warps_[kMostThreads / 32];
  double values_[kMostThreads];
  std::unique_ptr<char[]> stacks_;
  std::vector<Fiber> fibers_;
};

// ---- one launch ---------------------------------------------------------------------------------------------------

inline int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

inline std::vector<unsigned> shuffled(unsigned n, int seed) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (seed) std::shuffle(order.begin(), order.end(), std::mt19937(unsigned(seed)));
  return order;
}

struct Launch {
  dim3 grid, block;
  const std::function<void()>* body;
  std::vector<unsigned> order;  // of a block's threads
  std::vector<bool> begun;      // by block

  void run(unsigned b) {
    static thread_local Block one;
    Block::here() = &one, here() = this;
    gridDim = grid, blockDim = block, blockIdx = {b % grid.x, b / grid.x, 0};
    begun[b] = true;
    one.run(block.x, order, *body);
  }
  static Launch*& here() {
    static thread_local Launch* launch = nullptr;
    return launch;
  }
};

}  // namespace emulator

// ---- device functions ---------------------------------------------------------------------------------------------

#define __syncthreads() emulator::Block::here()->sync_block(__LINE__)
#define __syncwarp() emulator::Block::here()->sync_warp(__LINE__)
#define __shfl_down_sync(mask, x, distance) \
  (static_cast<void>(mask), emulator::Block::here()->shuffle_down(x, unsigned(distance), __LINE__))

inline void __threadfence() {}
inline unsigned atomicInc(unsigned* p, unsigned most) {
  const unsigned old = *p;
  *p = old >= most ? 0 : old + 1;
  return old;
}

inline void wait_for(const unsigned* arrived, unsigned enough) {
  auto& launch = *emulator::Launch::here();
  while (*arrived < enough) {
    const auto next = unsigned(std::find(launch.begun.begin(), launch.begun.end(), false) - launch.begun.begin());
    if (next >= blockIdx.y * gridDim.x + blockIdx.x) emulator::fail("a block waits for one that need not have begun");
    std::thread([&] { launch.run(next); }).join();  // which has shared memory of its own
  }
}

inline float approximate_reciprocal(float x) { return 1 / x; }
inline float approximate_rsqrt(float x) { return float(1 / std::sqrt(double(x))); }
inline float __uint_as_float(unsigned u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
inline uint16_t emulated_bf16(float f) {
  unsigned u;
  std::memcpy(&u, &f, sizeof u);
  return f != f ? 0x7fff : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {emulated_bf16(x), emulated_bf16(y)}; }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {_Float16(x), _Float16(y)}; }

// ---- host functions -----------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Launches so far, for tests that count them.
inline int64_t& emulated_launches() {
  static int64_t launches = 0;
  return launches;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const std::function<void()> body = [&] { kernel(args...); };
  const dim3 grid = config->gridDim, block = config->blockDim;
  ++emulated_launches();
  const unsigned blocks = grid.x * grid.y;
  if (blocks == 0 || grid.y > 65535 || block.x > emulator::Block::kMostThreads) return cudaErrorInvalidValue;
  const int seed = emulator::setting("MSAM_EMULATOR_ORDER", 0);
  emulator::Launch launch{grid, block, &body, emulator::shuffled(block.x, seed), std::vector<bool>(blocks)};
  for (unsigned b : emulator::shuffled(blocks, seed))
    if (!launch.begun[b]) launch.run(b);
  return cudaSuccess;
}

// ---- torch's side of CUDA -----------------------------------------------------------------------------------------

#define C10_CUDA_CHECK(call)                                                                \
  do {                                                                                      \
    const cudaError_t error = call;                                                         \
    if (error != cudaSuccess) throw std::runtime_error("error " + std::to_string(error));   \
  } while (false)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()

namespace c10::cuda {
struct CUDAGuard {
  template <class Device>
  explicit CUDAGuard(const Device&) {}
};
struct CUDAStream {
  cudaStream_t stream() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream(int) { return {}; }
}  // namespace c10::cuda
