// Which instruction set's kernels run: the best that this processor has, or the one chosen.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace m7 {

// The instruction sets that are compiled in and that this processor has, the best one last.
std::vector<std::string> instruction_sets();

// Let the kernels of this set run from now on; throws std::invalid_argument if it is none of
// instruction_sets(). Not to be called while kernels run.
void use_instruction_set(const std::string& name);

// The kernels in use.
const Kernels& kernels();

}  // namespace m7
