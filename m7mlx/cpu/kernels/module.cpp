// The Python module m7mlx.cpu._native.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>

#include "isa.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace m7 {
namespace {

// What the self-test sends an array through: the whole road of a primitive, from MLX's graph to its
// worker thread and back.
class Copy : public mx::UnaryPrimitive {
 public:
  explicit Copy(mx::Stream stream) : UnaryPrimitive(stream) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    const mx::array& in = inputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.set_input_array(in);
    encoder.set_output_array(out);
    encoder.dispatch([from = in.data<float>(), to = out.data<float>(), count = in.size()] {
      kernels().copy(from, to, count);
    });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("m7mlx's kernels run on the CPU only");
  }

  const char* name() const override { return "m7::Copy"; }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape()};
  }
};

mx::array copy(const mx::array& x) {
  mx::Stream stream = mx::to_stream({}, mx::Device::cpu);
  mx::array in = mx::contiguous(mx::astype(x, mx::float32, stream), false, stream);
  return mx::array(in.shape(), mx::float32, std::make_shared<Copy>(stream), {in});
}

}  // namespace
}  // namespace m7

NB_MODULE(_native, module) {
  module.def("instruction_sets", &m7::instruction_sets);
  module.def("use_instruction_set", &m7::use_instruction_set, nb::arg("name"));
  module.def("copy", &m7::copy, nb::arg("x"));
}
