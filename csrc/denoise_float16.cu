// The persistent denoise kernel in float16: a file of its own, as it takes longest to compile.
#include "denoise.cuh"

namespace nova {

template DenoiseKernel denoise_kernel_for<__half>(int passes, int units);

}  // namespace nova
