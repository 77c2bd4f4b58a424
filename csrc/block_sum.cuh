// Sums over the threads of a block, in an order that never changes.
#pragma once

#include <primitives.cuh>

namespace nova {

constexpr int kWarpSize = 32;

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// Every one of N values becomes its sum over the warp; their shuffles do not wait for each other.
template <int N>
__device__ inline void warp_sums(float (&values)[N]) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (float& value : values) value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
}

// Every one of N values becomes its sum over `warps` warps, in all of their threads: a warp alone,
// or all of the block. scratch holds warps * N floats; before it is used again, the threads have to
// meet, for example in a sum that uses other scratch.
template <int N>
__device__ inline void sum_over_warps(float (&values)[N], int warps, float* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  warp_sums(values);
  if (warps == 1) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (lane == 0) scratch[warp * N + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = warp_sum(lane < warps ? scratch[lane * N + i] : 0.0f);
}

}  // namespace nova
