// A launch on its way: what cuda_emulation.cpp, which lets fibers run, and cuda_emulation_threads.cpp, what
// fibers do, share. Both are compiled without ThreadSanitizer, which is told here what is a fiber, what
// orders fibers and which memory copies touch; so it watches the kernel alone.
#pragma once

#include <array>
#include <cstdlib>
#include <exception>
#include <memory>
#include <random>
#include <vector>

#include "cuda_emulation.h"

// ThreadSanitizer's; null where it is not linked.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* token);
[[gnu::weak]] void __tsan_release(void* token);
[[gnu::weak]] void __tsan_read_range(void* begin, unsigned long bytes);
[[gnu::weak]] void __tsan_write_range(void* begin, unsigned long bytes);
}

namespace resmoe::emulation {

// Of 16 bytes.
struct Copy {
  void* shared;
  const void* global;  // null: zeros
  int group;
};

enum class State { ready, at_barrier, in_warp, polling, done };

struct Thread {
  void* stack_pointer = nullptr;
  uint8_t* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* fiber = nullptr;       // ThreadSanitizer's
  uint3 index{};
  int number = 0;  // within its block
  bool begun = false;
  State state = State::ready;
  uint64_t seen = 0;  // the grid's version when it polled
  int polls = 0;      // at that version
  int group = 0;      // of copies, the open one
  std::vector<Copy> copies;
  std::vector<uintptr_t> shared_loads;  // since its warp met
};

// Who waits where for the others; two tokens, as those behind a barrier may come to the next before all have
// left it.
struct Meeting {
  const char* what = nullptr;
  Place place;
  int arrived = 0, turn = 0;
  char tokens[2] = {};
};

struct Warp {
  Thread* threads = nullptr;
  Meeting meeting;
  std::array<void*, 32> operands{};
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using SharedMemory = std::unique_ptr<uint8_t, Free>;

struct Block {
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting meeting;
  SharedMemory shared;
  size_t alive = 0;
};

struct Grid {
  Config config;
  const std::function<void()>* body = nullptr;
  size_t shared_bytes = 0;
  std::vector<Block> blocks;
  std::mt19937 random;
  Counts counts{};
  uint64_t version = 0;  // how often a flag changed
  bool handed_over = false;
  std::exception_ptr error;
  int races = 0;          // that ThreadSanitizer has reported
  bool stopping = false;  // threads unwind

  // Who runs; no thread while the host chooses one.
  Block* block = nullptr;
  Warp* warp = nullptr;
  Thread* thread = nullptr;

  void* host_stack_pointer = nullptr;
  void* host_fiber = nullptr;
  void* host_fake_stack = nullptr;
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
};

inline constinit thread_local Grid* grid = nullptr;  // null between launches

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
bool same(const Place& a, const Place& b);

// 128-byte aligned and no more, every byte 0xFF.
SharedMemory new_shared_memory(size_t bytes);

// The running thread stops; returns when it may go on, throws when the launch ends early.
void wait(State state);

// The running thread came to the end of the kernel.
void leave();

constexpr unsigned kOrdered = 0,
                   kUnordered = 1;  // whether a switch makes ThreadSanitizer order the two fibers

inline void to_fiber(void* fiber, unsigned flags) {
  if (fiber != nullptr) __tsan_switch_to_fiber(fiber, flags);
}
inline void acquire_token(void* token) {
  if (__tsan_acquire != nullptr) __tsan_acquire(token);
}
inline void release_token(void* token) {
  if (__tsan_release != nullptr) __tsan_release(token);
}

}  // namespace resmoe::emulation
