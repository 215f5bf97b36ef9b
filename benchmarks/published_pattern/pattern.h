// The launch pattern of earlier code for the inverse of a convolution, as a rival: the host walks over anti-diagonals
// and channels, launches a kernel for each, and waits for it. Threads are images, blocks the pixels of the diagonal,
// and all operands stay in global memory. Order top-left, unit lower triangular corner tap; `transposed` solves with
// A^T.
//
// What a thread computes and the order of the launches stand here, as plain C++, so that a test can run them on the
// CPU.
#pragma once

#ifdef __CUDACC__
#define PATTERN_HOST_DEVICE __host__ __device__
#else
#define PATTERN_HOST_DEVICE
#endif

struct Pattern {
  const float* y;  // (batch, channels, height, width), contiguous
  const float* w;  // (channels, channels, kernel, kernel)
  float* x;
  int batch, channels, height, width, kernel;
  bool transposed;

  PATTERN_HOST_DEVICE int first_row(int diagonal) const { return diagonal < width ? 0 : diagonal - width + 1; }
  PATTERN_HOST_DEVICE int pixels(int diagonal) const {
    const int last = diagonal < height ? diagonal : height - 1;
    return last - first_row(diagonal) + 1;
  }
};

// One channel of one pixel of one image; `pixel` counts along the diagonal, which starts at the corner of the order.
PATTERN_HOST_DEVICE inline void solve_value(const Pattern& p, int diagonal, int channel, int pixel, int image) {
  const int row = p.first_row(diagonal) + pixel;
  const int column = diagonal - row;
  const int step = p.transposed ? -1 : 1;
  const int i = p.transposed ? p.height - 1 - row : row;
  const int j = p.transposed ? p.width - 1 - column : column;
  const long plane = static_cast<long>(p.height) * p.width;
  const long first = static_cast<long>(image) * p.channels * plane;
  float sum = 0;
  for (int a = 0; a < p.kernel && a <= row; ++a) {
    for (int b = 0; b < p.kernel && b <= column; ++b) {
      const long source = first + static_cast<long>(i - step * a) * p.width + (j - step * b);
      const int tap = (p.kernel - 1 - a) * p.kernel + p.kernel - 1 - b;
      for (int c = 0; c < p.channels; ++c) {
        // Of the corner tap only the strictly lower part is read.
        if (a == 0 && b == 0 && (p.transposed ? c <= channel : c >= channel)) continue;
        const int pair = p.transposed ? c * p.channels + channel : channel * p.channels + c;
        sum += p.w[static_cast<long>(pair) * p.kernel * p.kernel + tap] * p.x[source + c * plane];
      }
    }
  }
  const long at = first + channel * plane + static_cast<long>(i) * p.width + j;
  p.x[at] = p.y[at] - sum;
}

// Calls launch(diagonal, channel, pixels) in an order in which every value only needs earlier ones, until an error.
template <class Launch>
int for_each_launch(const Pattern& p, Launch launch) {
  for (int diagonal = 0; diagonal < p.height + p.width - 1; ++diagonal) {
    for (int k = 0; k < p.channels; ++k) {
      const int error = launch(diagonal, p.transposed ? p.channels - 1 - k : k, p.pixels(diagonal));
      if (error != 0) return error;
    }
  }
  return 0;
}
