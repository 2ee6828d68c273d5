// Compares the kernels of one instruction set with plain loops in double precision, and runs the
// threads that share their work.
//
//   kernels_test [--isa base|avx2|avx512] [--seed N] [--rounds N] [--threads N]
//
// Needs neither MLX nor Python, so that it runs under sanitizers and emulators. Exit status 1 at
// the first difference.

#include "../../m7mlx/cpu/kernels/kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../m7mlx/cpu/kernels/isa.h"
#include "../../m7mlx/cpu/kernels/threads.h"
#include "attention_test.h"
#include "support.h"
#include "threads_test.h"

using namespace m7;

namespace {

struct Format {
  const char* name;
  Scheme scheme;
  int bits;
  bool groups, biases;
};
const Format kFormats[] = {
    {"f32", Scheme::f32, 32, false, false},      {"f16", Scheme::f16, 16, false, false},
    {"bf16", Scheme::bf16, 16, false, false},    {"affine2", Scheme::affine2, 2, true, true},
    {"affine3", Scheme::affine3, 3, true, true}, {"affine4", Scheme::affine4, 4, true, true},
    {"affine5", Scheme::affine5, 5, true, true}, {"affine6", Scheme::affine6, 6, true, true},
    {"affine8", Scheme::affine8, 8, true, true}, {"mxfp4", Scheme::mxfp4, 4, true, false},
    {"mxfp8", Scheme::mxfp8, 8, true, false},    {"nvfp4", Scheme::nvfp4, 4, true, false},
};

double e4m3_value(uint8_t c) {
  const int e = c >> 3 & 15, m = c & 7;
  const double x = e ? std::ldexp(8 + m, e - 10) : std::ldexp(m, -9);
  return c & 0x80 ? -x : x;
}
double e2m1_value(int c) {
  const double values[] = {0, .5, 1, 1.5, 2, 3, 4, 6};
  return c & 8 ? -values[c & 7] : values[c & 7];
}
uint16_t random_half(float scale) {  // a finite one, near `scale`
  const int e = static_cast<int>(draw(10, 16)), m = static_cast<int>(draw(0, 1023));
  const uint16_t sign = draw(0, 1) ? 0x8000 : 0;
  return scale == 0 ? sign : static_cast<uint16_t>(sign | e << 10 | m);
}

// A matrix in memory that ends where its last byte does, and its numbers.
struct Stored2D {
  Matrix a;
  Bytes codes, scales, biases;
  std::vector<double> numbers;
};

template <class T>
void put(Bytes& to, size_t index, T value) {
  std::memcpy(to.data() + index * sizeof value, &value, sizeof value);
}

double random_scale(Bytes& to, size_t i, Scale type) {
  switch (type) {
    case Scale::f32: {
      const float x = normal();
      put(to, i, x);
      return x;
    }
    case Scale::f16: {
      const uint16_t h = random_half(1);
      put(to, i, h);
      return half_value(h);
    }
    case Scale::bf16: {
      float x = normal();
      uint32_t b;
      std::memcpy(&b, &x, 4);
      const uint16_t h = static_cast<uint16_t>(b >> 16);
      put(to, i, h);
      return bfloat_value(h);
    }
    case Scale::e8m0: {
      const uint8_t e = static_cast<uint8_t>(draw(120, 132));
      to[i] = e;
      return std::ldexp(1.0, e - 127);
    }
    default: {
      const uint8_t c = static_cast<uint8_t>(draw(0, 0x77));
      to[i] = c;
      return e4m3_value(c);
    }
  }
}

void fill(Stored2D& s, const Format& format, int64_t rows, int64_t columns, int64_t group, Scale scale) {
  const int64_t row_bytes = columns * format.bits / 8, groups = format.groups ? columns / group : 0;
  // In a file numbers begin anywhere.
  const size_t shift = draw(0, 1) ? 0 : static_cast<size_t>(draw(1, 15));
  s.codes.assign(static_cast<size_t>(rows * row_bytes), 0, shift);
  s.numbers.assign(static_cast<size_t>(rows * columns), 0);
  const int64_t width = scale == Scale::f32 ? 4 : scale == Scale::f16 || scale == Scale::bf16 ? 2 : 1;
  s.scales.assign(static_cast<size_t>(rows * groups * width), 0, shift);
  s.biases.assign(format.biases ? s.scales.size() : 0, 0, shift);
  for (int64_t r = 0; r < rows; ++r) {
    double scale_value = 1, bias_value = 0;
    for (int64_t k = 0; k < columns; ++k) {
      const size_t i = static_cast<size_t>(r * columns + k);
      if (format.groups && k % group == 0) {
        const size_t g = static_cast<size_t>(r * groups + k / group);
        scale_value = random_scale(s.scales, g, scale);
        if (format.biases) bias_value = random_scale(s.biases, g, scale);
      }
      double value = 0;
      if (format.scheme == Scheme::f32) {
        const float x = normal();
        put(s.codes, i, x);
        value = x;
      } else if (format.scheme == Scheme::f16) {
        const uint16_t h = random_half(1);
        put(s.codes, i, h);
        value = half_value(h);
      } else if (format.scheme == Scheme::bf16) {
        const uint16_t h = static_cast<uint16_t>(draw(0x3c00, 0x4000));
        put(s.codes, i, h);
        value = bfloat_value(h);
      } else {
        int code = static_cast<int>(draw(0, (1 << format.bits) - 1));
        if (format.scheme == Scheme::mxfp8 && (code & 0x7f) == 0x7f) code ^= 1;  // a NaN
        const int64_t bit = k * format.bits;
        for (int b = 0; b < format.bits; ++b)
          if (code >> b & 1)
            s.codes[static_cast<size_t>(r * row_bytes + (bit + b) / 8)] |= static_cast<uint8_t>(1 << (bit + b) % 8);
        value = format.biases ? code : format.bits == 8 ? e4m3_value(static_cast<uint8_t>(code)) : e2m1_value(code);
      }
      s.numbers[i] = value * scale_value + bias_value;
    }
  }
  s.a = {format.scheme,
         scale,
         s.codes.data(),
         format.groups ? s.scales.data() : nullptr,
         format.biases ? s.biases.data() : nullptr,
         rows,
         columns,
         group,
         row_bytes};
}

bool test_product(const Kernels& kernels) {
  const Format& format = kFormats[draw(0, 11)];
  int64_t group = 1;
  Scale scale = Scale::f32;
  if (format.biases) {
    group = 32 << draw(0, 2);
    const Scale scales[] = {Scale::f32, Scale::f16, Scale::bf16};
    scale = scales[draw(0, 2)];
  } else if (format.groups) {
    group = format.scheme == Scheme::nvfp4 ? 16 : 32;
    scale = format.scheme == Scheme::nvfp4 ? Scale::e4m3 : Scale::e8m0;
  }
  const int64_t columns = format.groups ? std::max<int64_t>(32, group) * draw(1, 12) : draw(1, 700);
  const int64_t tokens = draw(0, 3) ? draw(0, 20) : draw(9, 300);
  const bool gated = draw(0, 3) == 0;
  const int n = gated ? 2 : static_cast<int>(draw(1, 3));
  const int64_t rows0 = draw(1, 130);
  std::vector<Stored2D> matrices(static_cast<size_t>(n));
  Product p{};
  int64_t outputs = 0;
  for (int i = 0; i < n; ++i) {
    const int64_t rows = gated ? rows0 : draw(1, 130);
    fill(matrices[static_cast<size_t>(i)], format, rows, columns, group, scale);
    p.matrices[i] = matrices[static_cast<size_t>(i)].a;
    outputs += rows;
  }
  if (gated) outputs = rows0;
  Floats x(static_cast<size_t>(tokens * columns)), norm(static_cast<size_t>(columns)),
      residual(static_cast<size_t>(tokens * outputs)), y(residual.size());
  for (float& v : x) v = normal();
  for (float& v : norm) v = 1 + 0.1f * normal();
  for (float& v : residual) v = normal();
  const bool normed = draw(0, 1), added = !gated && draw(0, 1);
  p.x = x.data();
  p.tokens = tokens;
  p.norm = normed ? norm.data() : nullptr;
  p.norm_eps = 1e-5f;
  p.n_matrices = n;
  p.gated = gated;
  p.rounded = draw(0, 1);
  // Each number is moved by up to half of 1/32,767 of the largest in its group.
  const bool rounded = p.rounded && tokens <= 8 && format.biases && 16 % format.bits == 0;
  p.residual = added ? residual.data() : nullptr;
  p.y = y.data();
  kernels.product(p);
  std::vector<double> wanted(y.size()), size(y.size());
  for (int64_t m = 0; m < tokens; ++m) {
    double squares = 0;
    for (int64_t k = 0; k < columns; ++k) squares += double(x[size_t(m * columns + k)]) * x[size_t(m * columns + k)];
    const double inverse = normed ? 1 / std::sqrt(squares / double(columns) + 1e-5) : 1;
    int64_t column = 0;
    std::vector<double> sums, sizes;
    for (int i = 0; i < n; ++i) {
      const auto& s = matrices[size_t(i)];
      for (int64_t r = 0; r < s.a.rows; ++r) {
        double total = 0, total_size = 0, most = 0;
        for (int64_t k = 0; k < columns; ++k) {
          const auto given = [&](int64_t i) {
            return std::abs(double(x[size_t(m * columns + i)]) * (normed ? inverse * norm[size_t(i)] : 1));
          };
          for (int64_t i = k; rounded && k % group == 0 && i < k + group; ++i)
            most = i == k ? given(i) : std::max(most, given(i));
          const double v = s.numbers[size_t(r * columns + k)] * x[size_t(m * columns + k)] *
                           (normed ? inverse * norm[size_t(k)] : 1);
          total += v;
          total_size += rounded ? std::abs(s.numbers[size_t(r * columns + k)]) * most : std::abs(v);
        }
        // Codes and biases are summed apart: what counts is the size of both.
        if (format.biases) total_size *= 8;
        sums.push_back(total);
        sizes.push_back(total_size);
      }
      column += s.a.rows;
    }
    for (int64_t r = 0; r < outputs; ++r) {
      const size_t i = size_t(m * outputs + r);
      if (gated) {
        const double g = sums[size_t(r)], u = sums[size_t(outputs + r)], sg = sizes[size_t(r)],
                     su = sizes[size_t(outputs + r)];
        wanted[i] = g / (1 + std::exp(-g)) * u;
        size[i] = (std::abs(g) + sg) * su + sg * std::abs(u) + std::abs(wanted[i]);
      } else {
        wanted[i] = sums[size_t(r)] + (added ? residual[i] : 0);
        size[i] = sizes[size_t(r)] + (added ? std::abs(residual[i]) : 0);
      }
    }
  }
  char what[200];
  std::snprintf(
      what, sizeof what,
      "product %s group %lld scales %d tokens %lld columns %lld rows %lld matrices %d gated %d norm %d residual %d",
      format.name, (long long)group, int(scale), (long long)tokens, (long long)columns, (long long)rows0, n, gated,
      normed, added);
  if (!close(what, y, wanted, size)) return false;
  bool intact = x.intact() && norm.intact() && residual.intact() && y.intact();
  for (const Stored2D& s : matrices) intact = intact && s.codes.intact() && s.scales.intact() && s.biases.intact();
  if (!intact) return fail(what, "bytes beside a buffer were written");

  std::vector<int32_t> ids(size_t(draw(1, 9)));
  for (int32_t& id : ids) id = int32_t(draw(0, matrices[0].a.rows - 1));
  Floats rows(ids.size() * size_t(columns));
  Lookup l{matrices[0].a, ids.data(), int64_t(ids.size()), rows.data()};
  kernels.lookup(l);
  std::vector<double> exact(rows.size()), exact_size(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    exact[i] = matrices[0].numbers[size_t(ids[i / size_t(columns)]) * size_t(columns) + i % size_t(columns)];
    exact_size[i] = std::abs(exact[i]) + 8;
  }
  if (!rows.intact()) return fail("lookup", "bytes beside the rows were written");
  return close("lookup", rows, exact, exact_size);
}

}  // namespace

int main(int argc, char** argv) {
  std::string isa = "base";
  int seed = 0, rounds = 200, n_threads = 2;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--isa")
      isa = argv[i + 1];
    else if (option == "--seed")
      seed = std::atoi(argv[i + 1]);
    else if (option == "--rounds")
      rounds = std::atoi(argv[i + 1]);
    else if (option == "--threads")
      n_threads = std::atoi(argv[i + 1]);
    else {
      std::printf("unknown option %s\n", argv[i]);
      return 2;
    }
  }
  try {
    use_instruction_set(isa);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  set_threads(n_threads);
  for (int round = 0; round < rounds; ++round) {
    rng.seed(static_cast<unsigned>(seed * 100003 + round));
    if (!test_product(kernels()) || !test_attention(kernels())) {
      std::printf("seed %d, round %d\n", seed, round);
      return 1;
    }
  }
  set_threads(n_threads);
  if (!test_threads(n_threads, 10 * rounds)) return 1;
  std::printf("OK %s, %d rounds\n", isa.c_str(), rounds);
  return 0;
}
