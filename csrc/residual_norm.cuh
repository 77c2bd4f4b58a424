// x + gate * (LN(h) * weight + bias): one read of every input, one write.
//
// In the backward pass the threads of a row walk down a strip of rows and keep their sums of the
// gradients of weight and bias in registers, so that these are added in one order always.
#pragma once

#include "rows.cuh"

namespace nova {

template <typename T, int VECTOR>
__global__ void __launch_bounds__(kMaxRowThreads)
    residual_norm_kernel(const __grid_constant__ ResidualNormArguments a) {
  RowThread<T, VECTOR> thread(a);
  const int row = thread.group();
  if (row >= a.num_rows) return;
  thread.move_to(row);
  typename RowThread<T, VECTOR>::Values values, branch, gate;
  thread.load(a.h, branch);
  thread.load(a.x, values);
  if (a.gate.data != nullptr) thread.load(a.gate, gate);
  thread.standardize(branch, a.eps);
  thread.for_accesses([&](int i) { thread.scale_and_shift(branch[i], i, a.weight, a.bias); });
  if (a.gate.data != nullptr) {
    thread.for_values([&](int i, int j) { branch[i][j] *= gate[i][j]; });
  }
  thread.for_values([&](int i, int j) { values[i][j] += branch[i][j]; });
  thread.store(a.out, values);
}

template <typename T, int VECTOR>
__global__ void __launch_bounds__(kMaxRowThreads)
    residual_norm_backward_kernel(const __grid_constant__ ResidualNormBackwardArguments a) {
  RowThread<T, VECTOR> thread(a);
  typename RowThread<T, VECTOR>::Values weight_sum = {}, bias_sum = {};
  const int64_t first = static_cast<int64_t>(thread.group()) * a.strip;
  if (first >= a.num_rows) return;
  const int64_t behind = first + a.strip;
  const int end = behind < a.num_rows ? static_cast<int>(behind) : a.num_rows;
  for (int row = static_cast<int>(first); row < end; ++row) {
    thread.move_to(row);
    typename RowThread<T, VECTOR>::Values grad, normed;
    thread.load(a.grad, grad);
    thread.load(a.h, normed);
    const float inverse = thread.standardize(normed, a.eps);
    if (a.gate.data != nullptr) {
      thread.for_accesses([&](int i) {
        float branch[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) branch[j] = normed[i][j];
        thread.scale_and_shift(branch, i, a.weight, a.bias);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) branch[j] *= grad[i][j];
        thread.store(a.grad_gate, i, branch);
      });
      thread.multiply(grad, a.gate);
    }
    thread.for_values([&](int i, int j) {
      weight_sum[i][j] += grad[i][j] * normed[i][j];
      bias_sum[i][j] += grad[i][j];
    });
    thread.multiply(grad, a.weight);
    thread.standardize_backward(grad, normed, inverse);
    thread.store(a.grad_h, grad);
  }
  if (a.weight_sums != nullptr) {
    const int64_t begin = static_cast<int64_t>(thread.group()) * a.width;
    thread.store(a.weight_sums + begin, weight_sum);
    thread.store(a.bias_sums + begin, bias_sum);
  }
}

// Calls launch(kernel, plan) with the kernel of these arguments.
template <typename Launch>
void with_kernel(const ResidualNormArguments& a, Launch launch) {
  const RowPlan plan = plan_rows(a, 1, {a.x, a.h, a.gate, a.out}, {a.weight, a.bias});
  with_row_types(a.dtype, plan.vector, [&](auto types) {
    using Types = decltype(types);
    launch(residual_norm_kernel<typename Types::Type, Types::kVector>, plan);
  });
}

// The same of the backward pass.
template <typename Launch>
void with_kernel(const ResidualNormBackwardArguments& a, Launch launch) {
  const RowPlan plan = plan_rows(a, a.strip, {a.grad, a.h, a.gate, a.grad_h, a.grad_gate},
                                 {a.weight, a.bias});
  with_row_types(a.dtype, plan.vector, [&](auto types) {
    using Types = decltype(types);
    launch(residual_norm_backward_kernel<typename Types::Type, Types::kVector>, plan);
  });
}

}  // namespace nova
