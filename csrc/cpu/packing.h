// Between an image's own layout and [step][channel][lane].
// Included by sweep_impl.h alone, inside its namespace and under its target pragma.

// Elements from one step of [step][channel][lane] to the next: an odd number of cache lines where there are many. Of an
// even number the same channels of all steps share a part of the sets of the L1 cache, of a power of two a small one,
// and what the gradient of a block of channels reads pushes itself out.
template <class T>
INVERSE_FLOW_INLINE int64_t state_step(int64_t channels, int64_t channel_stride) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t values = channels * channel_stride;
  return values % (2 * kLine) == 0 && values >= 16 * kLine ? values + kLine : values;
}

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
  Index first, last;
  int64_t any_first, any_last;  // no lane holds a pixel outside of these steps
  int64_t all_first, all_last;  // every used lane holds one inside of these

  LaneBlock() = default;
  LaneBlock(const Lanes& lanes, int64_t block, int64_t begin, int64_t steps)
      : used(smaller(larger(lanes.used - block, 0), 8)),
        first{},
        last{},
        any_first(steps),
        any_last(0),
        all_first(0),
        all_last(steps) {
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

  // The pieces at whose every step every used lane holds a pixel: the first step of the first one, and their number.
  struct Pieces {
    int64_t first;
    int64_t count;
    int64_t end() const { return first + 8 * count; }
  };
  Pieces whole(int64_t begin) const {
    const int64_t first = round_up(begin + all_first, 8) - begin;
    return {first, used > 0 ? larger(all_last - first, 0) / 8 : 0};
  }

  bool holds(int64_t lane, int64_t step) const { return step >= first[lane] && step < last[lane]; }
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

// The common case of `pack`: `pieces` of eight steps at which every used lane holds a pixel, without a decision for
// each. A function of its own, so that all it needs stays in registers.
template <class IO, class T>
static __attribute__((noinline)) void pack_whole(const IO* const (&lanes)[8], ptrdiff_t offset, ptrdiff_t step_stride,
                                                 T bias, typename EightOf<T>::index used, T* to, ptrdiff_t to_step,
                                                 int64_t pieces) {
  const IO* from[8];
  for (int64_t l = 0; l < 8; ++l) from[l] = lanes[l] + offset;
  // A mirrored row comes last step first.
  const ptrdiff_t first = step_stride == -1 ? 7 * to_step : 0;
  const ptrdiff_t next = step_stride * to_step;
  for (ptrdiff_t at = 0; pieces > 0; --pieces, at += 8 * step_stride, to += 8 * to_step) {
    Eight<T> rows[8];
    for (int64_t l = 0; l < 8; ++l) rows[l] = load8(from[l] + at);
    transpose8<T>(rows);
    for (int64_t s = 0; s < 8; ++s) store8(to + first + s * next, masked<T>(rows[s] - bias, used));
  }
}

// The inverse of `pack_whole`.
template <class IO, class T>
static __attribute__((noinline)) void unpack_whole(IO* channel, const ptrdiff_t* start, int64_t used,
                                                   ptrdiff_t step_stride, const T* from, ptrdiff_t from_step,
                                                   int64_t pieces) {
  IO* to[8];
  for (int64_t l = 0; l < 8; ++l) to[l] = channel + start[l < used ? l : 0];
  const ptrdiff_t first = step_stride == -1 ? 7 * from_step : 0;
  const ptrdiff_t next = step_stride * from_step;
  for (ptrdiff_t at = 0; pieces > 0; --pieces, at += 8 * step_stride, from += 8 * from_step) {
    Eight<T> rows[8];
    for (int64_t s = 0; s < 8; ++s) rows[s] = load8(from + first + s * next);
    transpose8<T>(rows);
    for (int64_t l = 0; l < 8; ++l) {
      if (l < used) store8(to[l] + at, rows[l]);
    }
  }
}

// Calls f(first step of a piece) for pieces of eight steps that cover steps [from, to), of calls of `pack` and `unpack`
// that begin at step `begin`. Pieces begin at multiples of eight of all steps, where the lanes of a skewed band begin
// and end; elsewhere, and at the end, they overlap rather than be cut. Only where `to` is less than eight a piece is
// shorter.
template <class F>
INVERSE_FLOW_INLINE void for_pieces(int64_t begin, int64_t from, int64_t to, F f) {
  for (int64_t piece = from; piece < to; piece = ((begin + piece) / 8 + 1) * 8 - begin) {
    f(larger(smaller(piece, to - 8), 0));
  }
}

// Eight lanes of an image tensor that `pack` reads.
template <class IO, class T>
struct PackedLanes : LaneBlock<T> {
  const IO* from[8];
  const IO* lowest;
  const IO* highest;

  PackedLanes() = default;
  PackedLanes(const Image<const IO>& image, const ptrdiff_t* start, const Lanes& lanes, int64_t block, int64_t begin,
              int64_t steps)
      : LaneBlock<T>(lanes, block, begin, steps), lowest(image.data + start[block]), highest(lowest) {
    for (int64_t l = 0; l < 8; ++l) {
      // An unused lane reads another lane's pixels; they are zeroed below like all that lie outside a lane's range.
      from[l] = image.data + start[l < this->used ? block + l : block];
      if (from[l] < lowest) lowest = from[l];
      if (from[l] > highest) highest = from[l];
    }
  }

  // Vectors of eight may run past a row into the next one, but never out of the tensor.
  bool readable(const Image<const IO>& image, ptrdiff_t offset) const {
    return offset >= image.begin - lowest && offset + 8 <= image.end - highest;
  }
};

// Steps [begin, begin + steps) of an image tensor into the state, minus the bias; zero where a lane holds no pixel.
// `state` is at step `begin`. A channel's steps are read in one go, so that each cache line is visited once; and of all
// lanes, so that the lines of the state are filled while they are in the L1 cache. With `merge` the lanes that hold no
// pixel keep what is in the state.
template <class IO, class T>
static __attribute__((noinline)) void pack(const Image<const IO>& image, const ptrdiff_t* start, const Lanes& lanes,
                                           int64_t channels, int64_t begin, int64_t steps, const T* bias, T* state,
                                           ptrdiff_t channel_state, ptrdiff_t step_state, bool merge = false) {
  const ptrdiff_t step_stride = image.stride.column;
  const ptrdiff_t channel_stride = image.stride.channel;
  const int64_t blocks = lanes.count / 8;
  PackedLanes<IO, T> block_of[kMaxLanes / 8];
  for (int64_t b = 0; b < blocks; ++b) block_of[b] = {image, start, lanes, 8 * b, begin, steps};
  const auto put = [&](int64_t b, int64_t s, int64_t c, Eight<T> value) {
    if (bias) value -= bias[c];
    T* const to = state + s * step_state + c * channel_state + 8 * b;
    const auto mask = block_of[b].mask(s);
    value = masked<T>(value, mask);
    store8(to, merge ? value + masked<T>(load8(to), ~mask) : value);
  };
  const auto gather = [&](int64_t b, int64_t s, int64_t c) {
    const PackedLanes<IO, T>& held = block_of[b];
    IO values[8] = {};
    for (int64_t l = 0; l < held.used; ++l) {
      if (held.holds(l, s)) values[l] = held.from[l][c * channel_stride + (begin + s) * step_stride];
    }
    return load8(values);
  };
  if (step_stride == 1 || step_stride == -1) {
    for (int64_t c = 0; c < channels; ++c) {
      // A mirrored row is read from its other end.
      const auto offset_of = [&](int64_t piece) {
        return c * channel_stride + (step_stride == 1 ? begin + piece : -(begin + piece + 7));
      };
      for (int64_t b = 0; b < blocks; ++b) {
        const PackedLanes<IO, T>& held = block_of[b];
        const auto readable = [&](int64_t piece) { return held.readable(image, offset_of(piece)); };
        auto whole = held.whole(begin);
        if (merge && held.used < 8) whole.count = 0;
        for (; whole.count > 0 && !readable(whole.first); --whole.count) whole.first += 8;
        while (whole.count > 0 && !readable(whole.end() - 8)) --whole.count;
        const auto pack_piece = [&](int64_t piece) INVERSE_FLOW_INLINED {
          const int64_t count = smaller(8, steps - piece);
          if (held.nowhere(piece, piece + count)) {
            for (int64_t s = piece; !merge && s < piece + count; ++s) put(b, s, c, Eight<T>{});
          } else if (readable(piece)) {
            Eight<T> rows[8];
            for (int64_t l = 0; l < 8; ++l) rows[l] = load8(held.from[l] + offset_of(piece));
            transpose8<T>(rows);
            for (int64_t s = 0; s < count; ++s) put(b, piece + s, c, rows[step_stride == 1 ? s : 7 - s]);
          } else {
            for (int64_t s = piece; s < piece + count; ++s) put(b, s, c, gather(b, s, c));
          }
        };
        if (whole.count == 0) {
          for_pieces(begin, 0, steps, pack_piece);
          continue;
        }
        for_pieces(begin, 0, whole.first, pack_piece);
        pack_whole(held.from, offset_of(whole.first), step_stride, bias ? bias[c] : T(0), held.mask(whole.first),
                   state + whole.first * step_state + c * channel_state + 8 * b, step_state, whole.count);
        for_pieces(begin, whole.end(), steps, pack_piece);
      }
    }
    return;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const PackedLanes<IO, T>& held = block_of[b];
    for (int64_t s = 0; s < steps; ++s) {
      int64_t c = 0;
      // Channels last: eight channels of eight lanes.
      while (channel_stride == 1 && c + 8 <= channels && held.readable(image, (begin + s) * step_stride + c)) {
        Eight<T> rows[8];
        for (int64_t l = 0; l < 8; ++l) rows[l] = load8(held.from[l] + (begin + s) * step_stride + c);
        transpose8<T>(rows);
        for (int64_t k = 0; k < 8; ++k) put(b, s, c + k, rows[k]);
        c += 8;
      }
      for (; c < channels; ++c) put(b, s, c, gather(b, s, c));
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
  const int64_t blocks = (lanes.used + 7) / 8;
  LaneBlock<T> block_of[kMaxLanes / 8];
  for (int64_t b = 0; b < blocks; ++b) block_of[b] = {lanes, 8 * b, begin, steps};
  if (step_stride == 1 || step_stride == -1) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto place = [&](int64_t piece) {
        return image.data + c * channel_stride + (step_stride == 1 ? begin + piece : -(begin + piece + 7));
      };
      for (int64_t b = 0; b < blocks; ++b) {
        const LaneBlock<T>& held = block_of[b];
        const auto whole = held.whole(begin);
        const T* const channel = state + c * channel_state + 8 * b;
        const auto unpack_piece = [&](int64_t piece) INVERSE_FLOW_INLINED {
          const int64_t count = smaller(8, steps - piece);
          if (held.nowhere(piece, piece + count)) return;
          Eight<T> rows[8];
          for (int64_t s = 0; s < 8; ++s) rows[s] = load8(channel + (piece + smaller(s, count - 1)) * step_state);
          transpose8<T>(rows);
          for (int64_t l = 0; l < held.used; ++l) {
            const int64_t low = larger(held.first[l] - piece, 0);
            const int64_t high = smaller(held.last[l] - piece, count);
            if (low >= high) continue;
            IO* const row = place(piece) + start[8 * b + l];
            if (step_stride == 1) {
              store_some<T>(row, rows[l], low, high - low);
            } else {
              store_some<T>(row, reverse8<T>(rows[l]), 8 - high, high - low);
            }
          }
        };
        if (whole.count == 0) {
          for_pieces(begin, 0, steps, unpack_piece);
          continue;
        }
        for_pieces(begin, 0, whole.first, unpack_piece);
        unpack_whole(place(whole.first), start + 8 * b, held.used, step_stride, channel + whole.first * step_state,
                     step_state, whole.count);
        for_pieces(begin, whole.end(), steps, unpack_piece);
      }
    }
    return;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const LaneBlock<T>& held = block_of[b];
    for (int64_t s = 0; s < steps; ++s) {
      const T* from = state + s * step_state + 8 * b;
      int64_t c = 0;
      for (; channel_stride == 1 && c + 8 <= channels; c += 8) {
        Eight<T> rows[8];
        for (int64_t k = 0; k < 8; ++k) rows[k] = load8(from + (c + k) * channel_state);
        transpose8<T>(rows);
        for (int64_t l = 0; l < held.used; ++l) {
          if (held.holds(l, s)) store8(image.data + start[8 * b + l] + (begin + s) * step_stride + c, rows[l]);
        }
      }
      for (; c < channels; ++c) {
        IO values[8];
        store8(values, load8(from + c * channel_state));
        for (int64_t l = 0; l < held.used; ++l) {
          if (held.holds(l, s)) {
            image.data[start[8 * b + l] + c * channel_stride + (begin + s) * step_stride] = values[l];
          }
        }
      }
    }
  }
}
