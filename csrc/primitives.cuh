// What kernels need of the hardware beyond CUDA C++, one function for each. Kernels include it in
// angle brackets, so that the emulator of the tests can put its own in front (tests/cuda_emulator).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace nova {

// The block's shared memory, as much as the launch asked for.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// The same value, of which the compiler knows nothing: what is made of it is made where it is used,
// and not before a loop, to be kept in registers.
__device__ inline int kept_here(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Reads of what another SM may have written during this kernel: past L1, which is not coherent.
__device__ inline uint4 load_16_bytes_through_l2(const void* from) {
  return __ldcg(static_cast<const uint4*>(from));
}
__device__ inline void load_through_l2(const float* from, float (&to)[4]) {
  const float4 value = __ldcg(reinterpret_cast<const float4*>(from));
  to[0] = value.x, to[1] = value.y, to[2] = value.z, to[3] = value.w;
}
__device__ inline float load_through_l2(const float* from) { return __ldcg(from); }

// Copies 16 bytes from global to shared memory without waiting.
__device__ inline void copy_async(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// Makes a group of the copies that this thread has begun since the last call.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// c += a b by a warp, with a (16 x 16), b (16 x 8) in half precision and c (16 x 8) in float32.
// With g = lane / 4 and t = lane % 4 a lane holds, as pairs of neighbours,
//   a: (row g, k 2t), (row g + 8, k 2t), (row g, k 2t + 8), (row g + 8, k 2t + 8)
//   b: (k 2t, column g), (k 2t + 8, column g)
//   c: (row g, column 2t), (row g + 8, column 2t).
template <typename T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Adds 1 to a counter in global memory, after everything that this thread has seen written: by
// itself, and by threads that it has met at a barrier. A release is all that this takes; the fence
// of __threadfence() orders more, and is slower.
__device__ inline void arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Waits until a counter has reached a value; what was written before arrivals can be read then.
__device__ inline void wait_until_reached(const unsigned* counter, unsigned value) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < value);
}

// Clusters of thread blocks, which read each other's shared memory. Before sm_90 a block is alone.
__device__ inline int rank_in_cluster() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

// Waits for all threads of the cluster; what they have written to shared memory can be read then.
__device__ inline void sync_cluster(int cluster_size) {
#if __CUDA_ARCH__ >= 900
  if (cluster_size > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// Writes two floats to the place in a peer's shared memory that `mine` has in this block's. The
// peer reads them after the next sync_cluster. A block without a cluster is its own peer 0.
__device__ inline void store_to_peer(float* mine, int rank, float first, float second) {
  auto address = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second)
               : "memory");
#else
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second)
               : "memory");
#endif
}

}  // namespace nova
