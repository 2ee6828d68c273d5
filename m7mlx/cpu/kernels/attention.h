// Attention to a ring as it lies: keys and values become numbers a few rows at a time, in tiles that
// stay in the cache, and are never expanded in memory.
//
// A softmax over all keys is made of those over parts of them (Milakov and Gimelshein 2018): each
// query keeps its largest score so far, the sum of the powers, and the values' weighted sum.

#pragma once

#include <cmath>

#include "kernels.h"
#include "schemes.h"
#include "threads.h"
#include "vectors.h"

namespace m7 {
namespace {

constexpr int64_t kKeys = 64;     // in a tile
constexpr int64_t kQueries = 32;  // rows of queries that meet a tile together, about
constexpr int64_t kPiece = 512;   // keys that one task attends to, at least, where tasks are few

inline int64_t row_bytes(Stored stored, int64_t n) {
  switch (stored) {
    case Stored::f32:
      return 4 * n;
    case Stored::packed8:
      return n;
    case Stored::packed4:
      return n / 2;
    default:
      return 2 * n;
  }
}

// Where keys or values lie: in the ring, or those of this pass in a buffer of their own.
struct Place {
  Rows rows;
  int64_t row;  // of head_dim numbers, counted from the beginning of `rows`
};

// Rows of a ring as float32: where they lie, or written into a tile.
inline const float* read_rows(const Attention& a, const Place& p, int64_t count, float* tile) {
  const int64_t D = a.head_dim, n = count * D;
  const uint8_t* from = p.rows.codes + p.row * row_bytes(p.rows.stored, D);
  int64_t i = 0;
  switch (p.rows.stored) {
    case Stored::f32:
      return reinterpret_cast<const float*>(from);
    case Stored::f16:
      for (; i + W <= n; i += W) store(tile + i, from_half(load<H>(from + 2 * i)));
      for (; i < n; ++i) tile[i] = half_to_float(load<uint16_t>(from + 2 * i));
      return tile;
    case Stored::bf16:
      for (; i + W <= n; i += W) store(tile + i, from_bfloat(load<H>(from + 2 * i)));
      for (; i < n; ++i) tile[i] = bfloat_to_float(load<uint16_t>(from + 2 * i));
      return tile;
    case Stored::packed8:
    case Stored::packed4:
      break;
  }
  const bool eight = p.rows.stored == Stored::packed8;
  const int64_t groups = D / a.group;
  for (int64_t g = 0; g < count * groups; ++g) {
    const float scale = half_to_float(load<uint16_t>(p.rows.scales + 2 * (p.row * groups + g)));
    const float bias = half_to_float(load<uint16_t>(p.rows.biases + 2 * (p.row * groups + g)));
    float* out = tile + g * a.group;
    if (eight) {
      const uint8_t* codes = from + g * a.group;
      for (i = 0; i < a.group; ++i) out[i] = static_cast<float>(codes[i]) * scale + bias;
    } else {
      const uint8_t* codes = from + g * a.group / 2;
      for (i = 0; i < a.group / 2; ++i) {
        out[2 * i] = static_cast<float>(codes[i] & 15) * scale + bias;
        out[2 * i + 1] = static_cast<float>(codes[i] >> 4) * scale + bias;
      }
    }
  }
  return tile;
}

// Store one row; packed codes as MLX's `quantize` makes them.
inline void write_row(const Attention& a, const Place& p, const float* x) {
  const int64_t D = a.head_dim;
  uint8_t* to = p.rows.codes + p.row * row_bytes(p.rows.stored, D);
  switch (p.rows.stored) {
    case Stored::f32:
      std::memcpy(to, x, static_cast<size_t>(D) * 4);
      return;
    case Stored::f16:
      for (int64_t i = 0; i < D; ++i) store(to + 2 * i, float_to_half(x[i]));
      return;
    case Stored::bf16:
      for (int64_t i = 0; i < D; ++i) store(to + 2 * i, float_to_bfloat(x[i]));
      return;
    case Stored::packed8:
    case Stored::packed4:
      break;
  }
  const bool eight = p.rows.stored == Stored::packed8;
  const float most = eight ? 255 : 15;
  const int64_t groups = D / a.group;
  for (int64_t g = 0; g < groups; ++g) {
    const float* from = x + g * a.group;
    float low = from[0], high = from[0];
    for (int64_t i = 1; i < a.group; ++i) {
      low = from[i] < low ? from[i] : low;
      high = from[i] > high ? from[i] : high;
    }
    // The end that is further from zero is met exactly, and so is zero.
    float scale = (high - low) / most;
    scale = scale > 1e-7f ? scale : 1e-7f;
    const bool from_low = std::fabs(low) > std::fabs(high);
    if (!from_low) scale = -scale;
    const float edge = from_low ? low : high, steps = std::nearbyint(edge / scale);
    if (steps != 0) scale = edge / steps;
    const float bias = steps != 0 ? edge : 0;
    store(p.rows.scales + 2 * (p.row * groups + g), float_to_half(scale));
    store(p.rows.biases + 2 * (p.row * groups + g), float_to_half(bias));
    uint8_t* codes = to + (eight ? g * a.group : g * a.group / 2);
    if (!eight) std::memset(codes, 0, static_cast<size_t>(a.group / 2));
    for (int64_t i = 0; i < a.group; ++i) {
      float code = std::nearbyint((from[i] - bias) / scale);
      code = code < 0 ? 0 : code > most ? most : code;
      if (eight) {
        codes[i] = static_cast<uint8_t>(code);
      } else {
        codes[i / 2] = static_cast<uint8_t>(codes[i / 2] | static_cast<uint8_t>(code) << (i % 2 * 4));
      }
    }
  }
}

// Turn into the orthonormal basis of Hadamard, whose size is a power of two.
inline void hadamard(float* x, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2) {
    for (int64_t i = 0; i < n; i += 2 * half) {
      for (int64_t k = i; k < i + half; ++k) {
        const float a = x[k], b = x[k + half];
        x[k] = a + b;
        x[k + half] = a - b;
      }
    }
  }
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(n));
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

// Rotate one head to its position: the first half of its numbers against the second.
inline void rotate(const float* x, const float* rotation, int64_t D, float scale, float* to) {
  const int64_t half = D / 2;
  const float *cosines = rotation, *sines = rotation + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i] * scale, b = x[i + half] * scale;
    to[i] = a * cosines[i] - b * sines[i];
    to[i + half] = a * sines[i] + b * cosines[i];
  }
}

// scores[row][key] of `rows` queries and `keys` keys; a tile has kKeys keys a row.
inline void score(const float* queries, int64_t rows, const float* tile, int64_t keys, int64_t D, float* scores) {
  for (int64_t k = 0; k < keys; k += W) {
    const float* from = tile + k * D;
    const int64_t n = min(W, keys - k);
    for (int64_t r = 0; r < rows; ++r) {
      const float* q = queries + r * D;
      V total[W] = {};
      if (n == W) {
        for (int64_t i = 0; i + W <= D; i += W) {
          const V x = load<V>(q + i);
#pragma GCC unroll 16
          for (int lane = 0; lane < W; ++lane) total[lane] += x * load<V>(from + lane * D + i);
        }
      } else {
        for (int64_t i = 0; i + W <= D; i += W)
          for (int64_t lane = 0; lane < n; ++lane) total[lane] += load<V>(q + i) * load<V>(from + lane * D + i);
      }
      V result = sums(total);
      for (int64_t i = D / W * W; i < D; ++i)  // head_dim that W does not divide
        for (int64_t lane = 0; lane < n; ++lane) result[lane] += q[i] * from[lane * D + i];
      store(scores + r * kKeys + k, result);
    }
  }
}

// out[row] += Σ over keys of weights[row][key] · tile[key].
inline void weigh(const float* weights, int64_t rows, const float* tile, int64_t keys, int64_t D, float* out) {
  constexpr int kColumns = 4;
  int64_t i = 0;
  for (; i + kColumns * W <= D; i += kColumns * W) {
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
      V total[2][kColumns];
      for (int h = 0; h < 2; ++h)
        for (int c = 0; c < kColumns; ++c) total[h][c] = load<V>(out + (r + h) * D + i + c * W);
      for (int64_t k = 0; k < keys; ++k) {
        const V a = splat(weights[r * kKeys + k]), b = splat(weights[(r + 1) * kKeys + k]);
        for (int c = 0; c < kColumns; ++c) {
          const V v = load<V>(tile + k * D + i + c * W);
          total[0][c] += a * v;
          total[1][c] += b * v;
        }
      }
      for (int h = 0; h < 2; ++h)
        for (int c = 0; c < kColumns; ++c) store(out + (r + h) * D + i + c * W, total[h][c]);
    }
    for (; r < rows; ++r) {
      V total[kColumns];
      for (int c = 0; c < kColumns; ++c) total[c] = load<V>(out + r * D + i + c * W);
      for (int64_t k = 0; k < keys; ++k) {
        const V a = splat(weights[r * kKeys + k]);
        for (int c = 0; c < kColumns; ++c) total[c] += a * load<V>(tile + k * D + i + c * W);
      }
      for (int c = 0; c < kColumns; ++c) store(out + r * D + i + c * W, total[c]);
    }
  }
  for (int64_t r = 0; r < rows && i < D; ++r)
    for (int64_t k = 0; k < keys; ++k)
      for (int64_t d = i; d < D; ++d) out[r * D + d] += weights[r * kKeys + k] * tile[k * D + d];
}

constexpr float kNothing = -__builtin_huge_valf();

// What a row of queries has attended to so far: its largest score, the sum of the powers, and the
// weighted sum of the values, which lies apart.
struct Softmax {
  float largest, total;
};

struct Work {
  const Attention& a;
  const float* queries;       // [batch, n_kv_heads, length, queries of a KV head, head_dim], rotated and scaled
  const float* to_sinks;      // the same queries as they meet the sinks
  Rows new_keys, new_values;  // [batch, n_kv_heads, length, head_dim]; no codes where all lie in the ring
  int64_t shared, tokens, blocks, pieces;  // queries of a KV head; tokens of a block; parts of its keys

  int64_t stride() const { return shared * tokens; }                 // rows of a block
  int64_t part_size() const { return stride() * (a.head_dim + 2); }  // floats of a block's piece
  int64_t first_seen(int64_t b, int64_t position) const {
    return max(a.starts[b], a.window ? position - a.window + 1 : 0);
  }

  // Where the keys (or values) of a position lie, and how many follow it there.
  Place find(bool values, int64_t b, int64_t head, int64_t position, int64_t* run) const {
    const Rows& fresh = values ? new_values : new_keys;
    const int64_t line = b * a.n_kv_heads + head;
    if (fresh.codes && position >= a.offset) {
      *run = min(*run, a.offset + a.length - position);
      return {fresh, line * a.length + position - a.offset};
    }
    const int64_t slot = position % a.capacity;
    *run = min(*run, min(a.slots, a.capacity) - slot);
    if (fresh.codes) *run = min(*run, a.offset - position);
    return {values ? a.values : a.keys, line * a.slots + slot};
  }
};

// A block of queries, and what it has attended to so far.
struct Block {
  int64_t rows, head_dim;
  Softmax* state;  // [rows]
  float* out;      // [rows, head_dim]
};

// Which keys of a tile a query sees: [low, high).
struct Seen {
  int64_t low, high;
};

// Attend to a tile of keys with the queries of a block; `seen(row)` tells which of them each sees.
// The values are asked for once the keys have been met: both may be read into the same memory.
template <class See, class Values>
inline void attend_tile(const Block& block, const float* queries, const float* keys, int64_t count, const See& seen,
                        const Values& values) {
  const int64_t D = block.head_dim;
  float* scores = scratch(2, block.rows * kKeys);
  score(queries, block.rows, keys, count, D, scores);
  for (int64_t r = 0; r < block.rows; ++r) {
    float* s = scores + r * kKeys;
    Softmax& state = block.state[r];
    const auto [low, high] = seen(r);
    for (int64_t i = 0; i < min(low, count); ++i) s[i] = kNothing;
    for (int64_t i = max(0, high); i < kKeys; ++i) s[i] = kNothing;
    if (low >= high) {
      zero(s, kKeys);
      continue;
    }
    V most = load<V>(s);
    for (int64_t i = W; i < kKeys; i += W) most = greater(most, load<V>(s + i));
    float largest = state.largest;
    for (int lane = 0; lane < W; ++lane) largest = most[lane] > largest ? most[lane] : largest;
    V total{};
    for (int64_t i = 0; i < kKeys; i += W) {
      const V x = load<V>(s + i), power = choose(x == kNothing, V{}, exponential(x - largest));
      total += power;
      store(s + i, power);
    }
    if (largest > state.largest) {
      const float less = state.largest == kNothing ? 0 : __builtin_expf(state.largest - largest);
      for (int64_t i = 0; i < D; ++i) block.out[r * D + i] *= less;
      state.total *= less;
      state.largest = largest;
    }
    state.total += sum(total);
  }
  weigh(scores, block.rows, values(), count, D, block.out);
}

// The queries of a block that starts with a token, among all queries.
inline const float* of_block(const Work& w, const float* queries, int64_t line, int64_t token) {
  return queries + (line * w.a.length + token) * w.shared * w.a.head_dim;
}

// Attend to positions [from, to) with a block of queries.
inline void attend_block(const Work& w, const Block& block, int64_t b, int64_t head, int64_t token, int64_t from,
                         int64_t to) {
  const Attention& a = w.a;
  const float* queries = of_block(w, w.queries, b * a.n_kv_heads + head, token);
  float* tile = scratch(1, kKeys * a.head_dim);
  for (int64_t position = from, count; position < to; position += count) {
    count = min(kKeys, to - position);
    const Place keys = w.find(false, b, head, position, &count), values = w.find(true, b, head, position, &count);
    const auto seen = [&](int64_t r) -> Seen {
      const int64_t own = a.offset + token + r / w.shared;
      return {max(0, w.first_seen(b, own) - position), min(count, own + 1 - position)};
    };
    attend_tile(block, queries, read_rows(a, keys, count, tile), count, seen,
                [&] { return read_rows(a, values, count, tile); });
  }
}

// Attend to the sinks that the window has left behind with a block of queries.
inline void attend_sinks(const Work& w, const Block& block, int64_t b, int64_t head, int64_t token) {
  const Attention& a = w.a;
  const int64_t D = a.head_dim, line = b * a.n_kv_heads + head;
  const int64_t left_behind = a.offset - a.starts[b] - a.window + 1;  // by the first token of the pass
  for (int64_t i = 0; i < a.sinks.n; i += kKeys) {
    const int64_t count = min(kKeys, a.sinks.n - i), place = (line * a.sinks.n + i) * D;
    const auto seen = [&](int64_t r) -> Seen { return {0, min(count, left_behind + token + r / w.shared - i)}; };
    attend_tile(block, of_block(w, w.to_sinks, line, token), a.sinks.keys + place, count, seen,
                [&] { return a.sinks.values + place; });
  }
}

// Rotate the queries, keys and values of one token; store what is to be stored.
inline void take_in(const Work& w, float* queries, float* to_sinks, int64_t b, int64_t token) {
  const Attention& a = w.a;
  const int64_t D = a.head_dim, position = a.offset + token;
  const float* heads = a.heads + (b * a.length + token) * (a.n_heads + 2 * a.n_kv_heads) * D;
  const int64_t place = (a.rotations == 1 ? 0 : b) * a.length + token;
  const float* rotation = a.rotation + place * D;
  const float scale = (a.factors ? a.factors[place] : 1.0f) / __builtin_sqrtf(static_cast<float>(D));
  for (int64_t h = 0; h < a.n_heads; ++h) {
    const int64_t at = (((b * a.n_kv_heads + h / w.shared) * a.length + token) * w.shared + h % w.shared) * D;
    rotate(heads + h * D, rotation, D, scale, queries + at);
    if (a.turned) hadamard(queries + at, D);
    if (!a.sinks.n) continue;
    rotate(heads + h * D, a.sinks.rotation + place * D, D, scale, to_sinks + at);
    if (a.turned) hadamard(to_sinks + at, D);
  }
  float* rotated = scratch(1, D);
  for (int64_t h = 0; h < a.n_kv_heads; ++h) {
    int64_t run = 1;
    rotate(heads + (a.n_heads + h) * D, rotation, D, 1, rotated);
    if (a.turned) hadamard(rotated, D);
    write_row(a, w.find(false, b, h, position, &run), rotated);
    write_row(a, w.find(true, b, h, position, &run), heads + (a.n_heads + a.n_kv_heads + h) * D);
  }
}

// Bytes of the scales, or of the biases, of a row of the ring.
inline int64_t scale_bytes(const Attention& a) { return a.keys.scales ? a.head_dim / a.group * 2 : 0; }

// Make the result of the pieces: [line][block][piece] of rows of numbers, with a `Softmax` for each
// row behind them.
inline void join_pieces(const Work& w, const float* parts) {
  const Attention& a = w.a;
  const int64_t D = a.head_dim, rows = w.stride(), size = w.part_size();
  for (int64_t line = 0; line < a.batch * a.n_kv_heads; ++line) {
    const int64_t b = line / a.n_kv_heads, head = line % a.n_kv_heads;
    for (int64_t token = 0; token < a.length; ++token) {
      const int64_t block = token / w.tokens;
      const float* first = parts + (line * w.blocks + block) * w.pieces * size;
      for (int64_t q = 0; q < w.shared; ++q) {
        const int64_t r = (token - block * w.tokens) * w.shared + q;
        const auto state = [&](int64_t p) {
          return reinterpret_cast<const Softmax*>(first + p * size + rows * D)[r];
        };
        float* out = a.out + ((b * a.length + token) * a.n_heads + head * w.shared + q) * D;
        float largest = kNothing, total = 0;
        for (int64_t p = 0; p < w.pieces; ++p) largest = state(p).largest > largest ? state(p).largest : largest;
        for (int64_t p = 0; p < w.pieces; ++p) {
          const float share = state(p).total == 0 ? 0 : __builtin_expf(state(p).largest - largest);
          total += share * state(p).total;
          const float* from = first + p * size + r * D;
          for (int64_t i = 0; i < D; ++i) out[i] = (p ? out[i] : 0) + share * from[i];
        }
        const float inverse = total > 0 ? 1 / total : 0;
        for (int64_t i = 0; i < D; ++i) out[i] *= inverse;
      }
    }
  }
}

// Copy the last of the new keys and values, as many as the ring holds, into it.
inline void keep_new(const Work& w) {
  const Attention& a = w.a;
  const int64_t bytes = row_bytes(a.keys.stored, a.head_dim), of_scales = scale_bytes(a);
  const Rows* const pairs[2][2] = {{&w.new_keys, &a.keys}, {&w.new_values, &a.values}};
  for (int64_t line = 0; line < a.batch * a.n_kv_heads; ++line) {
    for (int64_t token = max(0, a.length - a.capacity); token < a.length; ++token) {
      const int64_t from = line * a.length + token, to = line * a.slots + (a.offset + token) % a.capacity;
      for (const auto& [fresh, ring] : pairs) {
        std::memcpy(ring->codes + to * bytes, fresh->codes + from * bytes, static_cast<size_t>(bytes));
        if (!of_scales) continue;
        std::memcpy(ring->scales + to * of_scales, fresh->scales + from * of_scales, static_cast<size_t>(of_scales));
        std::memcpy(ring->biases + to * of_scales, fresh->biases + from * of_scales, static_cast<size_t>(of_scales));
      }
    }
  }
}

void attend(const Attention& a) {
  if (a.batch * a.length == 0) return;
  const int64_t D = a.head_dim, lines = a.batch * a.n_kv_heads, end = a.offset + a.length;
  Work w{a, nullptr, nullptr, {}, {}, a.n_heads / a.n_kv_heads, 0, 0, 1};
  const int64_t n_queries = a.batch * a.length * a.n_heads * D;
  float* queries = scratch(3, n_queries * (a.sinks.n ? 2 : 1));
  float* to_sinks = queries + n_queries;
  w.queries = queries;
  w.to_sinks = to_sinks;
  // The new keys may be written first where they take no slot that an earlier token still sees.
  const bool in_place = end <= a.capacity || (a.window && a.length <= a.capacity - a.window + 1);
  if (!in_place) {
    const int64_t n = lines * a.length;
    const int64_t codes = up(n * row_bytes(a.keys.stored, D), 64), scales = up(n * scale_bytes(a), 64);
    uint8_t* memory = reinterpret_cast<uint8_t*>(scratch(5, (codes + 2 * scales) / 2));
    Rows* const fresh[] = {&w.new_keys, &w.new_values};
    for (Rows* rows : fresh) {
      *rows = {a.keys.stored, memory, memory + codes, memory + codes + scales};
      memory += codes + 2 * scales;
    }
  }
  const int64_t together = max(1, 16 / max(1, a.batch));
  const int64_t tasks = a.batch * ((a.length + together - 1) / together);
  const auto take = [&](int64_t task) {
    const int64_t b = task % a.batch;
    for (int64_t t = task / a.batch * together; t < min(a.length, (task / a.batch + 1) * together); ++t)
      take_in(w, queries, to_sinks, b, t);
  };
  if (a.batch * a.length <= 4) {
    for (int64_t task = 0; task < tasks; ++task) take(task);
  } else {
    parallel(tasks, take);
  }

  w.tokens = max(1, min(a.length, kQueries / w.shared));
  w.blocks = (a.length + w.tokens - 1) / w.tokens;
  int64_t seen = end;
  if (a.window) seen = min(seen, a.window + w.tokens - 1);
  if (lines * w.blocks < 2 * threads()) w.pieces = max(1, min(2 * threads() / (lines * w.blocks), seen / kPiece));
  const int64_t rows = w.stride(), size = w.part_size();
  float* parts = scratch(4, lines * w.blocks * w.pieces * size);
  parallel(lines * w.blocks * w.pieces, [&](int64_t task) {
    const int64_t piece = task % w.pieces, block = task / w.pieces % w.blocks, line = task / w.pieces / w.blocks;
    const int64_t b = line / a.n_kv_heads, token = block * w.tokens;
    const int64_t last = a.offset + min(a.length, token + w.tokens), first = w.first_seen(b, a.offset + token);
    const int64_t step = (last - first + w.pieces - 1) / w.pieces;
    float* part = parts + task * size;
    const Block own{min(w.tokens, a.length - token) * w.shared, D, reinterpret_cast<Softmax*>(part + rows * D), part};
    for (int64_t r = 0; r < own.rows; ++r) own.state[r] = {kNothing, 0};
    zero(own.out, own.rows * D);
    if (piece == 0) attend_sinks(w, own, b, line % a.n_kv_heads, token);
    attend_block(w, own, b, line % a.n_kv_heads, token, min(last, first + piece * step),
                 min(last, first + (piece + 1) * step));
  });
  join_pieces(w, parts);
  if (!in_place) keep_new(w);
}

}  // namespace
}  // namespace m7
