// Products with matrices as they lie: packed codes become numbers in registers, or in tiles that
// stay in the cache, and never in memory.
//
// Few tokens (up to kFew) are met row by row: every code is read once and meets all tokens, as a
// number or, where the caller allows it, as an integer that meets integers of 16 bits. Many
// tokens are laid out in panels, side by side, and meet tiles of unpacked rows (BLIS, Van Zee and
// van de Geijn 2015).

#pragma once

#include <utility>

#include "kernels.h"
#include "schemes.h"
#include "threads.h"
#include "vectors.h"

namespace m7 {
namespace {

constexpr int kFew = 8;
constexpr int64_t kManyTokens = 256;  // in panels at a time
constexpr int kWide = kPanel * W;     // tokens in a panel
constexpr int64_t kDepth = 256;       // numbers of a row in a tile, about
constexpr int64_t kTileHeight = 48 / kTileRows * kTileRows;

// 1 / the root of the mean square, for RMSNorm.
inline float inverse_rms(const float* x, int64_t n, float eps) {
  V total{};
  int64_t i = 0;
  for (; i + W <= n; i += W) total += load<V>(x + i) * load<V>(x + i);
  float squares = sum(total);
  for (; i < n; ++i) squares += x[i] * x[i];
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps);
}

inline void normalised(const Product& p, int64_t token, float* to) {
  const float* x = p.x + token * p.matrices[0].columns;
  const int64_t n = p.matrices[0].columns;
  const float scale = inverse_rms(x, n, p.norm_eps);
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] * scale * p.norm[i];
}

// The scales of a row, a vector for every block of words.
template <class S>
struct RowScales {
  int64_t groups;
  int shift;  // words of a group, as a power of two
  I pattern;  // which of the scales from a block's first on belongs to each lane

  explicit RowScales(const Matrix& a) : groups(0), shift(0), pattern{} {
    if constexpr (S::kGroups) {
      groups = a.columns / a.group;
      shift = __builtin_ctzll(static_cast<uint64_t>(a.group / S::kCodes));
      for (int i = 0; i < W; ++i) pattern[i] = i >> shift;
    }
  }
  // Write the scales (or biases) of some rows as float32, and a vector of finite numbers behind them.
  void read(const Matrix& a, const uint8_t* from, int64_t row, int64_t rows, float* to) const {
    scales_to_floats(from + row * groups * scale_bytes(a.scale), a.scale, rows * groups, (a.rows - row) * groups, to,
                     W);
  }
  bool alike() const { return !S::kGroups || 1 << shift >= W; }  // a block has one scale, or none
  template <bool kAlike>
  inline V block(const float* scales, int64_t t) const {
    if constexpr (kAlike) return splat(scales[t * W >> shift]);
    return spread(scales + (t * W >> shift), pattern);
  }
};

// Whether the words of block t can be read where they lie, up to the end of their row.
template <class S>
inline bool is_whole(int64_t words, int64_t t) {
  constexpr int64_t beyond = S::kBytes == 3 ? 2 : 0;  // words read past the last
  return (t + 1) * W + beyond <= words;
}
template <class S>
inline Words words_of(const uint8_t* row, int64_t words, int64_t t) {
  if (is_whole<S>(words, t)) return S::words(row + t * W * S::kBytes);
  uint8_t rest[W * S::kBytes + 16] = {};
  const int64_t left = words - t * W;
  std::memcpy(rest, row + t * W * S::kBytes, static_cast<size_t>(min(left, W) * S::kBytes));
  return S::words(rest);
}

template <class S, class F, int... j>
[[gnu::always_inline]] inline void each_code(const Words& w, F&& f, std::integer_sequence<int, j...>) {
  (f(std::integral_constant<int, j>{}, S::template code<j>(w)), ...);
}

template <class S, int... j>
[[gnu::always_inline]] inline void each_pair(const Words& w, Pairs* to, std::integer_sequence<int, j...>) {
  ((to[j] = S::template pair<j>(w)), ...);
}

// --- few tokens ---------------------------------------------------------------------------------

// Write what W words' codes meet in the order of the codes: code j's W numbers at to + j · stride.
template <class S>
inline void order_block(const float* block, float* to, int64_t stride) {
  constexpr int C = S::kCodes;
  if constexpr (C > W) {
    for (int i = 0; i < W; ++i)
      for (int j = 0; j < C; ++j) to[j * stride + i] = block[i * C + j];
  } else {
    V v[C];
    for (int j = 0; j < C; ++j) v[j] = load<V>(block + j * W);
    swap<C / 2, C>(v);
    I words;  // lanes now count words in steps of W / C
    for (int i = 0; i < W; ++i) words[i] = i % (W / C) * C + i / (W / C);
    for (int j = 0; j < C; ++j) store(to + j * stride, C < W && C > 1 ? __builtin_shuffle(v[j], words) : v[j]);
  }
}

// Few tokens, as the rows of a matrix meet them. Groups are counted up to whole vectors.
struct Few {
  int64_t tokens, groups;
  float* ordered;  // their numbers in the order of the codes: [block][code][token][lane]
  float* steps;    // where they are rounded, what 1 stands for: [token][group]
  float* sums;     // of their numbers: [token][group]
};

inline float largest(const float* x, int64_t n) {
  V most{};
  for (int64_t i = 0; i < n; i += W) {
    const V v = load<V>(x + i);
    most = greater(most, greater(v, -v));
  }
  float found = 0;
  for (int i = 0; i < W; ++i) found = most[i] > found ? most[i] : found;
  return found;
}

// Round each group's numbers to integers of 16 bits, and return what 1 stands for in `steps`. A
// number that is not finite makes its group's sum so.
inline void round_groups(const float* x, int64_t n, int64_t group, float* to, float* steps) {
  for (int64_t g = 0; g < n / group; ++g) {
    const float most = largest(x + g * group, group);
    const bool counts = most > 1e-30f;
    const float each = counts ? 32767.0f / most : 0.0f;
    steps[g] = counts ? most / 32767.0f : 0.0f;
    for (int64_t i = g * group; i < (g + 1) * group; i += W)
      store(to + i, (load<V>(x + i) * each + 12582912.f) - 12582912.f);  // 1.5 · 2^23 leaves no bits for a fraction
  }
}

// Lay out the tokens x [tokens, columns] in the order of the codes, as integers where `kRounded`: then
// codes j and j + kCodes / 2 meet the two in a lane.
template <class S, bool kRounded>
void order_few(const Matrix& a, const float* x, int64_t blocks, const Few& few) {
  const int64_t K = a.columns, tokens = few.tokens;
  constexpr int C = S::kCodes;
  float* rounded = kRounded ? scratch(7, K) : nullptr;
  for (int64_t m = 0; m < tokens; ++m) {
    const float* from = x + m * K;
    float* steps = few.steps + m * few.groups;
    if constexpr (kRounded) {
      zero(steps, few.groups);
      round_groups(from, K, a.group, rounded, steps);
      from = rounded;
    }
    for (int64_t t = 0; t < blocks; ++t) {
      float rest[W * C], turned[W * C];
      const float* block = from + t * W * C;
      if ((t + 1) * W * C > K) {
        zero(rest, W * C);
        std::memcpy(rest, block, static_cast<size_t>(K - t * W * C) * 4);
        block = rest;
      }
      if constexpr (kRounded) {
        order_block<S>(block, turned, W);
        for (int j = 0; j < C / 2; ++j) {
          const I lower = __builtin_convertvector(load<V>(turned + j * W), I),
                  upper = __builtin_convertvector(load<V>(turned + (j + C / 2) * W), I);
          store(few.ordered + ((t * (C / 2) + j) * tokens + m) * W, (lower & 0xffff) | upper << 16);
        }
      } else {
        float* to = few.ordered + (t * C * tokens + m) * W;
        order_block<S>(block, to, tokens * W);
        for (int j = 1; j < C; ++j)
          if (S::factor(j) != 1.0f) store(to + j * tokens * W, load<V>(to + j * tokens * W) * S::factor(j));
      }
    }
    if constexpr (S::kBiases) {
      float* sums_of = few.sums + m * few.groups;
      zero(sums_of, few.groups);
      for (int64_t g = 0; g < K / a.group; ++g) {
        V total{};
        for (int64_t i = 0; i < a.group; i += W) total += load<V>(from + g * a.group + i);
        sums_of[g] = kRounded ? sum(total) * steps[g] : sum(total);
      }
    }
  }
}

// How far ahead of what is read memory is asked for, at least; the processor itself stops at each page.
constexpr int64_t kAhead = 2048;

// Add what blocks [t0, t1) of one row (or two, `kRows`) give to the sums of their tokens.
template <class S, int kTokens, int kRows, bool kAlike, bool kRounded>
[[gnu::always_inline]] inline void add_blocks(const RowScales<S>& row_scales, const uint8_t* codes, int64_t row_bytes,
                                              int64_t words, int64_t t0, int64_t t1, const float* scales,
                                              int64_t scale_stride, const Few& few, V (*sums)[kTokens]) {
  using Codes = std::make_integer_sequence<int, S::kCodes>;
  // As many sums are kept apart as hide a multiplication's latency, and fit into registers.
  constexpr int kParts = kTokens <= 4 ? 2 : 1;
  V total[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int m = 0; m < kTokens; ++m) total[r][m] = sums[r][m];
  const auto block = [&](int64_t t, const Words* w) [[gnu::always_inline]] {
    const float* x = few.ordered + t * S::kCodes / (kRounded ? 2 : 1) * kTokens * W;
    if constexpr (kRounded) {
      for (int r = 0; r < kRows; ++r) {
        Pairs code[S::kCodes / 2];
        each_pair<S>(w[r], code, std::make_integer_sequence<int, S::kCodes / 2>{});
        const V s = row_scales.template block<kAlike>(scales + r * scale_stride, t);
        for (int m = 0; m < kTokens; ++m) {
          I found{};
          for (int j = 0; j < S::kCodes / 2; ++j) found += times(code[j], load<Pairs>(x + (j * kTokens + m) * W));
          const V number = __builtin_convertvector(found, V);
          total[r][m] +=
              number * (kTokens == 1 ? s : s * row_scales.template block<kAlike>(few.steps + m * few.groups, t));
        }
      }
    } else if constexpr (!S::kGroups) {
      for (int r = 0; r < kRows; ++r)
        for (int m = 0; m < kTokens; ++m) total[r][m] += S::template code<0>(w[r]) * load<V>(x + m * W);
    } else {
      for (int r = 0; r < kRows; ++r) {  // the scale is multiplied once for all codes
        V part[kParts][kTokens] = {};
        each_code<S>(
            w[r],
            [&](auto j, V v) [[gnu::always_inline]] {
              for (int m = 0; m < kTokens; ++m) part[j % kParts][m] += v * load<V>(x + (j * kTokens + m) * W);
            },
            Codes{});
        const V s = row_scales.template block<kAlike>(scales + r * scale_stride, t);
        for (int m = 0; m < kTokens; ++m)
          total[r][m] += (kParts == 2 ? part[0][m] + part[kParts - 1][m] : part[0][m]) * s;
      }
    }
  };
  const int64_t ahead = max(kAhead, kRows * row_bytes);  // the rows that are met next
  int64_t t = t0;
  Words w[kRows];
  for (; t < t1 && is_whole<S>(words, t); ++t) {
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* p = codes + r * row_bytes + t * W * S::kBytes;
      __builtin_prefetch(p + ahead);
      w[r] = S::words(p);
    }
    block(t, w);
  }
  for (; t < t1; ++t) {
    for (int r = 0; r < kRows; ++r) w[r] = words_of<S>(codes + r * row_bytes, words, t);
    block(t, w);
  }
  for (int r = 0; r < kRows; ++r)
    for (int m = 0; m < kTokens; ++m) sums[r][m] = total[r][m];
}

template <class S, int kTokens, bool kAlike, bool kRounded>
void few_rows(const Matrix& a, const RowScales<S>& row_scales, int64_t first, int64_t last, const Few& few,
              float* out, int64_t out_stride) {
  constexpr int kRows = kTokens == 1 || (kTokens <= 4 && !S::kGroups) ? 2 : 1;
  const int64_t words = a.columns / S::kCodes, blocks = (words + W - 1) / W, groups = row_scales.groups;
  // The part of the tokens that all rows of a batch meet before the next: half of the first cache.
  const int64_t span = max(1, 4096 / (kTokens * S::kCodes * W));
  float* scales = scratch(0, 2 * (W * groups + 2 * W));
  float* biases = scales + W * groups + 2 * W;
  for (int64_t some = first; some < last; some += W) {
    const int64_t rows = min(W, last - some);
    V sums_of[W][kTokens] = {};
    // What was stored last is read back late: the scales of all rows are turned into float32 first.
    if constexpr (S::kGroups) row_scales.read(a, a.scales, some, rows, scales);
    if constexpr (S::kBiases) row_scales.read(a, a.biases, some, rows, biases);
    if constexpr (kRounded && kTokens == 1) {  // both are met at once
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t g = 0; g < groups; ++g) scales[r * groups + g] *= few.steps[g];
    }
    for (int64_t t = 0; t < blocks; t += span) {
      const int64_t t1 = min(blocks, t + span);
      int64_t r = 0;
      for (; r + kRows <= rows; r += kRows)
        add_blocks<S, kTokens, kRows, kAlike, kRounded>(row_scales, a.codes + (some + r) * a.row_bytes, a.row_bytes,
                                                        words, t, t1, scales + r * groups, groups, few, sums_of + r);
      for (; r < rows; ++r)
        add_blocks<S, kTokens, 1, kAlike, kRounded>(row_scales, a.codes + (some + r) * a.row_bytes, a.row_bytes,
                                                    words, t, t1, scales + r * groups, groups, few, sums_of + r);
    }
    if constexpr (S::kBiases) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t g = 0; g < groups; g += W)
          for (int m = 0; m < kTokens; ++m)
            sums_of[r][m] += load<V>(biases + r * groups + g) * load<V>(few.sums + m * few.groups + g);
    }
    for (int m = 0; m < kTokens; ++m) {
      V of_rows[W];
      for (int r = 0; r < W; ++r) of_rows[r] = sums_of[r][m];
      const V result = sums(of_rows);
      std::memcpy(out + m * out_stride + some - first, &result, static_cast<size_t>(rows) * 4);
    }
  }
}

// Call f with the number of tokens, 1 … kFew, as a type.
template <int n = 1, class F>
inline void with_tokens(int64_t tokens, const F& f) {
  if constexpr (n < kFew) {
    if (tokens != n) return with_tokens<n + 1>(tokens, f);
  }
  f(std::integral_constant<int, n>{});
}

template <class S, bool kRounded>
void few_rows(const Matrix& a, int64_t first, int64_t last, const Few& few, float* out, int64_t out_stride) {
  const RowScales<S> row_scales(a);
  with_tokens(few.tokens, [&](auto n) {
    if (row_scales.alike())
      few_rows<S, n, true, kRounded>(a, row_scales, first, last, few, out, out_stride);
    else if constexpr (S::kGroups)
      few_rows<S, n, false, kRounded>(a, row_scales, first, last, few, out, out_stride);
  });
}

// --- many tokens --------------------------------------------------------------------------------

// Panels of tokens: [panel][number, in the order of the codes][token]. The numbers of one tile.
template <class S>
void order_many(const float* x, int64_t tokens, int64_t K, int64_t panel, int64_t blocks, float* to) {
  const float* rows[kWide];
  for (int i = 0; i < kWide; ++i) rows[i] = panel * kWide + i < tokens ? x + (panel * kWide + i) * K : nullptr;
  for (int64_t t = 0; t < blocks; ++t) {
    for (int j = 0; j < S::kCodes; ++j) {
      for (int lane = 0; lane < W; ++lane, to += kWide) {
        const int64_t k = (t * W + lane) * S::kCodes + j;
        if (k >= K) {
          for (int i = 0; i < kWide; ++i) to[i] = 0;
        } else {
          for (int i = 0; i < kWide; ++i) to[i] = rows[i] ? rows[i][k] : 0;
        }
      }
    }
  }
}

// Unpack blocks [t0, t1) of a row into a tile.
template <class S>
inline void unpack(const Matrix& a, const RowScales<S>& row_scales, int64_t row, int64_t t0, int64_t t1,
                   const float* scales, const float* biases, float* to) {
  using Codes = std::make_integer_sequence<int, S::kCodes>;
  const int64_t words = a.columns / S::kCodes;
  const uint8_t* codes = a.codes + row * a.row_bytes;
  for (int64_t t = t0; t < t1; ++t, to += W * S::kCodes) {
    const Words w = words_of<S>(codes, words, t);
    if constexpr (!S::kGroups) {
      store(to, S::template code<0>(w));
    } else {
      const V scale = row_scales.template block<false>(scales, t);
      const V bias = S::kBiases ? row_scales.template block<false>(biases, t) : V{};
      each_code<S>(
          w, [&](auto j, V v) [[gnu::always_inline]] { store(to + j * W, v * (scale * S::factor(j)) + bias); },
          Codes{});
    }
  }
}

// Add the products of kTileRows rows of a tile with a panel to c: [row][token of the panel].
inline void meet(const float* tile, int64_t tile_stride, const float* panel, int64_t depth, float* c,
                 int64_t c_stride) {
  V total[kTileRows][kPanel];
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kPanel; ++v) total[r][v] = load<V>(c + r * c_stride + v * W);
  for (int64_t k = 0; k < depth; ++k) {
    V x[kPanel];
    for (int v = 0; v < kPanel; ++v) x[v] = load<V>(panel + k * kWide + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const V w = splat(tile[r * tile_stride + k]);
      for (int v = 0; v < kPanel; ++v) total[r][v] += w * x[v];
    }
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kPanel; ++v) store(c + r * c_stride + v * W, total[r][v]);
}

// c[row − first][token] for rows [first, last) of one matrix and all panels.
template <class S>
void many_rows(const Matrix& a, int64_t first, int64_t last, const float* panels, int64_t n_panels, float* c) {
  const int64_t words = a.columns / S::kCodes, blocks = (words + W - 1) / W, depth = blocks * W * S::kCodes;
  const int64_t step = max(1, kDepth / (W * S::kCodes)), deep = step * W * S::kCodes;
  const int64_t c_stride = n_panels * kWide, height = up(last - first, kTileRows);
  const RowScales<S> row_scales(a);
  const int64_t groups = row_scales.groups, n_scales = (last - first) * groups + 2 * W;
  zero(c, height * c_stride);
  float* tile = scratch(1, height * deep);
  float* scales = scratch(2, 2 * n_scales);
  float* biases = scales + n_scales;
  if constexpr (S::kGroups) row_scales.read(a, a.scales, first, last - first, scales);
  if constexpr (S::kBiases) row_scales.read(a, a.biases, first, last - first, biases);
  zero(tile + (last - first) * deep, (height - (last - first)) * deep);
  for (int64_t t0 = 0; t0 < blocks; t0 += step) {
    const int64_t t1 = min(blocks, t0 + step);
    for (int64_t row = first; row < last; ++row)
      unpack<S>(a, row_scales, row, t0, t1, scales + (row - first) * groups, biases + (row - first) * groups,
                tile + (row - first) * deep);
    for (int64_t panel = 0; panel < n_panels; ++panel) {
      const float* x = panels + (panel * depth + t0 * W * S::kCodes) * kWide;
      for (int64_t r = 0; r < height; r += kTileRows)
        meet(tile + r * deep, deep, x, (t1 - t0) * W * S::kCodes, c + r * c_stride + panel * kWide, c_stride);
    }
  }
}

// --- both ---------------------------------------------------------------------------------------

// gate · sigmoid(gate) · up, in place of gate.
inline void gate_with(float* gate, const float* up_, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const V g = load<V>(gate + i);
    store(gate + i, g * load<V>(up_ + i) / (1.0f + exponential(-g)));
  }
  if (i < n) {
    float g[W] = {}, u[W] = {};
    std::memcpy(g, gate + i, static_cast<size_t>(n - i) * 4);
    std::memcpy(u, up_ + i, static_cast<size_t>(n - i) * 4);
    gate_with(g, u, W);
    std::memcpy(gate + i, g, static_cast<size_t>(n - i) * 4);
  }
}

// A task's rows: of one matrix, or of gate and up alike.
struct Share {
  int matrix;
  int64_t first, last, column;  // column: of y
};

inline Share share_of(const Product& p, int64_t task, int64_t height) {
  int64_t column = 0;
  for (int i = 0;; ++i) {
    const int64_t rows = p.matrices[i].rows, tasks = (rows + height - 1) / height;
    if (task < tasks || p.gated) return {i, task * height, min(rows, (task + 1) * height), column + task * height};
    task -= tasks;
    column += rows;
  }
}
inline int64_t shares(const Product& p, int64_t height) {
  int64_t tasks = 0;
  for (int i = 0; i < (p.gated ? 1 : p.n_matrices); ++i) tasks += (p.matrices[i].rows + height - 1) / height;
  return tasks;
}
inline int64_t outputs(const Product& p) {
  int64_t rows = p.matrices[0].rows;
  for (int i = 1; i < p.n_matrices && !p.gated; ++i) rows += p.matrices[i].rows;
  return rows;
}

// Write some rows' results into y [tokens, n] from a column on, where the residual is added.
inline void write_out(const float* from, int64_t token_stride, int64_t row_stride, int64_t tokens, int64_t rows,
                      int64_t n, int64_t column, const float* residual, float* y) {
  for (int64_t m = 0; m < tokens; ++m) {
    float* to = y + m * n + column;
    const float* add = residual ? residual + m * n + column : nullptr;
    for (int64_t i = 0; i < rows; ++i) to[i] = from[m * token_stride + i * row_stride] + (add ? add[i] : 0.0f);
  }
}

// All matrices share a scheme here: they are met by the tokens in the same order.
template <class S, bool kRounded>
void product_few(const Product& p, const float* x, int64_t tokens, float* y, const float* residual) {
  const Matrix& a = p.matrices[0];
  const int64_t words = a.columns / S::kCodes, blocks = (words + W - 1) / W;
  const int64_t groups = S::kGroups ? up(a.columns / a.group, W) : 0;
  const int64_t size = blocks * S::kCodes * W * tokens;
  float* room = scratch(3, size + 2 * tokens * groups + W);
  const Few few = {tokens, groups, room, room + size, room + size + tokens * groups};
  order_few<S, kRounded>(a, x, blocks, few);
  const int64_t n = outputs(p);
  const int64_t height = clamp(n / (threads() * 4), 16, 512);
  parallel(shares(p, height), [&](int64_t task) {
    const Share s = share_of(p, task, height);
    const int64_t rows = s.last - s.first;
    float* out = scratch(4, 2 * tokens * rows);
    few_rows<S, kRounded>(p.matrices[s.matrix], s.first, s.last, few, out, rows);
    if (p.gated) {
      float* more = out + tokens * rows;
      few_rows<S, kRounded>(p.matrices[1], s.first, s.last, few, more, rows);
      gate_with(out, more, tokens * rows);
    }
    write_out(out, rows, 1, tokens, rows, n, s.column, residual, y);
  });
}

template <class S>
void product_many(const Product& p, const float* x, int64_t tokens, float* y, const float* residual) {
  const Matrix& a = p.matrices[0];
  const int64_t words = a.columns / S::kCodes, blocks = (words + W - 1) / W, depth = blocks * W * S::kCodes;
  const int64_t n_panels = (tokens + kWide - 1) / kWide, n = outputs(p);
  float* panels = scratch(3, n_panels * depth * kWide);
  parallel(n_panels, [&](int64_t panel) {
    order_many<S>(x, tokens, a.columns, panel, blocks, panels + panel * depth * kWide);
  });
  parallel(shares(p, kTileHeight), [&](int64_t task) {
    const Share s = share_of(p, task, kTileHeight);
    const int64_t rows = s.last - s.first, height = up(rows, kTileRows), stride = n_panels * kWide;
    float* c = scratch(4, 2 * height * stride);
    many_rows<S>(p.matrices[s.matrix], s.first, s.last, panels, n_panels, c);
    if (p.gated) {
      float* more = c + height * stride;
      many_rows<S>(p.matrices[1], s.first, s.last, panels, n_panels, more);
      gate_with(c, more, rows * stride);
    }
    write_out(c, 1, stride, tokens, rows, n, s.column, residual, y);
  });
}

inline bool alike(const Product& p) {
  for (int i = 1; i < p.n_matrices; ++i)
    if (p.matrices[i].scheme != p.matrices[0].scheme || p.matrices[i].group != p.matrices[0].group) return false;
  return true;
}

// A product whose matrices share a scheme, of tokens that are normalised.
void product_alike(const Product& p) {
  const int64_t K = p.matrices[0].columns, n = outputs(p);
  with_scheme(p.matrices[0].scheme, [&](auto scheme) {
    using S = decltype(scheme);
    if (p.tokens <= kFew) {
      if constexpr (S::kPairs) {
        if (p.rounded) return product_few<S, true>(p, p.x, p.tokens, p.y, p.residual);
      }
      return product_few<S, false>(p, p.x, p.tokens, p.y, p.residual);
    }
    for (int64_t m = 0; m < p.tokens; m += kManyTokens)
      product_many<S>(p, p.x + m * K, min(kManyTokens, p.tokens - m), p.y + m * n,
                      p.residual ? p.residual + m * n : nullptr);
  });
}

void product(const Product& given) {
  if (given.tokens == 0) return;
  Product p = given;
  if (p.norm) {
    const int64_t K = p.matrices[0].columns;
    float* to = scratch(5, p.tokens * K);
    if (p.tokens <= kFew) {
      for (int64_t m = 0; m < p.tokens; ++m) normalised(given, m, to + m * K);
    } else {
      parallel(p.tokens, [&](int64_t m) { normalised(given, m, to + m * K); });
    }
    p.x = to;
  }
  if (alike(p)) return product_alike(p);
  // Mixed recipes: one after the other. Gate and up were compared by the caller.
  Product one = p;
  one.n_matrices = 1;
  one.residual = nullptr;
  int64_t column = 0;
  for (int k = 0; k < p.n_matrices; ++k) {
    const int64_t rows = p.matrices[k].rows;
    one.matrices[0] = p.matrices[k];
    one.y = scratch(6, p.tokens * rows);
    product_alike(one);
    write_out(one.y, rows, 1, p.tokens, rows, outputs(p), column, p.residual, p.y);
    column += rows;
  }
}

void lookup(const Lookup& l) {
  const Matrix& a = l.matrix;
  with_scheme(a.scheme, [&](auto scheme) {
    using S = decltype(scheme);
    const int64_t words = a.columns / S::kCodes, blocks = (words + W - 1) / W;
    const RowScales<S> row_scales(a);
    const int64_t groups = row_scales.groups;
    float* scales = scratch(0, 2 * (groups + 2 * W));
    float* biases = scales + groups + 2 * W;
    float* ordered = scratch(1, blocks * W * S::kCodes);
    for (int64_t m = 0; m < l.tokens; ++m) {
      const int64_t row = l.ids[m];
      if (row < 0 || row >= a.rows) {  // no token of this vocabulary: never what lies beside it
        zero(l.y + m * a.columns, a.columns);
        continue;
      }
      if constexpr (S::kGroups) row_scales.read(a, a.scales, row, 1, scales);
      if constexpr (S::kBiases) row_scales.read(a, a.biases, row, 1, biases);
      unpack<S>(a, row_scales, row, 0, blocks, scales, biases, ordered);
      float* y = l.y + m * a.columns;
      for (int64_t k = 0; k < a.columns; ++k) {
        const int64_t word = k / S::kCodes, j = k % S::kCodes;
        y[k] = ordered[word / W * W * S::kCodes + j * W + word % W];
      }
    }
  });
}

}  // namespace
}  // namespace m7
