// How each scheme's codes become numbers, a vector of words at a time.
//
// A word is the fewest bytes that hold whole codes: 4 bytes, or 3 and 5 where codes have 3, 6 and 5
// bits. Lane i of `code<j>` is code j of word i, so numbers come in the order
//
//     word 0 code 0, word 1 code 0, …   word 0 code 1, word 1 code 1, …
//
// and what they meet is put into that order once (`order`). A code need not be shifted down: what
// it meets is multiplied by `factor(j)`, a power of two, instead.

#pragma once

#include "kernels.h"
#include "vectors.h"

namespace m7 {
namespace {

struct Words {
  U a, b;
};

template <int kBits>
struct Affine {
  static constexpr bool kGroups = true, kBiases = true;
  static constexpr int kBytes = kBits == 5 ? 5 : kBits == 3 || kBits == 6 ? 3 : 4;
  static constexpr int kCodes = kBytes * 8 / kBits;
  static constexpr uint32_t kMask = (1u << kBits) - 1;
  // Whether codes lie so that `pair` takes them out: none across the middle of a word.
  static constexpr bool kPairs = kHasPairs && 16 % kBits == 0;

  // Codes from here on are taken from the word's upper half, or their last bits would be lost.
  static constexpr int kUpper = kBytes == 4 ? kCodes / 2 : kBits == 5 ? 5 : kCodes;
  static constexpr int shift(int j) {
    if (j < kUpper) return j * kBits;
    return kBits == 5 ? j * 5 - 24 : j * kBits - 16;
  }
  static constexpr float factor(int j) { return 1.0f / static_cast<float>(1u << shift(j)); }

  static inline Words words(const uint8_t* p) {
    if constexpr (kBytes == 4) {
      return {load<U>(p), U{}};
    } else if constexpr (kBytes == 3) {
      constexpr B16 zero{};
      B16 parts[W / 4];
      for (int i = 0; i < W / 4; ++i) {
        B16 v = load<B16>(p + 12 * i);
        parts[i] = __builtin_shufflevector(v, zero, 0, 1, 2, 16, 3, 4, 5, 16, 6, 7, 8, 16, 9, 10, 11, 16);
      }
      return {join(parts), U{}};
    } else {
      B16 lower[W / 4], upper[W / 4];
      constexpr B16 zero{};
      for (int i = 0; i < W / 4; ++i) {
        B16 v = load<B16>(p + 20 * i), w = load<B16>(p + 20 * i + 4);
        lower[i] = __builtin_shufflevector(v, w, 0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 27, 28, 29, 30);
        w = __builtin_shufflevector(w, zero, 10, 11, 16, 16, 15, 16, 16, 16, 16, 16, 16, 16, 14, 15, 16, 16);
        v = __builtin_shufflevector(v, zero, 3, 4, 16, 16, 8, 9, 16, 16, 13, 14, 16, 16, 16, 16, 16, 16);
        upper[i] = __builtin_shufflevector(v, w, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 28, 29, 30, 31);
      }
      return {join(lower), join(upper)};
    }
  }
  template <int j>
  static inline V code(const Words& w) {
    const U word = j < kUpper ? w.a : kBytes == 4 ? w.a >> 16 : w.b;
    return number(word & (kMask << shift(j)));
  }
  // Codes j and j + kCodes / 2 of each word, as two integers.
  template <int j>
  static inline Pairs pair(const Words& w) {
    typedef uint16_t U16 __attribute__((vector_size(4 * W)));
    const U16 halves = reinterpret_cast<U16>(w.a) >> (j * kBits);
    return reinterpret_cast<Pairs>(j == kCodes / 2 - 1 ? halves : halves & static_cast<uint16_t>(kMask));
  }
};

// E2M1: a sign and one of 0, ½, 1, 1½, 2, 3, 4, 6.
struct Four {
  static constexpr bool kGroups = true, kBiases = false, kPairs = false;
  static constexpr int kBytes = 4, kCodes = 8;
  static constexpr float factor(int) { return 1.0f; }
  static inline Words words(const uint8_t* p) { return {load<U>(p), U{}}; }
  template <int j>
  static inline V code(const Words& w) {
    const U c = w.a >> (4 * j);
#if defined(__AVX512F__)
    constexpr V table = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
    return __builtin_shuffle(table, reinterpret_cast<I>(c));
#elif defined(__AVX2__)
    constexpr V table = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
    return as_float(as_bits(__builtin_shuffle(table, reinterpret_cast<I>(c))) ^ (c << 28 & 0x80000000u));
#else
    // The two bits of the exponent and the one of the mantissa, where float32 has them.
    const U magnitude = c & 7;
    const V normal = as_float((magnitude << 22) + (126u << 23));
    const V x = choose(reinterpret_cast<I>(magnitude) < 2, number(magnitude) * 0.5f, normal);
    return as_float(as_bits(x) | (c << 28 & 0x80000000u));
#endif
  }
};

// E4M3: subnormal below 2^-6.
struct Eight {
  static constexpr bool kGroups = true, kBiases = false, kPairs = false;
  static constexpr int kBytes = 4, kCodes = 4;
  static constexpr float factor(int) { return 1.0f; }
  static inline Words words(const uint8_t* p) { return {load<U>(p), U{}}; }
  template <int j>
  static inline V code(const Words& w) {
    // Put where float32 has exponent and mantissa; what is subnormal there is so here.
    const U sign = j < 3 ? w.a << (24 - 8 * j) : w.a;
    const U magnitude = j < 3 ? w.a << (20 - 8 * (j % 3)) : w.a >> 4;
    return as_float((sign & 0x80000000u) | (magnitude & 0x07f00000u)) * 0x1p120f;
  }
};

// Numbers that are not packed: a word is one of them.
template <Scheme kScheme>
struct Plain {
  static constexpr bool kGroups = false, kBiases = false, kPairs = false;
  static constexpr int kBytes = kScheme == Scheme::f32 ? 4 : 2, kCodes = 1;
  static constexpr float factor(int) { return 1.0f; }
  static inline Words words(const uint8_t* p) {
    if constexpr (kScheme == Scheme::f32) return {load<U>(p), U{}};
    if constexpr (kScheme == Scheme::f16) return {as_bits(from_half(load<H>(p))), U{}};
    return {as_bits(from_bfloat(load<H>(p))), U{}};
  }
  template <int j>
  static inline V code(const Words& w) {
    return as_float(w.a);
  }
};

// Call f with the scheme's type.
template <class F>
inline void with_scheme(Scheme scheme, F&& f) {
  switch (scheme) {
    case Scheme::f32:
      return f(Plain<Scheme::f32>{});
    case Scheme::f16:
      return f(Plain<Scheme::f16>{});
    case Scheme::bf16:
      return f(Plain<Scheme::bf16>{});
    case Scheme::affine2:
      return f(Affine<2>{});
    case Scheme::affine3:
      return f(Affine<3>{});
    case Scheme::affine4:
      return f(Affine<4>{});
    case Scheme::affine5:
      return f(Affine<5>{});
    case Scheme::affine6:
      return f(Affine<6>{});
    case Scheme::affine8:
      return f(Affine<8>{});
    case Scheme::mxfp4:
    case Scheme::nvfp4:
      return f(Four{});
    case Scheme::mxfp8:
      return f(Eight{});
  }
}

inline float e4m3_to_float(uint8_t c) {
  const uint32_t magnitude = c & 0x7f, sign = (c & 0x80u) << 24;
  const float x = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f
                                : __builtin_bit_cast(float, (magnitude << 20) + (120u << 23));
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, x) | sign);
}

// Write n scales or biases as float32, and `padding` numbers behind them: zeros, or those that follow
// in the matrix, of which `readable` lie from here on.
inline void scales_to_floats(const uint8_t* from, Scale type, int64_t n, int64_t readable, float* to,
                             int64_t padding) {
  int64_t i = 0;
  switch (type) {
    case Scale::f32:
      std::memcpy(to, from, static_cast<size_t>(n) * 4);
      i = n;
      break;
    case Scale::f16:
      for (; i < n && i + W <= readable; i += W) store(to + i, from_half(load<H>(from + 2 * i)));
      for (; i < n; ++i) to[i] = half_to_float(load<uint16_t>(from + 2 * i));
      break;
    case Scale::bf16:
      for (; i < n && i + W <= readable; i += W) store(to + i, from_bfloat(load<H>(from + 2 * i)));
      for (; i < n; ++i) to[i] = bfloat_to_float(load<uint16_t>(from + 2 * i));
      break;
    case Scale::e8m0:
      for (; i < n; ++i)
        to[i] = __builtin_bit_cast(float, from[i] ? static_cast<uint32_t>(from[i]) << 23 : 0x400000u);
      break;
    case Scale::e4m3:
      for (; i < n; ++i) to[i] = e4m3_to_float(from[i]);
      break;
  }
  for (; i < n + padding; ++i) to[i] = 0;
}

inline int64_t scale_bytes(Scale type) {
  return type == Scale::f32 ? 4 : type == Scale::f16 || type == Scale::bf16 ? 2 : 1;
}

}  // namespace
}  // namespace m7
