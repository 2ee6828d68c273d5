#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace m7 {
namespace {

// A worker that has nothing to do looks for work this long before it sleeps: longer than what lies
// between two kernels of a token, and too short to keep a core from others.
constexpr auto kAwake = std::chrono::microseconds(60);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int64_t n) {
    for (int64_t i = 1; i < n; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      ended_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int64_t size() const { return static_cast<int64_t>(workers_.size()) + 1; }

  void run(int64_t n, Task task, void* context) {
    task_ = task;
    context_ = context;
    n_ = n;
    next_.store(0, std::memory_order_relaxed);
    // Workers may enter from here on. A new round has a new number, or one that sleeps through it
    // would take the next for the same.
    round_ += kRound;
    state_.store(round_ | kOpen, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) {
      std::lock_guard lock(mutex_);
      wake_.notify_all();
    }
    take();
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int tries = 0; state_.load(std::memory_order_acquire) & kInside; ++tries) {
      tries < 500 ? pause() : static_cast<void>(sched_yield());  // a worker may have lost its core
    }
  }

 private:
  // The state in one word: how many workers are inside, whether more may enter, the round.
  static constexpr uint64_t kInside = 0xffff, kOpen = 1 << 16, kRound = 1 << 17;

  void take() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) task_(context_, i);
  }

  bool may_enter(uint64_t state, uint64_t last) const { return (state & kOpen) && state / kRound != last; }

  void work() {
    uint64_t last = 0;
    for (;;) {
      uint64_t state = await(last);
      if (ended_) return;
      while (may_enter(state, last)) {
        if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
        last = state / kRound;
        take();
        state_.fetch_sub(1, std::memory_order_acq_rel);
      }
    }
  }

  uint64_t await(uint64_t last) {
    uint64_t state;
    auto until = std::chrono::steady_clock::now() + kAwake;
    do {
      for (int i = 0; i < 32; ++i) {
        state = state_.load(std::memory_order_acquire);
        if (may_enter(state, last)) return state;
        pause();
      }
      // Whoever wants this core takes it now, while nobody waits for a task that is half done.
      sched_yield();
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock lock(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return ended_ || may_enter(state = state_.load(std::memory_order_seq_cst), last); });
    sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    return state;
  }

  Task task_ = nullptr;
  void* context_ = nullptr;
  int64_t n_ = 0;
  uint64_t round_ = 0;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> ended_{false};
  std::vector<std::thread> workers_;
};

std::mutex busy;
int64_t wanted = 1;
bool forked = false;
Pool* pool = nullptr;  // never destroyed at exit: workers may still look at it

void after_fork() { forked = true; }

}  // namespace

int64_t threads() { return wanted; }

void set_threads(int64_t n) {
  std::lock_guard lock(busy);
  wanted = n < 1 ? 1 : n;
}

void run(int64_t n, Task task, void* context) {
  if (n > 1 && wanted > 1 && !forked && busy.try_lock()) {
    std::lock_guard lock(busy, std::adopt_lock);
    if (pool && pool->size() != wanted) {
      delete pool;
      pool = nullptr;
    }
    if (!pool) {
      static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
      static_cast<void>(registered);
      pool = new Pool(wanted);
    }
    pool->run(n, task, context);
    return;
  }
  for (int64_t i = 0; i < n; ++i) task(context, i);
}

float* scratch(int slot, int64_t floats) {
  struct Slot {
    float* memory = nullptr;
    int64_t floats = 0;
    ~Slot() { std::free(memory); }
  };
  thread_local Slot slots[8];
  Slot& own = slots[slot];
  if (own.floats < floats) {
    std::free(own.memory);
    own.memory = nullptr;
    own.floats = 0;
    own.memory = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
    if (!own.memory) throw std::bad_alloc();
    own.floats = floats;
  }
  return own.memory;
}

}  // namespace m7
