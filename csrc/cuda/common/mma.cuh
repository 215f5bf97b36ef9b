// The tensor cores: products of 16 x 8 weights and 8 x 8 values in TF32 (11 significant bits), and float32 split into
// two TF32 numbers. PTX, and beside it an emulated twin with the same rounding.
//
// A warp does a product together. With g = lane / 4 and t = lane % 4 a lane holds of
//   a (16 outputs x 8 inputs)  [g][t], [g + 8][t], [g][t + 4], [g + 8][t + 4]
//   b (8 inputs x 8 pixels)    [t][g], [t + 4][g]
//   sum (16 outputs x 8 pixels)  [g][2t], [g][2t + 1], [g + 8][2t], [g + 8][2t + 1].
//
// Of an operand the tensor core reads sign, exponent and the upper 10 bits of the fraction; the others it cuts off.
//
// 3xTF32: v = big + small with big = v rounded to TF32, small = v - big: 12 bits at most, of which the tensor core cuts
// off the last, so that 2^-23 |v| is lost at most, and v w = big big + big small + small big but for 2^-22 |v w|: three
// products for the error of float32.
#pragma once

#include "device.cuh"

namespace inverse_flow {

constexpr uint32_t kTf32Bits = 0xffffe000u;

#ifdef __CUDACC__

// To nearest, ties away from zero; the 13 low bits of the result are zero.
__device__ inline uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ inline void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

inline uint32_t round_to_tf32(float value) {
  const uint32_t bits = float_bits(value);
  const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (is_finite ? bits + 0x1000u : bits) & kTf32Bits;
}

// The products are exact; their sum is truncated, as it was seen on GPUs (Ootomo and Yokota, arXiv 2203.03341).
inline void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4];
    uint32_t b[2];
  };
  Operands mine;
  std::copy(a, a + 4, mine.a);
  std::copy(b, b + 2, mine.b);
  for (uint32_t& bits : mine.a) bits &= kTf32Bits;
  for (uint32_t& bits : mine.b) bits &= kTf32Bits;
  emulation::Block& block = emulation::Block::current();
  const auto* lanes = block.gather(mine);
  const int lane = static_cast<int>(block.active() % emulation::kWarpSize);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;
    const int column = lane % 4 * 2 + i % 2;
    double exact = sum[i];
    for (int k = 0; k < 8; ++k) {
      const double left = float_from_bits(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]);
      const double right = float_from_bits(lanes[column * 4 + k % 4].b[k / 4]);
      exact += left * right;
    }
    const float rounded = static_cast<float>(exact);
    sum[i] = std::fabs(static_cast<double>(rounded)) > std::fabs(exact) ? std::nextafter(rounded, 0.0f) : rounded;
  }
}

#endif

// To nearest in two instructions, where round_to_tf32 takes four. Not of a NaN, which may become 0.
__device__ inline uint32_t round_number_to_tf32(float value) { return (float_bits(value) + 0x1000u) & kTf32Bits; }

// kCount values in two parts each, value = big + small; a NaN is one in small. TF32 alone has big.
template <bool kTf32, int kCount>
struct Split {
  uint32_t big[kCount];
  uint32_t small[kCount];

  Split() = default;
  __device__ explicit Split(const float (&values)[kCount]) {
    INVERSE_FLOW_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kTf32) {
        big[i] = round_to_tf32(values[i]);
      } else {
        big[i] = round_number_to_tf32(values[i]);
        small[i] = float_bits(values[i] - float_from_bits(big[i]));
      }
    }
  }
};

// sum += a b: in TF32, or all three products, the small ones first.
template <bool kTf32>
__device__ inline void multiply_split(float (&sum)[4], const Split<kTf32, 4>& a, const Split<kTf32, 2>& b) {
  if constexpr (!kTf32) {
    multiply_tf32(sum, a.small, b.big);
    multiply_tf32(sum, a.big, b.small);
  }
  multiply_tf32(sum, a.big, b.big);
}

}  // namespace inverse_flow
