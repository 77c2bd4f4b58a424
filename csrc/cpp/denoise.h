// The denoise loop of a set on a CPU: all steps of the diffusion MLP in float32, in one call.
// Python (nova_kernels/cpp_kernels/denoise.py) checks shapes and packs the weights.
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace nova::cpp {

// A linear layer. The weight is packed in panels of `Kernel::panel` outputs: (outputs / panel,
// inputs, panel), and bias and outputs are padded with zeros to whole panels.
struct Linear {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct Block {
  Linear fc1, fc2;
  const float* norm_weight = nullptr;  // (width,)
  const float* norm_bias = nullptr;
  const float* modulation = nullptr;   // (steps, passes, tokens, 3 * width): 1 + scale, shift, gate
};

// Contiguous float32 tensors; tokens are those of all samples. No class templates here: kernels for
// newer instructions read this, and the linker may take their copy of a template's code for all.
struct DenoiseArguments {
  int tokens = 0;
  int passes = 0;                      // 1 to 3
  int width = 0;
  int token_dim = 0;
  int num_steps = 0;
  int depth = 0;
  const StepNumbers* steps = nullptr;
  Linear embed, head;
  const Block* blocks = nullptr;
  const float* head_modulation = nullptr;  // (steps, passes, tokens, 2 * width): 1 + scale, shift
  const float* noise = nullptr;        // (steps, tokens, token_dim), or null
  float* x = nullptr;                  // (tokens, token_dim), changed in place
};

// Of one instruction set.
struct Kernel {
  const char* name;
  int panel;  // outputs of a panel of packed weights
  // Floats of memory that `run` needs for so many tokens.
  std::int64_t (*workspace)(const DenoiseArguments& arguments, int tokens);
  // Takes tokens first .. last - 1 through all steps.
  void (*run)(const DenoiseArguments& arguments, int first, int last, float* workspace);
};
const Kernel& avx512_kernel();
const Kernel& avx2_kernel();
const Kernel& portable_kernel();

}  // namespace nova::cpp
