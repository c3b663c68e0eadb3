// SPDX-License-Identifier: Apache-2.0
// Arguments of the CUDA kernels and their launchers. Knows no torch. All pointers but those of Lists are to device memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../segments.h"
#include "../update_math.h"

// Pointers that a launch may carry, if that is fewer than fit. For tests.
#ifndef MSAM_LAUNCH_POINTERS
#define MSAM_LAUNCH_POINTERS INT64_MAX
#endif

namespace msam::cuda {

// A tensor argument: one flat buffer, or a list by segment, whose pointers travel with the launch.
struct Place {
  void* flat = nullptr;
  int list = -1;  // which of the lists

  MSAM_FN explicit operator bool() const { return flat != nullptr || list >= 0; }
};

// The lists of tensors of a call: data[list][segment], in host memory.
struct Lists {
  void* const* data[kMostLists] = {};
  int count = 0;
  int64_t segments = 0;
  int64_t capacity = MSAM_LAUNCH_POINTERS;
};

// A number in both arithmetic types: the host rounds, once.
struct Number {
  double wide = 0;
  float narrow = 0;

  Number(double x = 0) : wide(x), narrow(float(x)) {}
  MSAM_FN void get(double* x) const { *x = wide; }
  MSAM_FN void get(float* x) const { *x = narrow; }
};

struct Common {
  Storage storage;
  const Chunk* chunks;
  int64_t rows;                       // of chunks
  int64_t first = 0, last = INT64_MAX;  // the segments whose pointers this launch carries
  Place weights, grads;
  const double* hyper = nullptr;  // [groups, hyper_stride]
  int64_t hyper_stride = 0;
  const double* norm_sq = nullptr;  // [terms]: their sum is the squared norm
  int64_t terms = 0;
};

struct InnerProducts : Common {
  const void* ema = nullptr;
  Number sigma, eta;
  bool adaptive = false;
  double* partials = nullptr;  // [partials_of(rows)]
};

struct Dots {
  Storage storage;
  const Chunk* chunks;
  int64_t rows;                         // of chunks
  int64_t first = 0, last = INT64_MAX;  // as in Common
  Place x, y, z;                        // z may be missing
  double* partials = nullptr;  // [3 or 6, partials_of(rows)] of x.x, x.y, y.y, x.z, y.z, z.z
};

struct Perturb : InnerProducts {
  void* saved = nullptr;
  const void* origin = nullptr;   // in place of the weights that are there
  const uint8_t* mask = nullptr;  // a bit for every element of a flat buffer
  void* ema_out = nullptr;        // null where the EMA is only read
  Place acc;                      // the gradients are added to it
  Number lmbda, one_minus_lmbda;
  double *achieved_sq = nullptr, *acc_sq = nullptr;  // [rows]
};

struct Restore : Common {  // grads: c_acc acc + c grads lands in acc, which is not read where c_acc is 0
  const void* saved = nullptr;
  Place acc;
  const double* coefs = nullptr;  // with them coefs[0] grads + coefs[1] more[0] + ... stands in place of grads
  Place more[kMore];
  Number c_acc = 1, c = 1;
};

struct Update : Restore {  // acc is only read here
  void* momentum_buffer = nullptr;
  const uint8_t* fresh = nullptr;  // [segments]: momentum buffers that begin with this gradient
  void *exp_avg = nullptr, *exp_avg_sq = nullptr, *max_exp_avg_sq = nullptr;
  float* step = nullptr;       // [segments]
  unsigned* ticket = nullptr;  // blocks that have finished; zero between calls
};

// Terms of a sum over all chunks: a number of its own for every table, whatever the GPU, so that all GPUs add in the same order.
// As many blocks fill any of them, and few enough that every block of the next kernel can add the terms up by itself.
constexpr int64_t kPartials = 1024;
inline int64_t partials_of(int64_t rows) { return rows < kPartials ? rows : kPartials; }

// On the current device, in order on `stream`; a table without rows launches nothing.
cudaError_t launch_inner_products(const InnerProducts&, const Lists&, cudaStream_t stream);
cudaError_t launch_perturb(const Perturb&, const Lists&, cudaStream_t stream);
// The two one after the other, the terms in args.partials: the same bits in one launch, where all blocks fit the GPU
// at once and the pointers one launch.
cudaError_t launch_ascend(const Perturb&, const Lists&, bool one_launch, cudaStream_t stream);
cudaError_t launch_dots(const Dots&, const Lists&, cudaStream_t stream);
cudaError_t launch_restore(const Restore&, const Lists&, cudaStream_t stream);
cudaError_t launch_sgd(const Update&, const Lists&, cudaStream_t stream);
cudaError_t launch_adam(const Update&, const Lists&, cudaStream_t stream);

}  // namespace msam::cuda
