// The linear layers of the denoise kernel: a block's part of them, for all rows.
#pragma once

#include "denoise_layout.cuh"
#include "numeric.cuh"

namespace nova {

constexpr int kChunk = 32;      // inputs of a chunk: the k of two mma, 16 bytes a lane
constexpr int kWarpShift = 3;   // of the warps, 2^3; so many tiles of rows there are at most
constexpr int kTileShift = 4;   // of a tile's rows, 2^4
constexpr int kPartsAhead = 8;  // partial sums that a thread asks for before it waits
constexpr int kQuad = 4;        // neighbouring outputs that a thread adds up and writes
static_assert(1 << kWarpShift == kDenoiseWarps && 1 << kTileShift == kTile, "powers of two");

// T is float16 or bfloat16, UNITS the most units of a cluster that it is compiled for. Between two
// barriers every read that waits for another one counts, and so does every division: threads ask
// for all that they can at once, and indices are made of shifts.
template <typename T, int UNITS>
class DenoiseLayers {
  // Chunks of rows that a warp asks for before it waits. With few units, where clusters are small
  // and a warp has more chunks, there are registers for more.
  static constexpr int kChunksAhead = UNITS <= kSomeUnits ? 10 : 5;

 public:
  __device__ DenoiseLayers(const DenoiseArguments& arguments, const DenoiseLayout& layout,
                           const DenoiseMemory& memory)
      : a(arguments),
        slot_bytes(layout.slot),
        columns(layout.columns),
        weights(memory.weights),
        work(memory.work),
        biases(memory.biases),
        rows(arguments.passes * arguments.tokens),
        tiles((rows + kTile - 1) / kTile),
        tiles_shift(tiles > 4 ? 3 : tiles > 2 ? 2 : tiles - 1),
        layers(2 * arguments.depth),
        rank(arguments.cluster_size > 1 ? rank_in_cluster() : 0),
        cluster(static_cast<int>(blockIdx.x) / arguments.cluster_size),
        units(count_units()),
        share((units * (kUnit / kQuad) << (kTileShift + tiles_shift)) / arguments.cluster_size),
        lane(threadIdx.x % kWarpSize),
        tile(threadIdx.x / kWarpSize & ((1 << tiles_shift) - 1)),
        chunk_group(threadIdx.x / kWarpSize >> tiles_shift),
        chunk_groups_shift(kWarpShift - tiles_shift),
        all_chunks(arguments.width / kChunk / arguments.cluster_size),
        chunks((all_chunks - chunk_group + (1 << chunk_groups_shift) - 1) >> chunk_groups_shift) {}

  // Layers are the first and the second one of each block of the MLP in turn.
  __device__ static bool is_first(int layer) { return layer % 2 == 0; }

  // Begins to copy all layers that stay, or the first one, and reads the biases.
  __device__ void load_first_weights() {
    const int count = resident() ? layers : 1;
#pragma unroll 1
    for (int layer = 0; layer < count; ++layer) copy_weights(layer, layer);
#pragma unroll 1
    for (int i = threadIdx.x; i < layers * units * kUnit; i += kDenoiseThreads) {
      const int layer = i / (units * kUnit), column = i % (units * kUnit);
      const T* bias = static_cast<const T*>(a.layer_bias[layer]);
      biases[layer * columns + column] =
          to_float(bias[column_of(column / kUnit) + column % kUnit]);
    }
  }

  // Before the first layer: the weights that stay are there, when the threads have met.
  __device__ void wait_for_resident_weights() const {
    if (resident()) wait_for_copies<0>();
  }

  // For all rows hidden = silu(layer(normed)) if the layer is the first one of a block of the MLP,
  // else branch = layer(hidden). Warps divide tiles of rows and chunks of inputs among themselves,
  // so that no two read the same part of a row; blocks of a cluster divide the inputs once more. A
  // warp writes its partial sums where they are added.
  __device__ void multiply(int step, int layer) {
    lane = kept_here(lane), tile = kept_here(tile), chunk_group = kept_here(chunk_group);
    const char* slice = weights_of(step, layer);
    if (tile < tiles) {
      float sum[UNITS][4] = {};
      accumulate(sum, static_cast<const T*>(is_first(layer) ? a.normed : a.hidden), slice);
      hand_over(sum);
    }
    sync_cluster(a.cluster_size);
    finish(layer);
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
    const int pieces = all_chunks * kWarpSize;
#pragma unroll 1
    for (int unit = 0; unit < units; ++unit) {
      char* to = weights + slot * slot_bytes + unit * pieces * 16;
#pragma unroll 4
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
    if (resident()) return weights + layer * slot_bytes;
    const int slot = (step * layers + layer) % 2;
    copy_weights(layer + 1 < layers ? layer + 1 : 0, 1 - slot);
    wait_for_copies<1>();
    __syncthreads();
    return weights + slot * slot_bytes;
  }

  // A unit that there is: where a cluster has fewer than UNITS, the last one is computed again, as
  // that is cheaper than branches, and its sums are left.
  __device__ int existing(int unit) const { return unit < units ? unit : units - 1; }

  // sum += rows of the warp's tile times all units, over its chunks.
  __device__ void accumulate(float (&sum)[UNITS][4], const T* in, const char* slice) const {
    const int upper = tile * kTile + lane / 4, lower = upper + 8;
    const T* column = in + first_input() + lane % 4 * 8;
    const uint4 zero = {0, 0, 0, 0};
#pragma unroll 1
    for (int begin = 0; begin < chunks; begin += kChunksAhead) {
      uint4 above[kChunksAhead], below[kChunksAhead];
#pragma unroll
      for (int i = 0; i < kChunksAhead; ++i) {
        const int chunk = chunk_group + ((begin + i) << chunk_groups_shift);
        const T* from = column + chunk * kChunk;
        const bool inside = chunk < all_chunks;
        above[i] = inside && upper < rows ? load_16_bytes_through_l2(from + upper * a.width) : zero;
        below[i] = inside && lower < rows ? load_16_bytes_through_l2(from + lower * a.width) : zero;
      }
#pragma unroll
      for (int i = 0; i < kChunksAhead; ++i) {
        const int chunk = chunk_group + ((begin + i) << chunk_groups_shift);
        if (chunk >= all_chunks) break;
        const char* pieces = slice + (chunk * kWarpSize + lane) * 16;
        uint4 piece[UNITS];
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
          const char* from = pieces + existing(unit) * all_chunks * kWarpSize * 16;
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

  // What a layer gives is numbered by quads, row after row; blocks of the cluster add up equal
  // shares. A block has every partial sum of its share: [part][item of the share][kQuad]. Writes
  // the warp's partial sums to the blocks that add them up.
  __device__ void hand_over(const float (&sum)[UNITS][4]) {
    const int part = (rank << chunk_groups_shift) + chunk_group;
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      if (unit >= units) break;
      const int quad = unit * (kUnit / kQuad) + lane % 4 / 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * kTile + lane / 4 + 8 * half;
        if (row >= rows) break;
        const int item = (quad << (kTileShift + tiles_shift)) + row;
        const int peer = (item >= share) + (item >= 2 * share) + (item >= 3 * share);
        float* to = work + (part * share + item - peer * share) * kQuad + lane % 2 * 2;
        store_to_peer(to, peer, sum[unit][2 * half], sum[unit][2 * half + 1]);
      }
    }
  }

  // Adds the partial sums of warps and of the cluster's blocks, always in one order, and writes
  // what the layer gives.
  __device__ void finish(int layer) {
    const int rows_shift = kTileShift + tiles_shift;  // of all tiles' rows
    const int parts = a.cluster_size << chunk_groups_shift;
#pragma unroll 1
    for (int of_share = threadIdx.x; of_share < share; of_share += kDenoiseThreads) {
      const int item = rank * share + of_share;
      const int row = item & ((1 << rows_shift) - 1);
      if (row >= rows) continue;
      const int of_columns = (item >> rows_shift) * kQuad;
      float sum[kQuad];
      load(biases + layer * columns + of_columns, sum);
#pragma unroll 1
      for (int begin = 0; begin < parts; begin += kPartsAhead) {
        float part[kPartsAhead][kQuad];
#pragma unroll
        for (int i = 0; i < kPartsAhead; ++i) {
          const float* from = work + ((begin + i) * share + of_share) * kQuad;
          if (begin + i < parts) load(from, part[i]);
        }
#pragma unroll
        for (int i = 0; i < kPartsAhead; ++i) {
#pragma unroll
          for (int j = 0; j < kQuad; ++j) sum[j] += begin + i < parts ? part[i][j] : 0.0f;
        }
      }
      const int to = row * a.width + column_of(of_columns / kUnit) + of_columns % kUnit;
      if (is_first(layer)) {
#pragma unroll
        for (float& value : sum) value = __fdividef(value, 1.0f + __expf(-value));
        store(static_cast<T*>(a.hidden) + to, sum);
      } else {
        store(a.branch + to, sum);
      }
    }
  }

  const DenoiseArguments& a;
  const int slot_bytes, columns;
  char* const weights;
  float *const work, *const biases;
  const int rows, tiles;
  const int tiles_shift;  // of the next power of two
  const int layers, rank, cluster, units;
  const int share;  // of what a layer gives, in quads, that a block of the cluster adds up
  int lane, tile, chunk_group;
  const int chunk_groups_shift;
  const int all_chunks, chunks;  // of the block, and of this warp
};

}  // namespace nova
