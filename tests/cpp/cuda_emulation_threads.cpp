// What the fibers of cuda_emulation.h do together: barriers, operations of a warp, copies, flags.
#include <algorithm>
#include <cstring>

#include "cuda_emulation_grid.h"

namespace resmoe::emulation {
namespace {

constexpr int kPollsWithoutPause = 100000;

// ---- meetings

// True for the last to arrive, who alone may then touch what all brought.
bool arrive(Meeting& meeting, size_t all, const char* what, const Place& place) {
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.place = place;
  } else if (!same(meeting.place, place)) {
    fail("at %s in %s:%u, where others wait at %s in %s:%u", what, place.file_name(), place.line(),
         meeting.what, meeting.place.file_name(), meeting.place.line());
  }
  if (static_cast<size_t>(++meeting.arrived) < all) return false;
  meeting.arrived = 0;
  meeting.turn ^= 1;
  return true;
}

void wake(Thread* threads, size_t n) {
  for (size_t i = 0; i < n; ++i) threads[i].state = State::ready;
}

// How often shared memory is read for 16 bytes at each of up to 8 addresses: its 32 banks are 8 such pieces
// wide.
uint64_t passes(const std::array<uintptr_t, 8>& addresses, size_t n) {
  std::array<uint64_t, 8> pieces{};
  for (size_t i = 0; i < n; ++i) {
    if (std::find(addresses.begin(), addresses.begin() + i, addresses[i]) == addresses.begin() + i) {
      ++pieces[addresses[i] / 16 % 8];
    }
  }
  return *std::max_element(pieces.begin(), pieces.end());
}

// The n-th load of every lane since they met counts as one instruction.
void count_bank_conflicts(Warp& warp) {
  size_t loads = 0;
  for (size_t i = 0; i < 32; ++i) loads = std::max(loads, warp.threads[i].shared_loads.size());
  for (size_t load = 0; load < loads; ++load) {
    for (size_t first = 0; first < 32; first += 8) {
      std::array<uintptr_t, 8> addresses{};
      size_t n = 0;
      for (size_t i = first; i < first + 8; ++i) {
        if (load < warp.threads[i].shared_loads.size()) addresses[n++] = warp.threads[i].shared_loads[load];
      }
      if (n != 0) grid->counts.bank_conflicts += passes(addresses, n) - 1;
    }
  }
  for (size_t i = 0; i < 32; ++i) warp.threads[i].shared_loads.clear();
}

// All lanes of a warp, each with an operand on its stack. The last to come runs together(), to which
// operand(i) is lane i's. Only __syncwarp orders memory.
template <typename Operand, typename Together>
void meet_warp(unsigned lanes, Operand& own, bool orders_memory, const char* what, const Place& place,
               const Together& together) {
  Warp& warp = *grid->warp;
  if (lanes != ~0u) {
    fail("%s in %s:%u of some lanes, where the emulation knows whole warps", what, place.file_name(),
         place.line());
  }
  warp.operands[static_cast<size_t>(grid->thread->number % 32)] = &own;
  char* const token = &warp.meeting.tokens[warp.meeting.turn];
  if (orders_memory) release_token(token);
  if (arrive(warp.meeting, 32, what, place)) {
    count_bank_conflicts(warp);
    together([&warp](size_t i) -> Operand& { return *static_cast<Operand*>(warp.operands[i]); });
    wake(warp.threads, 32);
  } else {
    wait(State::in_warp);
  }
  if (orders_memory) acquire_token(token);
}

// ---- copies

// Tells ThreadSanitizer, until it has reported a race. False if it has.
bool touch(void (*tell)(void*, unsigned long), const void* memory) {
  if (tell != nullptr && grid->races == 0) tell(const_cast<void*>(memory), 16);
  return grid->races == 0;
}

// A copy may write from its issue on; what is there until it is waited for is not said, and NaN shows.
void poison(void* shared) {
  if (touch(__tsan_write_range, shared)) std::memset(shared, 0xFF, 16);
}

void land(const Copy& copy) {
  if (!touch(__tsan_write_range, copy.shared)) return;
  if (copy.global == nullptr) {
    std::memset(copy.shared, 0, 16);
  } else if (touch(__tsan_read_range, copy.global)) {
    std::memcpy(copy.shared, copy.global, 16);
  }
}

}  // namespace

void leave() {
  const Thread& thread = *grid->thread;
  if (!thread.copies.empty()) {
    fail("left the kernel with %zu copies it had not waited for", thread.copies.size());
  }
  for (const Meeting& meeting : {grid->warp->meeting, grid->block->meeting}) {
    if (meeting.arrived != 0) {
      fail("left the kernel, where others wait at %s in %s:%u", meeting.what, meeting.place.file_name(),
           meeting.place.line());
    }
  }
  if (--grid->block->alive == 0) {
    for (Warp& warp : grid->block->warps) count_bank_conflicts(warp);
  }
}

// ---- shared memory

uint8_t* shared_memory() { return grid->block->shared.get(); }

void require_aligned(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("%s: an address that is not aligned to %zu bytes", what, bytes);
  }
}

void require_shared(const void* address, size_t bytes, const char* what) {
  const auto* const first = static_cast<const uint8_t*>(address);
  const uint8_t* const begin = grid->block->shared.get();
  if (first < begin || first + bytes > begin + grid->shared_bytes) {
    fail("%s: %zu bytes that are not the block's shared memory", what, bytes);
  }
}

void count_shared_load(const void* address) {
  ++grid->counts.shared_loads;
  grid->thread->shared_loads.push_back(reinterpret_cast<uintptr_t>(address));
}

// ---- barriers

void sync_threads(Place place) {
  Block& block = *grid->block;
  if (block.alive < block.threads.size()) {
    fail("at __syncthreads in %s:%u, when others have left the kernel", place.file_name(), place.line());
  }
  char* const token = &block.meeting.tokens[block.meeting.turn];
  release_token(token);
  if (arrive(block.meeting, block.threads.size(), "__syncthreads", place)) {
    ++grid->counts.barriers;
    for (Warp& warp : block.warps) count_bank_conflicts(warp);
    wake(block.threads.data(), block.threads.size());
  } else {
    wait(State::at_barrier);
  }
  acquire_token(token);
}

void sync_warp(unsigned lanes, Place place) {
  char nothing = 0;
  meet_warp(lanes, nothing, true, "__syncwarp", place, [](const auto&) {});
}

// ---- operations of a warp

uint64_t shuffle(unsigned lanes, uint64_t value, int source, Place place) {
  struct Operand {
    uint64_t value, out;
    size_t source;
  } own{value, 0, static_cast<size_t>(source)};
  meet_warp(lanes, own, false, "a shuffle", place, [](const auto& operand) {
    for (size_t i = 0; i < 32; ++i) operand(i).out = operand(operand(i).source).value;
  });
  return own.out;
}

uint32_t ballot(unsigned lanes, bool vote, Place place) {
  struct Operand {
    bool vote;
    uint32_t votes;
  } own{vote, 0};
  meet_warp(lanes, own, false, "a ballot", place, [](const auto& operand) {
    uint32_t votes = 0;
    for (size_t i = 0; i < 32; ++i) votes |= uint32_t{operand(i).vote} << i;
    for (size_t i = 0; i < 32; ++i) operand(i).votes = votes;
  });
  return own.votes;
}

void load_matrices_transposed(uint32_t (&r)[4], const void* address, const uint4& row, Place place) {
  struct Operand {
    uint32_t* r;
    uintptr_t address;
    uint16_t elements[8];
  } own{r, reinterpret_cast<uintptr_t>(address), {}};
  std::memcpy(own.elements, &row, sizeof row);
  meet_warp(~0u, own, false, "ldmatrix", place, [](const auto& operand) {
    ++grid->counts.matrix_loads;
    for (size_t m = 0; m < 4; ++m) {
      std::array<uintptr_t, 8> addresses{};
      for (size_t i = 0; i < 8; ++i) addresses[i] = operand(8 * m + i).address;
      grid->counts.bank_conflicts += passes(addresses, 8) - 1;
      const auto element = [&](size_t i, size_t j) { return uint32_t{operand(8 * m + i).elements[j]}; };
      for (size_t lane = 0; lane < 32; ++lane) {
        const size_t i = lane / 4, j = lane % 4 * 2;
        operand(lane).r[m] = element(j + 1, i) << 16 | element(j, i);
      }
    }
  });
}

template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  struct Operand {
    float* d;
    const uint32_t *a, *b;
  } own{d, a, b};
  meet_warp(~0u, own, false, "mma", place, [](const auto& operand) {
    ++grid->counts.products;
    float left[16][16], right[16][8], sums[16][8];
    const auto unpack = [](uint32_t pair, float& low, float& high) {
      low = static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(pair)));
      high = static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(pair >> 16)));
    };
    for (size_t lane = 0; lane < 32; ++lane) {
      const size_t g = lane / 4, q = lane % 4 * 2;
      const Operand& from = operand(lane);
      for (size_t i = 0; i < 4; ++i) {
        float* const pair = &left[g + i % 2 * 8][q + i / 2 * 8];
        unpack(from.a[i], pair[0], pair[1]);
        sums[g + i / 2 * 8][q + i % 2] = from.d[i];
      }
      for (size_t i = 0; i < 2; ++i) unpack(from.b[i], right[q + i * 8][g], right[q + i * 8 + 1][g]);
    }
    for (size_t row = 0; row < 16; ++row) {
      for (size_t k = 0; k < 16; ++k) {
        for (size_t column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
      }
    }
    for (size_t lane = 0; lane < 32; ++lane) {
      const size_t g = lane / 4, q = lane % 4 * 2;
      for (size_t i = 0; i < 4; ++i) operand(lane).d[i] = sums[g + i / 2 * 8][q + i % 2];
    }
  });
}
template void multiply<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], Place);
template void multiply<__half>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], Place);

// ---- copies of a thread

void copy_async(void* shared, const void* global, bool valid) {
  require_aligned(shared, 16, "copy_async_16 to shared memory");
  require_aligned(global, 16, "copy_async_16 from global memory");
  require_shared(shared, 16, "copy_async_16");
  ++grid->counts.copies;
  grid->counts.copied_bytes += valid ? 16 : 0;
  const Copy copy{shared, valid ? global : nullptr, grid->thread->group};
  if (grid->config.copies == Arrival::early) {
    land(copy);
  } else {
    poison(shared);
  }
  grid->thread->copies.push_back(copy);
}

void commit_copies() { ++grid->thread->group; }

void wait_copies(int groups) {
  Thread& thread = *grid->thread;
  auto& copies = thread.copies;  // the oldest first
  const auto end = std::find_if(copies.begin(), copies.end(),
                                [&](const Copy& copy) { return copy.group >= thread.group - groups; });
  if (grid->config.copies == Arrival::late) {
    std::for_each(copies.begin(), end, [](const Copy& copy) { land(copy); });
  }
  copies.erase(copies.begin(), end);
}

// ---- flags

void polled(const void* flag) {
  require_aligned(flag, 4, "acquire");
  Thread& thread = *grid->thread;
  if (thread.seen != grid->version) thread.polls = 0;
  thread.seen = grid->version;
  if (++thread.polls > kPollsWithoutPause) fail("a flag is polled without ptx::pause");
}

void flag_changed() {
  ++grid->version;
  grid->handed_over = true;
  wait(State::ready);
}

// Until a flag has changed since the thread polled.
void pause() {
  grid->thread->polls = 0;
  wait(State::polling);
  grid->thread->seen = grid->version;
}

}  // namespace resmoe::emulation
