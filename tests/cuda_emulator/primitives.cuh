// csrc/primitives.cuh on the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <utility>

namespace nova {

inline char* shared_memory() {
  return reinterpret_cast<char*>(emulator::fiber().block->shared.data());
}

inline int kept_here(int value) { return value; }

inline uint4 load_16_bytes_through_l2(const void* from) {
  return *static_cast<const uint4*>(from);
}
inline void load_through_l2(const float* from, float (&to)[4]) {
  std::memcpy(to, from, sizeof(to));
}
inline float load_through_l2(const float* from) { return *from; }

// Copies happen as late as they may on a GPU: when their thread waits for them.
inline void copy_async(void* shared, const void* global) {
  emulator::fiber().uncommitted.push_back({shared, global, 16});
}

inline void commit_copies() {
  emulator::Fiber& fiber = emulator::fiber();
  fiber.groups.push_back(std::move(fiber.uncommitted));
  fiber.uncommitted.clear();
}

template <int PENDING>
void wait_for_copies() {
  auto& groups = emulator::fiber().groups;
  for (; groups.size() > PENDING; groups.pop_front()) {
    for (const emulator::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

// Declared before numeric.cuh defines them.
inline float to_float(__half value);
inline float to_float(__nv_bfloat16 value);

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::Warp& warp = emulator::fiber().warp();
  const int lane = emulator::fiber().lane(), g = lane / 4, t = lane % 4;
  std::memcpy(&warp.shown[lane][0], a, sizeof(a));
  std::memcpy(&warp.shown[lane][4], b, sizeof(b));
  emulator::Launch::active->wait_at(warp.barrier);
  // Pair `part` of what lane (row, pair) shows.
  const auto pair = [&](int row, int pair_of_row, int part, int which) {
    T values[2];
    std::memcpy(values, &warp.shown[row * 4 + pair_of_row][part], sizeof(values));
    return to_float(values[which]);
  };
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int upper_half = k / 8, pair_of_row = k % 8 / 2, which = k % 2;
      c[i] += pair(g, pair_of_row, lower + 2 * upper_half, which) *
              pair(column, pair_of_row, 4 + upper_half, which);
    }
  }
  emulator::Launch::active->wait_at(warp.barrier);
}

inline void arrive(unsigned* counter) { ++*counter; }

inline void wait_until_reached(const unsigned* counter, unsigned value) {
  emulator::Launch::active->wait_for([=] { return *counter >= value; });
}

inline int rank_in_cluster() {
  const emulator::Block& block = *emulator::fiber().block;
  return block.index % static_cast<int>(block.cluster->blocks.size());
}

inline void sync_cluster(int) {
  emulator::Launch::active->wait_at(emulator::fiber().block->cluster->barrier);
}

inline void store_to_peer(float* mine, int rank, float first, float second) {
  const emulator::Block& block = *emulator::fiber().block;
  const auto offset = reinterpret_cast<char*>(mine) - shared_memory();
  char* peer = reinterpret_cast<char*>(block.cluster->blocks[rank]->shared.data());
  const float values[2] = {first, second};
  std::memcpy(peer + offset, values, sizeof(values));
}

}  // namespace nova
