// Rows as lanes: stretch after stretch of a line of bands.
// Included by sweep_impl.h alone, inside its namespace and under its target pragma.

// The most steps with lanes that hold no pixel that are solved at a time.
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
    lead = reached_steps(shape);
    const int64_t step = state_step<T>(shape.channels, lane_stride);
    lead_size = lead * step;
    Arena arena{static_cast<char*>(base)};
    memory = arena.take<T>(lead_size + plan.window * step);
    state = base ? memory + lead_size + padded : nullptr;
    other = arena.take<T>(problem.with_gradient ? plan.window * state_step<T>(shape.channels, plan.lanes) : 0);
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
  int64_t row;    // of lane 0
  int64_t used;   // lanes that have a row
  int64_t start;  // of its first plane
  int64_t end;    // the first step at which no lane holds a pixel any more

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
template <class IO, class T, int kLanes>
class RowsSweep {
 public:
  RowsSweep(const Problem<IO, T>& problem, const Bands<T>& bands, int64_t first_band, void* memory,
            Gradients<T> gradients)
      : problem_(problem),
        shape_(problem.shape),
        bands_(bands),
        gradients_(gradients),
        scratch_(problem, bands.plan, memory),
        step_state_(state_step<T>(shape_.channels, scratch_.lane_stride)),
        other_step_(state_step<T>(shape_.channels, kLanes)),
        half_(kHalf < kLanes && shape_.channels > kOutputBlock ? kHalf : 0),
        line_{{{shape_, bands.plan, first_band, 0}, {shape_, bands.plan, first_band, 0}}, 1} {
    // Where no band is above, nor will be, the halo is zero once and for all.
    const int64_t zeros = has_halo() ? scratch_.lead_size : scratch_.lead_size + bands.plan.window * step_state_;
    __builtin_memset(scratch_.memory, 0, zeros * sizeof(T));
    tap_order(shape_, scratch_.order);
    for (int64_t t = 0; t + 1 < shape_.taps(); ++t) {
      const auto [a, p, q] = scratch_.order[t];
      scratch_.taps[t] = {-(a * plane_period(shape_) + p + q) * step_state_ - p, t};
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
  // Lanes of half a line of two vectors.
  static constexpr int kHalf = kVectors<T, kLanes> == 2 && kLanes > kMinLanes ? kLanes / 2 : kLanes;

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
    for_planes(begin, end, [&](const LinePlane& plane) {
      const int64_t from = larger(begin, plane.start);
      const int64_t to = smaller(end, plane.end);
      if (from >= to) return;
      ptrdiff_t start[kMaxLanes];
      const Lanes lanes = lanes_of(plane, problem_.output.stride, start);
      unpack(problem_.output, start, lanes, shape.channels, from - plane.start, to - from, first + from * step_state_,
             scratch_.lane_stride, step_state_);
    });
    for (const LineBand& band : line_) {
      const int64_t from = larger(begin, band.start);
      const int64_t to = smaller(end, band.end);
      if (from < to) pass_halo(band, from, to, first);
    }
    if (problem_.with_gradient) {
      pack_bands(problem_.other, begin, end, nullptr, scratch_.other + (begin - window) * other_step_, kLanes);
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

  bool has_halo() const { return bands_.plan.joined || line_.band[0].row > 0; }

  // The rows above lane 0 at steps [begin, end): of the halos of the bands above, or zero. Row h runs h steps ahead.
  void fill_halo(int64_t begin, int64_t end, T* first) const {
    for (int64_t h = 1; h <= scratch_.halo && has_halo(); ++h) {
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
          const int64_t until = smaller(start + row_steps(shape_), end);
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
      const int64_t until = smaller(end, start + row_steps(shape_));
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
    return bands_.halos + band * halo_size(shape_) + ((h - 1) * shape_.channels + channel) * row_steps(shape_);
  }

  // A plane of a band, counting steps like the line. The next one begins at `next`, if any.
  struct LinePlane {
    const LineBand& band;
    int64_t index;
    int64_t start, end, next;
  };
  // Calls f(plane) for those that lanes are at in steps [begin, end), or were at last, in their order.
  template <class F>
  void for_planes(int64_t begin, int64_t end, F f) const {
    const int64_t period = plane_period(shape_);
    // Until all lanes are at the next one: in between they pass zeros.
    const int64_t steps = period + kLanes;
    for (const LineBand& band : line_) {
      const bool is_last = &band == &line_.last();
      const int64_t before = begin - band.start - steps;
      for (int64_t z = before < 0 ? 0 : before / period + 1; z < shape_.depth; ++z) {
        const int64_t start = band.start + z * period;
        if (start >= end) break;
        const int64_t next = z + 1 < shape_.depth ? start + period : is_last ? end : line_.last().start;
        f(LinePlane{band, z, start, start + shape_.width + kLanes - 1, next});
      }
    }
  }

  // The lanes of a plane, counting steps from its own first.
  Lanes lanes_of(const LinePlane& plane, const Strides& stride, ptrdiff_t* start) const {
    const LineBand& band = plane.band;
    Lanes lanes;
    lanes.count = kLanes;
    lanes.used = band.used;
    const ptrdiff_t first = band.image * stride.batch + plane.index * stride.plane + band.row * stride.row;
    for (int64_t l = 0; l < kLanes; ++l) {
      start[l] = first + l * (stride.row - stride.column);
      lanes.first[l] = l;
      lanes.last[l] = l + shape_.width;
    }
    return lanes;
  }

  // `state` is at step `begin`. Where two planes or bands meet, the later one is laid over the zeros of the earlier.
  void pack_bands(const Image<const IO>& image, int64_t begin, int64_t end, const T* bias, T* state,
                  ptrdiff_t channel_state) const {
    int64_t packed = begin;
    for_planes(begin, end, [&](const LinePlane& plane) {
      ptrdiff_t start[kMaxLanes];
      const Lanes lanes = lanes_of(plane, image.stride, start);
      const auto part = [&](int64_t from, int64_t to, bool merge) {
        const ptrdiff_t step = state_step<T>(shape_.channels, channel_state);
        if (from < to) {
          pack<IO, T>(image, start, lanes, shape_.channels, from - plane.start, to - from, bias,
                      state + (from - begin) * step, channel_state, step, merge);
        }
      };
      // The earlier one also zeroes the steps at which neither holds a pixel.
      const int64_t to = plane.next >= end ? end : smaller(end, larger(plane.end, plane.next + kLanes));
      part(larger(plane.start, begin), packed, true);
      part(packed, to, false);
      packed = larger(packed, to);
    });
  }

  // What steps have in common.
  struct Run {
    bool low, high;   // whether a lane of either half holds a pixel
    bool masked;      // whether one is past the end of its row
    int64_t skipped;  // taps that only reach in front of the first plane
    int64_t end;
  };

  // The steps from `step` on, to `end` at most. Lanes past the end of their row would go on with the recurrence. They
  // are zero instead: for the row that comes after the gap, and for the gradient, in which lanes without a row must be
  // zero too.
  Run run_at(int64_t step, int64_t end) const {
    Run run{!half_, !half_, shape_.depth > 1, 0, end};
    for (const LineBand& band : line_) {
      const int64_t at = step - band.start;
      const int64_t width = row_steps(shape_);
      const auto change = [&](int64_t to) {
        if (at < to) run.end = smaller(run.end, band.start + to);
      };
      // Until all lanes are at the next band.
      const int64_t gone = &band == &line_.last() ? end : line_.last().start - band.start + kLanes - 1;
      run.masked |= (at >= width && at < gone) || (problem_.with_gradient && band.used < kLanes);
      change(0);
      change(width);
      change(gone);
      const int64_t plane = smaller(at / plane_period(shape_), shape_.depth - 1);
      if (at >= 0 && plane + 1 < shape_.kernel_d) {
        run.skipped = (shape_.kernel_d - 1 - plane) * shape_.kernel_h * shape_.kernel_w;
        change((plane + 1) * plane_period(shape_));
      }
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
        solve_lanes<kLanes>(s, until, run, 0, state);
      } else if (run.low || run.high) {
        solve_lanes<kHalf>(s, until, run, run.high ? half_ : 0, state);
      }
      s = until;
    }
  }

  // kCount lanes from first_lane on.
  template <int kCount>
  void solve_lanes(int64_t begin, int64_t end, const Run& run, int64_t first_lane, T* state) const {
    if (run.masked) mask_lanes<kCount>(begin, end, first_lane);
    solve_steps_of<T, kCount>(shape_)(problem_.weights, shape_, end - begin, state + first_lane, step_state_,
                                      scratch_.lane_stride, scratch_.taps + run.skipped,
                                      shape_.taps() - 1 - run.skipped, run.masked ? scratch_.held : nullptr,
                                      scratch_.right);
  }

  // All bits of `held`, [step][lane], where a lane holds a pixel.
  template <int kCount>
  void mask_lanes(int64_t begin, int64_t end, int64_t first_lane) const {
    using Bits = typename VectorOf<T, kCount>::bits;
    using Bit = typename LaneBlock<T>::Step;
    constexpr int64_t n = kVectorLanes<T, kCount>;
    const auto width = static_cast<Bit>(shape_.width);
    const auto period = static_cast<Bit>(plane_period(shape_));
    for (int v = 0; v < kVectors<T, kCount>; ++v) {
      bool is_first = true;
      for (const LineBand& band : line_) {
        // Column of each lane in its plane, and steps until it leaves the band.
        Bits column{}, left{};
        for (int64_t l = 0; l < n; ++l) {
          const int64_t lane = first_lane + v * n + l;
          const int64_t at = begin - band.start - lane;
          column[l] = static_cast<Bit>(at < 0 ? at : at % period);
          left[l] = static_cast<Bit>(lane < band.used ? smaller(row_steps(shape_) - at, end - begin) : 0);
        }
        T* held = scratch_.held + v * n;
        for (int64_t s = begin; s < end; ++s, held += kCount) {
          const Bits inside = (Bits)(column >= 0) & (Bits)(column < width) & (Bits)(left > 0);
          store<kCount>(held, (Vector<T, kCount>)(is_first ? inside : inside | (Bits)load<kCount>(held)));
          column += 1;
          column -= (Bits)(column == period) & period;
          left -= 1;
        }
        is_first = false;
      }
    }
  }

  // The gradient of the window's `steps`.
  void sum_gradients(int64_t steps) const {
    const int64_t channels = shape_.channels;
    const int64_t tap_count = shape_.taps() - 1;
    subtract_sums<T, kLanes>(scratch_.state, channels, scratch_.lane_stride, step_state_, steps, gradients_.bias);
    const int64_t at_once = even_piece(steps, summed_steps<T>(scratch_.lane_stride));
    for (int64_t from = 0; from < steps; from += at_once) {
      const int64_t count = smaller(steps - from, at_once);
      for (int64_t t = 0; t <= tap_count; ++t) {
        const bool is_tap = t < tap_count;
        const T* const u = scratch_.state + from * step_state_ + (is_tap ? scratch_.taps[t].source : 0);
        scratch_.spans[t] = {u, scratch_.other + from * other_step_};
        // What a tap reaches beyond the first plane is not kept.
        scratch_.tap_spans[t] = {&scratch_.spans[t], is_tap && scratch_.order[t].a >= shape_.depth ? 0 : 1, count};
      }
      outer_sums<T, kLanes>(scratch_.tap_spans, tap_count + 1, channels,
                            {scratch_.lane_stride, step_state_, kLanes, other_step_}, gradients_.weight);
    }
  }

  const Problem<IO, T>& problem_;
  const Shape& shape_;
  const Bands<T>& bands_;
  const Gradients<T> gradients_;
  const RowsScratch<T> scratch_;
  const ptrdiff_t step_state_;
  const ptrdiff_t other_step_;
  // Lanes of half a line, which is swept by itself while no row is in the other half; 0 where it would take as long as
  // the whole line, since a single block of channels has no other to be paired with (see solve_pair).
  const int64_t half_;
  LineBands line_;
};
