// The denoise loop for CPUs with AVX-512; CMakeLists.txt sets the compiler's options.
#define VECTOR_BYTES 64
#include "denoise_kernel.h"

const nova::cpp::Kernel& nova::cpp::avx512_kernel() {
  static const Kernel kernel{"AVX-512", kPanel, &workspace, &run};
  return kernel;
}
