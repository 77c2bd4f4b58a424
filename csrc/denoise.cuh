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

#include <primitives.cuh>

#include "arguments.h"
#include "block_sum.cuh"
#include "numeric.cuh"

namespace nova {

constexpr int kDenoiseWarps = 8;
constexpr int kDenoiseThreads = kDenoiseWarps * kWarpSize;
constexpr int kUnit = 8;         // outputs of a unit: the n of an mma
constexpr int kMaxUnits = 6;
constexpr int kChunk = 32;       // inputs of a chunk: the k of two mma, 16 bytes a lane
constexpr int kTile = 16;        // rows of a tile: the m of an mma
constexpr int kMaxTileGroup = 4; // tiles that are computed at a time
constexpr int kChunksAhead = 5;  // chunks of rows that a warp asks for before it waits
constexpr int kVector = 4;       // neighbouring columns of a thread where it works on rows
constexpr int kMaxVectors = 2;   // of them, for rows of up to 2048
constexpr float kNormEps = 1e-5f;
constexpr float kAdaNormEps = 1e-6f;

// Where a block's shared memory holds what; sizes in bytes. denoise_plan.py computes the same sum.
struct DenoiseLayout {
  int slot;       // one layer's slice of weights
  int work;       // partial sums of a layer, or rows before the head
  int owned;      // tokens that a block owns at most
  int pitch;      // floats of a row of partial sums; four more than its columns, against conflicts

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

// One block at work. T is float16 or bfloat16, PASSES the guidance passes.
template <typename T, int PASSES>
class Denoiser {
 public:
  __device__ explicit Denoiser(const DenoiseArguments& arguments)
      : a(arguments),
        layout(arguments),
        rows(PASSES * arguments.tokens),
        layers(2 * arguments.depth),
        rank(arguments.cluster_size > 1 ? rank_in_cluster() : 0),
        cluster(static_cast<int>(blockIdx.x) / arguments.cluster_size),
        chunks(arguments.width / kChunk / arguments.cluster_size),
        lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize) {
    char* memory = shared_memory();
    weights = memory;
    memory += a.weight_slots * layout.slot;
    work = reinterpret_cast<float*>(memory);
    memory += layout.work;
    residual = reinterpret_cast<float*>(memory);
    tokens = residual + layout.owned * PASSES * a.width;
    predictions = tokens + layout.owned * a.token_dim;
    sums = predictions + layout.owned * PASSES * a.token_dim;
    outside = sums + kDenoiseWarps * PASSES;
  }

  __device__ void run() {
    load_first_weights();
    for_owned_tokens([&](int token, int place) {
      for (int i = threadIdx.x; i < a.token_dim; i += kDenoiseThreads) {
        tokens[place * a.token_dim + i] =
            to_float(static_cast<const T*>(a.x)[token * a.token_dim + i]);
      }
      if (threadIdx.x == 0) {
        outside[place] = a.outside == nullptr ? 0.0f : a.outside[token / a.tokens_per_sample];
      }
      __syncthreads();
      embed(0, token, place);
    });
    sync_grid();
    for (int step = 0; step < a.steps; ++step) {
      for (int block = 0; block < a.depth; ++block) {
        multiply<true>(step, 2 * block, static_cast<const T*>(a.normed));
        sync_grid();
        multiply<false>(step, 2 * block + 1, static_cast<const T*>(a.hidden));
        sync_grid();
        const bool last = block + 1 == a.depth;
        for_owned_tokens([&](int token, int place) {
          add_branch(step, block, token, place);
          if (last) predict(step, token, place);
        });
        if (last) finish_step(step);
        if (!last || step + 1 < a.steps) sync_grid();
      }
    }
    wait_for_copies<0>();
  }

 private:
  template <typename Work>
  __device__ void for_owned_tokens(Work work_on) {
    int place = 0;
    for (int token = blockIdx.x; token < a.tokens; token += gridDim.x) work_on(token, place++);
  }

  // Waits for all blocks; what they have written can be read past L1 then.
  __device__ void sync_grid() {
    __syncthreads();
    reached += gridDim.x;
    if (threadIdx.x == 0) {
      arrive(a.arrivals);
      wait_until_reached(a.arrivals, reached);
    }
    __syncthreads();
  }

  // Weights -------------------------------------------------------------------------------------

  // Units of a layer go to clusters in turn, and on from layer to layer, so that all have their
  // share: cluster c has unit c - layer * (units of a layer), modulo clusters, and every
  // a.clusters-th one after it.
  __device__ int first_unit(int layer) const {
    const int shifted = (cluster - layer * (a.width / kUnit)) % a.clusters;
    return shifted < 0 ? shifted + a.clusters : shifted;
  }

  __device__ int count_units(int layer) const {
    const int first = first_unit(layer), all = a.width / kUnit;
    return first < all ? (all - first + a.clusters - 1) / a.clusters : 0;
  }

  // Begins to copy this block's slice of a layer. Its 16-byte pieces lie in the order in which
  // lanes read them: [unit][chunk][lane], the lane's piece being eight inputs of output lane / 4.
  __device__ void copy_weights(int layer, int slot) {
    const T* weight = static_cast<const T*>(a.layer_weight[layer]) + first_input();
    const int first = first_unit(layer), pieces = count_units(layer) * chunks * kWarpSize;
    for (int piece = threadIdx.x; piece < pieces; piece += kDenoiseThreads) {
      const int at = piece % kWarpSize, chunk = piece / kWarpSize % chunks;
      const int unit = first + piece / kWarpSize / chunks * a.clusters;
      const T* from = weight + static_cast<size_t>(unit * kUnit + at / 4) * a.width +
                      chunk * kChunk + at % 4 * 8;
      copy_async(weights + slot * layout.slot + piece * 16, from);
    }
    commit_copies();
  }

  // Blocks of a cluster take its inputs in equal parts, by rank.
  __device__ int first_input() const { return rank * (a.width / a.cluster_size); }

  __device__ bool resident() const { return a.weight_slots >= layers; }

  __device__ void load_first_weights() {
    const int count = resident() ? layers : 1;
    for (int layer = 0; layer < count; ++layer) copy_weights(layer, layer);
  }

  // This block's slice of a layer, complete. Streaming, the next layer's is begun as well: its slot
  // was read before the last barrier.
  __device__ const uint4* weights_of(int step, int layer) {
    int slot = layer;
    if (resident()) {
      wait_for_copies<0>();
    } else {
      slot = (step * layers + layer) % 2;
      copy_weights((layer + 1) % layers, 1 - slot);
      wait_for_copies<1>();
    }
    __syncthreads();
    return reinterpret_cast<const uint4*>(weights + slot * layout.slot);
  }

  // Linear layers -------------------------------------------------------------------------------

  // hidden = silu(layer(in)) if FIRST, else branch = layer(in), for all rows. Warps divide tiles of
  // rows and chunks of inputs among themselves, so that no two read the same part of a row; blocks
  // of a cluster divide the inputs once more. Partial sums meet in shared memory.
  template <bool FIRST>
  __device__ void multiply(int step, int layer, const T* in) {
    const uint4* slice = weights_of(step, layer);
    const int tiles = (rows + kTile - 1) / kTile;
    const int tile_group = tiles >= 3 ? kMaxTileGroup : tiles;
    const int chunk_groups = kDenoiseWarps / tile_group;
    const int units = count_units(layer);
    for (int first = 0; first < tiles; first += tile_group) {
      const int tile = first + warp % tile_group;
      if (tile < tiles) {
        float sum[kMaxUnits][4] = {};
        accumulate(sum, in, slice, tile, warp / tile_group, chunk_groups, units);
        keep_partial(sum, units);
      }
      sync_cluster(a.cluster_size);
      finish<FIRST>(layer, first, tile_group, chunk_groups, units);
      if (first + tile_group < tiles) sync_cluster(a.cluster_size);
    }
  }

  // sum += rows of a tile times all units, over chunks `start`, `start + stride`, ...
  __device__ void accumulate(float (&sum)[kMaxUnits][4], const T* in, const uint4* slice, int tile,
                             int start, int stride, int units) const {
    const int upper = tile * kTile + lane / 4, lower = upper + 8;
    const T* column = in + first_input() + lane % 4 * 8;
    const uint4 zero = {0, 0, 0, 0};
    for (int begin = start; begin < chunks; begin += stride * kChunksAhead) {
      uint4 above[kChunksAhead], below[kChunksAhead];
#pragma unroll
      for (int i = 0; i < kChunksAhead; ++i) {
        const int chunk = begin + i * stride;
        const T* from = column + chunk * kChunk;
        const bool inside = chunk < chunks;
        above[i] = inside && upper < rows ? load_16_bytes_through_l2(from + upper * a.width) : zero;
        below[i] = inside && lower < rows ? load_16_bytes_through_l2(from + lower * a.width) : zero;
      }
#pragma unroll
      for (int i = 0; i < kChunksAhead; ++i) {
        const int chunk = begin + i * stride;
        if (chunk >= chunks) break;
        // A lane has eight neighbouring inputs where the mma wants pairs 2t and 2t + 8 of sixteen:
        // the sum over inputs may take them in any order that rows and weights share.
        const uint32_t a0[4] = {above[i].x, below[i].x, above[i].y, below[i].y};
        const uint32_t a1[4] = {above[i].z, below[i].z, above[i].w, below[i].w};
#pragma unroll
        for (int unit = 0; unit < kMaxUnits; ++unit) {
          if (unit >= units) break;
          const uint4 piece = slice[(unit * chunks + chunk) * kWarpSize + lane];
          const uint32_t b0[2] = {piece.x, piece.y}, b1[2] = {piece.z, piece.w};
          multiply_add<T>(sum[unit], a0, b0);
          multiply_add<T>(sum[unit], a1, b1);
        }
      }
    }
  }

  __device__ void keep_partial(const float (&sum)[kMaxUnits][4], int units) {
    float* upper = work + (warp * kTile + lane / 4) * layout.pitch + lane % 4 * 2;
    float* lower = upper + 8 * layout.pitch;
#pragma unroll
    for (int unit = 0; unit < kMaxUnits; ++unit) {
      if (unit >= units) break;
      upper[unit * kUnit] = sum[unit][0], upper[unit * kUnit + 1] = sum[unit][1];
      lower[unit * kUnit] = sum[unit][2], lower[unit * kUnit + 1] = sum[unit][3];
    }
  }

  // Adds the partial sums of warps and of the cluster's blocks, always in one order, and the bias.
  template <bool FIRST>
  __device__ void finish(int layer, int first_tile, int tile_group, int chunk_groups, int units) {
    const T* bias = static_cast<const T*>(a.layer_bias[layer]);
    const int vectors = units * kUnit / kVector;
    const int count = tile_group * kTile * vectors;
    for (int item = rank * kDenoiseThreads + threadIdx.x; item < count;
         item += a.cluster_size * kDenoiseThreads) {
      const int tile_row = item / vectors, vector = item % vectors;
      const int row = first_tile * kTile + tile_row;
      if (row >= rows) break;
      const int unit = first_unit(layer) + vector * kVector / kUnit * a.clusters;
      const int column = unit * kUnit + vector * kVector % kUnit;
      float sum[kVector];
      load(bias + column, sum);
      for (int peer = 0; peer < a.cluster_size; ++peer) {
        for (int group = 0; group < chunk_groups; ++group) {
          const int warp_row = (group * tile_group + tile_row / kTile) * kTile + tile_row % kTile;
          const float* mine = work + warp_row * layout.pitch + vector * kVector;
          float part[kVector];
          load_from_peer(mine, peer, a.cluster_size, part);
#pragma unroll
          for (int j = 0; j < kVector; ++j) sum[j] += part[j];
        }
      }
      if (FIRST) {
#pragma unroll
        for (float& value : sum) value = value / (1.0f + __expf(-value));
        store(static_cast<T*>(a.hidden) + row * a.width + column, sum);
      } else {
        store(a.branch + row * a.width + column, sum);
      }
    }
  }

  // Rows of owned tokens ------------------------------------------------------------------------

  // A thread has kVector columns of a row from column(i) on, for every i with column(i) < width.
  __device__ static int column(int i) {
    return (i * kDenoiseThreads + static_cast<int>(threadIdx.x)) * kVector;
  }

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
    block_sum<kDenoiseWarps>(mean, sums);
#pragma unroll
    for (float& value : mean) value /= a.width;
    for_values([&](int pass, int i) {
#pragma unroll
      for (float& value : r.value[pass][i]) {
        value -= mean[pass];
        variance[pass] += value * value;
      }
    });
    block_sum<kDenoiseWarps>(variance, sums);
    for_values([&](int pass, int i) {
      const float inverse = rsqrtf(variance[pass] / a.width + eps);
#pragma unroll
      for (float& value : r.value[pass][i]) value *= inverse;
    });
  }

  // Vector `part` (0 for 1 + scale, 1 shift, 2 gate) of a row's modulation.
  __device__ const T* modulation(int step, int block, int row, int part) const {
    const int parts = block < a.depth ? 3 : 2;
    const T* all = static_cast<const T*>(a.modulation[block]);
    return all + ((static_cast<size_t>(step) * rows + row) * parts + part) * a.width;
  }

  // r = LN(r) * (1 + scale) + shift, for what comes before a block, or the head (block == depth).
  __device__ void modulate(Rows& r, int step, int block, int token) {
    standardize(r, kAdaNormEps);
    for_values([&](int pass, int i) {
      const int row = pass * a.tokens + token;
      float scale[kVector], shift[kVector];
      load(modulation(step, block, row, 0) + column(i), scale);
      load(modulation(step, block, row, 1) + column(i), shift);
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
    return residual + (place * PASSES + pass) * a.width;
  }

  // residual += gate * LN(branch), then what the next block or the head takes: into normed for a
  // block, into work for the head.
  __device__ void add_branch(int step, int block, int token, int place) {
    Rows r;
    for_values([&](int pass, int i) {
      const int row = pass * a.tokens + token;
      load_through_l2(a.branch + row * a.width + column(i), r.value[pass][i]);
    });
    standardize(r, kNormEps);
    for_values([&](int pass, int i) {
      float gate[kVector], weight[kVector], bias[kVector], before[kVector];
      load(modulation(step, block, pass * a.tokens + token, 2) + column(i), gate);
      load(static_cast<const T*>(a.norm_weight[block]) + column(i), weight);
      load(static_cast<const T*>(a.norm_bias[block]) + column(i), bias);
      float* kept = residual_row(pass, place) + column(i);
      load(kept, before);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        r.value[pass][i][j] = before[j] + gate[j] * (r.value[pass][i][j] * weight[j] + bias[j]);
      }
      store(kept, r.value[pass][i]);
    });
    modulate(r, step, block + 1, token);
    if (block + 1 < a.depth) {
      store_normed(r, token);
    } else {
      for_values([&](int pass, int i) {
        store(work + pass * a.width + column(i), r.value[pass][i]);
      });
      __syncthreads();
    }
  }

  // The head: predictions of an owned token, one warp an output.
  __device__ void predict(int step, int token, int place) {
    float* prediction = predictions + place * PASSES * a.token_dim;
    for (int output = warp; output < a.token_dim; output += kDenoiseWarps) {
      const T* weight = static_cast<const T*>(a.head_weight) + output * a.width;
      float sum[PASSES] = {};
      for (int k = lane * kVector; k < a.width; k += kWarpSize * kVector) {
        float factor[kVector];
        load(weight + k, factor);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) sum[pass] += factor[j] * work[pass * a.width + k + j];
        }
      }
#pragma unroll
      for (int pass = 0; pass < PASSES; ++pass) {
        const float total = warp_sum(sum[pass]);
        if (lane == 0) {
          prediction[pass * a.token_dim + output] =
              total + to_float(static_cast<const T*>(a.head_bias)[output]);
        }
      }
    }
    __syncthreads();
    if (renormalises(step) && warp == 0) keep_squares(step, token, prediction);
  }

  // Guidance ------------------------------------------------------------------------------------

  __device__ bool renormalises(int step) const {
    return PASSES > 1 && a.numbers[step].renorm < 1.0f;
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
    const float around = outside[place];
    const float factor = sqrtf(warp_sum(cond) + around) / sqrtf(warp_sum(all) + around);
    // Nothing predicted makes 0 / 0, which stays NaN as in the reference.
    const float least = a.numbers[step].renorm;
    return factor < least ? least : factor > 1.0f ? 1.0f : factor;
  }

  // The scheduler's update of owned tokens, and their embedding for the next step.
  __device__ void finish_step(int step) {
    const bool renorm = renormalises(step);
    if (renorm) sync_grid();
    for_owned_tokens([&](int token, int place) {
      const StepNumbers n = a.numbers[step];
      const float factor = renorm ? renormalisation(step, token, place) : 1.0f;
      const float* prediction = predictions + place * PASSES * a.token_dim;
      __syncthreads();
      for (int i = threadIdx.x; i < a.token_dim; i += kDenoiseThreads) {
        float value = factor * guided(n, prediction, i);
        if (PASSES == 3) {
          value += n.image_guidance *
                   (prediction[2 * a.token_dim + i] - prediction[a.token_dim + i]);
        }
        float& x = tokens[place * a.token_dim + i];
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
        outside[place] *= change * change;
        const bool reports = a.outside != nullptr && token % a.tokens_per_sample == 0;
        if (reports && step + 1 == a.steps) {
          a.outside[token / a.tokens_per_sample] = outside[place];
        }
      }
      __syncthreads();
      if (step + 1 < a.steps) embed(step + 1, token, place);
    });
  }

  // residual = the embedded token, the same for all passes; normed = what the first block takes.
  __device__ void embed(int step, int token, int place) {
    const T* weight = static_cast<const T*>(a.embed_weight);
    Rows r;
#pragma unroll
    for (int i = 0; i < kMaxVectors; ++i) {
      if (column(i) >= a.width) break;
      float sum[kVector];
      load(static_cast<const T*>(a.embed_bias) + column(i), sum);
      for (int k = 0; k < a.token_dim; k += kVector) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          float factor[kVector];
          load(weight + (column(i) + j) * a.token_dim + k, factor);
#pragma unroll
          for (int m = 0; m < kVector; ++m) {
            sum[j] += factor[m] * tokens[place * a.token_dim + k + m];
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
    modulate(r, step, 0, token);
    store_normed(r, token);
  }

  const DenoiseArguments& a;
  const DenoiseLayout layout;
  const int rows, layers, rank, cluster, chunks, lane, warp;
  unsigned reached = 0;
  char* weights;
  float *work, *residual, *tokens, *predictions, *sums, *outside;
};

template <typename T, int PASSES>
__global__ void __launch_bounds__(kDenoiseThreads, 1)
    denoise_kernel(const __grid_constant__ DenoiseArguments arguments) {
  Denoiser<T, PASSES>(arguments).run();
}

}  // namespace nova
