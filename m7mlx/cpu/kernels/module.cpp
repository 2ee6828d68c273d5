// The Python module m7mlx.cpu._native: the kernels as primitives of MLX's graph.

#include <fcntl.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <system_error>

#include "isa.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"
#include "mlx/utils.h"
#include "threads.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace m7 {
namespace {

mx::Stream cpu() { return mx::to_stream({}, mx::Device::cpu); }

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

// An array as the kernels take it: evaluated, row by row.
mx::array laid_out(mx::array a) {
  a.eval();
  if (!a.flags().row_contiguous) {
    a = mx::contiguous(a, false, cpu());
    a.eval();
  }
  return a;
}

// A weight as it lies in its file, and what it means.
class Weight {
 public:
  Weight(mx::array codes, std::optional<mx::array> scales, std::optional<mx::array> biases, int group, int bits,
         const std::string& mode)
      : arrays_{laid_out(std::move(codes))} {
    const mx::array& c = arrays_[0];
    if (c.ndim() != 2) refuse("a weight has rows and columns");
    matrix_.rows = c.shape(0);
    if (!scales) {
      matrix_.scheme = plain(c.dtype());
      matrix_.scale = Scale::f32;
      matrix_.columns = c.shape(1);
      matrix_.group = 1;
      matrix_.row_bytes = matrix_.columns * static_cast<int64_t>(c.itemsize());
    } else {
      arrays_.push_back(laid_out(std::move(*scales)));
      if (biases) arrays_.push_back(laid_out(std::move(*biases)));
      packed(group, bits, mode, biases.has_value());
    }
  }

  const std::vector<mx::array>& arrays() const { return arrays_; }
  int64_t rows() const { return matrix_.rows; }
  int64_t columns() const { return matrix_.columns; }
  bool alike(const Weight& other) const {
    return matrix_.scheme == other.matrix_.scheme && matrix_.group == other.matrix_.group &&
           matrix_.scale == other.matrix_.scale;
  }
  // The matrix of a primitive's inputs, which begin with this weight's arrays at `at`.
  Matrix matrix(const std::vector<mx::array>& inputs, size_t at) const {
    Matrix m = matrix_;
    m.codes = inputs[at].data<uint8_t>();
    m.scales = arrays_.size() > 1 ? inputs[at + 1].data<uint8_t>() : nullptr;
    m.biases = arrays_.size() > 2 ? inputs[at + 2].data<uint8_t>() : nullptr;
    return m;
  }

 private:
  static Scheme plain(mx::Dtype type) {
    if (type == mx::float32) return Scheme::f32;
    if (type == mx::float16) return Scheme::f16;
    if (type == mx::bfloat16) return Scheme::bf16;
    refuse("a weight that is not packed is float32, float16 or bfloat16");
  }

  void packed(int group, int bits, const std::string& mode, bool has_biases) {
    const mx::array &c = arrays_[0], &s = arrays_[1];
    const bool affine = mode == "affine";
    if (c.dtype() != mx::uint32 || affine != has_biases)
      refuse("packed codes are uint32, and only affine ones have biases");
    if (affine) {
      const Scheme schemes[] = {Scheme::affine2, Scheme::affine3, Scheme::affine4, Scheme::affine5,
                                Scheme::affine6, Scheme::affine8, Scheme::affine8};
      if (bits < 2 || bits > 8 || bits == 7) refuse("affine codes have 2, 3, 4, 5, 6 or 8 bits");
      if (group != 32 && group != 64 && group != 128) refuse("groups have 32, 64 or 128 numbers");
      matrix_.scheme = schemes[bits == 8 ? 5 : bits - 2];
      matrix_.scale = s.dtype() == mx::float32 ? Scale::f32 : s.dtype() == mx::float16 ? Scale::f16 : Scale::bf16;
      if (s.dtype() != mx::float32 && s.dtype() != mx::float16 && s.dtype() != mx::bfloat16)
        refuse("scales are float32, float16 or bfloat16");
      if (arrays_[2].dtype() != s.dtype() || arrays_[2].shape() != s.shape()) refuse("biases are like scales");
    } else {
      if (mode == "nvfp4" ? group != 16 : group != 32) refuse("groups of this mode have another size");
      if (mode != "mxfp4" && mode != "mxfp8" && mode != "nvfp4") refuse("this mode is not known");
      if (s.dtype() != mx::uint8 || bits != (mode == "mxfp8" ? 8 : 4)) refuse("this mode has other scales or bits");
      matrix_.scheme = mode == "mxfp4" ? Scheme::mxfp4 : mode == "mxfp8" ? Scheme::mxfp8 : Scheme::nvfp4;
      matrix_.scale = mode == "nvfp4" ? Scale::e4m3 : Scale::e8m0;
    }
    matrix_.group = group;
    matrix_.row_bytes = static_cast<int64_t>(c.shape(1)) * 4;
    matrix_.columns = matrix_.row_bytes * 8 / bits;
    if (s.ndim() != 2 || s.shape(0) != matrix_.rows || static_cast<int64_t>(s.shape(1)) * group != matrix_.columns)
      refuse("scales do not fit the codes");
  }

  std::vector<mx::array> arrays_;
  Matrix matrix_{};
};

// A node of the graph whose work is a function: called when the graph is evaluated, on the thread
// that evaluates it, with the inputs at hand.
class Node : public mx::Primitive {
 public:
  explicit Node(mx::Stream stream) : Primitive(stream) {}
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("m7mlx's kernels run on the CPU");
  }

 protected:
  template <class T>
  T* make(mx::array& out) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    return out.data<T>();
  }
  template <class F>
  void later(F&& f) {
    mx::cpu::get_command_encoder(stream()).dispatch(std::forward<F>(f));
  }
};

class ProductNode : public Node {
 public:
  ProductNode(mx::Stream stream, std::vector<std::shared_ptr<Weight>> weights, bool normed, float eps, bool added,
              bool gated, bool rounded)
      : Node(stream),
        weights_(std::move(weights)),
        normed_(normed),
        added_(added),
        gated_(gated),
        rounded_(rounded),
        eps_(eps) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    Product p{};
    p.x = inputs[0].data<float>();
    p.tokens = static_cast<int64_t>(inputs[0].size()) / weights_[0]->columns();
    size_t at = 1;
    if (normed_) p.norm = inputs[at++].data<float>();
    if (added_) p.residual = inputs[at++].data<float>();
    for (const auto& weight : weights_) {
      p.matrices[p.n_matrices++] = weight->matrix(inputs, at);
      at += weight->arrays().size();
    }
    p.norm_eps = eps_;
    p.gated = gated_;
    p.rounded = rounded_;
    p.y = make<float>(outputs[0]);
    later([p] { kernels().product(p); });
  }
  const char* name() const override { return "m7::Product"; }

 private:
  std::vector<std::shared_ptr<Weight>> weights_;
  bool normed_, added_, gated_, rounded_;
  float eps_;
};

class LookupNode : public Node {
 public:
  LookupNode(mx::Stream stream, std::shared_ptr<Weight> weight) : Node(stream), weight_(std::move(weight)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    Lookup l{weight_->matrix(inputs, 1), inputs[0].data<int32_t>(), static_cast<int64_t>(inputs[0].size()),
             make<float>(outputs[0])};
    later([l] { kernels().lookup(l); });
  }
  const char* name() const override { return "m7::Lookup"; }

 private:
  std::shared_ptr<Weight> weight_;
};

// Where a pass stands in the ring, and how it sees it.
struct Layout {
  int64_t n_kv_heads, capacity, window, offset, group;
  std::vector<int64_t> starts;
  bool turned, has_factors, has_sinks;
};

class AttentionNode : public Node {
 public:
  AttentionNode(mx::Stream stream, Layout layout) : Node(stream), layout_(std::move(layout)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    // heads, rotation, what was written before, the queries' factors if there are any, three arrays of
    // the sinks if there are any, and the buffers: keys first, one array each or three.
    const size_t sinks = layout_.has_factors ? 4 : 3, at = sinks + (layout_.has_sinks ? 3 : 0),
                 half = (inputs.size() - at) / 2;
    const mx::array &heads = inputs[0], &rotation = inputs[1], &first = inputs[at];
    Attention a{};
    a.heads = heads.data<float>();
    a.rotation = rotation.data<float>();
    a.rotations = rotation.shape(0);
    a.factors = layout_.has_factors ? inputs[3].data<float>() : nullptr;
    a.batch = heads.shape(0);
    a.length = heads.shape(1);
    a.head_dim = rotation.shape(2);
    a.n_kv_heads = layout_.n_kv_heads;
    a.n_heads = heads.shape(2) / a.head_dim - 2 * a.n_kv_heads;
    a.keys = rows(inputs, at, half, a.head_dim);
    a.values = rows(inputs, at + half, half, a.head_dim);
    a.slots = first.shape(2);
    a.capacity = layout_.capacity;
    a.window = layout_.window;
    a.offset = layout_.offset;
    a.group = layout_.group;
    a.turned = layout_.turned;
    if (layout_.has_sinks)
      a.sinks = {inputs[sinks + 1].shape(2), inputs[sinks].data<float>(), inputs[sinks + 1].data<float>(),
                 inputs[sinks + 2].data<float>()};
    a.out = make<float>(outputs[0]);
    float* written = make<float>(outputs[1]);
    later([a, written, starts = layout_.starts]() mutable {
      a.starts = starts.data();
      kernels().attend(a);
      *written = 1;
    });
  }
  const char* name() const override { return "m7::Attention"; }

 private:
  static Rows rows(const std::vector<mx::array>& inputs, size_t at, size_t n, int64_t head_dim) {
    auto data = [&](size_t i) { return const_cast<uint8_t*>(inputs[i].data<uint8_t>()); };
    const mx::Dtype type = inputs[at].dtype();
    if (n == 1)
      return {type == mx::float32   ? Stored::f32
              : type == mx::float16 ? Stored::f16
                                    : Stored::bf16,
              data(at), nullptr, nullptr};
    const int64_t bits = inputs[at].shape(3) * 32 / head_dim;
    return {bits == 8 ? Stored::packed8 : Stored::packed4, data(at), data(at + 1), data(at + 2)};
  }

  Layout layout_;
};

// A file in memory: its pages come when they are read, and go when others need them.
class Mapping {
 public:
  explicit Mapping(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status{};
    const bool opened = file >= 0 && fstat(file, &status) == 0;
    size_ = opened ? static_cast<size_t>(status.st_size) : 0;
    // Private and writable: whoever writes to an array of it changes a page of its own.
    void* begin =
        opened ? mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0) : MAP_FAILED;
    const int error = errno;
    if (file >= 0) close(file);
    if (begin == MAP_FAILED) throw std::system_error(error, std::generic_category(), path);
    // Where the system can: what is read from the disk lies in pages of 2 MB, a fifth faster to stream.
    madvise(begin, size_, MADV_HUGEPAGE);
    begin_ = static_cast<char*>(begin);
  }
  Mapping(const Mapping&) = delete;
  ~Mapping() { munmap(begin_, size_); }
  char* at(size_t offset) const { return begin_ + offset; }
  size_t size() const { return size_; }

 private:
  char* begin_;
  size_t size_;
};

// Where MLX's buffers keep their data, counted from where they say they begin.
std::ptrdiff_t data_offset() {
  static const std::ptrdiff_t offset = [] {
    mx::allocator::Buffer buffer = mx::allocator::allocator().malloc(64);
    const std::ptrdiff_t found = static_cast<char*>(buffer.raw_ptr()) - static_cast<char*>(buffer.ptr());
    mx::allocator::allocator().free(buffer);
    return found;
  }();
  return offset;
}

std::vector<mx::array> map_file(const std::string& path,
                                const std::vector<std::tuple<size_t, std::vector<int>, mx::Dtype>>& tensors) {
  auto mapping = std::make_shared<Mapping>(path);
  std::vector<mx::array> arrays;
  for (const auto& [offset, dims, type] : tensors) {
    size_t bytes = mx::size_of(type);
    for (int n : dims) bytes *= static_cast<size_t>(n);
    if (offset > mapping->size() || bytes > mapping->size() - offset)
      refuse("a tensor lies beyond the end of " + path);
    char* data = mapping->at(offset);
    mx::Shape shape(dims.begin(), dims.end());
    // MLX pads no headers, so numbers may begin anywhere: the kernels read them all the same, and so
    // does MLX, on the processors that there are kernels for.
    mx::allocator::Data mapped(mx::allocator::Buffer(data - data_offset()), [mapping](mx::allocator::Buffer) {});
    arrays.emplace_back(std::move(mapped), std::move(shape), type);
  }
  return arrays;
}

mx::array as_rows(const mx::array& x, mx::Stream stream) { return mx::contiguous(x, false, stream); }

mx::array product(const mx::array& x, const std::vector<std::shared_ptr<Weight>>& weights,
                  const std::optional<mx::array>& norm, float eps, const std::optional<mx::array>& residual,
                  bool gated, bool rounded) {
  if (weights.empty() || weights.size() > kMostMatrices || (gated && (weights.size() != 2 || residual)))
    refuse("a product takes one to three weights, a gated one takes two");
  const int64_t columns = weights[0]->columns();
  int64_t rows = 0;
  for (const auto& w : weights) {
    if (w->columns() != columns) refuse("these weights take inputs of different sizes");
    rows += w->rows();
  }
  if (gated) {
    if (weights[0]->rows() != weights[1]->rows() || !weights[0]->alike(*weights[1])) refuse("gate and up differ");
    rows /= 2;
  }
  if (x.ndim() == 0 || x.shape(-1) != columns || x.dtype() != mx::float32)
    refuse("this product takes float32 […, " + std::to_string(columns) + "]");
  mx::Shape shape = x.shape();
  shape.back() = static_cast<int>(rows);
  mx::Stream stream = cpu();
  std::vector<mx::array> inputs = {as_rows(x, stream)};
  if (norm) {
    if (norm->dtype() != mx::float32 || static_cast<int64_t>(norm->size()) != columns)
      refuse("the norm's weight does not fit");
    inputs.push_back(as_rows(*norm, stream));
  }
  if (residual) {
    if (residual->dtype() != mx::float32 || residual->shape() != shape) refuse("what is added has another shape");
    inputs.push_back(as_rows(*residual, stream));
  }
  for (const auto& w : weights) inputs.insert(inputs.end(), w->arrays().begin(), w->arrays().end());
  auto node =
      std::make_shared<ProductNode>(stream, weights, norm.has_value(), eps, residual.has_value(), gated, rounded);
  return mx::array(std::move(shape), mx::float32, std::move(node), std::move(inputs));
}

mx::array lookup(const mx::array& ids, const std::shared_ptr<Weight>& weight) {
  mx::Stream stream = cpu();
  mx::Shape shape = ids.shape();
  shape.push_back(static_cast<int>(weight->columns()));
  std::vector<mx::array> inputs = {as_rows(mx::astype(ids, mx::int32, stream), stream)};
  inputs.insert(inputs.end(), weight->arrays().begin(), weight->arrays().end());
  return mx::array(std::move(shape), mx::float32, std::make_shared<LookupNode>(stream, weight), std::move(inputs));
}

std::tuple<mx::array, mx::array> attend(const mx::array& heads, const mx::array& rotation,
                                        const std::optional<mx::array>& factors, const mx::array& written,
                                        const std::vector<mx::array>& buffers, int64_t n_kv_heads, int64_t offset,
                                        int64_t capacity, int64_t window, std::vector<int64_t> starts, int64_t group,
                                        bool turned, const std::vector<mx::array>& sinks) {
  if (heads.ndim() != 3 || rotation.ndim() != 3 || heads.dtype() != mx::float32 || rotation.dtype() != mx::float32)
    refuse("heads and rotation are float32 of three dimensions");
  const int64_t batch = heads.shape(0), length = heads.shape(1), dim = rotation.shape(2),
                n_heads = heads.shape(2) / dim - 2 * n_kv_heads;
  if (heads.shape(2) % dim || n_heads < 1 || n_heads % n_kv_heads || dim % 2) refuse("heads do not divide");
  if (rotation.shape(1) != length || (rotation.shape(0) != 1 && rotation.shape(0) != batch))
    refuse("the rotation does not fit the tokens");
  if (factors &&
      (factors->dtype() != mx::float32 || factors->shape() != mx::Shape{rotation.shape(0), rotation.shape(1)}))
    refuse("the queries' factors are float32, one for each rotation");
  if (static_cast<int64_t>(starts.size()) != batch) refuse("every row has a start");
  if (!sinks.empty()) {
    if (sinks.size() != 3 || sinks[1].ndim() != 4 || !window) refuse("sinks are a rotation, keys and values");
    const mx::Shape own = {static_cast<int>(batch), static_cast<int>(n_kv_heads), sinks[1].shape(2),
                           static_cast<int>(dim)};
    if (sinks[0].shape() != rotation.shape() || sinks[1].shape() != own || sinks[2].shape() != own)
      refuse("these sinks are not this pass's");
    for (const mx::array& each : sinks)
      if (each.dtype() != mx::float32) refuse("sinks are float32");
  }
  if (buffers.size() != 2 && buffers.size() != 6) refuse("keys and values are one array each, or three");
  for (const mx::array& b : buffers) {
    if (b.ndim() != 4 || b.shape(0) != batch || b.shape(1) != n_kv_heads || b.shape(2) != buffers[0].shape(2))
      refuse("these buffers are not this pass's");
    if (!b.flags().row_contiguous || b.status() == mx::array::Status::unscheduled)
      refuse("buffers are evaluated and lie row by row");
  }
  if (buffers.size() == 2 && (buffers[0].shape(3) != dim || buffers[1].shape(3) != dim))
    refuse("these buffers have another head_dim");
  if (std::min<int64_t>(offset + length, capacity) > buffers[0].shape(2)) refuse("the ring has too few slots");
  mx::Stream stream = cpu();
  std::vector<mx::array> inputs = {as_rows(heads, stream), as_rows(rotation, stream), written};
  if (factors) inputs.push_back(as_rows(*factors, stream));
  for (const mx::array& each : sinks) inputs.push_back(as_rows(each, stream));
  inputs.insert(inputs.end(), buffers.begin(), buffers.end());
  auto node =
      std::make_shared<AttentionNode>(stream, Layout{n_kv_heads, capacity, window, offset, group, std::move(starts),
                                                     turned, factors.has_value(), !sinks.empty()});
  std::vector<mx::array> out = mx::array::make_arrays(
      {{static_cast<int>(batch), static_cast<int>(length), static_cast<int>(n_heads * dim)}, {1}},
      {mx::float32, mx::float32}, node, inputs);
  return {out[0], out[1]};
}

}  // namespace
}  // namespace m7

NB_MODULE(_native, module) {
  nb::class_<m7::Weight>(module, "Weight")
      .def(nb::init<mx::array, std::optional<mx::array>, std::optional<mx::array>, int, int, const std::string&>(),
           nb::arg("codes"), nb::arg("scales") = nb::none(), nb::arg("biases") = nb::none(),
           nb::arg("group_size") = 1, nb::arg("bits") = 0, nb::arg("mode") = "")
      .def_prop_ro("rows", &m7::Weight::rows)
      .def_prop_ro("columns", &m7::Weight::columns);
  module.def("instruction_sets", &m7::instruction_sets);
  module.def("use_instruction_set", &m7::use_instruction_set, nb::arg("name"));
  module.def("threads", &m7::threads);
  module.def("set_threads", &m7::set_threads, nb::arg("n"));
  module.def("product", &m7::product, nb::arg("x"), nb::arg("weights"), nb::arg("norm") = nb::none(),
             nb::arg("eps") = 0.0f, nb::arg("residual") = nb::none(), nb::arg("gated") = false,
             nb::arg("rounded") = false);
  module.def("lookup", &m7::lookup, nb::arg("ids"), nb::arg("weight"));
  module.def("map_file", &m7::map_file, nb::arg("path"), nb::arg("tensors"));
  module.def("attend", &m7::attend, nb::arg("heads"), nb::arg("rotation"), nb::arg("factors").none(),
             nb::arg("written"), nb::arg("buffers"), nb::arg("n_kv_heads"), nb::arg("offset"), nb::arg("capacity"),
             nb::arg("window"), nb::arg("starts"), nb::arg("group"), nb::arg("turned"),
             nb::arg("sinks") = std::vector<mx::array>{});
}
