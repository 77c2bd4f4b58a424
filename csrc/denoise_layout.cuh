// How the denoise kernel divides threads and shared memory; denoise_plan.py does the same sums.
#pragma once

#include <primitives.cuh>

#include "arguments.h"
#include "block_sum.cuh"

namespace nova {

constexpr int kDenoiseWarps = 8;
constexpr int kDenoiseThreads = kDenoiseWarps * kWarpSize;
constexpr int kUnit = 8;   // outputs of a unit: the n of an mma
// Most units of a cluster: where clusters are of one block, and where they are of four.
constexpr int kFewUnits = 2, kMaxUnits = 6;
constexpr int kTile = 16;  // rows of a tile: the m of an mma

// Sizes of what a block keeps in shared memory, in bytes unless they count something else.
struct DenoiseLayout {
  int slot;   // one layer's slice of weights
  int work;   // partial sums of a layer, or rows before the head
  int owned;  // number of tokens that a block owns at most
  int pitch;  // floats of a row of partial sums; four more than its columns, against conflicts

  __device__ explicit DenoiseLayout(const DenoiseArguments& a) {
    const int blocks = a.clusters * a.cluster_size;
    slot = a.units * kUnit * (a.width / a.cluster_size) * 2;
    pitch = a.units * kUnit + 4;
    const int partials = kDenoiseWarps * kTile * pitch * static_cast<int>(sizeof(float));
    const int rows = a.passes * a.width * static_cast<int>(sizeof(float));
    work = partials > rows ? partials : rows;
    owned = (a.tokens + blocks - 1) / blocks;
  }
};

// The same as addresses. What is owned lies token after token.
struct DenoiseMemory {
  char* weights;       // (weight_slots, slot)
  float* work;
  float* residual;     // (owned, passes, width)
  float* tokens;       // (owned, token_dim)
  float* predictions;  // (owned, passes, token_dim)
  float* sums;         // (2, warps, passes), scratch of two sums in turn
  float* outside;      // (owned,) squared norm of the tokens outside, of each one's sample

  __device__ DenoiseMemory(const DenoiseArguments& a, const DenoiseLayout& layout) {
    weights = shared_memory();
    work = reinterpret_cast<float*>(weights + a.weight_slots * layout.slot);
    residual = work + layout.work / static_cast<int>(sizeof(float));
    tokens = residual + layout.owned * a.passes * a.width;
    predictions = tokens + layout.owned * a.token_dim;
    sums = predictions + layout.owned * a.passes * a.token_dim;
    outside = sums + 2 * kDenoiseWarps * a.passes;
  }
};

}  // namespace nova
