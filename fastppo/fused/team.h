// Threads that share one call. They are started by it and end with it, so that a fork of the process finds none of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastppo {

// All threads of a team wait for each other. Who waits spins some 100 us, then sleeps: on a busy machine the others need the core.
class Barrier {
 public:
  explicit Barrier(int64_t threads) : threads_(threads) {}

  void wait() {
    const int32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      if (threads_ > 1) round_.notify_all();
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
      if (round_.load(std::memory_order_acquire) != round) return;
    }
    while (round_.load(std::memory_order_acquire) == round) round_.wait(round, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 100000;
  const int64_t threads_;
  std::atomic<int64_t> arrived_{0};
  std::atomic<int32_t> round_{0};
};

// Call work(thread) for each thread in [0, threads), one of them the caller's.
template <class Work>
void run_team(int64_t threads, Work work) {
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace fastppo
