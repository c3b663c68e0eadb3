// SPDX-License-Identifier: Apache-2.0
// As much of CUDA as csrc/cuda uses, for a C++ compiler on the CPU: every thread of a block is a fiber, every barrier and
// shuffle a place where fibers wait for each other. Stops the process where threads of a block wait at different barriers.
//
// A block's fibers share an operating system thread, so that __shared__ is thread_local; blocks run one after the other,
// or side by side in a cooperative launch. Fibers and blocks run in an order that MSAM_EMULATOR_ORDER shuffles: results
// that depend on it lack a barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
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

// A barrier of operating system threads.
class Grid {
 public:
  explicit Grid(unsigned blocks) : blocks_(blocks) {}
  void sync() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t passed = passed_;
    if (++waiting_ == blocks_) {
      waiting_ = 0, ++passed_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return passed_ != passed; });
    }
  }
  static Grid*& here() {
    static thread_local Grid* grid = nullptr;
    return grid;
  }

 private:
  unsigned blocks_, waiting_ = 0;
  uint64_t passed_ = 0;
  std::mutex mutex_;
  std::condition_variable all_;
};

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

inline void run_blocks(dim3 grid, dim3 block, const std::vector<unsigned>& which, Grid* all,
                       const std::function<void()>& body) {
  static thread_local Block one;
  Block::here() = &one;
  Grid::here() = all;
  gridDim = grid, blockDim = block;
  const auto order = shuffled(block.x, setting("MSAM_EMULATOR_ORDER", 0));
  for (unsigned b : which) {
    blockIdx = {b, 0, 0};
    one.run(block.x, order, body);
  }
}

}  // namespace emulator

// ---- device functions ---------------------------------------------------------------------------------------------

#define __syncthreads() emulator::Block::here()->sync_block(__LINE__)
#define __syncwarp() emulator::Block::here()->sync_warp(__LINE__)
#define __shfl_down_sync(mask, x, distance) \
  (static_cast<void>(mask), emulator::Block::here()->shuffle_down(x, unsigned(distance), __LINE__))

namespace cooperative_groups {
struct grid_group {
  void sync() const {
    if (!emulator::Grid::here()) emulator::fail("a grid barrier without a cooperative launch");
    __syncthreads();
    if (threadIdx.x == 0) emulator::Grid::here()->sync();
    __syncthreads();
  }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

inline void __threadfence() {}
inline unsigned atomicInc(unsigned* p, unsigned most) {
  const unsigned old = *p;
  *p = old >= most ? 0 : old + 1;
  return old;
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

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorCooperativeLaunchTooLarge };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// The GPUs: what MSAM_EMULATOR_DEVICE counts differ in their multiprocessors.
inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::setting("MSAM_EMULATOR_DEVICE", 0), cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  constexpr int processors[] = {3, 1, 2, 50};
  return *value = processors[device], cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 2, cudaSuccess;
}

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
  if (grid.x == 0 || block.x > emulator::Block::kMostThreads) return cudaErrorInvalidValue;
  const auto blocks = emulator::shuffled(grid.x, emulator::setting("MSAM_EMULATOR_ORDER", 0));
  if (!config->numAttrs) {
    emulator::run_blocks(grid, block, blocks, nullptr, body);
    return cudaSuccess;
  }
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (grid.x > unsigned(2 * processors)) return cudaErrorCooperativeLaunchTooLarge;
  emulator::Grid all(grid.x);
  std::vector<std::thread> threads;
  for (unsigned b : blocks)
    threads.emplace_back([&, b] { emulator::run_blocks(grid, block, {b}, &all, body); });
  for (auto& t : threads) t.join();
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
