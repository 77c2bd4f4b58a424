// What launches are given: raw pointers, sizes and strides, without torch and without Python.
#pragma once

#include <cstdint>

namespace nova {

enum class Dtype { kFloat16, kBFloat16, kFloat32 };

constexpr int kMaxDenoiseDepth = 8;
// Of a launch. Their numbers travel with it, so that a captured launch needs no other memory.
constexpr int kMaxDenoiseSteps = 64;

// The numbers of a step (nova_kernels.StepCoefficients).
struct StepNumbers {
  float sample, prediction, noise, guidance, image_guidance, renorm;
};

// Sizes, tensors and scratch memory of a denoise launch; docs/denoise.md has the plan. T is float16
// or bfloat16; R = passes * tokens rows, pass after pass.
struct DenoiseArguments {
  Dtype dtype = Dtype::kBFloat16;
  // Sizes.
  int tokens = 0;             // of all samples
  int tokens_per_sample = 0;
  int passes = 0;             // 1 to 3
  int width = 0;
  int token_dim = 0;
  int depth = 0;
  int steps = 0;
  // The plan (nova_kernels/cuda_kernels/denoise_plan.py).
  int clusters = 0;
  int cluster_size = 0;       // blocks that share a layer's inputs
  int units = 0;              // most units of eight outputs that a cluster has of a layer
  int weight_slots = 0;       // slices of layers in shared memory: 2 * depth, or 2 to stream them
  int shared_bytes = 0;       // of a block
  // Input and output.
  const void* x = nullptr;               // T (tokens, token_dim)
  void* out = nullptr;                   // T (tokens, token_dim); may be x
  const void* noise = nullptr;           // T (steps, tokens, token_dim), or null
  float* outside = nullptr;              // (samples,) squared norms, updated; or null
  StepNumbers numbers[kMaxDenoiseSteps] = {};
  // Weights, as torch's linear layers hold them: (outputs, inputs).
  const void* embed_weight = nullptr;    // T (width, token_dim)
  const void* embed_bias = nullptr;
  const void* layer_weight[2 * kMaxDenoiseDepth] = {};  // T (width, width): fc1, fc2 of each block
  const void* layer_bias[2 * kMaxDenoiseDepth] = {};
  const void* norm_weight[kMaxDenoiseDepth] = {};
  const void* norm_bias[kMaxDenoiseDepth] = {};
  const void* head_weight = nullptr;     // T (token_dim, width)
  const void* head_bias = nullptr;
  // T (steps, R, 3 * width) of each block: 1 + scale, shift, gate; last, without gate, the head's.
  const void* modulation[kMaxDenoiseDepth + 1] = {};
  // Scratch memory.
  void* normed = nullptr;                // T (R, width)
  void* hidden = nullptr;                // T (R, width)
  float* branch = nullptr;               // (R, width)
  float* squares = nullptr;              // (tokens, 2)
  unsigned* arrivals = nullptr;          // one counter; launch_denoise sets it to 0
};

// A tensor of rows (num_rows, width), seen as (outer, inner, width): row o * inner + i begins at
// data + o * outer + i * inner. Strides count elements and are 0 where the tensor is broadcast.
struct StridedRows {
  void* data = nullptr;
  int64_t outer = 0, inner = 0;
};

// What ops on rows have in common; the tensors of a call are T = dtype.
struct RowArguments {
  Dtype dtype = Dtype::kFloat16;
  int num_rows = 0;
  int inner = 1;                         // size of the inner axis: num_rows = outer axis * inner
  int width = 0;
  float eps = 0.0f;
};

// out = LN(x) * (scale + scale_offset) + shift.
struct ScaleShiftArguments : RowArguments {
  StridedRows x, scale, shift, out;      // T
  float scale_offset = 1.0f;             // 0 where scale holds 1 + scale already
};

// Gradients of x and of scale, from that of out.
struct ScaleShiftBackwardArguments : RowArguments {
  StridedRows grad, x, scale, grad_x, grad_scale;  // T
  float scale_offset = 1.0f;
};

// out = x + gate * (LN(h) * weight + bias); no gate, and no weight and bias, where they are null.
struct ResidualNormArguments : RowArguments {
  StridedRows x, h, gate, out;           // T; out may be x
  const void* weight = nullptr;          // T (width,)
  const void* bias = nullptr;
};

// Gradients of h, of gate, and of weight and bias as sums over strips of rows.
struct ResidualNormBackwardArguments : RowArguments {
  StridedRows grad, h, gate, grad_h, grad_gate;  // T
  const void* weight = nullptr;          // T (width,)
  const void* bias = nullptr;
  int strip = 1;                         // neighbouring rows of a sum
  // (strips, width), strips = num_rows / strip, rounded up; at a multiple of 32 bytes where the
  // width is one of 8.
  float* weight_sums = nullptr;
  float* bias_sums = nullptr;
};

}  // namespace nova
