// The CPU kernels, written once and compiled for each instruction set (sweep_avx512.cpp, sweep_avx2.cpp,
// sweep_portable.cpp).
//
//   for each line (sweep.h), for each step of it:
//     r = y - bias - sum over taps of W_tap * x at (step - tap)      micro-kernel `add_products`, taps x channels
//     x = M^-1 r                                                     on the sums, in registers
//   where M is general, its inverse is in the taps, and y - bias is one more of them:
//     x = M^-1 (y - bias) - sum over taps of (M^-1 W_tap) * x at (step - tap)
//   and, for the weight gradient, once a slab of lines is solved:
//     dW_tap -= sum over steps and lanes of u at (step - tap) * other
//
// A micro-kernel keeps 6 output channels x 2 vectors of lanes in registers: per input channel 2 vector loads and 6
// broadcasts feed 12 multiply-adds. The state (x, or u) lies as [step][channel][lane], so every tap is a pointer at a
// fixed distance. Images are packed through 8 x 8 transposes, a slab of rows or a stretch of steps at a time.
// Operations: taps * C^2 multiply-adds a pixel. Bytes: each image read once and written once; the state stays in L2.
//
// No include guard and no includes on purpose: the including file provides both, outside the target pragma.

namespace inverse_flow::cpu::INVERSE_FLOW_ISA {

#include "vector.h"

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
INVERSE_FLOW_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INVERSE_FLOW_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out 64-byte-aligned pieces of the caller's scratch; with a null base it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// Packing works on eight lanes, so a line has at least that many; two vectors hide the latency of the multiply-adds.
template <class T>
constexpr int64_t kMinVectors = kVectorLanes<T> >= 8 ? 1 : 8 / kVectorLanes<T>;
template <class T>
constexpr int64_t kMaxVectors = kMinVectors<T> > 2 ? kMinVectors<T> : 2;

// ---------------------------------------------------------------------------------------------- micro-kernels

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

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(width as a constant), for a width of 1 to kMost.
template <int kMost, class F>
INVERSE_FLOW_INLINE void with_width(int64_t width, F f) {
  if constexpr (kMost > 1) {
    if (width < kMost) return with_width<kMost - 1>(width, f);
  }
  f(Constant<kMost>{});
}

// Calls f(first channel, width as a constant) for each block of at most kMost channels.
template <int kMost, class F>
INVERSE_FLOW_INLINE void for_blocks(int64_t channels, bool backwards, F f) {
  const int64_t blocks = (channels + kMost - 1) / kMost;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = (backwards ? blocks - 1 - i : i) * kMost;
    with_width<kMost>(smaller(kMost, channels - first), [&](auto width) INVERSE_FLOW_INLINED { f(first, width); });
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
template <class T, int kA, int kB, int kVectors>
INVERSE_FLOW_INLINE void outer_block(const TapSpans<T>& tap, const OuterStrides& stride, ptrdiff_t first_u,
                                     ptrdiff_t first_x, T* sums, int64_t channels) {
  constexpr int64_t n = kVectorLanes<T>;
  Vector<T> sum[kA][kB] = {};
  for (int64_t i = 0; i < tap.count; ++i) {
    const T* u = tap.spans[i].u + first_u;
    const T* x = tap.spans[i].x + first_x;
    for (int64_t s = 0; s < tap.steps; ++s, u += stride.u_step, x += stride.x_step) {
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> right[kB];
        for (int b = 0; b < kB; ++b) right[b] = load(x + b * stride.x_channel + v * n);
        for (int a = 0; a < kA; ++a) {
          const Vector<T> left = load(u + a * stride.u_channel + v * n);
          for (int b = 0; b < kB; ++b) sum[a][b] += left * right[b];
        }
      }
    }
  }
  for (int a = 0; a < kA; ++a) {
    for (int b = 0; b < kB; ++b) sums[a * channels + b] -= horizontal_sum<T>(sum[a][b]);
  }
}

// The weight gradient of all taps and channel pairs: 4 x 3 accumulators, 3 + 1 operands of 16 registers. The taps are
// the inner loop, since their sources overlap and stay in L1.
template <class T, int kVectors>
static __attribute__((noinline)) void outer_sums(const TapSpans<T>* taps, int64_t tap_count, int64_t channels,
                                                 const OuterStrides& stride, T* sums) {
  for_blocks<4>(channels, false, [&](int64_t a, auto left) {
    for_blocks<3>(channels, false, [&](int64_t b, auto right) {
      for (int64_t t = 0; t < tap_count; ++t) {
        outer_block<T, decltype(left)::value, decltype(right)::value, kVectors>(
            taps[t], stride, a * stride.u_channel, b * stride.x_channel, sums + (t * channels + a) * channels + b,
            channels);
      }
    });
  });
}

// ---------------------------------------------------------------------------------------------- packing

// How the lanes of a line map to memory: lane l at step s, channel c is data + start[l] + c * channel stride + s *
// column stride. The first `used` lanes hold a pixel at steps first[l] <= s < last[l], the others never do.
struct Lanes {
  int64_t count;
  int64_t used;
  int64_t first[kMaxLanes];
  int64_t last[kMaxLanes];
};

// One block of eight lanes during a call of `pack` or `unpack`, whose steps are counted from its first.
template <class T>
struct LaneBlock {
  using Step = typename EightOf<T>::step;
  using Index = typename EightOf<T>::index;
  int64_t used;
  Index first{}, last{};
  int64_t any_first, any_last = 0;  // no lane holds a pixel outside of these steps
  int64_t all_first = 0, all_last;  // every used lane holds one inside of these

  LaneBlock(const Lanes& lanes, int64_t block, int64_t begin, int64_t steps)
      : used(smaller(larger(lanes.used - block, 0), 8)), any_first(steps), all_last(steps) {
    for (int64_t l = 0; l < used; ++l) {
      // Cut to the steps of the call, so that they fit the integers beside a vector's elements.
      const int64_t low = smaller(larger(lanes.first[block + l] - begin, 0), steps);
      const int64_t high = smaller(larger(lanes.last[block + l] - begin, 0), steps);
      first[l] = static_cast<Step>(low);
      last[l] = static_cast<Step>(high);
      any_first = smaller(any_first, low);
      any_last = larger(any_last, high);
      all_first = larger(all_first, low);
      all_last = smaller(all_last, high);
    }
  }

  bool holds(int64_t lane, int64_t step) const { return step >= first[lane] && step < last[lane]; }
  bool everywhere(int64_t from, int64_t to) const { return from >= all_first && to <= all_last && used > 0; }
  bool nowhere(int64_t from, int64_t to) const { return to <= any_first || from >= any_last; }
  // All bits set in the lanes that hold a pixel.
  Index mask(int64_t step) const {
    const Index at = Index{} + static_cast<Step>(step);
    return (Index)(at >= first) & (Index)(at < last);
  }
};

// `value` where the mask's bits are set, else zero.
template <class T>
INVERSE_FLOW_INLINE Eight<T> masked(Eight<T> value, typename EightOf<T>::index mask) {
  return (Eight<T>)((typename EightOf<T>::index)value & mask);
}

// The common case of `pack`, without a decision for each value: eight steps at which every used lane holds a pixel.
template <class IO, class T>
INVERSE_FLOW_INLINE void pack_whole(const IO* const (&from)[8], ptrdiff_t offset, ptrdiff_t step_stride, T bias,
                                    typename EightOf<T>::index used, T* to, ptrdiff_t to_step) {
  Eight<T> rows[8];
  for (int64_t l = 0; l < 8; ++l) rows[l] = load8(from[l] + offset);
  transpose8<T>(rows);
  // A mirrored row comes last step first.
  if (step_stride == -1) to += 7 * to_step;
  for (int64_t s = 0; s < 8; ++s) store8(to + s * step_stride * to_step, masked<T>(rows[s] - bias, used));
}

// The inverse of `pack_whole`.
template <class IO, class T>
INVERSE_FLOW_INLINE void unpack_whole(IO* to, const ptrdiff_t* start, int64_t used, ptrdiff_t step_stride,
                                      const T* from, ptrdiff_t from_step) {
  Eight<T> rows[8];
  for (int64_t s = 0; s < 8; ++s) rows[s] = load8(from + (step_stride == 1 ? s : 7 - s) * from_step);
  transpose8<T>(rows);
  for (int64_t l = 0; l < 8; ++l) {
    if (l < used) store8(to + start[l], rows[l]);
  }
}

// Steps are packed and unpacked in pieces of eight, from multiples of eight on, since there the lanes of a skewed band
// begin and end. Calls f(first step of a piece) for steps [begin, begin + steps), counted from `begin`; where that is
// not so, and at the end, pieces overlap rather than be cut. Only where there are fewer than eight steps a piece is
// shorter.
template <class F>
INVERSE_FLOW_INLINE void for_pieces(int64_t begin, int64_t steps, F f) {
  for (int64_t piece = 0; piece < steps; piece = ((begin + piece) / 8 + 1) * 8 - begin) {
    f(larger(smaller(piece, steps - 8), 0));
  }
}

// Steps [begin, begin + steps) of an image tensor into the state, minus the bias; zero where a lane holds no pixel.
// `state` is at step `begin`. A channel's steps are read in one go, so that each cache line is visited once. With
// `merge` the lanes that hold no pixel keep what is in the state.
template <class IO, class T>
static __attribute__((noinline)) void pack(const Image<const IO>& image, const ptrdiff_t* start, const Lanes& lanes,
                                           int64_t channels, int64_t begin, int64_t steps, const T* bias, T* state,
                                           ptrdiff_t channel_state, ptrdiff_t step_state, bool merge = false) {
  const ptrdiff_t step_stride = image.stride.column;
  const ptrdiff_t channel_stride = image.stride.channel;
  for (int64_t block = 0; block < lanes.count; block += 8) {
    const LaneBlock<T> held(lanes, block, begin, steps);
    const IO* from[8];
    const IO* lowest = image.data + start[block];
    const IO* highest = lowest;
    for (int64_t l = 0; l < 8; ++l) {
      // An unused lane reads another lane's pixels; they are zeroed below like all that lie outside a lane's range.
      from[l] = image.data + start[l < held.used ? block + l : block];
      if (from[l] < lowest) lowest = from[l];
      if (from[l] > highest) highest = from[l];
    }
    // Vectors of eight may run past a row into the next one, but never out of the tensor.
    const auto readable = [&](ptrdiff_t offset) {
      return offset >= image.begin - lowest && offset + 8 <= image.end - highest;
    };
    const auto put = [&](int64_t s, int64_t c, Eight<T> value) {
      if (bias) value -= bias[c];
      T* const to = state + s * step_state + c * channel_state + block;
      const auto mask = held.mask(s);
      value = masked<T>(value, mask);
      store8(to, merge ? value + masked<T>(load8(to), ~mask) : value);
    };
    const auto gather = [&](int64_t s, int64_t c) {
      IO values[8] = {};
      for (int64_t l = 0; l < held.used; ++l) {
        if (held.holds(l, s)) values[l] = from[l][c * channel_stride + (begin + s) * step_stride];
      }
      return load8(values);
    };
    if (step_stride == 1 || step_stride == -1) {
      for (int64_t c = 0; c < channels; ++c) {
        for_pieces(begin, steps, [&](int64_t piece) INVERSE_FLOW_INLINED {
          const int64_t count = smaller(8, steps - piece);
          // A mirrored row is read from its other end.
          const ptrdiff_t offset = c * channel_stride + (step_stride == 1 ? begin + piece : -(begin + piece + 7));
          if (held.everywhere(piece, piece + 8) && readable(offset) && (!merge || held.used == 8)) {
            pack_whole(from, offset, step_stride, bias ? bias[c] : T(0), held.mask(piece),
                       state + piece * step_state + c * channel_state + block, step_state);
          } else if (held.nowhere(piece, piece + count)) {
            for (int64_t s = piece; !merge && s < piece + count; ++s) put(s, c, Eight<T>{});
          } else if (readable(offset)) {
            Eight<T> rows[8];
            for (int64_t l = 0; l < 8; ++l) rows[l] = load8(from[l] + offset);
            transpose8<T>(rows);
            for (int64_t s = 0; s < count; ++s) put(piece + s, c, rows[step_stride == 1 ? s : 7 - s]);
          } else {
            for (int64_t s = piece; s < piece + count; ++s) put(s, c, gather(s, c));
          }
        });
      }
      continue;
    }
    for (int64_t s = 0; s < steps; ++s) {
      int64_t c = 0;
      // Channels last: eight channels of eight lanes.
      while (channel_stride == 1 && c + 8 <= channels && readable((begin + s) * step_stride + c)) {
        Eight<T> rows[8];
        for (int64_t l = 0; l < 8; ++l) rows[l] = load8(from[l] + (begin + s) * step_stride + c);
        transpose8<T>(rows);
        for (int64_t k = 0; k < 8; ++k) put(s, c + k, rows[k]);
        c += 8;
      }
      for (; c < channels; ++c) put(s, c, gather(s, c));
    }
  }
}

// The first `count` of eight values, without touching the memory behind them.
template <class T, class IO>
INVERSE_FLOW_INLINE void store_some(IO* p, Eight<T> value, int64_t skip, int64_t count) {
  if (count == 8) return store8(p, value);
  IO values[8];
  store8(values, value);
  const IO* from = values + skip;
  p += skip;
  for (int64_t size = 4; size > 0; size /= 2) {
    if (!(count & size)) continue;
    __builtin_memcpy(p, from, size * sizeof(IO));
    p += size;
    from += size;
  }
}

// The inverse of `pack`, from the state: `state` is at step `begin`.
template <class IO, class T>
static __attribute__((noinline)) void unpack(const Image<IO>& image, const ptrdiff_t* start, const Lanes& lanes,
                                             int64_t channels, int64_t begin, int64_t steps, const T* state,
                                             ptrdiff_t channel_state, ptrdiff_t step_state) {
  const ptrdiff_t step_stride = image.stride.column;
  const ptrdiff_t channel_stride = image.stride.channel;
  for (int64_t block = 0; block < lanes.used; block += 8) {
    const LaneBlock<T> held(lanes, block, begin, steps);
    if (step_stride == 1 || step_stride == -1) {
      for (int64_t c = 0; c < channels; ++c) {
        for_pieces(begin, steps, [&](int64_t piece) INVERSE_FLOW_INLINED {
          const int64_t count = smaller(8, steps - piece);
          const T* from = state + piece * step_state + c * channel_state + block;
          const ptrdiff_t offset = step_stride == 1 ? begin + piece : -(begin + piece + 7);
          IO* channel = image.data + c * channel_stride + offset;
          if (held.everywhere(piece, piece + 8)) {
            unpack_whole(channel, start + block, held.used, step_stride, from, step_state);
            return;
          }
          if (held.nowhere(piece, piece + count)) return;
          Eight<T> rows[8];
          for (int64_t s = 0; s < 8; ++s) rows[s] = load8(from + smaller(s, count - 1) * step_state);
          transpose8<T>(rows);
          for (int64_t l = 0; l < held.used; ++l) {
            const int64_t low = larger(held.first[l] - piece, 0);
            const int64_t high = smaller(held.last[l] - piece, count);
            if (low >= high) continue;
            IO* row = channel + start[block + l];
            if (step_stride == 1) {
              store_some<T>(row, rows[l], low, high - low);
            } else {
              store_some<T>(row, reverse8<T>(rows[l]), 8 - high, high - low);
            }
          }
        });
      }
      continue;
    }
    for (int64_t s = 0; s < steps; ++s) {
      const T* from = state + s * step_state + block;
      int64_t c = 0;
      for (; channel_stride == 1 && c + 8 <= channels; c += 8) {
        Eight<T> rows[8];
        for (int64_t k = 0; k < 8; ++k) rows[k] = load8(from + (c + k) * channel_state);
        transpose8<T>(rows);
        for (int64_t l = 0; l < held.used; ++l) {
          if (held.holds(l, s)) store8(image.data + start[block + l] + (begin + s) * step_stride + c, rows[l]);
        }
      }
      for (; c < channels; ++c) {
        IO values[8];
        store8(values, load8(from + c * channel_state));
        for (int64_t l = 0; l < held.used; ++l) {
          if (held.holds(l, s)) {
            image.data[start[block + l] + c * channel_stride + (begin + s) * step_stride] = values[l];
          }
        }
      }
    }
  }
}

// bias_sums[c] -= sum of the state over steps and lanes (lanes without a pixel hold zero).
template <class T>
static void subtract_sums(const T* state, int64_t channels, ptrdiff_t channel_state, ptrdiff_t step_state,
                          int64_t steps, int64_t lanes, T* sums) {
  constexpr int64_t n = kVectorLanes<T>;
  for (int64_t c = 0; c < channels; ++c) {
    Vector<T> sum{};
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t v = 0; v < lanes; v += n) sum += load(state + s * step_state + c * channel_state + v);
    }
    sums[c] -= horizontal_sum<T>(sum);
  }
}

// ---------------------------------------------------------------------------------------------- images as lanes

// How an image is cut up: a slab of rows is packed, solved in place and unpacked in one go, and its weight gradient
// summed. Only where a single row is too large is it packed and solved a stretch at a time.
template <class T>
struct ImagesPlan {
  int64_t rows;     // of a slab
  int64_t stretch;  // columns

  ImagesPlan(const Shape& shape, bool with_gradient, int64_t lanes) {
    const int64_t pixel_bytes = shape.channels * lanes * static_cast<int64_t>(sizeof(T)) * (with_gradient ? 2 : 1);
    const int64_t pixels = larger(kSlabBytes / pixel_bytes, kStretch);
    rows = larger(smaller(pixels / shape.width, shape.height), 1);
    stretch = rows > 1 ? shape.width : smaller(pixels / kStretch * kStretch, shape.width);
  }
};

template <class T>
struct ImagesScratch {
  T* state;  // [kernel_h - 1 rows above the slab, then its rows][column][channel][lane]
  T* other;  // [row of the slab][column][channel][lane]
  T* right;  // [channel][lane]
  TapPosition* order;
  Tap* taps;  // [column up to kernel_w - 1][tap]
  TapSpans<T>* tap_spans;
  Span<T>* spans;  // [tap][row of the slab]
  size_t bytes;

  ImagesScratch(const Shape& shape, bool with_gradient, int64_t lanes, void* memory) {
    const ImagesPlan<T> plan(shape, with_gradient, lanes);
    const int64_t pixel = shape.channels * lanes;
    const int64_t gradient_rows = with_gradient ? plan.rows : 0;
    Arena arena{static_cast<char*>(memory)};
    state = arena.take<T>((plan.rows + shape.kernel_h - 1) * shape.width * pixel);
    other = arena.take<T>(gradient_rows * shape.width * pixel);
    right = arena.take<T>(pixel);
    order = arena.take<TapPosition>(shape.taps());
    taps = arena.take<Tap>(shape.kernel_w * shape.taps());
    tap_spans = arena.take<TapSpans<T>>(with_gradient ? shape.taps() : 0);
    spans = arena.take<Span<T>>(gradient_rows * shape.taps());
    bytes = arena.used;
  }
};

template <class IO, class T>
static size_t images_scratch(const Problem<IO, T>& problem, int64_t lanes) {
  return ImagesScratch<T>(problem.shape, problem.with_gradient, lanes, nullptr).bytes;
}

template <class IO, class T, int kVectors>
static void sweep_images(const Problem<IO, T>& problem, int64_t first_image, int64_t count, void* memory,
                         Gradients<T> gradients) {
  const Shape& shape = problem.shape;
  const int64_t channels = shape.channels;
  const int64_t tap_count = shape.taps() - 1;
  constexpr int64_t lane_count = kVectors * kVectorLanes<T>;
  const ptrdiff_t step_state = channels * lane_count;
  const ptrdiff_t row_state = shape.width * step_state;
  const ImagesPlan<T> plan(shape, problem.with_gradient, lane_count);
  const ImagesScratch<T> scratch(shape, problem.with_gradient, lane_count, memory);
  T* const slab = scratch.state + (shape.kernel_h - 1) * row_state;
  const SolveSteps<T, kVectors> solve = solve_steps_of<T, kVectors>(shape);
  tap_order(shape, scratch.order);

  Lanes lanes;
  lanes.count = lane_count;
  lanes.used = count;
  for (int64_t l = 0; l < count; ++l) {
    lanes.first[l] = 0;
    lanes.last[l] = plan.rows * shape.width;
  }
  // Calls f(start of each lane, first step, steps, place in the slab) for columns [begin, end) of rows [first, last):
  // at once where the rows follow each other in memory, else row by row.
  const auto for_lines = [&](const auto& image, int64_t first, int64_t last, int64_t begin, int64_t end, auto f) {
    const bool joined = image.stride.row == shape.width * image.stride.column && end - begin == shape.width;
    const int64_t rows = joined ? last - first : 1;
    for (int64_t row = first; row < last; row += rows) {
      ptrdiff_t start[kMaxLanes];
      for (int64_t l = 0; l < lane_count; ++l) {
        start[l] = (first_image + l) * image.stride.batch + row * image.stride.row;
      }
      f(start, begin, rows * (end - begin), (row - first) * row_state + begin * step_state);
    }
  };

  // Taps that reach above the image or left of it are left out: one list for each column they can reach from.
  const auto list_taps = [&](int64_t row) {
    for (int64_t column = 0; column < smaller(shape.kernel_w, shape.width); ++column) {
      Tap* list = scratch.taps + column * shape.taps();
      for (int64_t t = 0; t < tap_count; ++t) {
        const auto [p, q] = scratch.order[t];
        if (p <= row && q <= column) *list++ = {-p * row_state - q * step_state, t};
      }
    }
  };
  const auto solve_row = [&](int64_t row, int64_t begin, int64_t end, T* state) {
    const int64_t tap_rows = smaller(row + 1, shape.kernel_h);
    for (int64_t column = begin; column < end;) {
      const int64_t list = smaller(column, shape.kernel_w - 1);
      const int64_t steps = column < shape.kernel_w - 1 ? 1 : end - column;
      T* at = state + column * step_state;
      solve(problem.weights, shape, steps, at, step_state, lane_count, scratch.taps + list * shape.taps(),
            tap_rows * (list + 1) - 1, nullptr, scratch.right);
      column += steps;
    }
  };

  for (int64_t first = 0; first < shape.height; first += plan.rows) {
    const int64_t last = smaller(first + plan.rows, shape.height);
    // The rows above the slab are the last ones of what the buffer held before.
    if (first > 0)
      __builtin_memmove(scratch.state, scratch.state + plan.rows * row_state, (slab - scratch.state) * sizeof(T));
    for (int64_t begin = 0; begin < shape.width; begin += plan.stretch) {
      const int64_t end = smaller(begin + plan.stretch, shape.width);
      for_lines(problem.input, first, last, begin, end,
                [&](const ptrdiff_t* start, int64_t step, int64_t steps, ptrdiff_t at) {
                  pack(problem.input, start, lanes, channels, step, steps, problem.weights.bias, slab + at, lane_count,
                       step_state);
                });
      for (int64_t row = first; row < last; ++row) {
        if (row < shape.kernel_h) list_taps(row);
        solve_row(row, begin, end, slab + (row - first) * row_state);
      }
      for_lines(problem.output, first, last, begin, end,
                [&](const ptrdiff_t* start, int64_t step, int64_t steps, ptrdiff_t at) {
                  unpack(problem.output, start, lanes, channels, step, steps, slab + at, lane_count, step_state);
                });
    }
    if (!problem.with_gradient) continue;
    for_lines(problem.other, first, last, 0, shape.width,
              [&](const ptrdiff_t* start, int64_t step, int64_t steps, ptrdiff_t at) {
                pack<IO, T>(problem.other, start, lanes, channels, step, steps, nullptr, scratch.other + at, lane_count,
                            step_state);
              });
    subtract_sums(slab, channels, lane_count, step_state, (last - first) * shape.width, lane_count, gradients.bias);
    for (int64_t t = 0; t <= tap_count; ++t) {
      const auto [p, q] = t < tap_count ? scratch.order[t] : TapPosition{0, 0};
      Span<T>* spans = scratch.spans + t * plan.rows;
      int64_t span_count = 0;
      for (int64_t row = larger(first, p); row < last && q < shape.width; ++row) {
        spans[span_count++] = {slab + (row - p - first) * row_state,
                               scratch.other + (row - first) * row_state + q * step_state};
      }
      scratch.tap_spans[t] = {spans, span_count, shape.width - q};
    }
    outer_sums<T, kVectors>(scratch.tap_spans, tap_count + 1, channels,
                            {lane_count, step_state, lane_count, step_state}, gradients.weight);
  }
}

// ---------------------------------------------------------------------------------------------- rows as lanes

// Steps with lanes that hold no pixel are solved so many at a time at most.
constexpr int64_t kMaskedSteps = 32;

// The state of a line: [step][channel][lane], with the halo of the band above in front of the lanes, and in front of
// the window the steps that its taps reach.
template <class T>
struct RowsScratch {
  int64_t halo;         // rows above a band that its taps reach
  int64_t lane_stride;  // halo, padded so that the lanes stay aligned, and lanes
  int64_t lead;         // steps in front of the window
  T* memory;            // `lead_size`, then the window
  int64_t lead_size;
  T* state;  // at the window's first step, lane 0
  T* other;
  T* right;
  T* held;
  TapPosition* order;
  Tap* taps;
  TapSpans<T>* tap_spans;
  Span<T>* spans;
  size_t bytes;

  template <class IO>
  RowsScratch(const Problem<IO, T>& problem, const RowsPlan& plan, void* base) {
    const Shape& shape = problem.shape;
    halo = shape.kernel_h - 1;
    const int64_t padded = round_up(halo, 32 / static_cast<int64_t>(sizeof(T)));
    lane_stride = padded + plan.lanes;
    lead = shape.kernel_h + shape.kernel_w - 2;
    lead_size = lead * shape.channels * lane_stride;
    Arena arena{static_cast<char*>(base)};
    memory = arena.take<T>(lead_size + plan.window * shape.channels * lane_stride);
    state = base ? memory + lead_size + padded : nullptr;
    other = arena.take<T>(problem.with_gradient ? plan.window * shape.channels * plan.lanes : 0);
    right = arena.take<T>(shape.channels * plan.lanes);
    held = arena.take<T>(kMaskedSteps * plan.lanes);
    order = arena.take<TapPosition>(shape.taps());
    taps = arena.take<Tap>(shape.taps());
    tap_spans = arena.take<TapSpans<T>>(problem.with_gradient ? shape.taps() : 0);
    spans = arena.take<Span<T>>(problem.with_gradient ? shape.taps() : 0);
    bytes = arena.used;
  }
};

template <class IO, class T>
static size_t rows_scratch(const Problem<IO, T>& problem, const RowsPlan& plan) {
  return RowsScratch<T>(problem, plan, nullptr).bytes;
}

// A band of a line. Lane r runs r steps behind lane 0: at step s of the line it is at column s - start - r.
struct LineBand {
  int64_t index;  // among all bands
  int64_t image;
  int64_t row;   // of lane 0
  int64_t used;  // lanes that have a row
  int64_t start;
  int64_t end;  // the first step at which no lane holds a pixel any more

  LineBand(const Shape& shape, const RowsPlan& plan, int64_t band, int64_t first_step)
      : index(band),
        image(band / plan.bands % shape.batch),
        row(band % plan.bands * plan.lanes),
        used(smaller(plan.lanes, shape.height - row)),
        start(first_step),
        end(first_step + band_steps(shape, plan.lanes)) {}
};

// The one or two bands of a line that its lanes are at, the older one first.
struct LineBands {
  LineBand band[2];
  int count;
  const LineBand* begin() const { return band; }
  const LineBand* end() const { return band + count; }
  const LineBand& last() const { return band[count - 1]; }
  // Forgets the older one when all lanes are at the newer one, and not only between the two.
  void retire(int64_t step, int64_t lanes) {
    if (count == 2 && band[1].start + lanes - 1 <= step) {
      band[0] = band[1];
      count = 1;
    }
  }
};

// One line from its first band to its last.
template <class IO, class T, int kVectors>
class RowsSweep {
 public:
  RowsSweep(const Problem<IO, T>& problem, const Bands<T>& bands, int64_t first_band, void* memory,
            Gradients<T> gradients)
      : problem_(problem),
        shape_(problem.shape),
        bands_(bands),
        gradients_(gradients),
        scratch_(problem, bands.plan, memory),
        step_state_(shape_.channels * scratch_.lane_stride),
        half_(kVectors == 2 * kMinVectors<T> && shape_.channels > kOutputBlock ? kLanes / 2 : 0),
        line_{{{shape_, bands.plan, first_band, 0}, {shape_, bands.plan, first_band, 0}}, 1} {
    __builtin_memset(scratch_.memory, 0, scratch_.lead_size * sizeof(T));
    tap_order(shape_, scratch_.order);
    for (int64_t t = 0; t + 1 < shape_.taps(); ++t) {
      const auto [p, q] = scratch_.order[t];
      scratch_.taps[t] = {-(p + q) * step_state_ - p, t};
    }
  }

  void run() {
    for (int64_t begin = 0; begin < line_.last().end;) {
      const int64_t window = begin;
      while (begin < line_.last().end && begin + bands_.plan.stretch <= window + bands_.plan.window) {
        begin = sweep_stretch(begin, window);
      }
      if (problem_.with_gradient) sum_gradients(begin - window);
      // What the taps of the next window reach.
      __builtin_memmove(scratch_.memory, scratch_.memory + (begin - window) * step_state_,
                        scratch_.lead_size * sizeof(T));
    }
  }

 private:
  static constexpr int64_t kLanes = kVectors * kVectorLanes<T>;
  // Packs, solves and unpacks the steps from `begin` on, and returns the first step after them.
  int64_t sweep_stretch(int64_t begin, int64_t window) {
    const Shape& shape = shape_;
    T* const first = scratch_.state - window * step_state_;  // where step 0 would be
    int64_t end = begin + bands_.plan.stretch;
    for (const LineBand& band : line_) wait_for_halo(band, end);
    // Only now: who claims while it waits could wait for itself (see joined_lines_fit).
    const int64_t next_start = line_.last().start + band_period(shape);
    if (bands_.plan.joined && end > next_start) {
      if (const int64_t claimed = bands_.claim_after(line_.last().index); claimed >= 0) {
        line_.band[1] = LineBand(shape, bands_.plan, claimed, next_start);
        line_.count = 2;
        wait_for_halo(line_.last(), end);
        // Rows above lane 0 are ahead of it.
        fill_halo(next_start - scratch_.halo, begin, first);
      }
    }
    end = smaller(end, line_.last().end);
    fill_halo(begin == 0 ? -scratch_.halo : begin, end, first);
    T* const state = first + begin * step_state_;
    pack_bands(problem_.input, begin, end, problem_.weights.bias, state, scratch_.lane_stride);
    solve(begin, end, first);
    for (const LineBand& band : line_) {
      const int64_t from = larger(begin, band.start);
      const int64_t to = smaller(end, band.end);
      if (from >= to) continue;
      ptrdiff_t start[kMaxLanes];
      const Lanes lanes = lanes_of(band, problem_.output.stride, start);
      unpack(problem_.output, start, lanes, shape.channels, from - band.start, to - from, first + from * step_state_,
             scratch_.lane_stride, step_state_);
      pass_halo(band, from, to, first);
    }
    if (problem_.with_gradient) {
      pack_bands(problem_.other, begin, end, nullptr, scratch_.other + (begin - window) * shape.channels * kLanes,
                 kLanes);
    }
    line_.retire(end, kLanes);
    return end;
  }

  // Waits until the band above has solved what lies above `band` before step `end`; it is `kLanes` steps ahead.
  void wait_for_halo(const LineBand& band, int64_t end) const {
    if (band.row == 0) return;
    const int64_t needed = smaller(end - band.start + kLanes, band_steps(shape_, kLanes));
    while (bands_.steps_done[band.index - 1].load(std::memory_order_acquire) < needed) std::this_thread::yield();
  }

  // The rows above lane 0 at steps [begin, end): of the halos of the bands above, or zero. Row h runs h steps ahead.
  void fill_halo(int64_t begin, int64_t end, T* first) const {
    for (int64_t h = 1; h <= scratch_.halo; ++h) {
      for (int64_t c = 0; c < shape_.channels; ++c) {
        T* const to = first + c * scratch_.lane_stride - h;
        const auto fill = [&](int64_t from, int64_t until, const T* source) {
          for (int64_t s = from; s < until; ++s) to[s * step_state_] = source ? source[s] : T(0);
        };
        int64_t filled = begin;
        for (const LineBand& band : line_) {
          if (band.row == 0) continue;
          const int64_t start = band.start - h;
          const int64_t from = larger(start, begin);
          const int64_t until = smaller(start + shape_.width, end);
          if (from >= until) continue;
          fill(filled, from, nullptr);
          fill(from, until, halo_of(band.index - 1, h, c) - start);
          filled = until;
        }
        fill(filled, end, nullptr);
      }
    }
  }

  // Leaves what the band below needs of steps [begin, end), and says so.
  void pass_halo(const LineBand& band, int64_t begin, int64_t end, const T* first) const {
    if ((band.index + 1) % bands_.plan.bands == 0) return;
    // Of a kernel higher than the band, rows of its own halo are among them, which are ahead of lane 0.
    const int64_t first_step = begin == band.start ? begin - scratch_.halo : begin;
    for (int64_t h = 1; h <= scratch_.halo; ++h) {
      const int64_t lane = kLanes - h;
      const int64_t start = band.start + lane;
      const int64_t from = larger(first_step, start);
      const int64_t until = smaller(end, start + shape_.width);
      for (int64_t c = 0; c < shape_.channels; ++c) {
        const T* const row = first + c * scratch_.lane_stride + lane;
        T* const to = halo_of(band.index, h, c);
        for (int64_t s = from; s < until; ++s) to[s - start] = row[s * step_state_];
      }
    }
    bands_.steps_done[band.index].store(end - band.start, std::memory_order_release);
  }

  // A channel of a band's last row but h - 1.
  T* halo_of(int64_t band, int64_t h, int64_t channel) const {
    return bands_.halos + band * halo_size(shape_) + ((h - 1) * shape_.channels + channel) * shape_.width;
  }

  // The lanes of a band, counting steps from its own first.
  Lanes lanes_of(const LineBand& band, const Strides& stride, ptrdiff_t* start) const {
    Lanes lanes;
    lanes.count = kLanes;
    lanes.used = band.used;
    for (int64_t l = 0; l < kLanes; ++l) {
      start[l] = band.image * stride.batch + (band.row + l) * stride.row - l * stride.column;
      lanes.first[l] = l;
      lanes.last[l] = l + shape_.width;
    }
    return lanes;
  }

  // `state` is at step `begin`. Where two bands meet, the second is laid over the zeros of the first.
  void pack_bands(const Image<const IO>& image, int64_t begin, int64_t end, const T* bias, T* state,
                  ptrdiff_t channel_state) const {
    int64_t packed = begin;
    for (const LineBand& band : line_) {
      ptrdiff_t start[kMaxLanes];
      const Lanes lanes = lanes_of(band, image.stride, start);
      const auto part = [&](int64_t from, int64_t to, bool merge) {
        const ptrdiff_t step = shape_.channels * channel_state;
        if (from < to) {
          pack<IO, T>(image, start, lanes, shape_.channels, from - band.start, to - from, bias,
                      state + (from - begin) * step, channel_state, step, merge);
        }
      };
      // The first one also zeroes the steps at which neither holds a pixel.
      const int64_t to = &band == &line_.last() ? end : smaller(end, larger(band.end, line_.last().start + kLanes));
      part(larger(band.start, begin), packed, true);
      part(packed, to, false);
      packed = larger(packed, to);
    }
  }

  // What steps have in common.
  struct Run {
    bool low, high;  // whether a lane of either half holds a pixel
    bool masked;     // whether one is past the end of its row
    int64_t end;
  };

  // The steps from `step` on, to `end` at most. Lanes past the end of their row would go on with the recurrence. They
  // are zero instead: for the row that comes after the gap, and for the gradient, in which lanes without a row must be
  // zero too.
  Run run_at(int64_t step, int64_t end) const {
    Run run{!half_, !half_, false, end};
    for (const LineBand& band : line_) {
      const int64_t at = step - band.start;
      const int64_t width = shape_.width;
      const auto change = [&](int64_t to) {
        if (at < to) run.end = smaller(run.end, band.start + to);
      };
      // Until all lanes are at the next band.
      const int64_t gone = &band == &line_.last() ? end : line_.last().start - band.start + kLanes - 1;
      run.masked |= (at >= width && at < gone) || (problem_.with_gradient && band.used < kLanes);
      change(0);
      change(width);
      change(gone);
      if (!half_) continue;
      run.low |= at >= 0 && at < width + half_ - 1;
      run.high |= at >= half_ && at < width + kLanes - 1 && band.used > half_;
      change(half_);
      change(width + half_ - 1);
      change(width + kLanes - 1);
    }
    return run;
  }

  void solve(int64_t begin, int64_t end, T* first) const {
    for (int64_t s = begin; s < end;) {
      const Run run = run_at(s, end);
      const int64_t until = run.masked ? smaller(run.end, s + kMaskedSteps) : run.end;
      T* const state = first + s * step_state_;
      if (run.low && run.high) {
        solve_lanes<kVectors>(s, until, run.masked, 0, state);
      } else if (run.low || run.high) {
        solve_lanes<kMinVectors<T>>(s, until, run.masked, run.high ? half_ : 0, state);
      }
      s = until;
    }
  }

  // Lanes first_lane .. of so many vectors.
  template <int kCount>
  void solve_lanes(int64_t begin, int64_t end, bool masked, int64_t first_lane, T* state) const {
    constexpr int64_t count = kCount * kVectorLanes<T>;
    if (masked) {
      __builtin_memset(scratch_.held, 0, (end - begin) * count * sizeof(T));
      for (const LineBand& band : line_) {
        for (int64_t l = first_lane; l < smaller(band.used, first_lane + count); ++l) {
          const int64_t last = smaller(end, band.start + l + shape_.width);
          for (int64_t s = larger(begin, band.start + l); s < last; ++s) {
            __builtin_memset(scratch_.held + (s - begin) * count + l - first_lane, 0xff, sizeof(T));
          }
        }
      }
    }
    solve_steps_of<T, kCount>(shape_)(problem_.weights, shape_, end - begin, state + first_lane, step_state_,
                                      scratch_.lane_stride, scratch_.taps, shape_.taps() - 1,
                                      masked ? scratch_.held : nullptr, scratch_.right);
  }

  // The gradient of the window's `steps`.
  void sum_gradients(int64_t steps) const {
    const int64_t channels = shape_.channels;
    const int64_t tap_count = shape_.taps() - 1;
    subtract_sums(scratch_.state, channels, scratch_.lane_stride, step_state_, steps, kLanes, gradients_.bias);
    for (int64_t t = 0; t <= tap_count; ++t) {
      const ptrdiff_t source = t < tap_count ? scratch_.taps[t].source : 0;
      scratch_.spans[t] = {scratch_.state + source, scratch_.other};
      scratch_.tap_spans[t] = {&scratch_.spans[t], 1, steps};
    }
    outer_sums<T, kVectors>(scratch_.tap_spans, tap_count + 1, channels,
                            {scratch_.lane_stride, step_state_, kLanes, static_cast<ptrdiff_t>(channels * kLanes)},
                            gradients_.weight);
  }

  const Problem<IO, T>& problem_;
  const Shape& shape_;
  const Bands<T>& bands_;
  const Gradients<T> gradients_;
  const RowsScratch<T> scratch_;
  const ptrdiff_t step_state_;
  // Lanes of half a line, which is swept by itself while no row is in the other half; 0 where it would take as long as
  // the whole line, since a single block of channels has no other to be paired with (see solve_pair).
  const int64_t half_;
  LineBands line_;
};

// ---------------------------------------------------------------------------------------------- entry points

template <class IO, class T>
static void images(const Problem<IO, T>& problem, int64_t first, int64_t count, int64_t lanes, void* scratch,
                   Gradients<T> gradients) {
  if (lanes == kMinVectors<T> * kVectorLanes<T>) {
    sweep_images<IO, T, kMinVectors<T>>(problem, first, count, scratch, gradients);
  } else {
    sweep_images<IO, T, kMaxVectors<T>>(problem, first, count, scratch, gradients);
  }
}

template <class IO, class T>
static void rows(const Problem<IO, T>& problem, const Bands<T>& bands, int64_t band, void* scratch,
                 Gradients<T> gradients) {
  if (bands.plan.lanes == kMinVectors<T> * kVectorLanes<T>) {
    RowsSweep<IO, T, kMinVectors<T>>(problem, bands, band, scratch, gradients).run();
  } else {
    RowsSweep<IO, T, kMaxVectors<T>>(problem, bands, band, scratch, gradients).run();
  }
}

template <class IO, class T>
Kernels<IO, T> kernels() {
  return {kMinVectors<T> * kVectorLanes<T>,
          kMaxVectors<T> * kVectorLanes<T>,
          &images_scratch<IO, T>,
          &rows_scratch<IO, T>,
          &images<IO, T>,
          &rows<IO, T>};
}

template Kernels<float, float> kernels<float, float>();
template Kernels<double, double> kernels<double, double>();
template Kernels<BFloat16, float> kernels<BFloat16, float>();
template Kernels<Float16, float> kernels<Float16, float>();

static void subtract_row(double* row, const double* other, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] -= factor * other[i];
}

static void subtract_row_exactly(double* row, double* low, const double* other, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    // A fused multiply-add of zero, since the compiler may fuse a plain product with the sum below: what the product
    // and the sum were rounded by is known exactly only when each is rounded by itself.
    const double product = __builtin_fma(-factor, other[i], 0.0);
    const double sum = row[i] + product;
    const double added = sum - row[i];
    low[i] += ((row[i] - (sum - added)) + (product - added)) + __builtin_fma(-factor, other[i], -product);
    row[i] = sum;
  }
}

static void add_product(double* out, const double* matrix, const double* right, int64_t n, int64_t columns) {
  constexpr int64_t lanes = 2 * kVectorLanes<double>;
  for_blocks<kOutputBlock>(n, false, [&](int64_t first, auto width) {
    for (int64_t column = 0; column < columns; column += lanes) {
      double* to = out + first * columns + column;
      Sums<double, decltype(width)::value, 2> sum;
      for (int o = 0; o < decltype(width)::value; ++o) {
        for (int v = 0; v < 2; ++v) sum[o][v] = load(to + o * columns + v * kVectorLanes<double>);
      }
      add_products<double, 0>(sum, right + column, columns, n, matrix + first * n);
      store_sums<double>(sum, to, columns);
    }
  });
}

PrepareKernels prepare_kernels() { return {&subtract_row, &subtract_row_exactly, &add_product}; }

}  // namespace inverse_flow::cpu::INVERSE_FLOW_ISA
