#include "isa.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace m7 {
namespace {

#ifdef M7_HAS_AVX2
bool has_f16c() {  // a name that __builtin_cpu_supports does not know in every compiler
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
#endif

#ifdef M7_HAS_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

std::vector<const Kernels*> find_kernels() {
  std::vector<const Kernels*> found = {&base::kernels};
#ifdef M7_HAS_AVX2
  if (has_avx2()) found.push_back(&avx2::kernels);
#endif
#ifdef M7_HAS_AVX512
  if (has_avx512()) found.push_back(&avx512::kernels);
#endif
  return found;
}

const std::vector<const Kernels*>& all_kernels() {
  static const std::vector<const Kernels*> all = find_kernels();
  return all;
}

const Kernels*& used() {
  static const Kernels* chosen = all_kernels().back();
  return chosen;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* each : all_kernels()) names.emplace_back(each->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const Kernels* each : all_kernels()) {
    if (name == each->name) {
      used() = each;
      return;
    }
  }
  throw std::invalid_argument("this processor, or this build, lacks the instruction set " + name);
}

const Kernels& kernels() { return *used(); }

}  // namespace m7
