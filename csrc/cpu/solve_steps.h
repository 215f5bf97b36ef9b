// The recurrence itself: solves neighbouring steps of a line whose pixels are packed, in place.
// Included by sweep_impl.h alone, inside its namespace and under its target pragma.

// One tap of a line: where its source lies from the state of the current step, and its place in the weights.
struct Tap {
  ptrdiff_t source;
  int64_t index;
};

// Sums of kOut output channels for kLanes lanes, in registers.
template <class T, int kOut, int kLanes>
using Sums = Vector<T, kLanes>[kOut][kVectors<T, kLanes>];

// sum[o] += sum over input channels of w * source. kIn > 0 fixes the number of input channels, so that the loop over
// them unrolls.
template <class T, int kLanes, int kIn, int kOut>
INVERSE_FLOW_INLINE void add_products(Sums<T, kOut, kLanes>& sum, const T* source, ptrdiff_t channel_stride,
                                      int64_t in_channels, const T* weights) {
  constexpr int n = kVectorLanes<T, kLanes>, kCount = kVectors<T, kLanes>;
  const int64_t count = kIn > 0 ? kIn : in_channels;
#pragma GCC unroll 6
  for (int64_t c = 0; c < count; ++c) {
    Vector<T, kLanes> x[kCount];
    for (int v = 0; v < kCount; ++v) x[v] = load<kLanes>(source + c * channel_stride + v * n);
    for (int o = 0; o < kOut; ++o) {
      for (int v = 0; v < kCount; ++v) sum[o][v] += x[v] * weights[c * kOut + o];
    }
  }
}

template <class T, int kLanes, int kOut>
INVERSE_FLOW_INLINE void store_sums(const Sums<T, kOut, kLanes>& sum, T* out, ptrdiff_t out_stride) {
  for (int o = 0; o < kOut; ++o) {
    for (int v = 0; v < kVectors<T, kLanes>; ++v) {
      store<kLanes>(out + o * out_stride + v * kVectorLanes<T, kLanes>, sum[o][v]);
    }
  }
}

// sum = W sum for a unit triangular W, in place. The products are added up before they meet the value they are added
// to: they are often far smaller, and adding each by itself would round each to its size.
template <class T, int kLanes, int kOut>
INVERSE_FLOW_INLINE void multiply_unit_triangular(Sums<T, kOut, kLanes>& sum, const T* weights, bool upper) {
  const auto row = [&](int o, int begin, int end) {
    for (int v = 0; v < kVectors<T, kLanes>; ++v) {
      Vector<T, kLanes> products = sum[begin][v] * weights[begin * kOut + o];
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

// low and high += sum over input channels of w * source, for two blocks at once: a line of one vector has six
// accumulators per block, and eight multiply-adds can start before the first one is done.
template <class T, int kLanes, int kLow, int kHigh>
INVERSE_FLOW_INLINE void add_products_of_two(Sums<T, kLow, kLanes>& low, Sums<T, kHigh, kLanes>& high, const T* source,
                                             ptrdiff_t channel_stride, int64_t in_channels, const T* w_low,
                                             const T* w_high) {
  for (int64_t c = 0; c < in_channels; ++c) {
    add_products<T, kLanes, 1>(low, source + c * channel_stride, 0, 1, w_low + c * kLow);
    add_products<T, kLanes, 1>(high, source + c * channel_stride, 0, 1, w_high + c * kHigh);
  }
}

// Solves `steps` neighbouring steps that share a list of taps, in place: the state holds the packed y - bias. Where
// `held`, [step][lane], has no bits set the solution is zero; null: nowhere. Of a general M and more channels than a
// block, `right` keeps the right side of M x = r of a step, since every block of x needs all of it. A general M is a
// case of its own at compile time: as a branch between the sums it costs the others registers.
template <class T, int kLanes, bool kGeneralCorner>
static __attribute__((noinline)) void solve_steps(const Weights<T>& weights, const Shape& shape, int64_t steps,
                                                  T* state, ptrdiff_t step_state, ptrdiff_t channel_state,
                                                  const Tap* taps, int64_t tap_count, const T* held, T* right) {
  constexpr int n = kVectorLanes<T, kLanes>, kCount = kVectors<T, kLanes>;
  const int64_t channels = shape.channels;
  const bool triangular = !kGeneralCorner && weights.corner;
  const bool upper = triangular && shape.transposed;
  // Captures are copies: what is captured by reference would be read again after every store.
  const auto block_taps = [=](int64_t first) { return weights.taps + first * channels * (shape.taps() - 1); };
  const auto block_corner = [=](int64_t first) { return weights.corner ? weights.corner + first * channels : nullptr; };
  const auto store_solution = [=](int64_t s, int64_t first, auto& sum) INVERSE_FLOW_INLINED {
    if (held) {
      for (int v = 0; v < kCount; ++v) {
        const Vector<T, kLanes> mask = load<kLanes>(held + s * kLanes + v * n);
        for (auto& row : sum) row[v] = where_held<T, kLanes>(row[v], mask);
      }
    }
    store_sums<T, kLanes>(sum, state + s * step_state + first * channel_state, channel_state);
  };
  // What a block of channels does with the sums of its taps; kIn fixes the number of channels where a block holds all
  // of them.
  const auto finish_block = [=](int64_t s, int64_t first, auto width, auto in, auto& sum) INVERSE_FLOW_INLINED {
    constexpr int kOut = decltype(width)::value;
    constexpr int kIn = decltype(in)::value;
    T* x = state + s * step_state;
    const T* corner = block_corner(first);
    if (kIn == 0 && triangular) {
      // The blocks solved before this one, at this very step.
      const int64_t begin = upper ? first + kOut : 0;
      const int64_t end = upper ? channels : first;
      add_products<T, kLanes, 0>(sum, x + begin * channel_state, channel_state, end - begin, corner + begin * kOut);
    }
    // y comes after the products, for the reason that `multiply_unit_triangular` gives.
    if constexpr (kGeneralCorner && kIn > 0) {
      add_products<T, kLanes, kIn>(sum, x, channel_state, channels, corner);
    } else {
      for (int o = 0; o < kOut; ++o) {
        const T* y = x + (first + o) * channel_state;
        for (int v = 0; v < kCount; ++v) sum[o][v] += load<kLanes>(y + v * n);
      }
    }
    if constexpr (kGeneralCorner && kIn == 0) {
      store_sums<T, kLanes>(sum, right + first * kLanes, kLanes);
    } else {
      if (triangular) multiply_unit_triangular<T, kLanes>(sum, corner + first * kOut, upper);
      store_solution(s, first, sum);
    }
  };
  const auto solve_block = [=](int64_t s, int64_t first, auto width, auto in) INVERSE_FLOW_INLINED {
    constexpr int kOut = decltype(width)::value;
    constexpr int kIn = decltype(in)::value;
    const int64_t in_channels = kIn > 0 ? kIn : channels;
    const T* x = state + s * step_state;
    const T* w = block_taps(first);
    Sums<T, kOut, kLanes> sum;
    set_zero(sum);
    for (int64_t t = 0; t < tap_count; ++t) {
      add_products<T, kLanes, kIn>(sum, x + taps[t].source, channel_state, in_channels,
                                   w + taps[t].index * in_channels * kOut);
    }
    finish_block(s, first, width, in, sum);
  };
  const auto solve_pair = [=](int64_t s, int64_t first, auto high_width) INVERSE_FLOW_INLINED {
    constexpr int kHigh = decltype(high_width)::value;
    const T* x = state + s * step_state;
    const T* low_taps = block_taps(first);
    const T* high_taps = block_taps(first + kOutputBlock);
    Sums<T, kOutputBlock, kLanes> low;
    set_zero(low);
    Sums<T, kHigh, kLanes> high;
    set_zero(high);
    for (int64_t t = 0; t < tap_count; ++t) {
      const int64_t at = taps[t].index * channels;
      add_products_of_two<T, kLanes>(low, high, x + taps[t].source, channel_state, channels,
                                     low_taps + at * kOutputBlock, high_taps + at * kHigh);
    }
    if (upper) finish_block(s, first + kOutputBlock, high_width, Constant<0>{}, high);
    finish_block(s, first, Constant<kOutputBlock>{}, Constant<0>{}, low);
    if (!upper) finish_block(s, first + kOutputBlock, high_width, Constant<0>{}, high);
  };
  // x = M^-1 r of one block, or of two.
  const auto multiply_block = [=](int64_t s, int64_t first, auto width) INVERSE_FLOW_INLINED {
    Sums<T, decltype(width)::value, kLanes> sum;
    set_zero(sum);
    add_products<T, kLanes, 0>(sum, right, kLanes, channels, block_corner(first));
    store_solution(s, first, sum);
  };
  const auto multiply_pair = [=](int64_t s, int64_t first, auto high_width) INVERSE_FLOW_INLINED {
    Sums<T, kOutputBlock, kLanes> low;
    set_zero(low);
    Sums<T, decltype(high_width)::value, kLanes> high;
    set_zero(high);
    add_products_of_two<T, kLanes>(low, high, right, kLanes, channels, block_corner(first),
                                   block_corner(first + kOutputBlock));
    store_solution(s, first, low);
    store_solution(s, first + kOutputBlock, high);
  };
  if (channels <= kOutputBlock) {
    with_width<kOutputBlock>(channels, [&](auto width) INVERSE_FLOW_INLINED {
      for (int64_t s = 0; s < steps; ++s) solve_block(s, 0, width, width);
    });
    return;
  }
  constexpr int kBlocks = kCount == 1 ? 2 : 1;
  const auto for_each = [=](auto one, auto two) INVERSE_FLOW_INLINED {
    for_blocks<kBlocks * kOutputBlock>(channels, upper, [&](int64_t first, auto width) INVERSE_FLOW_INLINED {
      constexpr int kOut = decltype(width)::value;
      if constexpr (kOut > kOutputBlock) {
        two(first, Constant<kOut - static_cast<int>(kOutputBlock)>{});
      } else {
        one(first, width);
      }
    });
  };
  for (int64_t s = 0; s < steps; ++s) {
    for_each([&](int64_t first, auto width) INVERSE_FLOW_INLINED { solve_block(s, first, width, Constant<0>{}); },
             [&](int64_t first, auto width) INVERSE_FLOW_INLINED { solve_pair(s, first, width); });
    if constexpr (kGeneralCorner) {
      for_each([&](int64_t first, auto width) INVERSE_FLOW_INLINED { multiply_block(s, first, width); },
               [&](int64_t first, auto width) INVERSE_FLOW_INLINED { multiply_pair(s, first, width); });
    }
  }
}

template <class T, int kLanes>
using SolveSteps = decltype(&solve_steps<T, kLanes, false>);
template <class T, int kLanes>
INVERSE_FLOW_INLINE SolveSteps<T, kLanes> solve_steps_of(const Shape& shape) {
  return shape.corner == kGeneral ? &solve_steps<T, kLanes, true> : &solve_steps<T, kLanes, false>;
}
