// Runs the tasks of several phases on any number of threads: a task of one phase starts when every task of
// the phases before it has ended.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>

namespace resmoe {

// Tells the processor that this is a loop that waits.
inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Tasks are handed out in order, phase after phase. A thread that takes a task of a later phase waits until
// the earlier phases are done, and that always happens: every task before its own is held by a thread that is
// running it or waits for still earlier ones, and the first unfinished task waits for nothing. So it works on
// one thread as on many, and on fewer than were asked for.
template <int kPhases>
class Phases {
 public:
  explicit Phases(const std::array<int64_t, kPhases>& tasks) {
    int64_t end = 0;
    for (int p = 0; p < kPhases; ++p) ends_[p] = end += tasks[p];
  }

  // Runs tasks until none is left. run(phase, task) does one; while_waiting(phase, task, n) is called for the
  // n-th time with a task that cannot start yet, and returns whether it found something useful to do.
  template <typename Run, typename WhileWaiting>
  void work(const Run& run, const WhileWaiting& while_waiting) {
    for (;;) {
      const int64_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
      if (ticket >= ends_[kPhases - 1]) return;
      int phase = 0;
      while (ticket >= ends_[phase]) ++phase;
      const int64_t begin = phase == 0 ? 0 : ends_[phase - 1];
      for (int spins = 0; done_.load(std::memory_order_acquire) < begin; ++spins) {
        if (while_waiting(phase, ticket - begin, spins)) continue;
        if (spins < 4096) {
          pause_briefly();
        } else {
          std::this_thread::yield();  // the thread that is waited for may need this core
        }
      }
      run(phase, ticket - begin);
      done_.fetch_add(1, std::memory_order_acq_rel);
    }
  }

 private:
  std::array<int64_t, kPhases> ends_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace resmoe
