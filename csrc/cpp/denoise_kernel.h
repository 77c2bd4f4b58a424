// The loop over the steps, written for vectors of VECTOR_BYTES; included once for each instruction
// set (denoise_avx512.cpp and the like). docs/denoise.md has the formulas.
#pragma once

#include "denoise.h"
#include "vector.h"

namespace {

using nova::StepNumbers;
using nova::cpp::Block;
using nova::cpp::DenoiseArguments;
using nova::cpp::Linear;

constexpr int kPanel = 2 * kLanes;
// Rows that a tile of accumulators has; what AVX-512's 32 registers hold beside a panel's weights.
constexpr int kTileRows = VECTOR_BYTES == 64 ? 12 : 6;
constexpr float kAdaNormEps = 1e-6f, kNormEps = 1e-5f;

int padded(int size) { return (size + kPanel - 1) / kPanel * kPanel; }

// Rows r of a panel of outputs: bias + sum_k in[r][k] * weight[k].
template <int Rows>
void multiply_tile(const float* in, int in_stride, int inputs, const float* weight,
                   const float* bias, float* out, int out_stride) {
  Vector sums[Rows][2];
  for (int r = 0; r < Rows; ++r) {
    sums[r][0] = load(bias);
    sums[r][1] = load(bias + kLanes);
  }
  for (int k = 0; k < inputs; ++k, weight += kPanel) {
    const Vector low = load(weight), high = load(weight + kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Vector value = splat(in[r * in_stride + k]);
      sums[r][0] += value * low;
      sums[r][1] += value * high;
    }
  }
  for (int r = 0; r < Rows; ++r) {
    store(out + r * out_stride, sums[r][0]);
    store(out + r * out_stride + kLanes, sums[r][1]);
  }
}

template <int Rows>
void multiply_rows(int rows, const float* in, int in_stride, int inputs, const float* weight,
                   const float* bias, float* out, int out_stride) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      multiply_tile<Rows>(in, in_stride, inputs, weight, bias, out, out_stride);
    } else {
      multiply_rows<Rows - 1>(rows, in, in_stride, inputs, weight, bias, out, out_stride);
    }
  }
}

// out (rows, padded(outputs)) = in (rows, inputs) @ weight + bias.
void multiply(int rows, const float* in, int in_stride, int inputs, const Linear& linear,
              int outputs, float* out) {
  const int out_stride = padded(outputs);
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int o = 0; o < out_stride; o += kPanel) {
    for (int t = 0; t < tiles; ++t) {
      // Tiles of nearly equal size: small ones leave the multipliers waiting.
      const int first = rows * t / tiles, last = rows * (t + 1) / tiles;
      multiply_rows<kTileRows>(last - first, in + first * in_stride, in_stride, inputs,
                               linear.weight + static_cast<std::int64_t>(o) * inputs,
                               linear.bias + o, out + first * out_stride + o, out_stride);
    }
  }
}

struct Moments {
  float mean, scale;  // scale = 1 / sqrt(variance + eps)
};

Moments moments(const float* row, int width, float eps) {
  Vector total{};
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) total += load(row + i);
  float mean = sum(total);
  for (; i < width; ++i) mean += row[i];
  mean /= width;
  Vector squares{};
  for (i = 0; i + kLanes <= width; i += kLanes) {
    const Vector centred = load(row + i) - mean;
    squares += centred * centred;
  }
  float variance = sum(squares);
  for (; i < width; ++i) variance += (row[i] - mean) * (row[i] - mean);
  return {mean, 1.0f / __builtin_sqrtf(variance / width + eps)};
}

// out = LN(row) * scale + shift.
void modulate(const float* row, int width, const float* scale, const float* shift, float* out) {
  const Moments m = moments(row, width, kAdaNormEps);
  for (int i = 0; i < width; ++i) {
    out[i] = (row[i] - m.mean) * m.scale * scale[i] + shift[i];
  }
}

// row += gate * (LN(branch) * weight + bias).
void add_normed(float* row, const float* branch, int width, const float* gate, const float* weight,
                const float* bias) {
  const Moments m = moments(branch, width, kNormEps);
  for (int i = 0; i < width; ++i) {
    row[i] += gate[i] * ((branch[i] - m.mean) * m.scale * weight[i] + bias[i]);
  }
}

// One value of the prediction from those of 1 to 3 passes (nova_kernels/ops/diffusion_step.py).
float guided(const float* predictions, std::int64_t stride, int passes, const StepNumbers& step) {
  const float cond = predictions[0];
  if (passes == 1) return cond;
  const float uncond = predictions[stride];
  if (passes == 2) return uncond + step.guidance * (cond - uncond);
  const float image = predictions[2 * stride];
  return uncond + step.guidance * (cond - image) + step.image_guidance * (image - uncond);
}

std::int64_t workspace(const DenoiseArguments& a, int tokens) {
  const std::int64_t rows = static_cast<std::int64_t>(a.passes) * tokens;
  return rows * (4 * padded(a.width) + padded(a.token_dim));
}

void run(const DenoiseArguments& a, int first, int last, float* memory) {
  const int tokens = last - first, rows = a.passes * tokens;
  const int width = a.width, stride = padded(width), token_stride = padded(a.token_dim);
  float* state = memory;  // (rows, stride), as the next three
  float* normed = state + rows * stride;
  float* hidden = normed + rows * stride;
  float* branch = hidden + rows * stride;
  float* predictions = branch + rows * stride;  // (rows, token_stride)
  float* x = a.x + static_cast<std::int64_t>(first) * a.token_dim;
  // Row p * tokens + t of this thread is row p * a.tokens + first + t of a step's vectors.
  const auto vectors = [&](const float* all, int count, int step, int row) {
    const std::int64_t pass = row / tokens, token = first + row % tokens;
    return all + ((step * static_cast<std::int64_t>(a.passes) + pass) * a.tokens + token) * count *
                     width;
  };
  for (int step = 0; step < a.num_steps; ++step) {
    const StepNumbers& numbers = a.steps[step];
    multiply(tokens, x, a.token_dim, a.token_dim, a.embed, width, state);
    for (int pass = 1; pass < a.passes; ++pass) {
      std::memcpy(&state[pass * tokens * stride], state, tokens * stride * sizeof(float));
    }
    for (int b = 0; b < a.depth; ++b) {
      const Block& block = a.blocks[b];
      for (int row = 0; row < rows; ++row) {
        const float* scale = vectors(block.modulation, 3, step, row);
        modulate(&state[row * stride], width, scale, scale + width, &normed[row * stride]);
      }
      multiply(rows, normed, stride, width, block.fc1, width, hidden);
      for (int i = 0; i < rows * stride; i += kLanes) store(&hidden[i], silu(load(&hidden[i])));
      multiply(rows, hidden, stride, width, block.fc2, width, branch);
      for (int row = 0; row < rows; ++row) {
        const float* gate = vectors(block.modulation, 3, step, row) + 2 * width;
        add_normed(&state[row * stride], &branch[row * stride], width, gate, block.norm_weight,
                   block.norm_bias);
      }
    }
    for (int row = 0; row < rows; ++row) {
      const float* scale = vectors(a.head_modulation, 2, step, row);
      modulate(&state[row * stride], width, scale, scale + width, &normed[row * stride]);
    }
    multiply(rows, normed, stride, width, a.head, a.token_dim, predictions);
    for (int token = 0; token < tokens; ++token) {
      for (int i = 0; i < a.token_dim; ++i) {
        const float prediction = guided(&predictions[token * token_stride + i],
                                        static_cast<std::int64_t>(tokens) * token_stride, a.passes,
                                        numbers);
        const std::int64_t at = static_cast<std::int64_t>(token) * a.token_dim + i;
        float next = numbers.sample * x[at] + numbers.prediction * prediction;
        if (a.noise != nullptr && numbers.noise != 0.0f) {
          const std::int64_t row = static_cast<std::int64_t>(step) * a.tokens + first;
          next += numbers.noise * a.noise[row * a.token_dim + at];
        }
        x[at] = next;
      }
    }
  }
}

}  // namespace
