// Attention to a ring, compared with a softmax over all keys in double precision.
//
// What a ring holds was rounded when it was stored. A second ring that never forgets takes the same
// tokens: what it holds is compared with the exact keys and values, up to that rounding, and is then
// what the reference attends to. The first ring must hold the same bytes where it holds anything.

#pragma once

#include <string>
#include <vector>

#include "../../m7mlx/cpu/kernels/kernels.h"
#include "../../m7mlx/cpu/kernels/threads.h"
#include "support.h"

namespace {

constexpr m7::Stored kStored[] = {m7::Stored::f32, m7::Stored::f16, m7::Stored::bf16, m7::Stored::packed8,
                                  m7::Stored::packed4};

// The shapes of a test, and how keys and values are stored.
struct Shape {
  m7::Stored stored;
  bool turned;
  int64_t batch, n_heads, n_kv_heads, head_dim, group, window, capacity, n_sinks;

  int64_t shared() const { return n_heads / n_kv_heads; }
  bool packed() const { return stored == m7::Stored::packed8 || stored == m7::Stored::packed4; }
  size_t row_bytes() const {
    const auto n = static_cast<size_t>(head_dim);
    return stored == m7::Stored::f32       ? 4 * n
           : stored == m7::Stored::packed8 ? n
           : stored == m7::Stored::packed4 ? n / 2
                                           : 2 * n;
  }
  size_t groups() const { return packed() ? static_cast<size_t>(head_dim / group) : 0; }
};

// One half of a ring. What was never written is NaN, or codes with such scales.
class Half {
 public:
  Half(const Shape& shape, int64_t slots) : shape_(shape), slots_(slots) {
    const auto rows = static_cast<size_t>(shape.batch * shape.n_kv_heads * slots);
    codes_.assign(rows * shape.row_bytes(), 0xff);
    scales_.assign(rows * shape.groups() * 2, 0xff);
    biases_.assign(rows * shape.groups() * 2, 0xff);
  }
  m7::Rows rows() {
    if (!shape_.packed()) return {shape_.stored, codes_.data(), nullptr, nullptr};
    return {shape_.stored, codes_.data(), scales_.data(), biases_.data()};
  }
  bool intact() const { return codes_.intact() && scales_.intact() && biases_.intact(); }
  size_t row(int64_t b, int64_t head, int64_t slot) const {
    return static_cast<size_t>((b * shape_.n_kv_heads + head) * slots_ + slot);
  }
  bool same(size_t row, const Half& other, size_t other_row) const {
    const size_t bytes = shape_.row_bytes(), of_scales = 2 * shape_.groups();
    const auto equal = [&](const Bytes& a, const Bytes& b, size_t n) {
      return n == 0 || !std::memcmp(a.data() + row * n, b.data() + other_row * n, n);
    };
    return equal(codes_, other.codes_, bytes) && equal(scales_, other.scales_, of_scales) &&
           equal(biases_, other.biases_, of_scales);
  }
  // The numbers of a row, and how far each may be from what was stored.
  void read(size_t row, std::vector<double>& numbers, std::vector<double>& steps) const {
    const uint8_t* codes = codes_.data() + row * shape_.row_bytes();
    const auto n = static_cast<size_t>(shape_.head_dim);
    for (size_t i = 0; i < n; ++i) {
      uint16_t h;
      float x;
      switch (shape_.stored) {
        case m7::Stored::f32:
          std::memcpy(&x, codes + 4 * i, 4);
          numbers[i] = x;
          steps[i] = 0;
          break;
        case m7::Stored::f16:
          std::memcpy(&h, codes + 2 * i, 2);
          numbers[i] = half_value(h);
          steps[i] = std::ldexp(std::abs(numbers[i]), -11) + std::ldexp(1.0, -25);
          break;
        case m7::Stored::bf16:
          std::memcpy(&h, codes + 2 * i, 2);
          numbers[i] = bfloat_value(h);
          steps[i] = std::ldexp(std::abs(numbers[i]), -8);
          break;
        default: {
          const size_t g = row * shape_.groups() + i / static_cast<size_t>(shape_.group);
          std::memcpy(&h, scales_.data() + 2 * g, 2);
          const double scale = half_value(h);
          std::memcpy(&h, biases_.data() + 2 * g, 2);
          const double bias = half_value(h);
          const int code = shape_.stored == m7::Stored::packed8 ? codes[i] : codes[i / 2] >> (i % 2 * 4) & 15;
          numbers[i] = code * scale + bias;
          // A code is off by half a step, by a whole one at an end; scale and bias were rounded too.
          steps[i] = 1.01 * std::abs(scale) + std::ldexp(std::abs(bias) + code * std::abs(scale), -10);
        }
      }
    }
  }

 private:
  Shape shape_;
  int64_t slots_;
  Bytes codes_, scales_, biases_;
};

inline void turn(std::vector<double>& x) {
  const size_t n = x.size();
  for (size_t half = 1; half < n; half *= 2) {
    for (size_t i = 0; i < n; ++i) {
      if (i & half) continue;
      const double a = x[i], b = x[i + half];
      x[i] = a + b;
      x[i + half] = a - b;
    }
  }
  for (double& v : x) v /= std::sqrt(static_cast<double>(n));
}

// One head at its position.
inline std::vector<double> rotated(const float* x, const float* rotation, const Shape& shape) {
  const auto half = static_cast<size_t>(shape.head_dim / 2);
  std::vector<double> to(2 * half);
  for (size_t i = 0; i < half; ++i) {
    const double a = x[i], b = x[half + i], c = rotation[i], s = rotation[half + i];
    to[i] = a * c - b * s;
    to[half + i] = a * s + b * c;
  }
  if (shape.turned) turn(to);
  return to;
}

class AttentionTest {
 public:
  AttentionTest(const m7::Kernels& kernels, const Shape& shape, int64_t first, int64_t total,
                std::vector<int64_t> starts)
      : kernels_(kernels),
        shape_(shape),
        position_(first),
        starts_(std::move(starts)),
        slots_(shape.window ? shape.capacity : total),
        total_(total),
        keys_(shape, slots_),
        values_(shape, slots_),
        all_keys_(shape, total),
        all_values_(shape, total),
        sink_keys_(static_cast<size_t>(shape.batch * shape.n_kv_heads * shape.n_sinks * shape.head_dim)),
        sink_values_(sink_keys_.size()),
        numbers_(static_cast<size_t>(shape.head_dim)),
        steps_(numbers_.size()) {
    for (float& x : sink_keys_) x = normal();
    for (float& x : sink_values_) x = normal();
  }

  // Feed some tokens, and look at the results of `looked_at` of them.
  bool feed(int64_t length, int64_t looked_at, float size) {
    const int64_t D = shape_.head_dim, wide = (shape_.n_heads + 2 * shape_.n_kv_heads) * D;
    const int64_t rotations = draw(0, 1) ? shape_.batch : 1;
    Floats heads(size_t(shape_.batch * length * wide)), rotation(size_t(rotations * length * D)),
        to_sinks(rotation.size()), factors(size_t(rotations * length)),
        out(size_t(shape_.batch * length * shape_.n_heads * D)), forgets_nothing(out.size());
    for (float& x : heads) x = size * normal();
    for (Floats* turns : {&rotation, &to_sinks}) {
      for (size_t i = 0; i < turns->size(); ++i) {
        if (i / size_t(D / 2) % 2) continue;  // a cosine; its sine lies half a row further on
        const double angle = 3 * normal();
        (*turns)[i] = static_cast<float>(std::cos(angle));
        (*turns)[i + size_t(D / 2)] = static_cast<float>(std::sin(angle));
      }
    }
    for (float& x : factors) x = 1 + std::abs(normal());
    m7::Attention a{};
    a.heads = heads.data();
    a.rotation = rotation.data();
    a.rotations = rotations;
    a.factors = draw(0, 1) ? factors.data() : nullptr;
    a.batch = shape_.batch;
    a.length = length;
    a.n_heads = shape_.n_heads;
    a.n_kv_heads = shape_.n_kv_heads;
    a.head_dim = D;
    a.offset = position_;
    a.starts = starts_.data();
    a.group = shape_.packed() ? shape_.group : 1;
    a.turned = shape_.turned;
    m7::Attention all = a;
    a.keys = keys_.rows();
    a.values = values_.rows();
    a.slots = slots_;
    a.capacity = shape_.window ? shape_.capacity : int64_t{1} << 40;
    a.window = shape_.window;
    a.out = out.data();
    if (shape_.n_sinks) a.sinks = {shape_.n_sinks, to_sinks.data(), sink_keys_.data(), sink_values_.data()};
    kernels_.attend(a);
    all.keys = all_keys_.rows();
    all.values = all_values_.rows();
    all.slots = total_;
    all.capacity = total_;
    all.window = 0;
    all.out = forgets_nothing.data();
    kernels_.attend(all);

    what_ = "attention stored " + std::to_string(int(shape_.stored)) + " turned " + std::to_string(shape_.turned) +
            " batch " + std::to_string(shape_.batch) + " heads " + std::to_string(shape_.n_heads) + "/" +
            std::to_string(shape_.n_kv_heads) + " of " + std::to_string(D) + " window " +
            std::to_string(shape_.window) + " sinks " + std::to_string(shape_.n_sinks) + " capacity " +
            std::to_string(shape_.capacity) + " position " + std::to_string(position_) + " length " +
            std::to_string(length);
    if (!(keys_.intact() && values_.intact() && all_keys_.intact() && all_values_.intact() && heads.intact() &&
          rotation.intact() && to_sinks.intact() && sink_keys_.intact() && sink_values_.intact() &&
          factors.intact() && out.intact() && forgets_nothing.intact()))
      return fail(what_.c_str(), "bytes beside a buffer were written");
    if (!is_stored(a)) return false;
    position_ += length;
    for (int64_t i = 0; i < looked_at; ++i) {
      const int64_t token = i == 0   ? length - 1
                            : i == 1 ? 0
                                     : draw(0, length - 1),
                    b = draw(0, shape_.batch - 1), head = draw(0, shape_.n_heads - 1);
      if (!is_right(a, b, token, head, out) || !is_right(all, b, token, head, forgets_nothing)) return false;
    }
    return true;
  }

 private:
  // Whether both rings hold the new tokens, and the first one all that it must.
  bool is_stored(const m7::Attention& a) {
    const int64_t end = a.offset + a.length, D = a.head_dim;
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t head = 0; head < a.n_kv_heads; ++head) {
        for (int64_t token = 0; token < a.length; ++token) {
          const float* x = a.heads + ((b * a.length + token) * (a.n_heads + 2 * a.n_kv_heads) + a.n_heads + head) * D;
          const float* rotation = a.rotation + ((a.rotations == 1 ? 0 : b) * a.length + token) * D;
          const float* v = x + a.n_kv_heads * D;
          const size_t row = all_keys_.row(b, head, a.offset + token);
          if (!near(all_keys_, row, rotated(x, rotation, shape_)) ||
              !near(all_values_, row, std::vector<double>(v, v + D)))
            return fail(what_.c_str(), "what is stored is further from the exact numbers than by rounding");
        }
        for (int64_t p = std::max<int64_t>(first_, end - std::min(slots_, a.capacity)); p < end; ++p) {
          const size_t row = keys_.row(b, head, p % a.capacity), other = all_keys_.row(b, head, p);
          if (!keys_.same(row, all_keys_, other) || !values_.same(row, all_values_, other))
            return fail(what_.c_str(), ("position " + std::to_string(p) + " is not what the ring holds").c_str());
        }
      }
    }
    return true;
  }

  bool near(const Half& half, size_t row, const std::vector<double>& exact) {
    half.read(row, numbers_, steps_);
    double largest = 0;
    for (const double x : exact) largest = std::max(largest, std::abs(x));
    for (size_t i = 0; i < exact.size(); ++i) {
      if (!(std::abs(numbers_[i] - exact[i]) <= steps_[i] + 2e-6 * largest)) return false;
    }
    return true;
  }

  // Whether a token's head is what a softmax over all that it sees makes of the stored numbers.
  bool is_right(const m7::Attention& a, int64_t b, int64_t token, int64_t head, const Floats& out) {
    const int64_t D = a.head_dim, own = a.offset + token, kv_head = head / shape_.shared();
    const int64_t low = std::max(starts_[size_t(b)], a.window ? own - a.window + 1 : 0);
    const float* x = a.heads + ((b * a.length + token) * (a.n_heads + 2 * a.n_kv_heads) + head) * D;
    const int64_t place = (a.rotations == 1 ? 0 : b) * a.length + token;
    const auto turned_by = [&](const float* rotation) {
      std::vector<double> query = rotated(x, rotation + place * D, shape_);
      for (double& number : query) number *= (a.factors ? a.factors[place] : 1) / std::sqrt(double(D));
      return query;
    };
    const std::vector<double> query = turned_by(a.rotation);
    std::vector<double> scores, wanted(query.size(), 0), size(query.size(), 0);
    std::vector<std::vector<double>> values;
    double largest = -INFINITY, terms = 0, total = 0;
    const auto see = [&](const std::vector<double>& q, const std::vector<double>& key,
                         const std::vector<double>& value) {
      double score = 0, sum = 0;
      for (size_t i = 0; i < q.size(); ++i) {
        score += q[i] * key[i];
        sum += std::abs(q[i] * key[i]);
      }
      scores.push_back(score);
      values.push_back(value);
      largest = std::max(largest, score);
      terms = std::max(terms, sum);
    };
    const int64_t left_behind = std::min(a.sinks.n, own - starts_[size_t(b)] - a.window + 1);
    const float* const sinks[] = {a.sinks.keys + (b * a.n_kv_heads + kv_head) * a.sinks.n * D,
                                  a.sinks.values + (b * a.n_kv_heads + kv_head) * a.sinks.n * D};
    for (int64_t i = 0; i < left_behind; ++i) {
      const std::vector<double> key(sinks[0] + i * D, sinks[0] + (i + 1) * D),
          value(sinks[1] + i * D, sinks[1] + (i + 1) * D);
      see(turned_by(a.sinks.rotation), key, value);
    }
    for (int64_t p = low; p <= own; ++p) {
      std::vector<double> key(query.size()), value(query.size());
      all_keys_.read(all_keys_.row(b, kv_head, p), key, steps_);
      all_values_.read(all_values_.row(b, kv_head, p), value, steps_);
      see(query, key, value);
    }
    for (const double score : scores) total += std::exp(score - largest);
    for (size_t k = 0; k < scores.size(); ++k) {
      const double weight = std::exp(scores[k] - largest) / total;
      for (size_t i = 0; i < query.size(); ++i) {
        wanted[i] += weight * values[k][i];
        size[i] += weight * std::abs(values[k][i]);
      }
    }
    Floats got(query.size());
    for (size_t i = 0; i < query.size(); ++i) {
      got[i] = out[size_t(((b * a.length + token) * a.n_heads + head) * D) + i];
      size[i] *= 2 + terms;  // a score that is off by 1e-6 of its terms moves the weights by as much
    }
    return close((what_ + " token " + std::to_string(token) + " row " + std::to_string(b) + " head " +
                  std::to_string(head) + " seen from " + std::to_string(low))
                     .c_str(),
                 got, wanted, size);
  }

  const m7::Kernels& kernels_;
  Shape shape_;
  int64_t position_, first_ = position_;
  std::vector<int64_t> starts_;
  int64_t slots_, total_;
  Half keys_, values_, all_keys_, all_values_;
  Floats sink_keys_, sink_values_;
  std::vector<double> numbers_, steps_;
  std::string what_;
};

inline bool test_attention(const m7::Kernels& kernels) {
  const int64_t dims[] = {16, 20, 32, 36, 64, 80, 96, 128}, packed_dims[] = {32, 64, 96, 128};
  Shape s{};
  s.stored = kStored[draw(0, 4)];
  s.head_dim = s.packed() ? packed_dims[draw(0, 3)] : dims[draw(0, 7)];
  do s.group = 32 << draw(0, 2);
  while (s.packed() && s.head_dim % s.group);
  s.turned = s.packed() && s.head_dim != 96 && draw(0, 3);
  s.batch = draw(0, 1) ? 1 : draw(2, 4);
  s.n_kv_heads = draw(1, 3);
  s.n_heads = s.n_kv_heads * draw(1, 8);
  const bool is_long = draw(0, 7) == 0;  // enough keys that several threads share one query's
  if (is_long)
    s.batch = 1, s.n_kv_heads = 1, s.n_heads = draw(1, 3),
    s.head_dim = s.packed()   ? 32
                 : draw(0, 1) ? 16
                              : 20,
    s.group = 32;
  s.window = draw(0, 2) ? is_long ? draw(1000, 1400) : draw(1, 90) : 0;
  s.capacity = s.window + draw(0, 1) * draw(0, 70);
  s.n_sinks = s.window && draw(0, 1) ? draw(1, draw(0, 3) ? 6 : 90) : 0;
  // A ring that has turned many times, of rows that began late.
  const int64_t first = !is_long && draw(0, 2) == 0 ? draw(1, 300) : 0;
  std::vector<int64_t> starts;
  for (int64_t b = 0; b < s.batch; ++b) starts.push_back(first + (draw(0, 1) ? 0 : draw(0, 40)));
  std::vector<int64_t> lengths;
  if (is_long)
    lengths = {draw(900, 1500), 1, draw(2, 9), draw(1, 200), 1};
  else
    for (int64_t i = draw(2, 9); i > 0; --i) lengths.push_back(draw(0, 2) ? draw(1, 3) : draw(4, 70));
  int64_t total = first;
  for (const int64_t length : lengths) total += length;
  const float sizes[] = {1, 1, 3, 30};
  const float size = sizes[draw(0, 3)];  // of 30, one key gets nearly all the weight
  AttentionTest test(kernels, s, first, total, starts);
  for (const int64_t length : lengths) {
    if (!test.feed(length, std::min<int64_t>(4, 1 + length), size)) return false;
  }
  return true;
}

}  // namespace
