// Images as lanes: slab after slab of the images of one line.
// Included by sweep_impl.h alone, inside its namespace and under its target pragma.

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
