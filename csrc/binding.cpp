// The Python module nova_kernels._cuda. This file and arguments_binding.h alone know Python; no file
// knows torch, so one build serves every torch version.
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

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA part of nova_kernels; works on raw pointers and streams, without torch.";
  module.def("build_info", &build_info,
             "CUDA version, architectures and compilers that this module was built with.");
  module.def("devices", &devices,
             "One dictionary per visible GPU; empty where there is no driver or no GPU.");
  nova::bind_arguments(module);
  module.def(
      "denoise",
      [](const nova::DenoiseArguments& arguments, std::uintptr_t stream) {
        nova::launch_denoise(arguments, reinterpret_cast<void*>(stream));
      },
      "All steps of the denoise loop, on a stream of the current device.");
  module.def("denoise_clusters", &nova::count_denoise_clusters,
             "Clusters of the denoise kernel that the current device runs at once.");
}
