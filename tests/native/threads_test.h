// The threads that share a kernel's work: every task runs once, whoever calls.

#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "../../m7mlx/cpu/kernels/threads.h"
#include "support.h"

namespace {

// Run n tasks, and tell whether each ran once and has its result seen by the caller.
inline bool runs_each_once(int64_t n) {
  std::vector<int64_t> times(static_cast<size_t>(n), 0);
  m7::parallel(n, [&](int64_t i) { times[static_cast<size_t>(i)] += i + 1; });
  for (int64_t i = 0; i < n; ++i) {
    if (times[static_cast<size_t>(i)] != i + 1) return false;
  }
  return true;
}

// Memory that each thread asks for is its own.
inline bool has_its_own_memory(int64_t n) {
  std::atomic<int> wrong{0};
  m7::parallel(n, [&](int64_t i) {
    const int64_t size = 1 + i * 37 % 300;
    float* memory = m7::scratch(static_cast<int>(i % 8), size);
    for (int64_t k = 0; k < size; ++k) memory[k] = static_cast<float>(i);
    for (int64_t k = 0; k < size; ++k) wrong += memory[k] != static_cast<float>(i);
  });
  return wrong == 0;
}

// A child has none of its parent's threads, and computes all the same.
inline bool goes_on_in_a_child() {
  const pid_t child = fork();
  if (child == 0) _exit(runs_each_once(20) && has_its_own_memory(20) ? 0 : 1);
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

inline bool test_threads(int64_t n_threads, int rounds) {
  for (int64_t n = 0; n < rounds; ++n) {
    if (!runs_each_once(n % 50)) return fail("threads", "a task ran not at all, or twice");
    if (n % 7 == 0 && !has_its_own_memory(n % 50)) return fail("threads", "two tasks shared memory");
    if (n % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the workers fall asleep
  }
  if (!goes_on_in_a_child()) return fail("threads", "a child's tasks did not run");
  if (n_threads == 1) return true;

  std::atomic<bool> right{true};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int64_t n = 0; n < rounds; ++n) {
        if (!runs_each_once(n % 20)) right = false;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  if (!right) return fail("threads", "a task ran not at all, or twice, where several threads call");

  for (int64_t n = 0; n < 20; ++n) {
    m7::set_threads(1 + n % 4);
    if (!runs_each_once(30))
      return fail("threads", "a task ran not at all, or twice, after another number of threads");
  }
  if (!goes_on_in_a_child()) return fail("threads", "a child's tasks did not run, after threads were replaced");
  return true;
}

}  // namespace
