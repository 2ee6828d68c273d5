// Vectors of the instruction set that this is compiled for, in the compiler's own terms: GCC's and
// Clang's vector extensions. Everything is in an unnamed namespace, since the same names mean other
// code in each set.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace m7 {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // numbers in a vector
constexpr int kPanel = 2, kTileRows = 12;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kPanel = 2, kTileRows = 6;
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int kPanel = 4, kTileRows = 6;
#else
constexpr int W = 4;
constexpr int kPanel = 2, kTileRows = 6;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef int16_t Pairs __attribute__((vector_size(4 * W)));  // two in each lane
typedef uint8_t B16 __attribute__((vector_size(16)));

// The standard library's would be the same function for all instruction sets, compiled for one.
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t clamp(int64_t x, int64_t least, int64_t most) { return min(max(x, least), most); }
inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline void zero(float* p, int64_t n) { std::memset(p, 0, static_cast<size_t>(n) * 4); }

template <class T>
inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store(void* p, T v) {
  std::memcpy(p, &v, sizeof v);
}
// a · b of both integers in each lane, added up; in one instruction, where there is one.
#if defined(__x86_64__)
constexpr bool kHasPairs = true;
inline I times(Pairs a, Pairs b) {
#if defined(__AVX512F__)
  return reinterpret_cast<I>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<I>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return reinterpret_cast<I>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
}
#else
constexpr bool kHasPairs = false;
inline I times(Pairs, Pairs) { return I{}; }
#endif

inline V splat(float x) { return x - V{}; }
inline V number(U codes) { return __builtin_convertvector(reinterpret_cast<I>(codes), V); }
inline V as_float(U bits) { return reinterpret_cast<V>(bits); }
inline U as_bits(V x) { return reinterpret_cast<U>(x); }
inline V choose(I mask, V yes, V no) {
  return as_float((reinterpret_cast<U>(mask) & as_bits(yes)) | (~reinterpret_cast<U>(mask) & as_bits(no)));
}
// The numbers at p that a pattern names for each lane; it names none beyond the fourth, or W.
inline V spread(const float* p, I pattern) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return reinterpret_cast<V>(_mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)),
                                                  reinterpret_cast<__m256i>(pattern)));
#else
  return __builtin_shuffle(load<V>(p), pattern);
#endif
}
inline V greater(V a, V b) { return choose(a > b, a, b); }

template <int n>
inline float sum(V v) {
  I turned;
  for (int i = 0; i < W; ++i) turned[i] = (i + n) % W;
  v += __builtin_shuffle(v, turned);
  if constexpr (n > 1) return sum<n / 2>(v);
  return v[0];
}
inline float sum(V v) { return sum<W / 2>(v); }

// Lanes of two vectors for `sums`: lane i comes from b where i has the bit `half`, and from a where
// not; of each pair of lanes that differ in that bit, `second` says which.
template <int half>
inline I lanes(bool second) {
  I index{};
  for (int i = 0; i < W; ++i) index[i] = ((i & ~half) | (second ? half : 0)) + (i & half ? W : 0);
  return index;
}

template <int half>
inline void halve(V* v) {
  const I first = lanes<half>(false), second = lanes<half>(true);
  for (int i = 0; i < half; ++i)
    v[i] = __builtin_shuffle(v[i], v[i + half], first) + __builtin_shuffle(v[i], v[i + half], second);
  if constexpr (half > 1) halve<half / 2>(v);
}

// Exchange the bits `bit`, bit / 2, … 1 of the lanes' numbers with those of the numbers of n vectors.
template <int bit, int n>
inline void swap(V* v) {
  if constexpr (bit > 0) {
    const I first = lanes<bit>(false), second = lanes<bit>(true);
    for (int i = 0; i < n; ++i) {
      if (i & bit) continue;
      const V a = v[i], b = v[i + bit];
      v[i] = __builtin_shuffle(a, b, first);
      v[i + bit] = __builtin_shuffle(a, b, second);
    }
    swap<bit / 2, n>(v);
  }
}

// The sums of W vectors, one in each lane; the vectors are used up.
inline V sums(V* v) {
  halve<W / 2>(v);
  return v[0];
}

// Vectors of 16 bytes, side by side.
template <int n = W>
inline U join(const B16* v) {
  if constexpr (n == 4) {
    return load<U>(v);
  } else {
    typedef uint64_t L2 __attribute__((vector_size(16)));
    typedef uint64_t L4 __attribute__((vector_size(32)));
    L4 halves[n / 8];
    for (int i = 0; i < n / 8; ++i)
      halves[i] =
          __builtin_shufflevector(reinterpret_cast<L2>(v[2 * i]), reinterpret_cast<L2>(v[2 * i + 1]), 0, 1, 2, 3);
    if constexpr (n == 8) {
      return reinterpret_cast<U>(halves[0]);
    } else {
      return reinterpret_cast<U>(__builtin_shufflevector(halves[0], halves[1], 0, 1, 2, 3, 4, 5, 6, 7));
    }
  }
}

// float16 and bfloat16, exactly; infinite numbers and NaN do not occur in weights that were checked.
inline V from_half(H h) {
#if defined(__AVX512F__)
  return reinterpret_cast<V>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)));
#elif defined(__F16C__)
  return reinterpret_cast<V>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#elif defined(__aarch64__)
  typedef __fp16 F16 __attribute__((vector_size(8)));
  return __builtin_convertvector(reinterpret_cast<F16>(h), V);
#else
  U bits = __builtin_convertvector(h, U);
  return as_float(as_bits(as_float((bits & 0x7fff) << 13) * 0x1p112f) | (bits & 0x8000) << 16);
#endif
}
inline V from_bfloat(H h) { return as_float(__builtin_convertvector(h, U) << 16); }

inline float half_to_float(uint16_t h) {
  uint32_t bits = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
  float x = __builtin_bit_cast(float, bits) * 0x1p112f;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, x) | sign);
}
inline float bfloat_to_float(uint16_t h) { return __builtin_bit_cast(float, static_cast<uint32_t>(h) << 16); }

// The nearest float16, to even; what is too large becomes the largest.
inline uint16_t float_to_half(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7bff);
  if (bits < 0x38800000) {  // subnormal: added to ½, the mantissa ends where float16's does
    float y = __builtin_bit_cast(float, bits) + 0.5f;
    return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, y) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}
inline uint16_t float_to_bfloat(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// e to the x, to 2e-7: 2^n · 2^f, where n is added to the bits of the exponent.
inline V exponential(V x) {
  V y = x * 1.4426950408889634f;
  y = choose(y > 126.f, splat(126.f), choose(y < -126.f, splat(-126.f), y));
  V rounded = y + 12582912.f;  // 1.5 · 2^23 leaves no bits for a fraction
  V f = y - (rounded - 12582912.f);
  V p = f * 0.001339086336353527f + 0.009676031918255982f;
  p = p * f + 0.05550357114222094f;
  p = p * f + 0.2402210748530968f;
  p = p * f + 0.6931471880262273f;
  p = p * f + 1.0000000754548972f;
  return as_float(as_bits(p) + (as_bits(rounded) << 23));
}

}  // namespace
}  // namespace m7
