// Launches of the kernels, for the binding; `stream` is a cudaStream_t of the current device.
#pragma once

#include "arguments.h"

namespace nova {

// Throws std::runtime_error where CUDA refuses the launch, for example because the grid does not fit
// on the GPU at once.
void launch_denoise(const DenoiseArguments& arguments, void* stream);

// How many clusters of `cluster_size` blocks of the denoise kernel the current device runs at once,
// with all of its shared memory for each block; 0 where it has no such clusters.
int count_denoise_clusters(Dtype dtype, int passes, int cluster_size);

}  // namespace nova
