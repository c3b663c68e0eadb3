// SPDX-License-Identifier: Apache-2.0
// Arguments of the CPU kernels, and tables of the kernels by instruction set and storage type. Knows no torch.
#pragma once

#include "../segments.h"

namespace msam::cpu {

struct Common {
  Storage storage;
  const Chunk* chunks;
  Pointers weights, grads;
  const double* hyper = nullptr;  // [groups, hyper_stride]
  int64_t hyper_stride = 0;
  bool large = false;  // does not fit the cache: prefetch, and store past it what is not read again soon
};

struct InnerProducts : Common {
  const void* ema = nullptr;
  double sigma = 0, eta = 0;
  bool adaptive = false;
  double* partials = nullptr;  // [chunks]
};

struct Dots {
  Storage storage;
  const Chunk* chunks;
  Pointers x, y, z;  // z may be missing
  bool large = false;
  double* partials[6] = {};  // [chunks] of x.x, x.y, y.y, x.z, y.z, z.z
};

struct Perturb : InnerProducts {
  void* saved = nullptr;
  const void* origin = nullptr;  // in place of the weights that are there
  const uint8_t* mask = nullptr;  // a bit for every element of a flat buffer
  void* ema_out = nullptr;        // null where the EMA is only read
  Pointers acc;                   // the gradients are added to it
  double norm_sq = 0, lmbda = 0, one_minus_lmbda = 1;
  double *achieved_sq = nullptr, *acc_sq = nullptr;  // [chunks]
};

struct Restore : Common {  // grads: c_acc acc + c grads lands in acc, which is not read where c_acc is 0
  const void* saved = nullptr;
  Pointers acc;
  const double* coefs = nullptr;  // with them coefs[0] grads + coefs[1] more[0] + ... stands in place of grads
  Pointers more[kMore];
  double c_acc = 1, c = 1;
  bool poison = false;
};

struct Update : Restore {  // acc is only read here
  void* momentum_buffer = nullptr;
  const uint8_t* fresh = nullptr;  // [segments]: momentum buffers that begin with this gradient
  void *exp_avg = nullptr, *exp_avg_sq = nullptr, *max_exp_avg_sq = nullptr;
  float* step = nullptr;  // [segments]
};

// Of one instruction set and one storage type. Each works on chunks [first, last).
struct Kernels {
  void (*inner_products)(const InnerProducts&, int64_t first, int64_t last);
  void (*perturb)(const Perturb&, int64_t first, int64_t last);
  void (*dots)(const Dots&, int64_t first, int64_t last);
  void (*restore)(const Restore&, int64_t first, int64_t last);
  void (*sgd)(const Update&, int64_t first, int64_t last);
  void (*adam)(const Update&, int64_t first, int64_t last);
};

// Those for the widest instruction set that this processor has, or for the one that MSAM_KERNELS_ISA (baseline, avx2, avx512)
// names; throws where that is not there.
const Kernels& kernels(Storage storage);
const char* instruction_set();

}  // namespace msam::cpu
