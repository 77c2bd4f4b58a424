// The denoise loop of a set of tokens as one kernel that stays on the GPU for all steps.
//
// Blocks share the outputs of every linear layer among themselves and keep their weights in shared
// memory. Rows of activations go through L2, with a barrier of the whole grid between phases:
//
//   embedding, norm -> normed   the block that owns the row's token
//   first layer     -> hidden   every block
//   second layer    -> branch   every block
//   residual, norms -> normed   the block that owns the row's token; behind the last layer also
//                               prediction and update
//
// docs/denoise.md counts its bytes and barriers, and says what they cost.
#pragma once

#include "denoise_layers.cuh"
#include "denoise_tokens.cuh"

#include <stdexcept>

namespace nova {

// A barrier of the whole grid, which has to run at once.
class GridBarrier {
 public:
  // arrivals: a counter in global memory, 0 at the start.
  __device__ explicit GridBarrier(unsigned* arrivals) : arrivals(arrivals) {}

  // Waits for all blocks; what they have written can be read past L1 then.
  __device__ void sync() {
    __syncthreads();
    reached += gridDim.x;
    if (threadIdx.x == 0) {
      arrive(arrivals);
      wait_until_reached(arrivals, reached);
    }
    __syncthreads();
  }

 private:
  unsigned* const arrivals;
  unsigned reached = 0;
};

// T is float16 or bfloat16, PASSES the guidance passes, UNITS the most units of a cluster.
template <typename T, int PASSES, int UNITS>
__global__ void __launch_bounds__(kDenoiseThreads, 1)
    denoise_kernel(const __grid_constant__ DenoiseArguments a) {
  const DenoiseLayout layout(a);
  const DenoiseMemory memory(a, layout);
  DenoiseLayers<T, UNITS> layers(a, layout, memory);
  DenoiseTokens<T, PASSES> tokens(a, memory);
  GridBarrier grid(a.arrivals);

  layers.load_first_weights();
  tokens.for_owned([&](int token, int place) { tokens.read(token, place); });
  layers.wait_for_resident_weights();
  // Every phase is in the code once: a step runs through all of it, and what does not fit the cache
  // of instructions is fetched again and again.
#pragma unroll 1
  for (int step = 0; step < a.steps; ++step) {
    tokens.for_owned([&](int token, int place) { tokens.embed(step, token, place); });
    grid.sync();
#pragma unroll 1
    for (int layer = 0; layer < 2 * a.depth; ++layer) {
      layers.multiply(step, layer);
      grid.sync();
      if (layers.is_first(layer)) continue;
      const int block = layer / 2;
      tokens.for_owned([&](int token, int place) {
        tokens.add_branch(step, block, token, place);
        if (block + 1 == a.depth) tokens.predict(step, token, place);
      });
      if (block + 1 < a.depth) grid.sync();
    }
    // A sample's norm is made of the predictions of all of its tokens.
    if (tokens.renormalises(step)) grid.sync();
    tokens.for_owned([&](int token, int place) { tokens.update(step, token, place); });
  }
  wait_for_copies<0>();
}

using DenoiseKernel = void (*)(DenoiseArguments);

// The kernel for a plan's units.
template <typename T, int PASSES>
DenoiseKernel denoise_kernel_for(int units) {
  if (units <= kFewUnits) return denoise_kernel<T, PASSES, kFewUnits>;
  if (units <= kSomeUnits) return denoise_kernel<T, PASSES, kSomeUnits>;
  return denoise_kernel<T, PASSES, kMaxUnits>;
}

// The kernel for guidance passes and a plan's units.
template <typename T>
DenoiseKernel denoise_kernel_for(int passes, int units) {
  switch (passes) {
    case 1: return denoise_kernel_for<T, 1>(units);
    case 2: return denoise_kernel_for<T, 2>(units);
    case 3: return denoise_kernel_for<T, 3>(units);
    default: throw std::invalid_argument("denoise: 1 to 3 passes");
  }
}

}  // namespace nova
