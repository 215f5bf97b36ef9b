// The sums of the gradients of weight and bias, over steps that are solved.
// Included by sweep_impl.h alone, inside its namespace and under its target pragma.

// A stretch of steps whose outer products a tap sums: sources from `u`, other operand from `x`.
template <class T>
struct Span {
  const T* u;
  const T* x;
};

// The stretches of one tap, all of the same number of steps.
template <class T>
struct TapSpans {
  const Span<T>* spans;
  int64_t count;
  int64_t steps;
};

// Element strides of the two operands of an outer product.
struct OuterStrides {
  ptrdiff_t u_channel, u_step, x_channel, x_step;
};

// sums[a][b] -= sum over spans, steps and lanes of u[a] * x[b], for kA x kB channels.
template <class T, int kA, int kB, int kLanes>
INVERSE_FLOW_INLINE void outer_block(const TapSpans<T>& tap, const OuterStrides& stride, ptrdiff_t first_u,
                                     ptrdiff_t first_x, T* sums, int64_t channels) {
  constexpr int64_t n = kVectorLanes<T, kLanes>;
  Vector<T, kLanes> sum[kA][kB];
  set_zero(sum);
  for (int64_t i = 0; i < tap.count; ++i) {
    const T* u = tap.spans[i].u + first_u;
    const T* x = tap.spans[i].x + first_x;
    for (int64_t s = 0; s < tap.steps; ++s, u += stride.u_step, x += stride.x_step) {
      for (int v = 0; v < kVectors<T, kLanes>; ++v) {
        Vector<T, kLanes> right[kB];
        for (int b = 0; b < kB; ++b) right[b] = load_once<kLanes>(x + b * stride.x_channel + v * n);
        for (int a = 0; a < kA; ++a) {
          const Vector<T, kLanes> left = load_once<kLanes>(u + a * stride.u_channel + v * n);
          for (int b = 0; b < kB; ++b) sum[a][b] += left * right[b];
        }
      }
    }
  }
  Vector<T, kLanes> flat[kA * kB];
  for (int a = 0; a < kA; ++a) {
    for (int b = 0; b < kB; ++b) flat[a * kB + b] = sum[a][b];
  }
  T total[kA * kB];
  horizontal_sums<T, kLanes>(flat, total);
  for (int a = 0; a < kA; ++a) {
    for (int b = 0; b < kB; ++b) sums[a * channels + b] -= total[a * kB + b];
  }
}

// Channels of a block of either operand: 4 x 3 accumulators, 3 + 1 operands of 16 registers, or twice as many of 32.
constexpr int kLeftBlock = 4;
constexpr int kRightBlock = INVERSE_FLOW_VECTOR_BYTES == 64 ? 6 : 3;

// Steps whose outer products are summed at a time, of which all taps of a block read no more than stays in L1: 48 KiB
// where vectors have 512 bits, else 32.
template <class T>
INVERSE_FLOW_INLINE int64_t summed_steps(int64_t lane_stride) {
  constexpr int64_t kBytes = (INVERSE_FLOW_VECTOR_BYTES == 64 ? 40 : 27) << 10;
  return larger(kBytes / ((kLeftBlock + kRightBlock) * lane_stride * static_cast<int64_t>(sizeof(T))), 1);
}

// The weight gradient of all taps and channel pairs. The taps are the inner loop, since their sources overlap.
template <class T, int kLanes>
static __attribute__((noinline)) void outer_sums(const TapSpans<T>* taps, int64_t tap_count, int64_t channels,
                                                 const OuterStrides& stride, T* sums) {
  for_blocks<kLeftBlock>(channels, false, [&](int64_t a, auto left) {
    for_blocks<kRightBlock>(channels, false, [&](int64_t b, auto right) {
      for (int64_t t = 0; t < tap_count; ++t) {
        outer_block<T, decltype(left)::value, decltype(right)::value, kLanes>(
            taps[t], stride, a * stride.u_channel, b * stride.x_channel, sums + (t * channels + a) * channels + b,
            channels);
      }
    });
  });
}

// bias_sums[c] -= sum of the state over steps and lanes (lanes without a pixel hold zero).
template <class T, int kLanes>
static void subtract_sums(const T* state, int64_t channels, ptrdiff_t channel_state, ptrdiff_t step_state,
                          int64_t steps, T* sums) {
  constexpr int64_t n = kVectorLanes<T, kLanes>;
  for (int64_t c = 0; c < channels; ++c) {
    Vector<T, kLanes> sum[1]{};
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t v = 0; v < kLanes; v += n) sum[0] += load<kLanes>(state + s * step_state + c * channel_state + v);
    }
    T total[1];
    horizontal_sums<T, kLanes>(sum, total);
    sums[c] -= total[0];
  }
}
