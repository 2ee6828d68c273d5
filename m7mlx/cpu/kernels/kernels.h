// The kernels, once per instruction set. kernels.cpp is compiled for each set with -DM7_ISA=<its
// name>; every compilation fills one table, in the namespace of that name.
#pragma once

#include <cstddef>

namespace m7 {

struct Kernels {
  const char* name;                                               // of the instruction set
  void (*copy)(const float* from, float* to, std::size_t count);  // what the self-test calls
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
