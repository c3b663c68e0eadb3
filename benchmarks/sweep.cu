// SPDX-License-Identifier: Apache-2.0
// Plain kernels that read some streams of fp32 and write others: what a GPU's memory gives to a pattern of access, whatever
// is computed. Built and called by bench_sweep.py.
#include <cuda_runtime.h>

namespace {

constexpr int kMost = 4;
struct Streams {
  const float4* in[kMost];
  float4* out[kMost];
};

// `pieces` elements of 16 bytes for a block, `kAhead` loads of every stream before the first use.
template <int reads, int writes, int kAhead>
__global__ void plain(Streams s, long long total, int pieces) {
  const long long begin = static_cast<long long>(blockIdx.x) * pieces;
  const int here = static_cast<int>(total - begin < pieces ? total - begin : pieces);
  for (int i = threadIdx.x; i < here; i += blockDim.x * kAhead) {
    float4 x[kAhead][reads];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (i + a * blockDim.x < here)
#pragma unroll
        for (int r = 0; r < reads; ++r) x[a][r] = s.in[r][begin + i + a * blockDim.x];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (i + a * blockDim.x >= here) break;
      float4 sum = x[a][0];
#pragma unroll
      for (int r = 1; r < reads; ++r)
        sum = {sum.x + x[a][r].x, sum.y + x[a][r].y, sum.z + x[a][r].z, sum.w + x[a][r].w};
#pragma unroll
      for (int w = 0; w < writes; ++w) {
        s.out[w][begin + i + a * blockDim.x] = sum;
        sum.x *= 0.5f;
      }
    }
  }
}

template <int reads, int writes>
cudaError_t launch(const Streams& s, long long total, int pieces, int threads, int ahead) {
  const auto blocks = static_cast<unsigned>((total + pieces - 1) / pieces);
  if (ahead == 1)
    plain<reads, writes, 1><<<blocks, threads>>>(s, total, pieces);
  else if (ahead == 2)
    plain<reads, writes, 2><<<blocks, threads>>>(s, total, pieces);
  else
    plain<reads, writes, 4><<<blocks, threads>>>(s, total, pieces);
  return cudaGetLastError();
}

}  // namespace

// One launch on the default stream. Addresses are multiples of 16, `numel` one of 4; 0, or what went wrong.
extern "C" int sweep(int reads, int writes, const void* const* in, void* const* out, long long numel, int elements, int threads,
                     int ahead) {
  Streams s = {};
  for (int r = 0; r < reads; ++r) s.in[r] = static_cast<const float4*>(in[r]);
  for (int w = 0; w < writes; ++w) s.out[w] = static_cast<float4*>(out[w]);
  const long long total = numel / 4;
  const int pieces = elements / 4;
  switch (10 * reads + writes) {
    case 11: return launch<1, 1>(s, total, pieces, threads, ahead);
    case 21: return launch<2, 1>(s, total, pieces, threads, ahead);
    case 22: return launch<2, 2>(s, total, pieces, threads, ahead);
    case 32: return launch<3, 2>(s, total, pieces, threads, ahead);
    case 43: return launch<4, 3>(s, total, pieces, threads, ahead);
    default: return cudaErrorInvalidValue;
  }
}
