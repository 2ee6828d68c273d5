// Compiled once per instruction set: see kernels.h.
#include "kernels.h"

namespace m7::M7_ISA {

static void copy(const float* from, float* to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    to[i] = from[i];
  }
}

#define M7_NAME_OF(isa) #isa
#define M7_NAME(isa) M7_NAME_OF(isa)

constinit const Kernels kernels = {M7_NAME(M7_ISA), copy};

}  // namespace m7::M7_ISA
