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

constexpr int kVector = 8;       // neighbouring columns of a thread
constexpr int kTilesAhead = 10;  // tiles of the embedding that a warp computes at a time
constexpr int kHeadChunk = 32;   // inputs of a chunk of the head, 16 bytes a lane
constexpr int kHeadChunks = 5;   // chunks of the head's inputs that a warp asks for before it waits
constexpr float kNormEps = 1e-5f;
constexpr float kAdaNormEps = 1e-6f;
static_assert(kDenoiseThreads * kVector == 2048, "a row of the largest width (denoise_plan.py)");

// The thread's columns of a row in float32: 16 bytes at a time.
template <typename Load>
__device__ inline void load_halves(float (&to)[kVector], Load load_half) {
#pragma unroll
  for (int first = 0; first < kVector; first += 4) {
    float half[4];
    load_half(first, half);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[first + j] = half[j];
  }
}
__device__ inline void load_floats(const float* from, float (&to)[kVector]) {
  load_halves(to, [&](int first, float (&half)[4]) { load(from + first, half); });
}
__device__ inline void load_floats_through_l2(const float* from, float (&to)[kVector]) {
  load_halves(to, [&](int first, float (&half)[4]) { load_through_l2(from + first, half); });
}
__device__ inline void store_floats(float* to, const float (&from)[kVector]) {
#pragma unroll
  for (int first = 0; first < kVector; first += 4) {
    const float half[4] = {from[first], from[first + 1], from[first + 2], from[first + 3]};
    store(to + first, half);
  }
}

// T is float16 or bfloat16, PASSES the guidance passes.
template <typename T, int PASSES>
class DenoiseTokens {
 public:
  __device__ DenoiseTokens(const DenoiseArguments& arguments, const DenoiseMemory& memory)
      : a(arguments),
        m(memory),
        rows(PASSES * arguments.tokens),
        lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize),
        column(threadIdx.x * kVector),
        has_columns(column < arguments.width),
        of_warp(values_of_warp()),
        per_value(1.0f / arguments.width),
        per_value_of_warp(of_warp > 0 ? 1.0f / of_warp : 0.0f) {}

  // Calls work(token, place) for the tokens that this block owns, by all of its threads.
  template <typename Work>
  __device__ void for_owned(Work work) {
    lane = kept_here(lane), warp = kept_here(warp), column = kept_here(column);
    int place = 0;
#pragma unroll 1
    for (int token = kept_here(blockIdx.x); token < a.tokens; token += gridDim.x) {
      work(token, place++);
    }
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
    const Modulation modulation = modulation_of(step, 0, token);
    const Octet biases = octet_of(static_cast<const T*>(a.embed_bias));
#pragma unroll 1
    for (int first = warp; first * kTile < a.width; first += kDenoiseWarps * kTilesAhead) {
      multiply_token(first, place);
    }
    __syncthreads();
    Rows r = {};
    for_passes([&](int pass) {
      float offset[kVector];
      unpack(biases, offset);
      load_floats(m.work + column, r.value[pass]);
#pragma unroll
      for (int j = 0; j < kVector; ++j) r.value[pass][j] += offset[j];
      store_floats(residual_row(pass, place) + column, r.value[pass]);
    });
    standardize(r, kAdaNormEps, m.statistics);
    scale_and_shift(r, modulation);
    store_normed(r, token);
  }

  // residual += gate * LN(branch), then what the next block or the head takes: into normed for a
  // block, into work for the head.
  __device__ void add_branch(int step, int block, int token, int place) {
    Rows r = {};
    for_passes([&](int pass) {
      const float* branch = a.branch + (pass * a.tokens + token) * a.width + column;
      load_floats_through_l2(branch, r.value[pass]);
    });
    const Packs gates = packs_of([&](int pass) { return vector_of(step, block, pass, token, 2); });
    const Octet weights = octet_of(static_cast<const T*>(a.norm_weight[block]));
    const Octet biases = octet_of(static_cast<const T*>(a.norm_bias[block]));
    const Modulation modulation = modulation_of(step, block + 1, token);
    standardize(r, kNormEps, m.statistics);
    for_passes([&](int pass) {
      float gate[kVector], weight[kVector], bias[kVector], before[kVector];
      unpack(gates.of[pass], gate);
      unpack(weights, weight);
      unpack(biases, bias);
      float* kept = residual_row(pass, place) + column;
      load_floats(kept, before);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        r.value[pass][j] = before[j] + gate[j] * (r.value[pass][j] * weight[j] + bias[j]);
      }
      store_floats(kept, r.value[pass]);
    });
    standardize(r, kAdaNormEps, m.statistics + kNormStatistics);
    scale_and_shift(r, modulation);
    if (block + 1 < a.depth) {
      store_normed(r, token);
    } else {
      for_passes([&](int pass) {
        T* parts = split_row(pass) + column;
        float rest[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          rest[j] = r.value[pass][j] - to_float(from_float<T>(r.value[pass][j]));
        }
        store(parts, r.value[pass]);
        store(parts + m.split_pitch, rest);
      });
      __syncthreads();
    }
  }

  // The head: predictions of an owned token. Its rows are in two parts, which half precision holds
  // and which together are nearly as good as float32: columns of one mma. Warps divide the inputs.
  __device__ void predict(int step, int token, int place) {
    float* prediction = m.predictions + place * PASSES * a.token_dim;
    float* partial = reinterpret_cast<float*>(split_row(PASSES));
#pragma unroll 1
    for (int first = 0; first < a.token_dim; first += kTile) {
      float sum[4] = {};
#pragma unroll 1
      for (int begin = warp; begin * kHeadChunk < a.width; begin += kDenoiseWarps * kHeadChunks) {
        add_head_chunks(sum, first, begin);
      }
      // A lane has rows g and g + 8, columns 2t and 2t + 1: both parts of pass t.
      if (lane % 4 < PASSES) {
        float* of_lane = partial + (warp * kTile + lane / 4) * PASSES + lane % 4;
        of_lane[0] = sum[0] + sum[1], of_lane[8 * PASSES] = sum[2] + sum[3];
      }
      __syncthreads();
      const int output = first + threadIdx.x / PASSES, pass = threadIdx.x % PASSES;
      if (threadIdx.x < kTile * PASSES && output < a.token_dim) {
        float total = to_float(static_cast<const T*>(a.head_bias)[output]);
#pragma unroll
        for (int w = 0; w < kDenoiseWarps; ++w) total += partial[w * kTile * PASSES + threadIdx.x];
        prediction[pass * a.token_dim + output] = total;
      }
      __syncthreads();
    }
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
    // All threads have read what the first one changes below.
    if (renormalises(step)) __syncthreads();
#pragma unroll 1
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
  // The thread's columns of a token's rows. Rows and packs begin as zeros: what lies behind the
  // width is never set, and the compiler would keep it from call to call, in registers.
  struct Rows {
    float value[PASSES][kVector];
  };

  // The same of vectors in memory.
  using Octet = Pack<T, kVector>;
  struct Packs {
    Octet of[PASSES];
  };

  // What comes before a block or the head takes of the rows' modulations.
  struct Modulation {
    Packs scales, shifts;
  };

  __device__ Octet octet_of(const T* vector) const {
    return has_columns ? load_pack<kVector>(vector + column) : Octet{};
  }

  template <typename Vector>
  __device__ Packs packs_of(Vector vector) const {
    Packs packs = {};
    for_passes([&](int pass) { packs.of[pass] = octet_of(vector(pass)); });
    return packs;
  }

  // Four values in half precision, as mma takes them.
  using FourValues = Pack<uint32_t, 2>;

  __device__ static FourValues load_four(const T* from) {
    FourValues four;
    memcpy(&four, __builtin_assume_aligned(from, sizeof(four)), sizeof(four));
    return four;
  }

  template <typename Function>
  __device__ void for_passes(Function function) const {
    if (!has_columns) return;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) function(pass);
  }

  // work = embedding weights times an owned token, for tiles first, first + kDenoiseWarps, ... of
  // 16 columns. The token is in two parts, as in predict: columns 0 and 1 of an mma.
  __device__ void multiply_token(int first, int place) {
    const T* weight = static_cast<const T*>(a.embed_weight);
    float sum[kTilesAhead][4] = {};
#pragma unroll 1
    for (int begin = 0; begin < a.token_dim; begin += 16) {
      // A lane has four neighbouring values where the mma wants pairs 2t and 2t + 8.
      const int k = begin + lane % 4 * 4;
      const bool inside = k < a.token_dim;
      FourValues upper[kTilesAhead] = {}, lower[kTilesAhead] = {};
#pragma unroll
      for (int i = 0; i < kTilesAhead; ++i) {
        const int tile = first + i * kDenoiseWarps;
        if (!inside || tile * kTile >= a.width) break;
        const T* from = weight + (tile * kTile + lane / 4) * a.token_dim + k;
        upper[i] = load_four(from), lower[i] = load_four(from + 8 * a.token_dim);
      }
      const FourValues x = inside ? token_part(place, k) : FourValues{};
#pragma unroll
      for (int i = 0; i < kTilesAhead; ++i) {
        const uint32_t of_tile[4] = {upper[i].value[0], lower[i].value[0], upper[i].value[1],
                                     lower[i].value[1]};
        multiply_add<T>(sum[i], of_tile, x.value);
      }
    }
    if (lane % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < kTilesAhead; ++i) {
      const int of = (first + i * kDenoiseWarps) * kTile + lane / 4;
      if (of >= a.width) break;
      m.work[of] = sum[i][0] + sum[i][1], m.work[of + 8] = sum[i][2] + sum[i][3];
    }
  }

  // Values k to k + 3 of an owned token: for lanes of an mma's column 0 as half precision holds
  // them, for those of column 1 what that leaves, for others zeros.
  __device__ FourValues token_part(int place, int k) const {
    float value[4], part[4];
    load(m.tokens + place * a.token_dim + k, value);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float rest = value[j] - to_float(from_float<T>(value[j]));
      part[j] = lane < 4 ? value[j] : lane < 8 ? rest : 0.0f;
    }
    Pack<T, 4> pack;
#pragma unroll
    for (int j = 0; j < 4; ++j) pack.value[j] = from_float<T>(part[j]);
    return load_four(pack.value);
  }

  // Of the row before the head, in half precision; behind it what that leaves.
  __device__ T* split_row(int pass) const {
    return reinterpret_cast<T*>(m.work) + pass * 2 * m.split_pitch;
  }

  // sum += outputs first to first + 15 of the head, of chunks begin, begin + kDenoiseWarps, ...
  __device__ void add_head_chunks(float (&sum)[4], int first, int begin) const {
    const T* weight = static_cast<const T*>(a.head_weight) + lane % 4 * 8;
    const int upper_row = first + lane / 4, lower_row = upper_row + 8;
    const uint4 zero = {0, 0, 0, 0};
    uint4 upper[kHeadChunks], lower[kHeadChunks];
#pragma unroll
    for (int i = 0; i < kHeadChunks; ++i) {
      const int k = (begin + i * kDenoiseWarps) * kHeadChunk;
      const bool has_upper = k < a.width && upper_row < a.token_dim;
      const bool has_lower = k < a.width && lower_row < a.token_dim;
      upper[i] = has_upper ? load_16_bytes(weight + upper_row * a.width + k) : zero;
      lower[i] = has_lower ? load_16_bytes(weight + lower_row * a.width + k) : zero;
    }
    // Column 2 * pass has the first parts of a pass, the next one the second parts.
    const bool has_column = lane / 4 < 2 * PASSES;
    const T* column_from =
        reinterpret_cast<const T*>(m.work) + lane / 4 * m.split_pitch + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < kHeadChunks; ++i) {
      const int k = (begin + i * kDenoiseWarps) * kHeadChunk;
      if (k >= a.width) break;
      const uint4 x = has_column ? load_16_bytes(column_from + k) : zero;
      const uint32_t a0[4] = {upper[i].x, lower[i].x, upper[i].y, lower[i].y};
      const uint32_t a1[4] = {upper[i].z, lower[i].z, upper[i].w, lower[i].w};
      const uint32_t b0[2] = {x.x, x.y}, b1[2] = {x.z, x.w};
      multiply_add<T>(sum, a0, b0);
      multiply_add<T>(sum, a1, b1);
    }
  }

  __device__ static uint4 load_16_bytes(const void* from) {
    return *static_cast<const uint4*>(from);
  }

  // LayerNorm without parameters. Warps make means and squared deviations of their own values,
  // which meet once, in `statistics`: (rows, warps, 4). How deviations from several means add up is
  // from Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
  // variances" (1979).
  __device__ void standardize(Rows& r, float eps, float* statistics) {
    float mean[PASSES] = {}, deviation[PASSES] = {};
    for_passes([&](int pass) {
#pragma unroll
      for (float value : r.value[pass]) mean[pass] += value;
    });
    warp_sums(mean);
#pragma unroll
    for (float& value : mean) value *= per_value_of_warp;
    for_passes([&](int pass) {
#pragma unroll
      for (float value : r.value[pass]) {
        deviation[pass] += (value - mean[pass]) * (value - mean[pass]);
      }
    });
    warp_sums(deviation);
    // Also of warps without columns, whose counts are 0.
    if (lane == 0) {
#pragma unroll
      for (int pass = 0; pass < PASSES; ++pass) {
        const float own[4] = {mean[pass], deviation[pass], static_cast<float>(of_warp), 0.0f};
        store(statistics + (pass * kDenoiseWarps + warp) * 4, own);
      }
    }
    __syncthreads();
    for_passes([&](int pass) {
      float of[kDenoiseWarps][4], sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int w = 0; w < kDenoiseWarps; ++w) {
        load(statistics + (pass * kDenoiseWarps + w) * 4, of[w]);
        sum += of[w][2] * of[w][0];
      }
      const float middle = sum * per_value;
#pragma unroll
      for (int w = 0; w < kDenoiseWarps; ++w) {
        const float apart = of[w][0] - middle;
        squares += of[w][1] + of[w][2] * apart * apart;
      }
      const float inverse = rsqrtf(squares * per_value + eps);
#pragma unroll
      for (float& value : r.value[pass]) value = (value - middle) * inverse;
    });
  }

  // How many values of a row the warp has.
  __device__ int values_of_warp() const {
    const int left = a.width / kVector - warp * kWarpSize;
    return (left < 0 ? 0 : left > kWarpSize ? kWarpSize : left) * kVector;
  }

  // Vector `part` (0 for 1 + scale, 1 shift, 2 gate) of a row's modulation.
  __device__ const T* vector_of(int step, int block, int pass, int token, int part) const {
    const int parts = block < a.depth ? 3 : 2, row = pass * a.tokens + token;
    const T* all = static_cast<const T*>(a.modulation[block]);
    return all + ((static_cast<size_t>(step) * rows + row) * parts + part) * a.width;
  }

  // Of what comes before a block, or the head (block == depth).
  __device__ Modulation modulation_of(int step, int block, int token) const {
    return {packs_of([&](int pass) { return vector_of(step, block, pass, token, 0); }),
            packs_of([&](int pass) { return vector_of(step, block, pass, token, 1); })};
  }

  // r = r * (1 + scale) + shift.
  __device__ void scale_and_shift(Rows& r, const Modulation& modulation) {
    for_passes([&](int pass) {
      float scale[kVector], shift[kVector];
      unpack(modulation.scales.of[pass], scale);
      unpack(modulation.shifts.of[pass], shift);
#pragma unroll
      for (int j = 0; j < kVector; ++j) r.value[pass][j] = r.value[pass][j] * scale[j] + shift[j];
    });
  }

  __device__ void store_normed(const Rows& r, int token) {
    for_passes([&](int pass) {
      const int row = pass * a.tokens + token;
      store(static_cast<T*>(a.normed) + row * a.width + column, r.value[pass]);
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
  const int rows;
  int lane, warp;
  int column;  // the first of the thread's
  const bool has_columns;
  const int of_warp;  // values of a row that the warp has
  const float per_value, per_value_of_warp;  // 1 / width, 1 / of_warp

  // Floats of one norm's statistics.
  static constexpr int kNormStatistics = PASSES * kDenoiseWarps * 4;
};

}  // namespace nova
