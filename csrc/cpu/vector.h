// SIMD vectors of the instruction set being compiled, through the compilers' vector extensions, so that one source
// serves AVX-512, AVX2 and whatever the compiler takes as its baseline. Included by sweep_impl.h alone, inside its
// namespace and under its target pragma: nothing here may be shared between instruction sets.

#if defined(__clang__)
#define INVERSE_FLOW_SHUFFLE(Index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INVERSE_FLOW_SHUFFLE(Index, a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif
#define INVERSE_FLOW_INLINED __attribute__((always_inline))
#define INVERSE_FLOW_INLINE static inline INVERSE_FLOW_INLINED

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};

// The vectors that the lanes of a line are computed in: the widest of the instruction set, or a narrower one where it
// holds all of them. The loads and stores are unaligned ones: a tap of a skewed line starts anywhere.
template <class T, int kLanes>
struct VectorOf {
  static constexpr int kBytes =
      kLanes * sizeof(T) < INVERSE_FLOW_VECTOR_BYTES ? kLanes * static_cast<int>(sizeof(T)) : INVERSE_FLOW_VECTOR_BYTES;
  typedef T type __attribute__((vector_size(kBytes)));
  typedef T memory __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
  typedef typename BitsOf<T>::type bits __attribute__((vector_size(kBytes)));
};
template <class T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;
template <class T, int kLanes>
constexpr int kVectorLanes = VectorOf<T, kLanes>::kBytes / sizeof(T);
// Of a line.
template <class T, int kLanes>
constexpr int kVectors = kLanes / kVectorLanes<T, kLanes>;

template <int kLanes, class T>
INVERSE_FLOW_INLINE Vector<T, kLanes> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T, kLanes>::memory*>(p);
}
// A load whose value is used many times. Left to itself, GCC reads it from memory again for every use.
template <int kLanes, class T>
INVERSE_FLOW_INLINE Vector<T, kLanes> load_once(const T* p) {
  Vector<T, kLanes> value = load<kLanes>(p);
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}
template <int kLanes, class T>
INVERSE_FLOW_INLINE void store(T* p, Vector<T, kLanes> v) {
  *reinterpret_cast<typename VectorOf<T, kLanes>::memory*>(p) = v;
}

// `v` where the mask's bits are set, else zero.
template <class T, int kLanes>
INVERSE_FLOW_INLINE Vector<T, kLanes> where_held(Vector<T, kLanes> v, Vector<T, kLanes> mask) {
  using Bits = typename VectorOf<T, kLanes>::bits;
  return (Vector<T, kLanes>)((Bits)v & (Bits)mask);
}

// Assignments: for an initialiser of more than a few vectors GCC also clears the memory that none of them is kept in.
template <class V, int kRows, int kColumns>
INVERSE_FLOW_INLINE void set_zero(V (&sum)[kRows][kColumns]) {
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) sum[i][j] = V{};
  }
}

// Groups of eight, the unit of packing: eight pixels of one lane against one pixel of eight lanes.
typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));
typedef int32_t Int8x32 __attribute__((vector_size(32)));
typedef int64_t Int8x64 __attribute__((vector_size(64)));
typedef uint16_t Short8 __attribute__((vector_size(16)));
typedef uint32_t Uint8x32 __attribute__((vector_size(32)));

template <class T>
struct EightOf;
template <>
struct EightOf<float> {
  using type = Float8;
  using step = int32_t;
  using index = Int8x32;
  typedef float memory __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct EightOf<double> {
  using type = Double8;
  using step = int64_t;
  using index = Int8x64;
  typedef double memory __attribute__((vector_size(64), aligned(8), may_alias));
};
template <class T>
using Eight = typename EightOf<T>::type;

INVERSE_FLOW_INLINE Eight<float> load8(const float* p) { return *reinterpret_cast<const EightOf<float>::memory*>(p); }
INVERSE_FLOW_INLINE Eight<double> load8(const double* p) {
  return *reinterpret_cast<const EightOf<double>::memory*>(p);
}
INVERSE_FLOW_INLINE void store8(float* p, Eight<float> v) { *reinterpret_cast<EightOf<float>::memory*>(p) = v; }
INVERSE_FLOW_INLINE void store8(double* p, Eight<double> v) { *reinterpret_cast<EightOf<double>::memory*>(p) = v; }

// Between 16 and 32 bits, without signs; what is narrowed must fit.
#if INVERSE_FLOW_HAS_F16C
// GCC makes two to three times as many instructions of the conversions below. Where there is F16C here, there is AVX2.
INVERSE_FLOW_INLINE Uint8x32 widen(Short8 v) { return (Uint8x32)_mm256_cvtepu16_epi32((__m128i)v); }
INVERSE_FLOW_INLINE Short8 narrow(Uint8x32 v) {
  return (Short8)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
#else
INVERSE_FLOW_INLINE Uint8x32 widen(Short8 v) { return __builtin_convertvector(v, Uint8x32); }
INVERSE_FLOW_INLINE Short8 narrow(Uint8x32 v) { return __builtin_convertvector(v, Short8); }
#endif

INVERSE_FLOW_INLINE Eight<float> load8(const BFloat16* p) {
  Short8 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Float8)(widen(bits) << 16);
}
INVERSE_FLOW_INLINE void store8(BFloat16* p, Eight<float> v) {
  const Uint8x32 bits = (Uint8x32)v;
  const Uint8x32 is_nan = (Uint8x32)(v != v);
  // Round to nearest, ties to even; a NaN keeps its top bits and is made quiet, or rounding could turn it into inf.
  const Uint8x32 rounding = (0x7fffu + ((bits >> 16) & 1u)) & ~is_nan;
  const Short8 half = narrow(((bits | (is_nan & 0x400000u)) + rounding) >> 16);
  __builtin_memcpy(p, &half, sizeof half);
}

#if INVERSE_FLOW_HAS_F16C
INVERSE_FLOW_INLINE Eight<float> load8(const Float16* p) {
  return (Float8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INVERSE_FLOW_INLINE void store8(Float16* p, Eight<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without conversion instructions: move the exponent with a multiplication, which also handles subnormals exactly.
INVERSE_FLOW_INLINE Eight<float> load8(const Float16* p) {
  Short8 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  const Uint8x32 wide = widen(bits);
  const Float8 magnitude = (Float8)((wide & 0x7fffu) << 13) * 0x1p112f;
  const Uint8x32 special = (Uint8x32)((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (Float8)((Uint8x32)magnitude | special | ((wide & 0x8000u) << 16));
}
INVERSE_FLOW_INLINE void store8(Float16* p, Eight<float> v) {
  const Uint8x32 bits = (Uint8x32)v;
  const Uint8x32 sign = (bits >> 16) & 0x8000u;
  const Uint8x32 magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent and round the 13 dropped bits to nearest even.
  const Uint8x32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the last bit of a half with the last bit of a float, and rounds.
  const Uint8x32 subnormal = (Uint8x32)((Float8)magnitude + 0.5f) - 0x3f000000u;
  const Uint8x32 is_subnormal = (Uint8x32)(magnitude < 0x38800000u);
  const Uint8x32 is_inf = (Uint8x32)(magnitude >= 0x477ff000u);
  const Uint8x32 is_nan = (Uint8x32)(magnitude > 0x7f800000u);
  Uint8x32 half = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  half = (half & ~is_inf) | (is_inf & 0x7c00u);
  half = half | (is_nan & 0x200u) | sign;
  const Short8 stored = narrow(half);
  __builtin_memcpy(p, &stored, sizeof stored);
}
#endif

// Rows of eight become columns of eight: three rounds of interleaving.
template <class T>
INVERSE_FLOW_INLINE void transpose8(Eight<T> (&r)[8]) {
  using V = Eight<T>;
  using Index = typename EightOf<T>::index;
  V a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = INVERSE_FLOW_SHUFFLE(Index, r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    a[i + 1] = INVERSE_FLOW_SHUFFLE(Index, r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + j] = INVERSE_FLOW_SHUFFLE(Index, a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + j + 2] = INVERSE_FLOW_SHUFFLE(Index, a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = INVERSE_FLOW_SHUFFLE(Index, b[j], b[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[j + 4] = INVERSE_FLOW_SHUFFLE(Index, b[j], b[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

template <class T>
INVERSE_FLOW_INLINE Eight<T> reverse8(Eight<T> v) {
  using Index = typename EightOf<T>::index;
  return INVERSE_FLOW_SHUFFLE(Index, v, v, 7, 6, 5, 4, 3, 2, 1, 0);
}

// The sums of eight groups of eight, by three rounds that add what they interleave.
template <class T>
INVERSE_FLOW_INLINE Eight<T> sums_of_eight(const Eight<T> (&v)[8]) {
  using Index = typename EightOf<T>::index;
  Eight<T> a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    a[i] = INVERSE_FLOW_SHUFFLE(Index, v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
           INVERSE_FLOW_SHUFFLE(Index, v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = INVERSE_FLOW_SHUFFLE(Index, a[2 * i], a[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
           INVERSE_FLOW_SHUFFLE(Index, a[2 * i], a[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return INVERSE_FLOW_SHUFFLE(Index, b[0], b[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         INVERSE_FLOW_SHUFFLE(Index, b[0], b[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// out[i] = the sum of the lanes of v[i], from kFirst on.
template <class T, int kLanes, int kCount, int kFirst = 0>
INVERSE_FLOW_INLINE void horizontal_sums(const Vector<T, kLanes> (&v)[kCount], T* out) {
  constexpr int n = kVectorLanes<T, kLanes>;
  constexpr int count = n < 8 ? 1 : kCount - kFirst < 8 ? kCount - kFirst : 8;
  if constexpr (n < 8) {
    out[kFirst] = v[kFirst][0];
    for (int l = 1; l < n; ++l) out[kFirst] += v[kFirst][l];
  } else {
    Eight<T> eight[8];
    for (int i = 0; i < 8; ++i) {
      Eight<T> part[n / 8];
      __builtin_memcpy(part, &v[kFirst + (i < count ? i : 0)], sizeof part);
      eight[i] = part[0];
      for (int p = 1; p < n / 8; ++p) eight[i] += part[p];
    }
    const Eight<T> sums = sums_of_eight<T>(eight);
    __builtin_memcpy(out + kFirst, &sums, count * sizeof(T));
  }
  if constexpr (kFirst + count < kCount) horizontal_sums<T, kLanes, kCount, kFirst + count>(v, out);
}
