// Outputs as lanes: a block of steps of a signal after the other, several signals side by side.
// Included by sweep_impl.h alone, inside its namespace and under its target pragma.

// Signals that are swept together at most, so that their sums stay in registers: 12 of AVX2's 16 for two vectors of
// outputs, 16 of AVX-512's 32.
constexpr int kMostSignals = INVERSE_FLOW_VECTOR_BYTES == 64 ? 8 : 6;

// The lanes of a whole vector.
template <class T>
constexpr int kWide = INVERSE_FLOW_VECTOR_BYTES / static_cast<int>(sizeof(T));
template <class T>
using WideVector = Vector<T, kWide<T>>;

// All bits set in the lanes from `first` on.
template <class T>
INVERSE_FLOW_INLINE WideVector<T> from_lane(int64_t first) {
  typename VectorOf<T, kWide<T>>::bits lane, bound;
  for (int i = 0; i < kWide<T>; ++i) {
    lane[i] = i;
    bound[i] = first;
  }
  return (WideVector<T>)(lane >= bound);
}

// Eight multiply-adds can start before the first one is done: few sums are cut into parts, which are added in the end.
template <int kSignals, int kVectors>
constexpr int kSumParts = kSignals * kVectors < 4 ? 4 / (kSignals * kVectors) : 1;

template <class T, int kSignals, int kVectors>
struct SignalSums {
  static constexpr int kParts = kSumParts<kSignals, kVectors>;
  static constexpr int64_t kWidth = kVectors * kWide<T>;
  WideVector<T> part[kParts][kSignals][kVectors];

  INVERSE_FLOW_INLINED void clear() {
    for (auto& signals : part) {
      for (auto& vectors : signals) {
        for (auto& vector : vectors) vector = WideVector<T>{};
      }
    }
  }

  // Adds `count` columns of the matrix times the values at `source`, and there of each signal. With kMasked an input is
  // left out of the lanes in front of its own step's, `first_lane` being that of the sums: zero times it would be NaN
  // where it is not finite.
  template <bool kMasked>
  INVERSE_FLOW_INLINED void add(const T* matrix, const T* source, ptrdiff_t signal, int64_t count, int64_t first_lane,
                                int64_t channels) {
    const auto add_input = [&](int64_t j, int p) INVERSE_FLOW_INLINED {
      for (int v = 0; v < kVectors; ++v) {
        const WideVector<T> weights = load<kWide<T>>(matrix + j * kWidth + v * kWide<T>);
        for (int r = 0; r < kSignals; ++r) {
          const T value = source[r * signal + j];
          if constexpr (kMasked) {
            const WideVector<T> held = from_lane<T>(j / channels * channels - first_lane - v * kWide<T>);
            part[p][r][v] += where_held<T, kWide<T>>(WideVector<T>{} + value, held) * weights;
          } else {
            part[p][r][v] += weights * value;
          }
        }
      }
    };
    int64_t j = 0;
    for (; j < count % kParts; ++j) add_input(j, 0);
    for (; j < count; j += kParts) {
      for (int p = 0; p < kParts; ++p) add_input(j + p, p);
    }
  }

  INVERSE_FLOW_INLINED void join_parts() {
    for (int half = kParts / 2; half > 0; half /= 2) {
      for (int p = 0; p < half; ++p) {
        for (int r = 0; r < kSignals; ++r) {
          for (int v = 0; v < kVectors; ++v) part[p][r][v] += part[p + half][r][v];
        }
      }
    }
  }
};

// Solves neighbouring blocks: from y - bias, [step][channel], to x, behind the `reach` values of it that the first of
// them reads. Stores whole vectors: what lies behind a block is overwritten by the next.
template <class T, int kSignals, bool kMasked>
static __attribute__((noinline)) void solve_blocks(const T* matrix, int64_t channels, int64_t outputs, int64_t reach,
                                                   int64_t blocks, const T* y, ptrdiff_t y_signal, T* x,
                                                   ptrdiff_t x_signal) {
  const int64_t vectors = (outputs + kWide<T> - 1) / kWide<T>;
  for (int64_t block = 0; block < blocks; ++block, y += outputs, x += outputs) {
    const T* tile = matrix;
    for_blocks<kTileVectors>(vectors, false, [&](int64_t first, auto width) INVERSE_FLOW_INLINED {
      constexpr int kVectors = decltype(width)::value;
      using Sums = SignalSums<T, kSignals, kVectors>;
      const int64_t lane = first * kWide<T>;
      const T* const given = tile + reach * Sums::kWidth;
      // What y contributes does not wait for the block before. It comes last nevertheless, for the reason that
      // `multiply_unit_triangular` gives: where there are registers for both, the two are summed apart.
      constexpr bool kApart = kSignals * kVectors <= 4;
      Sums sum, late;
      sum.clear();
      if constexpr (kApart) {
        late.clear();
        late.template add<kMasked>(given, y, y_signal, outputs, lane, channels);
        late.join_parts();
      }
      sum.template add<false>(tile, x - reach, x_signal, reach, lane, channels);
      if constexpr (!kApart) sum.template add<kMasked>(given, y, y_signal, outputs, lane, channels);
      sum.join_parts();
      for (int r = 0; r < kSignals; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          WideVector<T> solved = sum.part[0][r][v];
          if constexpr (kApart) solved += late.part[0][r][v];
          store<kWide<T>>(x + r * x_signal + lane + v * kWide<T>, solved);
        }
      }
      tile += (reach + outputs) * Sums::kWidth;
    });
  }
}

// A channel's `count` steps from a tensor, minus the bias, and zeros up to `padded` steps.
template <class IO, class T>
static __attribute__((noinline)) void read_row(const IO* from, ptrdiff_t stride, int64_t count, T bias, T* to,
                                               int64_t padded) {
  for (int64_t s = 0; s < count; s += 8, from += 8 * stride) {
    const int64_t some = smaller(8, count - s);
    if (some == 8 && stride == 1) {
      store8(to + s, load8(from) - bias);
    } else if (some == 8 && stride == -1) {
      store8(to + s, reverse8<T>(load8(from - 7)) - bias);
    } else {
      IO values[8] = {};
      for (int64_t i = 0; i < some; ++i) values[i] = from[i * stride];
      store8(to + s, load8(values) - bias);
    }
  }
  for (int64_t s = count; s < padded; ++s) to[s] = T(0);
}

// The inverse of `read_row`.
template <class IO, class T>
static __attribute__((noinline)) void write_row(const T* from, IO* to, ptrdiff_t stride, int64_t count) {
  for (int64_t s = 0; s < count; s += 8, to += 8 * stride) {
    const int64_t some = smaller(8, count - s);
    const Eight<T> eight = load8(from + s);
    if (some == 8 && stride == 1) {
      store8(to, eight);
    } else if (some == 8 && stride == -1) {
      store8(to - 7, reverse8<T>(eight));
    } else {
      IO values[8];
      store8(values, eight);
      for (int64_t i = 0; i < some; ++i) to[i * stride] = values[i];
    }
  }
}

// Calls f(first channel, first step) for squares of 8 x 8 that cover all channels; of fewer than eight channels one
// square holds all.
template <class F>
INVERSE_FLOW_INLINE void for_squares(int64_t channels, int64_t steps, F f) {
  for (int64_t c = 0; c < channels; c += 8) {
    const int64_t first = larger(smaller(c, channels - 8), 0);
    for (int64_t s = 0; s < steps; s += 8) f(first, s);
  }
}

// Eight values as S.
template <class S, class T>
INVERSE_FLOW_INLINE Eight<S> eight_as(Eight<T> values) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return values;
  } else {
    return __builtin_convertvector(values, Eight<S>);
  }
}

// From [channel][step], rows `stride` apart, to [step][channel]; a multiple of eight steps. Up to seven values behind
// the last are written too.
template <class T, class S>
static __attribute__((noinline)) void interleave(const T* rows, ptrdiff_t stride, int64_t channels, int64_t steps,
                                                 S* to) {
  for (int64_t s = 0; s < steps && channels == 1; s += 8) store8(to + s, eight_as<S, T>(load8(rows + s)));
  if (channels == 1) return;
  for_squares(channels, steps, [&](int64_t first, int64_t s) INVERSE_FLOW_INLINED {
    Eight<T> square[8];
    for (int64_t c = 0; c < 8; ++c) square[c] = load8(rows + smaller(first + c, channels - 1) * stride + s);
    transpose8<T>(square);
    // In this order: what a step has too much belongs to the next ones.
    for (int64_t i = 0; i < 8; ++i) store8(to + (s + i) * channels + first, eight_as<S, T>(square[i]));
  });
}

// The inverse of `interleave`; up to seven values behind the last are read too.
template <class S, class T>
static __attribute__((noinline)) void separate(const S* from, int64_t channels, int64_t steps, T* rows,
                                               ptrdiff_t stride) {
  for (int64_t s = 0; s < steps && channels == 1; s += 8) store8(rows + s, eight_as<T, S>(load8(from + s)));
  if (channels == 1) return;
  for_squares(channels, steps, [&](int64_t first, int64_t s) INVERSE_FLOW_INLINED {
    Eight<T> square[8];
    for (int64_t i = 0; i < 8; ++i) square[i] = eight_as<T, S>(load8(from + (s + i) * channels + first));
    transpose8<T>(square);
    for (int64_t c = 0; c < smaller(8, channels - first); ++c) store8(rows + (first + c) * stride + s, square[c]);
  });
}

// Whether no value of `count`, a multiple of eight, is infinite or NaN.
template <class T>
static __attribute__((noinline)) bool all_finite(const T* values, int64_t count) {
  Eight<T> zeros[4] = {};
  for (int64_t i = 0; i < count; i += 8) zeros[i / 8 % 4] += load8(values + i) * 0;
  const Eight<T> sum = (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]);
  bool finite = true;
  for (int i = 0; i < 8; ++i) finite &= sum[i] == 0;
  return finite;
}

// The state of the signals of a piece of work: as [step][channel], which the blocks read, in the type S that they are
// computed in, and as [channel][step], which the tensors hold and the gradient sums.
template <class T, class S>
struct OutputsScratch {
  int64_t stretch;                               // steps that are packed, solved and unpacked at a time
  int64_t front;                                 // steps in front of a stretch that the taps reach
  ptrdiff_t y_signal, x_signal, row, other_row;  // from a signal, or a channel, to the next
  S* y;                                          // [signal][step][channel]
  S* x;                                          // [signal][step][channel], behind what is in front of the stretch
  T* rows;                                       // [signal][channel][step], likewise; without a gradient of one signal
  T* other;                                      // [signal][channel][step], with a gradient
  TapPosition* order;
  TapSpans<T>* tap_spans;
  Span<T>* spans;  // [tap][signal]
  size_t bytes;

  OutputsScratch(const Shape& shape, bool with_gradient, const OutputsPlan& plan, void* memory) {
    const int64_t channels = shape.channels;
    const int64_t step_bytes =
        plan.signals * channels * static_cast<int64_t>(2 * sizeof(S) + with_gradient * 2 * sizeof(T));
    const int64_t unit = plan.block * kStretch;
    stretch = smaller(larger(slab_bytes() / step_bytes / unit, 1) * unit, round_up(shape.width, unit));
    front = shape.kernel_w - 1;
    // Odd numbers of cache lines, so that rows do not share the cache's sets. Squares and vectors run over an end.
    constexpr int64_t line = 16;
    const auto distance = [](int64_t values) { return round_up(values + 2 * kTileVectors * line, 2 * line) + line; };
    const int64_t lead = round_up(front * channels, line);
    y_signal = distance(stretch * channels);
    x_signal = distance(lead + stretch * channels);
    row = distance(round_up(front, line) + stretch);
    other_row = distance(stretch);
    Arena arena{static_cast<char*>(memory)};
    y = arena.take<S>(plan.signals * y_signal);
    x = arena.take<S>(plan.signals * x_signal) + lead;
    rows = arena.take<T>((with_gradient ? plan.signals : 1) * channels * row) + round_up(front, line);
    other = arena.take<T>(with_gradient ? plan.signals * channels * other_row : 0);
    order = arena.take<TapPosition>(with_gradient ? shape.taps() : 0);
    tap_spans = arena.take<TapSpans<T>>(with_gradient ? shape.taps() : 0);
    spans = arena.take<Span<T>>(with_gradient ? shape.taps() * plan.signals : 0);
    bytes = arena.used;
  }
};

template <class IO, class T>
static size_t outputs_scratch(const Problem<IO, T>& problem, const OutputsPlan& plan) {
  // Blocks may turn out to be single steps.
  return larger(OutputsScratch<T, T>(problem.shape, problem.with_gradient, plan, nullptr).bytes,
                OutputsScratch<T, double>(problem.shape, problem.with_gradient, plan, nullptr).bytes);
}

template <class IO, class T, class S>
static void sweep_outputs(const Problem<IO, T>& problem, const S* matrix, const OutputsPlan& plan, int64_t first_signal,
                          int64_t signals, void* memory, Gradients<T> gradients) {
  constexpr int64_t n = kWide<T>;
  const Shape& shape = problem.shape;
  const Weights<T>& weights = problem.weights;
  const int64_t channels = shape.channels;
  const int64_t block = weights.block_steps;
  const OutputsScratch<T, S> scratch(shape, problem.with_gradient, plan, memory);
  const int64_t reach = scratch.front * channels;
  // Nothing comes before a signal.
  for (int64_t r = 0; r < signals; ++r) {
    __builtin_memset(scratch.x + r * scratch.x_signal - reach, 0, reach * sizeof(S));
    for (int64_t c = 0; c < channels && problem.with_gradient; ++c) {
      T* const row = scratch.rows + (r * channels + c) * scratch.row;
      __builtin_memset(row - scratch.front, 0, scratch.front * sizeof(T));
    }
  }
  if (problem.with_gradient) tap_order(shape, scratch.order);

  for (int64_t begin = 0; begin < shape.width; begin += scratch.stretch) {
    const int64_t count = smaller(scratch.stretch, shape.width - begin);
    const int64_t blocks = (count + block - 1) / block;
    const int64_t padded = round_up(blocks * block, 8);
    const auto at = [&](const auto& image, int64_t r, int64_t c) {
      return image.data + (first_signal + r) * image.stride.batch + c * image.stride.channel +
             begin * image.stride.column;
    };
    const auto rows_of = [&](int64_t r) {
      return scratch.rows + (problem.with_gradient ? r : 0) * channels * scratch.row;
    };
    bool finite = true;
    for (int64_t r = 0; r < signals; ++r) {
      S* const y = scratch.y + r * scratch.y_signal;
      T* const rows = rows_of(r);
      for (int64_t c = 0; c < channels; ++c) {
        read_row(at(problem.input, r, c), problem.input.stride.column, count, weights.bias ? weights.bias[c] : T(0),
                 rows + c * scratch.row, padded);
      }
      interleave(rows, scratch.row, channels, padded, y);
      finite = finite && all_finite(y, padded * channels);
    }
    with_width<kMostSignals>(signals, [&](auto count) {
      constexpr int kSignals = decltype(count)::value;
      const auto solve = finite ? &solve_blocks<S, kSignals, false> : &solve_blocks<S, kSignals, true>;
      solve(matrix, channels, block * channels, reach, blocks, scratch.y, scratch.y_signal, scratch.x,
            scratch.x_signal);
    });
    for (int64_t r = 0; r < signals; ++r) {
      T* const rows = rows_of(r);
      separate(scratch.x + r * scratch.x_signal, channels, padded, rows, scratch.row);
      for (int64_t c = 0; c < channels; ++c) {
        write_row(rows + c * scratch.row, at(problem.output, r, c), problem.output.stride.column, count);
      }
      if (!problem.with_gradient) continue;
      T* const other = scratch.other + r * channels * scratch.other_row;
      for (int64_t c = 0; c < channels; ++c) {
        read_row(at(problem.other, r, c), problem.other.stride.column, count, T(0), other + c * scratch.other_row,
                 round_up(count, n));
        for (int64_t s = count; s < round_up(count, n); ++s) rows[c * scratch.row + s] = T(0);
      }
      subtract_sums<T, kWide<T>>(rows, channels, scratch.row, n, round_up(count, n) / n, gradients.bias);
    }
    if (problem.with_gradient) {
      for (int64_t t = 0; t < shape.taps(); ++t) {
        const auto [a, p, q] = t + 1 < shape.taps() ? scratch.order[t] : TapPosition{0, 0, 0};
        Span<T>* const spans = scratch.spans + t * signals;
        for (int64_t r = 0; r < signals; ++r) {
          spans[r] = {scratch.rows + r * channels * scratch.row - q, scratch.other + r * channels * scratch.other_row};
        }
        scratch.tap_spans[t] = {spans, a == 0 && p == 0 ? signals : 0, round_up(count, n) / n};
      }
      outer_sums<T, kWide<T>>(scratch.tap_spans, shape.taps(), channels, {scratch.row, n, scratch.other_row, n},
                              gradients.weight);
    }
    // What the next stretch reads of this one.
    const auto keep = [&](auto* at, int64_t values, int64_t passed) {
      __builtin_memmove(at - values, at - values + passed, values * sizeof(*at));
    };
    for (int64_t r = 0; r < signals; ++r) {
      keep(scratch.x + r * scratch.x_signal, reach, scratch.stretch * channels);
      for (int64_t c = 0; c < channels && problem.with_gradient; ++c) {
        keep(scratch.rows + (r * channels + c) * scratch.row, scratch.front, scratch.stretch);
      }
    }
  }
}

template <class IO, class T>
static void outputs(const Problem<IO, T>& problem, const OutputsPlan& plan, int64_t first, int64_t count, void* scratch,
                    Gradients<T> gradients) {
  const Weights<T>& weights = problem.weights;
  if (weights.block) {
    sweep_outputs<IO, T, double>(problem, weights.block, plan, first, count, scratch, gradients);
  } else {
    sweep_outputs<IO, T, T>(problem, weights.step, plan, first, count, scratch, gradients);
  }
}
