// The persistent denoise kernel in bfloat16: a file of its own, as it takes longest to compile.
#include "denoise.cuh"

namespace nova {

template DenoiseKernel denoise_kernel_for<__nv_bfloat16>(int passes, int units);

}  // namespace nova
