// The kernels, compiled once for each instruction set.

#include "kernels.h"

#include "attention.h"
#include "product.h"

#ifndef M7_ISA
#define M7_ISA base
#endif

#define M7_NAME_(x) #x
#define M7_NAME(x) M7_NAME_(x)

namespace m7::M7_ISA {
extern const Kernels kernels;
const Kernels kernels = {M7_NAME(M7_ISA), product, lookup, attend};
}  // namespace m7::M7_ISA
