// The Python module nova_kernels._cuda. This file and arguments_binding.h alone know Python; no
// file knows torch, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <string>

#include "arguments_binding.h"
#include "device_info.cuh"
#include "launches.h"

namespace py = pybind11;

namespace {

std::string host_compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::list architectures;
  std::istringstream words(NOVA_CUDA_ARCHITECTURES);
  for (std::string word; words >> word;) {
    architectures.append(word);
  }
  py::dict info;
  info["cuda_version"] = nova::cuda_version();
  info["architectures"] = architectures;
  info["cuda_compiler"] = nova::cuda_compiler();
  info["host_compiler"] = host_compiler();
  return info;
}

py::list devices() {
  py::list result;
  for (const nova::DeviceInfo& device : nova::query_devices()) {
    py::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] =
        py::make_tuple(device.compute_capability_major, device.compute_capability_minor);
    entry["sm_count"] = device.sm_count;
    entry["shared_memory_per_block_optin"] = device.shared_memory_per_block_optin;
    entry["memory_bytes"] = device.memory_bytes;
    result.append(entry);
  }
  return result;
}

template <typename Arguments>
void bind_launch(py::module_& module, const char* name, void (*launch)(const Arguments&, void*),
                 const char* doc) {
  module.def(
      name,
      [launch](const Arguments& arguments, std::uintptr_t stream) {
        launch(arguments, reinterpret_cast<void*>(stream));
      },
      doc);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA part of nova_kernels; works on raw pointers and streams, without torch.";
  module.def("build_info", &build_info,
             "CUDA version, architectures and compilers that this module was built with.");
  module.def("devices", &devices,
             "One dictionary per visible GPU; empty where there is no driver or no GPU.");
  nova::bind_arguments(module);
  bind_launch(module, "denoise", &nova::launch_denoise,
              "All steps of the denoise loop, on a stream of the current device.");
  module.def("denoise_clusters", &nova::count_denoise_clusters,
             "Clusters of the denoise kernel that the current device runs at once.");
  bind_launch(module, "scale_shift", &nova::launch_scale_shift,
              "LN(x) * (1 + scale) + shift, on a stream of the current device.");
  bind_launch(module, "scale_shift_backward", &nova::launch_scale_shift_backward,
              "Gradients of x and scale.");
  bind_launch(module, "residual_norm", &nova::launch_residual_norm,
              "x + gate * (LN(h) * weight + bias), on a stream of the current device.");
  bind_launch(module, "residual_norm_backward", &nova::launch_residual_norm_backward,
              "Gradients of h and gate, and sums of those of weight and bias over strips of rows.");
}
