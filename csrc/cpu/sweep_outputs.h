// Outputs as lanes: a block of steps of a signal after the other, several signals side by side.
// Included by sweep_impl.h alone, inside its namespace and under its target pragma.

// Signals that are swept together at most, so that their sums stay in registers: 12 of AVX2's 16 for two vectors of
// outputs, 16 of AVX-512's 32.
constexpr int kMostSignals = INVERSE_FLOW_VECTOR_BYTES == 64 ? 8 : 6;

// A multiply-add takes as long as eight of them are started in: few sums are cut into parts, which are added in the end.
template <int kSignals, int kVectors>
constexpr int kSumParts = kSignals * kVectors < 4 ? 4 / (kSignals * kVectors) : 1;

template <class T, int kSignals, int kVectors>
struct SignalSums {
  static constexpr int kParts = kSumParts<kSignals, kVectors>;
  static constexpr int64_t kWidth = kVectors * kVectorLanes<T>;
  Vector<T> part[kParts][kSignals][kVectors];

  INVERSE_FLOW_INLINED void clear() {
    for (auto& signals : part) {
      for (auto& vectors : signals) {
        for (auto& vector : vectors) vector = Vector<T>{};
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
        const Vector<T> weights = load(matrix + j * kWidth + v * kVectorLanes<T>);
        for (int r = 0; r < kSignals; ++r) {
          const T value = source[r * signal + j];
          if constexpr (kMasked) {
            const Vector<T> held = from_lane<T>(j / channels * channels - first_lane - v * kVectorLanes<T>);
            part[p][r][v] += where_held<T>(Vector<T>{} + value, held) * weights;
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
  const int64_t vectors = (outputs + kVectorLanes<T> - 1) / kVectorLanes<T>;
  for (int64_t block = 0; block < blocks; ++block, y += outputs, x += outputs) {
    const T* tile = matrix;
    for_blocks<kTileVectors>(vectors, false, [&](int64_t first, auto width) INVERSE_FLOW_INLINED {
      constexpr int kVectors = decltype(width)::value;
      using Sums = SignalSums<T, kSignals, kVectors>;
      const int64_t lane = first * kVectorLanes<T>;
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
          Vector<T> solved = sum.part[0][r][v];
          if constexpr (kApart) solved += late.part[0][r][v];
          store(x + r * x_signal + lane + v * kVectorLanes<T>, solved);
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

// From [channel][step], rows `stride` apart, to [step][channel]; a multiple of eight steps. Up to seven values behind
// the last are written too.
template <class T>
static __attribute__((noinline)) void interleave(const T* rows, ptrdiff_t stride, int64_t channels, int64_t steps,
                                                 T* to) {
  for_squares(channels, steps, [&](int64_t first, int64_t s) INVERSE_FLOW_INLINED {
    Eight<T> square[8];
    for (int64_t c = 0; c < 8; ++c) square[c] = load8(rows + smaller(first + c, channels - 1) * stride + s);
    transpose8<T>(square);
    // In this order: what a step has too much belongs to the next ones.
    for (int64_t i = 0; i < 8; ++i) store8(to + (s + i) * channels + first, square[i]);
  });
}

// The inverse of `interleave`; up to seven values behind the last are read too.
template <class T>
static __attribute__((noinline)) void separate(const T* from, int64_t channels, int64_t steps, T* rows,
                                               ptrdiff_t stride) {
  for_squares(channels, steps, [&](int64_t first, int64_t s) INVERSE_FLOW_INLINED {
    Eight<T> square[8];
    for (int64_t i = 0; i < 8; ++i) square[i] = load8(from + (s + i) * channels + first);
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

// The state of the signals of a piece of work: as [step][channel], which the blocks read, and as [channel][step], which
// the tensors hold and the gradient sums. Of one channel both are the same.
template <class T>
struct OutputsScratch {
  int64_t stretch;  // steps that are packed, solved and unpacked at a time
  int64_t front;    // steps in front of a stretch that the taps reach
  ptrdiff_t y_signal, x_signal, row, row_signal, other_row, other_signal;  // distances in the arrays below
  T* y;      // [signal][step][channel]
  T* x;      // [signal][step][channel], behind what is in front of the stretch
  T* rows;   // [signal][channel][step], likewise; without a gradient of one signal, and of more than one channel
  T* other;  // [signal][channel][step], with a gradient
  TapPosition* order;
  TapSpans<T>* tap_spans;
  Span<T>* spans;  // [tap][signal]
  size_t bytes;

  OutputsScratch(const Shape& shape, bool with_gradient, const OutputsPlan& plan, void* memory) {
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    const int64_t channels = shape.channels;
    const int64_t step_bytes = plan.signals * channels * static_cast<int64_t>(sizeof(T)) * (with_gradient ? 4 : 2);
    const int64_t unit = plan.block * kStretch;
    stretch = smaller(larger(kSlabBytes / step_bytes / unit, 1) * unit, round_up(shape.width, unit));
    front = shape.kernel_w - 1;
    // Odd numbers of cache lines, so that rows do not share the cache's sets. Squares and vectors run over an end.
    const auto distance = [&](int64_t values) { return (round_up(values + 2 * kTileVectors * line, 2 * line) + line); };
    const auto take = [&](Arena& arena, int64_t lead, int64_t values) {
      const int64_t before = round_up(lead, line);
      T* const piece = arena.take<T>(before + values);
      return piece ? piece + before : nullptr;
    };
    y_signal = distance(stretch * channels);
    x_signal = distance((front + stretch) * channels);
    row = channels > 1 ? distance(front + stretch) : x_signal;
    row_signal = channels > 1 ? channels * row : x_signal;
    other_row = distance(stretch);
    other_signal = channels * other_row;
    Arena arena{static_cast<char*>(memory)};
    y = take(arena, 0, plan.signals * y_signal);
    x = take(arena, front * channels, plan.signals * x_signal);
    rows = channels > 1 ? take(arena, front, (with_gradient ? plan.signals : 1) * row_signal) : x;
    other = take(arena, 0, with_gradient ? plan.signals * other_signal : 0);
    order = arena.take<TapPosition>(with_gradient ? shape.taps() : 0);
    tap_spans = arena.take<TapSpans<T>>(with_gradient ? shape.taps() : 0);
    spans = arena.take<Span<T>>(with_gradient ? shape.taps() * plan.signals : 0);
    bytes = arena.used;
  }
};

template <class IO, class T>
static size_t outputs_scratch(const Problem<IO, T>& problem, const OutputsPlan& plan) {
  return OutputsScratch<T>(problem.shape, problem.with_gradient, plan, nullptr).bytes;
}

template <class IO, class T>
static void sweep_outputs(const Problem<IO, T>& problem, const OutputsPlan& plan, int64_t first_signal, int64_t signals,
                          void* memory, Gradients<T> gradients) {
  constexpr int64_t n = kVectorLanes<T>;
  const Shape& shape = problem.shape;
  const Weights<T>& weights = problem.weights;
  const int64_t channels = shape.channels;
  const int64_t block = weights.block_steps;
  const OutputsScratch<T> scratch(shape, problem.with_gradient, plan, memory);
  const int64_t reach = scratch.front * channels;
  // Nothing comes before a signal.
  for (int64_t r = 0; r < signals; ++r) {
    __builtin_memset(scratch.x + r * scratch.x_signal - reach, 0, reach * sizeof(T));
    for (int64_t c = 0; c < channels && problem.with_gradient; ++c) {
      T* const row = scratch.rows + r * scratch.row_signal + c * scratch.row;
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
    const auto rows_of = [&](int64_t r) { return scratch.rows + (problem.with_gradient ? r * scratch.row_signal : 0); };
    bool finite = true;
    for (int64_t r = 0; r < signals; ++r) {
      T* const y = scratch.y + r * scratch.y_signal;
      T* const rows = channels > 1 ? rows_of(r) : y;
      for (int64_t c = 0; c < channels; ++c) {
        read_row(at(problem.input, r, c), problem.input.stride.column, count, weights.bias ? weights.bias[c] : T(0),
                 rows + c * scratch.row, padded);
      }
      if (channels > 1) interleave(rows, scratch.row, channels, padded, y);
      finite = finite && all_finite(y, padded * channels);
    }
    with_width<kMostSignals>(signals, [&](auto count) {
      constexpr int kSignals = decltype(count)::value;
      const auto solve = finite ? &solve_blocks<T, kSignals, false> : &solve_blocks<T, kSignals, true>;
      solve(weights.block, channels, block * channels, reach, blocks, scratch.y, scratch.y_signal, scratch.x,
            scratch.x_signal);
    });
    for (int64_t r = 0; r < signals; ++r) {
      T* const x = scratch.x + r * scratch.x_signal;
      T* const rows = channels > 1 ? rows_of(r) : x;
      if (channels > 1) separate(x, channels, padded, rows, scratch.row);
      for (int64_t c = 0; c < channels; ++c) {
        write_row(rows + c * scratch.row, at(problem.output, r, c), problem.output.stride.column, count);
      }
      if (!problem.with_gradient) continue;
      T* const other = scratch.other + r * scratch.other_signal;
      for (int64_t c = 0; c < channels; ++c) {
        read_row(at(problem.other, r, c), problem.other.stride.column, count, T(0), other + c * scratch.other_row,
                 round_up(count, n));
        for (int64_t s = count; s < round_up(count, n); ++s) rows[c * scratch.row + s] = T(0);
      }
      subtract_sums(rows, channels, scratch.row, n, round_up(count, n) / n, n, gradients.bias);
    }
    if (problem.with_gradient) {
      for (int64_t t = 0; t < shape.taps(); ++t) {
        const auto [p, q] = t + 1 < shape.taps() ? scratch.order[t] : TapPosition{0, 0};
        Span<T>* const spans = scratch.spans + t * signals;
        for (int64_t r = 0; r < signals; ++r) {
          spans[r] = {scratch.rows + r * scratch.row_signal - q, scratch.other + r * scratch.other_signal};
        }
        scratch.tap_spans[t] = {spans, p == 0 ? signals : 0, round_up(count, n) / n};
      }
      outer_sums<T, 1>(scratch.tap_spans, shape.taps(), channels, {scratch.row, n, scratch.other_row, n},
                       gradients.weight);
    }
    // What the next stretch reads of this one.
    const auto keep = [&](T* at, int64_t values, int64_t passed) {
      __builtin_memmove(at - values, at - values + passed, values * sizeof(T));
    };
    for (int64_t r = 0; r < signals; ++r) {
      keep(scratch.x + r * scratch.x_signal, reach, scratch.stretch * channels);
      for (int64_t c = 0; c < channels && channels > 1 && problem.with_gradient; ++c) {
        keep(scratch.rows + r * scratch.row_signal + c * scratch.row, scratch.front, scratch.stretch);
      }
    }
  }
}
