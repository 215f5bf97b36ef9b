// Products of float32 matrices on tensor cores, as exact as float32: 3xTF32.
//
// A TF32 number keeps 11 significant bits of a float32. A value is split into big + small, both TF32, which together
// hold 22 bits; of the four products of two split values three are formed, small x big, big x small and big x big, and
// the one left out is below 2^-22 of the whole. Sums are float32. An infinite value gives NaN: its small part is
// infinity - infinity.
//
// mma.m16n8k8: lane = 4 g + t of the warp holds of the 16 x 8 matrix A the entries (g, t), (g + 8, t), (g, t + 4),
// (g + 8, t + 4); of the 8 x 8 matrix B (t, g), (t + 4, g); of the 16 x 8 sums (g, 2t), (g, 2t + 1), (g + 8, 2t),
// (g + 8, 2t + 1). All lanes of the warp take part.
#pragma once

#include "device.cuh"

namespace inverse_flow {

#ifdef __CUDACC__

// To the nearest TF32 number, ties away from zero.
__device__ inline uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ inline void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = float_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return is_nan ? 0x7fffffffu : (bits + 0x1000u) & 0xffffe000u;
}

inline void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4];
    uint32_t b[2];
  };
  const Fragments* lanes = emulation::Block::current().gather(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  // The tensor core does not look at the last 13 bits.
  const auto value = [](uint32_t bits) { return static_cast<double>(float_from_bits(bits & 0xffffe000u)); };
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;
    const int column = lane % 4 * 2 + i % 2;
    double exact = sum[i];
    for (int k = 0; k < 8; ++k) {
      exact += value(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]) * value(lanes[column * 4 + k % 4].b[k / 4]);
    }
    sum[i] = static_cast<float>(exact);
  }
}

#endif

// kCount values in two TF32 parts each.
template <int kCount>
struct Split {
  uint32_t big[kCount];
  uint32_t small[kCount];

  __device__ explicit Split(const float (&values)[kCount]) {
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kCount; ++i) {
      big[i] = round_to_tf32(values[i]);
      small[i] = round_to_tf32(values[i] - float_from_bits(big[i]));
    }
  }
};

// sum += A B, the small products first.
__device__ inline void multiply_add(float (&sum)[4], const Split<4>& a, const Split<2>& b) {
  multiply_add_tf32(sum, a.small, b.big);
  multiply_add_tf32(sum, a.big, b.small);
  multiply_add_tf32(sum, a.big, b.big);
}

}  // namespace inverse_flow
