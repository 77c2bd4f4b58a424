// The denoise loop for any CPU; CMakeLists.txt sets the compiler's options.
#define VECTOR_BYTES 16
#include "denoise_kernel.h"

const nova::cpp::Kernel& nova::cpp::portable_kernel() {
  static const Kernel kernel{"baseline", kPanel, &workspace, &run};
  return kernel;
}
