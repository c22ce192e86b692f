// The emulation of CUDA notices every fault planted here: in results, as an error, or with a sanitizer.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/ptx.h"

// ThreadSanitizer's; null where it is not linked.
extern "C" [[gnu::weak]] void __sanitizer_set_report_fd(void* fd);

namespace {

using namespace resmoe;
using emulation::Config;

#ifdef __SANITIZE_THREAD__
constexpr bool kRaces = true;
#else
constexpr bool kRaces = false;
#endif
#ifdef __SANITIZE_ADDRESS__
constexpr bool kAddresses = true;
#else
constexpr bool kAddresses = false;
#endif

__device__ int thread_of_block() { return static_cast<int>(threadIdx.x); }
__device__ int this_block() { return static_cast<int>(blockIdx.x); }

// A ring of copies: 64 threads add up 6 chunks of 1 KB, each thread what another one's copy brought.
enum class Ring {
  right,
  no_barrier,
  no_wait,
  wait_too_small,
  ring_too_short,
  not_waited_for,
  divergent_barrier,
  lane_missing,
  thread_left,
  other_lanes,
  misaligned,
  not_shared,
  no_shared_memory
};
constexpr int kStages = 3, kChunks = 6;

template <Ring fault>
__global__ void ring(const float* in, float* out) {
  RESMOE_SHARED_MEMORY(shared);
  const int t = thread_of_block();
  const auto copy = [&](int chunk) {
    constexpr int stages = fault == Ring::ring_too_short ? kStages - 1 : kStages;
    uint8_t* const to = shared + (chunk % stages * 64 + t) * 16;
    if (chunk < kChunks) {
      ptx::copy_async_16(to + (fault == Ring::misaligned         ? 8
                               : fault == Ring::no_shared_memory ? 4096
                                                                 : 0),
                         in + (chunk * 64 + t) * 4, true);
    }
    ptx::commit_copies();
  };
  for (int chunk = 0; chunk < kStages - 1; ++chunk) copy(chunk);
  float sum = 0;
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (fault == Ring::thread_left && t == 40 && chunk == 3) return;
    if (fault == Ring::wait_too_small) {
      ptx::wait_copies<kStages - 1>();
    } else if (fault != Ring::no_wait) {
      ptx::wait_copies<kStages - 2>();
    }
    if (fault == Ring::divergent_barrier && t < 32) {
      __syncthreads();
    } else if (fault != Ring::no_barrier) {
      __syncthreads();
    }
    copy(chunk + kStages - 1);
    constexpr int stages = fault == Ring::ring_too_short ? kStages - 1 : kStages;
    const uint8_t* const from = shared + (chunk % stages * 64 + (63 - t)) * 16;
    const uint4 bits = ptx::load_shared_16(fault == Ring::not_shared ? static_cast<const void*>(in) : from);
    float values[4];
    std::memcpy(values, &bits, 16);
    for (const float value : values) sum += value;
    if (fault == Ring::lane_missing && t % 32 != 7) sum += 0.0f * __shfl_xor_sync(~0u, sum, 1);
    if (fault == Ring::other_lanes) sum += 0.0f * __shfl_xor_sync(0xffffu, sum, 1);
  }
  if (fault == Ring::not_waited_for) {
    copy(0);
  } else {
    ptx::wait_copies<0>();
  }
  out[64 * this_block() + t] = sum;
}

// Blocks hand on a number of every thread, each adding 1, by flags; ThreadSanitizer alone sees two of the
// faults.
enum class Hand {
  right,
  not_waited_for,
  released_early,
  not_released,
  not_acquired,
  not_passed_on,
  polled_without_pause
};
constexpr int kBlocks = 3;

template <Hand fault>
__global__ void hand(float* numbers, uint32_t* flags) {
  const int t = thread_of_block(), block = this_block();
  if (block > 0 && fault != Hand::not_waited_for) {
    if (t % 32 == 0) {
      const uint32_t* const flag = flags + block - 1;
      if (fault == Hand::not_acquired) {
        while (*static_cast<const volatile uint32_t*>(flag) < 1) ptx::pause();
      } else {
        while (ptx::acquire(flag) < 1) {
          if (fault != Hand::polled_without_pause) ptx::pause();
        }
      }
    }
    if (fault != Hand::not_passed_on) __syncwarp();
  }
  const float before = block == 0 ? static_cast<float>(t) : ptx::load_l2(numbers + 64 * (block - 1) + t);
  numbers[64 * block + t] = before + 1;
  if (fault == Hand::released_early && t == 0) ptx::release_add(flags + block, 1);
  __syncthreads();
  if (fault != Hand::released_early && fault != Hand::not_released && t == 0)
    ptx::release_add(flags + block, 1);
}

// Lanes read what other lanes wrote. A shuffle between is none of the memory's business.
template <bool ordered>
__global__ void meet(float* sums) {
  RESMOE_SHARED_MEMORY(shared);
  auto* const numbers = reinterpret_cast<float*>(shared);
  const int t = thread_of_block();
  numbers[t] = static_cast<float>(t);
  if (ordered) {
    __syncwarp();
  } else {
    __shfl_xor_sync(~0u, t, 1);
  }
  sums[t] = numbers[t] + numbers[t ^ 16];
}

template <bool ordered>
bool meets(const Config& config) {
  std::vector<float> sums(32);
  emulation::launch(config, meet<ordered>, 1, 32, 128, sums.data());
  for (size_t i = 0; i < 32; ++i) {
    if (sums[i] != static_cast<float>(i + (i ^ 16))) return false;
  }
  return true;
}

// How often a fault was seen, over all orders and arrivals: as an error that says `text`, as another one, in
// results.
struct Seen {
  int launches = 0, said = 0, otherwise = 0, results = 0;
  std::string last;  // the last error
};

// launch(config) returns whether its results are right.
template <typename Launch>
Seen seen(const char* text, const Launch& launch) {
  Seen all;
  for (const Config& config : emulation::configs(3)) {
    ++all.launches;
    try {
      if (!launch(config)) ++all.results;
    } catch (const std::exception& error) {
      ++(std::strstr(error.what(), text) != nullptr ? all.said : all.otherwise);
      all.last = error.what();
    }
  }
  return all;
}

const std::vector<float>& inputs() {
  static const std::vector<float> numbers = [] {
    std::vector<float> all(kChunks * 256);
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<float>(i * 7 % 101);
    return all;
  }();
  return numbers;
}

template <typename Kernel>
bool adds_up(const Config& config, Kernel* kernel, size_t shared_bytes) {
  std::vector<float> out(128, -1.0f);
  emulation::launch(config, kernel, 2, 64, shared_bytes, inputs().data(), out.data());
  for (size_t i = 0; i < out.size(); ++i) {
    float sum = 0;
    for (size_t chunk = 0; chunk < kChunks; ++chunk) {
      for (size_t j = 0; j < 4; ++j) sum += inputs()[chunk * 256 + (63 - i % 64) * 4 + j];
    }
    if (out[i] != sum) return false;
  }
  return true;
}

template <Hand fault>
bool hands_on(const Config& config) {
  std::vector<float> numbers(64 * kBlocks, NAN);
  std::vector<uint32_t> flags(kBlocks);
  bool right = true;
  for (int replay = 0; replay < 2; ++replay) {
    std::fill(flags.begin(), flags.end(), 0);
    emulation::launch(config, hand<fault>, kBlocks, 64, 0, numbers.data(), flags.data());
    for (size_t i = 0; i < numbers.size(); ++i)
      right = right && numbers[i] == static_cast<float>(i % 64 + i / 64 + 1);
    std::fill(numbers.begin(), numbers.end(), NAN);
  }
  return right;
}

void right_kernels_pass() {
  const auto clean = [](const char* kernel, const Seen& all) {
    CHECK(all.said + all.results == 0, "%s: %d errors, %d results: %s", kernel, all.said, all.results,
          all.last.c_str());
  };
  clean("ring", seen("", [](const Config& c) { return adds_up(c, ring<Ring::right>, kStages * 1024); }));
  clean("meet", seen("", meets<true>));
  clean("hand", seen("", hands_on<Hand::right>));
}

// An error in every launch.
void always(const char* fault, const Seen& all) {
  CHECK(all.said == all.launches, "%s: said %d of %d times, %d other errors, %d results: %s", fault, all.said,
        all.launches, all.otherwise, all.results, all.last.c_str());
}
// In the results of some launches; a race with ThreadSanitizer.
void sometimes(const char* fault, const Seen& all) {
  CHECK(kRaces ? all.said > 0 : all.results > 0, "%s: said %d of %d times, %d other errors, %d results: %s",
        fault, all.said, all.launches, all.otherwise, all.results, all.last.c_str());
}

template <Ring fault>
Seen ring_with(const char* text) {
  return seen(text, [](const Config& config) { return adds_up(config, ring<fault>, kStages * 1024); });
}
void faults_of_a_block_are_noticed() {
  sometimes("no __syncthreads", ring_with<Ring::no_barrier>("a data race"));
  sometimes("no wait", ring_with<Ring::no_wait>("a data race"));
  sometimes("a wait too small", ring_with<Ring::wait_too_small>("a data race"));
  sometimes("a ring too short", ring_with<Ring::ring_too_short>("a data race"));
  if (kRaces) always("a shuffle for a __syncwarp", seen("a data race", meets<false>));
  always("copies on their way", ring_with<Ring::not_waited_for>("had not waited for"));
  always("divergent __syncthreads", ring_with<Ring::divergent_barrier>("where others wait at __syncthreads"));
  always("a lane missing", ring_with<Ring::lane_missing>("a shuffle"));
  always("a thread that left", ring_with<Ring::thread_left>("left the kernel"));
  always("some lanes", ring_with<Ring::other_lanes>("of some lanes"));
  always("misaligned",
         ring_with<Ring::misaligned>("copy_async_16 to shared memory: an address that is not aligned"));
  always("global memory read as shared", ring_with<Ring::not_shared>("are not the block's shared memory"));
  always("beyond shared memory", ring_with<Ring::no_shared_memory>("are not the block's shared memory"));
}

void faults_between_blocks_are_noticed() {
  sometimes("no wait for a flag", seen("a data race", hands_on<Hand::not_waited_for>));
  sometimes("released before the barrier", seen("a data race", hands_on<Hand::released_early>));
  if (!kRaces) CHECK(!hands_on<Hand::released_early>({}), "who waits goes on before the releasing block");
  always("never released", seen("deadlock: all threads wait", hands_on<Hand::not_released>));
  if (kRaces) {
    always("no acquire", seen("a data race", hands_on<Hand::not_acquired>));
    always("no __syncwarp behind it", seen("a data race", hands_on<Hand::not_passed_on>));
  }
  const Seen spinning = seen("without ptx::pause", hands_on<Hand::polled_without_pause>);
  CHECK(spinning.said > 0, "%d", spinning.said);
  // Flags that were not reset: nobody waits, and the numbers are those of the launch before.
  const Seen replays = seen("a data race", [](const Config& config) {
    std::vector<float> numbers(64 * kBlocks, NAN);
    std::vector<uint32_t> flags(kBlocks, 1);
    emulation::launch(config, hand<Hand::right>, kBlocks, 64, 0, numbers.data(), flags.data());
    return !std::isnan(numbers.back());
  });
  sometimes("flags not reset", replays);
}

// ---- what the sanitizers stop

// 40 numbers go from `in` through shared memory to `out`, in copies of 4.
enum class Mask { right, none_on_load, none_on_store, beyond_shared, misaligned };

template <Mask fault>
__global__ void masked(const float* in, float* out) {
  RESMOE_SHARED_MEMORY(shared);
  const int t = thread_of_block();
  ptx::copy_async_16(shared + 16 * t, in + (fault == Mask::none_on_load || t < 10 ? 4 * t : 0),
                     fault == Mask::none_on_load || t < 10);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  __syncthreads();
  const uint8_t* const from = shared + 16 * t;
  if (fault == Mask::beyond_shared && t == 31) shared[512] = 1;
  uint4 value = *reinterpret_cast<const uint4*>(from + (fault == Mask::misaligned && t == 3 ? 4 : 0));
  if (fault == Mask::none_on_store || t < 10) std::memcpy(out + 4 * t, &value, 16);
}

// A sanitizer ends the process, so it is another one.
template <Mask fault>
bool ends_well() {
  const pid_t child = fork();
  if (child == 0) {
    std::fclose(stderr);
    const std::vector<float> in(40, 1.0f);
    std::vector<float> out(40);
    emulation::launch({}, masked<fault>, 1, 32, 512, in.data(), out.data());
    _exit(out == in ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void sanitizers_see_the_kernel() {
  if (!kAddresses) return;
  CHECK(ends_well<Mask::right>(), "the right kernel");
  CHECK(!ends_well<Mask::none_on_load>(), "a load without its mask");
  CHECK(!ends_well<Mask::none_on_store>(), "a store without its mask");
  CHECK(!ends_well<Mask::beyond_shared>(), "a store beyond shared memory");
  CHECK(!ends_well<Mask::misaligned>(), "a 16-byte load from an address that is not aligned");
}

}  // namespace

int main() {
  right_kernels_pass();
  if (kRaces) {  // nobody wants the reports of planted races
    const int nowhere = fileno(std::fopen("/dev/null", "w"));
    __sanitizer_set_report_fd(reinterpret_cast<void*>(static_cast<intptr_t>(nowhere)));
  }
  faults_of_a_block_are_noticed();
  faults_between_blocks_are_noticed();
  sanitizers_see_the_kernel();
  std::printf(failures == 0 ? "all checks passed\n" : "checks failed\n");
  return failures == 0 ? 0 : 1;
}
