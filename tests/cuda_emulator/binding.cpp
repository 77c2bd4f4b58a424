// The Python module `cuda_emulator`: launches with the names and arguments of nova_kernels._cuda,
// which run on CPU tensors. `seed` draws another order of threads.
#include "arguments_binding.h"
#include "denoise.cuh"
#include "residual_norm.cuh"
#include "scale_shift.cuh"

namespace {

unsigned seed = 0;

template <typename T>
void denoise_as(const nova::DenoiseArguments& arguments) {
  const auto kernel = nova::denoise_kernel_for<T>(arguments.passes, arguments.units);
  *arguments.arrivals = 0;
  emulator::Launch(arguments.clusters * arguments.cluster_size, nova::kDenoiseThreads,
                   arguments.shared_bytes, arguments.cluster_size, seed,
                   [&] { kernel(arguments); })
      .run();
}

void denoise(const nova::DenoiseArguments& arguments, std::uintptr_t) {
  if (arguments.dtype == nova::Dtype::kFloat16) return denoise_as<__half>(arguments);
  denoise_as<__nv_bfloat16>(arguments);
}

// Whether the last launch over rows read them 16 bytes at a time.
bool wide = false;

template <typename Arguments>
void launch_rows(const Arguments& arguments, std::uintptr_t) {
  nova::with_kernel(arguments, [&](void (*kernel)(Arguments), const nova::RowPlan& plan) {
    wide = plan.vector;
    emulator::Launch(plan.blocks, plan.threads, plan.shared_bytes, 1, seed,
                     [&] { kernel(arguments); })
        .run();
  });
}

}  // namespace

PYBIND11_MODULE(cuda_emulator, module) {
  nova::bind_arguments(module);
  module.def("denoise", &denoise);
  module.def("scale_shift", &launch_rows<nova::ScaleShiftArguments>);
  module.def("scale_shift_backward", &launch_rows<nova::ScaleShiftBackwardArguments>);
  module.def("residual_norm", &launch_rows<nova::ResidualNormArguments>);
  module.def("residual_norm_backward", &launch_rows<nova::ResidualNormBackwardArguments>);
  module.def("was_wide", [] { return wide; });
  module.def("set_seed", [](unsigned value) { seed = value; });
}
