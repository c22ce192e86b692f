// Fibers: how they change, and who runs when. cuda_emulation.h says what for.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cuda_emulation_grid.h"

// AddressSanitizer's; null where it is not linked.
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* bytes);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* begin, size_t bytes);

void resmoe_switch_stack(void** from, void* to);
}

// Saves the registers that a function must keep (x86-64 System V), and the stack's pointer in *from; goes on
// at `to`.
asm(R"(
.text
.hidden resmoe_switch_stack
.globl resmoe_switch_stack
.type resmoe_switch_stack, @function
resmoe_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size resmoe_switch_stack, .-resmoe_switch_stack
)");

// ThreadSanitizer calls these. A launch says of its races, also those that an earlier one had; the process
// need not.
extern "C" void __tsan_on_report(void*) {
  if (resmoe::emulation::grid != nullptr) ++resmoe::emulation::grid->races;
}
extern "C" const char* __tsan_default_options() {
  return "suppress_equal_stacks=0:suppress_equal_addresses=0:exitcode=0";
}

namespace resmoe::emulation {

void fail(const char* format, ...) {
  char what[400], message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  if (grid != nullptr && grid->thread != nullptr) {
    std::snprintf(message, sizeof message, "CUDA emulation: block (%u, %u, %u), thread (%u, %u, %u): %s",
                  blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
  } else {
    std::snprintf(message, sizeof message, "CUDA emulation: %s", what);
  }
  throw std::runtime_error(message);
}

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

SharedMemory new_shared_memory(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(bytes, 1)) != 0) fail("no memory");
  std::memset(memory, 0xFF, bytes);
  return SharedMemory(static_cast<uint8_t*>(memory));
}

namespace {

struct Stopped {};  // unwinds a thread

constexpr size_t kStackBytes = 128 << 10;

// The stacks of all threads, each with a page below it that faults; kept for later launches.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  void reserve(size_t threads) {
    if (threads > threads_) {
      release();
      memory_ = mmap(nullptr, threads * kPitch, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory_ == MAP_FAILED) fail("no memory for the stacks of %zu threads", threads);
      threads_ = threads;
      for (size_t i = 0; i < threads; ++i) mprotect(at(i) - kGuardBytes, kGuardBytes, PROT_NONE);
    }
    // What AddressSanitizer knows of frames that enter() never left.
    if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(memory_, threads_ * kPitch);
  }
  uint8_t* at(size_t i) const { return static_cast<uint8_t*>(memory_) + i * kPitch + kGuardBytes; }

 private:
  static constexpr size_t kGuardBytes = 4096, kPitch = kStackBytes + kGuardBytes;

  void release() {
    if (threads_ != 0) munmap(memory_, threads_ * kPitch);
    threads_ = 0;
  }

  void* memory_ = nullptr;
  size_t threads_ = 0;
};
thread_local Stacks stacks;

// ThreadSanitizer's fibers, kept for later launches: one takes 0.5 ms to make.
class Fibers {
 public:
  void* take() {
    if (__tsan_create_fiber == nullptr) return nullptr;
    if (idle_.empty()) return __tsan_create_fiber(0);
    void* const fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }
  // The host is then behind all that the fiber did.
  void give_back(void* fiber) {
    if (fiber == nullptr) return;
    to_fiber(fiber, kUnordered);
    to_fiber(grid->host_fiber, kOrdered);
    idle_.push_back(fiber);
  }

 private:
  std::vector<void*> idle_;
};
thread_local Fibers fibers;

// ---- changes

// Back to the host, which returns here when it chooses this thread again.
void to_host() {
  Thread& thread = *grid->thread;
  to_fiber(grid->host_fiber, kUnordered);
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(thread.state == State::done ? nullptr : &thread.fake_stack,
                                   grid->host_stack, grid->host_stack_bytes);
  }
  resmoe_switch_stack(&thread.stack_pointer, grid->host_stack_pointer);
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(thread.fake_stack, &grid->host_stack, &grid->host_stack_bytes);
  }
}

// Where a fiber begins.
[[noreturn]] void enter() {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(nullptr, &grid->host_stack, &grid->host_stack_bytes);
  }
  try {
    (*grid->body)();
    leave();
  } catch (...) {
    if (!grid->stopping) grid->error = std::current_exception();
  }
  grid->thread->state = State::done;
  to_host();
  std::abort();  // never chosen again
}

void resume(Block& block, Warp& warp, Thread& thread) {
  grid->block = &block;
  grid->warp = &warp;
  grid->thread = &thread;
  threadIdx = thread.index;
  blockIdx = block.index;
  to_fiber(thread.fiber, kUnordered);
  thread.begun = true;
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(&grid->host_fake_stack, thread.stack, kStackBytes);
  }
  resmoe_switch_stack(&grid->host_stack_pointer, thread.stack_pointer);
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(grid->host_fake_stack, nullptr, nullptr);
  }
  if (grid->stopping) return;
  if (grid->races != 0) fail("a data race, which ThreadSanitizer's report says");
  grid->thread = nullptr;
  if (grid->error) std::rethrow_exception(grid->error);
}

// ---- who runs when

template <typename Visit>
void in_order(size_t n, const Visit& visit) {
  if (grid->config.order == Order::shuffled) {
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), size_t{0});
    std::shuffle(order.begin(), order.end(), grid->random);
    for (const size_t i : order) visit(i);
  } else {
    for (size_t i = 0; i < n; ++i) visit(grid->config.order == Order::forward ? i : n - 1 - i);
  }
}

bool can_run(const Thread& thread) {
  return thread.state == State::ready || (thread.state == State::polling && thread.seen != grid->version);
}

// Both let run what can, again and again where the order is fixed, but go to other blocks as soon as a flag
// has changed: who waited for it then meets a block whose other threads are as far behind as can be.
bool run(Block& block, Warp& warp) {
  bool any = false, again = true;
  while (again && !grid->handed_over) {
    again = false;
    in_order(32, [&](size_t i) {
      if (grid->handed_over || !can_run(warp.threads[i])) return;
      warp.threads[i].state = State::ready;
      resume(block, warp, warp.threads[i]);
      any = true;
      again = grid->config.order != Order::shuffled;
    });
  }
  return any;
}

bool run(Block& block) {
  bool any = false, again = true;
  while (again && !grid->handed_over) {
    again = false;
    in_order(block.warps.size(), [&](size_t i) {
      if (grid->handed_over || !run(block, block.warps[i])) return;
      any = true;
      again = grid->config.order != Order::shuffled;
    });
  }
  return any;
}

[[noreturn]] void deadlock() {
  std::string who;
  for (const Block& block : grid->blocks) {
    const auto add = [&](auto n, const std::string& what) {
      if (n != 0) who += " " + std::to_string(n) + " " + what + ",";
    };
    const auto count = [&](State state) {
      return std::count_if(block.threads.begin(), block.threads.end(),
                           [&](const Thread& thread) { return thread.state == state; });
    };
    who += " Block " + std::to_string(block.index.x) + ":";
    add(count(State::done), "left");
    add(count(State::polling), "poll");
    add(block.meeting.arrived, "at __syncthreads in line " + std::to_string(block.meeting.place.line()));
    for (const Warp& warp : block.warps) {
      if (warp.meeting.arrived == 0) continue;
      add(warp.meeting.arrived,
          std::string("at ") + warp.meeting.what + " in line " + std::to_string(warp.meeting.place.line()));
    }
    who.back() = '.';
    if (who.size() > 300) break;
  }
  fail("deadlock: all threads wait.%s", who.c_str());
}

void run_all() {
  while (std::any_of(grid->blocks.begin(), grid->blocks.end(),
                     [](const Block& block) { return block.alive != 0; })) {
    bool any = false;
    in_order(grid->blocks.size(), [&](size_t i) {
      grid->handed_over = false;
      any |= run(grid->blocks[i]);
    });
    if (!any) deadlock();
  }
}

uint3 index_of(size_t number, uint3 size) {
  const auto n = static_cast<unsigned>(number);
  return {n % size.x, n / size.x % size.y, n / (size.x * size.y)};
}

void prepare(Thread& thread, size_t number, uint8_t* stack) {
  thread.number = static_cast<int>(number);
  thread.index = index_of(number, blockDim);
  thread.stack = stack;
  thread.fiber = fibers.take();
  to_fiber(thread.fiber, kOrdered);  // behind all that came before the launch
  to_fiber(grid->host_fiber, kUnordered);
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where enter() would return to; it also aligns the stack as a call does
  *--top = reinterpret_cast<void*>(&enter);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  thread.stack_pointer = top;
}

}  // namespace

void wait(State state) {
  grid->thread->state = state;
  to_host();
  if (grid->stopping) throw Stopped();
}

std::vector<Config> configs(unsigned shuffled) {
  std::vector<Config> all;
  for (const Arrival copies : {Arrival::late, Arrival::early}) {
    all.push_back({Order::forward, copies, 0});
    all.push_back({Order::reverse, copies, 0});
    for (unsigned seed = 1; seed <= shuffled; ++seed) all.push_back({Order::shuffled, copies, seed});
  }
  return all;
}

Counts run(const Config& config, dim3 grid_size, dim3 block_size, size_t shared_bytes,
           const std::function<void()>& body) {
  grid = nullptr;
  const size_t blocks = size_t{grid_size.x} * grid_size.y * grid_size.z;
  const size_t threads = size_t{block_size.x} * block_size.y * block_size.z;
  if (threads == 0 || threads % 32 != 0 || threads > 1024) fail("a block of %zu threads", threads);
  if (shared_bytes > 227 << 10) fail("%zu bytes of shared memory, where GPUs have 232448", shared_bytes);
  Grid launched;
  launched.config = config;
  launched.body = &body;
  launched.shared_bytes = shared_bytes;
  launched.random.seed(config.seed);
  launched.blocks.resize(blocks);
  launched.host_fiber = __tsan_get_current_fiber == nullptr ? nullptr : __tsan_get_current_fiber();
  gridDim = {grid_size.x, grid_size.y, grid_size.z};
  blockDim = {block_size.x, block_size.y, block_size.z};
  grid = &launched;
  stacks.reserve(blocks * threads);
  for (size_t b = 0; b < blocks; ++b) {
    Block& block = launched.blocks[b];
    block.index = index_of(b, gridDim);
    block.shared = new_shared_memory(shared_bytes);
    block.threads.resize(threads);
    block.warps.resize(threads / 32);
    block.alive = threads;
    for (size_t i = 0; i < threads; ++i) prepare(block.threads[i], i, stacks.at(b * threads + i));
    for (size_t i = 0; i < threads / 32; ++i) block.warps[i].threads = &block.threads[32 * i];
  }
  std::exception_ptr error;
  try {
    run_all();
  } catch (...) {
    error = std::current_exception();
  }
  grid->stopping = true;
  for (Block& block : launched.blocks) {
    for (Thread& thread : block.threads) {
      if (thread.begun && thread.state != State::done) {
        resume(block, block.warps[static_cast<size_t>(thread.number / 32)], thread);
      }
      fibers.give_back(thread.fiber);
    }
  }
  grid = nullptr;
  if (error) std::rethrow_exception(error);
  return launched.counts;
}

}  // namespace resmoe::emulation
