// Launches of the kernels, for the binding; `stream` is a cudaStream_t of the current device.
#pragma once

#include "arguments.h"

namespace nova {

// Throws std::runtime_error where CUDA refuses the launch, say because the grid does not fit
// on the GPU at once.
void launch_denoise(const DenoiseArguments& arguments, void* stream);

// How many clusters of `cluster_size` blocks of the denoise kernel the current device runs at once,
// with all of its shared memory for each block; 0 where it has no such clusters.
int count_denoise_clusters(Dtype dtype, int passes, int cluster_size);

// One launch each; std::invalid_argument for rows that no block can hold.
void launch_scale_shift(const ScaleShiftArguments& arguments, void* stream);
void launch_scale_shift_backward(const ScaleShiftBackwardArguments& arguments, void* stream);
void launch_residual_norm(const ResidualNormArguments& arguments, void* stream);
void launch_residual_norm_backward(const ResidualNormBackwardArguments& arguments, void* stream);

}  // namespace nova
