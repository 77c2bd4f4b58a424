// The linear layers of the denoise kernel: a block's part of them, for all rows.
#pragma once

#include "denoise_layout.cuh"
#include "numeric.cuh"

namespace nova {

constexpr int kChunk = 32;         // inputs of a chunk: the k of two mma, 16 bytes a lane
constexpr int kMaxGroupShift = 2;  // 2^2 tiles are computed at a time
constexpr int kWarpShift = 3;      // of the warps, 2^3
constexpr int kTileShift = 4;      // of a tile's rows, 2^4
constexpr int kPartsAhead = 8;     // partial sums that a thread asks for before it waits
constexpr int kQuad = 4;           // neighbouring outputs that a thread adds up and writes
static_assert(1 << kWarpShift == kDenoiseWarps && 1 << kTileShift == kTile, "powers of two");

// T is float16 or bfloat16, UNITS the most units of a cluster that it is compiled for. Between two
// barriers every read that waits for another one counts, and so does every division: threads ask
// for all that they can at once, and indices are made of shifts.
template <typename T, int UNITS>
class DenoiseLayers {
  // Chunks of rows that a warp asks for before it waits. With few units, where clusters are of one
  // block and a warp has more chunks, there are registers for more.
  static constexpr int kChunksAhead = UNITS <= kFewUnits ? 10 : 5;

 public:
  __device__ DenoiseLayers(const DenoiseArguments& arguments, const DenoiseLayout& layout,
                           const DenoiseMemory& memory)
      : a(arguments),
        slot_bytes(layout.slot),
        pitch(layout.pitch),
        weights(memory.weights),
        work(memory.work),
        rows(arguments.passes * arguments.tokens),
        tiles((rows + kTile - 1) / kTile),
        group_shift(tiles > 2 ? kMaxGroupShift : tiles - 1),
        layers(2 * arguments.depth),
        rank(arguments.cluster_size > 1 ? rank_in_cluster() : 0),
        cluster(static_cast<int>(blockIdx.x) / arguments.cluster_size),
        units(count_units()),
        chunks(arguments.width / kChunk / arguments.cluster_size),
        share((units * (kUnit / kQuad) << (kTileShift + group_shift)) / arguments.cluster_size),
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
    const char* slice = weights_of(step, layer);
    const int tile_group = 1 << group_shift;
    for (int first = 0; first < tiles; first += tile_group) {
      const int tile = first + (warp & (tile_group - 1));
      if (tile < tiles) {
        float sum[UNITS][4] = {};
        const int chunk_group = warp >> group_shift;
        // One of those whose sums are added up begins with the bias.
        if (rank == 0 && chunk_group == 0) begin_with_bias(sum, layer);
        accumulate(sum, in, slice, tile, chunk_group, kDenoiseWarps >> group_shift);
        keep_partial(sum);
      }
      sync_cluster(a.cluster_size);
      finish<FIRST>(first);
      if (first + tile_group < tiles) sync_cluster(a.cluster_size);
    }
  }

 private:
  // A layer's units go to clusters in turn: cluster c has unit c and every a.clusters-th one after.
  __device__ int count_units() const {
    const int last = cluster + (a.units - 1) * a.clusters;
    return last < a.width / kUnit ? a.units : a.units - 1;
  }

  // The first output of a unit of this cluster.
  __device__ int column_of(int unit) const { return (cluster + unit * a.clusters) * kUnit; }

  // Begins to copy this block's slice of a layer. Its 16-byte pieces lie in the order in which
  // lanes read them: [unit][chunk][lane], the lane's piece being eight inputs of output lane / 4.
  __device__ void copy_weights(int layer, int slot) {
    const T* weight = static_cast<const T*>(a.layer_weight[layer]) + first_input();
    const int pieces = chunks * kWarpSize;
    for (int unit = 0; unit < units; ++unit) {
      char* to = weights + slot * slot_bytes + unit * pieces * 16;
      for (int piece = threadIdx.x; piece < pieces; piece += kDenoiseThreads) {
        const int at = piece % kWarpSize, chunk = piece / kWarpSize;
        const int output = column_of(unit) + at / 4;
        copy_async(to + piece * 16,
                   weight + static_cast<size_t>(output) * a.width + chunk * kChunk + at % 4 * 8);
      }
    }
    commit_copies();
  }

  // Blocks of a cluster take its inputs in equal parts, by rank.
  __device__ int first_input() const { return rank * (a.width / a.cluster_size); }

  __device__ bool resident() const { return a.weight_slots >= layers; }

  // This block's slice of a layer, complete. Streaming, the next layer's is begun as well: its slot
  // was read before the last barrier.
  __device__ const char* weights_of(int step, int layer) {
    int slot = layer;
    if (resident()) {
      wait_for_copies<0>();
    } else {
      slot = (step * layers + layer) % 2;
      copy_weights(layer + 1 < layers ? layer + 1 : 0, 1 - slot);
      wait_for_copies<1>();
    }
    __syncthreads();
    return weights + slot * slot_bytes;
  }

  // A unit that there is: where a cluster has fewer than UNITS, the last one is computed again, as
  // that is cheaper than branches, and its sums are left.
  __device__ int existing(int unit) const { return unit < units ? unit : units - 1; }

  __device__ void begin_with_bias(float (&sum)[UNITS][4], int layer) const {
    const T* bias = static_cast<const T*>(a.layer_bias[layer]) + lane % 4 * 2;
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      float pair[2];
      load(bias + column_of(existing(unit)), pair);
      sum[unit][0] = sum[unit][2] = pair[0], sum[unit][1] = sum[unit][3] = pair[1];
    }
  }

  // sum += rows of a tile times all units, over chunks `start`, `start + stride`, ...
  __device__ void accumulate(float (&sum)[UNITS][4], const T* in, const char* slice, int tile,
                             int start, int stride) const {
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
        const char* pieces = slice + (chunk * kWarpSize + lane) * 16;
        uint4 piece[UNITS];
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
          const char* from = pieces + existing(unit) * chunks * kWarpSize * 16;
          piece[unit] = *reinterpret_cast<const uint4*>(from);
        }
        // A lane has eight neighbouring inputs where the mma wants pairs 2t and 2t + 8 of sixteen:
        // the sum over inputs may take them in any order that rows and weights share.
        const uint32_t a0[4] = {above[i].x, below[i].x, above[i].y, below[i].y};
        const uint32_t a1[4] = {above[i].z, below[i].z, above[i].w, below[i].w};
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
          const uint32_t b0[2] = {piece[unit].x, piece[unit].y};
          multiply_add<T>(sum[unit], a0, b0);
        }
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
          const uint32_t b1[2] = {piece[unit].z, piece[unit].w};
          multiply_add<T>(sum[unit], a1, b1);
        }
      }
    }
  }

  __device__ void keep_partial(const float (&sum)[UNITS][4]) {
    float* upper = work + (warp * kTile + lane / 4) * pitch + lane % 4 * 2;
    float* lower = upper + 8 * pitch;
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      if (unit >= units) break;
      upper[unit * kUnit] = sum[unit][0], upper[unit * kUnit + 1] = sum[unit][1];
      lower[unit * kUnit] = sum[unit][2], lower[unit * kUnit + 1] = sum[unit][3];
    }
  }

  // Adds the partial sums of warps and of the cluster's blocks, always in one order, and writes
  // what the layer gives for the tiles of a group.
  template <bool FIRST>
  __device__ void finish(int first_tile) {
    const int rows_shift = kTileShift + group_shift;          // of the group's rows
    const int chunk_groups_shift = kWarpShift - group_shift;  // of the partial sums of a block
    const int parts = a.cluster_size << chunk_groups_shift;
    for (int of_share = threadIdx.x; of_share < share; of_share += kDenoiseThreads) {
      const int item = rank * share + of_share;
      const int row_of_group = item & ((1 << rows_shift) - 1), quad = item >> rows_shift;
      const int row = first_tile * kTile + row_of_group;
      if (row >= rows) continue;
      const int column = column_of(quad * kQuad / kUnit) + quad * kQuad % kUnit;
      float sum[kQuad] = {};
      for (int begin = 0; begin < parts; begin += kPartsAhead) {
        float part[kPartsAhead][kQuad];
#pragma unroll
        for (int i = 0; i < kPartsAhead; ++i) {
          const int peer = (begin + i) >> chunk_groups_shift;
          const int chunk_group = (begin + i) & ((1 << chunk_groups_shift) - 1);
          const int warp_row = (chunk_group << rows_shift) + row_of_group;
          const float* mine = work + warp_row * pitch + quad * kQuad;
          if (begin + i < parts) load_from_peer(mine, peer, part[i]);
        }
#pragma unroll
        for (int i = 0; i < kPartsAhead; ++i) {
#pragma unroll
          for (int j = 0; j < kQuad; ++j) sum[j] += begin + i < parts ? part[i][j] : 0.0f;
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
  const int rows, tiles, group_shift, layers, rank, cluster, units, chunks;
  const int share;  // of what a group's tiles give, in quads, that a block of the cluster writes
  const int lane, warp;
};

}  // namespace nova
