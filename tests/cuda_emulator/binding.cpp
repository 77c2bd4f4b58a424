// The Python module `cuda_emulator`: launches with the names and arguments of nova_kernels._cuda,
// which run on CPU tensors. `seed` draws another order of threads.
#include "arguments_binding.h"
#include "denoise.cuh"

namespace {

unsigned seed = 0;

template <typename T>
void denoise_as(const nova::DenoiseArguments& arguments) {
  *arguments.arrivals = 0;
  emulator::Launch(arguments.clusters * arguments.cluster_size, nova::kDenoiseThreads,
                   arguments.shared_bytes, arguments.cluster_size, seed,
                   [&] {
                     switch (arguments.passes) {
                       case 1: return nova::denoise_kernel<T, 1>(arguments);
                       case 2: return nova::denoise_kernel<T, 2>(arguments);
                       default: return nova::denoise_kernel<T, 3>(arguments);
                     }
                   })
      .run();
}

void denoise(const nova::DenoiseArguments& arguments, std::uintptr_t) {
  if (arguments.dtype == nova::Dtype::kFloat16) return denoise_as<__half>(arguments);
  denoise_as<__nv_bfloat16>(arguments);
}

}  // namespace

PYBIND11_MODULE(cuda_emulator, module) {
  nova::bind_arguments(module);
  module.def("denoise", &denoise);
  module.def("set_seed", [](unsigned value) { seed = value; });
}
