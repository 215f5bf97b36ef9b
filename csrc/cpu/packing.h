// Between an image's own layout and [step][channel][lane].
// Included by sweep_impl.h alone, inside its namespace and under its target pragma.

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
