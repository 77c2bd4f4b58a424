// The denoise loop for CPUs with AVX2; CMakeLists.txt sets the compiler's options.
#define VECTOR_BYTES 32
#include "denoise_kernel.h"

const nova::cpp::Kernel& nova::cpp::avx2_kernel() {
  static const Kernel kernel{"AVX2", kPanel, &workspace, &run};
  return kernel;
}
