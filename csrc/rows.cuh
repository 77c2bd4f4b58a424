// Threads that hold a row in registers: a warp where rows are narrow, else a block.
#pragma once

#include <primitives.cuh>

#include "arguments.h"
#include "block_sum.cuh"
#include "numeric.cuh"
#include "row_plan.h"

namespace nova {

// One thread's part of the rows of a launch. T is the dtype of rows, VECTOR how many values are
// loaded and stored by one instruction.
template <typename T, int VECTOR>
class RowThread {
  static constexpr int kAccesses = kRowValues / VECTOR;

 public:
  // What the thread has of a row, in float32. Places behind the row's end hold 0.
  using Values = float[kAccesses][VECTOR];

  __device__ explicit RowThread(const RowArguments& arguments)
      : inner_size(arguments.inner),
        width(arguments.width),
        warps(warps_of_row(arguments.width)),
        warp(threadIdx.x / kWarpSize),
        first_column((warps == 1 ? 0 : warp * kWarpSize * kRowValues) +
                     static_cast<int>(threadIdx.x) % kWarpSize * VECTOR),
        accesses((width - first_column + kWarpSize * VECTOR - 1) / (kWarpSize * VECTOR)) {}

  // Number of the threads that share a row: the row itself, or the strip of rows.
  __device__ int group() const {
    const int block = static_cast<int>(blockIdx.x);
    return warps == 1 ? block * kNarrowRows + warp : block;
  }

  __device__ void move_to(int row) {
    outer_index = row / inner_size;
    inner_index = row - outer_index * inner_size;
  }

  // Calls function(i, j) for all places [i][j] of Values.
  template <typename Function>
  __device__ static void for_values(Function function) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) function(i, j);
    }
  }

  // Calls function(i) for all accesses that lie inside the row: Values[i] is what one of them has.
  template <typename Function>
  __device__ void for_accesses(Function function) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (is_inside(i)) function(i);
    }
  }

  // The current row of a tensor.
  __device__ void load(const StridedRows& rows, Values& values) const {
    const T* row = begin_of(rows);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      if (is_inside(i)) {
        nova::load(row + column(i), values[i]);
      } else {
#pragma unroll
        for (float& value : values[i]) value = 0.0f;
      }
    }
  }

  __device__ void store(const StridedRows& rows, const Values& values) const {
    store(begin_of(rows), values);
  }
  template <typename U>
  __device__ void store(U* row, const Values& values) const {
    for_accesses([&](int i) { nova::store(row + column(i), values[i]); });
  }

  // Access i of the current row.
  __device__ void store(const StridedRows& rows, int i, const float (&values)[VECTOR]) const {
    nova::store(begin_of(rows) + column(i), values);
  }

  // Multiplies by the current row of a tensor.
  __device__ void multiply(Values& values, const StridedRows& rows) const {
    multiply(values, begin_of(rows));
  }

  // Multiplies by a vector (width,), or leaves the values as they are where there is none.
  __device__ void multiply(Values& values, const void* vector) const {
    if (vector != nullptr) for_accesses([&](int i) { multiply(values[i], i, vector); });
  }

  // An access: values = values * weight + bias, as far as these are there.
  __device__ void scale_and_shift(float (&values)[VECTOR], int i, const void* weight,
                                  const void* bias) const {
    if (weight != nullptr) multiply(values, i, weight);
    if (bias != nullptr) {
      float summand[VECTOR];
      nova::load(static_cast<const T*>(bias) + column(i), summand);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) values[j] += summand[j];
    }
  }

  // Every total becomes its mean over the row, once all threads of the row have called this. Means
  // of one row after the other take the places 0, 1, ... of shared memory in turn, at least two.
  template <int PLACE, int N>
  __device__ void average(float (&totals)[N]) {
    static_assert(PLACE + N <= kRowSums);
    sum_over_warps(totals, warps, reinterpret_cast<float*>(shared_memory()) + PLACE * warps);
#pragma unroll
    for (float& total : totals) total *= 1.0f / width;
  }

  // values = (values - mean) / deviation; returns 1 / deviation.
  __device__ float standardize(Values& values, float eps) {
    float mean[1] = {}, variance[1] = {};
    for_values([&](int i, int j) { mean[0] += values[i][j]; });
    average<0>(mean);
    for_values([&](int i, int j) {
      values[i][j] = is_inside(i) ? values[i][j] - mean[0] : 0.0f;
      variance[0] += values[i][j] * values[i][j];
    });
    average<1>(variance);
    const float inverse = rsqrtf(variance[0] + eps);
    for_values([&](int i, int j) { values[i][j] *= inverse; });
    return inverse;
  }

  // grad becomes the gradient of what standardize() was given, from that of its result: a
  // standardized row's gradient has neither a mean nor a part along the row.
  __device__ void standardize_backward(Values& grad, const Values& normed, float inverse) {
    float means[2] = {};
    for_values([&](int i, int j) {
      means[0] += grad[i][j];
      means[1] += grad[i][j] * normed[i][j];
    });
    average<2>(means);
    for_values([&](int i, int j) {
      grad[i][j] = (grad[i][j] - means[0] - normed[i][j] * means[1]) * inverse;
    });
  }

 private:
  __device__ void multiply(float (&values)[VECTOR], int i, const void* vector) const {
    float factor[VECTOR];
    nova::load(static_cast<const T*>(vector) + column(i), factor);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) values[j] *= factor[j];
  }

  // First column of an access. A warp has neighbouring columns, so that accesses lie at distances
  // that the compiler knows.
  __device__ int column(int i) const { return first_column + i * kWarpSize * VECTOR; }

  // The same as column(i) < width.
  __device__ bool is_inside(int i) const { return i < accesses; }

  __device__ T* begin_of(const StridedRows& rows) const {
    return static_cast<T*>(rows.data) + outer_index * rows.outer + inner_index * rows.inner;
  }

  const int inner_size, width, warps, warp, first_column, accesses;
  int outer_index = 0, inner_index = 0;
};

}  // namespace nova
