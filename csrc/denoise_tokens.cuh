// Rows of tokens in the denoise kernel: residual, norms, head, guidance, scheduler and embedding.
//
// Every token belongs to one block, which keeps its residual in shared memory for all steps. A
// thread has kVector neighbouring columns of a token's rows, one row a guidance pass. What it reads
// from memory it asks for at once, before the first sum: sums are barriers, behind which the next
// read would wait anew.
#pragma once

#include "denoise_layout.cuh"
#include "numeric.cuh"

namespace nova {

constexpr int kVector = 4;
constexpr int kMaxVectors = 2;  // of a thread, for rows of up to 2048
constexpr int kOutputs = 2;     // of the head that a warp computes at a time
constexpr float kNormEps = 1e-5f;
constexpr float kAdaNormEps = 1e-6f;

// T is float16 or bfloat16, PASSES the guidance passes.
template <typename T, int PASSES>
class DenoiseTokens {
 public:
  __device__ DenoiseTokens(const DenoiseArguments& arguments, const DenoiseMemory& memory)
      : a(arguments),
        m(memory),
        rows(PASSES * arguments.tokens),
        lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize) {}

  // Calls work(token, place) for the tokens that this block owns, by all of its threads.
  template <typename Work>
  __device__ void for_owned(Work work) const {
    int place = 0;
    for (int token = blockIdx.x; token < a.tokens; token += gridDim.x) work(token, place++);
  }

  // Begins with an owned token, which is the place-th one of this block.
  __device__ void read(int token, int place) {
    for (int i = threadIdx.x; i < a.token_dim; i += kDenoiseThreads) {
      m.tokens[place * a.token_dim + i] =
          to_float(static_cast<const T*>(a.x)[token * a.token_dim + i]);
    }
    if (threadIdx.x == 0) {
      m.outside[place] = a.outside == nullptr ? 0.0f : a.outside[token / a.tokens_per_sample];
    }
    __syncthreads();
  }

  // residual = the embedded token, the same for all passes; normed = what the first block takes.
  __device__ void embed(int step, int token, int place) {
    const T* weight = static_cast<const T*>(a.embed_weight);
    const Modulation modulation = modulation_of(step, 0, token);
    Rows r = {};
#pragma unroll
    for (int i = 0; i < kMaxVectors; ++i) {
      if (column(i) >= a.width) break;
      float sum[kVector];
      load(static_cast<const T*>(a.embed_bias) + column(i), sum);
#pragma unroll 4
      for (int k = 0; k < a.token_dim; k += kVector) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          float factor[kVector];
          load(weight + (column(i) + j) * a.token_dim + k, factor);
#pragma unroll
          for (int n = 0; n < kVector; ++n) {
            sum[j] += factor[n] * m.tokens[place * a.token_dim + k + n];
          }
        }
      }
#pragma unroll
      for (int pass = 0; pass < PASSES; ++pass) {
        store(residual_row(pass, place) + column(i), sum);
#pragma unroll
        for (int j = 0; j < kVector; ++j) r.value[pass][i][j] = sum[j];
      }
    }
    modulate(r, modulation);
    store_normed(r, token);
  }

  // residual += gate * LN(branch), then what the next block or the head takes: into normed for a
  // block, into work for the head.
  __device__ void add_branch(int step, int block, int token, int place) {
    Rows r = {};
    for_values([&](int pass, int i) {
      const int row = pass * a.tokens + token;
      load_through_l2(a.branch + row * a.width + column(i), r.value[pass][i]);
    });
    const Packs gates = packs_of([&](int pass) { return vector_of(step, block, pass, token, 2); });
    const T *norm_weight = static_cast<const T*>(a.norm_weight[block]),
            *norm_bias = static_cast<const T*>(a.norm_bias[block]);
    const Packs weights = packs_of([&](int) { return norm_weight; });
    const Packs biases = packs_of([&](int) { return norm_bias; });
    const Modulation modulation = modulation_of(step, block + 1, token);
    standardize(r, kNormEps);
    for_values([&](int pass, int i) {
      float gate[kVector], weight[kVector], bias[kVector], before[kVector];
      unpack(gates.value[pass][i], gate);
      unpack(weights.value[pass][i], weight);
      unpack(biases.value[pass][i], bias);
      float* kept = residual_row(pass, place) + column(i);
      load(kept, before);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        r.value[pass][i][j] = before[j] + gate[j] * (r.value[pass][i][j] * weight[j] + bias[j]);
      }
      store(kept, r.value[pass][i]);
    });
    modulate(r, modulation);
    if (block + 1 < a.depth) {
      store_normed(r, token);
    } else {
      for_values([&](int pass, int i) {
        store(m.work + pass * a.width + column(i), r.value[pass][i]);
      });
      __syncthreads();
    }
  }

  // The head: predictions of an owned token, some neighbouring outputs a warp.
  __device__ void predict(int step, int token, int place) {
    float* prediction = m.predictions + place * PASSES * a.token_dim;
    for (int first = warp * kOutputs; first < a.token_dim; first += kDenoiseWarps * kOutputs) {
      const T* weight = static_cast<const T*>(a.head_weight) + first * a.width;
      float sum[kOutputs][PASSES] = {}, bias[kOutputs];
      load(static_cast<const T*>(a.head_bias) + first, bias);
#pragma unroll 5
      for (int k = lane * kVector; k < a.width; k += kWarpSize * kVector) {
        float factor[kOutputs][kVector];
#pragma unroll
        for (int n = 0; n < kOutputs; ++n) load(weight + n * a.width + k, factor[n]);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
          float value[kVector];
          load(m.work + pass * a.width + k, value);
#pragma unroll
          for (int n = 0; n < kOutputs; ++n) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) sum[n][pass] += factor[n][j] * value[j];
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kOutputs; ++n) {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
          const float total = warp_sum(sum[n][pass]);
          if (lane == 0) prediction[pass * a.token_dim + first + n] = total + bias[n];
        }
      }
    }
    __syncthreads();
    if (renormalises(step) && warp == 0) keep_squares(step, token, prediction);
  }

  __device__ bool renormalises(int step) const {
    return PASSES > 1 && a.numbers[step].renorm < 1.0f;
  }

  // The scheduler's update of an owned token. Where step renormalises, all blocks have to have made
  // their predictions.
  __device__ void update(int step, int token, int place) {
    const StepNumbers n = a.numbers[step];
    const float factor = renormalises(step) ? renormalisation(step, token, place) : 1.0f;
    const float* prediction = m.predictions + place * PASSES * a.token_dim;
    __syncthreads();
    for (int i = threadIdx.x; i < a.token_dim; i += kDenoiseThreads) {
      float value = factor * guided(n, prediction, i);
      if (PASSES == 3) {
        value +=
            n.image_guidance * (prediction[2 * a.token_dim + i] - prediction[a.token_dim + i]);
      }
      float& x = m.tokens[place * a.token_dim + i];
      x = n.sample * x + n.prediction * value;
      const size_t at = static_cast<size_t>(token) * a.token_dim + i;
      if (n.noise != 0.0f) {
        const T* noise = static_cast<const T*>(a.noise);
        x += n.noise * to_float(noise[static_cast<size_t>(step) * a.tokens * a.token_dim + at]);
      }
      if (step + 1 == a.steps) static_cast<T*>(a.out)[at] = from_float<T>(x);
    }
    if (PASSES > 1 && threadIdx.x == 0) {
      // Outside of the set every pass predicts the tokens themselves.
      const float change = n.sample + n.prediction * factor;
      m.outside[place] *= change * change;
      const bool reports = a.outside != nullptr && token % a.tokens_per_sample == 0;
      if (reports && step + 1 == a.steps) {
        a.outside[token / a.tokens_per_sample] = m.outside[place];
      }
    }
    __syncthreads();
  }

 private:
  // A thread has kVector columns of a row from column(i) on, for every i with column(i) < width.
  __device__ static int column(int i) {
    return (i * kDenoiseThreads + static_cast<int>(threadIdx.x)) * kVector;
  }

  // Rows and packs begin as zeros: what lies behind the width is never set, and the compiler would
  // keep it from call to call, in registers.
  struct Rows {
    float value[PASSES][kMaxVectors][kVector];
  };

  template <typename Function>
  __device__ void for_values(Function function) const {
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll
      for (int i = 0; i < kMaxVectors; ++i) {
        if (column(i) < a.width) function(pass, i);
      }
    }
  }

  // LayerNorm without parameters, of one row a pass.
  __device__ void standardize(Rows& r, float eps) {
    float mean[PASSES] = {}, variance[PASSES] = {};
    for_values([&](int pass, int i) {
#pragma unroll
      for (float value : r.value[pass][i]) mean[pass] += value;
    });
    block_sum<kDenoiseWarps>(mean, m.sums);
#pragma unroll
    for (float& value : mean) value /= a.width;
    for_values([&](int pass, int i) {
#pragma unroll
      for (float& value : r.value[pass][i]) {
        value -= mean[pass];
        variance[pass] += value * value;
      }
    });
    block_sum<kDenoiseWarps>(variance, m.sums + kDenoiseWarps * PASSES);
    for_values([&](int pass, int i) {
      const float inverse = rsqrtf(variance[pass] / a.width + eps);
#pragma unroll
      for (float& value : r.value[pass][i]) value *= inverse;
    });
  }

  // The thread's values of vectors of the width, as they lie in memory; one vector a pass.
  struct Packs {
    Pack<T, kVector> value[PASSES][kMaxVectors];
  };

  template <typename Vector>
  __device__ Packs packs_of(Vector vector) const {
    Packs packs = {};
    for_values([&](int pass, int i) {
      packs.value[pass][i] = load_pack<kVector>(vector(pass) + column(i));
    });
    return packs;
  }

  // Vector `part` (0 for 1 + scale, 1 shift, 2 gate) of a row's modulation.
  __device__ const T* vector_of(int step, int block, int pass, int token, int part) const {
    const int parts = block < a.depth ? 3 : 2, row = pass * a.tokens + token;
    const T* all = static_cast<const T*>(a.modulation[block]);
    return all + ((static_cast<size_t>(step) * rows + row) * parts + part) * a.width;
  }

  struct Modulation {
    Packs scales, shifts;
  };

  // Of what comes before a block, or the head (block == depth).
  __device__ Modulation modulation_of(int step, int block, int token) const {
    return {packs_of([&](int pass) { return vector_of(step, block, pass, token, 0); }),
            packs_of([&](int pass) { return vector_of(step, block, pass, token, 1); })};
  }

  // r = LN(r) * (1 + scale) + shift.
  __device__ void modulate(Rows& r, const Modulation& modulation) {
    standardize(r, kAdaNormEps);
    for_values([&](int pass, int i) {
      float scale[kVector], shift[kVector];
      unpack(modulation.scales.value[pass][i], scale);
      unpack(modulation.shifts.value[pass][i], shift);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        r.value[pass][i][j] = r.value[pass][i][j] * scale[j] + shift[j];
      }
    });
  }

  __device__ void store_normed(const Rows& r, int token) {
    for_values([&](int pass, int i) {
      const int row = pass * a.tokens + token;
      store(static_cast<T*>(a.normed) + row * a.width + column(i), r.value[pass][i]);
    });
  }

  __device__ float* residual_row(int pass, int place) {
    return m.residual + (place * PASSES + pass) * a.width;
  }

  // What guidance makes of value i of the passes, before it is renormalised.
  __device__ float guided(const StepNumbers& n, const float* prediction, int i) const {
    const float cond = prediction[i];
    if (PASSES == 1) return cond;
    const float uncond = prediction[a.token_dim + i];
    const float image = prediction[(PASSES - 1) * a.token_dim + i];
    return uncond + n.guidance * (cond - (PASSES == 2 ? uncond : image));
  }

  // squares[token] = squared norms of the conditional and of the guided prediction; by one warp.
  __device__ void keep_squares(int step, int token, const float* prediction) {
    const StepNumbers n = a.numbers[step];
    float cond = 0.0f, all = 0.0f;
    for (int i = lane; i < a.token_dim; i += kWarpSize) {
      const float value = guided(n, prediction, i);
      cond += prediction[i] * prediction[i];
      all += value * value;
    }
    cond = warp_sum(cond), all = warp_sum(all);
    if (lane == 0) a.squares[2 * token] = cond, a.squares[2 * token + 1] = all;
  }

  // By what renormalisation multiplies the guided prediction of a token's sample; all threads.
  __device__ float renormalisation(int step, int token, int place) {
    const int first = token / a.tokens_per_sample * a.tokens_per_sample;
    float cond = 0.0f, all = 0.0f;
    for (int i = lane; i < a.tokens_per_sample; i += kWarpSize) {
      cond += load_through_l2(a.squares + 2 * (first + i));
      all += load_through_l2(a.squares + 2 * (first + i) + 1);
    }
    const float around = m.outside[place];
    const float factor = sqrtf(warp_sum(cond) + around) / sqrtf(warp_sum(all) + around);
    // Nothing predicted makes 0 / 0, which stays NaN as in the reference.
    const float least = a.numbers[step].renorm;
    return factor < least ? least : factor > 1.0f ? 1.0f : factor;
  }

  const DenoiseArguments& a;
  const DenoiseMemory& m;
  const int rows, lane, warp;
};

}  // namespace nova
