// How rows are divided among threads and blocks, and which types a kernel of rows is made for. Host
// code without CUDA calls, which the emulator of the tests shares.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "arguments.h"

namespace nova {

constexpr int kRowValues = 16;          // of a row that a thread holds
constexpr int kMaxRowThreads = 512;     // of a block
constexpr int kNarrowRows = 4;          // rows of a block where a row takes one warp
constexpr int kMaxRowWidth = kMaxRowThreads * kRowValues;
constexpr int kRowSums = 4;             // sums of a row, each with its place in shared memory
constexpr int kAccessBytes = 16;        // of the widest load and store

// Warps that hold a row together.
__host__ __device__ constexpr int warps_of_row(int width) {
  return (width + 32 * kRowValues - 1) / (32 * kRowValues);
}

// A launch over rows.
struct RowPlan {
  int blocks, threads, shared_bytes;
  bool vector;  // rows are read and written kAccessBytes at a time, else value by value
};

inline int bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Whether all rows begin and end at multiples of kAccessBytes. Vectors are (width,).
inline bool allows_wide_accesses(const RowArguments& a, std::initializer_list<StridedRows> tensors,
                                 std::initializer_list<const void*> vectors) {
  const int bytes = bytes_of(a.dtype);
  const auto divides = [](uintptr_t value) { return value % kAccessBytes == 0; };
  bool allowed = divides(static_cast<uintptr_t>(a.width) * bytes);
  for (const void* vector : vectors) allowed &= divides(reinterpret_cast<uintptr_t>(vector));
  for (const StridedRows& rows : tensors) {
    allowed &= divides(reinterpret_cast<uintptr_t>(rows.data));
    allowed &= divides(static_cast<uintptr_t>(rows.outer) * bytes);
    allowed &= divides(static_cast<uintptr_t>(rows.inner) * bytes);
  }
  return allowed;
}

// What errors name.
inline std::string op_of(const ScaleShiftArguments&) { return "scale_shift"; }
inline std::string op_of(const ScaleShiftBackwardArguments&) { return "scale_shift_backward"; }
inline std::string op_of(const ResidualNormArguments&) { return "residual_norm"; }
inline std::string op_of(const ResidualNormBackwardArguments&) { return "residual_norm_backward"; }

// A launch in which the threads of a row work on `strip` rows, one after the other.
template <typename Arguments>
RowPlan plan_rows(const Arguments& a, int strip, std::initializer_list<StridedRows> tensors,
                  std::initializer_list<const void*> vectors = {}) {
  if (a.width < 1 || a.width > kMaxRowWidth) {
    throw std::invalid_argument(op_of(a) + ": width must be 1 to " + std::to_string(kMaxRowWidth) +
                                ", got " + std::to_string(a.width));
  }
  if (a.num_rows < 1 || a.inner < 1 || strip < 1) {
    throw std::invalid_argument(op_of(a) + ": num_rows, inner and strip must be at least 1, got " +
                                std::to_string(a.num_rows) + ", " + std::to_string(a.inner) +
                                " and " + std::to_string(strip));
  }
  const int warps = warps_of_row(a.width);
  const int rows_per_block = warps == 1 ? kNarrowRows : 1;
  const int64_t rows_of_block = static_cast<int64_t>(rows_per_block) * strip;
  RowPlan plan;
  plan.blocks = static_cast<int>((a.num_rows + rows_of_block - 1) / rows_of_block);
  plan.threads = warps * rows_per_block * 32;
  plan.shared_bytes = kRowSums * warps * static_cast<int>(sizeof(float));
  plan.vector = allows_wide_accesses(a, tensors, vectors);
  return plan;
}

// Values of type Type, kVector of them an access.
template <typename T, int VECTOR>
struct RowTypes {
  using Type = T;
  static constexpr int kVector = VECTOR;
};

// Calls run(RowTypes<...>()) with the types of a launch.
template <typename Function>
void with_row_types(Dtype dtype, bool vector, Function run) {
  constexpr int kHalves = kAccessBytes / 2, kFloats = kAccessBytes / 4;
  switch (dtype) {
    case Dtype::kFloat16:
      return vector ? run(RowTypes<__half, kHalves>()) : run(RowTypes<__half, 1>());
    case Dtype::kBFloat16:
      return vector ? run(RowTypes<__nv_bfloat16, kHalves>()) : run(RowTypes<__nv_bfloat16, 1>());
    case Dtype::kFloat32:
      return vector ? run(RowTypes<float, kFloats>()) : run(RowTypes<float, 1>());
  }
}

}  // namespace nova
