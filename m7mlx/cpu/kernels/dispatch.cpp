// Which instruction sets this processor has.

#include <cstring>

#include "kernels.h"

namespace m7 {

const Kernels* find_kernels(const char* name) {
#if defined(M7_HAS_AVX512)
  if (!std::strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl")
               ? &avx512::kernels
               : nullptr;
#endif
#if defined(M7_HAS_AVX2)
  if (!std::strcmp(name, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? &avx2::kernels : nullptr;
#endif
  return std::strcmp(name, "base") ? nullptr : &base::kernels;
}

}  // namespace m7
