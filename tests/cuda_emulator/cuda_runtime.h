// The CUDA C++ that our kernels use, on the emulator.
#pragma once

#include <algorithm>
#include <cmath>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};

#define threadIdx (emulator::fiber().thread)
#define blockIdx (dim3{static_cast<unsigned>(emulator::fiber().block->index), 0, 0})
#define blockDim (emulator::Launch::active->block_dim)
#define gridDim (emulator::Launch::active->grid_dim)

inline void __syncthreads() {
  emulator::Launch::active->wait_at(emulator::fiber().block->barrier);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, emulator::fiber().lane() ^ mask);
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
