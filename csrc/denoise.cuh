// The denoise loop of a set of tokens as one kernel that stays on the GPU for all steps.
//
// Blocks share the outputs of every linear layer among themselves and keep their weights in shared
// memory. Rows of activations go through L2, with a barrier of the whole grid between phases:
//
//   first layer  -> hidden   every block
//   second layer -> branch   every block
//   residual, norms, and at a step's end prediction, update and embedding:
//                -> normed   the block that owns the row's token
//
// docs/denoise.md counts its bytes and barriers, and says what they should cost.
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
  tokens.for_owned([&](int token, int place) {
    tokens.read(token, place);
    tokens.embed(0, token, place);
  });
  grid.sync();
  for (int step = 0; step < a.steps; ++step) {
    const bool last_step = step + 1 == a.steps;
    for (int block = 0; block < a.depth; ++block) {
      layers.template multiply<true>(step, 2 * block, static_cast<const T*>(a.normed));
      grid.sync();
      layers.template multiply<false>(step, 2 * block + 1, static_cast<const T*>(a.hidden));
      grid.sync();
      tokens.for_owned([&](int token, int place) {
        tokens.add_branch(step, block, token, place);
        if (block + 1 == a.depth) tokens.predict(step, token, place);
      });
      if (block + 1 < a.depth) grid.sync();
    }
    // A sample's norm is made of the predictions of all of its tokens.
    if (tokens.renormalises(step)) grid.sync();
    tokens.for_owned([&](int token, int place) {
      tokens.update(step, token, place);
      if (!last_step) tokens.embed(step + 1, token, place);
    });
    if (!last_step) grid.sync();
  }
  wait_for_copies<0>();
}

using DenoiseKernel = void (*)(DenoiseArguments);

// The kernel for guidance passes and a plan's units.
template <typename T>
DenoiseKernel denoise_kernel_for(int passes, int units) {
  const bool few = units <= kFewUnits;
  switch (passes) {
    case 1: return few ? denoise_kernel<T, 1, kFewUnits> : denoise_kernel<T, 1, kMaxUnits>;
    case 2: return few ? denoise_kernel<T, 2, kFewUnits> : denoise_kernel<T, 2, kMaxUnits>;
    case 3: return few ? denoise_kernel<T, 3, kFewUnits> : denoise_kernel<T, 3, kMaxUnits>;
    default: throw std::invalid_argument("denoise: 1 to 3 passes");
  }
}

}  // namespace nova
