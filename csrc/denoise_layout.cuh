// How the denoise kernel divides threads and shared memory; denoise_plan.py does the same sums.
#pragma once

#include <primitives.cuh>

#include "arguments.h"
#include "block_sum.cuh"

namespace nova {

constexpr int kDenoiseWarps = 8;
constexpr int kDenoiseThreads = kDenoiseWarps * kWarpSize;
constexpr int kUnit = 8;  // outputs of a unit: the n of an mma
// Most units of a cluster that kernels are compiled for: for clusters of one block, two and four on
// cards of 132 multiprocessors.
constexpr int kFewUnits = 2, kSomeUnits = 3, kMaxUnits = 6;
constexpr int kTile = 16;  // rows of a tile: the m of an mma

// Sizes of what a block keeps in shared memory, in bytes unless they count something else.
struct DenoiseLayout {
  int slot;         // one layer's slice of weights
  int columns;      // number of outputs of a layer that a cluster has at most
  int split_pitch;  // of rows before the head; 64 bytes more than the width, for their banks
  int work;         // partial sums of a layer, or rows before the head and its partial sums
  int owned;        // number of tokens that a block owns at most

  __device__ explicit DenoiseLayout(const DenoiseArguments& a) {
    const int blocks = a.clusters * a.cluster_size;
    slot = a.units * kUnit * (a.width / a.cluster_size) * 2;
    columns = a.units * kUnit;
    const int partials = kDenoiseWarps * kTile * columns * static_cast<int>(sizeof(float));
    split_pitch = a.width + 32;
    const int head = a.passes * 2 * split_pitch * 2 +
                     kDenoiseWarps * kTile * a.passes * static_cast<int>(sizeof(float));
    work = partials > head ? partials : head;
    owned = (a.tokens + blocks - 1) / blocks;
  }
};

// The same as addresses. What is owned lies token after token.
struct DenoiseMemory {
  int split_pitch;     // as in DenoiseLayout
  char* weights;       // (weight_slots, slot)
  float* work;
  float* residual;     // (owned, passes, width)
  float* tokens;       // (owned, token_dim)
  float* predictions;  // (owned, passes, token_dim)
  float* statistics;   // (2, passes, kDenoiseWarps, 4), scratch of two norms in turn
  float* biases;       // (layers, columns)
  float* outside;      // (owned,) squared norm of the tokens outside, of each one's sample

  __device__ DenoiseMemory(const DenoiseArguments& a, const DenoiseLayout& layout) {
    weights = shared_memory();
    work = reinterpret_cast<float*>(weights + a.weight_slots * layout.slot);
    split_pitch = layout.split_pitch;
    residual = work + layout.work / static_cast<int>(sizeof(float));
    tokens = residual + layout.owned * a.passes * a.width;
    predictions = tokens + layout.owned * a.token_dim;
    statistics = predictions + layout.owned * a.passes * a.token_dim;
    biases = statistics + 2 * a.passes * kDenoiseWarps * 4;
    outside = biases + 2 * a.depth * layout.columns;
  }
};

}  // namespace nova
