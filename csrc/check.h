// CUDA's error codes as exceptions that name the op.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace nova {

// Throws std::runtime_error unless `status` is success; `op` is what the user called.
inline void check(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported here must not show up in later calls
  throw std::runtime_error(std::string(op) + ": CUDA says " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

}  // namespace nova
