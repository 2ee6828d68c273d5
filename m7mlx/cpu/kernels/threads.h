// The threads that share a kernel's work.

#pragma once

#include <cstdint>

namespace m7 {

using Task = void (*)(void* context, int64_t task);

// Run the tasks 0 … n − 1, in any order, on all threads; return when all are done. Where another
// thread is inside already, or after a fork, the caller runs them alone.
void run(int64_t n, Task task, void* context);

// How many threads run tasks, the caller's included.
int64_t threads();

// Let so many threads run tasks from now on. Not while kernels run.
void set_threads(int64_t n);

// Memory of the calling thread, 64-byte aligned, that lasts until it asks for more in the same slot.
float* scratch(int slot, int64_t floats);

template <class F>
void parallel(int64_t n, const F& f) {
  const Task task = [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); };
  run(n, task, const_cast<F*>(&f));
}

}  // namespace m7
