// What an activation of the CUDA kernels is, in double.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/decode_call.h"

inline double applied(resmoe::cuda::Function f, double z) {
  using resmoe::cuda::Function;
  switch (f) {
    case Function::silu:
      return z / (1 + std::exp(-z));
    case Function::gelu:
      return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Function::gelu_tanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / 3.14159265358979) * (z + 0.044715 * z * z * z)));
    case Function::relu:
      return std::max(z, 0.0);
    case Function::relu2:
      return std::max(z, 0.0) * std::max(z, 0.0);
    case Function::identity:
      break;
  }
  return z;
}
