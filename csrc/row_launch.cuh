// Launches of kernels of rows.
#pragma once

#include "check.h"
#include "row_plan.h"

namespace nova {

// Launches the kernel that with_kernel() finds for these arguments; `op` is what an error names.
template <typename Arguments>
void launch_rows(const char* op, const Arguments& arguments, void* stream) {
  with_kernel(arguments, [&](void (*kernel)(Arguments), const RowPlan& plan) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(plan.blocks);
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    check(op, cudaLaunchKernelEx(&config, kernel, arguments));
  });
}

}  // namespace nova
