// The CUDA kernels as nvcc builds them, linked without Python, torch or a GPU: what they say where they
// cannot run.
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "check.h"
#include "cuda/device.h"
#include "cuda/low_rank_decode.h"

namespace {

using resmoe::cuda::LowRankCall;

LowRankCall call_of(int tokens, int top_k, int experts, int hidden, int inner) {
  LowRankCall call{};
  call.tokens = tokens, call.top_k = top_k, call.experts = experts, call.hidden = hidden, call.inner = inner;
  return call;
}

void sizes_beyond_the_limits_are_declined() {
  CHECK(declines(call_of(16, 8, 64, 2048, 1408)) == nullptr, "%s", declines(call_of(16, 8, 64, 2048, 1408)));
  for (const LowRankCall& call :
       {call_of(17, 2, 8, 64, 64), call_of(16, 17, 64, 64, 64), call_of(1, 1, 1025, 64, 64),
        call_of(1, 1, 8, 65, 64), call_of(1, 1, 8, 64, 65)})
    CHECK(declines(call) != nullptr, "T %d, top_k %d, E %d, H %d, I %d", call.tokens, call.top_k,
          call.experts, call.hidden, call.inner);
}

void without_a_gpu_the_sentence_names_the_kernel() {
  const resmoe::cuda::OnDevice there(0);
  if (there.fault() == nullptr) return;  // there is one
  CHECK(std::strncmp(there.fault(), "GPU 0: ", 7) == 0, "%s", there.fault());
  const char* error = resmoe::cuda::low_rank_decode(call_of(1, 1, 8, 64, 64), nullptr);
  CHECK(error != nullptr && std::strstr(error, "low_rank_decode (") == error, "%s",
        error == nullptr ? "none" : error);
  std::printf("%s\n", error);
}

}  // namespace

int main() {
  sizes_beyond_the_limits_are_declined();
  without_a_gpu_the_sentence_names_the_kernel();
  std::printf(failures == 0 ? "all checks passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
