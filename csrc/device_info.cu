#include "device_info.cuh"

#include <cuda_runtime.h>

namespace nova {

std::vector<DeviceInfo> query_devices() {
  std::vector<DeviceInfo> devices;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    // A machine without a driver or a GPU is no error here; forget what CUDA remembers of it.
    cudaGetLastError();
    return devices;
  }
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
      // Keep the place, so that an entry's position remains the CUDA index.
      cudaGetLastError();
      devices.push_back({"unavailable", 0, 0, 0, 0, 0});
      continue;
    }
    devices.push_back({properties.name, properties.major, properties.minor,
                       properties.multiProcessorCount, properties.sharedMemPerBlockOptin,
                       properties.totalGlobalMem});
  }
  return devices;
}

std::string cuda_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string cuda_compiler() {
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." +
         std::to_string(__CUDACC_VER_MINOR__) + "." + std::to_string(__CUDACC_VER_BUILD__);
}

}  // namespace nova
