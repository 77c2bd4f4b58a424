// LN(x) * (1 + scale) + shift: one read of every input, one write. The backward pass computes the
// statistics again, since it reads x anyway.
#pragma once

#include "rows.cuh"

namespace nova {

template <typename T, int VECTOR>
__global__ void __launch_bounds__(kMaxRowThreads)
    scale_shift_kernel(const __grid_constant__ ScaleShiftArguments a) {
  RowThread<T, VECTOR> thread(a);
  const int row = thread.group();
  if (row >= a.num_rows) return;
  thread.move_to(row);
  typename RowThread<T, VECTOR>::Values values, scale, shift;
  thread.load(a.x, values);
  thread.load(a.scale, scale);
  thread.load(a.shift, shift);
  thread.standardize(values, a.eps);
  thread.for_values([&](int i, int j) {
    values[i][j] = values[i][j] * (scale[i][j] + a.scale_offset) + shift[i][j];
  });
  thread.store(a.out, values);
}

// At least one block: without it ptxas of CUDA 12.4 aims at 64 registers on sm_80 and spills one.
template <typename T, int VECTOR>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    scale_shift_backward_kernel(const __grid_constant__ ScaleShiftBackwardArguments a) {
  RowThread<T, VECTOR> thread(a);
  const int row = thread.group();
  if (row >= a.num_rows) return;
  thread.move_to(row);
  typename RowThread<T, VECTOR>::Values grad, normed, scale;
  thread.load(a.grad, grad);
  thread.load(a.x, normed);
  thread.load(a.scale, scale);
  const float inverse = thread.standardize(normed, a.eps);
  thread.for_values([&](int i, int j) {
    const float factor = scale[i][j] + a.scale_offset;
    scale[i][j] = grad[i][j] * normed[i][j];
    grad[i][j] *= factor;
  });
  thread.store(a.grad_scale, scale);
  thread.standardize_backward(grad, normed, inverse);
  thread.store(a.grad_x, grad);
}

// Calls launch(kernel, plan) with the kernel of these arguments.
template <typename Launch>
void with_kernel(const ScaleShiftArguments& a, Launch launch) {
  const RowPlan plan = plan_rows(a, 1, {a.x, a.scale, a.shift, a.out});
  with_row_types(a.dtype, plan.vector, [&](auto types) {
    using Types = decltype(types);
    launch(scale_shift_kernel<typename Types::Type, Types::kVector>, plan);
  });
}

// The same of the backward pass.
template <typename Launch>
void with_kernel(const ScaleShiftBackwardArguments& a, Launch launch) {
  const RowPlan plan = plan_rows(a, 1, {a.grad, a.x, a.scale, a.grad_x, a.grad_scale});
  with_row_types(a.dtype, plan.vector, [&](auto types) {
    using Types = decltype(types);
    launch(scale_shift_backward_kernel<typename Types::Type, Types::kVector>, plan);
  });
}

}  // namespace nova
