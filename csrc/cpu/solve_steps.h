// The recurrence itself: solves neighbouring steps of a line whose pixels are packed, in place.
// Included by sweep_impl.h alone, inside its namespace and under its target pragma.

// One tap of a line: where its source lies from the state of the current step, and its place in the weights.
struct Tap {
  ptrdiff_t source;
  int64_t index;
};

// Sums of kOut output channels for kVectors vectors of lanes, in registers.
template <class T, int kOut, int kVectors>
using Sums = Vector<T>[kOut][kVectors];

// sum[o] += sum over input channels of w * source. kIn > 0 fixes the number of input channels, so that the loop over
// them unrolls.
template <class T, int kIn, int kOut, int kVectors>
INVERSE_FLOW_INLINE void add_products(Sums<T, kOut, kVectors>& sum, const T* source, ptrdiff_t channel_stride,
                                      int64_t in_channels, const T* weights) {
  constexpr int64_t n = kVectorLanes<T>;
  const int64_t count = kIn > 0 ? kIn : in_channels;
#pragma GCC unroll 6
  for (int64_t c = 0; c < count; ++c) {
    Vector<T> x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(source + c * channel_stride + v * n);
    for (int o = 0; o < kOut; ++o) {
      for (int v = 0; v < kVectors; ++v) sum[o][v] += x[v] * weights[c * kOut + o];
    }
  }
}

template <class T, int kOut, int kVectors>
INVERSE_FLOW_INLINE void store_sums(const Sums<T, kOut, kVectors>& sum, T* out, ptrdiff_t out_stride) {
  for (int o = 0; o < kOut; ++o) {
    for (int v = 0; v < kVectors; ++v) store(out + o * out_stride + v * kVectorLanes<T>, sum[o][v]);
  }
}

// sum = W sum for a unit triangular W, in place. The products are added up before they meet the value they are added
// to: they are often far smaller, and adding each by itself would round each to its size.
template <class T, int kOut, int kVectors>
INVERSE_FLOW_INLINE void multiply_unit_triangular(Sums<T, kOut, kVectors>& sum, const T* weights, bool upper) {
  const auto row = [&](int o, int begin, int end) {
    for (int v = 0; v < kVectors; ++v) {
      Vector<T> products = sum[begin][v] * weights[begin * kOut + o];
      for (int c = begin + 1; c < end; ++c) products += sum[c][v] * weights[c * kOut + o];
      sum[o][v] += products;
    }
  };
  if (upper) {
    for (int o = 0; o + 1 < kOut; ++o) row(o, o + 1, kOut);
  } else {
    for (int o = kOut - 1; o > 0; --o) row(o, 0, o);
  }
}

// Solves `steps` neighbouring steps that share a list of taps, in place: the state holds the packed y - bias. `right`
// keeps y - bias of a step whose blocks each read all of it, while they overwrite the state. Where `held`,
// [step][lane], has no bits set the solution is zero; null: nowhere. A general M is a case of its own at compile time:
// as a branch between the sums it costs the others registers.
template <class T, int kVectors, bool kGeneralCorner>
static __attribute__((noinline)) void solve_steps(const Weights<T>& weights, const Shape& shape, int64_t steps,
                                                  T* state, ptrdiff_t step_state, ptrdiff_t channel_state,
                                                  const Tap* taps, int64_t tap_count, const T* held, T* right) {
  constexpr int64_t lanes = kVectors * kVectorLanes<T>;
  const int64_t channels = shape.channels;
  const bool triangular = !kGeneralCorner && weights.corner;
  const bool upper = triangular && shape.transposed;
  // What a block of channels does with the sums of its taps; kIn fixes the number of channels where a block holds all
  // of them. Captures are copies: what is captured by reference would be read again after every store.
  const auto finish_block = [=](int64_t s, int64_t first, auto width, auto in, auto& sum) INVERSE_FLOW_INLINED {
    constexpr int kOut = decltype(width)::value;
    constexpr int kIn = decltype(in)::value;
    T* x = state + s * step_state;
    const T* corner = weights.corner ? weights.corner + first * channels : nullptr;
    if (kIn == 0 && triangular) {
      // The blocks solved before this one, at this very step.
      const int64_t begin = upper ? first + kOut : 0;
      const int64_t end = upper ? channels : first;
      add_products<T, 0>(sum, x + begin * channel_state, channel_state, end - begin, corner + begin * kOut);
    }
    // y comes after the products, for the reason that `multiply_unit_triangular` gives.
    if constexpr (kGeneralCorner) {
      const bool whole = kIn > 0;
      add_products<T, kIn>(sum, whole ? x : right, whole ? channel_state : lanes, channels, corner);
    } else {
      for (int o = 0; o < kOut; ++o) {
        const T* y = x + (first + o) * channel_state;
        for (int v = 0; v < kVectors; ++v) sum[o][v] += load(y + v * kVectorLanes<T>);
      }
    }
    if (triangular) multiply_unit_triangular<T>(sum, corner + first * kOut, upper);
    if (held) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector<T> mask = load(held + s * lanes + v * kVectorLanes<T>);
        for (int o = 0; o < kOut; ++o) sum[o][v] = where_held<T>(sum[o][v], mask);
      }
    }
    store_sums<T>(sum, x + first * channel_state, channel_state);
  };
  const auto block_taps = [=](int64_t first) { return weights.taps + first * channels * (shape.taps() - 1); };
  const auto solve_block = [=](int64_t s, int64_t first, auto width, auto in) INVERSE_FLOW_INLINED {
    constexpr int kOut = decltype(width)::value;
    constexpr int kIn = decltype(in)::value;
    const int64_t in_channels = kIn > 0 ? kIn : channels;
    const T* x = state + s * step_state;
    const T* w = block_taps(first);
    Sums<T, kOut, kVectors> sum = {};
    for (int64_t t = 0; t < tap_count; ++t) {
      add_products<T, kIn>(sum, x + taps[t].source, channel_state, in_channels, w + taps[t].index * in_channels * kOut);
    }
    finish_block(s, first, width, in, sum);
  };
  // Two neighbouring blocks whose taps are summed together: a line of one vector has six accumulators a block, and a
  // multiply-add takes as long as eight of them are started in.
  const auto solve_pair = [=](int64_t s, int64_t first, auto high_width) INVERSE_FLOW_INLINED {
    constexpr int kHigh = decltype(high_width)::value;
    const T* x = state + s * step_state;
    const T* low_taps = block_taps(first);
    const T* high_taps = block_taps(first + kOutputBlock);
    Sums<T, kOutputBlock, kVectors> low = {};
    Sums<T, kHigh, kVectors> high = {};
    for (int64_t t = 0; t < tap_count; ++t) {
      const T* source = x + taps[t].source;
      const T* w_low = low_taps + taps[t].index * channels * kOutputBlock;
      const T* w_high = high_taps + taps[t].index * channels * kHigh;
      for (int64_t c = 0; c < channels; ++c) {
        add_products<T, 1>(low, source + c * channel_state, 0, 1, w_low + c * kOutputBlock);
        add_products<T, 1>(high, source + c * channel_state, 0, 1, w_high + c * kHigh);
      }
    }
    if (upper) finish_block(s, first + kOutputBlock, high_width, Constant<0>{}, high);
    finish_block(s, first, Constant<kOutputBlock>{}, Constant<0>{}, low);
    if (!upper) finish_block(s, first + kOutputBlock, high_width, Constant<0>{}, high);
  };
  if (channels <= kOutputBlock) {
    with_width<kOutputBlock>(channels, [&](auto width) INVERSE_FLOW_INLINED {
      for (int64_t s = 0; s < steps; ++s) solve_block(s, 0, width, width);
    });
    return;
  }
  constexpr int kBlocks = kVectors == 1 ? 2 : 1;
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t c = 0; kGeneralCorner && c < channels; ++c) {
      const T* y = state + s * step_state + c * channel_state;
      for (int64_t v = 0; v < lanes; v += kVectorLanes<T>) store(right + c * lanes + v, load(y + v));
    }
    for_blocks<kBlocks * kOutputBlock>(channels, upper, [&](int64_t first, auto width) INVERSE_FLOW_INLINED {
      constexpr int kOut = decltype(width)::value;
      if constexpr (kOut > kOutputBlock) {
        solve_pair(s, first, Constant<kOut - static_cast<int>(kOutputBlock)>{});
      } else {
        solve_block(s, first, width, Constant<0>{});
      }
    });
  }
}

template <class T, int kVectors>
using SolveSteps = decltype(&solve_steps<T, kVectors, false>);
template <class T, int kVectors>
INVERSE_FLOW_INLINE SolveSteps<T, kVectors> solve_steps_of(const Shape& shape) {
  return shape.corner == kGeneral ? &solve_steps<T, kVectors, true> : &solve_steps<T, kVectors, false>;
}
