// The linear layers of the denoise kernel: a block's part of them, for all rows.
#pragma once

#include "denoise_layout.cuh"
#include "numeric.cuh"

namespace nova {

constexpr int kMaxUnits = 6;
constexpr int kChunk = 32;        // inputs of a chunk: the k of two mma, 16 bytes a lane
constexpr int kMaxTileGroup = 4;  // tiles that are computed at a time
constexpr int kChunksAhead = 5;   // chunks of rows that a warp asks for before it waits
constexpr int kQuad = 4;          // neighbouring outputs that a thread adds up and writes

// T is float16 or bfloat16.
template <typename T>
class DenoiseLayers {
 public:
  __device__ DenoiseLayers(const DenoiseArguments& arguments, const DenoiseLayout& layout,
                           const DenoiseMemory& memory)
      : a(arguments),
        slot_bytes(layout.slot),
        pitch(layout.pitch),
        weights(memory.weights),
        work(memory.work),
        rows(arguments.passes * arguments.tokens),
        layers(2 * arguments.depth),
        rank(arguments.cluster_size > 1 ? rank_in_cluster() : 0),
        cluster(static_cast<int>(blockIdx.x) / arguments.cluster_size),
        chunks(arguments.width / kChunk / arguments.cluster_size),
        lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize) {}

  // Begins to copy all layers that stay, or the first one.
  __device__ void load_first_weights() {
    const int count = resident() ? layers : 1;
    for (int layer = 0; layer < count; ++layer) copy_weights(layer, layer);
  }

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

 private:
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
      copy_async(weights + slot * slot_bytes + piece * 16, from);
    }
    commit_copies();
  }

  // Blocks of a cluster take its inputs in equal parts, by rank.
  __device__ int first_input() const { return rank * (a.width / a.cluster_size); }

  __device__ bool resident() const { return a.weight_slots >= layers; }

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
    return reinterpret_cast<const uint4*>(weights + slot * slot_bytes);
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
    float* upper = work + (warp * kTile + lane / 4) * pitch + lane % 4 * 2;
    float* lower = upper + 8 * pitch;
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
    const int vectors = units * kUnit / kQuad;
    const int count = tile_group * kTile * vectors;
    for (int item = rank * kDenoiseThreads + threadIdx.x; item < count;
         item += a.cluster_size * kDenoiseThreads) {
      const int tile_row = item / vectors, vector = item % vectors;
      const int row = first_tile * kTile + tile_row;
      if (row >= rows) break;
      const int unit = first_unit(layer) + vector * kQuad / kUnit * a.clusters;
      const int column = unit * kUnit + vector * kQuad % kUnit;
      float sum[kQuad];
      load(bias + column, sum);
      for (int peer = 0; peer < a.cluster_size; ++peer) {
        for (int group = 0; group < chunk_groups; ++group) {
          const int warp_row = (group * tile_group + tile_row / kTile) * kTile + tile_row % kTile;
          const float* mine = work + warp_row * pitch + vector * kQuad;
          float part[kQuad];
          load_from_peer(mine, peer, a.cluster_size, part);
#pragma unroll
          for (int j = 0; j < kQuad; ++j) sum[j] += part[j];
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

  const DenoiseArguments& a;
  const int slot_bytes, pitch;
  char* const weights;
  float* const work;
  const int rows, layers, rank, cluster, chunks, lane, warp;
};

}  // namespace nova
