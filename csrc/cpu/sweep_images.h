// Images as lanes: slab after slab of the images of one line.
// Included by sweep_impl.h alone, inside its namespace and under its target pragma.

// How an image is cut up: a slab of rows is packed, solved in place and unpacked in one go, and its weight gradient
// summed. Only where a single row is too large is it packed and solved a stretch at a time. The rows of a volume are
// counted through all its planes.
template <class T>
struct ImagesPlan {
  int64_t rows;     // of a slab
  int64_t stretch;  // columns
  int64_t ring;     // rows whose state is kept: those of a slab, and those in front of it that the taps reach

  ImagesPlan(const Shape& shape, bool with_gradient, int64_t lanes) {
    const int64_t pixel_bytes =
        state_step<T>(shape.channels, lanes) * static_cast<int64_t>(sizeof(T)) * (with_gradient ? 2 : 1);
    const int64_t pixels = larger(slab_bytes() / pixel_bytes, kStretch);
    const int64_t all_rows = shape.depth * shape.height;
    rows = larger(smaller(pixels / shape.width, all_rows), 1);
    stretch = rows > 1 ? shape.width : smaller(pixels / kStretch * kStretch, shape.width);
    const int64_t reached =
        (smaller(shape.kernel_d, shape.depth) - 1) * shape.height + smaller(shape.kernel_h, shape.height) - 1;
    ring = smaller(rows + reached, all_rows);
  }
};

template <class T>
struct ImagesScratch {
  T* state;  // [row of the ring][column][channel][lane]
  T* other;  // [row of the slab][column][channel][lane]
  T* right;  // [channel][lane]
  TapPosition* order;
  Tap* taps;            // [column up to kernel_w - 1][tap]
  int64_t* tap_counts;  // [column up to kernel_w - 1]
  TapSpans<T>* tap_spans;
  Span<T>* spans;  // [tap][row of the slab]
  size_t bytes;

  ImagesScratch(const Shape& shape, bool with_gradient, int64_t lanes, void* memory) {
    const ImagesPlan<T> plan(shape, with_gradient, lanes);
    const int64_t pixel = state_step<T>(shape.channels, lanes);
    const int64_t gradient_rows = with_gradient ? plan.rows : 0;
    Arena arena{static_cast<char*>(memory)};
    state = arena.take<T>(plan.ring * shape.width * pixel);
    other = arena.take<T>(gradient_rows * shape.width * pixel);
    right = arena.take<T>(pixel);
    order = arena.take<TapPosition>(shape.taps());
    taps = arena.take<Tap>(shape.kernel_w * shape.taps());
    tap_counts = arena.take<int64_t>(shape.kernel_w);
    tap_spans = arena.take<TapSpans<T>>(with_gradient ? shape.taps() : 0);
    spans = arena.take<Span<T>>(gradient_rows * shape.taps());
    bytes = arena.used;
  }
};

template <class IO, class T>
static size_t images_scratch(const Problem<IO, T>& problem, int64_t lanes) {
  return ImagesScratch<T>(problem.shape, problem.with_gradient, lanes, nullptr).bytes;
}

template <class IO, class T, int kLanes>
static void sweep_images(const Problem<IO, T>& problem, int64_t first_image, int64_t count, void* memory,
                         Gradients<T> gradients) {
  const Shape& shape = problem.shape;
  const int64_t channels = shape.channels;
  const int64_t tap_count = shape.taps() - 1;
  const ptrdiff_t step_state = state_step<T>(channels, kLanes);
  const ptrdiff_t row_state = shape.width * step_state;
  const ImagesPlan<T> plan(shape, problem.with_gradient, kLanes);
  const ImagesScratch<T> scratch(shape, problem.with_gradient, kLanes, memory);
  const SolveSteps<T, kLanes> solve = solve_steps_of<T, kLanes>(shape);
  tap_order(shape, scratch.order);

  Lanes lanes;
  lanes.count = kLanes;
  lanes.used = count;
  for (int64_t l = 0; l < count; ++l) {
    lanes.first[l] = 0;
    lanes.last[l] = plan.rows * shape.width;
  }
  const int64_t height = shape.height;
  // Calls f(a row) for rows [first, last) of the volume.
  struct Row {
    int64_t index, plane, in_plane, in_ring;
  };
  const auto for_rows = [&](int64_t first, int64_t last, auto f) INVERSE_FLOW_INLINED {
    for (Row row{first, first / height, first % height, first % plan.ring}; row.index < last; ++row.index) {
      f(row);
      if (++row.in_plane == height) row = {row.index, row.plane + 1, 0, row.in_ring};
      if (++row.in_ring == plan.ring) row.in_ring = 0;
    }
  };
  // From a row to one `rows` in front of it.
  const auto up = [&](const Row& row, int64_t rows) {
    return (row.in_ring < rows ? plan.ring - rows : -rows) * row_state;
  };
  // Calls f(start of each lane, first step, steps, row) for columns [begin, end) of rows [first, last): at once where
  // the rows follow each other in memory and in the ring, else row by row.
  const auto for_lines = [&](const auto& image, int64_t first, int64_t last, int64_t begin, int64_t end, auto f) {
    const Strides& stride = image.stride;
    const bool rows_joined = stride.row == shape.width * stride.column && end - begin == shape.width;
    const bool planes_joined = rows_joined && stride.plane == height * stride.row;
    int64_t next = first;
    for_rows(first, last, [&](const Row& row) {
      if (row.index < next) return;
      next = rows_joined ? smaller(last, row.index + plan.ring - row.in_ring) : row.index + 1;
      if (!planes_joined) next = smaller(next, row.index + height - row.in_plane);
      ptrdiff_t start[kMaxLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        start[l] = (first_image + l) * stride.batch + row.plane * stride.plane + row.in_plane * stride.row;
      }
      f(start, begin, (next - row.index) * (end - begin), row);
    });
  };

  // Taps that reach out of the image are left out: one list for each column they can reach from.
  const auto list_taps = [&](const Row& row) {
    for (int64_t column = 0; column < smaller(shape.kernel_w, shape.width); ++column) {
      Tap* const list = scratch.taps + column * shape.taps();
      int64_t count = 0;
      for (int64_t t = 0; t < tap_count; ++t) {
        const auto [a, p, q] = scratch.order[t];
        if (a > row.plane || p > row.in_plane || q > column) continue;
        list[count++] = {up(row, a * height + p) - q * step_state, t};
      }
      scratch.tap_counts[column] = count;
    }
  };
  // Whether the lists of the row before will do: it is not the first from which a tap reaches a plane or a row, or does
  // not reach around the ring.
  const auto shares_taps = [&](const Row& row) {
    const int64_t in_ring = row.in_ring < height ? row.in_ring : row.in_ring % height;
    return row.in_plane >= shape.kernel_h && in_ring >= shape.kernel_h;
  };
  const auto solve_row = [&](int64_t begin, int64_t end, T* state) {
    for (int64_t column = begin; column < end;) {
      const int64_t list = smaller(column, shape.kernel_w - 1);
      const int64_t steps = column < shape.kernel_w - 1 ? 1 : end - column;
      T* at = state + column * step_state;
      solve(problem.weights, shape, steps, at, step_state, kLanes, scratch.taps + list * shape.taps(),
            scratch.tap_counts[list], nullptr, scratch.right);
      column += steps;
    }
  };

  const int64_t all_rows = shape.depth * shape.height;
  for (int64_t first = 0; first < all_rows; first += plan.rows) {
    const int64_t last = smaller(first + plan.rows, all_rows);
    for (int64_t begin = 0; begin < shape.width; begin += plan.stretch) {
      const int64_t end = smaller(begin + plan.stretch, shape.width);
      const auto state_of = [&](const Row& row) {
        return scratch.state + row.in_ring * row_state + begin * step_state;
      };
      for_lines(problem.input, first, last, begin, end,
                [&](const ptrdiff_t* start, int64_t step, int64_t steps, const Row& row) {
                  pack(problem.input, start, lanes, channels, step, steps, problem.weights.bias, state_of(row), kLanes,
                       step_state);
                });
      for_rows(first, last, [&](const Row& row) {
        if (!shares_taps(row)) list_taps(row);
        solve_row(begin, end, scratch.state + row.in_ring * row_state);
      });
      for_lines(problem.output, first, last, begin, end,
                [&](const ptrdiff_t* start, int64_t step, int64_t steps, const Row& row) {
                  unpack(problem.output, start, lanes, channels, step, steps, state_of(row), kLanes, step_state);
                });
    }
    if (!problem.with_gradient) continue;
    for_lines(problem.other, first, last, 0, shape.width,
              [&](const ptrdiff_t* start, int64_t step, int64_t steps, const Row& row) {
                pack<IO, T>(problem.other, start, lanes, channels, step, steps, nullptr,
                            scratch.other + (row.index - first) * row_state, kLanes, step_state);
                subtract_sums<T, kLanes>(scratch.state + row.in_ring * row_state, channels, kLanes, step_state, steps,
                                         gradients.bias);
              });
    const auto sum_gradients = [&](int64_t from, int64_t to, int64_t begin, int64_t end) {
      for (int64_t t = 0; t <= tap_count; ++t) {
        const auto [a, p, q] = t < tap_count ? scratch.order[t] : TapPosition{0, 0, 0};
        const int64_t column = larger(begin, q);
        Span<T>* const spans = scratch.spans + t * plan.rows;
        int64_t span_count = 0;
        for_rows(from, to, [&, a = a, p = p, q = q](const Row& row) {
          if (row.plane < a || row.in_plane < p) return;
          spans[span_count++] = {
              scratch.state + row.in_ring * row_state + up(row, a * height + p) + (column - q) * step_state,
              scratch.other + (row.index - first) * row_state + column * step_state};
        });
        scratch.tap_spans[t] = {spans, column < end ? span_count : 0, end - column};
      }
      outer_sums<T, kLanes>(scratch.tap_spans, tap_count + 1, channels, {kLanes, step_state, kLanes, step_state},
                            gradients.weight);
    };
    const int64_t at_once = summed_steps<T>(kLanes);
    const int64_t rows = even_piece(last - first, larger(at_once / shape.width, 1));
    const int64_t columns = even_piece(shape.width, at_once);
    for (int64_t from = first; from < last; from += rows) {
      for (int64_t begin = 0; begin < shape.width; begin += columns) {
        sum_gradients(from, smaller(from + rows, last), begin, smaller(begin + columns, shape.width));
      }
    }
  }
}
