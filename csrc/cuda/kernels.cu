// SPDX-License-Identifier: Apache-2.0
// The launchers: a kernel by storage type and options, its pointers in as few launches as they fit.
#include "kernels.cuh"

#include <algorithm>
#include <atomic>

namespace msam::cuda {
namespace {

// Parameters of a kernel: 32,764 bytes at most, from compute capability 7.0 and CUDA 12.1 on. All of them are copied at
// every launch, so there is a small size, which older drivers' 4 KiB limit made the usual one.
template <class Args, int bytes>
constexpr int kSlots = (bytes - int(sizeof(Args))) / int(sizeof(void*));
template <class Args>
using Small = Parameters<Args, kSlots<Args, 4096>>;
template <class Args>
using Large = Parameters<Args, kSlots<Args, 32764 / 8 * 8>>;

template <class P, class Args, class Launch>
cudaError_t launch_window(const Args& args, const Lists& lists, Launch&& launch) {
  P p;
  p.args = args;
  const int64_t n = args.last - args.first;
  for (int list = 0; list < lists.count; ++list)
    std::copy_n(lists.data[list] + args.first, n, p.pointers + list * n);
  return launch(p);
}

// launch(parameters) for every window of segments whose pointers fit.
template <class Args, class Launch>
cudaError_t for_windows(Args args, const Lists& lists, Launch&& launch) {
  if (args.rows == 0) return cudaSuccess;
  if (lists.count == 0) return launch_window<Small<Args>>(args, lists, launch);
  const int64_t capacity = std::min<int64_t>(Large<Args>::kSlots, lists.capacity) / lists.count;
  for (args.first = 0; args.first < lists.segments; args.first = args.last) {
    args.last = std::min(args.first + capacity, lists.segments);
    const bool small = (args.last - args.first) * lists.count <= Small<Args>::kSlots;
    const cudaError_t error = small ? launch_window<Small<Args>>(args, lists, launch)
                                    : launch_window<Large<Args>>(args, lists, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, bool cooperative, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

// body(S{}) for the storage type.
template <class Body>
cudaError_t with_storage(Storage storage, Body&& body) {
  switch (storage) {
    case Storage::kFloat:
      return body(float{});
    case Storage::kDouble:
      return body(double{});
    case Storage::kBFloat16:
      return body(bf16{});
    case Storage::kHalf:
      return body(half{});
  }
  return cudaErrorInvalidValue;
}

// body(friendly, adaptive) with constants.
template <class Body>
cudaError_t with_direction(const InnerProducts& a, Body&& body) {
  using std::false_type, std::true_type;
  return a.ema ? (a.adaptive ? body(true_type{}, true_type{}) : body(true_type{}, false_type{}))
               : (a.adaptive ? body(false_type{}, true_type{}) : body(false_type{}, false_type{}));
}

// body(combined) with a constant.
template <class Body>
cudaError_t with_coefs(const Restore& a, Body&& body) {
  return a.coefs ? body(std::true_type{}) : body(std::false_type{});
}

constexpr int kDevices = 64;
using ByDevice = std::atomic<int64_t>[kDevices];

// Blocks of a kernel that the current device runs at once; asked once for every device and kept in `known`.
template <class Kernel>
cudaError_t resident_blocks(Kernel* kernel, ByDevice& known, int64_t* blocks) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device < kDevices && (*blocks = known[device])) return cudaSuccess;
  int processors = 0, each = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0)) return error;
  *blocks = int64_t(processors) * each;
  if (device < kDevices) known[device] = *blocks;
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_inner_products(const InnerProducts& args, const Lists& lists, cudaStream_t stream) {
  return for_windows(args, lists, [&](const auto& p) {
    using P = std::decay_t<decltype(p)>;
    return with_storage(args.storage, [&](auto s) {
      return with_direction(args, [&](auto friendly, auto adaptive) {
        const auto kernel = inner_products_kernel<decltype(s), friendly.value, adaptive.value, P>;
        return launch(kernel, partials_of(args.rows), false, stream, p);
      });
    });
  });
}

cudaError_t launch_perturb(const Perturb& args, const Lists& lists, cudaStream_t stream) {
  return for_windows(args, lists, [&](const auto& p) {
    using P = std::decay_t<decltype(p)>;
    return with_storage(args.storage, [&](auto s) {
      return with_direction(args, [&](auto friendly, auto adaptive) {
        const auto kernel = perturb_kernel<decltype(s), friendly.value, adaptive.value, P>;
        return launch(kernel, args.rows, false, stream, p);
      });
    });
  });
}

cudaError_t launch_ascend(const Perturb& args, const Lists& lists, bool one_launch, cudaStream_t stream) {
  if (!one_launch || lists.count * lists.segments > std::min<int64_t>(Large<Perturb>::kSlots, lists.capacity)) {
    const cudaError_t error = launch_inner_products(args, lists, stream);
    return error != cudaSuccess ? error : launch_perturb(args, lists, stream);
  }
  return for_windows(args, lists, [&](const auto& p) {
    using P = std::decay_t<decltype(p)>;
    return with_storage(args.storage, [&](auto s) {
      return with_direction(args, [&](auto friendly, auto adaptive) {
        const auto kernel = ascend_kernel<decltype(s), friendly.value, adaptive.value, P>;
        static ByDevice known;  // one for every kernel that this lambda stands for
        int64_t resident = 0;
        if (const cudaError_t error = resident_blocks(kernel, known, &resident)) return error;
        if (resident == 0) return cudaErrorCooperativeLaunchTooLarge;
        // Equal shares: as many rounds of terms as it takes, and no more blocks than that many rounds need.
        const int64_t rounds = (args.terms + resident - 1) / resident;
        return launch(kernel, (args.terms + rounds - 1) / rounds, true, stream, p);
      });
    });
  });
}

cudaError_t launch_dots(const Dots& args, const Lists& lists, cudaStream_t stream) {
  return for_windows(args, lists, [&](const auto& p) {
    using P = std::decay_t<decltype(p)>;
    return with_storage(args.storage, [&](auto s) {
      const auto kernel = args.z ? dots_kernel<decltype(s), 3, P> : dots_kernel<decltype(s), 2, P>;
      return launch(kernel, partials_of(args.rows), false, stream, p);
    });
  });
}

cudaError_t launch_restore(const Restore& args, const Lists& lists, cudaStream_t stream) {
  return for_windows(args, lists, [&](const auto& p) {
    using P = std::decay_t<decltype(p)>;
    return with_storage(args.storage, [&](auto s) {
      return with_coefs(args, [&](auto combined) {
        return launch(restore_kernel<decltype(s), combined.value, P>, args.rows, false, stream, p);
      });
    });
  });
}

cudaError_t launch_sgd(const Update& args, const Lists& lists, cudaStream_t stream) {
  return for_windows(args, lists, [&](const auto& p) {
    using P = std::decay_t<decltype(p)>;
    return with_storage(args.storage, [&](auto s) {
      return with_coefs(args, [&](auto combined) {
        return launch(sgd_kernel<decltype(s), combined.value, P>, args.rows, false, stream, p);
      });
    });
  });
}

cudaError_t launch_adam(const Update& args, const Lists& lists, cudaStream_t stream) {
  return for_windows(args, lists, [&](const auto& p) {
    using P = std::decay_t<decltype(p)>;
    const bool last = lists.count == 0 || p.args.last == lists.segments;
    return with_storage(args.storage, [&](auto s) {
      return with_coefs(args, [&](auto combined) {
        return launch(adam_kernel<decltype(s), combined.value, P>, args.rows, false, stream, p, last);
      });
    });
  });
}

}  // namespace msam::cuda
