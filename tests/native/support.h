// What the kernels' tests share: random numbers, the values of 16-bit floats, comparison, and memory
// whose neighbours are watched.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

inline std::mt19937 rng;
inline int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(rng); }
inline float normal() { return std::normal_distribution<float>()(rng); }

inline double half_value(uint16_t h) {
  const int e = h >> 10 & 31, m = h & 1023;
  const double x = e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
  return h & 0x8000 ? -x : x;
}
inline double bfloat_value(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Bytes that end where their last does. Under AddressSanitizer the heap watches what lies beside them;
// elsewhere marks do, which `intact` looks at.
class Bytes {
 public:
  // shift  where they begin, counted from an address that 16 divides
  void assign(size_t size, uint8_t value, size_t shift = 0) {
    size_ = size;
    before_ = kMarks + shift;
    memory_.assign(before_ + size + kMarks, kMark);
    for (size_t i = 0; i < size; ++i) memory_[before_ + i] = value;
  }
  uint8_t* data() { return memory_.data() + before_; }
  const uint8_t* data() const { return memory_.data() + before_; }
  uint8_t& operator[](size_t i) { return data()[i]; }
  size_t size() const { return size_; }
  bool intact() const {
    for (size_t i = 0; i < memory_.size(); ++i) {
      if ((i < before_ || i >= before_ + size_) && memory_[i] != kMark) return false;
    }
    return true;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kMarks = 0;
#else
  static constexpr size_t kMarks = 64;
#endif
  static constexpr uint8_t kMark = 0xa7;
  std::vector<uint8_t> memory_;
  size_t size_ = 0, before_ = 0;
};

// Floats in such memory.
class Floats {
 public:
  explicit Floats(size_t n) : n_(n) {
    bytes_.assign(4 * n, 0xff);  // NaN, until they are set
  }
  float* data() { return reinterpret_cast<float*>(bytes_.data()); }
  float& operator[](size_t i) { return data()[i]; }
  float operator[](size_t i) const { return reinterpret_cast<const float*>(bytes_.data())[i]; }
  float* begin() { return data(); }
  float* end() { return data() + n_; }
  size_t size() const { return n_; }
  bool intact() const { return bytes_.intact(); }

 private:
  Bytes bytes_;
  size_t n_;
};

inline bool fail(const char* what, const char* why) {
  std::printf("FAIL %s: %s\n", what, why);
  return false;
}

inline bool close(const char* what, const Floats& got, const std::vector<double>& wanted,
                  const std::vector<double>& size) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::abs(got[i] - wanted[i]) <= 2e-6 * size[i] + 1e-30)) {
      std::printf("FAIL %s: number %zu is %.9g, not %.9g (of terms that sum up to %.3g)\n", what, i, got[i],
                  wanted[i], size[i]);
      return false;
    }
  }
  return true;
}

}  // namespace
