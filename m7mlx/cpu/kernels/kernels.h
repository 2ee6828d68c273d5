// What the kernels take: plain structures, so that they know nothing of MLX and can be tested alone.
//
// kernels.cpp is compiled once for each instruction set, in a namespace of its own; `kernels_for`
// chooses the set at run time. All arithmetic is in float32, but for `Product::rounded`.

#pragma once

#include <cstdint>

namespace m7 {

// How the numbers of a matrix are stored. In `affineN`, `mxfp…` and `nvfp4` a number is a code of a
// group that shares a scale, as MLX packs them.
enum class Scheme { f32, f16, bf16, affine2, affine3, affine4, affine5, affine6, affine8, mxfp4, mxfp8, nvfp4 };

// The type of scales and biases.
enum class Scale { f32, f16, bf16, e8m0, e4m3 };

// A matrix of `rows` outputs by `columns` inputs, row by row, as it lies in its file.
struct Matrix {
  Scheme scheme;
  Scale scale;
  const uint8_t* codes;
  const uint8_t* scales;  // null where nothing is packed
  const uint8_t* biases;  // null but for the affine schemes
  int64_t rows, columns;
  int64_t group;      // numbers that share a scale
  int64_t row_bytes;  // of `codes`
};

constexpr int kMostMatrices = 3;

// y = norm(x) · [matrices]ᵀ + residual, or silu(x · gateᵀ) · (x · upᵀ) of two matrices.
struct Product {
  const float* x;  // [tokens, columns]
  int64_t tokens;
  const float* norm;  // [columns], the weight of an RMSNorm on x; null for none
  float norm_eps;
  Matrix matrices[kMostMatrices];
  int n_matrices;
  bool gated;             // the matrices are gate and up of a SwiGLU
  bool rounded;           // few tokens may meet packed matrices as 16-bit integers, scaled group by group
  const float* residual;  // as y; null for none
  float* y;               // [tokens, the rows of all matrices], or [tokens, rows] where gated
};

// Rows of a matrix, as numbers.
struct Lookup {
  Matrix matrix;
  const int32_t* ids;
  int64_t tokens;
  float* y;  // [tokens, columns]
};

// How keys and values are stored.
enum class Stored { f32, f16, bf16, packed8, packed4 };

// One half of a ring, keys or values: [batch, kv_heads, slots, head_dim], row by row.
struct Rows {
  Stored stored;
  uint8_t* codes;
  uint8_t* scales;  // float16, as the biases; null where nothing is packed
  uint8_t* biases;
};

// The first keys and values of every row, seen as well once the window has left them behind.
//
// Where a row's own position is p, sink i is seen as soon as p − i is as large as the window.
struct Sinks {
  int64_t n;              // 0 for none
  const float* rotation;  // as that of `Attention`: where queries stand for the sinks
  const float* keys;      // [batch, n_kv_heads, n, head_dim], rotated; turned where the ring's are
  const float* values;    // as `keys`, but never turned
};

// Grouped-query attention of new tokens to a ring, which takes their keys and values in.
//
// Positions are those of the batch's clock; position p lies in slot p % capacity.
struct Attention {
  const float* heads;     // [batch, length, (n_heads + 2 n_kv_heads) · head_dim]: not rotated yet
  const float* rotation;  // [rotations, length, head_dim]: cosines, then sines
  int64_t rotations;      // batch, or 1 for all rows
  const float* factors;   // [rotations, length]: what queries are multiplied by besides; null for nothing
  int64_t batch, length, n_heads, n_kv_heads, head_dim;
  Rows keys, values;
  int64_t slots;          // that are allocated
  int64_t capacity;       // of the ring
  int64_t window;         // keys that a token sees, itself included; 0 for all
  int64_t offset;         // of the first new token
  const int64_t* starts;  // [batch]: the position at which each row began
  int64_t group;          // numbers that share a scale, of packed rows
  bool turned;            // packed keys are stored after a Hadamard transform
  Sinks sinks;
  float* out;  // [batch, length, n_heads · head_dim]
};

struct Kernels {
  const char* name;
  void (*product)(const Product&);
  void (*lookup)(const Lookup&);
  void (*attend)(const Attention&);
};

namespace base {
extern const Kernels kernels;
}
#ifdef M7_HAS_AVX2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef M7_HAS_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace m7
