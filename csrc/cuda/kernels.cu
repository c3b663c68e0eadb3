// SPDX-License-Identifier: Apache-2.0
// The launchers: a kernel by storage type and options, its pointers in as few launches as they fit.
#include "kernels.cuh"

#include <algorithm>
#include <type_traits>

// Pointers that a launch may carry, if that is fewer than fit. For tests.
#ifndef MSAM_LAUNCH_POINTERS
#define MSAM_LAUNCH_POINTERS INT64_MAX
#endif

namespace msam::cuda {
namespace {

// Parameters of a kernel: 32,764 bytes at most, from compute capability 7.0 and CUDA 12.1 on. All of them are copied at
// every launch, so there is a small size, which older drivers' 4 KiB limit made the usual one.
template <class Args, int bytes>
constexpr int kSlots = (bytes - int(sizeof(Window<Args>))) / int(sizeof(void*));
template <class Args>
using Small = Parameters<Args, kSlots<Args, 4096>>;
template <class Args>
using Large = Parameters<Args, kSlots<Args, 32764 / 8 * 8>>;

template <class Args>
int64_t capacity() {
  return std::min<int64_t>(Large<Args>::kSlots, MSAM_LAUNCH_POINTERS);
}

int words_of(const Lists& lists) { return lists.count + (lists.sizes != nullptr); }  // for each segment

template <class P, class Args, class Launch>
cudaError_t launch_window(const Window<Args>& args, const Lists& lists, Launch&& launch) {
  P p;
  p.args = args;
  const int64_t n = args.end - args.begin;
  for (int list = 0; list < lists.count; ++list)
    std::copy_n(lists.data[list] + args.begin, n, p.pointers + list * n);
  if (lists.sizes) {
    p.args.sizes = lists.count;
    const auto word = [](int64_t size) { return reinterpret_cast<void*>(size); };
    std::transform(lists.sizes + args.begin, lists.sizes + args.end, p.pointers + lists.count * n, word);
  }
  return launch(p);
}

// launch(parameters) for every window of segments whose pointers fit. Kernels of stacks come in the large size alone.
template <class Args, class Launch>
cudaError_t for_windows(const Args& args, const Lists& lists, Launch&& launch) {
  if (args.rows == 0) return cudaSuccess;
  Window<Args> window{args};
  if (lists.count == 0) return launch_window<Small<Args>>(window, lists, launch);
  window.segments = lists.segments;
  const int64_t most = capacity<Args>() / words_of(lists);
  for (; window.begin < lists.segments; window.begin = window.end) {
    window.end = std::min(window.begin + most, lists.segments);
    const bool small = !lists.sizes && (window.end - window.begin) * lists.count <= Small<Args>::kSlots;
    const cudaError_t error = small ? launch_window<Small<Args>>(window, lists, launch)
                                    : launch_window<Large<Args>>(window, lists, launch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class P>
cudaError_t launch(void (*kernel)(P), int64_t blocks, cudaStream_t stream, const P& p, int64_t times = 1) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks), unsigned(times));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p);
}

// body(constants...) for the values of some options.
template <class Body>
cudaError_t with_options(Body&& body) {
  return body();
}
template <class Body, class... Rest>
cudaError_t with_options(Body&& body, bool option, Rest... rest) {
  const auto with = [&](auto constant) {
    return with_options([&](auto... others) { return body(constant, others...); }, rest...);
  };
  return option ? with(std::true_type{}) : with(std::false_type{});
}

// body(S{}, constants...) for the storage type and some options.
template <class Body, class... Options>
cudaError_t dispatch(Storage storage, Body&& body, Options... options) {
  const auto with = [&](auto s) {
    return with_options([&](auto... constants) { return body(s, constants...); }, options...);
  };
  switch (storage) {
    case Storage::kFloat:
      return with(float{});
    case Storage::kDouble:
      return with(double{});
    case Storage::kBFloat16:
      return with(bf16{});
    case Storage::kHalf:
      return with(half{});
  }
  return cudaErrorInvalidValue;
}

// As many blocks, for each of some micro-batches.
struct Grid {
  int64_t blocks, times = 1;
};

// The kernel that choose(parameters, S{}, constants...) names, for every window.
template <class Args, class Choose, class... Options>
cudaError_t launch_windows(const Args& args, const Lists& lists, Grid grid, cudaStream_t stream, Choose&& choose,
                           Options... options) {
  return for_windows(args, lists, [&](const auto& p) {
    return dispatch(
        args.storage,
        [&](auto s, auto... constants) { return launch(choose(p, s, constants...), grid.blocks, stream, p, grid.times); },
        options...);
  });
}

template <class P>
constexpr bool kIsLarge = sizeof(P) > 4096;

// choose(stacked) names the kernel of stacks, or the one without.
template <class P, class Choose>
auto stacked_or_not(const P& p, Choose&& choose) {
  [[maybe_unused]] const bool stacked = p.args.sizes >= 0;
  if constexpr (kIsLarge<P>)
    return stacked ? choose(std::true_type{}) : choose(std::false_type{});
  else
    return choose(std::false_type{});
}

}  // namespace

cudaError_t launch_norm(const Norm& args, const Lists& lists, cudaStream_t stream) {
  const auto kernel = [](const auto& p, auto s, auto friendly, auto adaptive) {
    return stacked_or_not(p, [](auto stacked) {
      return norm_kernel<decltype(s), decltype(friendly)::value, decltype(adaptive)::value, decltype(stacked)::value,
                         std::decay_t<decltype(p)>>;
    });
  };
  const Grid grid{partials_of(args.rows), args.last - args.first};
  return launch_windows(args, lists, grid, stream, kernel, args.ema != nullptr, args.adaptive);
}

cudaError_t launch_perturb(const Perturb& args, const Lists& lists, cudaStream_t stream) {
  const auto kernel = [](const auto& p, auto s, auto friendly, auto adaptive, auto stochastic, auto masters) {
    return stacked_or_not(p, [](auto stacked) {
      constexpr bool short_ = sizeof(s) == 2, stacks = decltype(stacked)::value;
      return perturb_kernel<decltype(s), decltype(friendly)::value, decltype(adaptive)::value,
                            decltype(stochastic)::value && short_, stacks, decltype(masters)::value && short_ && !stacks,
                            std::decay_t<decltype(p)>>;
    });
  };
  return launch_windows(args, lists, Grid{args.rows}, stream, kernel, args.ema != nullptr, args.adaptive,
                        args.noise != nullptr, args.masters);
}

cudaError_t launch_ascend(const Perturb& args, const Lists& lists, cudaStream_t stream) {
  if (args.ema_out && args.last - args.first > 1) {
    // Whether a gradient enters the EMA, of which the next direction is made, depends on its norm.
    const int64_t terms = partials_of(args.rows) * parts_of(args.storage);
    for (int64_t i = args.first; i < args.last; ++i) {
      Perturb one = args;
      one.first = i, one.last = i + 1;
      one.partials = args.partials + (i - args.first) * terms, one.norm_sq.data = one.partials;
      one.achieved_sq = args.achieved_sq + (i - args.first) * achieved_of(args.storage) * args.rows;
      const cudaError_t error = launch_ascend(one, lists, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }
  if (!args.arrived || words_of(lists) * lists.segments > capacity<Perturb>()) {
    const cudaError_t error = launch_norm(args, lists, stream);
    return error != cudaSuccess ? error : launch_perturb(args, lists, stream);
  }
  const auto kernel = [](const auto& p, auto s, auto friendly, auto adaptive, auto stochastic, auto masters) {
    return stacked_or_not(p, [](auto stacked) {
      constexpr bool short_ = sizeof(s) == 2, stacks = decltype(stacked)::value;
      return ascend_kernel<decltype(s), decltype(friendly)::value, decltype(adaptive)::value,
                            decltype(stochastic)::value && short_, stacks, decltype(masters)::value && short_ && !stacks,
                            std::decay_t<decltype(p)>>;
    });
  };
  const Grid grid{partials_of(args.rows) * (args.last - args.first) + args.rows};
  return launch_windows(args, lists, grid, stream, kernel, args.ema != nullptr, args.adaptive, args.noise != nullptr,
                        args.masters);
}

cudaError_t launch_weigh(const Weigh& args, cudaStream_t stream) {
  return args.count ? launch(&weigh_kernel, args.count, stream, args) : cudaSuccess;
}

cudaError_t launch_gram(const Gram& args, const Lists& lists, cudaStream_t stream) {
  const auto kernel = [&](const auto& p, auto s) {
    using P = std::decay_t<decltype(p)>;
    using S = decltype(s);
    return stacked_or_not(p, [&](auto stacked) {
      constexpr bool stacks = decltype(stacked)::value;
      return args.count == 1   ? gram_kernel<S, 1, stacks, P>
             : args.count == 2 ? gram_kernel<S, 2, stacks, P>
                               : gram_kernel<S, 3, stacks, P>;
    });
  };
  return launch_windows(args, lists, Grid{partials_of(args.rows), args.last - args.first}, stream, kernel);
}

cudaError_t launch_descend(const Descend& args, const Lists& lists, cudaStream_t stream) {
  const auto kernel = [](const auto& p, auto s, auto combined, auto masters) {
    return stacked_or_not(p, [](auto stacked) {
      constexpr bool stacks = decltype(stacked)::value, kept = decltype(masters)::value && sizeof(s) == 2 && !stacks;
      return descend_kernel<decltype(s), stacks || decltype(combined)::value, stacks, kept, std::decay_t<decltype(p)>>;
    });
  };
  return launch_windows(args, lists, Grid{args.rows}, stream, kernel, args.combination.count > 1, args.masters);
}

cudaError_t launch_update(const Update& args, const Lists& lists, cudaStream_t stream) {
  const auto kernel = [&](const auto& p, auto s, auto sgd, auto combined, auto masters) {
    return stacked_or_not(p, [&](auto stacked) {
      using P = std::decay_t<decltype(p)>;
      constexpr Rule rule = decltype(sgd)::value ? kSgd : kAdam;
      constexpr bool stacks = decltype(stacked)::value, several = stacks || decltype(combined)::value;
      constexpr bool kept = decltype(masters)::value && sizeof(s) == 2 && !stacks;
      if constexpr (!several && !kept)
        if (args.ahead) return update_kernel<decltype(s), rule, false, false, true, false, P>;
      return update_kernel<decltype(s), rule, several, stacks, false, kept, P>;
    });
  };
  return launch_windows(args, lists, Grid{args.rows}, stream, kernel, args.rule == kSgd, args.combination.count > 1,
                        args.masters);
}

}  // namespace msam::cuda
